"""
Training of an EnCodec, following "High Fidelity Neural Audio Compression" (https://huggingface.co/papers/2210.13438), in
three phases that are switched by step: an autoencoder, the same with the quantizer, and last the discriminator.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import EncodecModel

from .base_codec_trainer import BaseCodecTrainer, BaseCodecTrainingArguments
from .codec_losses import (
    GradientBalancer,
    MelLoss,
    MultiScaleSTFTDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    whitening_loss,
)
from .codec_quantizer import initialize_codebooks, quantize
from .segments import SpeechSegments


@dataclass
class CodecTrainingArguments(BaseCodecTrainingArguments):
    """How to train a codec."""

    eval_only: bool = field(default=False, metadata={"help": "Evaluate `model_name_or_path` and write `eval.json`."})
    freeze_encoder: bool = field(
        default=False,
        metadata={"help": "Train the decoder alone, so that latents stay what a language model was trained on."},
    )
    quantizer_start_step: int = field(default=10_000, metadata={"help": "First step with the quantizer."})
    discriminator_start_step: int = field(
        default=50_000, metadata={"help": "First step of training the discriminator."}
    )
    adversarial_start_step: int = field(
        default=51_000, metadata={"help": "First step at which the codec listens to the discriminator."}
    )
    discriminator_n_ffts: list[int] = field(
        default_factory=lambda: [2048, 1024, 512], metadata={"help": "Window of each STFT discriminator, in samples."}
    )
    discriminator_filters: int = field(default=16, metadata={"help": "Channels of the STFT discriminators."})
    discriminator_learning_rate: float = field(default=3e-4, metadata={"help": "The discriminator's."})
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
    whitening_weight: float = field(
        default=0.1, metadata={"help": "Weight of the penalty for latents that are off zero mean and unit covariance."}
    )
    commitment_weight: float = field(default=0.25, metadata={"help": "Weight of the commitment loss."})
    latent_noise: float = field(
        default=0.1, metadata={"help": "Standard deviation of the noise on the decoder's input, for a smooth space."}
    )
    codebook_decay: float = field(default=0.99, metadata={"help": "Decay of the codebooks' moving averages."})
    dead_code_threshold: float = field(
        default=0.1, metadata={"help": "A code used less than this share of the average use is replaced."}
    )
    kmeans_vectors: int = field(default=20_000, metadata={"help": "Latents that the first codebooks are made from."})
    kmeans_iterations: int = field(default=10, metadata={"help": "Iterations of k-means on them."})
    eval_steps: int = field(default=2_000, metadata={"help": "Steps between evaluations."})

    def __post_init__(self) -> None:
        if self.latent_weight > 0.0 and not self.freeze_encoder:
            raise ValueError("`latent_weight` needs `freeze_encoder`, so that what is compared stays the same.")


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


class CodecTrainer(BaseCodecTrainer):
    """
    Trains a codec, or its decoder alone, and exports it to `output_dir/export` with every checkpoint.

    Args:
        codec ([`EncodecModel`]):
            From [`create_codec`]; it is trained in place.
        arguments ([`CodecTrainingArguments`]):
            How to train.
        train_dataset (`datasets.Dataset`, *optional*):
            What to train on, from [`decode_utterances`].
        eval_dataset (`datasets.Dataset`, *optional*):
            What to evaluate on.

    Raises:
        `ValueError`: If the encoder is to be frozen, but its codebooks have not been trained.

    Example:

    ```python
    >>> from transformers import EncodecModel
    >>> from transformers_sled.training import CodecTrainer, CodecTrainingArguments, decode_utterances, load_source

    >>> codec = EncodecModel.from_pretrained("my_codec/")  # doctest: +SKIP
    >>> dataset = decode_utterances(load_source("my_corpus/"), "audio", codec.config.sampling_rate)  # doctest: +SKIP
    >>> CodecTrainer(codec, CodecTrainingArguments("my_better_codec/"), dataset).train()  # doctest: +SKIP
    True
    ```
    """

    shown_losses = ("mel",)

    def __init__(
        self,
        codec: EncodecModel,
        arguments: CodecTrainingArguments,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
    ):
        super().__init__(codec, arguments)
        if arguments.freeze_encoder:
            if not self.quantized:
                raise ValueError("`freeze_encoder` needs `model_name_or_path` to be a codec with trained codebooks.")
            codec.encoder.requires_grad_(False)
        self.discriminator = MultiScaleSTFTDiscriminator(
            arguments.discriminator_n_ffts, arguments.discriminator_filters
        ).to(self.device)
        trained = [parameter for parameter in codec.parameters() if parameter.requires_grad]
        self.optimizer = self.create_optimizer(trained, arguments.learning_rate)
        self.discriminator_optimizer = self.create_optimizer(
            self.discriminator.parameters(), arguments.discriminator_learning_rate
        )
        self.optimizers = {
            "optimizer": (self.optimizer, arguments.learning_rate),
            "discriminator_optimizer": (self.discriminator_optimizer, arguments.discriminator_learning_rate),
        }
        self.mel_loss = MelLoss(codec.config.sampling_rate, arguments.mel_n_ffts, arguments.mel_num_bins)
        self.mel_loss.to(self.device)
        self.balancer = GradientBalancer()
        self.state = {"discriminator": self.discriminator, "balancer": self.balancer}
        num_samples = round(arguments.segment_seconds * codec.config.sampling_rate)
        self.train_data, self.eval_data = (
            SpeechSegments(dataset, num_samples) if dataset is not None else None
            for dataset in (train_dataset, eval_dataset)
        )

    @property
    def quantized(self) -> bool:
        """Whether there are codebooks, from training so far or from the codec it started with."""
        return bool(self.codec.quantizer.layers[0].codebook.embed.any())

    def draw_audio(self) -> torch.Tensor:
        if self.train_data is None:
            raise ValueError("Training needs a `train_dataset`.")
        return self.train_data.draw(self.arguments.batch_size, self.generator)[0].to(self.device)

    def start_quantizer(self) -> None:
        """Makes the first codebooks from the latents of training data."""
        arguments = self.arguments
        num_samples = round(arguments.segment_seconds * self.codec.config.sampling_rate)
        frames = arguments.batch_size * math.ceil(num_samples / self.codec.config.hop_length)
        with torch.no_grad(), self.autocast():
            latents = [
                self.codec.encoder(self.draw_audio()).float().transpose(1, 2).flatten(0, 1)
                for _ in range(math.ceil(arguments.kmeans_vectors / frames))
            ]
        initialize_codebooks(
            self.codec.quantizer, torch.cat(latents), frames, arguments.kmeans_iterations, self.generator
        )

    def train_step(self) -> dict[str, float]:
        """Draws a batch, updates codec and discriminator and returns what to log."""
        arguments = self.arguments
        if self.step >= arguments.quantizer_start_step and not self.quantized:
            self.start_quantizer()
        audio = self.draw_audio()
        log: dict[str, float] = {}
        with self.autocast():
            latents = self.codec.encoder(audio)
        latents = latents.float()
        # Losses that reach the encoder without passing the decoder; none where it is frozen.
        regularization = []
        encoder_output = latents
        if arguments.freeze_encoder:
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
        losses = self.compute_losses(leaf, audio, encoder_output)
        weights = {name: getattr(arguments, f"{name}_weight") for name in losses}
        gradient = self.balancer.gradient(losses, weights, leaf)
        torch.autograd.backward([decoded, *regularization], [gradient] + [None] * len(regularization))
        log["gradient_norm"] = self.update(self.optimizer)
        log |= {name: loss.item() for name, loss in losses.items()}

        is_due = float(torch.rand((), generator=self.generator)) < arguments.discriminator_update_probability
        if self.step >= arguments.discriminator_start_step and is_due:
            with self.autocast():
                loss = discriminator_loss(self.discriminator(audio), self.discriminator(decoded.detach()))
            loss.backward()
            self.update(self.discriminator_optimizer)
            log["discriminator"] = loss.item()
        return log

    def compute_losses(
        self, decoded: torch.Tensor, audio: torch.Tensor, encoder_output: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What is to be balanced, each under the name of its weight."""
        arguments = self.arguments
        mel, magnitude = self.mel_loss(decoded, audio)
        losses = {"mel": mel}
        if arguments.magnitude_weight > 0.0:
            losses["magnitude"] = magnitude
        if arguments.waveform_weight > 0.0:
            losses["waveform"] = F.l1_loss(decoded, audio)
        if arguments.latent_weight > 0.0:
            with self.autocast():
                losses["latent"] = F.mse_loss(self.codec.encoder(decoded).float(), encoder_output)
        if self.step >= arguments.adversarial_start_step:
            self.discriminator.requires_grad_(False)
            with self.autocast():
                with torch.no_grad():
                    real = self.discriminator(audio)
                fake = self.discriminator(decoded)
            losses["adversarial"] = adversarial_loss(fake)
            losses["feature"] = feature_matching_loss(real, fake)
            self.discriminator.requires_grad_(True)
        return losses

    def save(self) -> None:
        super().save()
        self.export(self.output_dir / "export")

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """
        Measures the codec on whole utterances, and writes that to `eval.json`.

        Returns:
            `dict`: `step` and `num_samples`; `spectral_distance`, in nepers; `latent_distance`, the mean square of what
            encoding the resynthesis again changes in the latents; `latent_mean` and `latent_std`, a value per dimension.

        Raises:
            `ValueError`: If there is no `eval_dataset`.
        """
        if self.eval_data is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        self.codec.eval()
        distances, latent_distances, latents = [], [], []
        for index in tqdm(range(len(self.eval_data)), desc="Evaluating", leave=False):
            audio = self.eval_data[index].to(self.device)
            resynthesis, frames = resynthesize(self.codec, audio, self.quantized)
            distances.append(float(self.mel_loss(resynthesis[None, None], audio[None, None])[0]))
            again, original = (self.codec.encoder(samples[None, None]) for samples in (resynthesis, audio))
            latent_distances.append(float(F.mse_loss(again, original)))
            latents.append(frames.cpu())
        self.codec.train()
        all_latents = torch.cat(latents)
        results = {
            "step": self.step,
            "num_samples": len(self.eval_data),
            "spectral_distance": sum(distances) / len(distances),
            "latent_distance": sum(latent_distances) / len(latent_distances),
            "latent_mean": all_latents.mean(dim=0).tolist(),
            "latent_std": all_latents.std(dim=0).tolist(),
        }
        self.write_json("eval.json", results)
        return results
