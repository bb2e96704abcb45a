"""The command `sled`."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from transformers import logging
from typer.testing import CliRunner

from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice
from transformers_sled.cli import app


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def progress_bars():
    yield
    logging.enable_progress_bar()


def run(*arguments, text=None):
    result = CliRunner().invoke(app, [*map(str, arguments)], input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run_in_shell(*arguments, code="from transformers_sled.cli import app; app()", **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", f"import sys; {code}", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=120, **kwargs)


def test_speaks_to_a_file(tmp_path):
    first = run("speak", "No.", "--output", tmp_path / "a.wav", "--seed", 1, "--voice", "af_heart")
    assert first.exit_code == 0, first.output
    assert "s of speech" in first.stderr and first.stdout == ""
    again = run("speak", "-o", tmp_path / "b.flac", "--seed", 1, "--voice", "af_heart", text="No.")
    assert again.exit_code == 0, again.output
    audio, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 24_000 and len(audio) > 4_000
    np.testing.assert_allclose(soundfile.read(tmp_path / "b.flac")[0], audio, atol=1e-4)
    other = run("speak", "No.", "-o", tmp_path / "c.wav", "--seed", 1, "--voice", "am_michael", "--max-duration", 0.4)
    assert other.exit_code == 0
    assert len(soundfile.read(tmp_path / "c.wav")[0]) == 0.4 * 24_000


def test_speaks_with_weights_in_4_bits(tmp_path):
    result = run("speak", "No.", "-o", tmp_path / "a.wav", "--seed", 1, "--quantization", "int4", "--max-duration", 1)
    assert result.exit_code == 0, result.output
    assert len(soundfile.read(tmp_path / "a.wav")[0]) > 4_000


def test_speaks_in_a_voice_that_was_kept(tmp_path):
    processor = SledProcessor.from_pretrained(builtin_voice())
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice())
    inputs = processor("Yes.", prompt_audio=np.random.default_rng(0).normal(0, 0.1, 8_000), sampling_rate=16_000)
    latents = model.encode_prompt(inputs["prompt_values"], inputs["prompt_values_mask"])
    processor.save_voice(tmp_path / "voice.safetensors", "Yes.", **latents)
    result = run("speak", "No.", "-o", tmp_path / "a.wav", "--voice", tmp_path / "voice.safetensors", "--seed", 1)
    assert result.exit_code == 0, result.output


def test_speaks_standard_input_to_standard_output():
    result = run_in_shell("speak", "--stream", "--output", "-", "--seed", 1, input=b"The cat. \xff")
    assert result.returncode == 0, result.stderr
    samples = np.frombuffer(result.stdout, "<i2")
    assert len(samples) > 4_000 and np.abs(samples).max() > 300
    assert b"s of speech" in result.stderr


def test_a_listener_who_leaves_ends_it_without_a_word():
    command = (
        f"{sys.executable} -m transformers_sled.cli speak 'The dog barked all night.' -o - --seed 1 | head -c 100"
    )
    result = subprocess.run(
        command, shell=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert len(result.stdout) == 100
    assert b"Traceback" not in result.stderr and b"Exception" not in result.stderr


def test_lists_voices():
    result = run("voices")
    assert result.exit_code == 0
    assert {"af_heart (default)", "bf_emma", "am_michael"} <= set(result.stdout.splitlines())
    assert run("voices", "--model", "missing/model").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["speak", "", "-o", "a.wav"], 1, "`text`"),
        (["speak", "No.", "-o", "a.xyz"], 1, "a.xyz"),
        (["speak", "No.", "-o", "missing/a.wav"], 1, "missing/a.wav"),
        (["speak", "No.", "-o", "a.wav", "--voice", "nobody"], 1, "nobody"),
        (["speak", "No.", "-o", "a.wav", "--model", "missing/model"], 1, "missing/model"),
        (["speak", "No.", "-o", "a.wav", "--guidance-scale", "-1"], 1, "guidance_scale"),
        (["speak", "No.", "-o", "a.wav", "--max-duration", "0"], 1, "max_duration"),
        (["speak", "No.", "-o", "a.wav", "--quantization", "int3"], 1, "int3"),
        (["speak", "No.", "--stream", "-o", "a.wav"], 2, "--stream"),
        (["speak", "No.", "--seed", "x", "-o", "a.wav"], 2, "--seed"),
        (["serve", "--max-streams", "0"], 2, "--max-streams"),
        (["serve", "--port", "70000"], 2, "--port"),
        (["sing"], 2, "sing"),
    ],
)
def test_errors_are_told_in_a_line(arguments, code, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert named in result.stderr and "Traceback" not in result.output
    if code == 1:
        assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "Nothing must be left."


def test_an_empty_key_is_refused():
    pytest.importorskip("fastapi")
    result = run("serve", "--api-key", " ")
    assert result.exit_code == 1 and "api_keys" in result.stderr


def test_the_service_says_what_is_missing():
    result = run_in_shell("serve", code="sys.modules['fastapi'] = None; from transformers_sled.cli import app; app()")
    assert result.returncode == 1
    error = result.stderr.decode().splitlines()[-1]
    assert error.startswith("error: ") and "fastapi" in error and "transformers-sled[serve]" in error
