# Copyright 2026 The transformers-sled authors. Licensed under the Apache License, Version 2.0.
"""Training data: audio and text on disk to EnCodec codes, and batches of waveforms or codes for the model."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr
import torch
from tqdm.auto import tqdm

from .codec_sled import encode_codes
from .streaming_sled import encode_text


if TYPE_CHECKING:
    from transformers import EncodecModel, PreTrainedTokenizerBase

    from .processing_sled import SledProcessor


PREPARED_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "text": datasets.Value("string"),
        "speaker": datasets.Value("string"),
        "duration": datasets.Value("float32"),
        "length": datasets.Value("int32"),
        "audio_codes": datasets.Sequence(datasets.Sequence(datasets.Value("int16"))),
    }
)

# Key of the parquet metadata under which a shard names what was dropped from it, so that one file commits both.
_DROPPED_KEY = b"sled_dropped"

# A cut may ask for this much audio (seconds) beyond the end of its recording: manifests round their times.
_CUT_TOLERANCE = 0.025


class DroppedItemError(ValueError):
    """An item that cannot be trained on. `reason` is the class it is counted under, `detail` says what was wrong."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def read_audio(audio: str | os.PathLike | bytes | Mapping[str, Any], sampling_rate: int) -> np.ndarray:
    """
    Reads an utterance as mono audio at a given sampling rate. Only the wanted part of a long recording is decoded.

    Args:
        audio (`str`, `os.PathLike`, `bytes` or `Mapping`):
            A path, an encoded file's bytes, or a mapping with `array` and `sampling_rate`, or with `bytes` or `path`
            (as `datasets` has it with `Audio(decode=False)`). A mapping with `path` or `bytes` may also have `start`
            and `duration` in seconds, and `channel`; without a channel, all are averaged.
        sampling_rate (`int`):
            The rate to resample to, in hertz.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32.

    Raises:
        `DroppedItemError` (a `ValueError`): If the audio is missing, unreadable, empty or not finite, or ends before
        the cut does.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_sled.data_sled import read_audio
    >>> read_audio({"array": np.zeros(16000), "sampling_rate": 16000}, sampling_rate=24000).shape
    (24000,)
    ```
    """
    audio = _as_mapping(audio)
    if audio.get("array") is not None:
        samples, rate = np.asarray(audio["array"], dtype=np.float32), int(audio["sampling_rate"])
        if samples.ndim > 2:
            raise DroppedItemError("unreadable audio", f"an array of shape {samples.shape}")
        # `datasets` has channels first
        channels = samples.T if samples.ndim == 2 else samples[:, None]
    else:
        channels, rate = _decode(audio)
    channel = audio.get("channel")
    mono = channels.mean(axis=1) if channel is None or channel >= channels.shape[1] else channels[:, channel]
    if len(mono) == 0:
        raise DroppedItemError("empty audio", "no samples")
    if not np.isfinite(mono).all():
        raise DroppedItemError("audio is not finite", "it has NaN or infinite samples")
    return soxr.resample(mono, rate, sampling_rate) if rate != sampling_rate else mono


def _open_audio(audio: Mapping[str, Any]) -> soundfile.SoundFile:
    encoded, path = audio.get("bytes"), audio.get("path")
    if encoded is None:
        if path is None:
            raise DroppedItemError("audio is missing", "neither bytes nor a path")
        if not os.path.isfile(path):
            raise DroppedItemError("audio file is missing", str(path))
    if (os.path.getsize(str(path)) if encoded is None else len(encoded)) == 0:
        raise DroppedItemError("empty audio", f"{path or 'a file'} of 0 bytes")
    try:
        return soundfile.SoundFile(path if encoded is None else io.BytesIO(encoded))
    except (soundfile.LibsndfileError, OSError) as error:
        raise DroppedItemError("unreadable audio", str(error)) from error


