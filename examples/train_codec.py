# Copyright 2026 The transformers-sled Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Train an EnCodec as a `transformers.EncodecModel`, following "High Fidelity Neural Audio Compression"
(https://huggingface.co/papers/2210.13438): moving-average residual vector quantization (section 3.2), multi-resolution
spectrogram losses, a multi-scale STFT discriminator and gradient balancing (section 3.4).

    python examples/train_codec.py \
        --train_files "corpus/train-*.parquet" \
        --config_name examples/tiny_voice/codec_config.json \
        --output_dir codec

Training has three phases, switched by step: an autoencoder, the same with the quantizer, and last the discriminator.
Run the same command again to go on from the latest checkpoint in `output_dir`. The codec is exported to
`output_dir/export`, where `EncodecModel.from_pretrained` and `EncodecFeatureExtractor.from_pretrained` find it.
"""

import glob
import io
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from datasets import Audio, Dataset, load_dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import EncodecConfig, EncodecFeatureExtractor, EncodecModel, HfArgumentParser
from transformers.audio_utils import mel_filter_bank


logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """What to train and evaluate on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub or in a local folder, with an `audio` column."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split_name: str = field(default="train", metadata={"help": "Split of `dataset_name` to train on."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": "Split of `dataset_name` to evaluate on; default: held out from training."}
    )
    train_files: str | None = field(
        default=None, metadata={"help": "Parquet files (a glob pattern) to train on, in place of `dataset_name`."}
    )
    eval_files: str | None = field(
        default=None, metadata={"help": "Parquet files to evaluate on; default: held out from training."}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "Column of the audio."})
    text_column_name: str = field(default="text", metadata={"help": "Column of the transcript, for word error rate."})
    num_eval_samples: int = field(default=128, metadata={"help": "Number of utterances to evaluate on."})
    segment_seconds: float = field(default=1.0, metadata={"help": "Length of the random training segments."})


