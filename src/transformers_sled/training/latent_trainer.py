"""
Training of the encoder and the codebooks of a small EnCodec on what its latents should tell, before its decoder is trained.

A codec that learns from spectral losses alone leaves out the pitch and blurs what tells words apart, and a language model
on such latents gains next to nothing from its text. Here small networks, which are not part of the result, read spectra at
two resolutions, the phoneme and the pitch from every latent, through noise as strong as a language model's errors. The
latents are whitened as in train_codec.py, and the codebooks are made from them at the end, by k-means.
"""

import logging
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import EncodecConfig, EncodecModel
from transformers.audio_utils import mel_filter_bank

from .alignment import LABEL_RATE
from .base_codec_trainer import BaseCodecTrainer, BaseCodecTrainingArguments
from .codec_losses import whitening_loss
from .codec_quantizer import initialize_codebooks
from .segments import NUM_UNJUDGED, SpeechSegments, decode_utterances
from .sources import check_columns, load_source


logger = logging.getLogger(__name__)

# The two spectra: a short window, several times a latent, for sounds, and a long one, once, for pitch.
N_FFTS = (512, 2048)
NUM_MEL_BINS = (80, 128)
SHORT_SPECTRA_PER_LATENT = 4
MAGNITUDE_FLOOR = 3e-4
# Where a typical log magnitude and a typical logarithm of the pitch in Hz are, and how far the latter ranges.
MEAN_LOG_MAGNITUDE = -5.5
MEAN_LOG_PITCH, LOG_PITCH_RANGE = 5.0, 0.36