def _decode(audio: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    with _open_audio(audio) as file:
        start = round((audio.get("start") or 0.0) * file.samplerate)
        duration = audio.get("duration")
        wanted = -1 if duration is None else round(duration * file.samplerate)
        if start > file.frames:
            raise DroppedItemError("cut is outside its recording", f"starts at {audio['start']} s of {file.frames}")
        try:
            file.seek(start)
            channels = file.read(wanted, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise DroppedItemError("unreadable audio", str(error)) from error
        if 0 < len(channels) < wanted - _CUT_TOLERANCE * file.samplerate:
            raise DroppedItemError(
                "cut is outside its recording", f"{len(channels)} of {wanted} samples are in {audio.get('path')}"
            )
        return channels, file.samplerate


def audio_duration(audio: str | os.PathLike | bytes | Mapping[str, Any]) -> float:
    """
    Measures an utterance without decoding it.

    Args:
        audio (`str`, `os.PathLike`, `bytes` or `Mapping`):
            As for [`read_audio`].

    Returns:
        `float`: seconds.

    Raises:
        `DroppedItemError` (a `ValueError`): If the audio is missing or unreadable.
    """
    audio = _as_mapping(audio)
    if audio.get("duration") is not None:
        return float(audio["duration"])
    if audio.get("array") is not None:
        return np.shape(audio["array"])[-1] / audio["sampling_rate"]
    with _open_audio(audio) as file:
        return file.frames / file.samplerate


def _as_mapping(audio: Any) -> Mapping[str, Any]:
    if audio is None:
        raise DroppedItemError("audio is missing", "null")
    if isinstance(audio, Mapping):
        return audio
    return {"bytes": audio} if isinstance(audio, bytes) else {"path": audio}


def parse_cut(line: str, audio_root: str | os.PathLike = "") -> dict[str, Any]:
    """
    Reads one line of a LibriHeavy manifest, that is, one lhotse cut with one supervision as JSON.

    The text is the supervision's `text` or, where it has none (LibriHeavy as published), the first of its
    `custom.texts`: the book's own words, with case and punctuation.

    Args:
        line (`str`):
            The cut.
        audio_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of recordings start from.

    Returns:
        `dict` with `id`, `text`, `speaker` and `audio`, a mapping for [`read_audio`].

    Raises:
        `DroppedItemError` (a `ValueError`): If the line is cut short or a field is missing.
    """
    try:
        cut = json.loads(line)
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
            "audio": {
                "path": os.path.join(audio_root, sources[0]["source"]),
                "start": start,
                "duration": duration,
                "channel": cut.get("channel"),
            },
        }
    except DroppedItemError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DroppedItemError("manifest line lacks a field", repr(error)) from error


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
    try:
        return datasets.load_dataset(
            "text", data_files=files, features=features, split="train", encoding_errors="replace"
        )
    except (EOFError, zlib.error, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"`files` {files} cannot be read to their end: {error.__cause__ or error}") from error


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
        `ValueError`: If a folder's metadata file has no column `file_name`, or one written by `save_to_disk` no such
            split.
    """
    builders = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
    folder = Path(path)
    metadata = [file for file in (folder / "metadata.csv", folder / "metadata.jsonl") if file.is_file()]
    if metadata:
        dataset = datasets.load_dataset(builders[metadata[0].suffix], data_files=str(metadata[0]), split=split)
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
        dataset = datasets.load_dataset("parquet", data_files=files, split=split)
    elif folder.suffix in builders:
        dataset = datasets.load_dataset(builders[folder.suffix], data_files=path, split=split)
    else:
        dataset = datasets.load_dataset(path, name, split=split)
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Audio):
            dataset = dataset.cast_column(column, datasets.Audio(decode=False))
    return dataset


def _parse_cut_row(row: Mapping[str, Any], audio_root: str | os.PathLike) -> dict[str, Any]:
    return parse_cut(row["cut"], audio_root)


def _parse_table_row(
    row: Mapping[str, Any], columns: Mapping[str, str], audio_root: str | os.PathLike
) -> dict[str, Any]:
    audio = _as_mapping(row[columns["audio"]])
    if audio.get("path") and audio.get("bytes") is None:
        audio = {**audio, "path": os.path.join(audio_root, audio["path"])}
    return {
        "id": row.get(columns["id"]),
        "text": row[columns["text"]],
        "speaker": row.get(columns["speaker"]),
        "audio": audio,
    }


class _Batch(NamedTuple):
    shard: int
    items: list[dict[str, Any]]
    waveforms: list[np.ndarray]


class _ShardEnd(NamedTuple):
    shard: int
    dropped: list[dict[str, Any]]


class _ShardReader(torch.utils.data.IterableDataset):
    """Decodes shards: batches of utterances of similar length, then the end of the shard with what it dropped."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        parse: Callable[[Any], dict[str, Any]],
        shards: list[int],
        shard_size: int,
        sampling_rate: int,
        hop_length: int,
        min_batchable_frames: int,
        batch_seconds: float,
        check: Callable[[str, float], None],
    ):
        self.dataset = dataset
        self.parse = parse
        self.shards = shards
        self.shard_size = shard_size
        self.sampling_rate = sampling_rate
        self.hop_length = hop_length
        self.min_batchable_frames = min_batchable_frames
        self.batch_seconds = batch_seconds
        self.check = check

    def __iter__(self) -> Iterator[_Batch | _ShardEnd]:
        worker = torch.utils.data.get_worker_info()
        for shard in self.shards[worker.id :: worker.num_workers] if worker else self.shards:
            yield from self._read_shard(shard)

    def _read_shard(self, shard: int) -> Iterator[_Batch | _ShardEnd]:
        items: list[dict[str, Any]] = []
        dropped: list[dict[str, Any]] = []

        def drop(item: Mapping[str, Any], error: DroppedItemError) -> None:
            dropped.append({"row": item["row"], "id": item["id"], "reason": error.reason, "detail": error.detail})

        first = shard * self.shard_size
        for row in range(first, min(first + self.shard_size, len(self.dataset))):
            item: dict[str, Any] = {"row": row, "id": None}
            try:
                item |= self.parse(self.dataset[row])
                item["duration"] = audio_duration(item["audio"])
                self.check(item["text"], item["duration"])
            except DroppedItemError as error:
                drop(item, error)
            else:
                items.append(item)

        items.sort(key=lambda item: item["duration"])
        batch = _Batch(shard, [], [])
        for item in items:
            try:
                waveform = read_audio(item.pop("audio"), self.sampling_rate)
                item["duration"] = len(waveform) / self.sampling_rate
                self.check(item["text"], item["duration"])
            except DroppedItemError as error:
                drop(item, error)
                continue
            # The codec reflects the first frames into its left padding, which must not reach another row's padding.
            alone = len(waveform) < self.min_batchable_frames * self.hop_length
            if batch.items and (alone or (len(batch.items) + 1) * item["duration"] > self.batch_seconds):
                yield batch
                batch = _Batch(shard, [], [])
            batch.items.append(item)
            batch.waveforms.append(waveform)
            if alone:
                yield batch
                batch = _Batch(shard, [], [])
        if batch.items:
            yield batch
        yield _ShardEnd(shard, dropped)


