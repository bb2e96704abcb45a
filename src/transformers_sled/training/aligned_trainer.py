"""
Training with known alignments of text and speech, for corpora too small to find them by themselves.

The first attention heads of some layers learn to look at the token that the next frame belongs to and at those after
it, one token further with each head (the attention loss of arXiv 2406.17957, with alignments from align_text.py in
place of its sum over all monotonic ones): the sound of an English vowel depends on the letters that follow. In one of
the layers those heads are also set to the true alignment, in a share of the utterances that falls to zero, so that
what is learned from the text need not wait for them. The noise on the latents that the decoder reads starts strong and
falls to the configuration's `latent_noise_std`, so that the speech before cannot stand in for the text. Where the
alignments come with phonemes, a linear layer on what the generative head reads, which is not part of the result,
learns which of them the next frame belongs to: most of a frame follows from the one before, so that the energy loss
alone says little about the text.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from ..interleaving_sled import get_positions
from ..modeling_sled import SledForSpeechSynthesis
from ..processing_sled import SledProcessor
from .collator import SledDataCollator
from .sources import check_columns, load_source
from .trainer import SledTrainer


logger = logging.getLogger(__name__)


@dataclass
class AlignmentArguments:
    """Which heads learn alignments, and how."""

    alignments: str = field(metadata={"help": "Parquet file from align_text.py."})
    aligned_layers: list[int] = field(
        default_factory=lambda: [2, 3], metadata={"help": "Layers with aligned heads, the last of them forced."}
    )
    aligned_heads: list[int] = field(
        default_factory=lambda: [2, 4], metadata={"help": "Number of aligned heads in each of these layers."}
    )
    alignment_weight: float = field(default=0.2, metadata={"help": "Weight of the attention loss."})
    alignment_steps: int = field(
        default=3000, metadata={"help": "Steps in which the forced share and the additional noise fall to zero."}
    )
    forced_share: float = field(default=0.9, metadata={"help": "Share of utterances that are forced at first."})
    first_latent_noise_std: float = field(default=3.5, metadata={"help": "Strength of the noise at first."})
    phoneme_weight: float = field(
        default=1.0, metadata={"help": "Weight of the phoneme loss, where `alignments` has phonemes."}
    )
    both_layouts: bool = field(
        default=False,
        metadata={"help": "Every second step is offline, so that an interleaved model learns to speak offline, too."},
    )


@dataclass
class Alignment:
    """
    Where the aligned heads of one layer should look, and, after its forward, the probability they gave to it.

    Args:
        is_asked (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            The positions that predict a frame of an utterance with an alignment.
        keys (`torch.LongTensor` of shape `(batch_size, num_heads, sequence_length)`):
            Position of the token to look at, wherever `is_asked`.
        is_forced (`torch.BoolTensor` of shape `(batch_size,)`):
            The rows whose heads look there, whatever they would do.
        is_visible (`torch.BoolTensor` of shape `(batch_size, num_heads, sequence_length)`, *optional*):
            Where a head is asked and the token can be seen, which it cannot in rows whose text was dropped, nor before an
            interleaved model has read it.
        probabilities (`torch.FloatTensor` of shape `(batch_size, num_heads, sequence_length)`, *optional*):
            The probability.
    """

    is_asked: torch.Tensor
    keys: torch.Tensor
    is_forced: torch.Tensor
    is_visible: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None

    def get_visible_probabilities(self) -> torch.Tensor:
        """The probabilities that can be learned from, `(count,)`, after the layer's forward."""
        assert self.probabilities is not None and self.is_visible is not None
        return self.probabilities[self.is_visible]


def aligned_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention that keeps what the aligned heads of a layer look at, and turns it where that is asked for. Layers without such
    heads have torch's own, which is faster.
    """
    alignment: Alignment | None = getattr(module, "alignment", None)
    if alignment is None or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    repeats = module.num_key_value_groups
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(dim=-1, dtype=torch.float32)
    keys = alignment.keys[..., None]
    num_heads = keys.shape[1]
    aligned, others = weights[:, :num_heads], weights[:, num_heads:]
    visible = attention_mask.expand(-1, num_heads, -1, -1).gather(3, keys)[..., 0] == 0
    # Where text was dropped its last token stays, which must not stand in for those after a hidden one.
    alignment.is_visible = visible & visible[:, :1] & alignment.is_asked[:, None]
    alignment.probabilities = aligned.gather(3, keys)[..., 0]
    is_turned = (alignment.is_visible & alignment.is_forced[:, None, None])[..., None]
    forced = torch.zeros_like(aligned).scatter(3, keys, 1.0)
    weights = torch.cat([torch.where(is_turned, forced, aligned), others], dim=1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("aligned", aligned_attention)
AttentionMaskInterface.register("aligned", eager_mask)


class AlignedCollator(SledDataCollator):
    """
    The collator, with `alignment` and `phonemes`, both of shape `(batch, frames)`: a token's index for every frame and
    the class of its phoneme, -1 where not known.

    Args:
        processor ([`SledProcessor`]):
            The processor of the model that is trained.
        alignments (`Mapping[str, list[int]]`):
            Index of the token of every frame, by the utterance's `id`.
        phonemes (`Mapping[str, list[int]]`):
            Class of the phoneme of every frame, by the utterance's `id`.
    """

    def __init__(
        self, processor: SledProcessor, alignments: Mapping[str, list[int]], phonemes: Mapping[str, list[int]]
    ):
        super().__init__(processor)
        self.alignments = alignments
        self.phonemes = phonemes

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        for name, known in (("alignment", self.alignments), ("phonemes", self.phonemes)):
            batch[name] = torch.full_like(batch["audio_codes_mask"], -1)
            for row, example in zip(batch[name], examples, strict=True):
                values = known.get(example["id"], [])
                row[: len(values)] = torch.tensor(values)
        num_tokens, num_frames = (batch[name].sum(dim=1) for name in ("attention_mask", "audio_codes_mask"))
        for row, example in enumerate(examples):
            alignment = self.alignments.get(example["id"])
            if alignment is not None and (len(alignment), alignment[-1]) != (num_frames[row], num_tokens[row] - 1):
                raise ValueError(f"The alignment of {example['id']} is of other codes or another tokenizer")
        return batch


class AlignedTrainer(SledTrainer):
    """
    The trainer, with the attention loss of some heads and attention that is forced at first.

    Args:
        args, kwargs:
            As for [`SledTrainer`], without a collator. The training data needs `id` and `audio_codes`.
        alignment_args ([`AlignmentArguments`]):
            Which heads learn alignments, and how.

    Raises:
        `ValueError`: If the model has no such layers or heads or not both layouts, or the data no codes or no alignments.
    """

    def __init__(self, *args: Any, alignment_args: AlignmentArguments, **kwargs: Any):
        table = load_source(alignment_args.alignments)
        check_columns(table, ["id", "alignment"], alignment_args.alignments)
        columns = {
            name: dict(zip(table["id"][:], table[name][:], strict=True)) if name in table.column_names else {}
            for name in ("alignment", "phonemes")
        }
        collator = AlignedCollator(kwargs["processing_class"], *columns.values())
        super().__init__(*args, data_collator=collator, **kwargs)
        model = self.get_plain_model()
        config = model.config
        if self.args.gradient_checkpointing:
            raise ValueError(
                "Aligned training does not go with --gradient_checkpointing: attention is forced only once"
            )
        layers, heads = alignment_args.aligned_layers, alignment_args.aligned_heads
        if max(layers) >= config.num_hidden_layers:
            raise ValueError(f"--aligned_layers must be below {config.num_hidden_layers}, got {layers}")
        if len(heads) != len(layers) or not 1 <= min(heads) <= max(heads) <= config.num_attention_heads:
            raise ValueError(
                f"--aligned_heads needs a number from 1 to {config.num_attention_heads} for each of the layers {layers}, "
                f"got {heads}"
            )
        if self.train_dataset is not None:
            if not {"id", "audio_codes"} <= set(self.train_dataset.column_names):
                raise ValueError(
                    f"Aligned training needs `id` and `audio_codes`, got {self.train_dataset.column_names}"
                )
            known = sum(identifier in collator.alignments for identifier in self.train_dataset["id"][:])
            if not known:
                raise ValueError(f"{alignment_args.alignments} has no utterance of the training data")
            logger.info("%d of %d utterances have an alignment", known, len(self.train_dataset))
        if alignment_args.both_layouts and not config.is_interleaved:
            raise ValueError(
                "--both_layouts needs an interleaved model: give --text_chunk_size and --speech_chunk_size"
            )
        self.alignment_args = alignment_args
        self.model.set_attn_implementation("aligned")
        self.alignment_sums = torch.zeros(2, device=self.args.device)
        self.phoneme_sums = torch.zeros(2, device=self.args.device)
        if collator.phonemes:
            # Part of the model while it is trained, so that checkpoints and optimizer have it.
            num_phonemes = table.features["phonemes"].feature.num_classes
            model.phoneme_head = nn.Linear(config.hidden_size, num_phonemes, device=self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        model = self.get_plain_model()
        if hasattr(model, "phoneme_head"):
            del model.phoneme_head
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        inputs = dict(inputs)
        alignment, phonemes = inputs.pop("alignment"), inputs.pop("phonemes")
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain: Any = self.get_plain_model()
        arguments = self.alignment_args
        remaining = max(0.0, 1 - self.state.global_step / max(arguments.alignment_steps, 1))
        config = plain.config
        own = {name: getattr(config, name) for name in ("latent_noise_std", "text_chunk_size", "speech_chunk_size")}
        additional = arguments.first_latent_noise_std - config.latent_noise_std
        config.latent_noise_std += remaining * max(additional, 0.0)
        if arguments.both_layouts and self.state.global_step % 2 == 1:
            config.update({"text_chunk_size": None, "speech_chunk_size": None})
        try:
            return self.compute_aligned_loss(
                model,
                inputs,
                alignment,
                phonemes,
                arguments.forced_share * remaining,
                return_outputs,
                num_items_in_batch,
            )
        finally:
            config.update(own)

    def compute_aligned_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        alignment: torch.Tensor,
        phonemes: torch.Tensor,
        forced_share: float,
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of training, with what the tokens and phonemes of every frame, `(batch, frames)`, add to it."""
        plain: Any = self.get_plain_model()
        arguments = self.alignment_args
        text_mask, frame_mask = inputs["attention_mask"].bool(), self.get_frame_mask(inputs).bool()
        targets = []
        for layer, num_heads in zip(arguments.aligned_layers, arguments.aligned_heads, strict=True):
            share = forced_share if layer == max(arguments.aligned_layers) else 0.0
            targets.append(locate(plain, alignment, text_mask, frame_mask, num_heads, share))
            plain.model.layers[layer].self_attn.alignment = targets[-1]
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        finally:
            for layer in arguments.aligned_layers:
                plain.model.layers[layer].self_attn.alignment = None
        probabilities = torch.cat([target.get_visible_probabilities() for target in targets])
        attention_loss = -probabilities.clamp(min=1e-6).log()
        if len(attention_loss):
            self.alignment_sums += torch.stack(
                [attention_loss.detach().sum(), attention_loss.new_tensor(len(attention_loss))]
            )
            loss = loss + arguments.alignment_weight * attention_loss.mean() / self.current_gradient_accumulation_steps
        if (phonemes >= 0).any():
            phoneme_loss = self.compute_phoneme_loss(plain, outputs.last_hidden_state, phonemes, text_mask, frame_mask)
            self.phoneme_sums += torch.stack([phoneme_loss.detach(), phoneme_loss.new_tensor(1.0)])
            loss = loss + arguments.phoneme_weight * phoneme_loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def compute_phoneme_loss(
        self,
        model: SledForSpeechSynthesis,
        hidden_states: torch.Tensor,
        phonemes: torch.Tensor,
        text_mask: torch.Tensor,
        frame_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Cross entropy of every frame's phoneme, `(batch, frames)`, at the position that the frame is predicted from."""
        counts = text_mask.sum(dim=1), frame_mask.sum(dim=1)
        _, positions = get_positions(model.config, *counts, text_mask.shape[1], frame_mask.shape[1])
        is_known = phonemes >= 0
        sources = (positions[:, :-1] - 1).clamp(max=hidden_states.shape[1] - 1)
        hidden_states = hidden_states.gather(1, sources[..., None].expand(-1, -1, hidden_states.shape[-1]))
        return nn.functional.cross_entropy(model.phoneme_head(hidden_states[is_known]).float(), phonemes[is_known])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            total, count = self.accelerator.reduce(self.alignment_sums, reduction="sum").tolist()
            logs["attention_loss"] = total / max(count, 1)
            self.alignment_sums.zero_()
            total, count = self.accelerator.reduce(self.phoneme_sums, reduction="sum").tolist()
            if count:
                logs["phoneme_loss"] = total / count
            self.phoneme_sums.zero_()
        super().log(logs, start_time)


def locate(
    model: SledForSpeechSynthesis,
    alignment: torch.Tensor,
    text_mask: torch.Tensor,
    frame_mask: torch.Tensor,
    num_heads: int,
    forced_share: float,
) -> Alignment:
    """
    Positions in the sequence that the model makes of text and speech. A head beyond the last token looks at the last.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        alignment (`torch.LongTensor` of shape `(batch_size, frames)`):
            Index of the token of every frame, -1 for padding and where it is not known.
        text_mask (`torch.BoolTensor` of shape `(batch_size, tokens)`):
            False for padding, on the right.
        frame_mask (`torch.BoolTensor` of shape `(batch_size, frames)`):
            False for padding, on the right.
        num_heads (`int`):
            Number of heads, the first of which looks at the token of the frame, the next at the one after it.
        forced_share (`float`):
            Share of the rows to force.
    """
    num_tokens, num_frames = text_mask.sum(dim=1), frame_mask.sum(dim=1)
    text_positions, frame_positions = get_positions(
        model.config, num_tokens, num_frames, text_mask.shape[1], frame_mask.shape[1]
    )
    length = int((num_tokens + num_frames).max())
    # A frame is predicted at the position before its own; what is not known goes to a slot past the end.
    positions = (frame_positions[:, :-1] - 1).masked_fill(alignment < 0, length)
    tokens = alignment.new_full((len(alignment), length + 1), -1).scatter(1, positions, alignment)[:, :length]
    is_asked, tokens = tokens >= 0, tokens.clamp(min=0)
    last = num_tokens[:, None] - 1
    keys = [text_positions.gather(1, torch.minimum(tokens + offset, last)) for offset in range(num_heads)]
    is_forced = torch.rand(len(alignment), device=alignment.device) < forced_share
    return Alignment(is_asked, torch.stack(keys, dim=1), is_forced)
