"""The streaming examples, run as a reader would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from transformers_sled import SledForSpeechSynthesis, SledProcessor


ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
TEXT = "She was humiliated by his remarks, and she left. Ça va? The dog barked all night."
OPTIONS = ["--model", str(GOLDEN / "streaming"), "--codec", str(GOLDEN / "codec"), "--seed", "5", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(script: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / script), *OPTIONS, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        # A shell that runs the tests in the background has them, and what they start, ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def write_slowly(process: subprocess.Popen, data: bytes) -> None:
    """In pieces that cut characters."""
    for index in range(0, len(data), 7):
        process.stdin.write(data[index : index + 7])
        process.stdin.flush()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / "streaming", codec=GOLDEN / "codec")
    processor = SledProcessor.from_pretrained(GOLDEN / "streaming")
    (audio,) = model.generate(**processor(TEXT), generator=torch.Generator().manual_seed(5))
    assert len(audio) > 0
    return audio


def test_speech_to_a_file(tmp_path, speech):
    process = start("stream_speech.py", "--output", str(tmp_path / "speech.flac"))
    write_slowly(process, TEXT.encode())
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    audio, sampling_rate = soundfile.read(tmp_path / "speech.flac", dtype="float32")
    assert sampling_rate == 24_000
    np.testing.assert_allclose(audio, speech, atol=2e-4)
    assert "real-time factor" in errors.decode().splitlines()[-1]


def test_speech_to_standard_output(speech):
    process = start("stream_speech.py", "--output", "-")
    output, errors = process.communicate(TEXT.encode(), timeout=300)
    assert process.returncode == 0, errors.decode()
    np.testing.assert_allclose(np.frombuffer(output, "<i2") / 32767, speech, atol=2e-4)


def test_listener_leaves_and_interrupt(tmp_path):
    # Without an end of its own in sight.
    process = start("stream_speech.py", "--output", "-", "--guidance-scale", "1")
    process.stdout.close()
    write_slowly(process, TEXT.encode())
    errors = process.stderr.read().decode()
    assert process.wait(timeout=300) == 0 and "Traceback" not in errors

    process = start("stream_speech.py", "--output", str(tmp_path / "speech.wav"), "--guidance-scale", "1")
    # Text of one chunk: the script has written its first audio and waits for more text.
    process.stdin.write(b"She was humiliated by his ")
    process.stdin.flush()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (tmp_path / "speech.wav").exists():
        time.sleep(0.05)
    while time.monotonic() < deadline and (tmp_path / "speech.wav").stat().st_size < 4000:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert soundfile.info(tmp_path / "speech.wav").frames > 0


def test_bad_input(tmp_path):
    process = start("stream_speech.py", "--output", str(tmp_path / "speech.wav"))
    _, errors = process.communicate(b" \n", timeout=300)
    assert process.returncode == 2 and "`text` must not be empty" in errors.decode().splitlines()[-1]


def test_speech_from_a_language_model(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "streaming")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    arguments = ["--llm", str(tmp_path / "llm"), "--max-new-tokens", "30", "--output", str(tmp_path / "answer.wav")]
    process = start("stream_from_llm.py", "What did the dog do?", *arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert soundfile.info(tmp_path / "answer.wav").frames > 0
