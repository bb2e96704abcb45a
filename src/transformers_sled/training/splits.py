"""The data to train on: the splits of a dataset, without what cannot be used."""

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from ..audio_sled import measure_duration
from ..modeling_sled import SledForSpeechSynthesis
from ..processing_sled import SledProcessor
from ..text_sled import encode_text
from .preparation import codebooks_digest
from .sources import load_source
from .trainer import SledTrainingArguments


logger = logging.getLogger(__name__)


@dataclass
class SledDataArguments:
    """What to train and evaluate on."""

    dataset_name: str = field(
        metadata={"help": "Folder from prepare_data.py, or any dataset of audio and text (as for prepare_data.py)."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the text."})
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the audio, if there are no codes."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many utterances at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on that many at most."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that measure lengths."})


def load_splits(
    args: SledDataArguments,
    training_args: SledTrainingArguments,
    model: SledForSpeechSynthesis,
    processor: SledProcessor,
) -> tuple[datasets.Dataset | None, datasets.Dataset | None]:
    """
    Opens the splits that a run needs, with `id` where they have one, `text`, `length` in frames and either `audio_codes`
    or `audio`, and leaves out what cannot be used.

    Args:
        args ([`SledDataArguments`]):
            Which splits, and which of their columns.
        training_args ([`SledTrainingArguments`]):
            Whether to train, to evaluate or both.
        model ([`SledForSpeechSynthesis`]):
            The model, whose codec and positions the data must fit.
        processor ([`SledProcessor`]):
            Its processor.

    Returns:
        `tuple(datasets.Dataset, datasets.Dataset)`: to train and to evaluate on; `None` where that is not asked for.

    Raises:
        `ValueError`: If neither is asked for, a column is missing, codes are of another codec, or nothing can be used.
    """
    do_eval = training_args.do_eval or training_args.eval_strategy != "no"
    if not training_args.do_train and not do_eval:
        raise ValueError("Nothing to do: give --do_train, --do_eval or both")
    with training_args.main_process_first(desc="reading the data"):
        train, evaluation = (
            _load_split(args, split, max_samples, model, processor) if is_needed else None
            for is_needed, split, max_samples in (
                (training_args.do_train, args.train_split_name, args.max_train_samples),
                (do_eval, args.eval_split_name, args.max_eval_samples),
            )
        )
    return train, evaluation


def _check_codes(folder: Path, split: str, model: SledForSpeechSynthesis) -> None:
    """Codes mean something only with the codebooks they index."""
    settings_path = folder / "preparation" / f"{split}.json"
    if not settings_path.is_file():
        return
    settings = json.loads(settings_path.read_text())
    if settings["codebooks_sha256"] != codebooks_digest(model.get_codec(), model.config.codec_bandwidth):
        raise ValueError(
            f"{folder} holds codes of another codec ({settings['codec']} at {settings['bandwidth']} kbit/s) than the "
            f"model's ({model.config.codec_bandwidth} kbit/s): prepare it with the model's codec"
        )


def _load_split(
    args: SledDataArguments,
    split: str,
    max_samples: int | None,
    model: SledForSpeechSynthesis,
    processor: SledProcessor,
) -> datasets.Dataset:
    """Opens a split as `id`, `text`, `length` and either `audio_codes` or `audio`, without what does not fit."""
    dataset = load_source(args.dataset_name, args.dataset_config_name, split)
    has_codes = "audio_codes" in dataset.column_names
    speech_column = "audio_codes" if has_codes else args.audio_column_name
    for flag, column in (("--text_column_name", args.text_column_name), ("--audio_column_name", speech_column)):
        if column not in dataset.column_names:
            raise ValueError(
                f"{flag} must be one of the columns {dataset.column_names} of split {split}, got {column!r}"
            )
    if has_codes:
        _check_codes(Path(args.dataset_name), split, model)
    columns = {args.text_column_name: "text", speech_column: "audio_codes" if has_codes else "audio"}
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    wanted = ("id", "text", "length", "audio_codes") if has_codes else ("id", "text", "audio")
    dataset = dataset.select_columns([column for column in wanted if column in dataset.column_names])
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))

    frame_rate = model.get_codec().config.sampling_rate / model.get_codec().config.hop_length

    def measure(batch: dict[str, list]) -> dict[str, list[int]]:
        frames = batch["length"] if has_codes else [_count_frames(audio, frame_rate) for audio in batch["audio"]]
        # 0 marks what cannot be used: no text or no readable speech.
        positions = [
            len(encode_text(processor.tokenizer, text)) + length if text and text.strip() and length else 0
            for text, length in zip(batch["text"], frames, strict=True)
        ]
        return {"frames": frames, "positions": positions}

    needed = dataset.select_columns(["text", "length" if has_codes else "audio"])
    measured = needed.map(
        measure,
        batched=True,
        remove_columns=needed.column_names,
        num_proc=args.preprocessing_num_workers,
        desc=f"Measuring {split}",
    )
    limit = model.config.max_position_embeddings
    positions = measured["positions"][:]
    unusable = [index for index, count in enumerate(positions) if not 0 < count <= limit]
    if not has_codes:
        dataset = dataset.add_column("length", measured["frames"][:])
    if unusable:
        names = dataset.select(unusable[:10])["id"][:] if "id" in dataset.column_names else unusable[:10]
        logger.warning(
            "Left out %d of %d utterances of %s, without text or readable speech or with more than %d tokens and frames: %s%s",
            len(unusable), len(dataset), split, limit, names, ", ..." if len(unusable) > 10 else "",
        )  # fmt: skip
        unusable_set = set(unusable)
        dataset = dataset.select([index for index in range(len(dataset)) if index not in unusable_set])
    if len(dataset) == 0:
        raise ValueError(f"No utterance of split {split} of {args.dataset_name} can be used")
    return dataset


def _count_frames(audio: Any, frame_rate: float) -> int:
    try:
        return math.ceil(measure_duration(audio) * frame_rate)
    except ValueError as error:
        logger.warning("Left out: %s", error)
        return 0
