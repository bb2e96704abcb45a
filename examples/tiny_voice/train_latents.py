"""
Trains the encoder and the codebooks of a small EnCodec on what its latents should tell, before its decoder is trained.

    python examples/tiny_voice/train_latents.py --config_name examples/tiny_voice/codec_config.json \
        --train_files "corpus/train-*.parquet" --labels labels.parquet --output_dir latents

A codec that learns from spectral losses alone leaves out the pitch and blurs what tells words apart, and a language model
on such latents gains next to nothing from its text. Here small networks, which are not part of the result, read spectra at
two resolutions, the phoneme and the pitch from every latent, through noise as strong as a language model's errors. The
latents are whitened as in train_codec.py, and the codebooks are made from them at the end, by k-means. The decoder then
learns to speak from these latents:

    python examples/train_codec.py --model_name_or_path latents/export --freeze_encoder ...

Run the same command again to go on from the latest checkpoint.
"""

import logging
import math
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import EncodecFeatureExtractor, EncodecModel, HfArgumentParser
from transformers.audio_utils import mel_filter_bank


sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from align_text import LABEL_RATE

from train_codec import AudioCache, ModelArguments, create_codec, initialize_codebooks, whitening_loss


logger = logging.getLogger(__name__)

# The two spectra: a short window, several times a latent, for sounds, and a long one, once, for pitch.
N_FFTS = (512, 2048)
NUM_MEL_BINS = (80, 128)
SHORT_SPECTRA_PER_LATENT = 4
MAGNITUDE_FLOOR = 3e-4
# Where a typical log magnitude and a typical logarithm of the pitch in Hz are, and how far the latter ranges.
MEAN_LOG_MAGNITUDE = -5.5
MEAN_LOG_PITCH, LOG_PITCH_RANGE = 5.0, 0.36
# Latents at the start of a segment that have heard too little to be judged.
NUM_UNJUDGED = 4


