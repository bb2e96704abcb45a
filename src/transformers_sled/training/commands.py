"""How a training command tells that its input is bad."""

import sys
from collections.abc import Callable
from pathlib import Path


def run_command(main: Callable[[], None]) -> None:
    """
    Runs the command of a script. Bad input, that is a `ValueError` or an `OSError`, ends it in the manner of `argparse`, with
    one line that says why and exit code 2; `python -X dev` shows the traceback.

    Args:
        main (callable):
            The command.

    Example:

    ```python
    >>> from transformers_sled.training import load_source, run_command

    >>> run_command(lambda: print(load_source("my_corpus/train-*.parquet")))  # doctest: +SKIP
    count.py: error: `path` 'my_corpus/train-*.parquet' matches no file: give the path or glob pattern of existing files
    ```
    """
    try:
        main()
    except (OSError, ValueError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
