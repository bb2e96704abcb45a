"""Arguments of a training command: a YAML or JSON file of them, and what the command line says instead."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_recipe(dataclass_types: Sequence[type], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """
    Parses the arguments of a command, whose first may be a recipe: a YAML or JSON file with values of any of them.

    Args:
        dataclass_types (sequence of dataclasses):
            What to parse into.
        arguments (sequence of `str`, *optional*):
            The arguments. Those of this process by default.

    Returns:
        `tuple`: an instance of each of the dataclasses.

    Raises:
        `ValueError`: If the file is no recipe, or has a key that is no argument.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from transformers_sled.training import parse_recipe

    >>> (arguments,) = parse_recipe([TrainingArguments], ["--output_dir", "my_sled", "--learning_rate", "5e-4"])
    >>> arguments.learning_rate
    0.0005
    ```
    """
    # An abbreviation would also hide a misspelt key.
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        file = words.pop(0)
        try:
            given = yaml.safe_load(Path(file).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{file} must hold arguments by name, got {given!r}")
        # Of a flag given twice the last counts.
        words = [word for name, value in given.items() for word in (f"--{name}", *_get_words(value))] + words
    return parser.parse_args_into_dataclasses(words)


def _get_words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
