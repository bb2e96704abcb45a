"""Linear layers in 4 bits for CPUs, over PyTorch's own product of them, as a quantization method of transformers."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin


QUANT_METHOD = "sled_int4"

# What PyTorch's product takes: sizes of a group, and what the number of rows of the weights has to be divisible by.
GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 16

# Rows that are laid out together on any processor, or a multiple of them.
PACKED_ROWS = 64

# Type of inputs, scales and offsets of the product, whatever that of the model is. In float32 it takes twenty times as long.
DTYPE = torch.bfloat16

# Small, and next to what is heard: the end of speech, and the ways in and out of the latents.
KEPT_MODULES = ("codec", "eos_head", "z_proj", "generative_head.input_proj", "generative_head.final_layer.linear")

# Rounds in which scale and offset of every group are fitted to its 4-bit numbers and these to them.
FIT_ROUNDS = 4

# Weights that are fitted at a time, so that they stay in the processor's cache.
_FIT_SIZE = 65_536


@register_quantization_config(QUANT_METHOD)
class SledInt4Config(QuantizationConfigMixin):
    r"""
    4-bit weights on a CPU, for the `quantization_config` of `from_pretrained`: every group of weights in a row is kept as
    whole numbers from 0 to 15, a scale and an offset, which are fitted to the weights by least squares. Products are in
    bfloat16 and all else in the model's dtype. A model quantized so can be saved and loaded, but not trained. On a GPU take one of
    [`~transformers.TorchAoConfig`]'s methods.

    Args:
        group_size (`int`, *optional*, defaults to 32):
            Number of weights that share a scale: 32, 64, 128 or 256. Layers whose width it does not divide are left as
            they are.
        modules_to_not_convert (`list[str]`, *optional*):
            Names of modules that are left as they are. By default the codec and the small layers next to the latents.
        residual_modules (`list[str]`, *optional*):
            Names of modules whose weights are the sum of two 4-bit ones, of which the second is what the first leaves. By
            default the rest of the generative head and the decoder's last projection, where 4 bits alone are half of what
            they cost in energy loss; the configuration names them once a model is quantized.
        kwargs:
            Fields of a saved configuration that others have added, which are ignored.

    Raises:
        `ValueError`: if there are no products for groups of this size.

    Example:

    ```python
    >>> from transformers_sled import SledForSpeechSynthesis, SledInt4Config

    >>> model = SledForSpeechSynthesis.from_pretrained(
    ...     "ICTNLP/SLED-TTS-Libriheavy", dtype="bfloat16", quantization_config=SledInt4Config()
    ... )
    >>> model.save_pretrained("sled-int4")
    ```
    """

    def __init__(
        self,
        group_size: int = 32,
        modules_to_not_convert: list[str] | None = None,
        residual_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if group_size not in GROUP_SIZES:
            raise ValueError(f"`group_size` must be one of {GROUP_SIZES}, got {group_size!r}.")
        self.quant_method = QUANT_METHOD
        self.group_size = group_size
        self.modules_to_not_convert = list(KEPT_MODULES if modules_to_not_convert is None else modules_to_not_convert)
        self.residual_modules = residual_modules


class SledInt4Linear(nn.Module):
    """
    A linear layer with 4-bit weights on a CPU.

    Args:
        in_features (`int`):
            Width of the inputs, a multiple of `group_size`.
        out_features (`int`):
            Width of the outputs, a multiple of 16.
        group_size (`int`):
            Number of weights that share a scale and an offset.
        num_terms (`int`, *optional*, defaults to 1):
            Number of 4-bit weights that are added up.
        bias (`nn.Parameter`, *optional*):
            The bias, which is not quantized.
        device (`torch.device`, *optional*):
            Device of the weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 32,
        num_terms: int = 1,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.num_terms = num_terms
        num_rows = num_terms * out_features
        # As the processor's product wants them. In a checkpoint two neighbours share a byte, the first in its low half.
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.zeros(num_rows, in_features // 2, dtype=torch.uint8, device=device))
        # (group, row, scale or offset); a weight is (number - 8) * scale + offset.
        self.scales_and_offsets: torch.Tensor
        self.register_buffer(
            "scales_and_offsets", torch.zeros(in_features // group_size, num_rows, 2, dtype=DTYPE, device=device)
        )
        self.bias = bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.weight.device.type != "cpu":
            raise ValueError(
                f"4-bit weights of `SledInt4Config` compute on a CPU, and these are on {self.weight.device}. On other "
                "devices use `TorchAoConfig`."
            )
        rows = input.flatten(0, -2).to(DTYPE).contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.weight, self.group_size, self.scales_and_offsets.to(DTYPE)
        ).to(input.dtype)
        if self.num_terms > 1:
            product = product.unflatten(1, (self.num_terms, self.out_features)).sum(1)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"num_terms={self.num_terms}"
        )

    def get_numbers(self) -> torch.Tensor:
        """
        Returns:
            `torch.IntTensor` of shape `(num_terms * out_features, in_features)`: the weights as whole numbers from 0 to 15.
        """
        # How bytes are laid out differs between processors; a product with ones and zeros tells on each.
        ones = torch.eye(self.in_features, dtype=DTYPE)
        plain = torch.tensor([1.0, 8.0], dtype=DTYPE).expand(self.scales_and_offsets.shape).contiguous()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(ones, self.weight, self.group_size, plain).t().int()

    def dequantize(self) -> torch.Tensor:
        """
        Returns:
            `torch.FloatTensor` of shape `(out_features, in_features)`: the weights.
        """
        scales, offsets = self.scales_and_offsets.float().repeat_interleave(self.group_size, dim=0).unbind(-1)
        terms = (self.get_numbers() - 8) * scales.t() + offsets.t()
        return terms.unflatten(0, (self.num_terms, self.out_features)).sum(0)

    # Checkpoints hold the same bytes whichever processor wrote them.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.weight.is_meta:
            numbers = self.get_numbers().to(torch.uint8)
            destination[prefix + "weight"] = numbers[:, ::2] | numbers[:, 1::2] << 4

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict and not self.weight.is_meta:
            pack_bytes_(self.weight)


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """
    Lays out 4-bit numbers as this processor's product wants them.

    Args:
        numbers (`torch.IntTensor` of shape `(out_features, in_features)`):
            Whole numbers from 0 to 15.

    Returns:
        `torch.ByteTensor` of shape `(out_features, in_features / 2)`.
    """
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)


