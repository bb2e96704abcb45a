"""Every Python block of the README runs as it stands, in order, with the names it loads in a Hub cache."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

from hub_cache import prepare_hub_cache


ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"


def test_python_blocks_of_the_readme(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    cache = prepare_hub_cache(
        tmp_path / "cache",
        {
            "ICTNLP/SLED-TTS-Libriheavy": GOLDEN / "offline",
            "ICTNLP/SLED-TTS-Streaming-Libriheavy": GOLDEN / "streaming",
            "facebook/encodec_24khz": GOLDEN / "codec",
        },
    )
    soundfile.write(tmp_path / "voice.wav", np.random.default_rng(0).normal(0, 0.1, 24_000), 24_000)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert soundfile.info(tmp_path / "dog.wav").samplerate == 24_000
