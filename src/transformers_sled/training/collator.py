"""Batches of text with speech, given as waveforms or as EnCodec codes, for the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..audio_sled import read_audio
from ..processing_sled import SledProcessor
from ..text_sled import encode_text


class SledDataCollator:
    """
    Makes training batches of text with speech, given as waveforms or as EnCodec codes.

    The text is padded on the tokenizer's `padding_side` (left for an offline model, right for an interleaved one), the
    speech on the right. With codes the codec does not run: the model looks their latents up.

    Args:
        processor ([`SledProcessor`]):
            The processor of the model that is trained.

    Example:

    ```python
    >>> from transformers import Trainer
    >>> from transformers_sled import SledDataCollator

    >>> trainer = Trainer(model, args, SledDataCollator(processor), train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    def __init__(self, processor: SledProcessor):
        self.processor = processor

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Collates a batch.

        Args:
            examples (sequence of `Mapping`):
                Each with `text` and either `audio_codes` of shape `(codebooks, frames)` or `audio`, as the processor
                takes a prompt, with its sampling rate.

        Returns:
            `dict` with `input_ids` and `attention_mask` of shape `(batch, tokens)`, `return_loss` (true), and either
            `audio_codes` of shape `(batch, codebooks, frames)` with `audio_codes_mask` of shape `(batch, frames)`, or
            `input_values` of shape `(batch, 1, samples)` with `padding_mask` of shape `(batch, samples)`.

        Raises:
            `ValueError`: If an example has no text or no speech, or its audio cannot be read; the message names it.
        """
        if not examples:
            raise ValueError("`examples` must not be empty")
        for example in examples:
            if not isinstance(example.get("text"), str) or not example["text"].strip():
                raise ValueError(f"{_name(example)} must have a `text` that is not empty, got {example.get('text')!r}")
        speech_key = "audio_codes" if examples[0].get("audio_codes") is not None else "audio"
        for example in examples:
            if example.get(speech_key) is None:
                raise ValueError(f"{_name(example)} must have `{speech_key}`, its keys are {sorted(example)}")
        if speech_key == "audio_codes":
            return {**self._collate_text(examples), **self._collate_codes(examples), "return_loss": True}
        return {**self._collate_audio(examples), "return_loss": True}

    def _collate_text(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        rows = [encode_text(tokenizer, example["text"]) for example in examples]
        return dict(tokenizer.pad({"input_ids": rows}, return_attention_mask=True, return_tensors="pt"))

    def _collate_codes(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.as_tensor(np.asarray(example["audio_codes"]), dtype=torch.long) for example in examples]
        for example, row in zip(examples, rows, strict=True):
            if row.ndim != 2 or row.shape[0] != rows[0].shape[0] or row.shape[1] == 0:
                raise ValueError(
                    f"`audio_codes` of {_name(example)} must be of shape ({rows[0].shape[0]}, frames), got "
                    f"{tuple(row.shape)}"
                )
        lengths = torch.tensor([row.shape[1] for row in rows])
        codes = torch.zeros(len(rows), rows[0].shape[0], int(lengths.max()), dtype=torch.long)
        for target, row in zip(codes, rows, strict=True):
            target[:, : row.shape[1]] = row
        return {"audio_codes": codes, "audio_codes_mask": (torch.arange(codes.shape[2]) < lengths[:, None]).long()}

    def _collate_audio(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sampling_rate = self.processor.sampling_rate
        waveforms = [
            read_audio(example["audio"], target_rate=sampling_rate, name=f"audio of {_name(example)}")
            for example in examples
        ]
        texts = [example["text"] for example in examples]
        return dict(self.processor(text=texts, audio=waveforms, sampling_rate=sampling_rate, return_tensors="pt"))


def _name(example: Mapping[str, Any]) -> str:
    return f"example {example['id']!r}" if example.get("id") is not None else "an example"
