"""Runs an example's command in the process of the tests, where all that it needs has been imported once."""

import runpy
from pathlib import Path
from typing import Any

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(script: str, *words: Any, **options: Any) -> None:
    """
    Runs an example as its command line would.

    Args:
        script (`str`):
            Path of the script in `examples/`.
        words:
            Words of the command line.
        options:
            Options of the command line; a list is given word by word.
    """
    for name, value in options.items():
        words = (*words, f"--{name}", *(value if isinstance(value, list) else [value]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [script, *map(str, words)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
