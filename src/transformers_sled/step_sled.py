"""One step of the model: the frames that follow its inputs, layer by layer over the cache, compiled or not."""

import itertools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from weakref import WeakKeyDictionary, ref

import torch
from transformers import Cache, CompileConfig
from transformers.models.llama.modeling_llama import eager_attention_forward

from .cache_sled import CACHE_ARGUMENT, SledCache, attends_in_float32, store


if TYPE_CHECKING:
    from .modeling_sled import SledDecoderLayer, SledForSpeechSynthesis

_States: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SledStep:
    r"""
    Predicts the frames that follow the inputs.

    On a plain model it is one function, which can be compiled for all lengths and numbers of rows at once. A model with hooks
    (offloaded, sharded) or in training mode runs through its own forward pass.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        compile_config ([`~transformers.CompileConfig`], *optional*):
            Compiles it with these options.
    """

    def __init__(self, model: "SledForSpeechSynthesis", compile_config: CompileConfig | None = None) -> None:
        self.model = model
        self.is_plain = _is_plain(model)
        self._compiled = _compile(model, compile_config) if compile_config is not None and self.is_plain else None

    @property
    def is_compiled(self) -> bool:
        """Whether it is compiled (`bool`)."""
        return self._compiled is not None

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
                Index of every branch's last input, counted over the whole batch, where rows start. By default each row of the
                batch has one input, and the step is the compiled one.
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
        decoder, config = self.model.model, self.model.config
        dtype = inputs_embeds.dtype
        if attends_in_float32(config, inputs_embeds.device, dtype):
            dtype = torch.float32
        cos, sin = decoder.rotary_emb(inputs_embeds, position_ids=position_ids)
        function = cast("list[SledDecoderLayer]", decoder.layers)[0].self_attn.attention_function
        if self.is_compiled and inputs_embeds.device.type == "cpu":
            # For single inputs the compiler's loops over plain operations take less time than PyTorch's own attention.
            function = eager_attention_forward
        arguments = (function, attention_mask, cos, sin, dtype, conditional, unconditional, scales, noise)
        if self._compiled is None:
            return _predict(self.model, inputs_embeds, cache, *arguments)
        # Tensors and numbers, which a graph has as its inputs: it serves all lengths and numbers of rows.
        stored, index, num_visible = cache.get_first_rows(config.num_key_value_heads, config.head_dim, dtype)
        # A view is traced as one, and what the engine passes in later steps is none.
        results = self._compiled(self.model, inputs_embeds.clone(), stored, index, num_visible, *arguments)
        # CUDA graphs write the next step's results to the same memory.
        latents, eos_logits, embeds = results
        return latents.clone(), eos_logits.clone(), embeds.clone()


class _FirstRows:
    """The first rows of a [`SledCache`], for the attention of a step that is compiled."""

    def __init__(
        self, stored: Sequence[tuple[torch.Tensor, torch.Tensor]], index: torch.Tensor, num_visible: int
    ) -> None:
        self.stored = stored
        self.index = index
        self.num_visible = num_visible

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.stored[layer_idx]
        return self._store(keys, key_states), self._store(values, value_states)

    def _store(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        store(stored, self.index, states)
        # Slices would be a case of their own where they are all there is.
        return stored.narrow(0, 0, states.shape[0]).narrow(1, 0, self.num_visible).transpose(1, 2)


def _predict_over_tensors(
    model: "SledForSpeechSynthesis",
    inputs_embeds: torch.Tensor,
    stored: Sequence[tuple[torch.Tensor, torch.Tensor]],
    index: torch.Tensor,
    num_visible: int,
    *arguments: Any,
) -> _States:
    return _predict(model, inputs_embeds, _FirstRows(stored, index, num_visible), *arguments)


def _predict(
    model: "SledForSpeechSynthesis",
    hidden_states: torch.Tensor,
    cache: SledCache | _FirstRows,
    function: Callable,
    attention_mask: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtype: torch.dtype,
    *arguments: Any,
) -> _States:
    for layer in cast("list[SledDecoderLayer]", model.model.layers):
        states = layer.self_attn.project(layer.input_layernorm(hidden_states), (cos, sin), dtype)
        attended, _ = layer.self_attn.attend(*states, attention_mask, cast(Cache, cache), function)
        hidden_states = layer.finish(hidden_states, attended)
    return _mix_and_predict(model, model.model.norm(hidden_states[:, -1]), *arguments)


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


def _compile(model: "SledForSpeechSynthesis", compile_config: CompileConfig) -> Callable[..., _States]:
    """Compiles the step, once for each model, as it is now, and set of options in a process."""
    options = compile_config.to_dict()
    compiled = _compiled_steps.setdefault(model, {})
    key = repr(sorted(options.items()))
    state = _get_state(model)
    if key not in compiled or compiled[key][0] != state:
        if options["mode"] in (None, "default") and hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):
            # Whether the model is still the one that was compiled is asked here, and not by hundreds of checks in every step.
            skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            options |= {"mode": None, "options": {**(options["options"] or {}), "guard_filter_fn": skip}}
        # With code of its own, because PyTorch compiles the same code only so many times before it gives up.
        function = FunctionType(_predict_over_tensors.__code__.replace(), _predict_over_tensors.__globals__)
        compiled[key] = state, torch.compile(function, **options)
    return compiled[key][1]


def _get_state(model: "SledForSpeechSynthesis") -> list[tuple[Any, ...]]:
    """What compiled code takes for granted of a model."""
    # By weak references, because what is kept for a model must not keep it.
    modules = [(ref(module), module.training) for module in model.modules()]
    tensors = [
        (type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        for tensor in itertools.chain(model.parameters(), model.buffers())
    ]
    return [*modules, *tensors]


_compiled_steps: WeakKeyDictionary[
    "SledForSpeechSynthesis", dict[str, tuple[list[tuple[Any, ...]], Callable[..., _States]]]
] = WeakKeyDictionary()


__all__ = ["SledStep"]