@torch.no_grad()
def extract_codes(waveforms: Sequence[np.ndarray], codec: EncodecModel, bandwidth: float = 6.0) -> list[np.ndarray]:
    """
    Encodes waveforms of any lengths with EnCodec. Each is zero-padded to whole frames and gets the codes it would
    get alone.

    Args:
        waveforms (sequence of `np.ndarray` of shape `(samples,)`):
            Mono audio at the codec's sampling rate.
        codec ([`EncodecModel`]):
            The codec, on the device to run on.
        bandwidth (`float`, *optional*, defaults to 6.0):
            In kilobits a second; 6.0 is 8 codebooks of `facebook/encodec_24khz`.

    Returns:
        `list` of `np.ndarray` of shape `(codebooks, frames)`, int16.
    """
    codes = encode_codes(codec, [torch.as_tensor(waveform) for waveform in waveforms], bandwidth)
    return [row.to("cpu", torch.int16).numpy() for row in codes]


def codebooks_digest(codec: EncodecModel, bandwidth: float = 6.0) -> str:
    """Identifies the codebooks that codes index (SHA-256), to tell codes of one codec from another's."""
    digest = hashlib.sha256()
    for layer in codec.quantizer.layers[: codec.quantizer.get_num_quantizers_for_bandwidth(bandwidth)]:
        digest.update(layer.codebook.embed.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_utterance(
    text: Any,
    duration: float,
    *,
    min_duration: float,
    max_duration: float,
    max_positions: int,
    frame_rate: float,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    if not isinstance(text, str) or not text.strip():
        raise DroppedItemError("text is empty", repr(text))
    if duration <= 0:
        raise DroppedItemError("empty audio", f"{duration} s")
    if duration < min_duration:
        raise DroppedItemError("too short", f"{duration:.3f} s")
    if duration > max_duration:
        raise DroppedItemError("too long", f"{duration:.3f} s")
    # Half a sample of slack: resampling may round a whole frame's length up.
    frames = math.ceil(duration * frame_rate - 1e-3)
    tokens = len(encode_text(tokenizer, text)) if tokenizer is not None else 0
    if tokens + frames > max_positions:
        raise DroppedItemError("too many positions", f"{tokens} tokens and {frames} frames")


def _replace(path: Path, write: Callable[[str], Any]) -> None:
    """Writes a file so that it is there whole or not at all, whatever process dies or writes beside this one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: Any) -> None:
    _replace(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=2) + "\n"))


def _write_shard(path: Path, rows: list[dict[str, Any]], dropped: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, schema=PREPARED_FEATURES.arrow_schema)
    table = table.replace_schema_metadata({**table.schema.metadata, _DROPPED_KEY: json.dumps(dropped).encode()})

    def write(temporary: str) -> None:
        with pq.ParquetWriter(temporary, table.schema) as writer:
            # `datasets` reads a file without row groups, but not an empty row group.
            if table.num_rows:
                writer.write_table(table)

    _replace(path, write)


def _report(output_dir: Path, split: str, shards: int, items: int) -> dict[str, Any]:
    """Sums up the shards that are there, whichever process or machine wrote them."""
    kept, done, seconds, dropped = 0, 0, 0.0, []
    for shard in range(shards):
        path = _shard_path(output_dir, split, shard)
        if path.is_file():
            table = pq.read_table(path, columns=["duration"])
            done, kept = done + 1, kept + table.num_rows
            seconds += sum(table["duration"].to_pylist())
            dropped += json.loads(table.schema.metadata[_DROPPED_KEY])
    lines = "".join(json.dumps(item) + "\n" for item in dropped)
    _replace(
        output_dir / "preparation" / f"{split}-dropped.jsonl", lambda temporary: Path(temporary).write_text(lines)
    )
    report = {
        "items": items,
        "kept": kept,
        "hours": round(seconds / 3600, 3),
        "dropped": dict(Counter(item["reason"] for item in dropped).most_common()),
        "shards": shards,
        "shards_done": done,
    }
    if done == shards:
        for left_by_a_killed_process in (output_dir / "data").glob(f".{split}-*"):
            left_by_a_killed_process.unlink(missing_ok=True)
    _write_json(output_dir / "preparation" / f"{split}-report.json", report)
    return report


def _shard_path(output_dir: Path, split: str, shard: int) -> Path:
    return output_dir / "data" / f"{split}-{shard:06d}.parquet"


def _write_card(output_dir: Path) -> None:
    splits = sorted({path.name.rsplit("-", 1)[0] for path in (output_dir / "data").glob("[!.]*.parquet")})
    data_files = "".join(f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in splits)
    card = (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{data_files}task_categories:\n- text-to-speech\n---\n\n"
        "# Speech as EnCodec codes, with its text\n\n"
        "Columns: `id`, `text`, `speaker`, `duration` (seconds), `length` (frames) and `audio_codes` (codebooks, "
        "frames). `preparation/` says which codec and filters made each split and what was dropped.\n"
    )
    _replace(output_dir / "README.md", lambda temporary: Path(temporary).write_text(card))


def prepare_dataset(
    dataset: datasets.Dataset,
    output_dir: str | os.PathLike,
    codec: EncodecModel,
    *,
    split: str = "train",
    audio_root: str | os.PathLike = "",
    text_column: str = "text",
    audio_column: str = "audio",
    speaker_column: str = "speaker",
    id_column: str = "id",
    tokenizer: PreTrainedTokenizerBase | None = None,
    bandwidth: float = 6.0,
    min_duration: float = 0.5,
    max_duration: float = math.inf,
    max_positions: int = 2048,
    shard_size: int = 256,
    batch_seconds: float = 30.0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """
    Extracts EnCodec codes once and writes a dataset to train from: `datasets.load_dataset(output_dir)` reads it back.

    The rows become parquet files of `shard_size` source rows each, in their order. A file appears whole or not at
    all and records what was dropped from it, so that the same call after a kill goes on with the files that are
    missing. Processes on one machine or many share the work by `rank` and `world_size` over a shared `output_dir`.

    Args:
        dataset (`datasets.Dataset`):
            From [`load_manifest`] or [`load_source`], or any with columns of text and undecoded audio.
        output_dir (`str` or `os.PathLike`):
            Folder to write to. Several splits may share one.
        codec ([`EncodecModel`]):
            The codec, on the device to run on.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split to write.
        audio_root (`str` or `os.PathLike`, *optional*):
            Folder that relative audio paths start from.
        text_column, audio_column, speaker_column, id_column (`str`, *optional*):
            Names of the columns of a dataset that is not a manifest. Speaker and id may be absent.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*):
            Counts text tokens towards `max_positions`. Without it only frames count.
        bandwidth (`float`, *optional*, defaults to 6.0):
            EnCodec bandwidth in kilobits a second.
        min_duration, max_duration (`float`, *optional*, defaults to 0.5 and no limit):
            In seconds.
        max_positions (`int`, *optional*, defaults to 2048):
            Text tokens and frames that an utterance may have together.
        shard_size (`int`, *optional*, defaults to 256):
            Source rows a file; a kill loses at most the files being made.
        batch_seconds (`float`, *optional*, defaults to 30.0):
            Audio in a codec batch, padding included, in seconds. A GPU takes several hundred.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that read and resample audio ahead of the codec; with 0 it is done in turn.
        rank, world_size (`int`, *optional*, defaults to 0 and 1):
            This process's share.

    Returns:
        `dict` with `items`, `kept`, `hours`, `dropped` (a count for each reason), `shards` and `shards_done`, summed
        over all processes so far. Also written to `preparation/{split}-report.json`; `{split}-dropped.jsonl` beside
        it names every dropped item.

    Raises:
        `ValueError`: If a column is missing, an argument is out of range, or `output_dir` holds a split of the same
        name that was prepared otherwise.

    Example:

    ```python
    >>> from transformers import EncodecModel
    >>> from transformers_sled.data_sled import load_source, prepare_dataset

    >>> codec = EncodecModel.from_pretrained("facebook/encodec_24khz")  # doctest: +SKIP
    >>> report = prepare_dataset(load_source("my_corpus/"), "my_codes/", codec)  # doctest: +SKIP
    ```
    """
    output_dir = Path(output_dir)
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be at least 0 and below `world_size`, got {rank} of {world_size}")
    if shard_size < 1:
        raise ValueError(f"`shard_size` must be at least 1, got {shard_size}")
    if not 0 <= min_duration <= max_duration:
        raise ValueError(
            f"`min_duration` must be at least 0 and at most `max_duration`, got {min_duration} and {max_duration}"
        )
    if not split.isidentifier():
        raise ValueError(f"`split` must be a plain name such as 'train', got {split!r}")
    if bandwidth not in codec.config.target_bandwidths:
        raise ValueError(f"`bandwidth` must be one of {codec.config.target_bandwidths}, got {bandwidth}")
    if codec.config.chunk_length_s is not None or codec.config.audio_channels != 1:
        raise ValueError("`codec` must be a mono EnCodec without chunks, such as facebook/encodec_24khz")
    if not codec.quantizer.layers[0].codebook.embed.any():
        raise ValueError("`codec` has empty codebooks: its quantizer has not been trained")
    if dataset.column_names == ["cut"]:
        parse: Callable[[Any], dict[str, Any]] = partial(_parse_cut_row, audio_root=audio_root)
    else:
        columns = {"text": text_column, "audio": audio_column, "speaker": speaker_column, "id": id_column}
        for argument, column in (("text_column", text_column), ("audio_column", audio_column)):
            if column not in dataset.column_names:
                raise ValueError(f"`{argument}` must be one of the columns {dataset.column_names}, got {column!r}")
        dataset = dataset.select_columns([column for column in columns.values() if column in dataset.column_names])
        if isinstance(dataset.features[audio_column], datasets.Audio):
            dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
        parse = partial(_parse_table_row, columns=columns, audio_root=audio_root)

    config = codec.config
    settings = {
        "codec": config.name_or_path or "unnamed",
        "codebooks_sha256": codebooks_digest(codec, bandwidth),
        "num_codebooks": codec.quantizer.get_num_quantizers_for_bandwidth(bandwidth),
        "bandwidth": bandwidth,
        "sampling_rate": config.sampling_rate,
        "hop_length": config.hop_length,
        "rows": len(dataset),
        "shard_size": shard_size,
        "min_duration": min_duration,
        "max_duration": None if math.isinf(max_duration) else max_duration,
        "max_positions": max_positions,
        "tokenizer": None
        if tokenizer is None
        else hashlib.sha256(str(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
    }
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    (output_dir / "preparation").mkdir(exist_ok=True)
    settings_path = output_dir / "preparation" / f"{split}.json"
    if settings_path.is_file():
        earlier = json.loads(settings_path.read_text())
        # Where the codec was loaded from may change between machines; its codebooks may not.
        changed = [key for key in settings if key != "codec" and settings[key] != earlier.get(key)]
        if changed:
            was_is = ", ".join(f"{key} was {earlier.get(key)} and is {settings[key]}" for key in changed)
            raise ValueError(
                f"`output_dir` {output_dir} holds a split {split!r} prepared otherwise ({was_is}): go on with the "
                "same settings or choose another folder"
            )
    else:
        _write_json(settings_path, settings)

    num_shards = math.ceil(len(dataset) / shard_size)
    shards = [
        shard for shard in range(rank, num_shards, world_size) if not _shard_path(output_dir, split, shard).is_file()
    ]
    check = partial(
        _check_utterance,
        min_duration=min_duration,
        max_duration=max_duration,
        max_positions=max_positions,
        frame_rate=config.sampling_rate / config.hop_length,
        tokenizer=tokenizer,
    )
    reader = _ShardReader(
        dataset,
        parse,
        shards,
        shard_size,
        config.sampling_rate,
        config.hop_length,
        config.last_kernel_size,
        batch_seconds,
        check,
    )
    loader = torch.utils.data.DataLoader(reader, batch_size=None, num_workers=min(num_workers, len(shards)))
    rows: dict[int, list[dict[str, Any]]] = {shard: [] for shard in shards}
    total = sum(min(shard_size, len(dataset) - shard * shard_size) for shard in shards)
    with tqdm(total=total, unit="utterance", desc=f"codes of {split}", position=rank, smoothing=0) as progress:
        for part in loader:
            if isinstance(part, _ShardEnd):
                finished = sorted(rows.pop(part.shard), key=lambda item: item["row"])
                for item in finished:
                    item["id"] = f"{split}-{item['row']}" if item["id"] is None else str(item["id"])
                _write_shard(_shard_path(output_dir, split, part.shard), finished, part.dropped)
                progress.update(len(part.dropped))
            else:
                for item, codes in zip(part.items, extract_codes(part.waveforms, codec, bandwidth), strict=True):
                    speaker = None if item["speaker"] is None else str(item["speaker"])
                    item |= {"speaker": speaker, "length": codes.shape[1], "audio_codes": list(codes)}
                    rows[part.shard].append(item)
                progress.update(len(part.items))
    _write_card(output_dir)
    return _report(output_dir, split, num_shards, len(dataset))


class SledDataCollator:
    """
    Makes training batches of text with speech, given as waveforms or as EnCodec codes.

    The text is padded on the tokenizer's `padding_side` (left for an offline model, right for an interleaved one), the
    speech on the right. With codes the codec does not run: the model looks their latents up.

    Args:
        processor ([`SledProcessor`]):
            The processor of the model that is trained.

    Example:

    ```python
    >>> from transformers import Trainer
    >>> from transformers_sled import SledDataCollator

    >>> trainer = Trainer(model, args, SledDataCollator(processor), train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    def __init__(self, processor: SledProcessor):
        self.processor = processor

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Collates a batch.

        Args:
            examples (sequence of `Mapping`):
                Each with `text` and either `audio_codes` of shape `(codebooks, frames)` or `audio`, as
                [`read_audio`] takes it.

        Returns:
            `dict` with `input_ids` and `attention_mask` of shape `(batch, tokens)`, `return_loss` (true), and either
            `audio_codes` of shape `(batch, codebooks, frames)` with `audio_codes_mask` of shape `(batch, frames)`, or
            `input_values` of shape `(batch, 1, samples)` with `padding_mask` of shape `(batch, samples)`.

        Raises:
            `ValueError`: If an example has no text or no speech, or its audio cannot be read; the message names it.
        """
        if not examples:
            raise ValueError("`examples` must not be empty")
        for example in examples:
            if not isinstance(example.get("text"), str) or not example["text"].strip():
                raise ValueError(f"{_name(example)} must have a `text` that is not empty, got {example.get('text')!r}")
        speech_key = "audio_codes" if examples[0].get("audio_codes") is not None else "audio"
        for example in examples:
            if example.get(speech_key) is None:
                raise ValueError(f"{_name(example)} must have `{speech_key}`, its keys are {sorted(example)}")
        if speech_key == "audio_codes":
            return {**self._collate_text(examples), **self._collate_codes(examples), "return_loss": True}
        return {**self._collate_audio(examples), "return_loss": True}

    def _collate_text(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        rows = [encode_text(tokenizer, example["text"]) for example in examples]
        return dict(tokenizer.pad({"input_ids": rows}, return_attention_mask=True, return_tensors="pt"))

    def _collate_codes(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.as_tensor(np.asarray(example["audio_codes"]), dtype=torch.long) for example in examples]
        for example, row in zip(examples, rows, strict=True):
            if row.ndim != 2 or row.shape[0] != rows[0].shape[0] or row.shape[1] == 0:
                raise ValueError(
                    f"`audio_codes` of {_name(example)} must be of shape ({rows[0].shape[0]}, frames), got "
                    f"{tuple(row.shape)}"
                )
        lengths = torch.tensor([row.shape[1] for row in rows])
        codes = torch.zeros(len(rows), rows[0].shape[0], int(lengths.max()), dtype=torch.long)
        for target, row in zip(codes, rows, strict=True):
            target[:, : row.shape[1]] = row
        return {"audio_codes": codes, "audio_codes_mask": (torch.arange(codes.shape[2]) < lengths[:, None]).long()}

    def _collate_audio(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sampling_rate = self.processor.sampling_rate
        waveforms = []
        for example in examples:
            try:
                waveforms.append(read_audio(example["audio"], sampling_rate))
            except DroppedItemError as error:
                raise ValueError(f"`audio` of {_name(example)} cannot be used: {error}") from error
        texts = [example["text"] for example in examples]
        return dict(self.processor(text=texts, audio=waveforms, sampling_rate=sampling_rate, return_tensors="pt"))


def _name(example: Mapping[str, Any]) -> str:
    return f"example {example['id']!r}" if example.get("id") is not None else "an example"
