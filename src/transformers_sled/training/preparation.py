"""Preparation of training data: audio with text to EnCodec codes on disk, once, by one process or many."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import EncodecConfig, EncodecModel, PreTrainedTokenizerBase

from ..audio_sled import measure_duration, read_audio
from ..codec_sled import check_bandwidth, check_codec_config, encode_codes
from ..text_sled import encode_text
from .sources import DroppedItemError, parse_cut, parse_row


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


@dataclass
class PreparationArguments:
    """What to keep of a dataset, and how to write it."""

    output_dir: str = field(metadata={"help": "Folder to write the dataset to. Several splits may share one."})
    split: str = field(default="train", metadata={"help": "Name of the split to write."})
    audio_root: str = field(default="", metadata={"help": "Folder that relative audio paths start from."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    audio_column: str = field(default="audio", metadata={"help": "Column with the audio: files, paths or bytes."})
    speaker_column: str = field(default="speaker", metadata={"help": "Column with the speaker; may be absent."})
    id_column: str = field(default="id", metadata={"help": "Column that names an utterance; may be absent."})
    bandwidth: float = field(default=6.0, metadata={"help": "EnCodec bandwidth in kilobits a second."})
    min_duration: float = field(default=0.5, metadata={"help": "Shortest utterance to keep, in seconds."})
    max_duration: float = field(default=math.inf, metadata={"help": "Longest utterance to keep, in seconds."})
    max_positions: int = field(default=2048, metadata={"help": "Tokens and frames an utterance may have together."})
    shard_size: int = field(default=256, metadata={"help": "Source rows a file; a kill loses at most open files."})
    batch_seconds: float = field(default=30.0, metadata={"help": "Audio in a codec batch; a GPU takes hundreds."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read and resample ahead of the codec."})

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"`shard_size` must be at least 1, got {self.shard_size}")
        if not 0 <= self.min_duration <= self.max_duration:
            raise ValueError(
                f"`min_duration` must be at least 0 and at most `max_duration`, got {self.min_duration} and "
                f"{self.max_duration}"
            )
        if not self.split.isidentifier():
            raise ValueError(f"`split` must be a plain name such as 'train', got {self.split!r}")


def prepare_dataset(
    dataset: datasets.Dataset,
    codec: EncodecModel,
    arguments: PreparationArguments,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """
    Extracts EnCodec codes once and writes a dataset to train from: [`load_source`] reads it back.

    The rows become parquet files of `arguments.shard_size` source rows each, in their order. A file appears whole or not
    at all and records what was dropped from it, so that the same call after a kill goes on with the files that are
    missing. Processes on one machine or many share the work by `rank` and `world_size` over a shared folder.

    Args:
        dataset (`datasets.Dataset`):
            From [`load_manifest`] or [`load_source`], or any with columns of text and undecoded audio.
        codec ([`EncodecModel`]):
            The codec, on the device to run on.
        arguments ([`PreparationArguments`]):
            What to keep, and where to write it.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*):
            Counts text tokens towards `max_positions`. Without it only frames count.
        rank, world_size (`int`, *optional*, defaults to 0 and 1):
            This process's share.

    Returns:
        `dict` with `items`, `kept`, `hours`, `dropped` (a count for each reason), `shards` and `shards_done`, summed
        over all processes so far. Also written to `preparation/{split}-report.json`; `{split}-dropped.jsonl` beside
        it names every dropped item.

    Raises:
        `ValueError`: If a column is missing, an argument is out of range, or the folder holds a split of the same name
        that was prepared otherwise.

    Example:

    ```python
    >>> from transformers import EncodecModel
    >>> from transformers_sled.training import PreparationArguments, load_source, prepare_dataset

    >>> codec = EncodecModel.from_pretrained("facebook/encodec_24khz")  # doctest: +SKIP
    >>> report = prepare_dataset(load_source("my_corpus/"), codec, PreparationArguments("my_codes/"))  # doctest: +SKIP
    ```
    """
    output_dir, split, config = Path(arguments.output_dir), arguments.split, codec.config
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be at least 0 and below `world_size`, got {rank} of {world_size}")
    check_codec_config(config)
    check_bandwidth(config, arguments.bandwidth)
    if not codec.quantizer.layers[0].codebook.embed.any():
        raise ValueError("`codec` has empty codebooks: its quantizer has not been trained")
    dataset, parse = _get_rows(dataset, arguments)
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    (output_dir / "preparation").mkdir(exist_ok=True)
    _check_settings(len(dataset), codec, arguments, tokenizer)

    num_shards = math.ceil(len(dataset) / arguments.shard_size)
    shards = [
        shard for shard in range(rank, num_shards, world_size) if not _shard_path(output_dir, split, shard).is_file()
    ]
    reader = _ShardReader(dataset, parse, shards, arguments, config, tokenizer)
    loader = torch.utils.data.DataLoader(reader, batch_size=None, num_workers=min(arguments.num_workers, len(shards)))
    rows: dict[int, list[dict[str, Any]]] = {shard: [] for shard in shards}
    total = sum(min(arguments.shard_size, len(dataset) - shard * arguments.shard_size) for shard in shards)
    with tqdm(total=total, unit="utterance", desc=f"codes of {split}", position=rank, smoothing=0) as progress:
        for part in loader:
            if isinstance(part, _ShardEnd):
                finished = sorted(rows.pop(part.shard), key=lambda item: item["row"])
                for item in finished:
                    item["id"] = f"{split}-{item['row']}" if item["id"] is None else str(item["id"])
                _write_shard(_shard_path(output_dir, split, part.shard), finished, part.dropped)
                progress.update(len(part.dropped))
            else:
                waveforms = [torch.as_tensor(waveform, device=codec.device) for waveform in part.waveforms]
                all_codes = encode_codes(codec, waveforms, arguments.bandwidth)
                for item, codes in zip(part.items, all_codes, strict=True):
                    speaker = None if item["speaker"] is None else str(item["speaker"])
                    rows_of_codes = list(codes.to("cpu", torch.int16).numpy())
                    item |= {"speaker": speaker, "length": codes.shape[1], "audio_codes": rows_of_codes}
                    rows[part.shard].append(item)
                progress.update(len(part.items))
    _write_card(output_dir)
    return _report(output_dir, split, num_shards, len(dataset))


def _get_rows(
    dataset: datasets.Dataset, arguments: PreparationArguments
) -> tuple[datasets.Dataset, Callable[[Any], dict[str, Any]]]:
    """The dataset with the columns that are needed and nothing decoded, and what makes an utterance of its row."""
    if dataset.column_names == ["cut"]:
        return dataset, partial(parse_cut, audio_root=arguments.audio_root)
    columns = {name: getattr(arguments, f"{name}_column") for name in ("text", "audio", "speaker", "id")}
    for name in ("text", "audio"):
        if columns[name] not in dataset.column_names:
            raise ValueError(
                f"`{name}_column` must be one of the columns {dataset.column_names}, got {columns[name]!r}"
            )
    dataset = dataset.select_columns([column for column in columns.values() if column in dataset.column_names])
    if isinstance(dataset.features[columns["audio"]], datasets.Audio):
        dataset = dataset.cast_column(columns["audio"], datasets.Audio(decode=False))
    return dataset, partial(parse_row, columns=columns, audio_root=arguments.audio_root)


def _check_settings(
    num_rows: int, codec: EncodecModel, arguments: PreparationArguments, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Writes down how the split is prepared, or compares with how it was begun."""
    config, bandwidth = codec.config, arguments.bandwidth
    vocabulary = None if tokenizer is None else str(sorted(tokenizer.get_vocab().items()))
    settings = {
        "codec": config.name_or_path or "unnamed",
        "codebooks_sha256": codebooks_digest(codec, bandwidth),
        "num_codebooks": codec.quantizer.get_num_quantizers_for_bandwidth(bandwidth),
        "bandwidth": bandwidth,
        "sampling_rate": config.sampling_rate,
        "hop_length": config.hop_length,
        "rows": num_rows,
        "shard_size": arguments.shard_size,
        "min_duration": arguments.min_duration,
        "max_duration": None if math.isinf(arguments.max_duration) else arguments.max_duration,
        "max_positions": arguments.max_positions,
        "tokenizer": None if vocabulary is None else hashlib.sha256(vocabulary.encode()).hexdigest(),
    }
    path = Path(arguments.output_dir, "preparation", f"{arguments.split}.json")
    if not path.is_file():
        _write_json(path, settings)
        return
    earlier = json.loads(path.read_text())
    # Where the codec was loaded from may change between machines; its codebooks may not.
    changed = [key for key in settings if key != "codec" and settings[key] != earlier.get(key)]
    if changed:
        was_is = ", ".join(f"{key} was {earlier.get(key)} and is {settings[key]}" for key in changed)
        raise ValueError(
            f"`output_dir` {arguments.output_dir} holds a split {arguments.split!r} prepared otherwise ({was_is}): go on "
            "with the same settings or choose another folder"
        )


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
        arguments: PreparationArguments,
        codec_config: EncodecConfig,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        self.dataset = dataset
        self.parse = parse
        self.shards = shards
        self.arguments = arguments
        self.codec_config = codec_config
        self.tokenizer = tokenizer

    def __iter__(self) -> Iterator[_Batch | _ShardEnd]:
        worker = torch.utils.data.get_worker_info()
        for shard in self.shards[worker.id :: worker.num_workers] if worker else self.shards:
            yield from self._read_shard(shard)

    def _read_shard(self, shard: int) -> Iterator[_Batch | _ShardEnd]:
        items: list[dict[str, Any]] = []
        dropped: list[dict[str, Any]] = []

        def drop(item: Mapping[str, Any], error: ValueError) -> None:
            reason = getattr(error, "reason", "unreadable audio")
            dropped.append({"row": item["row"], "id": item["id"], "reason": reason, "detail": str(error)})

        size, sampling_rate = self.arguments.shard_size, self.codec_config.sampling_rate
        for row in range(shard * size, min((shard + 1) * size, len(self.dataset))):
            item: dict[str, Any] = {"row": row, "id": None}
            try:
                item |= self.parse(self.dataset[row])
                duration = item["part"].get("duration")
                item["duration"] = measure_duration(item["audio"]) if duration is None else duration
                self._check(item)
            except ValueError as error:
                drop(item, error)
            else:
                items.append(item)

        items.sort(key=lambda item: item["duration"])
        batch = _Batch(shard, [], [])
        for item in items:
            try:
                waveform = read_audio(item.pop("audio"), target_rate=sampling_rate, **item.pop("part"))
                item["duration"] = len(waveform) / sampling_rate
                self._check(item)
            except ValueError as error:
                drop(item, error)
                continue
            if batch.items and (len(batch.items) + 1) * item["duration"] > self.arguments.batch_seconds:
                yield batch
                batch = _Batch(shard, [], [])
            batch.items.append(item)
            batch.waveforms.append(waveform)
        if batch.items:
            yield batch
        yield _ShardEnd(shard, dropped)

    def _check(self, item: Mapping[str, Any]) -> None:
        text, duration = item["text"], item["duration"]
        if not isinstance(text, str) or not text.strip():
            raise DroppedItemError("text is empty", repr(text))
        if duration <= 0:
            raise DroppedItemError("empty audio", f"{duration} s")
        if duration < self.arguments.min_duration:
            raise DroppedItemError("too short", f"{duration:.3f} s")
        if duration > self.arguments.max_duration:
            raise DroppedItemError("too long", f"{duration:.3f} s")
        # Half a sample of slack: resampling may round a whole frame's length up.
        frames = math.ceil(duration * self.codec_config.sampling_rate / self.codec_config.hop_length - 1e-3)
        tokens = len(encode_text(self.tokenizer, text)) if self.tokenizer is not None else 0
        if tokens + frames > self.arguments.max_positions:
            raise DroppedItemError("too many positions", f"{tokens} tokens and {frames} frames")


def codebooks_digest(codec: EncodecModel, bandwidth: float = 6.0) -> str:
    """Identifies the codebooks that codes index (SHA-256), to tell codes of one codec from another's."""
    digest = hashlib.sha256()
    for layer in codec.quantizer.layers[: codec.quantizer.get_num_quantizers_for_bandwidth(bandwidth)]:
        digest.update(layer.codebook.embed.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


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
