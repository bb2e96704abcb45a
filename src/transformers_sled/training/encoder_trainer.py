"""
Training of a codec's encoder on the latents of another codec.

A decoder of another shape (see decoder_trainer.py) comes with an encoder of that shape, which has learned nothing. Regression
on the latents of the first codec makes it stand in for that one's encoder: voices can then be cloned, and codes be made, with
the new codec alone. Decoder and codebooks stay what they are.
"""

from copy import deepcopy
from dataclasses import dataclass, field

import datasets
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import EncodecModel

from .base_codec_trainer import BaseCodecTrainer, BaseCodecTrainingArguments, check_alike
from .segments import LatentSegments


@dataclass
class EncoderTrainingArguments(BaseCodecTrainingArguments):
    """How to train an encoder on given latents."""

    max_steps: int = field(default=10_000, metadata={"help": "Number of updates."})
    batch_size: int = field(default=6, metadata={"help": "Segments in a batch."})
    segment_seconds: float = field(default=1.6, metadata={"help": "Length of the random training segments."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    final_learning_rate_ratio: float = field(
        default=0.02, metadata={"help": "Learning rate at `max_steps`, relative to the peak; the decay is a cosine."}
    )
    eval_steps: int = field(default=1_000, metadata={"help": "Steps between evaluations."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})


class EncoderTrainer(BaseCodecTrainer):
    """
    Trains a codec's encoder on the latents of another codec, and exports the codec to `output_dir/export` at the end. A
    run that goes on from a checkpoint keeps the decoder and the codebooks that it is given.

    Args:
        codec ([`EncodecModel`]):
            The codec, from [`DecoderTrainer`]; its encoder is trained in place.
        source ([`EncodecModel`]):
            The codec whose latents are given.
        arguments ([`EncoderTrainingArguments`]):
            How to train.
        train_dataset (`datasets.Dataset`):
            What to train on, from [`encode_utterances`] with `source`.
        eval_dataset (`datasets.Dataset`, *optional*):
            What to evaluate on.

    Raises:
        `ValueError`: If the latents of the codecs differ in rate or size.

    Example:

    ```python
    >>> from transformers import EncodecModel
    >>> from transformers_sled.training import (
    ...     EncoderTrainer, EncoderTrainingArguments, decode_utterances, encode_utterances, load_source
    ... )

    >>> source = EncodecModel.from_pretrained("my_codec/")  # doctest: +SKIP
    >>> dataset = decode_utterances(load_source("my_corpus/"), "audio", source.config.sampling_rate)  # doctest: +SKIP
    >>> dataset = encode_utterances(dataset, source)  # doctest: +SKIP
    >>> codec = EncodecModel.from_pretrained("my_decoder/export")  # doctest: +SKIP
    >>> EncoderTrainer(codec, source, EncoderTrainingArguments("my_new_codec/"), dataset).train()  # doctest: +SKIP
    True
    ```
    """

    shown_losses = ("loss",)

    def __init__(
        self,
        codec: EncodecModel,
        source: EncodecModel,
        arguments: EncoderTrainingArguments,
        train_dataset: datasets.Dataset,
        eval_dataset: datasets.Dataset | None = None,
    ):
        check_alike(source, codec, ["sampling_rate", "hop_length", "hidden_size"])
        super().__init__(codec, arguments)
        config = codec.config
        num_frames = round(arguments.segment_seconds * config.sampling_rate / config.hop_length)
        self.optimizer = self.create_optimizer(codec.encoder.parameters(), arguments.learning_rate)
        self.optimizers = {"optimizer": (self.optimizer, arguments.learning_rate)}
        self.train_data = LatentSegments(train_dataset, config, num_frames)
        if eval_dataset is not None:
            self.eval_data = LatentSegments(eval_dataset, config, num_frames)

    def train(self) -> bool:
        is_finished = super().train()
        if is_finished:
            self.export(self.output_dir / "export")
        return is_finished

    def resume(self) -> None:
        given = {name: deepcopy(getattr(self.codec, name).state_dict()) for name in ("decoder", "quantizer")}
        super().resume()
        for name, weights in given.items():
            getattr(self.codec, name).load_state_dict(weights)

    def train_step(self) -> dict[str, float]:
        """Draws a batch, updates the encoder and returns what to log."""
        batch = self.train_data.draw(self.arguments.batch_size, self.generator)
        audio, latents, is_judged = (tensor.to(self.device) for tensor in batch)
        with self.autocast():
            encoded = self.codec.encoder(audio)
        loss = (encoded.float() - latents).square().mean(dim=1)[is_judged].mean()
        loss.backward()
        return {"loss": loss.item(), "gradient_norm": self.update(self.optimizer)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """
        Compares the encoder with the latents of whole utterances, and writes that to `eval.json`.

        Returns:
            `dict`: `latent_distance`, the mean square of the difference; `quantization_distance`, that of quantizing the
            latents, to compare with; `decoded_distance`, that of quantizing what the encoder makes.

        Raises:
            `ValueError`: If there is no `eval_dataset`.
        """
        if self.eval_data is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        quantizer, distances = self.codec.quantizer, []
        for index in tqdm(range(len(self.eval_data)), desc="Evaluating", leave=False):
            audio, latents = (tensor[None].to(self.device) for tensor in self.eval_data[index])
            encoded = self.codec.encoder(audio[None])
            quantized, decoded = (quantizer.decode(quantizer.encode(values)) for values in (latents, encoded))
            distances.append(torch.stack([F.mse_loss(values, latents) for values in (encoded, quantized, decoded)]))
        names = ("latent_distance", "quantization_distance", "decoded_distance")
        results = dict(zip(names, torch.stack(distances).mean(dim=0).tolist(), strict=True))
        self.write_json("eval.json", {"step": self.step, "num_samples": len(self.eval_data), **results})
        return results
