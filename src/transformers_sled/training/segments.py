"""Decoded speech, kept as 16-bit samples, with latents or without, and random segments of it to train a codec on."""

from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch.nn import functional as F
from transformers import EncodecConfig, EncodecModel

from ..audio_sled import read_audio
from .sources import check_columns, load_source


# Latents at the start of a segment that have heard too little to be judged.
NUM_UNJUDGED = 4


@dataclass
class CodecDataArguments:
    """What to train and evaluate a codec on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub or in a local folder, with an `audio` column."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: held out from training."}
    )
    train_files: str | None = field(
        default=None, metadata={"help": "Parquet files (a glob pattern) to train on, in place of `dataset_name`."}
    )
    eval_files: str | None = field(
        default=None, metadata={"help": "Parquet files to evaluate on; default: held out from training."}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "Column of the audio."})
    num_eval_samples: int = field(default=128, metadata={"help": "Number of utterances to evaluate on."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that decode audio."})


def load_codec_data(
    arguments: CodecDataArguments, sampling_rate: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Loads and decodes what a codec is trained and evaluated on.

    Args:
        arguments ([`CodecDataArguments`]):
            What to load.
        sampling_rate (`int`):
            Sampling rate to decode to, in Hz.
        seed (`int`):
            Seed of what is held out from training.

    Returns:
        `tuple(datasets.Dataset, datasets.Dataset)`: see [`decode_utterances`].

    Raises:
        `ValueError`: If there is no source, no audio column or nothing left to train on.
    """
    source, column = arguments.dataset_name or arguments.train_files, arguments.audio_column_name
    if source is None or (arguments.dataset_name and arguments.train_files):
        raise ValueError("Pass one of `dataset_name` and `train_files`.")

    def load(source: str, split: str) -> datasets.Dataset:
        dataset = load_source(source, arguments.dataset_config_name, split)
        if column not in dataset.column_names:
            raise ValueError(f"`audio_column_name` is {column!r}, but the columns are {dataset.column_names}.")
        return dataset

    train = load(source, arguments.train_split_name)
    if arguments.eval_files is not None or arguments.eval_split_name is not None:
        evaluation = load(arguments.eval_files or source, arguments.eval_split_name or "train")
        evaluation = evaluation.select(range(min(arguments.num_eval_samples, len(evaluation))))
    else:
        if not 0 < arguments.num_eval_samples < len(train):
            raise ValueError(
                f"`num_eval_samples` is {arguments.num_eval_samples}: hold out between 1 and {len(train) - 1}."
            )
        train, evaluation = train.train_test_split(test_size=arguments.num_eval_samples, seed=seed).values()
    train, evaluation = (
        decode_utterances(dataset, column, sampling_rate, arguments.preprocessing_num_workers)
        for dataset in (train, evaluation)
    )
    return train, evaluation


def decode_utterances(
    dataset: datasets.Dataset, column: str, sampling_rate: int, num_proc: int | None = None
) -> datasets.Dataset:
    """
    Decodes a column of audio, once: `datasets` keeps the result and maps it into memory.

    Args:
        dataset (`datasets.Dataset`):
            Utterances, not decoded.
        column (`str`):
            Column of the audio.
        sampling_rate (`int`):
            Sampling rate to decode to, in Hz.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `datasets.Dataset`: with `samples` (mono, int16) and `length`, their number, for every row.

    Raises:
        `ValueError`: If there is no such column or an audio cannot be read.
    """
    check_columns(dataset, [column], "The dataset")
    return dataset.select_columns(column).map(
        _decode,
        fn_kwargs={"column": column, "sampling_rate": sampling_rate},
        remove_columns=column,
        features=datasets.Features(samples=datasets.Sequence(datasets.Value("int16")), length=datasets.Value("int64")),
        num_proc=num_proc,
        writer_batch_size=64,
        desc="Decoding",
    )


def _decode(row: dict[str, Any], column: str, sampling_rate: int) -> dict[str, Any]:
    samples = read_audio(row[column], target_rate=sampling_rate)
    return {"samples": (samples.clip(-1.0, 1.0) * 32767.0).round().astype(np.int16), "length": len(samples)}


