"""Where speech with text comes from: LibriHeavy manifests, tables, folders of audio files, datasets on the Hub."""

import glob
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa


class DroppedItemError(ValueError):
    """
    An item that cannot be trained on.

    Args:
        reason (`str`):
            The class that it is counted under.
        detail (`str`):
            What was wrong with this one.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


def parse_cut(row: Mapping[str, Any], audio_root: str | os.PathLike = "") -> dict[str, Any]:
    """
    Reads a row from [`load_manifest`], that is, one lhotse cut with one supervision as JSON.

    The text is the supervision's `text` or, where it has none (LibriHeavy as published), the first of its
    `custom.texts`: the book's own words, with case and punctuation.

    Args:
        row (`Mapping`):
            With the line of the manifest as its `cut`.
        audio_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of recordings start from.

    Returns:
        `dict` with `id`, `text`, `speaker`, `audio` and `part`, the arguments of [`~audio_sled.read_audio`] for the cut.

    Raises:
        `DroppedItemError` (a `ValueError`): If the line is cut short or a field is missing.
    """
    try:
        cut = json.loads(row["cut"])
    except json.JSONDecodeError as error:
        raise DroppedItemError("manifest line is not JSON", str(error)) from error
    try:
        supervisions, sources = cut["supervisions"], cut["recording"]["sources"]
        if len(supervisions) != 1 or len(sources) != 1:
            raise DroppedItemError(
                "cut does not have one supervision and one source", f"{len(supervisions)} and {len(sources)}"
            )
        if sources[0].get("type", "file") != "file":
            raise DroppedItemError("recording is not a file", f"its source has type {sources[0]['type']!r}")
        supervision = supervisions[0]
        text = supervision["text"] if supervision.get("text") else supervision["custom"]["texts"][0]
        start, duration = float(cut["start"]), float(cut["duration"])
        if not (0 <= start < math.inf and 0 < duration < math.inf):
            raise DroppedItemError("cut is outside its recording", f"start {start} s, duration {duration} s")
        return {
            "id": cut["id"],
            "text": text,
            "speaker": supervision.get("speaker"),
            "audio": os.path.join(audio_root, sources[0]["source"]),
            "part": {"start": start, "duration": duration, "channel": cut.get("channel")},
        }
    except DroppedItemError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DroppedItemError("manifest line lacks a field", repr(error)) from error


def parse_row(
    row: Mapping[str, Any], columns: Mapping[str, str], audio_root: str | os.PathLike = ""
) -> dict[str, Any]:
    """
    Reads a row of a table.

    Args:
        row (`Mapping`):
            The row, its audio not decoded.
        columns (`Mapping[str, str]`):
            Names of its columns for `text`, `audio`, `speaker` and `id`, of which the last two may be absent.
        audio_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of recordings start from.

    Returns:
        `dict` with `id`, `text`, `speaker`, `audio` and `part`, which is empty.
    """
    audio = row[columns["audio"]]
    if isinstance(audio, str):
        audio = os.path.join(audio_root, audio)
    elif isinstance(audio, Mapping) and audio.get("path") and audio.get("bytes") is None:
        audio = {**audio, "path": os.path.join(audio_root, audio["path"])}
    return {name: row.get(columns[name]) for name in ("id", "text", "speaker")} | {"audio": audio, "part": {}}


def load_manifest(files: str | Sequence[str]) -> datasets.Dataset:
    """
    Opens LibriHeavy manifests (JSON lines of lhotse cuts, gzip-compressed or not) for [`prepare_dataset`].

    Args:
        files (`str` or a sequence of `str`):
            Manifests, read one after another.

    Returns:
        `datasets.Dataset` with one column, `cut`: the lines as they are, so that a broken one costs only itself.

    Raises:
        `ValueError`: If a file cannot be decompressed to its end.
        `FileNotFoundError`: If a file is missing.
    """
    features = datasets.Features({"cut": datasets.Value("string")})
    return _load("text", files, features=features, split="train", encoding_errors="replace")


def _load(builder: str, files: Any, **options: Any) -> Any:
    try:
        return datasets.load_dataset(builder, data_files=files, **options)
    except (EOFError, zlib.error, pa.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{files} cannot be read to the end: {error.__cause__ or error}") from error


def check_columns(dataset: datasets.Dataset, columns: Sequence[str], name: str) -> None:
    """
    Refuses a dataset that lacks a column.

    Args:
        dataset (`datasets.Dataset`):
            The dataset.
        columns (sequence of `str`):
            Columns that it must have.
        name (`str`):
            What to call it.

    Raises:
        `ValueError`: If one is missing.
    """
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(
            f"{name} must have columns {', '.join(columns)}: it has {dataset.column_names}, not {missing}"
        )


def load_source(path: str, name: str | None = None, split: str = "train") -> datasets.Dataset:
    """
    Opens a dataset of audio and text for [`prepare_dataset`], without decoding any audio.

    Args:
        path (`str`):
            A parquet, csv or JSON lines file (or a pattern of them), a folder written by [`prepare_dataset`] or by
            `save_to_disk`, a folder of audio files with a `metadata.csv` or `metadata.jsonl` (columns `file_name` and, say, `text`), or anything
            `datasets.load_dataset` takes, such as the name of a dataset on the Hub.
        name (`str`, *optional*):
            The configuration of a dataset that has several.
        split (`str`, *optional*, defaults to `"train"`):
            The split, in the notation of `datasets` (`"train[:95%]"`); of a folder written by `save_to_disk`, its name.

    Returns:
        `datasets.Dataset`.

    Raises:
        `ValueError`: If no file is there or one cannot be read, a folder's metadata file has no column `file_name`, or one
            written by `save_to_disk` no such split.
    """
    builders = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
    folder = Path(path)
    metadata = [file for file in (folder / "metadata.csv", folder / "metadata.jsonl") if file.is_file()]
    if metadata:
        dataset = _load(builders[metadata[0].suffix], str(metadata[0]), split=split)
        if "file_name" not in dataset.column_names:
            raise ValueError(f"{metadata[0]} must have a column `file_name`, it has {dataset.column_names}")
        paths = [str(folder / file_name) for file_name in dataset["file_name"]]
        return dataset.remove_columns("file_name").add_column("audio", paths)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(path)
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        if split not in splits:
            raise ValueError(
                f"`split` must be one of {list(splits)} of {path}, written by `save_to_disk`; got {split!r}"
            )
        dataset = splits[split]
    elif (folder / "preparation").is_dir():
        # By its files: `datasets` would go on with what it has cached of a folder by this name.
        files: dict[str, list[str]] = {}
        for file in sorted((folder / "data").glob("*.parquet")):
            files.setdefault(file.name.rsplit("-", 1)[0], []).append(str(file))
        dataset = _load("parquet", files, split=split)
    elif folder.suffix in builders:
        if "://" not in path and not glob.glob(path):
            raise ValueError(f"`path` {path!r} matches no file: give the path or glob pattern of existing files")
        dataset = _load(builders[folder.suffix], path, split=split)
    else:
        dataset = datasets.load_dataset(path, name, split=split)
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Audio):
            dataset = dataset.cast_column(column, datasets.Audio(decode=False))
    return dataset
