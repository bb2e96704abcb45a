"""One step of the model: the frames that follow its inputs, layer by layer over the cache, in parts that are compiled."""

import itertools
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from transformers import CompileConfig

from .cache_sled import CACHE_ARGUMENT, SledCache, attends_in_float32


if TYPE_CHECKING:
    from .modeling_sled import SledDecoderLayer, SledForSpeechSynthesis

_States: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SledStep:
    r"""
    Predicts the frames that follow the inputs.

    On a plain model the decoder runs in parts between one layer's attention and the next one's, because they see neither the
    cache nor how much it holds: compiled, a part serves all layers and all lengths, and it takes seconds to compile whatever
    the number of layers. A model with hooks (offloaded, sharded) or in training mode runs through its own forward pass.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        compile_config ([`~transformers.CompileConfig`], *optional*):
            Compiles the parts with these options.
    """

    def __init__(self, model: "SledForSpeechSynthesis", compile_config: CompileConfig | None = None) -> None:
        self.model = model
        self.is_plain = _is_plain(model)
        self.is_compiled = compile_config is not None and self.is_plain
        self._parts: dict[str, Callable] = {"project": _project, "cross": _cross, "predict": _predict}
        if compile_config is not None and self.is_plain:
            self._parts = _get_compiled_parts(model, self._parts, compile_config)

    def __call__(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        last: torch.Tensor | None,
        cache: SledCache | None,
        conditional: torch.Tensor,
        unconditional: torch.Tensor | None,
        scales: torch.Tensor,
        noise: torch.Tensor,
    ) -> _States:
        """
        Takes the step.

        Args:
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, length, hidden_size)`):
                What the branches read.
            attention_mask (`torch.Tensor`, *optional*):
                What every input sees, as the decoder takes it.
            position_ids (`torch.LongTensor` of shape `(batch_size, length)`):
                Positions of the inputs.
            last (`torch.LongTensor` of shape `(num_branches,)`, *optional*):
                Index of every branch's last input, counted over the whole batch. The last one of each row by default, and
                then the parts are compiled.
            cache ([`SledCache`], *optional*):
                Keys and values.
            conditional (`torch.LongTensor` of shape `(num_rows,)`):
                The branches that read text.
            unconditional (`torch.LongTensor` of shape `(num_rows,)`, *optional*):
                The branches without text, where any row is guided.
            scales (`torch.FloatTensor` of shape `(num_rows, 1)`):
                Guidance scales.
            noise (`torch.FloatTensor` of shape `(num_rows, noise_dim)`):
                Noise for the generative head.

        Returns:
            `tuple(torch.FloatTensor, torch.FloatTensor, torch.FloatTensor)`: latents `(num_rows, latent_dim)`,
            end-of-speech logits `(num_rows,)` in float32, and the latents' embeddings `(num_rows, 1, hidden_size)`, the
            next inputs.
        """
        if cache is None or last is not None or not self.is_plain:
            outputs = self.model.model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=cache is not None,
                **{CACHE_ARGUMENT: cache},
            )
            # The last layers may be on another device than the first.
            hidden_states = outputs.last_hidden_state.to(noise.device)
            hidden_states = hidden_states[:, -1] if last is None else hidden_states.flatten(0, 1)[last]
            return _mix_and_predict(self.model, hidden_states, conditional, unconditional, scales, noise)
        decoder = self.model.model
        layers = cast("list[SledDecoderLayer]", list(decoder.layers))
        dtype = inputs_embeds.dtype
        if attends_in_float32(self.model.config, inputs_embeds.device, dtype):
            dtype = torch.float32
        cos, sin = decoder.rotary_emb(inputs_embeds, position_ids=position_ids)
        # A view is traced as one, and what a layer passes on is none.
        hidden_states = inputs_embeds.clone()
        query, key, value = self._parts["project"](layers[0], hidden_states, cos, sin, dtype)
        for layer, following in itertools.pairwise(layers):
            attended, _ = layer.self_attn.attend(query, key, value, attention_mask, cache)
            hidden_states, query, key, value = self._parts["cross"](
                layer, following, hidden_states, attended, cos, sin, dtype
            )
        attended, _ = layers[-1].self_attn.attend(query, key, value, attention_mask, cache)
        results = self._parts["predict"](
            self.model, layers[-1], hidden_states, attended, conditional, unconditional, scales, noise
        )
        if not self.is_compiled:
            return results
        # CUDA graphs write the next step's results to the same memory.
        latents, eos_logits, embeds = results
        return latents.clone(), eos_logits.clone(), embeds.clone()


def _project(
    layer: "SledDecoderLayer", hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype
) -> _States:
    return layer.self_attn.project(layer.input_layernorm(hidden_states), (cos, sin), dtype)


def _cross(
    layer: "SledDecoderLayer",
    following: "SledDecoderLayer",
    hidden_states: torch.Tensor,
    attended: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_states = layer.finish(hidden_states, attended)
    return hidden_states, *_project(following, hidden_states, cos, sin, dtype)


def _predict(
    model: "SledForSpeechSynthesis",
    layer: "SledDecoderLayer",
    hidden_states: torch.Tensor,
    attended: torch.Tensor,
    *arguments: Any,
) -> _States:
    hidden_states = model.model.norm(layer.finish(hidden_states[:, -1:], attended[:, -1:]))
    return _mix_and_predict(model, hidden_states[:, -1], *arguments)


def _mix_and_predict(
    model: "SledForSpeechSynthesis",
    hidden_states: torch.Tensor,
    conditional: torch.Tensor,
    unconditional: torch.Tensor | None,
    scales: torch.Tensor,
    noise: torch.Tensor,
) -> _States:
    mixed = with_text = hidden_states[conditional]
    if unconditional is not None:
        without_text = hidden_states[unconditional]
        mixed = (without_text + scales * (with_text - without_text)).to(with_text.dtype)
    latents = model.generative_head(mixed, noise).to(noise.device)
    eos_logits = model.eos_head(with_text).squeeze(-1).to(noise.device, torch.float32)
    return latents, eos_logits, model.embed_latents(latents[:, None]).to(noise.device)


def _is_plain(model: "SledForSpeechSynthesis") -> bool:
    """Whether masks are what attention takes, and nothing has to happen when the decoder's layers are called as modules."""
    return (
        not model.training
        and model.config._attn_implementation in ("eager", "sdpa")
        and not any(
            # What accelerate, and what sharding, leave behind; FSDP puts classes of its own in the place of modules'.
            hasattr(module, "_hf_hook")
            or module._forward_pre_hooks
            or module._forward_hooks
            or type(module).__name__.startswith("FSDP")
            for module in model.model.modules()
        )
    )


def _get_compiled_parts(
    model: "SledForSpeechSynthesis", parts: dict[str, Callable], compile_config: CompileConfig
) -> dict[str, Callable]:
    """Compiles the parts, once for each model and set of options in a process."""
    options = compile_config.to_dict()
    compiled = _compiled_parts.setdefault(model, {})
    key = repr(sorted(options.items()))
    if key not in compiled:
        # With code of its own, because PyTorch compiles the same code only so many times before it gives up.
        compiled[key] = {
            name: torch.compile(FunctionType(part.__code__.replace(), part.__globals__), **options)
            for name, part in parts.items()
        }
    return compiled[key]


_compiled_parts: WeakKeyDictionary["SledForSpeechSynthesis", dict[str, dict[str, Callable]]] = WeakKeyDictionary()


__all__ = ["SledStep"]