@dataclass
class ModelArguments:
    """The codec and its discriminator."""

    config_name: str | None = field(
        default=None, metadata={"help": "`EncodecConfig` of a new codec: a JSON file, a folder or a Hub repository."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Codec to go on from, in place of a new one."}
    )
    discriminator_n_ffts: list[int] = field(
        default_factory=lambda: [2048, 1024, 512], metadata={"help": "Window of each STFT discriminator, in samples."}
    )
    discriminator_filters: int = field(default=16, metadata={"help": "Channels of the STFT discriminators."})
    freeze_encoder: bool = field(
        default=False,
        metadata={"help": "Train the decoder alone, so that latents stay what a language model was trained on."},
    )


@dataclass
class CodecTrainingArguments:
    """How to train."""

    output_dir: str = field(metadata={"help": "Folder of checkpoints, logs, decoded audio and the exported codec."})
    eval_only: bool = field(default=False, metadata={"help": "Evaluate `model_name_or_path` and write `eval.json`."})
    max_steps: int = field(default=100_000, metadata={"help": "Number of updates of the codec."})
    quantizer_start_step: int = field(default=10_000, metadata={"help": "First step with the quantizer."})
    discriminator_start_step: int = field(
        default=50_000, metadata={"help": "First step of training the discriminator."}
    )
    adversarial_start_step: int = field(
        default=51_000, metadata={"help": "First step at which the codec listens to the discriminator."}
    )
    batch_size: int = field(default=8, metadata={"help": "Segments in a batch."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of the codec."})
    discriminator_learning_rate: float = field(default=3e-4, metadata={"help": "The discriminator's."})
    warmup_steps: int = field(default=500, metadata={"help": "Steps of linear warm-up."})
    final_learning_rate_ratio: float = field(
        default=0.05, metadata={"help": "Learning rate at `max_steps`, relative to the peak; the decay is a cosine."}
    )
    adam_beta1: float = field(default=0.8, metadata={"help": "First beta of AdamW."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Second beta of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    discriminator_update_probability: float = field(
        default=0.67, metadata={"help": "How often the discriminator is updated."}
    )
    mel_n_ffts: list[int] = field(
        default_factory=lambda: [2048, 1024, 512, 256, 128], metadata={"help": "Windows of the log-mel loss."}
    )
    mel_num_bins: list[int] = field(
        default_factory=lambda: [128, 80, 64, 40, 20], metadata={"help": "Mel bins for each window."}
    )
    mel_weight: float = field(default=1.0, metadata={"help": "Share of the log-mel loss in the balanced gradient."})
    magnitude_weight: float = field(
        default=0.0, metadata={"help": "Share of the L1 loss on mel magnitudes, which minds what is loud."}
    )
    waveform_weight: float = field(default=0.0, metadata={"help": "Share of the L1 loss on samples."})
    latent_weight: float = field(
        default=0.0,
        metadata={"help": "Share of the distance of latents, decoded and encoded again; for `--freeze_encoder`."},
    )
    adversarial_weight: float = field(default=0.5, metadata={"help": "Share of the adversarial loss."})
    feature_weight: float = field(default=0.5, metadata={"help": "Share of the feature matching loss."})
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight of the commitment loss."})
    whitening_weight: float = field(
        default=0.1, metadata={"help": "Weight of the penalty for latents that are off zero mean and unit covariance."}
    )
    latent_noise: float = field(
        default=0.1, metadata={"help": "Standard deviation of the noise on the decoder's input, for a smooth space."}
    )
    codebook_decay: float = field(default=0.99, metadata={"help": "Decay of the codebooks' moving averages."})
    dead_code_threshold: float = field(
        default=0.1, metadata={"help": "A code used less than this share of the average use is replaced."}
    )
    kmeans_vectors: int = field(default=20_000, metadata={"help": "Latents that the first codebooks are made from."})
    kmeans_iterations: int = field(default=10, metadata={"help": "Iterations of k-means on them."})
    bf16: bool = field(default=False, metadata={"help": "Run convolutions and LSTM in bfloat16."})
    device: str = field(default="cpu", metadata={"help": "Device to train on."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    logging_steps: int = field(default=50, metadata={"help": "Steps between logged losses."})
    eval_steps: int = field(default=2_000, metadata={"help": "Steps between evaluations."})
    save_steps: int = field(default=1_000, metadata={"help": "Steps between checkpoints and exports."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    whisper_model: str | None = field(
        default=None, metadata={"help": "faster-whisper model (a name or folder); if given, word error rates too."}
    )


# Data


def decode_audio(audio: dict[str, Any], sampling_rate: int) -> np.ndarray:
    """
    Decodes an undecoded `datasets` audio value to mono 16-bit samples.

    Args:
        audio (`dict`): `bytes` or `path` of an encoded audio file.
        sampling_rate (`int`): Sampling rate of the result, in Hz.

    Returns:
        `np.ndarray` of shape `(samples,)` and type int16.
    """
    source = io.BytesIO(audio["bytes"]) if audio.get("bytes") is not None else audio["path"]
    samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    samples = samples.mean(axis=1)
    if rate != sampling_rate:
        samples = soxr.resample(samples, rate, sampling_rate)
    return (samples.clip(-1.0, 1.0) * 32767.0).round().astype(np.int16)


class AudioCache:
    """
    The decoded utterances of a dataset: 16-bit samples end to end in one memory-mapped file.

    Args:
        folder (`Path`): Where `samples.int16` and `offsets.npy` are, or will be written.
        dataset (`datasets.Dataset`): Utterances.
        column (`str`): Column of the audio.
        sampling_rate (`int`): Sampling rate to decode to, in Hz.
    """

    def __init__(self, folder: Path, dataset: Dataset, column: str, sampling_rate: int):
        description = {"fingerprint": dataset._fingerprint, "column": column, "sampling_rate": sampling_rate}
        description_file = folder / "description.json"
        if not description_file.exists() or json.loads(description_file.read_text()) != description:
            self._decode(folder, dataset, column, sampling_rate)
            description_file.write_text(json.dumps(description))
        self.offsets = np.load(folder / "offsets.npy")
        self.samples = np.memmap(folder / "samples.int16", dtype=np.int16, mode="r")

    @staticmethod
    def _decode(folder: Path, dataset: Dataset, column: str, sampling_rate: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        offsets = [0]
        dataset = dataset.cast_column(column, Audio(decode=False))
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            open(folder / "samples.int16", "wb") as file,
            tqdm(total=len(dataset), desc="Decoding", unit="utterance") as progress,
        ):
            for batch in dataset.select_columns(column).iter(batch_size=64):
                for samples in pool.map(lambda audio: decode_audio(audio, sampling_rate), batch[column]):
                    samples.tofile(file)
                    offsets.append(offsets[-1] + len(samples))
                    progress.update()
        np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        """Returns one utterance as float32 samples in [-1, 1] of shape `(samples,)`."""
        return self._float(self.offsets[index], self.offsets[index + 1])

    def _float(self, start: int, end: int) -> torch.Tensor:
        return torch.from_numpy(self.samples[start:end].astype(np.float32)) / 32767.0

    def segments(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """
        Draws random segments; every second of audio is as likely as any other. Short utterances end in silence.

        Returns:
            `torch.FloatTensor` of shape `(count, 1, length)`.
        """
        batch = torch.zeros(count, 1, length)
        positions = torch.randint(int(self.offsets[-1]), (count,), generator=generator).numpy()
        for row, index in enumerate(np.searchsorted(self.offsets, positions, side="right") - 1):
            start, end = int(self.offsets[index]), int(self.offsets[index + 1])
            start += int(torch.randint(max(end - start - length, 0) + 1, (), generator=generator))
            samples = self._float(start, min(end, start + length))
            batch[row, 0, : len(samples)] = samples
        return batch


def load_data(arguments: DataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Loads the training utterances and those to evaluate on."""
    if (arguments.dataset_name is None) == (arguments.train_files is None):
        raise ValueError("Pass one of `dataset_name` and `train_files`.")

    def load(files: str | None, split: str) -> Dataset:
        if files is None:
            return load_dataset(arguments.dataset_name, arguments.dataset_config_name, split=split)
        if not glob.glob(files):
            raise ValueError(f"No file matches {files!r}: pass the path or glob pattern of existing parquet files.")
        return load_dataset("parquet", data_files=sorted(glob.glob(files)), split="train")

    train = load(arguments.train_files, arguments.train_split_name)
    if arguments.audio_column_name not in train.column_names:
        raise ValueError(
            f"`audio_column_name` is {arguments.audio_column_name!r}, but the columns are {train.column_names}."
        )
    if arguments.eval_files is not None or arguments.eval_split_name is not None:
        evaluation = load(arguments.eval_files, arguments.eval_split_name)
        evaluation = evaluation.select(range(min(arguments.num_eval_samples, len(evaluation))))
    else:
        if not 0 < arguments.num_eval_samples < len(train):
            raise ValueError(
                f"`num_eval_samples` is {arguments.num_eval_samples}: hold out between 1 and {len(train) - 1}."
            )
        split = train.train_test_split(test_size=arguments.num_eval_samples, seed=seed)
        train, evaluation = split["train"], split["test"]
    return train, evaluation


# Residual vector quantization (section 3.2 of the paper)


@torch.no_grad()
def initialize_codebooks(
    quantizer: nn.Module, latents: torch.Tensor, vectors_per_step: int, iterations: int, generator: torch.Generator
) -> None:
    """
    Fills the codebooks with the k-means centers of latents, each from what the codebooks before it leave.

    Args:
        quantizer (`EncodecResidualVectorQuantizer`): Its buffers are overwritten.
        latents (`torch.FloatTensor` of shape `(vectors, hidden_size)`): At least `codebook_size` vectors.
        vectors_per_step (`int`): Latents in a training batch, which the moving averages count in.
        iterations (`int`): Iterations of k-means.
        generator (`torch.Generator`): Draws the first centers.
    """

    def nearest_codes(codebook: nn.Module, vectors: torch.Tensor) -> torch.Tensor:
        # In parts: the distances of all vectors to all codes at once take gigabytes.
        return torch.cat([codebook.quantize(part) for part in vectors.split(4096)])

    residual = latents
    for layer in quantizer.layers:
        codebook = layer.codebook
        if len(residual) < codebook.codebook_size:
            raise ValueError(f"{codebook.codebook_size} codes need as many latents, got {len(residual)}.")
        chosen = torch.randperm(len(residual), generator=generator)[: codebook.codebook_size].to(residual.device)
        codebook.embed.copy_(residual[chosen])
        for _ in range(iterations):
            indices = nearest_codes(codebook, residual)
            counts = torch.bincount(indices, minlength=codebook.codebook_size)
            sums = torch.zeros_like(codebook.embed).index_add_(0, indices, residual)
            used = counts > 0
            codebook.embed[used] = sums[used] / counts[used, None]
        indices = nearest_codes(codebook, residual)
        counts = torch.bincount(indices, minlength=codebook.codebook_size)
        codebook.cluster_size.copy_(counts * (vectors_per_step / len(residual)))
        codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[:, None])
        codebook.inited.fill_(1.0)
        residual = residual - codebook.decode(indices)


@torch.no_grad()
def update_codebook(
    codebook: nn.Module, vectors: torch.Tensor, indices: torch.Tensor, decay: float, dead_code_threshold: float
) -> int:
    """
    Moves the codes of one codebook towards the vectors they stand for and revives dead ones.

    Args:
        codebook (`EncodecEuclideanCodebook`): Its buffers are updated.
        vectors (`torch.FloatTensor` of shape `(vectors, hidden_size)`): What was quantized.
        indices (`torch.LongTensor` of shape `(vectors,)`): The code of each.
        decay (`float`): Decay of the moving averages.
        dead_code_threshold (`float`): Share of the average use below which a code is replaced by a random vector.

    Returns:
        `int`: The number of codes replaced.
    """
    counts = torch.bincount(indices, minlength=codebook.codebook_size).to(vectors.dtype)
    sums = torch.zeros_like(codebook.embed_avg).index_add_(0, indices, vectors)
    codebook.cluster_size.lerp_(counts, 1.0 - decay)
    codebook.embed_avg.lerp_(sums, 1.0 - decay)
    average_use = codebook.cluster_size.mean()
    dead = codebook.cluster_size < dead_code_threshold * average_use
    num_dead = int(dead.sum())
    if num_dead > 0:
        chosen = torch.randint(len(vectors), (num_dead,)).to(vectors.device)
        codebook.cluster_size[dead] = average_use
        codebook.embed_avg[dead] = vectors[chosen] * average_use
    codebook.embed.copy_(codebook.embed_avg / codebook.cluster_size[:, None])
    return num_dead


def quantize(
    quantizer: nn.Module, latents: torch.Tensor, decay: float, dead_code_threshold: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """
    Quantizes latents for training: gradients pass straight through, codebooks follow by moving averages.

    Args:
        quantizer (`EncodecResidualVectorQuantizer`): Quantizer, whose codebooks are updated.
        latents (`torch.FloatTensor` of shape `(batch, hidden_size, frames)`): Output of the encoder.
        decay (`float`): See [`update_codebook`].
        dead_code_threshold (`float`): See [`update_codebook`].

    Returns:
        `tuple`: The quantized latents, shaped as `latents`; the commitment loss; the number of codes replaced.
    """
    vectors = latents.transpose(1, 2).reshape(-1, latents.shape[1])
    residual, total, commitment, num_dead = vectors, torch.zeros_like(vectors), 0.0, 0
    for layer in quantizer.layers:
        indices = layer.codebook.quantize(residual.detach())
        quantized = layer.codebook.decode(indices)
        commitment = commitment + F.mse_loss(residual, quantized)
        num_dead += update_codebook(layer.codebook, residual.detach(), indices, decay, dead_code_threshold)
        residual = residual - quantized
        total = total + quantized
    total = vectors + (total - vectors).detach()
    total = total.view(latents.shape[0], latents.shape[2], latents.shape[1]).transpose(1, 2)
    return total, commitment / len(quantizer.layers), num_dead


# Losses (section 3.4 of the paper)


class MelLoss(nn.Module):
    """
    Mean absolute differences of mel spectrograms and of their logarithms, averaged over several resolutions.

    Args:
        sampling_rate (`int`): Sampling rate, in Hz.
        n_ffts (`list[int]`): Windows, in samples; the hop is a quarter of each.
        num_bins (`list[int]`): Mel bins for each window.
        floor (`float`, *optional*, defaults to 1e-4): Magnitude, full scale being 1, that is as good as silence.
    """

    def __init__(self, sampling_rate: int, n_ffts: list[int], num_bins: list[int], floor: float = 1e-4):
        super().__init__()
        if len(n_ffts) != len(num_bins):
            raise ValueError(
                f"`mel_n_ffts` has {len(n_ffts)} values and `mel_num_bins` {len(num_bins)}: pass as many."
            )
        self.floor = floor
        self.windows, self.filters = nn.ParameterList(), nn.ParameterList()
        for n_fft, bins in zip(n_ffts, num_bins, strict=True):
            window = torch.hann_window(n_fft)
            filters = mel_filter_bank(n_fft // 2 + 1, bins, 0.0, sampling_rate / 2, sampling_rate, mel_scale="slaney")
            filters = torch.from_numpy(filters).float().T
            self.windows.append(nn.Parameter(window / window.sum(), requires_grad=False))
            self.filters.append(nn.Parameter(filters, requires_grad=False))

    def forward(self, audio: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compares two `(batch, 1, samples)` waveforms.

        Returns:
            `tuple` of scalars: the distance of the log magnitudes, in nepers, and that of the magnitudes, relative to
            the mean magnitude of the target.
        """
        log_distances, distances = [], []
        for window, filters in zip(self.windows, self.filters, strict=True):
            predicted, wanted = (self._mel(x, window, filters) for x in (audio, target))
            log_distances.append(F.l1_loss((predicted + self.floor).log(), (wanted + self.floor).log()))
            distances.append(F.l1_loss(predicted, wanted) / (wanted.mean() + self.floor))
        return torch.stack(log_distances).mean(), torch.stack(distances).mean()

    def _mel(self, audio: torch.Tensor, window: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        n_fft = len(window)
        spectrum = torch.stft(audio.squeeze(1), n_fft, n_fft // 4, window=window, return_complex=True)
        return filters @ (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()


def whitening_loss(latents: torch.Tensor) -> torch.Tensor:
    """
    Distance of the latents' distribution from zero mean and unit covariance. Without it all dimensions follow
    loudness for long, and what tells sounds apart drowns in the noise on the decoder's input.

    Args:
        latents (`torch.FloatTensor` of shape `(batch, hidden_size, frames)`): Output of the encoder.

    Returns:
        `torch.Tensor`: A scalar, per dimension.
    """
    vectors = latents.transpose(1, 2).flatten(0, 1)
    mean = vectors.mean(dim=0)
    centered = vectors - mean
    covariance = centered.T @ centered / (len(vectors) - 1)
    identity = torch.eye(len(mean), device=mean.device)
    return (mean.square().sum() + (covariance - identity).square().sum()) / len(mean)


class GradientBalancer:
    """
    Balances losses by the norms of their gradients with respect to the audio, so that weights are shares.

    Args:
        decay (`float`, *optional*, defaults to 0.999): Decay of the moving average of the norms.
    """

    def __init__(self, decay: float = 0.999):
        self.decay = decay
        self.totals: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def gradient(
        self, losses: dict[str, torch.Tensor], weights: dict[str, float], audio: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            losses (`dict`): Scalar losses.
            weights (`dict`): Their weights.
            audio (`torch.FloatTensor` of shape `(batch, 1, samples)`): What they depend on.

        Returns:
            `torch.FloatTensor` shaped as `audio`: The combined gradient.
        """
        combined = torch.zeros_like(audio)
        total_weight = sum(weights[name] for name in losses)
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, [audio], retain_graph=True)
            norm = float(gradient.flatten(1).norm(dim=1).mean())
            self.totals[name] = self.totals.get(name, 0.0) * self.decay + norm
            self.counts[name] = self.counts.get(name, 0.0) * self.decay + 1.0
            combined += weights[name] / total_weight * gradient / (self.totals[name] / self.counts[name] + 1e-12)
        return combined

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"totals": self.totals, "counts": self.counts}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self.totals, self.counts = dict(state["totals"]), dict(state["counts"])


class STFTDiscriminator(nn.Module):
    """
    Judges audio by its complex spectrogram.

    Args:
        n_fft (`int`): Window, in samples; the hop is a quarter of it.
        filters (`int`): Channels.
    """

    def __init__(self, n_fft: int, filters: int):
        super().__init__()
        window = torch.hann_window(n_fft)
        self.window = nn.Buffer(window / window.square().sum().sqrt(), persistent=False)
        # Kernels and padding are (time, frequency); frequency is halved where time is dilated.
        convolutions = [nn.Conv2d(2, filters, (3, 9), padding=(1, 4))]
        for dilation in (1, 2, 4):
            convolutions.append(
                nn.Conv2d(filters, filters, (3, 9), (1, 2), padding=(dilation, 4), dilation=(dilation, 1))
            )
        convolutions.append(nn.Conv2d(filters, filters, (3, 3), padding=1))
        convolutions.append(nn.Conv2d(filters, 1, (3, 3), padding=1))
        self.convolutions = nn.ModuleList(weight_norm(convolution) for convolution in convolutions)

    def forward(self, audio: torch.Tensor) -> list[torch.Tensor]:
        """Maps `(batch, 1, samples)` to the features of every layer; the last is the judgement."""
        n_fft = len(self.window)
        spectrum = torch.stft(audio.squeeze(1), n_fft, n_fft // 4, window=self.window, return_complex=True)
        hidden = torch.stack((spectrum.real, spectrum.imag), dim=1).transpose(2, 3)
        features = []
        for convolution in self.convolutions[:-1]:
            hidden = F.leaky_relu(convolution(hidden), 0.2)
            features.append(hidden)
        features.append(self.convolutions[-1](hidden))
        return features


class MultiScaleSTFTDiscriminator(nn.Module):
    """Several [`STFTDiscriminator`], one per window."""

    def __init__(self, n_ffts: list[int], filters: int):
        super().__init__()
        self.discriminators = nn.ModuleList(STFTDiscriminator(n_fft, filters) for n_fft in n_ffts)

    def forward(self, audio: torch.Tensor) -> list[list[torch.Tensor]]:
        return [discriminator(audio) for discriminator in self.discriminators]


def discriminator_loss(real: list[list[torch.Tensor]], fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge loss of the discriminator, given its features for real and decoded audio."""
    losses = [
        F.relu(1.0 - r[-1].float()).mean() + F.relu(1.0 + f[-1].float()).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge loss of the codec."""
    return torch.stack([F.relu(1.0 - f[-1].float()).mean() for f in fake]).mean()


def feature_matching_loss(real: list[list[torch.Tensor]], fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Difference of the discriminator's inner features, relative to their size for real audio."""
    losses = [
        F.l1_loss(f.float(), r.float()) / r.float().abs().mean().clamp(min=1e-6)
        for real_scale, fake_scale in zip(real, fake, strict=True)
        for r, f in zip(real_scale[:-1], fake_scale[:-1], strict=True)
    ]
    return torch.stack(losses).mean()


# Training


def create_codec(arguments: ModelArguments) -> EncodecModel:
    """Loads the codec or makes a new one, with zero biases: the default ones hold it at silence for long."""
    if (arguments.config_name is None) == (arguments.model_name_or_path is None):
        raise ValueError("Pass one of `config_name` and `model_name_or_path`.")
    if arguments.model_name_or_path is not None:
        return EncodecModel.from_pretrained(arguments.model_name_or_path)
    config = EncodecConfig.from_pretrained(arguments.config_name)
    if config.sampling_rate % config.hop_length != 0:
        raise ValueError(
            f"`upsampling_ratios` {list(config.upsampling_ratios)} give frames of {config.hop_length} samples, which "
            f"do not divide the sampling rate {config.sampling_rate}."
        )
    if config.normalize or config.chunk_length_s is not None:
        raise ValueError("Only codecs without `normalize` and `chunk_length_s` can be trained.")
    codec = EncodecModel(config)
    for name, parameter in codec.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    return codec


class CodecTrainer:
    """Everything that makes up the state of a training run."""

    def __init__(
        self, codec: EncodecModel, model_arguments: ModelArguments, arguments: CodecTrainingArguments, segment: int
    ):
        self.arguments = arguments
        self.segment = segment
        self.device = torch.device(arguments.device)
        self.output_dir = Path(arguments.output_dir)
        self.codec = codec.to(self.device)
        self.freeze_encoder = model_arguments.freeze_encoder
        if arguments.latent_weight > 0.0 and not self.freeze_encoder:
            raise ValueError("`latent_weight` needs `freeze_encoder`, so that what is compared stays the same.")
        if self.freeze_encoder:
            if not self.quantized:
                raise ValueError("`freeze_encoder` needs `model_name_or_path` to be a codec with trained codebooks.")
            codec.encoder.requires_grad_(False)
        self.discriminator = MultiScaleSTFTDiscriminator(
            model_arguments.discriminator_n_ffts, model_arguments.discriminator_filters
        ).to(self.device)
        trained = [parameter for parameter in codec.parameters() if parameter.requires_grad]
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        self.optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, betas=betas, fused=True)
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=arguments.discriminator_learning_rate, betas=betas, fused=True
        )
        self.mel_loss = MelLoss(codec.config.sampling_rate, arguments.mel_n_ffts, arguments.mel_num_bins)
        self.mel_loss.to(self.device)
        self.balancer = GradientBalancer()
        self.generator = torch.Generator().manual_seed(arguments.seed)
        self.step = 0

    @property
    def quantized(self) -> bool:
        """Whether there are codebooks, from training so far or from the codec it started with."""
        return bool(self.codec.quantizer.layers[0].codebook.embed.any())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bf16)

    def learning_rate_factor(self) -> float:
        warmup = min(1.0, (self.step + 1) / max(1, self.arguments.warmup_steps))
        final = self.arguments.final_learning_rate_ratio
        progress = min(1.0, self.step / self.arguments.max_steps)
        return warmup * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    def start_quantizer(self, data: AudioCache) -> None:
        """Makes the first codebooks from the latents of training data."""
        arguments = self.arguments
        frames = arguments.batch_size * math.ceil(self.segment / self.codec.config.hop_length)
        latents = []
        with torch.no_grad(), self.autocast():
            for _ in range(math.ceil(arguments.kmeans_vectors / frames)):
                audio = data.segments(arguments.batch_size, self.segment, self.generator).to(self.device)
                latents.append(self.codec.encoder(audio).float().transpose(1, 2).flatten(0, 1))
        initialize_codebooks(
            self.codec.quantizer, torch.cat(latents), frames, arguments.kmeans_iterations, self.generator
        )

    def train_step(self, data: AudioCache) -> dict[str, float]:
        """Draws a batch, updates codec and discriminator, returns what to log."""
        arguments = self.arguments
        if self.step >= arguments.quantizer_start_step and not self.quantized:
            self.start_quantizer(data)
        factor = self.learning_rate_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = arguments.learning_rate * factor
        for group in self.discriminator_optimizer.param_groups:
            group["lr"] = arguments.discriminator_learning_rate * factor

        audio = data.segments(arguments.batch_size, self.segment, self.generator).to(self.device)
        log = {"learning_rate": arguments.learning_rate * factor}
        with self.autocast():
            latents = self.codec.encoder(audio)
        latents = latents.float()
        # Losses that reach the encoder without passing the decoder; none where it is frozen.
        regularization = []
        encoder_output = latents
        if self.freeze_encoder:
            latents = self.codec.quantizer.decode(self.codec.quantizer.encode(latents))
        else:
            whitening = whitening_loss(latents)
            regularization.append(arguments.whitening_weight * whitening)
            log["whitening"] = whitening.item()
            if self.quantized:
                latents, commitment, num_dead = quantize(
                    self.codec.quantizer, latents, arguments.codebook_decay, arguments.dead_code_threshold
                )
                regularization.append(arguments.commitment_weight * commitment)
                log["commitment"] = commitment.item()
                log["quantization_error"] = (F.mse_loss(latents, encoder_output) / encoder_output.var()).item()
                log["codes_replaced"] = num_dead
        latents = latents + arguments.latent_noise * torch.randn_like(latents)
        with self.autocast():
            decoded = self.codec.decoder(latents)
        decoded = decoded.float()

        # The losses see a leaf; its balanced gradient is then taken through the codec in one backward pass.
        leaf = decoded.detach().requires_grad_()
        mel, magnitude = self.mel_loss(leaf, audio)
        losses = {"mel": mel}
        weights = {"mel": arguments.mel_weight}
        if arguments.magnitude_weight > 0.0:
            losses["magnitude"] = magnitude
            weights["magnitude"] = arguments.magnitude_weight
        if arguments.waveform_weight > 0.0:
            losses["waveform"] = F.l1_loss(leaf, audio)
            weights["waveform"] = arguments.waveform_weight
        if arguments.latent_weight > 0.0:
            with self.autocast():
                losses["latent"] = F.mse_loss(self.codec.encoder(leaf).float(), encoder_output)
            weights["latent"] = arguments.latent_weight
        if self.step >= arguments.adversarial_start_step:
            self.discriminator.requires_grad_(False)
            with self.autocast():
                with torch.no_grad():
                    real = self.discriminator(audio)
                fake = self.discriminator(leaf)
            losses["adversarial"] = adversarial_loss(fake)
            losses["feature"] = feature_matching_loss(real, fake)
            weights["adversarial"] = arguments.adversarial_weight
            weights["feature"] = arguments.feature_weight
            self.discriminator.requires_grad_(True)
        gradient = self.balancer.gradient(losses, weights, leaf)
        self.optimizer.zero_grad()
        torch.autograd.backward([decoded, *regularization], [gradient] + [None] * len(regularization))
        log["gradient_norm"] = float(nn.utils.clip_grad_norm_(self.codec.parameters(), arguments.max_grad_norm))
        self.optimizer.step()
        log.update({name: loss.item() for name, loss in losses.items()})

        if (
            self.step >= arguments.discriminator_start_step
            and float(torch.rand((), generator=self.generator)) < arguments.discriminator_update_probability
        ):
            with self.autocast():
                loss = discriminator_loss(self.discriminator(audio), self.discriminator(decoded.detach()))
            self.discriminator_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.discriminator.parameters(), arguments.max_grad_norm)
            self.discriminator_optimizer.step()
            log["discriminator"] = loss.item()
        self.step += 1
        return log

    # Checkpoints

    def save(self) -> None:
        """Writes a checkpoint, complete or not at all, and exports the codec."""
        checkpoint = self.output_dir / f"checkpoint-{self.step}"
        partial = Path(f"{checkpoint}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.export(partial)
        save_file(self.discriminator.state_dict(), partial / "discriminator.safetensors")
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
        }
        torch.save(state, partial / "training_state.pt")
        shutil.rmtree(checkpoint, ignore_errors=True)
        partial.rename(checkpoint)
        for _, old in self.checkpoints()[: -self.arguments.save_total_limit]:
            shutil.rmtree(old)
        self.export(self.output_dir / "export")

    def export(self, folder: Path) -> None:
        """Writes the codec and its feature extractor, each file complete or not at all."""
        partial = Path(f"{folder}.writing")
        config = self.codec.config
        self.codec.save_pretrained(partial)
        EncodecFeatureExtractor(
            feature_size=config.audio_channels, sampling_rate=config.sampling_rate
        ).save_pretrained(partial)
        folder.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Complete checkpoints, oldest first."""
        folders = [path for path in self.output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
        return sorted((int(path.name.split("-")[-1]), path) for path in folders)

    def resume(self) -> None:
        """Goes on from the latest checkpoint, if there is one."""
        if not self.checkpoints():
            return
        step, checkpoint = self.checkpoints()[-1]
        logger.info("Resuming from step %d", step)
        self.codec.load_state_dict(EncodecModel.from_pretrained(checkpoint).state_dict())
        self.discriminator.load_state_dict(load_file(checkpoint / "discriminator.safetensors"))
        state = torch.load(checkpoint / "training_state.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        self.balancer.load_state_dict(state["balancer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        self.step = state["step"]


# Evaluation


@torch.no_grad()
def resynthesize(
    codec: EncodecModel, audio: torch.Tensor, quantized: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sends one utterance through the codec.

    Args:
        codec (`EncodecModel`): Codec.
        audio (`torch.FloatTensor` of shape `(samples,)`): Utterance.
        quantized (`bool`, *optional*, defaults to `True`): Whether to use the quantizer.

    Returns:
        `tuple`: The resynthesis, shaped as `audio`, and the latents that it is made from, `(frames, hidden_size)`.
    """
    latents = codec.encoder(audio[None, None])
    if quantized:
        latents = codec.quantizer.decode(codec.quantizer.encode(latents))
    return codec.decoder(latents)[0, 0, : len(audio)], latents[0].T


def word_error_rate(whisper: Any, audios: Iterator[np.ndarray], texts: list[str], sampling_rate: int) -> float:
    """Word error rate, in percent, of what Whisper hears (greedy search) against the transcripts."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalize = EnglishTextNormalizer({})
    heard = []
    for audio in tqdm(audios, total=len(texts), desc="Transcribing", leave=False):
        segments, _ = whisper.transcribe(
            soxr.resample(audio, sampling_rate, 16_000), language="en", beam_size=1, temperature=0.0
        )
        heard.append(normalize(" ".join(segment.text for segment in segments)))
    return 100.0 * jiwer.wer([normalize(text) for text in texts], heard)


@torch.no_grad()
def evaluate(
    codec: EncodecModel, data: AudioCache, mel_loss: MelLoss, quantized: bool, texts: list[str], whisper: Any
) -> dict[str, Any]:
    """
    Measures the codec on whole utterances.

    Args:
        codec (`EncodecModel`): Codec.
        data (`AudioCache`): Utterances.
        mel_loss (`MelLoss`): Its distance of log magnitudes is the spectral distance.
        quantized (`bool`): Whether to use the quantizer.
        texts (`list[str]`): Transcripts, for `whisper`.
        whisper (`faster_whisper.WhisperModel` or `None`): Recognizer; without one there are no word error rates.

    Returns:
        `dict`: `num_samples`; `spectral_distance`, in nepers; `latent_distance`, the mean square of what encoding the
        resynthesis again changes in the latents; with a recognizer, `wer` and `wer_original` in percent; `latent_mean`
        and `latent_std`, a value per dimension.
    """
    codec.eval()
    distances, latent_distances, latents, decoded = [], [], [], []
    for index in tqdm(range(len(data)), desc="Evaluating", leave=False):
        audio = data[index].to(codec.device)
        resynthesis, frames = resynthesize(codec, audio, quantized)
        distances.append(float(mel_loss(resynthesis[None, None], audio[None, None])[0]))
        again, original = codec.encoder(resynthesis[None, None]), codec.encoder(audio[None, None])
        latent_distances.append(float(F.mse_loss(again, original)))
        latents.append(frames.cpu())
        decoded.append(resynthesis.cpu().numpy())
    codec.train()
    latents = torch.cat(latents)
    results = {
        "num_samples": len(data),
        "spectral_distance": float(np.mean(distances)),
        "latent_distance": float(np.mean(latent_distances)),
        "latent_mean": latents.mean(dim=0).tolist(),
        "latent_std": latents.std(dim=0).tolist(),
    }
    if whisper is not None:
        rate = codec.config.sampling_rate
        results["wer"] = word_error_rate(whisper, iter(decoded), texts, rate)
        originals = (data[index].numpy() for index in range(len(data)))
        results["wer_original"] = word_error_rate(whisper, originals, texts, rate)
    return results


def main() -> None:
    parser = HfArgumentParser((DataArguments, ModelArguments, CodecTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        data_arguments, model_arguments, arguments = parser.parse_json_file(sys.argv[1])
    else:
        data_arguments, model_arguments, arguments = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    output_dir = Path(arguments.output_dir)
    codec = create_codec(model_arguments)
    rate = codec.config.sampling_rate
    train, evaluation = load_data(data_arguments, arguments.seed)
    column = data_arguments.audio_column_name
    eval_data = AudioCache(output_dir / "audio" / "eval", evaluation, column, rate)
    texts: list[str] = []
    whisper = None
    if arguments.whisper_model is not None:
        from faster_whisper import WhisperModel

        if data_arguments.text_column_name not in evaluation.column_names:
            raise ValueError(
                f"`text_column_name` is {data_arguments.text_column_name!r}, but the columns are "
                f"{evaluation.column_names}."
            )
        texts = list(evaluation[data_arguments.text_column_name])
        whisper = WhisperModel(arguments.whisper_model, device="cpu", compute_type="float32")
    segment = round(data_arguments.segment_seconds * rate)
    trainer = CodecTrainer(codec, model_arguments, arguments, segment)

    if arguments.eval_only:
        results = evaluate(codec, eval_data, trainer.mel_loss, trainer.quantized, texts, whisper)
        (output_dir / "eval.json").write_text(json.dumps(results, indent=2))
        print(json.dumps(results, indent=2))
        return

    train_data = AudioCache(output_dir / "audio" / "train", train, column, rate)
    trainer.resume()
    codec.train()
    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: interrupted.append(number))
    writer = SummaryWriter(output_dir / "logs", purge_step=trainer.step)
    progress = tqdm(total=arguments.max_steps, initial=trainer.step, unit="step", dynamic_ncols=True)
    sums: dict[str, list[float]] = {}
    started, started_step = time.perf_counter(), trainer.step
    try:
        while trainer.step < arguments.max_steps and not interrupted:
            for name, value in trainer.train_step(train_data).items():
                sums.setdefault(name, []).append(value)
            progress.update()
            if trainer.step % arguments.logging_steps == 0:
                averages = {name: float(np.mean(values)) for name, values in sums.items()}
                seconds = (trainer.step - started_step) * arguments.batch_size * data_arguments.segment_seconds
                averages["audio_seconds_per_second"] = seconds / (time.perf_counter() - started)
                for name, value in averages.items():
                    writer.add_scalar(f"train/{name}", value, trainer.step)
                progress.set_postfix({"mel": f"{averages['mel']:.3f}"})
                sums.clear()
                started, started_step = time.perf_counter(), trainer.step
            if trainer.step % arguments.eval_steps == 0 or trainer.step == arguments.max_steps:
                results = evaluate(codec, eval_data, trainer.mel_loss, trainer.quantized, texts, whisper)
                for name, value in results.items():
                    if isinstance(value, float):
                        writer.add_scalar(f"eval/{name}", value, trainer.step)
                (output_dir / "eval.json").write_text(json.dumps({"step": trainer.step, **results}, indent=2))
                logger.info("step %d: spectral distance %.4f", trainer.step, results["spectral_distance"])
            if trainer.step % arguments.save_steps == 0 or trainer.step == arguments.max_steps or interrupted:
                trainer.save()
    finally:
        progress.close()
        writer.close()


if __name__ == "__main__":
    main()
