"""README and documentation: each page's Python blocks run as they stand, in order, offline; what they name exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hub_cache import prepare_hub_cache
from transformers_sled import training


ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Its blocks read what its commands have made: `training/test_docs_training.py` runs both.
WITH_COMMANDS = {"training.md"}
GUIDES = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").rglob("README.md"))]

# Each page in a namespace and folder of its own, all in one process, which imports once.
RUN_PAGES = """
import os, shutil, sys, traceback
from pathlib import Path

failed = []
for page in sys.argv[1:]:
    folder = Path(page).with_suffix("")
    folder.mkdir()
    shutil.copy("voice.wav", folder)
    start = os.getcwd()
    os.chdir(folder)
    try:
        exec(compile(Path(start, page).read_text(), page, "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        failed.append(page)
    os.chdir(start)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def names_of(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.timeout(600)
def test_python_blocks_run(tmp_path):
    cache = prepare_hub_cache(
        tmp_path / "cache",
        {
            "ICTNLP/SLED-TTS-Libriheavy": GOLDEN / "offline",
            "ICTNLP/SLED-TTS-Streaming-Libriheavy": GOLDEN / "streaming",
            "facebook/encodec_24khz": GOLDEN / "codec",
        },
    )
    soundfile.write(tmp_path / "voice.wav", np.random.default_rng(0).normal(0, 0.1, 24_000), 24_000)
    scripts = []
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        if blocks and page.name not in WITH_COMMANDS:
            scripts.append(f"{page.stem}.py")
            (tmp_path / scripts[-1]).write_text("\n".join(blocks))
    assert {"README.py", "usage.py", "streaming.py", "voices.py"} <= set(scripts)
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", RUN_PAGES, *scripts],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    assert soundfile.info(tmp_path / "README" / "dog.wav").samplerate == 24_000


@pytest.mark.parametrize("page", names_of(GUIDES))
def test_scripts_and_links_exist(page):
    text = (ROOT / page).read_text()
    scripts = re.findall(r"(?<![\w./-])((?:examples|evaluation|tests|docs|src)/[\w/.-]*\w)", text)
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    paths = [ROOT / script for script in scripts] + [(ROOT / page).parent / link for link in links]
    assert [str(path) for path in paths if not path.exists()] == []


def test_training_is_in_the_reference():
    text = (ROOT / "docs" / "reference_training.md").read_text()
    names = re.findall(r"^::: transformers_sled\.training\.[\w.]+\.(\w+)$", text, flags=re.MULTILINE)
    assert sorted(names) == training.__all__


def test_readme_is_short_and_shows_on_a_package_index():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 9000
    # A package index has the text alone: a picture from the repository would be a hole.
    assert not re.search(r"!\[|<img|<audio", text)
