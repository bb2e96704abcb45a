"""What `import transformers_sled` brings, and what only training needs."""

import subprocess
import sys

import pytest

import transformers_sled
from transformers_sled import training


HEAVY = ["datasets", "pyarrow", "pandas", "matplotlib", "peft", "tensorboard", "transformers.trainer"]


def test_nothing_of_training_but_the_collator_is_imported_with_the_package():
    script = f"import sys, transformers_sled.training; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_public_names_are_what_they_say():
    assert training.SledDataCollator is transformers_sled.SledDataCollator
    for name in training.__all__:
        assert getattr(training, name).__name__ == name
    assert set(dir(training)) == set(training.__all__)
    with pytest.raises(AttributeError, match="no attribute 'SledDataColator'"):
        _ = training.SledDataColator
