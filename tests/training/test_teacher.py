"""A corpus file that a teacher speaks."""

import io
import shutil

import numpy as np
import pytest
import soundfile

from transformers_sled.training import load_source, speak_texts
from transformers_sled.training.teacher import phonemize


pytestmark = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng turns text into phonemes")


class Stranger:
    """Says every phoneme as a tenth of a second of a tone, and counts what it says."""

    def __init__(self, voices):
        self.voices = voices
        self.spoken = []

    def speak(self, phonemes, speaker, speed):
        self.spoken.append(phonemes)
        time = np.arange(len(phonemes) * 2_400) / 24_000
        return (0.5 * np.sin(2 * np.pi * 220 * speed * time)).astype(np.float32)


@pytest.fixture
def teacher(tmp_path):
    for name in ("anna", "ben"):
        (tmp_path / f"{name}.bin").write_bytes(b"")
    return Stranger(tmp_path)


def test_phonemes_keep_punctuation_and_stress():
    spoken = phonemize("Who is it? Wait, please.", "en-us")
    assert [mark for mark in spoken if mark in ",.?!"] == ["?", ",", "."]
    assert "ˈ" in spoken and "  " not in spoken
    # Sounds of two letters are one for the teacher.
    assert "A" in phonemize("day", "en-us") and "eɪ" not in phonemize("day", "en-us")


def test_the_pronoun_is_stressed():
    assert phonemize("I had to go, and I went.", "en-us").count("ˌI ") == 2
    assert "ˌI" not in phonemize("My eye is high.", "en-us")


def test_an_interrupted_run_goes_on(teacher, tmp_path, monkeypatch):
    texts = ["Stop.", "Who is it?", "Good morning."]
    output = tmp_path / "corpus.parquet"
    speak = teacher.speak

    def fail_at_the_last(phonemes, speaker, speed):
        if len(teacher.spoken) == 2:
            raise KeyboardInterrupt
        return speak(phonemes, speaker, speed)

    monkeypatch.setattr(teacher, "speak", fail_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        speak_texts(teacher, texts, ["anna", "ben"], output)
    assert not output.exists()
    monkeypatch.undo()
    dataset = speak_texts(teacher, texts, ["anna", "ben"], output)
    assert teacher.spoken == [phonemize(text, "en-us") for text in texts]
    rows = list(load_source(str(output)))
    assert [row["text"] for row in rows] == texts and len(rows) == len(dataset)
    assert [row["id"] for row in rows] == ["extra-00000", "extra-00001", "extra-00002"]
    assert {row["speaker"] for row in rows} <= {"anna", "ben"}
    for row in rows:
        info = soundfile.info(io.BytesIO(row["audio"]["bytes"]))
        assert (info.samplerate, info.duration) == (24_000, row["duration"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anna.bin", "ben.bin", "corpus.parquet"]


def test_a_speaker_who_is_not_there_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="which has no carl"):
        speak_texts(teacher, ["Stop."], ["anna", "carl"], tmp_path / "corpus.parquet")
    with pytest.raises(ValueError, match="none of them empty"):
        speak_texts(teacher, ["Stop.", " "], ["anna"], tmp_path / "corpus.parquet")
