"""Every command and every Python block of docs/training.md runs, in order, on a corpus and models in miniature."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

from hub_cache import prepare_hub_cache


ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
NOT_RUN = ("pip", "tensorboard")
SMALL_TRAINING = "--max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --bf16 false --use_cpu"
SMALL_TRAINING += " --dataloader_num_workers 0 --save_strategy no --num_audio_samples 1 --disable_tqdm true"
# What makes a command small, and what is published in test_trainer.py instead.
SMALL = {
    "prepare_data.py": "",
    "train_tokenizer.py": "--vocab_size 300",
    "train_sled.py": SMALL_TRAINING,
    "train_codec.py": "--max_steps 2 --segment_seconds 0.2 --batch_size 2 --num_eval_samples 2",
}
RUNNER = """
import runpy, sys
for words in COMMANDS:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
"""


def shrink(line, folder):
    words = [word.strip('"') for word in line.split()]
    words = words[next(index for index, word in enumerate(words) if word.endswith(".py")) :]
    if "--push_to_hub" in words:
        words.remove("--push_to_hub")
    if "--tokenizer_name" in words:
        words += ["--config_name", str(folder / "model.json")]
    return words + SMALL[Path(words[0]).name].split()


def test_the_page_runs(tmp_path):
    page = (ROOT / "docs" / "training.md").read_text()
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)).splitlines()
    commands = [shrink(line, tmp_path) for line in lines if line and not line.startswith(NOT_RUN)]
    assert {Path(words[0]).name for words in commands} == SMALL.keys()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3

    names = {
        "ICTNLP/SLED-TTS-Libriheavy": GOLDEN / "offline",
        "ICTNLP/SLED-TTS-Streaming-Libriheavy": GOLDEN / "streaming",
        "facebook/encodec_24khz": GOLDEN / "codec",
    }
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 2, "head_num_layers": 2, "head_hidden_size": 32, "noise_dim": 8}
    (tmp_path / "model.json").write_text(json.dumps(fields))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my_corpus").mkdir()
    rng, table = np.random.default_rng(0), ["file_name,text,speaker"]
    for index in range(100):
        soundfile.write(tmp_path / "my_corpus" / f"{index}.wav", 0.1 * rng.standard_normal(13_000), 24_000)
        table.append(f"{index}.wav,The dog barked. Number {index}.,anna")
    (tmp_path / "my_corpus" / "metadata.csv").write_text("\n".join(table))
    script = RUNNER.replace("COMMANDS", repr(commands)) + "\n".join(blocks)
    environment = {
        "HF_HUB_CACHE": str(prepare_hub_cache(tmp_path / "cache", names)),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for folder in ("my_voice", "my_sled", "my_streaming_sled", "my_codec/export"):
        assert (tmp_path / folder / "model.safetensors").is_file()