class SpeechSegments:
    """
    Random segments of utterances; every second of audio is as likely as any other.

    Args:
        dataset (`datasets.Dataset`):
            From [`decode_utterances`].
        num_samples (`int`):
            Length of a segment.
        hop_length (`int`, *optional*, defaults to 1):
            Segments start at multiples of it.
        num_early (`int`, *optional*, defaults to 0):
            As many starts before an utterance are drawn as well, and moved to where it starts.
    """

    def __init__(self, dataset: datasets.Dataset, num_samples: int, hop_length: int = 1, num_early: int = 0):
        self.lengths = np.array(dataset["length"][:])
        self.ends = np.cumsum(self.lengths)
        self.dataset = dataset.with_format("arrow", columns=["samples"])
        self.num_samples = num_samples
        self.hop_length, self.num_early = hop_length, num_early

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One utterance as float32 samples in [-1, 1] of shape `(samples,)`."""
        return self._read(index, slice(None))

    def _read(self, index: int, part: slice) -> torch.Tensor:
        samples = self.dataset[int(index)]["samples"][0].values.to_numpy()[part]
        return torch.from_numpy(samples.astype(np.float32)) / 32767.0

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """
        Args:
            count (`int`):
                Number of segments.
            generator (`torch.Generator`):
                Draws them.

        Returns:
            `tuple`: samples `(count, 1, num_samples)`, with silence after the end of what is shorter; the utterance of
            each `(count,)` and the sample it starts at `(count,)`.
        """
        segments = torch.zeros(count, 1, self.num_samples)
        positions = torch.randint(int(self.ends[-1]), (count,), generator=generator).numpy()
        rows, starts = np.searchsorted(self.ends, positions, side="right"), np.zeros(count, dtype=np.int64)
        for number, row in enumerate(rows):
            latest = max(int(self.lengths[row]) - self.num_samples, 0) // self.hop_length
            start = int(torch.randint(-self.num_early, latest + 1, (), generator=generator))
            starts[number] = max(start, 0) * self.hop_length
            samples = self._read(row, slice(starts[number], starts[number] + self.num_samples))
            segments[number, 0, : len(samples)] = samples
        return segments, rows, starts


@torch.no_grad()
def encode_utterances(dataset: datasets.Dataset, codec: EncodecModel) -> datasets.Dataset:
    """
    Adds the latents of a codec's encoder, in half precision, once: `datasets` keeps the result and maps it into memory.

    Args:
        dataset (`datasets.Dataset`):
            From [`decode_utterances`].
        codec ([`EncodecModel`]):
            The codec, on the device to run on.

    Returns:
        `datasets.Dataset`: with `latents`, the rows of a matrix `(frames, hidden_size)` one after the other.
    """
    hop_length = codec.config.hop_length

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        samples = torch.from_numpy(row["samples"]).to(codec.device).float() / 32767.0
        latents = codec.encoder(F.pad(samples, (0, -len(samples) % hop_length))[None, None])[0].T
        return {"latents": latents.half().flatten().cpu().numpy()}

    weights = {name: value.cpu().numpy() for name, value in codec.encoder.state_dict().items()}
    encoded = dataset.with_format("numpy").map(
        encode,
        remove_columns=dataset.column_names,
        features=datasets.Features(latents=datasets.Sequence(datasets.Value("float16"))),
        # What `datasets` would find out by itself, if it could tell one module from another.
        new_fingerprint=Hasher.hash([dataset._fingerprint, hop_length, weights]),
        writer_batch_size=64,
        desc="Encoding",
    )
    return datasets.concatenate_datasets([dataset, encoded.with_format(None)], axis=1)


class LatentSegments:
    """
    Random segments of utterances with the latents that a decoder should make them from.

    Args:
        dataset (`datasets.Dataset`):
            From [`encode_utterances`].
        codec_config ([`EncodecConfig`]):
            Configuration of the codec that the latents are of.
        num_frames (`int`):
            Latents of a segment.
    """

    def __init__(self, dataset: datasets.Dataset, codec_config: EncodecConfig, num_frames: int):
        self.hop_length, self.hidden_size = codec_config.hop_length, codec_config.hidden_size
        # Starts of utterances, where codecs know no past, are drawn more often than any other place.
        self.audio = SpeechSegments(dataset, num_frames * self.hop_length, self.hop_length, 2 * NUM_UNJUDGED)
        self.latents = dataset.with_format("arrow", columns=["latents"])
        self.num_frames = num_frames

    def __len__(self) -> int:
        return len(self.audio)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One utterance: samples `(samples,)`, with silence to the end of the last frame, and latents `(hidden_size, frames)`."""
        samples = self.audio[index]
        return F.pad(samples, (0, -len(samples) % self.hop_length)), self._read(index)

    def _read(self, index: int) -> torch.Tensor:
        latents = self.latents[int(index)]["latents"][0].values.to_numpy().astype(np.float32)
        return torch.from_numpy(latents).view(-1, self.hidden_size).T

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            count (`int`):
                Number of segments.
            generator (`torch.Generator`):
                Draws them.

        Returns:
            `tuple`: samples `(count, 1, num_frames * hop_length)`; latents `(count, hidden_size, num_frames)`; which frames
            are to be judged `(count, num_frames)`: not the first ones of a segment whose speech began before it.
        """
        samples, rows, starts = self.audio.draw(count, generator)
        latents = torch.empty(count, self.hidden_size, self.num_frames)
        for number, (row, start) in enumerate(zip(rows, starts // self.hop_length, strict=True)):
            found = self._read(row)[:, start : start + self.num_frames]
            # Silence goes on as it is at the end, which zeros among the latents are not.
            latents[number] = F.pad(found, (0, self.num_frames - found.shape[1]), mode="replicate")
        is_judged = (torch.arange(self.num_frames) >= NUM_UNJUDGED) | torch.from_numpy(starts == 0)[:, None]
        return samples, latents, is_judged
