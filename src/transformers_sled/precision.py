"""What a model is loaded in where nothing else is asked for: what has been measured to be the fastest on such a machine."""

from dataclasses import dataclass
from typing import Any

import torch

from .configuration_sled import SledConfig
from .quantization_sled import get_quantization_config


# Linear weights of fewer numbers than this are in the processor's cache in any precision, and products are no slower.
MIN_LARGE_WEIGHTS = 32_000_000

# Texts at a time up to which products with 4-bit weights, whose time grows with every row, are faster than in bfloat16.
MAX_INT4_STREAMS = 4


@dataclass(frozen=True)
class Precision:
    """
    What a model is loaded in.

    Args:
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision, `"auto"` for that of the checkpoint.
        quantization (`str`, *optional*):
            Weights in `"int4"` or `"int8"`.
    """

    dtype: str = "auto"
    quantization: str | None = None

    def __str__(self) -> str:
        dtype = "the checkpoint's precision" if self.dtype == "auto" else self.dtype
        return dtype if self.quantization is None else f"{dtype} with {self.quantization} weights"

    def get_loading_arguments(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: arguments of `from_pretrained`.

        Raises:
            `ValueError`: if there is no such quantization, or its package is missing.
        """
        arguments: dict[str, Any] = {"dtype": self.dtype}
        if self.quantization is not None:
            arguments["quantization_config"] = get_quantization_config(self.quantization)
        return arguments


def choose_precision(config: SledConfig, device: str, num_streams: int, quantizes: bool = True) -> Precision:
    r"""
    Chooses what a model is loaded in: on a CPU whose products in bfloat16 are fast 4-bit weights for few streams and
    bfloat16 for many; on a GPU bfloat16; what the checkpoint is in for a small or quantized model and on other machines.

    Args:
        config ([`SledConfig`]):
            The checkpoint's configuration.
        device (`str`):
            Where it computes.
        num_streams (`int`):
            Number of texts that are spoken at a time at most.
        quantizes (`bool`, *optional*, defaults to `True`):
            Whether it speaks for long enough to make up for the time that quantizing takes.

    Returns:
        [`Precision`]: the choice.

    Example:

    ```python
    >>> choose_precision(SledConfig(), "cuda", num_streams=64)
    Precision(dtype='bfloat16', quantization=None)

    ```
    """
    if getattr(config, "quantization_config", None) is not None or _count_weights(config) < MIN_LARGE_WEIGHTS:
        return Precision()
    kind = device.partition(":")[0]
    if kind == "cuda":
        return Precision("bfloat16")
    # The public `torch.cpu.get_capabilities` is newer than the oldest PyTorch that is supported.
    if kind == "cpu" and torch.cpu._is_avx512_bf16_supported():
        is_int4 = quantizes and num_streams <= MAX_INT4_STREAMS
        return Precision("bfloat16", "int4" if is_int4 else None)
    return Precision()


def _count_weights(config: SledConfig) -> int:
    """Weights of the linear layers, which every frame multiplies by."""
    size, width = config.hidden_size, config.head_hidden_size
    key_size = size // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * size * size + 2 * size * key_size + 3 * size * config.intermediate_size
    return config.num_hidden_layers * layer + config.head_num_layers * 5 * width * width


__all__ = ["Precision", "choose_precision"]
