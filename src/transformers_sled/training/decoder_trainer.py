"""
Training of a codec's decoder on the latents of another codec, whose shape it need not have: language models stay what they
are, since the latents do.

The decoder learns from mel spectra, from what the other codec's encoder hears in its speech, and later from discriminators,
which judge short cuts. Latents and discriminators take turns, each at every second step. What is exported is the moving
average of the weights.
"""

from dataclasses import dataclass, field

import datasets
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import EncodecModel

from .base_codec_trainer import BaseCodecTrainer, BaseCodecTrainingArguments, check_alike
from .codec_losses import (
    GradientBalancer,
    MelLoss,
    MultiScaleSTFTDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from .segments import NUM_UNJUDGED, LatentSegments


Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


@dataclass
class DecoderTrainingArguments(BaseCodecTrainingArguments):
    """How to train a decoder on given latents."""

    max_steps: int = field(default=60_000, metadata={"help": "Number of updates."})
    batch_size: int = field(default=6, metadata={"help": "Segments in a batch."})
    segment_seconds: float = field(default=1.07, metadata={"help": "Length of the random training segments."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    latent_noise: float = field(default=0.15, metadata={"help": "Largest standard deviation of the latents' noise."})
    average_decay: float = field(default=0.999, metadata={"help": "Decay of the moving average of the weights."})
    mel_n_ffts: list[int] = field(
        default_factory=lambda: [2048, 1024, 512, 256], metadata={"help": "Windows of the mel losses."}
    )
    mel_num_bins: list[int] = field(
        default_factory=lambda: [160, 100, 64, 32], metadata={"help": "Mel bins for each window."}
    )
    spectral_weight: float = field(default=2.0, metadata={"help": "Share of the mel losses in the balanced gradient."})
    magnitude_weight: float = field(
        default=9.0,
        metadata={"help": "Weight of mel magnitudes beside their logarithms, whose gradient is nine times as large."},
    )
    latent_weight: float = field(default=4.0, metadata={"help": "Share of the distance of latents, encoded again."})
    discriminator_start_step: int = field(default=3_000, metadata={"help": "First step with discriminators."})
    adversarial_start_step: int = field(
        default=3_300, metadata={"help": "First step at which the decoder listens to them."}
    )
    discriminator_n_ffts: list[int] = field(
        default_factory=lambda: [1024, 512], metadata={"help": "Window of each STFT discriminator, in samples."}
    )
    discriminator_filters: int = field(default=8, metadata={"help": "Channels of the STFT discriminators."})
    discriminator_seconds: float = field(default=0.3, metadata={"help": "Length of the cuts that they judge."})
    discriminator_learning_rate: float = field(default=1e-3, metadata={"help": "Their peak learning rate."})
    adversarial_weight: float = field(default=2.0, metadata={"help": "Share of the adversarial loss."})
    feature_weight: float = field(default=2.0, metadata={"help": "Share of the feature matching loss."})
    eval_steps: int = field(default=1_000, metadata={"help": "Steps between evaluations."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})


class DecoderTrainer(BaseCodecTrainer):
    """
    Trains a codec's decoder on the latents of another codec, and exports the codec with the average of its decoder and the
    other one's codebooks to `output_dir/export` with every checkpoint. Its encoder is for [`EncoderTrainer`] to teach.

    Args:
        codec ([`EncodecModel`]):
            From [`create_codec`]; its decoder is trained in place.
        source ([`EncodecModel`]):
            The codec whose latents are given.
        arguments ([`DecoderTrainingArguments`]):
            How to train.
        train_dataset (`datasets.Dataset`):
            What to train on, from [`encode_utterances`] with `source`.
        eval_dataset (`datasets.Dataset`, *optional*):
            What to evaluate on.

    Raises:
        `ValueError`: If the codecs differ in more than the shape of encoder and decoder, or segments are too short for the
        cuts that discriminators judge.

    Example:

    ```python
    >>> from transformers import EncodecModel
    >>> from transformers_sled.training import (
    ...     CodecModelArguments, DecoderTrainer, DecoderTrainingArguments, create_codec, decode_utterances,
    ...     encode_utterances, load_source,
    ... )

    >>> source = EncodecModel.from_pretrained("my_codec/")  # doctest: +SKIP
    >>> dataset = decode_utterances(load_source("my_corpus/"), "audio", source.config.sampling_rate)  # doctest: +SKIP
    >>> dataset = encode_utterances(dataset, source)  # doctest: +SKIP
    >>> codec = create_codec(CodecModelArguments(config_name="my_codec_config.json"))  # doctest: +SKIP
    >>> DecoderTrainer(codec, source, DecoderTrainingArguments("my_decoder/"), dataset).train()  # doctest: +SKIP
    True
    ```
    """

    shown_losses = ("mel", "magnitude", "latent")

    def __init__(
        self,
        codec: EncodecModel,
        source: EncodecModel,
        arguments: DecoderTrainingArguments,
        train_dataset: datasets.Dataset,
        eval_dataset: datasets.Dataset | None = None,
    ):
        check_alike(
            source, codec, ["sampling_rate", "hop_length", "hidden_size", "codebook_size", "target_bandwidths"]
        )
        super().__init__(codec, arguments)
        config = codec.config
        num_frames, self.num_cut_samples = (
            round(arguments.segment_seconds * config.sampling_rate / config.hop_length),
            round(arguments.discriminator_seconds * config.sampling_rate),
        )
        if (num_frames - NUM_UNJUDGED) * config.hop_length < max(self.num_cut_samples, *arguments.mel_n_ffts):
            raise ValueError(
                f"`segment_seconds` {arguments.segment_seconds} must be {NUM_UNJUDGED} frames longer than "
                f"`discriminator_seconds` {arguments.discriminator_seconds} and than the windows of the mel losses"
            )
        codec.quantizer.load_state_dict(source.quantizer.state_dict())
        self.source = source.to(self.device).eval().requires_grad_(False)
        self.average = AveragedModel(codec.decoder, multi_avg_fn=self.update_average)
        self.discriminator = MultiScaleSTFTDiscriminator(
            arguments.discriminator_n_ffts, arguments.discriminator_filters
        ).to(self.device)
        self.optimizer = self.create_optimizer(codec.decoder.parameters(), arguments.learning_rate)
        self.discriminator_optimizer = self.create_optimizer(
            self.discriminator.parameters(), arguments.discriminator_learning_rate
        )
        self.optimizers = {
            "optimizer": (self.optimizer, arguments.learning_rate),
            "discriminator_optimizer": (self.discriminator_optimizer, arguments.discriminator_learning_rate),
        }
        self.mel_loss = MelLoss(config.sampling_rate, arguments.mel_n_ffts, arguments.mel_num_bins).to(self.device)
        self.balancer = GradientBalancer()
        self.state = {"average": self.average, "discriminator": self.discriminator, "balancer": self.balancer}
        self.train_data = LatentSegments(train_dataset, config, num_frames)
        if eval_dataset is not None:
            self.eval_data = LatentSegments(eval_dataset, config, num_frames)

    def update_average(self, averaged: Tensors, current: Tensors, num_averaged: torch.Tensor | int) -> None:
        """One step of the moving average, which forgets faster at the start."""
        count = int(num_averaged)
        decay = min(self.arguments.average_decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(averaged, current, 1.0 - decay)

    @torch.no_grad()
    def quantize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(batch, hidden_size, frames)` as their codes give them, which is what language models learn."""
        return self.codec.quantizer.decode(self.codec.quantizer.encode(latents))

    def train_step(self) -> dict[str, float]:
        """Draws a batch, updates decoder and discriminators and returns what to log."""
        arguments = self.arguments
        drawn = self.train_data.draw(arguments.batch_size, self.generator)
        std = arguments.latent_noise * torch.rand(len(drawn[0]), 1, 1, generator=self.generator)
        noise = std * torch.randn(drawn[1].shape, generator=self.generator)
        audio, latents, is_judged = (tensor.to(self.device) for tensor in drawn)
        with self.autocast():
            decoded = self.codec.decoder(self.quantize(latents) + noise.to(self.device))
        is_judged = is_judged.repeat_interleave(self.codec.config.hop_length, dim=1)[:, None]
        decoded = torch.where(is_judged, decoded.float(), audio)

        # The losses see a leaf; its balanced gradient is then taken through the decoder in one backward pass.
        leaf = decoded.detach().requires_grad_()
        mel, magnitude = self.mel_loss(leaf, audio)
        log = {"mel": mel.item(), "magnitude": magnitude.item()}
        losses = {"spectral": mel + arguments.magnitude_weight * magnitude}
        if self.step % 2 == 0:
            # The encoder has not heard what came before a segment either.
            heard = self.source.encoder(leaf)[..., NUM_UNJUDGED:]
            losses["latent"] = F.mse_loss(heard, latents[..., NUM_UNJUDGED:])
        elif self.step >= arguments.discriminator_start_step:
            real_cuts, fake_cuts = self.cut(audio, leaf)
            log["discriminator"] = self.update_discriminators(real_cuts, fake_cuts.detach())
            if self.step >= arguments.adversarial_start_step:
                self.discriminator.requires_grad_(False)
                with self.autocast():
                    with torch.no_grad():
                        real = self.discriminator(real_cuts)
                    fake = self.discriminator(fake_cuts)
                self.discriminator.requires_grad_(True)
                losses["adversarial"], losses["feature"] = adversarial_loss(fake), feature_matching_loss(real, fake)
        weights = {name: getattr(arguments, f"{name}_weight") for name in losses}
        decoded.backward(self.balancer.gradient(losses, weights, leaf))
        log["gradient_norm"] = self.update(self.optimizer)
        self.average.update_parameters(self.codec.decoder)
        return log | {name: loss.item() for name, loss in losses.items()}

    def cut(self, audio: torch.Tensor, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same random cut of every row of both, `(batch, 1, samples)`, for the discriminators."""
        first, last = NUM_UNJUDGED * self.codec.config.hop_length, audio.shape[-1] - self.num_cut_samples
        starts = torch.randint(first, last + 1, (len(audio), 1, 1), generator=self.generator)
        indices = (starts + torch.arange(self.num_cut_samples)).to(self.device)
        return audio.gather(2, indices), decoded.gather(2, indices)

    def update_discriminators(self, real: torch.Tensor, fake: torch.Tensor) -> float:
        """One update, and the hinge loss before it."""
        with self.autocast():
            loss = discriminator_loss(self.discriminator(real), self.discriminator(fake))
        loss.backward()
        self.update(self.discriminator_optimizer)
        return loss.item()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """
        Measures the averaged decoder on whole utterances, from quantized latents, and writes that to `eval.json`.

        Returns:
            `dict`: `spectral_distance`, in nepers; `magnitude_distance`, relative to the mean; `latent_distance`, the mean
            square of what encoding the speech again changes in the latents.

        Raises:
            `ValueError`: If there is no `eval_dataset`.
        """
        if self.eval_data is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        distances = []
        for index in tqdm(range(len(self.eval_data)), desc="Evaluating", leave=False):
            audio, latents = (tensor[None].to(self.device) for tensor in self.eval_data[index])
            decoded = self.average.module(self.quantize(latents))
            latent_distance = F.mse_loss(self.source.encoder(decoded), latents)
            distances.append(torch.stack([*self.mel_loss(decoded, audio[None]), latent_distance]))
        names = ("spectral_distance", "magnitude_distance", "latent_distance")
        results = dict(zip(names, torch.stack(distances).mean(dim=0).tolist(), strict=True))
        self.write_json("eval.json", {"step": self.step, "num_samples": len(self.eval_data), **results})
        return results

    def save(self) -> None:
        super().save()
        average = {f"decoder.{name}": value for name, value in self.average.module.state_dict().items()}
        self.export(self.output_dir / "export", {**self.codec.state_dict(), **average})
