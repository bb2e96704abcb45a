"""The watermark: it is there where it was written, also after compression, and nowhere else."""

from io import BytesIO

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice
from transformers_sled.audio_sled import read_audio
from transformers_sled.cli import app
from transformers_sled.server.audio_formats import AudioEncoder
from transformers_sled.server.watermark import Watermarker, detect_watermark, is_available


if not is_available():
    pytest.skip("needs the extra `watermark`", allow_module_level=True)

RATE = 24_000


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    processor = SledProcessor.from_pretrained(builtin_voice())
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice())
    inputs = processor("The dog barked all night, and nobody slept.", voice_preset="af_heart")
    return model.generate(**inputs, generator=torch.Generator().manual_seed(0))[0].numpy()


def mark(waveform: np.ndarray, sizes) -> np.ndarray:
    marker = Watermarker()
    pieces, start = [], 0
    for size in sizes:
        pieces.append(marker.mark(waveform[start : start + size]))
        start += size
    return np.concatenate([*pieces, marker.mark(waveform[start:]), marker.finish()])


@pytest.fixture(scope="module")
def marked(speech) -> np.ndarray:
    return mark(speech, [4_800] * 30)


def test_it_is_found_where_it_was_written(speech, marked):
    assert detect_watermark(speech) < 0.4
    assert detect_watermark(marked) > 0.9
    assert detect_watermark(marked[len(marked) // 2 :]) > 0.9


def test_it_is_quiet(speech, marked):
    assert len(marked) == len(speech)
    noise = marked - speech
    assert 10 * np.log10(np.sum(speech**2) / np.sum(noise**2)) > 12
    # Nothing above 2 kHz changes.
    spectrum = np.abs(np.fft.rfft(noise)) ** 2
    frequencies = np.fft.rfftfreq(len(noise), 1 / RATE)
    assert spectrum[frequencies > 2_200].sum() < 1e-3 * spectrum.sum()


@pytest.mark.parametrize("sizes", [[], [1, 2, 3], [800, 800, 7], [777] * 60])
def test_pieces_of_any_size_give_the_same(speech, marked, sizes):
    np.testing.assert_allclose(mark(speech, sizes), marked, atol=1e-5)


@pytest.mark.parametrize("num_samples", [0, 1, 100, 5_000])
def test_short_speech_keeps_its_length(speech, num_samples):
    short = mark(speech[10_000 : 10_000 + num_samples], [50])
    assert len(short) == num_samples and np.isfinite(short).all()


@pytest.mark.parametrize("audio_format", ["mp3", "opus", "aac"])
def test_it_survives_compression(marked, audio_format):
    encoder = AudioEncoder(audio_format, RATE)
    data = encoder.encode(marked) + encoder.finish()
    assert detect_watermark(read_audio(data, target_rate=RATE)) > 0.7


def test_the_service_marks_unless_it_is_told_not_to(make_service, tmp_path):
    request = {"model": "tts-1", "voice": "alloy", "input": "The dog barked all night.", "response_format": "wav"}
    answers = {}
    for watermark in (True, False):
        with make_service(watermark=watermark) as service, service.client() as client:
            assert client.get("/ready").json()["watermark"] is watermark
            answers[watermark] = client.post("/v1/audio/speech", json={**request, "seed": 1}).content
    for watermark, answer in answers.items():
        (tmp_path / "speech.wav").write_bytes(answer)
        result = CliRunner().invoke(app, ["detect", str(tmp_path / "speech.wav")])
        assert result.exit_code == (0 if watermark else 1), result.output
        assert ("no watermark" in result.stdout) is not watermark
    lengths = [len(soundfile.read(BytesIO(answer))[0]) for answer in answers.values()]
    assert lengths[0] == lengths[1]
