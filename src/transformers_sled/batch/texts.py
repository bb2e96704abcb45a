"""The texts of a batch: where they are read from, what each must have, and which are spoken together."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import load_dataset


FILES = (".parquet", ".jsonl", ".json", ".csv")
COLUMNS = ("id", "text", "voice", "seed", "language")

# A batch is what is computed anew where a machine dies. It holds this many rows for each stream, so that few are idle
# while the last ones end, and no more text than fits a block of Ray Data as audio.
ROWS_PER_STREAM = 4
MAX_BATCH_CHARACTERS = 50_000


@dataclass(frozen=True)
class TextRow:
    """A text to speak. One with an `error` is not spoken."""

    id: str
    text: str = ""
    voice: str | None = None
    seed: int = 0
    language: str | None = None
    error: str | None = None


ROW_TYPE = pa.struct(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("voice", pa.string()),
        ("seed", pa.int64()),
        ("language", pa.string()),
        ("error", pa.string()),
    ]
)
PLAN_SCHEMA = pa.schema([("batch", pa.string()), ("rows", pa.list_(ROW_TYPE))])


def read_records(source: str, split: str = "train") -> Iterator[dict[str, Any]]:
    r"""
    Reads the records of a source.

    Args:
        source (`str`):
            A Parquet, JSON lines (`.jsonl`, `.json`) or CSV file, a folder of text files (`.txt`), of which the names are
            the ids, or a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            The split of a dataset on the Hub.

    Returns:
        `Iterator[dict[str, Any]]`: the records.

    Raises:
        `ValueError`: if the source cannot be read.
    """
    path = Path(source)
    if path.suffix in FILES and not path.exists():
        raise ValueError(f"{source!r} does not exist.")
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise ValueError(f"The folder {source!r} has no text files (.txt).")
        for file in files:
            yield {"id": file.stem, "text": file.read_text(encoding="utf-8", errors="replace")}
    elif not path.exists() and path.suffix not in FILES:
        dataset = load_dataset(source, split=split)
        yield from dataset.select_columns([name for name in dataset.column_names if name in COLUMNS])
    elif path.suffix == ".parquet":
        file = pa.parquet.ParquetFile(path)
        for table in file.iter_batches(columns=[name for name in COLUMNS if name in file.schema_arrow.names]):
            yield from table.to_pylist()
    elif path.suffix in (".jsonl", ".json"):
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"Line {number} of {source!r} is no JSON: {error}") from error
                if not isinstance(record, dict):
                    raise ValueError(f"Line {number} of {source!r} must be a JSON object.")
                yield record
    elif path.suffix == ".csv":
        options = pa.csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=True)
        parsing = pa.csv.ParseOptions(newlines_in_values=True)
        for record in pa.csv.read_csv(path, convert_options=options, parse_options=parsing).to_pylist():
            yield {**record, "seed": _parse_seed(record.get("seed"))}
    else:
        raise ValueError(f"{source!r} must be a folder of text files or a file in {', '.join(FILES)}.")


def _parse_seed(text: str | None) -> int | float | str | None:
    """A number, if it is one."""
    for kind in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            return kind(text or "")
    return text


def _is_unicode(value: object) -> bool:
    """Whether it can be written to a file: JSON may name one half of a pair of code units."""
    return not isinstance(value, str) or not any("\ud800" <= character <= "\udfff" for character in value)


def check_record(record: dict[str, Any], max_characters: int) -> TextRow:
    r"""
    Makes a row of a record. What is wrong with it becomes the row's error, except for its id, without which there is no
    row.

    Args:
        record (`dict[str, Any]`):
            The record.
        max_characters (`int`):
            Length that a text may have.

    Raises:
        `ValueError`: if there is no id.
    """
    values: list[Any] = [record.get(column) for column in COLUMNS]
    name, text, voice, seed, language = values
    if isinstance(seed, float):
        # Tables of numbers with gaps have become fractions.
        seed = None if math.isnan(seed) else int(seed) if seed.is_integer() else seed
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise ValueError(
            f"`id` must be a string or a whole number, got {name!r} in the row with the text {text!r:.60}."
        )
    name = str(name)
    broken = next((column for column, value in zip(COLUMNS, values, strict=True) if not _is_unicode(value)), None)
    if broken == "id":
        raise ValueError(f"`id` must be Unicode, got {name!a}.")
    # So that a row sounds the same wherever and with whatever it is spoken.
    default_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    error = None
    if broken is not None:
        error = f"`{broken}` must be Unicode, got half a character."
    elif not isinstance(text, str):
        error = f"`text` must be a string, got {text!r:.60}."
    elif not text.strip():
        error = "`text` must not be empty."
    elif len(text) > max_characters:
        error = f"`text` must have at most {max_characters} characters, got {len(text)}."
    elif voice is not None and not isinstance(voice, str):
        error = f"`voice` must be a string, got {voice!r:.60}."
    elif language is not None and not isinstance(language, str):
        error = f"`language` must be a string, got {language!r:.60}."
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        error = f"`seed` must be a whole number from 0 to 2**63 - 1, got {seed!r:.60}."
    if error is not None:
        return TextRow(name, error=error)
    return TextRow(name, text, voice or None, default_seed if seed is None else seed, language or None)


def plan_batches(rows: Iterable[TextRow], max_streams: int) -> pa.Table:
    r"""
    Sorts rows by length, the longest first, and cuts them into batches, which are always the same for the same rows.

    Args:
        rows (iterable of [`TextRow`]):
            The rows.
        max_streams (`int`):
            Rows that are spoken at a time.

    Returns:
        `pyarrow.Table`: the names of the batches, and the rows of each.

    Raises:
        `ValueError`: if two rows have the same id, or there are none.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.text), row.id))
    if not ordered:
        raise ValueError("There are no rows.")
    names: set[str] = set()
    batches: list[list[dict[str, Any]]] = []
    num_characters = 0
    for row in ordered:
        if row.id in names:
            raise ValueError(f"`id` must differ from row to row, but {row.id!r} is there twice.")
        names.add(row.id)
        num_characters += len(row.text)
        if (
            not batches
            or len(batches[-1]) == ROWS_PER_STREAM * max_streams
            or (num_characters > MAX_BATCH_CHARACTERS and batches[-1])
        ):
            batches.append([])
            num_characters = len(row.text)
        batches[-1].append(asdict(row))
    return pa.table({"batch": [f"{index:09d}" for index in range(len(batches))], "rows": batches}, PLAN_SCHEMA)


__all__ = ["PLAN_SCHEMA", "TextRow", "check_record", "plan_batches", "read_records"]