def pack_bytes_(weight: torch.Tensor) -> None:
    """
    Lays out the bytes of a checkpoint as this processor's product wants them, in their place.

    Args:
        weight (`torch.ByteTensor` of shape `(out_features, in_features / 2)`):
            Two neighbours in a byte, the first in its low half.
    """
    # A few rows at a time, because numbers take eight times the memory on their way.
    for rows in weight.split(PACKED_ROWS):
        rows.copy_(pack(torch.stack([rows & 15, rows >> 4], dim=-1).flatten(1)))


@torch.no_grad()
def quantize_weight(weight: torch.Tensor, group_size: int, num_terms: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds 4-bit numbers for weights, and the scale and offset of every group with the least squared error: in turns the
    line through a group's weights over their numbers, and for every weight the nearest number.

    Args:
        weight (`torch.FloatTensor` of shape `(out_features, in_features)`):
            The weights.
        group_size (`int`):
            Number of weights in a row that share a scale and an offset.
        num_terms (`int`, *optional*, defaults to 1):
            Number of 4-bit weights that are added up, each of which is fitted to what those before it leave.

    Returns:
        `tuple(torch.IntTensor, torch.BFloat16Tensor)`: the numbers `(num_terms * out_features, in_features)`, term after
        term, and scales and offsets `(in_features / group_size, num_terms * out_features, 2)`.
    """
    numbers, lines = [], []
    rest = weight.float()
    for _ in range(num_terms):
        term_numbers, term_lines = _fit_term(rest, group_size)
        scales, offsets = term_lines.float().repeat_interleave(group_size, dim=0).unbind(-1)
        rest = rest - ((term_numbers - 8) * scales.t() + offsets.t())
        numbers.append(term_numbers)
        lines.append(term_lines)
    return torch.cat(numbers), torch.cat(lines, dim=1)


def _fit_term(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    in_features = weight.shape[1]
    numbers, lines = [], []
    for rows in weight.split(max(1, _FIT_SIZE // in_features)):
        groups = rows.unflatten(1, (-1, group_size))
        lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales = ((highest - lowest) / 15).clamp(min=torch.finfo(torch.float32).tiny)
        offsets = lowest + 8 * scales
        means = groups.mean(-1, keepdim=True)
        best = (torch.full_like(scales, torch.inf), scales, offsets)
        for _ in range(FIT_ROUNDS + 1):
            # With what is kept of them.
            scales, offsets = scales.to(DTYPE).float(), offsets.to(DTYPE).float()
            centred = _find_numbers(groups, scales, offsets) - 8
            errors = (centred * scales + offsets - groups).square().sum(-1, keepdim=True)
            is_better = errors < best[0]
            best = (
                torch.where(is_better, errors, best[0]),
                torch.where(is_better, scales, best[1]),
                torch.where(is_better, offsets, best[2]),
            )
            centre = centred.mean(-1, keepdim=True)
            spread = (centred - centre).square().sum(-1, keepdim=True)
            slope = ((centred - centre) * (groups - means)).sum(-1, keepdim=True) / spread.clamp(min=1e-12)
            scales = torch.where(slope > 0, slope, scales)
            offsets = means - scales * centre
        _, scales, offsets = best
        numbers.append(_find_numbers(groups, scales, offsets).flatten(1).int())
        lines.append(torch.cat([scales, offsets], dim=-1))
    return torch.cat(numbers), torch.cat(lines).transpose(0, 1).contiguous().to(DTYPE)


def _find_numbers(groups: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    # A scale that is too small for its type leaves a group of one value, which is its offset.
    steps = (groups - offsets) / torch.where(scales == 0, 1, scales)
    return (steps.round() + 8).clamp(0, 15)


class SledInt4Quantize(ConversionOps):
    """Quantizes a weight while it is loaded."""

    def __init__(self, quantizer: "SledInt4Quantizer") -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None and full_layer_name is not None
        ((_, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        path = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(path)
        assert isinstance(layer, SledInt4Linear)
        numbers, lines = quantize_weight(weight, layer.group_size, layer.num_terms)
        if missing_keys is not None:
            missing_keys.discard(f"{path}.scales_and_offsets")
        return {full_layer_name: pack(numbers), f"{path}.scales_and_offsets": lines}


@register_quantizer(QUANT_METHOD)
class SledInt4Quantizer(HfQuantizer):
    """What `from_pretrained` does with a [`SledInt4Config`]."""

    quantization_config: SledInt4Config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            `ValueError`: if a device other than the CPU is asked for.
        """
        device_map = kwargs.get("device_map") or {}
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(str(device) != "cpu" for device in devices):
            raise ValueError(
                f"`quantization_config` is a `SledInt4Config`, whose products run on a CPU, but `device_map` is "
                f"{device_map!r}. Leave it out, or take a `TorchAoConfig`."
            )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name == "weight" and isinstance(model.get_submodule(path), SledInt4Linear)

    def get_quantize_ops(self) -> SledInt4Quantize:
        return SledInt4Quantize(self)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.residual_modules is None:
            last_layer = model.config.num_hidden_layers - 1
            config.residual_modules = ["generative_head", f"model.layers.{last_layer}.mlp.down_proj"]
        for path, layer in list(model.named_modules()):
            if (
                isinstance(layer, nn.Linear)
                and layer.in_features % config.group_size == 0
                and layer.out_features % ROW_MULTIPLE == 0
                and should_convert_module(path, config.modules_to_not_convert)
            ):
                weight = layer.weight
                num_terms = 1 if should_convert_module(path, config.residual_modules) else 2
                replacement = SledInt4Linear(
                    layer.in_features, layer.out_features, config.group_size, num_terms, layer.bias, weight.device
                )
                if not self.pre_quantized:
                    # Until it is quantized: what is read is cast to the type of what it is for.
                    replacement.weight = weight.detach()
                model.set_submodule(path, replacement)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for layer in model.modules():
            if isinstance(layer, SledInt4Linear):
                layer.requires_grad_(False)
                if self.pre_quantized:
                    pack_bytes_(layer.weight)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def get_quantization_config(name: str) -> QuantizationConfigMixin:
    """
    The configuration that a command's `--quantization` stands for.

    Args:
        name (`str`):
            `"int4"` for [`SledInt4Config`], or `"int8"` for the 8-bit weights of torchao, which pay where the step is
            compiled.

    Returns:
        `QuantizationConfigMixin`: the configuration, for `from_pretrained`.

    Raises:
        `ValueError`: if there is no such method, or its package is missing.
    """
    if name == "int4":
        return SledInt4Config()
    if name != "int8":
        raise ValueError(f"`quantization` must be 'int4' or 'int8', got {name!r}.")
    try:
        # An optional package.
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError("int8 needs torchao: `pip install 'transformers-sled[quantization]'`.") from error
    return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=["codec", "eos_head"])


__all__ = ["SledInt4Config", "SledInt4Linear", "SledInt4Quantizer", "get_quantization_config", "quantize_weight"]
