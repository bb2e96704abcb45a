"""A batch job on a Ray cluster, which goes on where it was when it is started again."""

import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from ..voices import builtin_voice
from .speaker import BatchSpeaker
from .texts import TextRow, check_record, plan_batches, read_records


# What is not audio: the batches, which of them are done, and what the job was asked for.
WORK_FOLDER = ".batch"
DATA_FOLDER = "data"


@dataclass(frozen=True)
class BatchSettings:
    r"""
    What a batch job is asked for.

    Args:
        model (`str`, *optional*):
            The checkpoint: a repository on the Hub or a folder. The voice in the box by default.
        max_streams (`int`, *optional*, defaults to 16):
            Texts that an actor speaks at a time.
        max_characters (`int`, *optional*, defaults to 200000):
            Length of a text. Longer ones get an error.
        options (`dict[str, Any]`, *optional*):
            Generation parameters, such as `guidance_scale`.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the model.
        num_actors (`int`, *optional*, defaults to 1):
            Actors at most, each with a model of its own.
        num_cpus (`float`, *optional*, defaults to 1.0):
            Cores of an actor.
        num_gpus (`float`, *optional*, defaults to 0.0):
            GPUs of an actor, which may be a fraction of one.
        rows_per_file (`int`, *optional*, defaults to 512):
            Rows of a Parquet file at least. What is not in a file yet is spoken again where the job is stopped.
    """

    model: str = field(default_factory=builtin_voice)
    max_streams: int = 16
    max_characters: int = 200_000
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    num_actors: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    rows_per_file: int = 512

    def __post_init__(self) -> None:
        for name in ("max_streams", "max_characters", "num_actors", "rows_per_file"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("num_cpus", "num_gpus"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")

    def describe(self, rows: list[TextRow]) -> dict[str, Any]:
        """What makes the audio what it is. How many machines make it is no part of that."""
        digest = hashlib.sha256()
        for row in sorted(rows, key=lambda row: row.id):
            digest.update(json.dumps(asdict(row)).encode())
        names = ("model", "max_streams", "max_characters", "options", "dtype")
        return {**{name: getattr(self, name) for name in names}, "rows": digest.hexdigest()}


@dataclass(frozen=True)
class BatchReport:
    """What a batch job has made, and how fast it was this time."""

    rows: int
    errors: dict[str, int]
    audio_seconds: float
    spoken_rows: int
    spoken_seconds: float
    seconds: float

    @property
    def num_errors(self) -> int:
        """Number of rows with an error."""
        return sum(self.errors.values())


class _Actor:
    """Speaks batches on some machine of the cluster."""

    def __init__(self, settings: BatchSettings) -> None:
        device = "cuda" if settings.num_gpus else "cpu"
        self._speaker = BatchSpeaker(settings.model, settings.max_streams, device, settings.dtype, settings.options)

    def __call__(self, table: pa.Table) -> pa.Table:
        [batch], [rows] = table["batch"].to_pylist(), table["rows"].to_pylist()
        return self._speaker.speak(batch, [TextRow(**row) for row in rows])


def run_batch(
    source: str, output: str | Path, settings: BatchSettings | None = None, split: str = "train"
) -> BatchReport:
    r"""
    Speaks the texts of a source on the cluster of this machine, or that of `RAY_ADDRESS`. Stopped at any time and started
    again in the same way, it goes on where it was.

    Args:
        source (`str`):
            Where the texts are: see [`read_records`].
        output (`str` or `Path`):
            A folder that all machines of the cluster share.
        settings ([`BatchSettings`], *optional*):
            What is asked for.
        split (`str`, *optional*, defaults to `"train"`):
            The split of a dataset on the Hub.

    Returns:
        [`BatchReport`]: what was made.

    Raises:
        `ValueError`: if the source cannot be read, an id is missing or there twice, or the folder holds another job.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from transformers_sled.batch.job import run_batch

    >>> report = run_batch("texts.jsonl", "spoken")
    >>> spoken = load_dataset("spoken", split="train")
    ```
    """
    settings = BatchSettings() if settings is None else settings
    folder = Path(output).absolute()
    work = folder / WORK_FOLDER
    rows = [check_record(record, settings.max_characters) for record in read_records(source, split)]
    _write_plan(work, rows, settings)
    data = folder / DATA_FOLDER
    data.mkdir(exist_ok=True)
    (folder / "README.md").write_text(_make_card())

    before = _count(data)
    start = time.perf_counter()
    if before.rows < len(rows):
        _speak(work, data, settings)
    seconds = time.perf_counter() - start
    made = _count(data)
    if made.rows != len(rows):
        raise ValueError(
            f"The output folder {str(folder)!r} has {made.rows} rows in place of {len(rows)}: files in {DATA_FOLDER!r} were "
            "deleted or added. Give another folder."
        )
    report = BatchReport(
        made.rows,
        made.errors,
        made.audio_seconds,
        made.rows - before.rows,
        made.audio_seconds - before.audio_seconds,
        seconds,
    )
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def _write_plan(work: Path, rows: list[TextRow], settings: BatchSettings) -> None:
    """Settles the batches, once: where the job is started again, they must be the same."""
    description = settings.describe(rows)
    known = work / "job.json"
    if known.exists():
        asked = json.loads(known.read_text())
        if changed := [name for name in description if asked.get(name) != description[name]]:
            raise ValueError(
                f"The output folder {str(work.parent)!r} holds another job: {', '.join(changed)} differ. Give another folder."
            )
        return
    plan = plan_batches(rows, settings.max_streams)
    work.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(plan, work / "plan.parquet")
    temporary = work / "job.json.tmp"
    temporary.write_text(json.dumps(description, indent=2) + "\n")
    temporary.replace(known)


def _speak(work: Path, data: Path, settings: BatchSettings) -> None:
    context = DataContext.get_current().copy()
    # A block is a batch: one that were split could be written in part.
    context.target_max_block_size = None
    context.checkpoint_config = CheckpointConfig(
        id_column="batch", checkpoint_path=str(work / "checkpoint"), delete_checkpoint_on_success=False
    )
    with DataContext.current(context):
        batches = ray.data.read_parquet(str(work / "plan.parquet")).repartition(target_num_rows_per_block=1)
        spoken = batches.map_batches(
            _Actor,
            fn_constructor_args=(settings,),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(min_size=1, max_size=settings.num_actors),
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
        )
        spoken.write_parquet(str(data), min_rows_per_file=settings.rows_per_file)


def _count(data: Path) -> BatchReport:
    """What is in the files."""
    num_rows, seconds = 0, 0.0
    errors: Counter[str] = Counter()
    for file in sorted(data.glob("*.parquet")):
        try:
            table = pa.parquet.read_table(file, columns=["duration", "error"])
        except pa.ArrowInvalid:
            # The job was stopped while it was written. Ray Data removes it before it goes on.
            continue
        num_rows += table.num_rows
        seconds += sum(value for value in table["duration"].to_pylist() if value is not None)
        errors.update(error for error in table["error"].to_pylist() if error is not None)
    return BatchReport(num_rows, dict(errors.most_common()), seconds, 0, 0.0, 0.0)


def _make_card() -> str:
    """What tells `datasets` where the rows are, and that their audio is audio."""
    lines = ["---", "configs:", "- config_name: default", "  data_files:", "  - split: train"]
    lines += [f"    path: {DATA_FOLDER}/*.parquet", "---", "", "Speech made by `sled batch` of transformers-sled.", ""]
    return "\n".join(lines)


__all__ = ["BatchReport", "BatchSettings", "run_batch"]
