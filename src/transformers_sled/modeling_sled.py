"""SLED model: a Llama-style decoder over text and speech latents, with a generative head and an EnCodec codec."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EncodecConfig, EncodecModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.utils import CONFIG_NAME, find_adapter_config_file, is_peft_available

from .cache_sled import CACHE_ARGUMENT, SledCache, attends_in_float32
from .codec_sled import (
    SledCodec,
    check_bandwidth,
    copy_codec,
    decode_codes,
    decode_latents,
    encode_codes,
    get_execution_device,
    load_codec,
)
from .configuration_sled import SledConfig
from .generation_sled import SledGenerationMixin
from .hub_sled import AUTO_MAP, CARD_NAME, SledHubMixin, create_model_card, link_processor, save_code
from .interleaving_sled import get_positions


# Weight of the one positive position of a row in the end-of-speech loss (the original's `bceloss.pos_weight`).
EOS_POSITIVE_WEIGHT = 100.0


@dataclass
class SledOutput(BaseModelOutputWithPast):
    """
    Output of [`SledForSpeechSynthesis`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when speech is given and `return_loss=True`):
            Training loss, `energy_loss + eos_loss`.
        energy_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Energy distance between generated and true latents, averaged over real frames.
        eos_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Binary cross entropy of the end of speech, averaged over real frames and the end of each row.
        eos_logits (`torch.FloatTensor` of shape `(batch_size, sequence_length)`):
            End-of-speech logit at every position.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Hidden states of the decoder after its final norm. With speech given, every row is its text tokens and speech
            frames in the model's order, packed to the left without padding in between.
        past_key_values (`Cache`, *optional*):
            Key and value states, for the next call; `cache` from transformers 5.24 on.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
            Hidden states of the embeddings and of every layer, each `(batch_size, sequence_length, hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
            Attention weights of every layer, each `(batch_size, num_heads, sequence_length, sequence_length)`.
    """

    loss: torch.Tensor | None = None
    energy_loss: torch.Tensor | None = None
    eos_loss: torch.Tensor | None = None
    eos_logits: torch.Tensor | None = None


@dataclass
class SledPromptOutput(ModelOutput):
    """
    A voice prompt in latent form, output of [`SledForSpeechSynthesis.encode_prompt`]. It unpacks into the keyword
    arguments that the processor and `generate` take instead of audio.

    Args:
        prompt_latents (`torch.FloatTensor` of shape `(batch_size, num_frames, latent_dim)`):
            Speech latents of the prompt in float32, zero where masked.
        prompt_latents_mask (`torch.LongTensor` of shape `(batch_size, num_frames)`):
            1 for a frame of the prompt, 0 for padding.
    """

    prompt_latents: torch.Tensor | None = None
    prompt_latents_mask: torch.Tensor | None = None


class SledLinear(nn.Linear):
    """
    Linear layer that puts its weights on the left in bfloat16 on a CPU: there PyTorch's own order rearranges them at every
    call, which on few rows takes longer than the product.
    """

    @classmethod
    def replace_in(cls, module: nn.Module) -> None:
        """
        Puts layers of this class in the place of a module's own linear layers.

        Args:
            module (`nn.Module`):
                The module. Its parameters stay what they are.
        """
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                replacement = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                replacement.weight, replacement.bias = layer.weight, layer.bias
                setattr(module, name, replacement)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if (
            input.dtype != torch.bfloat16
            or weight.dtype != torch.bfloat16
            or input.device.type != "cpu"
            or torch.is_grad_enabled()
            # The compiler would carry the order on to products that want another.
            or torch.compiler.is_compiling()
            # Quantized and sharded weights have products of their own.
            or type(weight.data) is not torch.Tensor
        ):
            return super().forward(input)
        columns = input.flatten(0, -2).t()
        product = weight @ columns if self.bias is None else torch.addmm(self.bias[:, None], weight, columns)
        # A view, which the next layer takes as it is.
        return product.t().view(*input.shape[:-1], self.out_features)


class SledAttention(LlamaAttention):
    """Llama's attention, with the original's dropout on its output."""

    def __init__(self, config: SledConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        SledLinear.replace_in(self)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = kwargs.pop(CACHE_ARGUMENT, None)
        is_in_float32 = attends_in_float32(self.config, hidden_states.device, hidden_states.dtype)
        if cache is not None and (is_in_float32 or isinstance(cache, SledCache)):
            dtype = torch.float32 if is_in_float32 else hidden_states.dtype
            states = self.project(hidden_states, position_embeddings, dtype)
            attended, weights = self.attend(*states, attention_mask, cache, **kwargs)
            return self.dropout(self.o_proj(attended.to(hidden_states.dtype))), weights
        attn_output, attn_weights = super().forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )
        return self.dropout(attn_output), attn_weights

    # The base class's forward in two, and in fewer operations, which on one position take longer than what they compute.

    def project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, length, hidden_size)`):
                Inputs of the layer after their norm.
            position_embeddings (`tuple(torch.FloatTensor, torch.FloatTensor)`):
                Cosines and sines of their positions, each `(batch_size, length, head_dim)`.
            dtype (`torch.dtype`):
                Type of the cache.

        Returns:
            `tuple(torch.FloatTensor, torch.FloatTensor, torch.FloatTensor)`: queries, keys and values, each
            `(batch_size, num_heads, length, head_dim)`.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).to(dtype, memory_format=torch.contiguous_format).view(shape)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        rotated = _rotate(torch.cat([query, key], dim=2), *position_embeddings)
        query, key = rotated.split([query.shape[2], key.shape[2]], dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @property
    def attention_function(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
        """The attention function that the configuration names, which PyTorch 2.6 cannot look up in what it compiles."""
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache,
        function: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            query, key, value (`torch.FloatTensor`):
                What [`~SledAttention.project`] returns.
            attention_mask (`torch.Tensor`, *optional*):
                What every input sees.
            cache (`Cache`):
                Takes the keys and values, and gives those that are seen.
            function (`Callable`, *optional*):
                The attention function, `attention_function` by default.
            kwargs:
                What the attention function takes besides.

        Returns:
            `tuple(torch.FloatTensor, torch.FloatTensor | None)`: what was attended to, `(batch_size, length, width)`, and
            the weights where the attention function returns them.
        """
        key, value = cache.update(key, value, self.layer_idx)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
        if function is None:
            function = self.attention_function
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = function(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return attended.flatten(2), weights


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Llama's rotary embedding of states (batch_size, length, num_heads, head_dim)."""
    half = states.shape[-1] // 2
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    first, second = states.split(half, dim=-1)
    return torch.cat(
        [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)], dim=-1
    )


class SledMLP(LlamaMLP):
    """Llama's MLP, with the original's dropout before the down projection and on the output."""

    def __init__(self, config: SledConfig) -> None:
        super().__init__(config)
        SledLinear.replace_in(self)
        # On the activated gate, which scales and zeroes the same products as dropout after the multiplication.
        self.act_fn = nn.Sequential(ACT2FN[config.hidden_act], nn.Dropout(config.activation_dropout))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(super().forward(x))


class SledRMSNorm(LlamaRMSNorm):
    """Llama's norm as one operation."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class SledDecoderLayer(LlamaDecoderLayer):
    self_attn: SledAttention

    def __init__(self, config: SledConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = SledAttention(config, layer_idx)
        self.mlp = SledMLP(config)
        self.input_layernorm = SledRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = SledRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def finish(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """
        What follows the attention.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(batch_size, length, hidden_size)`):
                Inputs of the layer.
            attended (`torch.FloatTensor` of shape `(batch_size, length, width)`):
                What [`SledAttention.attend`] returns.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, length, hidden_size)`: outputs of the layer.
        """
        hidden_states = hidden_states + self.self_attn.o_proj(attended.to(hidden_states.dtype))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SledGenerativeHead(nn.Module):
    """
    The MLP that samples a speech latent in one pass: the hidden state is the residual stream, the noise modulates it
    (section 3 of the paper, arXiv 2505.13181; `modeling_speech_llama` of the original).
    """

    def __init__(self, config: SledConfig) -> None:
        super().__init__()
        width = config.head_hidden_size
        self.cond_embed = SledLinear(config.hidden_size, width)
        self.input_proj = SledLinear(config.noise_dim, width)
        self.res_blocks = nn.ModuleList(SledGenerativeHeadBlock(width) for _ in range(config.head_num_layers))
        self.final_layer = SledGenerativeHeadFinalLayer(width, config.latent_dim)

    @property
    def zero_initialized_layers(self) -> list[nn.Linear]:
        """The layers that start at zero: a fresh head ignores its noise and puts out zeros."""
        modulations = [block.adaLN_modulation[-1] for block in (*self.res_blocks, self.final_layer)]
        return [*modulations, self.final_layer.linear]

    def forward(self, hidden_states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        Samples a latent for every hidden state.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., hidden_size)`):
                Hidden states of the decoder at the positions that a frame follows.
            noise (`torch.FloatTensor` of shape `(..., noise_dim)`):
                Standard normal noise, in the dtype of the hidden states.

        Returns:
            `torch.FloatTensor` of shape `(..., latent_dim)`: the latents.
        """
        stream = self.cond_embed(hidden_states)
        condition = self.input_proj(noise)
        for block in self.res_blocks:
            stream = block(stream, condition)
        return self.final_layer(stream, condition)


class SledGenerativeHeadBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.noise_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(SledLinear(width, width), nn.SiLU(), SledLinear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), SledLinear(width, 3 * width))

    def forward(self, stream: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.adaLN_modulation(self.noise_ln(condition)).chunk(3, dim=-1)
        return stream + gate * self.mlp(self.in_ln(stream) * (1 + scale) + shift)


class SledGenerativeHeadFinalLayer(nn.Module):
    def __init__(self, width: int, latent_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), SledLinear(width, 2 * width))
        self.linear = SledLinear(width, latent_dim)

    def forward(self, stream: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm(stream) * (1 + scale) + shift)