@dataclass
class Arguments:
    train_files: str = field(metadata={"help": "Parquet files (a glob pattern) with `id` and `audio`."})
    labels: str = field(metadata={"help": "Parquet file of label_speech.py for the same utterances."})
    output_dir: str = field(metadata={"help": "Folder of checkpoints, logs and the exported codec."})
    config_name: str | None = field(default=None, metadata={"help": "`EncodecConfig` of a new codec."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Codec to go on from instead."})
    max_steps: int = field(default=3_500, metadata={"help": "Number of updates."})
    batch_size: int = field(default=8, metadata={"help": "Segments in a batch."})
    segment_seconds: float = field(default=2.0, metadata={"help": "Length of the segments."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate; it falls along a cosine."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    reader_steps: int = field(
        default=0, metadata={"help": "First steps, in which only the readers learn, to go on from a trained codec."}
    )
    latent_noise: float = field(default=0.6, metadata={"help": "Largest standard deviation of the noise."})
    phoneme_weight: float = field(default=0.3, metadata={"help": "Weight of the cross entropy of the phonemes."})
    pitch_weight: float = field(default=0.3, metadata={"help": "Weight of the distance in pitch."})
    voicing_weight: float = field(default=0.2, metadata={"help": "Weight of the cross entropy of voicing."})
    whitening_weight: float = field(default=0.1, metadata={"help": "Weight of the whitening loss."})
    codebook_utterances: int = field(default=800, metadata={"help": "Utterances the codebooks are made from."})
    bf16: bool = field(default=False, metadata={"help": "Run the encoder in bfloat16."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    logging_steps: int = field(default=50, metadata={"help": "Steps between logged losses."})


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


class LabelledSegments:
    """
    Random segments of labelled utterances; every second of audio is as likely as any other.

    Args:
        audio (`AudioCache`): Utterances.
        phonemes (`list[np.ndarray]`): Phonemes of each, `LABEL_RATE` a second.
        pitch (`list[np.ndarray]`): Pitch of each in Hz, 0 where there is none.
        sampling_rate (`int`): Sampling rate, in Hz.
        hop_length (`int`): Samples of a latent.
        num_frames (`int`): Latents of a segment.
    """

    def __init__(
        self,
        audio: AudioCache,
        phonemes: list[np.ndarray],
        pitch: list[np.ndarray],
        sampling_rate: int,
        hop_length: int,
        num_frames: int,
    ):
        self.audio, self.phonemes, self.pitch = audio, phonemes, pitch
        self.hop_length = hop_length
        self.length = num_frames * hop_length
        self.middles = (torch.arange(num_frames).numpy() + 0.5) * hop_length / sampling_rate
        self.sampling_rate = sampling_rate

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            count (`int`): Number of segments.
            generator (`torch.Generator`): Draws them.

        Returns:
            `tuple`: samples `(count, samples)`; phonemes `(count, frames)`; pitch `(count, frames)`.
        """
        samples = torch.zeros(count, self.length)
        phonemes, pitch = [], []
        positions = torch.randint(int(self.audio.offsets[-1]), (count,), generator=generator).numpy()
        gains = 0.5 + 0.7 * torch.rand(count, generator=generator)
        for row, index in enumerate(np.searchsorted(self.audio.offsets, positions, side="right") - 1):
            utterance = self.audio[int(index)]
            latest = max(len(utterance) - self.length, 0)
            start = int(torch.randint(latest + 1, (), generator=generator))
            heard = utterance[start : start + self.length]
            samples[row, : len(heard)] = gains[row] * heard
            indices = ((start / self.sampling_rate + self.middles) * LABEL_RATE).round().astype(int)
            phonemes.append(np.append(self.phonemes[index], 0)[indices.clip(max=len(self.phonemes[index]))])
            pitch.append(np.append(self.pitch[index], 0.0)[indices.clip(max=len(self.pitch[index]))])
        return samples, torch.from_numpy(np.stack(phonemes)).long(), torch.from_numpy(np.stack(pitch)).float()


class LatentTrainer:
    """Everything that makes up the state of a training run."""

    def __init__(self, arguments: Arguments, num_phonemes: int):
        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        self.codec = create_codec(
            ModelArguments(config_name=arguments.config_name, model_name_or_path=arguments.model_name_or_path)
        )
        config = self.codec.config
        self.readers = LatentReaders(config.hidden_size, num_phonemes)
        self.spectra = LogSpectra(config.sampling_rate, config.hop_length)
        self.trained = [*self.codec.encoder.parameters(), *self.readers.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=arguments.learning_rate, betas=(0.8, 0.99), weight_decay=1e-4
        )
        self.generator = torch.Generator().manual_seed(arguments.seed)
        self.step = 0

    def learning_rate_factor(self) -> float:
        warmup = min(1.0, (self.step + 1) / max(1, self.arguments.warmup_steps))
        progress = min(1.0, self.step / self.arguments.max_steps)
        return warmup * (0.03 + 0.97 * 0.5 * (1.0 + math.cos(math.pi * progress)))

    def train_step(self, segments: LabelledSegments) -> dict[str, float]:
        """Draws a batch, updates encoder and readers, returns what to log."""
        arguments, judged = self.arguments, slice(NUM_UNJUDGED, None)
        for group in self.optimizer.param_groups:
            group["lr"] = arguments.learning_rate * self.learning_rate_factor()
        audio, phonemes, pitch = segments.draw(arguments.batch_size, self.generator)
        learns, bf16 = self.step >= arguments.reader_steps, arguments.bf16
        with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            latents = self.codec.encoder(audio[:, None])
        latents = latents.float()
        std = arguments.latent_noise * torch.rand(len(audio), 1, 1, generator=self.generator)
        noise = torch.randn(latents.shape, generator=self.generator)
        spectra, phoneme_logits, voicing_logits, log_pitch = self.readers(latents + std * noise)
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
        self.optimizer.zero_grad()
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.step += 1
        is_right = phoneme_logits.argmax(dim=1) == phonemes
        log = {name: loss.item() for name, loss in losses.items()}
        return log | {"phoneme_accuracy": is_right[:, judged].float().mean().item()}

    @torch.no_grad()
    def make_codebooks(self, audio: AudioCache) -> None:
        """Fits the codebooks to the latents of some whole utterances."""
        chosen = torch.randperm(len(audio), generator=self.generator)[: self.arguments.codebook_utterances]
        hop_length, latents = self.codec.config.hop_length, []
        for index in tqdm(chosen.tolist(), desc="Encoding"):
            samples = audio[index]
            samples = F.pad(samples, (0, -len(samples) % hop_length))
            latents.append(self.codec.encoder(samples[None, None])[0].T)
        frames_per_step = self.arguments.batch_size * round(
            self.arguments.segment_seconds * self.codec.config.sampling_rate / hop_length
        )
        initialize_codebooks(self.codec.quantizer, torch.cat(latents), frames_per_step, 12, self.generator)

    def save(self) -> None:
        """Writes a checkpoint, complete or not at all, in place of the one before."""
        checkpoint = self.output_dir / f"checkpoint-{self.step}"
        partial = Path(f"{checkpoint}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.codec.save_pretrained(partial)
        state = {
            "step": self.step,
            "readers": self.readers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        torch.save(state, partial / "training_state.pt")
        old = self.checkpoints()
        shutil.rmtree(checkpoint, ignore_errors=True)
        partial.rename(checkpoint)
        for step, folder in old:
            if step != self.step:
                shutil.rmtree(folder)

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
        state = torch.load(checkpoint / "training_state.pt", weights_only=True)
        self.readers.load_state_dict(state["readers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def export(self) -> None:
        """Writes the codec and its feature extractor."""
        config, folder = self.codec.config, self.output_dir / "export"
        self.codec.save_pretrained(folder)
        EncodecFeatureExtractor(
            feature_size=config.audio_channels, sampling_rate=config.sampling_rate
        ).save_pretrained(folder)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    table = datasets.load_dataset("parquet", data_files=arguments.labels, split="train")
    trainer = LatentTrainer(arguments, table.features["phonemes"].feature.num_classes)
    config = trainer.codec.config
    if config.hop_length % SHORT_SPECTRA_PER_LATENT != 0:
        sys.exit(f"Frames of {config.hop_length} samples cannot be cut into {SHORT_SPECTRA_PER_LATENT} equal parts")
    labels = {row["id"]: row for row in table.with_format("numpy")}
    dataset = datasets.load_dataset("parquet", data_files=arguments.train_files, split="train")
    known = [index for index, identifier in enumerate(dataset["id"][:]) if identifier in labels]
    if not known:
        sys.exit(f"{arguments.labels} has no utterance of {arguments.train_files}")
    logger.info("%d of %d utterances have labels", len(known), len(dataset))
    dataset = dataset.select(known)
    audio = AudioCache(trainer.output_dir / "audio", dataset, "audio", config.sampling_rate)
    rows = [labels[identifier] for identifier in dataset["id"][:]]
    segments = LabelledSegments(
        audio,
        [row["phonemes"] for row in rows],
        [row["pitch"] for row in rows],
        config.sampling_rate,
        config.hop_length,
        round(arguments.segment_seconds * config.sampling_rate / config.hop_length),
    )

    trainer.resume()
    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: interrupted.append(number))
    writer = SummaryWriter(trainer.output_dir / "logs", purge_step=trainer.step)
    progress = tqdm(total=arguments.max_steps, initial=trainer.step, unit="step", dynamic_ncols=True)
    sums: dict[str, list[float]] = {}
    started, started_step = time.perf_counter(), trainer.step
    while trainer.step < arguments.max_steps and not interrupted:
        for name, value in trainer.train_step(segments).items():
            sums.setdefault(name, []).append(value)
        progress.update()
        if trainer.step % arguments.logging_steps == 0:
            averages = {name: float(np.mean(values)) for name, values in sums.items()}
            seconds = (trainer.step - started_step) * arguments.batch_size * arguments.segment_seconds
            averages["audio_seconds_per_second"] = seconds / (time.perf_counter() - started)
            for name, value in averages.items():
                writer.add_scalar(f"train/{name}", value, trainer.step)
            progress.set_postfix({name: f"{averages[name]:.3f}" for name in ("spectra", "phoneme_accuracy")})
            sums.clear()
            started, started_step = time.perf_counter(), trainer.step
        if trainer.step % arguments.save_steps == 0 or interrupted:
            trainer.save()
    progress.close()
    writer.close()
    if not interrupted:
        trainer.save()
        trainer.make_codebooks(audio)
        trainer.export()
        logger.info("The codec, whose decoder is still to be trained: %s", trainer.output_dir / "export")


if __name__ == "__main__":
    main()
