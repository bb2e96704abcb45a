"""The example scripts, run as a reader would run them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from transformers_sled import builtin_voice


ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
CHECKPOINT = ["--model", str(GOLDEN / "offline"), "--codec", str(GOLDEN / "codec"), "--seed", "1"]


def run(script, *arguments, folder, text=None):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_synthesize_takes_text_from_everywhere(tmp_path):
    (tmp_path / "text.txt").write_text("The dog barked.")
    spoken = []
    for name, arguments, standard_input in (
        ("a.wav", ["The dog barked."], None),
        ("b.flac", ["--text-file", "text.txt"], None),
        ("c.wav", [], "The dog barked."),
    ):
        result = run("synthesize.py", *arguments, "--output", name, *CHECKPOINT, folder=tmp_path, text=standard_input)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(name) and "real-time factor" in result.stdout
        spoken.append(soundfile.read(tmp_path / name)[0])
    np.testing.assert_allclose(spoken[1], spoken[0], atol=1e-4)
    np.testing.assert_allclose(spoken[2], spoken[0], atol=1e-4)


def test_the_voice_in_the_box_is_the_default(tmp_path):
    prompts = Path(builtin_voice()).parent / "prompts"
    prompt_text = (prompts / "af_heart.txt").read_text().strip()
    prompt = ["--prompt-audio", prompts / "af_heart.flac", "--prompt-text", prompt_text]
    for script, options, standard_input in (
        ("synthesize.py", ["She left."], None),
        ("clone_voice.py", ["She left.", *prompt], None),
        ("stream_speech.py", [], "She left."),
    ):
        output = tmp_path / f"{script}.wav"
        result = run(script, *options, "--seed", 0, "--output", output, folder=tmp_path, text=standard_input)
        assert result.returncode == 0, result.stderr
        assert soundfile.info(output).duration > 0.3


def test_clone_voice_keeps_a_voice_and_uses_it_again(tmp_path):
    soundfile.write(tmp_path / "voice.wav", np.random.default_rng(0).normal(0, 0.1, 8_000), 16_000)
    recording = ["--prompt-audio", "voice.wav", "--prompt-text", "Two plus two.", "--save-voice", "voice.safetensors"]
    result = run("clone_voice.py", "The dog.", *recording, "--output", "a.wav", *CHECKPOINT, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    voice = ["--voice", "voice.safetensors"]
    result = run("clone_voice.py", "The dog.", *voice, "--output", "b.wav", *CHECKPOINT, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run("synthesize.py", "The dog.", *voice, "--output", "c.wav", *CHECKPOINT, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = soundfile.read(tmp_path / "a.wav")[0]
    for name in ("b.wav", "c.wav"):
        np.testing.assert_allclose(soundfile.read(tmp_path / name)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("synthesize.py", [""], "`text`"),
        ("synthesize.py", ["Hello.", "--output", "a.xyz"], "`saving_path`"),
        ("synthesize.py", ["Hello.", "--text-file", "text.txt"], "--text-file"),
        ("synthesize.py", ["Hello.", "--output", "missing/a.wav"], "missing/a.wav"),
        ("clone_voice.py", ["Hello.", "--prompt-audio", "voice.wav"], "--prompt-text"),
        ("clone_voice.py", ["Hello.", "--output", "missing/a.wav"], "missing/a.wav"),
        ("clone_voice.py", ["Hello.", "--voice", "missing.safetensors"], "`path`"),
        ("synthesize.py", ["Hello.", "--voice", "nobody"], "`path` must be one of the voices [] or a file"),
    ],
)
def test_bad_input_gets_one_line(script, arguments, named, tmp_path):
    result = run(script, *arguments, *CHECKPOINT, folder=tmp_path)
    assert result.returncode != 0
    assert named in result.stderr and "Traceback" not in result.stderr