@dataclass
class LatentDataArguments:
    """What to train latents on."""

    train_files: str = field(metadata={"help": "Parquet files (a glob pattern) with `id` and `audio`."})
    labels: str = field(metadata={"help": "Parquet file of label_speech.py for the same utterances."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that decode audio."})


@dataclass
class LatentTrainingArguments(BaseCodecTrainingArguments):
    """How to train latents."""

    max_steps: int = field(default=3_500, metadata={"help": "Number of updates."})
    segment_seconds: float = field(default=2.0, metadata={"help": "Length of the segments."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate; it falls along a cosine."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    final_learning_rate_ratio: float = field(
        default=0.03, metadata={"help": "Learning rate at `max_steps`, relative to the peak."}
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    reader_steps: int = field(
        default=0, metadata={"help": "First steps, in which only the readers learn, to go on from a trained codec."}
    )
    latent_noise: float = field(default=0.6, metadata={"help": "Largest standard deviation of the noise."})
    phoneme_weight: float = field(default=0.3, metadata={"help": "Weight of the cross entropy of the phonemes."})
    pitch_weight: float = field(default=0.3, metadata={"help": "Weight of the distance in pitch."})
    voicing_weight: float = field(default=0.2, metadata={"help": "Weight of the cross entropy of voicing."})
    whitening_weight: float = field(
        default=0.1, metadata={"help": "Weight of the penalty for latents that are off zero mean and unit covariance."}
    )
    codebook_utterances: int = field(default=800, metadata={"help": "Utterances the codebooks are made from."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints to keep."})


class LatentReaders(nn.Module):
    """
    What is read from latents in training. Nothing looks ahead, as the codec's decoder does not.

    Args:
        latent_dim (`int`): Width of a latent.
        num_phonemes (`int`): Number of phonemes.
    """

    def __init__(self, latent_dim: int, num_phonemes: int):
        super().__init__()
        num_magnitudes = SHORT_SPECTRA_PER_LATENT * NUM_MEL_BINS[0] + NUM_MEL_BINS[1]
        self.spectra = nn.Sequential(
            nn.ConstantPad1d((4, 0), 0.0),
            nn.Conv1d(latent_dim, 256, 5),
            nn.GELU(),
            nn.Conv1d(256, num_magnitudes, 1),
        )
        self.phonemes = nn.Conv1d(latent_dim, num_phonemes, 1)
        self.pitch = nn.Sequential(
            nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(latent_dim, 64, 3), nn.GELU(), nn.Conv1d(64, 2, 1)
        )

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            latents (`torch.FloatTensor` of shape `(batch, latent_dim, frames)`): Latents.

        Returns:
            `tuple`: log magnitudes `(batch, frames, magnitudes)`; logits of the phonemes `(batch, phonemes, frames)`;
            logit of voicing `(batch, frames)`; logarithm of the pitch in Hz `(batch, frames)`.
        """
        voicing, pitch = self.pitch(latents).unbind(dim=1)
        spectra = self.spectra(latents).transpose(1, 2) + MEAN_LOG_MAGNITUDE
        return spectra, self.phonemes(latents), voicing, pitch * LOG_PITCH_RANGE + MEAN_LOG_PITCH


class LogSpectra(nn.Module):
    """
    Both log-mel spectra around every latent.

    Args:
        sampling_rate (`int`): Sampling rate, in Hz.
        hop_length (`int`): Samples of a latent.
    """

    def __init__(self, sampling_rate: int, hop_length: int):
        super().__init__()
        self.hops = (hop_length // SHORT_SPECTRA_PER_LATENT, hop_length)
        for n_fft, bins in zip(N_FFTS, NUM_MEL_BINS, strict=True):
            window = torch.hann_window(n_fft)
            filters = mel_filter_bank(n_fft // 2 + 1, bins, 0.0, sampling_rate / 2, sampling_rate, mel_scale="slaney")
            self.register_buffer(f"window_{n_fft}", window / window.sum())
            self.register_buffer(f"filters_{n_fft}", torch.from_numpy(filters).float())

    @torch.no_grad()
    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Maps `(batch, samples)` to log magnitudes `(batch, frames, magnitudes)`."""
        num_frames = audio.shape[1] // self.hops[1]
        spectra = []
        for n_fft, hop in zip(N_FFTS, self.hops, strict=True):
            # The first window is centered in the middle of the first hop.
            padded = F.pad(audio, (n_fft // 2 - hop // 2, n_fft // 2 + hop))
            window, filters = getattr(self, f"window_{n_fft}"), getattr(self, f"filters_{n_fft}")
            magnitudes = torch.stft(padded, n_fft, hop, window=window, center=False, return_complex=True).abs()
            log_mel = (magnitudes.transpose(1, 2) @ filters + MAGNITUDE_FLOOR).log()
            spectra.append(log_mel[:, : num_frames * self.hops[1] // hop].reshape(len(audio), num_frames, -1))
        return torch.cat(spectra, dim=-1)


def load_labelled_data(arguments: LatentDataArguments, sampling_rate: int) -> datasets.Dataset:
    """
    Loads and decodes the utterances that have labels.

    Args:
        arguments ([`LatentDataArguments`]):
            What to load.
        sampling_rate (`int`):
            Sampling rate to decode to, in Hz.

    Returns:
        `datasets.Dataset`: with `samples` and `length`, see [`decode_utterances`], `phonemes` and `pitch`.

    Raises:
        `ValueError`: If a column is missing or no utterance has labels.
    """
    labels, dataset = load_source(arguments.labels), load_source(arguments.train_files)
    check_columns(labels, ["id", "phonemes", "pitch"], arguments.labels)
    check_columns(dataset, ["id", "audio"], arguments.train_files)
    row_of = {identifier: row for row, identifier in enumerate(labels["id"][:])}
    known = [index for index, identifier in enumerate(dataset["id"][:]) if identifier in row_of]
    if not known:
        raise ValueError(f"{arguments.labels} has no utterance of {arguments.train_files}")
    logger.info("%d of %d utterances have labels", len(known), len(dataset))
    dataset = dataset.select(known)
    labels = labels.select([row_of[identifier] for identifier in dataset["id"][:]])
    decoded = decode_utterances(dataset, "audio", sampling_rate, arguments.preprocessing_num_workers)
    return datasets.concatenate_datasets([decoded, labels.select_columns(["phonemes", "pitch"])], axis=1)


class LabelledSegments:
    """
    Random segments of labelled utterances, of random level; every second of audio is as likely as any other.

    Args:
        dataset (`datasets.Dataset`):
            From [`load_labelled_data`].
        codec_config ([`EncodecConfig`]):
            Says how long a latent is.
        num_frames (`int`):
            Latents of a segment.
    """

    def __init__(self, dataset: datasets.Dataset, codec_config: EncodecConfig, num_frames: int):
        self.audio = SpeechSegments(dataset, num_frames * codec_config.hop_length)
        labels = dataset.with_format("numpy")
        self.phonemes, self.pitch = labels["phonemes"][:], labels["pitch"][:]
        self.sampling_rate = codec_config.sampling_rate
        self.middles = (np.arange(num_frames) + 0.5) * codec_config.hop_length / self.sampling_rate

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            count (`int`): Number of segments.
            generator (`torch.Generator`): Draws them.

        Returns:
            `tuple`: samples `(count, samples)`; phonemes `(count, frames)`; pitch `(count, frames)`.
        """
        samples, rows, starts = self.audio.draw(count, generator)
        gains = 0.5 + 0.7 * torch.rand(count, 1, generator=generator)
        phonemes, pitch = [], []
        for row, start in zip(rows, starts, strict=True):
            indices = ((start / self.sampling_rate + self.middles) * LABEL_RATE).round().astype(int)
            phonemes.append(np.append(self.phonemes[row], 0)[indices.clip(max=len(self.phonemes[row]))])
            pitch.append(np.append(self.pitch[row], 0.0)[indices.clip(max=len(self.pitch[row]))])
        return (
            gains * samples[:, 0],
            torch.from_numpy(np.stack(phonemes)).long(),
            torch.tensor(np.stack(pitch)).float(),
        )


class LatentTrainer(BaseCodecTrainer):
    """
    Trains the encoder with readers of its latents; at the end makes the codebooks, by k-means, and exports the codec to
    `output_dir/export`, with the decoder it had.

    Args:
        codec ([`EncodecModel`]):
            From [`create_codec`]; it is trained in place.
        arguments ([`LatentTrainingArguments`]):
            How to train.
        train_dataset (`datasets.Dataset`):
            From [`load_labelled_data`].

    Raises:
        `ValueError`: If the codec's frames cannot be cut into equal parts, one for each short spectrum.
    """

    shown_losses = ("spectra", "phoneme_accuracy")

    def __init__(self, codec: EncodecModel, arguments: LatentTrainingArguments, train_dataset: datasets.Dataset):
        super().__init__(codec, arguments)
        config = codec.config
        if config.hop_length % SHORT_SPECTRA_PER_LATENT != 0:
            raise ValueError(
                f"Frames of {config.hop_length} samples cannot be cut into {SHORT_SPECTRA_PER_LATENT} equal parts"
            )
        num_frames = round(arguments.segment_seconds * config.sampling_rate / config.hop_length)
        self.segments = LabelledSegments(train_dataset, config, num_frames)
        num_phonemes = train_dataset.features["phonemes"].feature.num_classes
        self.readers = LatentReaders(config.hidden_size, num_phonemes).to(self.device)
        self.spectra = LogSpectra(config.sampling_rate, config.hop_length).to(self.device)
        parameters = [*codec.encoder.parameters(), *self.readers.parameters()]
        self.optimizer = self.create_optimizer(parameters, arguments.learning_rate)
        self.optimizers = {"optimizer": (self.optimizer, arguments.learning_rate)}
        self.state = {"readers": self.readers}

    def train(self) -> bool:
        is_finished = super().train()
        if is_finished:
            self.make_codebooks()
            self.export(self.output_dir / "export")
        return is_finished

    def train_step(self) -> dict[str, float]:
        """Draws a batch, updates encoder and readers and returns what to log."""
        arguments, judged = self.arguments, slice(NUM_UNJUDGED, None)
        batch = self.segments.draw(arguments.batch_size, self.generator)
        audio, phonemes, pitch = (tensor.to(self.device) for tensor in batch)
        learns = self.step >= arguments.reader_steps
        with torch.set_grad_enabled(learns), self.autocast():
            latents = self.codec.encoder(audio[:, None])
        latents = latents.float()
        std = arguments.latent_noise * torch.rand(len(audio), 1, 1, generator=self.generator)
        noise = std * torch.randn(latents.shape, generator=self.generator)
        spectra, phoneme_logits, voicing_logits, log_pitch = self.readers(latents + noise.to(self.device))
        is_voiced = pitch > 0
        pitch_distance = (log_pitch - pitch.clamp(min=1.0).log()).abs() / LOG_PITCH_RANGE * is_voiced
        losses = {
            "spectra": F.l1_loss(spectra[:, judged], self.spectra(audio)[:, judged]),
            "phonemes": F.cross_entropy(phoneme_logits[..., judged], phonemes[:, judged]),
            "pitch": pitch_distance[:, judged].sum() / is_voiced[:, judged].sum().clamp(min=1),
            "voicing": F.binary_cross_entropy_with_logits(voicing_logits[:, judged], is_voiced[:, judged].float()),
            "whitening": whitening_loss(latents[..., judged]),
        }
        weights = {
            "spectra": 1.0,
            "phonemes": arguments.phoneme_weight,
            "pitch": arguments.pitch_weight,
            "voicing": arguments.voicing_weight,
            "whitening": arguments.whitening_weight,
        }
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        self.update(self.optimizer)
        is_right = phoneme_logits.argmax(dim=1) == phonemes
        log = {name: loss.item() for name, loss in losses.items()}
        return log | {"phoneme_accuracy": is_right[:, judged].float().mean().item()}

    @torch.no_grad()
    def make_codebooks(self) -> None:
        """Fits the codebooks to the latents of some whole utterances."""
        audio, hop_length = self.segments.audio, self.codec.config.hop_length
        chosen = torch.randperm(len(audio), generator=self.generator)[: self.arguments.codebook_utterances]
        latents = []
        for index in tqdm(chosen.tolist(), desc="Encoding"):
            samples = audio[index]
            samples = F.pad(samples, (0, -len(samples) % hop_length)).to(self.device)
            latents.append(self.codec.encoder(samples[None, None])[0].T)
        frames_per_step = self.arguments.batch_size * len(self.segments.middles)
        initialize_codebooks(self.codec.quantizer, torch.cat(latents), frames_per_step, 12, self.generator)