class SledPreTrainedModel(PreTrainedModel):
    config_class = SledConfig
    config: SledConfig
    base_model_prefix = "model"
    input_modalities = ("text", "audio")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SledDecoderLayer", "SledGenerativeHead", "SledCodec"]
    _skip_keys_device_placement = [CACHE_ARGUMENT]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SledDecoderLayer, "attentions": SledAttention}

    @staticmethod
    def _load_pretrained_model(
        model: "SledPreTrainedModel",
        state_dict: dict[str, Any] | None,
        checkpoint_files: list[str] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Read tensor by tensor: pages of a mapped file count as resident memory next to the weights cast from them.
        if state_dict is None and checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files):
            state_dict = {}
            for file in checkpoint_files:
                reader = safe_open(file, framework="pt", device="cpu", backend="pread")
                state_dict.update((name, reader.get_slice(name)) for name in reader.keys())  # noqa: SIM118
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)


class SledModel(SledPreTrainedModel, LlamaModel):
    """
    The decoder of SLED without its heads and codec: [`~transformers.LlamaModel`] with the original's dropout. Its inputs
    and outputs are Llama's.
    """

    _keys_to_ignore_on_load_unexpected = [
        r"^(z_proj|z_proj_ln|eos_head|generative_head|scoreloss|bceloss|codec)\.",
    ]

    def __init__(self, config: SledConfig) -> None:
        # Past `LlamaModel.__init__`, which would build and initialize layers only to replace them.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            SledDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = SledRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class SledForSpeechSynthesis(SledHubMixin, SledPreTrainedModel, SledGenerationMixin):
    """
    SLED text-to-speech (arXiv 2505.13181). `generate` speaks a text, `stream` speaks it piece by piece, and calling the
    model with text and speech gives the training losses.

    Args:
        config ([`SledConfig`]):
            The architecture.
        build_codec (`bool`, *optional*, defaults to `True`):
            Whether to build a codec with random weights from `config.codec_config`. `False` leaves the model without one
            until [`~SledForSpeechSynthesis.set_codec`].
    """

    main_input_name = "input_ids"
    _keep_in_fp32_modules_strict = ["codec"]
    _keys_to_ignore_on_load_unexpected = [r"^bceloss\."]

    def __init__(self, config: SledConfig, build_codec: bool = True) -> None:
        super().__init__(config)
        self.model = SledModel(config)
        self.z_proj = nn.Linear(config.latent_dim, config.hidden_size)
        self.z_proj_ln = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.eos_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.generative_head = SledGenerativeHead(config)
        self.codec: SledCodec | None = None
        if build_codec:
            if config.codec_config is None:
                config.codec_config = EncodecConfig()
            self._check_codec(config, config.codec_config)
            self.codec = SledCodec(config.codec_config)
        self.fill_generation_config()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # The backbone and the codec initialize themselves: what comes here is `z_proj`, `eos_head` and the head's.
        if isinstance(module, nn.Linear):
            is_zero = any(module is layer for layer in self.generative_head.zero_initialized_layers)
            (init.zeros_ if is_zero else init.xavier_uniform_)(module.weight)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        config: SledConfig | str | Path | None = None,
        codec: "EncodecModel | str | Path | None" = None,
        **kwargs: Any,
    ) -> "SledForSpeechSynthesis":
        r"""
        Loads a checkpoint of this package, which holds its codec, or one in the released format, which holds none.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Repository on the Hub, or local folder.
            config ([`SledConfig`], `str` or `Path`, *optional*):
                Configuration to use instead of the checkpoint's.
            codec ([`~transformers.EncodecModel`], `str` or `Path`, *optional*):
                Codec, or the repository or folder of one, to use instead of the checkpoint's or, where it has none, of
                `config.codec_id`.
            kwargs:
                Everything that [`~transformers.PreTrainedModel.from_pretrained`] takes: `dtype`, `device_map`,
                `attn_implementation`, `quantization_config`, `revision`, `cache_dir`, ..., and fields of the
                configuration to use instead of the checkpoint's, such as `attention_dropout`.

        Returns:
            [`SledForSpeechSynthesis`]: the model, in evaluation mode, its codec frozen and in float32.

        Raises:
            `ValueError`: if the checkpoint is not SLED or lacks weights, or the codec does not fit it.
            `OSError`: if the checkpoint or its codec cannot be found.

        Example:

        ```python
        >>> from transformers_sled import SledForSpeechSynthesis

        >>> model = SledForSpeechSynthesis.from_pretrained("ICTNLP/SLED-TTS-Libriheavy", dtype="bfloat16")
        >>> model.codec.dtype
        torch.float32
        ```
        """
        hub_names = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
        hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
        location: dict[str, Any] = {name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}
        if isinstance(config, PreTrainedConfig):
            # By its type's name: the class in a checkpoint's own code is another one.
            if config.model_type != SledConfig.model_type:
                raise ValueError(f"`config` must be a `SledConfig`, got {type(config).__name__}.")
            sled_config = config
        else:
            config_source: str | Path | None = config
            if config_source is None:
                config_source, location = _find_base_checkpoint(pretrained_model_name_or_path, hub_kwargs, location)
            config_dict, _ = SledConfig.get_config_dict(config_source, **hub_kwargs, **location)
            if not config_dict:
                raise ValueError(f"{str(config_source)!r} is not a SLED checkpoint: it has no `{CONFIG_NAME}`.")
            if config_dict.get("model_type") != SledConfig.model_type:
                raise ValueError(
                    f"{str(config_source)!r} is not a SLED checkpoint: `model_type` in its config.json, if it has one, is "
                    f"{config_dict.get('model_type')!r}, expected 'sled' or 'speech_llama'."
                )
            own_names = SledConfig.attribute_map
            field_names = {field.name for field in fields(SledConfig)} - {"dtype"} | own_names.keys()
            overrides = {own_names.get(name, name): kwargs.pop(name) for name in field_names & kwargs.keys()}
            config_dict = {own_names.get(name, name): value for name, value in config_dict.items()} | overrides
            sled_config = SledConfig.from_dict(config_dict)

        holds_codec = sled_config.codec_config is not None
        separate_codec = None
        if codec is not None or not holds_codec:
            separate_codec = load_codec(codec if codec is not None else sled_config.codec_id, **hub_kwargs)
            cls._check_codec(sled_config, separate_codec.config)

        # The released checkpoints keep the head's weights inside the loss module that trains it.
        kwargs.setdefault("key_mapping", {r"^scoreloss\.net\.": "generative_head."})
        with_loading_info = kwargs.pop("output_loading_info", False)
        ignores_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, loading_info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                config=sled_config,
                build_codec=holds_codec,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} is incomplete or damaged: {error}."
            ) from error
        if loading_info["mismatched_keys"] and not ignores_shapes:
            name, found, expected = min(loading_info["mismatched_keys"])
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} does not fit its configuration: `{name}` is of shape "
                f"{tuple(found)}, expected {tuple(expected)}."
            )
        missing_keys = sorted(loading_info["missing_keys"])
        if missing_keys:
            raise ValueError(
                f"The checkpoint {str(pretrained_model_name_or_path)!r} is incomplete: {len(missing_keys)} weights are "
                f"missing, {', '.join(missing_keys[:5])}{', ...' if len(missing_keys) > 5 else ''}."
            )
        model._attach_codec(model.get_codec() if separate_codec is None else separate_codec.to(model.device))
        return (model, loading_info) if with_loading_info else model  # type: ignore[return-value]

    @staticmethod
    def _check_codec(config: SledConfig, codec_config: EncodecConfig) -> None:
        if codec_config.hidden_size != config.latent_dim:
            raise ValueError(
                f"`codec` has latents of width {codec_config.hidden_size} (`hidden_size`), but the model's `latent_dim` is "
                f"{config.latent_dim}."
            )
        check_bandwidth(codec_config, config.codec_bandwidth, "codec_bandwidth")

    def set_codec(self, codec: EncodecModel) -> None:
        """
        Gives the model a codec. It is frozen, kept in float32 and saved with the model from then on.

        Args:
            codec ([`~transformers.EncodecModel`]):
                A mono codec whose `hidden_size` is the model's `latent_dim`.

        Raises:
            `ValueError`: if the codec does not fit the model.
        """
        copied = copy_codec(codec)
        self._check_codec(self.config, copied.config)
        self._attach_codec(copied.to(self.device))

    def _attach_codec(self, codec: SledCodec) -> None:
        # Loading makes all weights trainable.
        self.codec = codec.eval().requires_grad_(False)
        # Saved with the model, it no longer depends on where it came from.
        codec.config.name_or_path = ""
        self.config.codec_config = codec.config

    @property
    def device(self) -> torch.device:
        """Device (`torch.device`) that the model computes on, also where accelerate keeps weights elsewhere between calls."""
        return get_execution_device(self.model.embed_tokens)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        include_code: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Saves the model with its codec, its generation configuration, and a model card if there is none yet.

        Args:
            save_directory (`str` or `Path`):
                Folder to save to, which is created if it does not exist.
            is_main_process (`bool`, *optional*, defaults to `True`):
                Whether this is the process of several that saves.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to upload what has been saved.
            include_code (`bool`, *optional*, defaults to `False`):
                Whether to add the modelling files, so that `trust_remote_code=True` loads the model and its processor
                where this package is not installed.
            repo_id (`str`, *optional*):
                Repository to push to and to name in the model card. The name of the folder by default.
            kwargs:
                Further arguments of [`~transformers.PreTrainedModel.save_pretrained`], and of `push_to_hub`.

        Example:

        ```python
        >>> model.save_pretrained("my-voice", include_code=True)
        >>> processor.save_pretrained("my-voice")
        ```
        """
        name = repo_id or Path(save_directory).resolve().name
        if push_to_hub and is_main_process:
            self._save_and_push(save_directory, name, include_code=include_code, **kwargs)
            return
        # A model loaded from Hub code brings its code along by itself.
        changes_code = not self.is_remote_code()
        # The released names are for reading only: saved under them, a model could not be resumed by `Trainer`.
        kwargs.setdefault("save_original_format", False)
        auto_map = getattr(self.config, "auto_map", None)
        if changes_code:
            self._set_auto_map(dict(AUTO_MAP) if include_code else None)
        temperature = self.generation_config.temperature
        if not self.generation_config.do_sample:
            # There is no noise to scale, and the base class saves no temperature without sampling.
            self.generation_config.temperature = None
        try:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            self.generation_config.temperature = temperature
            if changes_code:
                self._set_auto_map(auto_map)
        if not is_main_process:
            return
        if changes_code and include_code:
            save_code(save_directory)
        link_processor(save_directory)
        if self.codec is not None and not Path(save_directory, CARD_NAME).exists():
            create_model_card(self, name, include_code or not changes_code).save(Path(save_directory, CARD_NAME))

    def _set_auto_map(self, auto_map: dict[str, str] | None) -> None:
        if auto_map is not None:
            self.config.auto_map = auto_map
        elif hasattr(self.config, "auto_map"):
            del self.config.auto_map

    def get_codec(self) -> SledCodec:
        """
        Returns:
            [`~transformers.EncodecModel`]: the model's codec.

        Raises:
            `ValueError`: if the model has none.
        """
        if self.codec is None:
            raise ValueError(
                "The model has no codec. Give it one with `set_codec`, or load it with `from_pretrained`."
            )
        return self.codec

    def encode_audio(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Turns audio into speech latents: the sum of the codebook vectors that the codec picks at `config.codec_bandwidth`.

        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)` or `(batch_size, num_samples)`):
                Waveforms at the codec's sampling rate, in float32.
            padding_mask (`torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for a sample, 0 for padding on either side. All samples are real by default.

        Returns:
            `tuple(torch.FloatTensor, torch.BoolTensor)`: latents `(batch_size, num_frames, latent_dim)` in float32, zero
            where masked, and their mask `(batch_size, num_frames)`. A last frame that is not full is completed with
            silence.

        Raises:
            `ValueError`: if an argument is of another shape.
        """
        batch_size, num_samples = input_values.shape[0], input_values.shape[-1]
        if input_values.shape not in ((batch_size, num_samples), (batch_size, 1, num_samples)):
            raise ValueError(
                "`input_values` must be of shape (batch_size, 1, num_samples) or (batch_size, num_samples), got "
                f"{tuple(input_values.shape)}."
            )
        waveforms = list(input_values.reshape(batch_size, num_samples))
        if padding_mask is not None:
            if padding_mask.shape not in ((batch_size, num_samples), (batch_size, 1, num_samples)):
                raise ValueError(
                    f"`padding_mask` must be of shape {(batch_size, num_samples)}, got {tuple(padding_mask.shape)}."
                )
            masks = padding_mask.reshape(batch_size, num_samples).to(input_values.device).bool()
            waveforms = [waveform[mask] for waveform, mask in zip(waveforms, masks, strict=True)]
        codes = encode_codes(self.get_codec(), waveforms, self.config.codec_bandwidth)
        num_frames = torch.tensor([row.shape[1] for row in codes], device=codes[0].device)
        padded_codes = pad_sequence([row.t() for row in codes], batch_first=True).transpose(1, 2)
        mask = torch.arange(padded_codes.shape[2], device=num_frames.device) < num_frames[:, None]
        return self.decode_codes(padded_codes) * mask[..., None], mask

    def decode_codes(self, audio_codes: torch.Tensor) -> torch.Tensor:
        """
        Looks codes up in the codebooks.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, num_frames)`):
                Codes of the codec at `config.codec_bandwidth`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_frames, latent_dim)`: latents in float32, the sums of the
            codebook vectors.

        Raises:
            `ValueError`: if the number of codebooks is not the one of `config.codec_bandwidth`, or a code is not an entry
            of its codebook.
        """
        codec = self.get_codec()
        num_codebooks = codec.quantizer.get_num_quantizers_for_bandwidth(self.config.codec_bandwidth)
        if audio_codes.ndim != 3 or audio_codes.shape[1] != num_codebooks:
            raise ValueError(
                f"`audio_codes` must be of shape (batch_size, {num_codebooks}, num_frames) for a codec at "
                f"{self.config.codec_bandwidth} kbit/s, got {tuple(audio_codes.shape)}."
            )
        return decode_codes(codec, audio_codes)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Turns speech latents into audio with the codec's decoder, without its quantizer. Beyond the audio itself, long
        speech takes no more memory than short speech.

        Args:
            latents (`torch.FloatTensor` of shape `(batch_size, num_frames, latent_dim)`):
                Speech latents.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_frames * hop_length)`: waveforms in float32 at the codec's
            sampling rate.

        Raises:
            `ValueError`: if `latents` is of another shape.
        """
        if latents.ndim != 3 or latents.shape[0] == 0:
            raise ValueError(
                f"`latents` must be of shape (batch_size, num_frames, {self.config.latent_dim}), got "
                f"{tuple(latents.shape)}."
            )
        return torch.stack(decode_latents(self.get_codec(), list(latents)))

    def encode_prompt(
        self, prompt_values: torch.Tensor, prompt_values_mask: torch.Tensor | None = None
    ) -> SledPromptOutput:
        """
        Encodes voice prompts once, to be reused instead of their audio.

        Args:
            prompt_values (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)`):
                Waveforms of the voice prompts at the codec's sampling rate, as the processor returns them.
            prompt_values_mask (`torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for a sample, 0 for padding. All samples are real by default.

        Returns:
            [`SledPromptOutput`]: `prompt_latents` and `prompt_latents_mask`.

        Raises:
            `ValueError`: if the audio is of another shape, empty, or has values that are not finite.

        Example:

        ```python
        >>> inputs = processor("Hello.", prompt_text="How are you?", prompt_audio="voice.wav", return_tensors="pt")
        >>> voice = model.encode_prompt(inputs["prompt_values"], inputs["prompt_values_mask"])
        >>> inputs = processor("Another sentence.", prompt_text="How are you?", **voice, return_tensors="pt")
        >>> audio = model.generate(**inputs)
        ```
        """
        if prompt_values.ndim not in (2, 3) or (prompt_values.ndim == 3 and prompt_values.shape[1] != 1):
            raise ValueError(
                f"`prompt_values` must be of shape (batch_size, 1, num_samples), got {tuple(prompt_values.shape)}."
            )
        if not torch.isfinite(prompt_values).all():
            raise ValueError("`prompt_values` has values that are not finite.")
        if prompt_values_mask is not None:
            if prompt_values_mask.shape != (prompt_values.shape[0], prompt_values.shape[-1]):
                raise ValueError(
                    f"`prompt_values_mask` must be of shape {(prompt_values.shape[0], prompt_values.shape[-1])}, got "
                    f"{tuple(prompt_values_mask.shape)}."
                )
            is_empty = not prompt_values_mask.bool().any(dim=1).all()
        else:
            is_empty = prompt_values.shape[-1] == 0
        if is_empty:
            raise ValueError("`prompt_values` has a row without any samples.")
        latents, mask = self.encode_audio(prompt_values, prompt_values_mask)
        return SledPromptOutput(prompt_latents=latents, prompt_latents_mask=mask.long())

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        Embeds text tokens for the decoder.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Text token ids.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_tokens, hidden_size)`.
        """
        return self.z_proj_ln(self.model.embed_tokens(input_ids))

    def embed_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Embeds speech latents for the decoder.

        Args:
            latents (`torch.FloatTensor` of shape `(batch_size, num_frames, latent_dim)`):
                Speech latents.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_frames, hidden_size)`.
        """
        return self.z_proj_ln(self.z_proj(latents.to(self.model.embed_tokens.weight.dtype)))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        audio_codes: torch.Tensor | None = None,
        audio_codes_mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> SledOutput:
        r"""
        Runs the decoder over text and, where speech is given, over the speech that says it, and computes the training
        losses of the paper's section 3 (`modeling_speech_llama` of the original).

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Text token ids.
            attention_mask (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for a token, 0 for padding on either side. Padding takes no position.
            input_values (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)`, *optional*):
                Waveforms at the codec's sampling rate.
            padding_mask (`torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for a sample, 0 for padding on either side.
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, num_frames)`, *optional*):
                Codes of the waveforms, instead of `input_values`.
            audio_codes_mask (`torch.LongTensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for a frame, 0 for padding on either side.
            noise (`torch.FloatTensor` of shape `(2, batch_size, num_frames, noise_dim)`, *optional*):
                Noise of the two samples that the energy loss draws for every frame. Drawn from the global generator by
                default.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions, for calls without speech.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings (from `embed_text` and `embed_latents`) instead of `input_ids`, for calls without speech.
            use_cache (`bool`, *optional*):
                Whether to return a cache, for calls without speech.
            return_loss (`bool`, *optional*, defaults to `True`):
                Whether to compute the losses where speech is given.
            kwargs:
                Further arguments of [`~transformers.LlamaModel`], such as `output_hidden_states` and, for calls without
                speech, its cache (`past_key_values`, or `cache` from transformers 5.24 on).

        Returns:
            [`SledOutput`]: with speech given, every row is packed to the left in the model's own order of text and
            speech.

        Raises:
            `ValueError`: if the arguments do not go together, a row has no text or no speech, or a row is longer than
            `config.max_position_embeddings`.

        Example:

        ```python
        >>> batch = processor(text=["Hello."], audio=["hello.wav"], return_tensors="pt")
        >>> outputs = model(**batch)
        >>> outputs.loss, outputs.energy_loss, outputs.eos_loss
        ```
        """
        if input_values is None and audio_codes is None:
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("Give either `input_ids` or `inputs_embeds`.")
            outputs = self.model(
                inputs_embeds=inputs_embeds if input_ids is None else self.embed_text(input_ids),
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
            return SledOutput(eos_logits=self.eos_head(outputs.last_hidden_state).squeeze(-1), **outputs)

        if input_ids is None:
            raise ValueError("Speech needs the `input_ids` of its text.")
        if input_values is not None and audio_codes is not None:
            raise ValueError("Give speech either as `input_values` or as `audio_codes`.")
        if inputs_embeds is not None or position_ids is not None or kwargs.get(CACHE_ARGUMENT) is not None:
            raise ValueError(f"`inputs_embeds`, `{CACHE_ARGUMENT}` and `position_ids` are for calls without speech.")
        latents, latents_mask = self._get_target_latents(input_values, padding_mask, audio_codes, audio_codes_mask)
        latents, latents_mask = latents.to(input_ids.device), latents_mask.to(input_ids.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids, text_mask = _pack_left(input_ids, attention_mask.bool())
        if latents.shape[0] != input_ids.shape[0]:
            raise ValueError(f"There are {input_ids.shape[0]} rows of text but {latents.shape[0]} of speech.")
        num_tokens, num_frames = text_mask.sum(dim=1), latents_mask.sum(dim=1)
        if (num_tokens == 0).any() or (num_frames == 0).any():
            raise ValueError("Every row needs text and speech, but some are all padding.")
        longest = int((num_tokens + num_frames).max())
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"A row of text and speech is {longest} positions long, more than `max_position_embeddings` "
                f"({self.config.max_position_embeddings})."
            )

        text_positions, frame_positions = get_positions(
            self.config, num_tokens, num_frames, text_mask.shape[1], latents_mask.shape[1]
        )
        visible_text, input_ids, is_dropped = self._drop_text(input_ids, text_mask, num_tokens)

        # Scatter text and speech to their places; padding goes to a slot past the end that is cut off.
        places = torch.cat(
            [
                text_positions.masked_fill(~text_mask, longest),
                frame_positions[:, :-1].masked_fill(~latents_mask, longest),
            ],
            dim=1,
        )
        order = torch.zeros(places.shape[0], longest + 1, dtype=torch.long, device=places.device)
        order.scatter_(1, places, torch.arange(places.shape[1], device=places.device).expand_as(places))
        order = order[:, :longest]
        embeds = torch.cat([self.embed_text(input_ids), self.embed_latents(self._add_noise(latents))], dim=1)
        embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
        visible = torch.cat([visible_text, latents_mask], dim=1).gather(1, order)
        visible = visible & (torch.arange(longest, device=visible.device) < (num_tokens + num_frames)[:, None])

        outputs = self.model(inputs_embeds=embeds, attention_mask=visible.long(), use_cache=False, **kwargs)
        hidden_states = outputs.last_hidden_state
        eos_logits = self.eos_head(hidden_states).squeeze(-1)
        output = SledOutput(
            eos_logits=eos_logits,
            last_hidden_state=hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if return_loss:
            sources = self._get_sources(text_positions, frame_positions, num_tokens, is_dropped)
            output.energy_loss = self._energy_loss(hidden_states, sources[:, :-1], latents, latents_mask, noise)
            output.eos_loss = self._eos_loss(eos_logits, sources, num_frames)
            output.loss = output.energy_loss + output.eos_loss
        return output

    def _get_target_latents(
        self,
        input_values: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        audio_codes: torch.Tensor | None,
        audio_codes_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of the true speech, packed to the left, and their mask."""
        if input_values is not None:
            return self.encode_audio(input_values, padding_mask)
        assert audio_codes is not None
        latents = self.decode_codes(audio_codes)
        if audio_codes_mask is None:
            return latents, torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)
        if audio_codes_mask.shape != latents.shape[:2]:
            raise ValueError(
                f"`audio_codes_mask` must be of shape {tuple(latents.shape[:2])}, got {tuple(audio_codes_mask.shape)}."
            )
        return _pack_left(latents, audio_codes_mask.to(latents.device).bool())

    def _drop_text(
        self, input_ids: torch.Tensor, text_mask: torch.Tensor, num_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Hides the text of some rows in training: all but the last token offline, all but the first one, which becomes
        `</s>`, interleaved. Returns the visible text, the ids, and which rows were dropped.
        """
        batch_size = input_ids.shape[0]
        is_dropped = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
        if not self.training or self.config.text_dropout_prob == 0:
            return text_mask, input_ids, is_dropped
        is_dropped = torch.rand(batch_size, device=input_ids.device) < self.config.text_dropout_prob
        kept = torch.zeros_like(num_tokens) if self.config.is_interleaved else num_tokens - 1
        is_kept = torch.arange(input_ids.shape[1], device=input_ids.device) == kept[:, None]
        if self.config.is_interleaved:
            input_ids = torch.where(is_kept & is_dropped[:, None], self.config.eos_token_id, input_ids)
        return text_mask & (is_kept | ~is_dropped[:, None]), input_ids, is_dropped

    def _add_noise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the decoder reads them in training, each row with noise of a strength of its own."""
        if not self.training or self.config.latent_noise_std == 0:
            return latents
        std = self.config.latent_noise_std * torch.rand(latents.shape[0], 1, 1, device=latents.device)
        return latents + std * torch.randn_like(latents)

    def _get_sources(
        self,
        text_positions: torch.Tensor,
        frame_positions: torch.Tensor,
        num_tokens: torch.Tensor,
        is_dropped: torch.Tensor,
    ) -> torch.Tensor:
        """Position that each frame is predicted from, `(batch_size, num_frames + 1)`: the nearest visible one before it."""
        kept = torch.zeros_like(num_tokens) if self.config.is_interleaved else num_tokens - 1
        kept_position = text_positions.gather(1, kept[:, None])
        sources_of_dropped = torch.cat([kept_position, frame_positions[:, :-1]], dim=1)
        return torch.where(is_dropped[:, None], sources_of_dropped, frame_positions - 1)

    def _energy_loss(
        self,
        hidden_states: torch.Tensor,
        sources: torch.Tensor,
        latents: torch.Tensor,
        latents_mask: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """Energy distance with two samples a frame and exponent 1 (equation 6 of the paper), averaged over frames."""
        batch_size, num_frames = latents_mask.shape
        shape = (2, batch_size, num_frames, self.config.noise_dim)
        if noise is None:
            # Two draws, as the original makes them, so that a seed gives the original's noise.
            draws = [torch.randn(batch_size * num_frames, shape[-1], device=latents.device) for _ in range(2)]
            noise = torch.stack(draws).view(shape)
        elif noise.shape != shape:
            raise ValueError(f"`noise` must be of shape {shape}, got {tuple(noise.shape)}.")
        hidden_states = hidden_states.gather(
            1, sources.clamp(max=hidden_states.shape[1] - 1)[..., None].expand(-1, -1, hidden_states.shape[-1])
        )[latents_mask]
        noise = noise.to(hidden_states.device, hidden_states.dtype)[:, latents_mask]
        first, second = self.generative_head(hidden_states.expand(2, -1, -1), noise).float()
        target = latents[latents_mask]
        distance = torch.linalg.vector_norm
        attraction = distance(first - target, dim=-1) + distance(second - target, dim=-1)
        return (attraction - distance(first - second, dim=-1)).mean()

    def _eos_loss(self, eos_logits: torch.Tensor, sources: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        """Binary cross entropy of the end of speech at every position that a frame or the end follows."""
        frame_index = torch.arange(sources.shape[1], device=sources.device)[None]
        is_asked = frame_index <= num_frames[:, None]
        is_end = frame_index == num_frames[:, None]
        logits = eos_logits.gather(1, sources.clamp(max=eos_logits.shape[1] - 1))[is_asked].float()
        return nn.functional.binary_cross_entropy_with_logits(
            logits, is_end[is_asked].float(), pos_weight=logits.new_tensor(EOS_POSITIVE_WEIGHT)
        )


def _find_base_checkpoint(
    checkpoint: str | Path | None, hub_kwargs: dict[str, Any], location: dict[str, Any]
) -> tuple[str | Path | None, dict[str, Any]]:
    """Where the model's own configuration is, and at which revision: of an adapter, the model that it was trained on."""
    if not is_peft_available():
        return checkpoint, location
    adapter_config = find_adapter_config_file(checkpoint, **hub_kwargs, **location)
    if adapter_config is None:
        return checkpoint, location
    return json.loads(Path(adapter_config).read_text(encoding="utf-8"))["base_model_name_or_path"], {}


def _pack_left(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves what the mask (batch_size, length) keeps to the left of each row, in order, and zeroes the rest."""
    order = torch.argsort((~mask).int(), dim=1, stable=True)
    mask = mask.gather(1, order)
    index, keep = (order, mask) if values.ndim == 2 else (order[..., None].expand_as(values), mask[..., None])
    return values.gather(1, index) * keep, mask


__all__ = [
    "SledForSpeechSynthesis",
    "SledGenerativeHead",
    "SledModel",
    "SledOutput",
    "SledPreTrainedModel",
    "SledPromptOutput",
]
