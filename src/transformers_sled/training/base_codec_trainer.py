"""What all training of a codec shares: the codec, and the loop with its logs and checkpoints."""

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import EncodecConfig, EncodecFeatureExtractor, EncodecModel
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecConvTranspose1d

from ..codec_sled import check_codec_config


logger = logging.getLogger(__name__)


@dataclass
class CodecModelArguments:
    """The codec."""

    config_name: str | None = field(
        default=None, metadata={"help": "`EncodecConfig` of a new codec: a JSON file, a folder or a Hub repository."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Codec to go on from, in place of a new one."}
    )


def create_codec(arguments: CodecModelArguments) -> EncodecModel:
    """
    Loads the codec or makes a new one, with zero biases: the default ones hold it at silence for long.

    Args:
        arguments ([`CodecModelArguments`]):
            Which codec.

    Returns:
        [`EncodecModel`]: the codec.

    Raises:
        `ValueError`: If it is not one of the two, or the new one cannot be trained here.
    """
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
    check_codec_config(config)
    codec = EncodecModel(config)
    for name, parameter in codec.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    return codec


def check_alike(codec: EncodecModel, other: EncodecModel, names: Sequence[str]) -> None:
    """
    Refuses two codecs of which one cannot take the other's place.

    Args:
        codec, other ([`EncodecModel`]):
            The codecs.
        names (sequence of `str`):
            What their configurations must have in common.

    Raises:
        `ValueError`: If they differ in one of these.
    """
    for name in names:
        if getattr(codec.config, name) != getattr(other.config, name):
            raise ValueError(
                f"`{name}` is {getattr(codec.config, name)} in the old codec and {getattr(other.config, name)} in the new."
            )


class Float32Conv1d(EncodecConv1d):
    """The convolution in float32, under autocast, too."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states.float()).to(hidden_states.dtype)


class Float32ConvTranspose1d(EncodecConvTranspose1d):
    """The transposed convolution in float32, under autocast, too."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states.float()).to(hidden_states.dtype)


def keep_narrow_layers_in_float32(codec: EncodecModel) -> None:
    """
    Keeps resampling from or to fewer than 32 channels in float32. On a CPU with AMX, oneDNN 3.12 (that of torch 2.13) gets
    strided convolutions of so few channels wrong in bfloat16: those of the encoder, and the gradients of the decoder's.

    Args:
        codec ([`EncodecModel`]): Changed in place; its weights and their names stay what they are.
    """
    for module in codec.modules():
        if isinstance(module, EncodecConv1d) and module.conv.stride[0] > 1 and module.conv.in_channels < 32:
            module.__class__ = Float32Conv1d
        elif isinstance(module, EncodecConvTranspose1d) and module.conv.out_channels < 32:
            module.__class__ = Float32ConvTranspose1d


@dataclass
class BaseCodecTrainingArguments:
    """How to train any part of a codec."""

    output_dir: str = field(metadata={"help": "Folder of checkpoints, logs and the exported codec."})
    max_steps: int = field(default=100_000, metadata={"help": "Number of updates."})
    batch_size: int = field(default=8, metadata={"help": "Segments in a batch."})
    segment_seconds: float = field(default=1.0, metadata={"help": "Length of the random training segments."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: int = field(default=500, metadata={"help": "Steps of linear warm-up."})
    final_learning_rate_ratio: float = field(
        default=0.05, metadata={"help": "Learning rate at `max_steps`, relative to the peak; the decay is a cosine."}
    )
    adam_beta1: float = field(default=0.8, metadata={"help": "First beta of AdamW."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    bf16: bool = field(default=False, metadata={"help": "Run convolutions and LSTM in bfloat16."})
    device: str = field(default="cpu", metadata={"help": "Device to train on."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    logging_steps: int = field(default=50, metadata={"help": "Steps between logged losses."})
    save_steps: int = field(default=1_000, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})


class BaseCodecTrainer:
    """
    Trains a codec step by step, goes on from the latest checkpoint in `output_dir`, and saves one before it stops at an
    interruption. A subclass puts what it updates into `self.optimizers` and what else a checkpoint must hold into
    `self.state`, and defines `train_step`. With `self.eval_data` it defines `evaluate`, too.

    Args:
        codec ([`EncodecModel`]):
            The codec, which is trained in place.
        arguments ([`BaseCodecTrainingArguments`]):
            How to train.
    """

    # Averages that the progress bar shows.
    shown_losses: tuple[str, ...] = ()

    def __init__(self, codec: EncodecModel, arguments: BaseCodecTrainingArguments):
        self.arguments: Any = arguments
        self.device = torch.device(arguments.device)
        self.output_dir = Path(arguments.output_dir)
        self.codec = codec.to(self.device).train()
        if arguments.bf16 and self.device.type == "cpu":
            keep_narrow_layers_in_float32(codec)
        self.generator = torch.Generator().manual_seed(arguments.seed)
        self.step = 0
        # With their peak learning rates.
        self.optimizers: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        # Modules and the like, by name: all that have `state_dict` and `load_state_dict`.
        self.state: dict[str, Any] = {}
        self.eval_data: Any = None

    def create_optimizer(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        """AdamW as the arguments have it."""
        betas = (self.arguments.adam_beta1, self.arguments.adam_beta2)
        return torch.optim.AdamW(
            parameters, lr=learning_rate, betas=betas, weight_decay=self.arguments.weight_decay, fused=True
        )

    def update(self, optimizer: torch.optim.Optimizer) -> float:
        """Clips the gradients, takes a step of the optimizer, zeroes the gradients and returns their norm before."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bf16)

    def learning_rate_factor(self) -> float:
        """Linear warm-up, then a cosine."""
        warmup = min(1.0, (self.step + 1) / max(1, self.arguments.warmup_steps))
        final = self.arguments.final_learning_rate_ratio
        progress = min(1.0, self.step / self.arguments.max_steps)
        return warmup * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    def train_step(self) -> dict[str, float]:
        """Draws a batch, updates what is trained and returns what to log."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, Any]:
        """Measures the codec on `eval_data` and writes that to `eval.json`."""
        raise NotImplementedError

    def advance(self) -> dict[str, float]:
        """One step at its learning rate."""
        factor = self.learning_rate_factor()
        for optimizer, learning_rate in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
        log = self.train_step()
        self.step += 1
        return {"learning_rate": self.arguments.learning_rate * factor, **log}

    def train(self) -> bool:
        """
        Trains from the latest checkpoint, if there is one, to the last step.

        Returns:
            `bool`: Whether it got there; false if SIGINT or SIGTERM ended it after a step.
        """
        self.resume()
        arguments = self.arguments
        interruptions: list[int] = []
        handlers = {
            number: signal.signal(number, lambda number, frame: interruptions.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        writer = SummaryWriter(self.output_dir / "logs", purge_step=self.step)
        progress = tqdm(total=arguments.max_steps, initial=self.step, unit="step", dynamic_ncols=True)
        logs: list[dict[str, float]] = []
        started = time.perf_counter()
        try:
            while self.step < arguments.max_steps and not interruptions:
                logs.append(self.advance())
                progress.update()
                if self.step % arguments.logging_steps == 0:
                    names = {name for log in logs for name in log}
                    averages = {name: float(np.mean([log[name] for log in logs if name in log])) for name in names}
                    seconds = len(logs) * arguments.batch_size * arguments.segment_seconds
                    averages["audio_seconds_per_second"] = seconds / (time.perf_counter() - started)
                    for name, value in averages.items():
                        writer.add_scalar(f"train/{name}", value, self.step)
                    progress.set_postfix({name: f"{averages[name]:.3f}" for name in self.shown_losses})
                    logs, started = [], time.perf_counter()
                if self.eval_data and (self.step % arguments.eval_steps == 0 or self.step == arguments.max_steps):
                    results = {name: value for name, value in self.evaluate().items() if isinstance(value, float)}
                    for name, value in results.items():
                        writer.add_scalar(f"eval/{name}", value, self.step)
                    logger.info("step %d: %s", self.step, results)
                if self.step % arguments.save_steps == 0 or self.step == arguments.max_steps or interruptions:
                    self.save()
        finally:
            progress.close()
            writer.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.step >= arguments.max_steps

    def save(self) -> None:
        """Writes a checkpoint, complete or not at all, which is a codec with the state of its training."""
        checkpoint = self.output_dir / f"checkpoint-{self.step}"
        partial = Path(f"{checkpoint}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.export(partial)
        state = {
            "step": self.step,
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "objects": {name: value.state_dict() for name, value in self.get_stateful().items()},
        }
        if self.device.type != "cpu":
            state["device_rng"] = torch.get_device_module(self.device).get_rng_state(self.device)
        torch.save(state, partial / "training_state.pt")
        shutil.rmtree(checkpoint, ignore_errors=True)
        partial.rename(checkpoint)
        for old in self.get_checkpoints()[: -self.arguments.save_total_limit]:
            shutil.rmtree(old)

    def resume(self) -> None:
        """Goes on from the latest checkpoint, if there is one."""
        if not self.get_checkpoints():
            return
        checkpoint = self.get_checkpoints()[-1]
        logger.info("Resuming from %s", checkpoint)
        self.codec.load_state_dict(EncodecModel.from_pretrained(checkpoint).state_dict())
        state = torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)
        for name, value in self.get_stateful().items():
            value.load_state_dict(state["objects"][name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(state["device_rng"], self.device)
        self.step = state["step"]

    def get_stateful(self) -> dict[str, Any]:
        return {**self.state, **{name: optimizer for name, (optimizer, _) in self.optimizers.items()}}

    def get_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        folders = [path for path in self.output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
        return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))

    def export(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the codec, or other weights for it, and its feature extractor, each file complete or not at all."""
        partial = Path(f"{folder}.writing")
        config = self.codec.config
        self.codec.save_pretrained(partial, state_dict=weights)
        EncodecFeatureExtractor(
            feature_size=config.audio_channels, sampling_rate=config.sampling_rate
        ).save_pretrained(partial)
        folder.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / name).write_text(json.dumps(content, indent=2) + "\n")
