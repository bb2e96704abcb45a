"""
Speech of a teacher, Kokoro-82M, for a corpus. Needs the program espeak-ng, which turns text into phonemes, and the package
`onnxruntime`.
"""

import io
import json
import os
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import soundfile
from tqdm.auto import tqdm

from .labels import transcribe


try:
    import onnxruntime
except ImportError:
    onnxruntime = None


SAMPLING_RATE = 24_000
STYLE_SIZE = 256
PEAK = 0.7
SPEEDS = (0.95, 1.1)
PUNCTUATION = re.compile(r'([,.?!;:"]+)')
# espeak-ng gives the word "I" no stress, without which the teacher drops it at the start of a sentence.
PRONOUN = re.compile(r"(?<!\S)I(?!\S)")


def phonemize(text: str, language: str) -> str:
    """Phonemes as the teacher was trained on, with the punctuation of the text."""
    parts: list[str] = []
    for part in PUNCTUATION.split(text):
        if PUNCTUATION.fullmatch(part) or not part.strip():
            parts.append(part)
        else:
            space = " " if part.startswith(" ") and parts else ""
            phonemes = " ".join(transcribe(part, language).split())
            parts.append(space + PRONOUN.sub("ˌI", phonemes))
    return "".join(parts)


class Teacher:
    """
    The teacher with its vocabulary and voices.

    Args:
        model (`str` or `os.PathLike`):
            ONNX file.
        vocabulary (`str` or `os.PathLike`):
            JSON file with `vocab`, from characters to ids.
        voices (`str` or `os.PathLike`):
            Folder of a file `NAME.bin` for every speaker: float32, a style for every number of tokens.

    Raises:
        `ValueError`: If espeak-ng or onnxruntime is not installed, or a file is not there.
    """

    def __init__(self, model: str | os.PathLike, vocabulary: str | os.PathLike, voices: str | os.PathLike):
        if shutil.which("espeak-ng") is None:
            raise ValueError("espeak-ng is not installed: it turns text into phonemes")
        if onnxruntime is None:
            raise ValueError("onnxruntime is not installed, which runs the teacher: `pip install onnxruntime`")
        for name, path in (("model", model), ("vocabulary", vocabulary), ("voices", voices)):
            if not Path(path).exists():
                raise ValueError(f"`{name}` {str(path)!r} is not there")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.vocabulary = json.loads(Path(vocabulary).read_text(encoding="utf-8"))["vocab"]
        self.voices = Path(voices)

    def speak(self, phonemes: str, speaker: str, speed: float) -> np.ndarray:
        """Samples `(samples,)` of phonemes said by a speaker."""
        styles = np.fromfile(self.voices / f"{speaker}.bin", dtype=np.float32).reshape(-1, 1, STYLE_SIZE)
        tokens = [self.vocabulary[character] for character in phonemes if character in self.vocabulary]
        inputs = {
            "tokens": np.array([[0, *tokens, 0]], dtype=np.int64),
            "style": styles[min(len(tokens), len(styles)) - 1],
            "speed": np.array([speed], dtype=np.float32),
        }
        audio = np.asarray(self.session.run(None, inputs)[0], dtype=np.float32).ravel()
        return audio * (PEAK / max(np.abs(audio).max(), 1e-6))


def speak_texts(
    teacher: Teacher,
    texts: Sequence[str],
    speakers: Sequence[str],
    output: str | os.PathLike,
    *,
    language: str = "en-us",
    prefix: str = "extra-",
    seed: int = 0,
) -> datasets.Dataset:
    """
    Speaks texts as a file of a corpus. The same call after an interruption goes on where it stopped.

    Args:
        teacher ([`Teacher`]):
            Who speaks.
        texts (sequence of `str`):
            The texts.
        speakers (sequence of `str`):
            Voices of the teacher, of which one is drawn for every text.
        output (`str` or `os.PathLike`):
            Parquet file to write.
        language (`str`, *optional*, defaults to `"en-us"`):
            Voice of espeak-ng.
        prefix (`str`, *optional*, defaults to `"extra-"`):
            What the ids start with.
        seed (`int`, *optional*, defaults to 0):
            Seed of speakers and speeds.

    Returns:
        `datasets.Dataset`: with `id`, `text`, `speaker`, `duration` in seconds and `audio` (24 kHz Ogg Opus bytes).

    Raises:
        `ValueError`: If there are no texts, or the teacher has no such speaker.
    """
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("`texts` must have a text or more, none of them empty")
    if missing := [speaker for speaker in speakers if not (teacher.voices / f"{speaker}.bin").is_file()]:
        raise ValueError(f"`speakers` must be voices of {teacher.voices}, which has no {', '.join(missing)}")
    unfinished = Path(output).with_suffix(".partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, text in enumerate(tqdm(texts, desc="Speaking")):
        chance = random.Random(f"{seed} {index}")
        speaker, speed = chance.choice(speakers), chance.uniform(*SPEEDS)
        file = unfinished / f"{index:05}.ogg"
        if not file.exists():
            buffer = io.BytesIO()
            audio = teacher.speak(phonemize(text, language), speaker, speed)
            soundfile.write(buffer, audio, SAMPLING_RATE, format="OGG", subtype="OPUS")
            partial = file.with_suffix(".writing")
            partial.write_bytes(buffer.getvalue())
            partial.rename(file)
        rows.append(
            {
                "id": f"{prefix}{index:05}",
                "text": text,
                "speaker": speaker,
                "duration": soundfile.info(file).duration,
                "audio": {"bytes": file.read_bytes(), "path": None},
            }
        )
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(output)
    shutil.rmtree(unfinished)
    return dataset
