"""
The codec, EnCodec, in float32: audio to codes and latents, latents to audio, whole or as they come.

What it computes here is matrix products in float32 outside of autocast, which PyTorch computes exactly unless the user asks
otherwise (`torch.set_float32_matmul_precision`); convolutions and recurrent layers would round to TF32 on GPUs by default.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import EncodecConfig, EncodecModel
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecDecoder,
    EncodecEncoder,
    EncodecLSTM,
    EncodecResnetBlock,
)
from transformers.utils import CONFIG_NAME

from .pauses_sled import SledPauseLimiter


# A layer takes (batch, time, channels) and the state of the signal, which it updates, and returns the same layout.
_Layer = Callable[[Tensor, list[Tensor]], Tensor]

# Frames that pass through the layers at once, which bounds the memory that a long signal takes.
_BLOCK_FRAMES = 64

# Rows times steps from which `torch.lstm`, which repacks its weights at every call, is the faster one on CPU.
_MIN_STEPS_TO_REPACK = 32


def check_codec_config(config: EncodecConfig) -> None:
    """
    Checks that a codec can turn latents into audio and back as they come: mono, causal, without normalization of whole
    utterances.

    Args:
        config ([`~transformers.EncodecConfig`]):
            The codec's configuration.

    Raises:
        `ValueError`: naming the field that rules the codec out.
    """
    accepted_values: dict[str, tuple] = {
        "use_causal_conv": (True,),
        "norm_type": ("weight_norm",),
        "trim_right_ratio": (1.0,),
        "pad_mode": ("reflect", "constant"),
        "audio_channels": (1,),
        "normalize": (False,),
        "chunk_length_s": (None,),
    }
    for field, accepted in accepted_values.items():
        value = getattr(config, field)
        if value not in accepted:
            raise ValueError(
                f"`codec` cannot decode speech as it comes: `{field}` of its configuration must be "
                f"{' or '.join(map(repr, accepted))}, got {value!r}."
            )


def _check_codec(codec: EncodecModel) -> None:
    if not isinstance(codec, EncodecModel):
        raise ValueError(f"`codec` must be an `EncodecModel`, got {type(codec).__name__}.")
    check_codec_config(codec.config)
    if codec.dtype != torch.float32:
        raise ValueError(f"`codec` must be in torch.float32, got {codec.dtype}.")


def check_bandwidth(config: EncodecConfig, bandwidth: float, name: str = "bandwidth") -> None:
    """
    Checks that a codec works at a bandwidth.

    Args:
        config ([`~transformers.EncodecConfig`]):
            The codec's configuration.
        bandwidth (`float`):
            In kilobits a second.
        name (`str`, *optional*, defaults to `"bandwidth"`):
            What the bandwidth is called where it was given.

    Raises:
        `ValueError`: if it is not one of the codec's.
    """
    if bandwidth not in config.target_bandwidths:
        raise ValueError(f"`{name}` is {bandwidth} kbit/s, but `codec` works at {list(config.target_bandwidths)}.")


def _describe_tensor(value: Any) -> str:
    return f"shape {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


class SledCodec(EncodecModel):
    """EnCodec, frozen and always in float32, whatever happens to the model around it."""

    def __init__(self, config: EncodecConfig) -> None:
        check_codec_config(config)
        super().__init__(config)
        # It may have been built under another default dtype.
        super()._apply(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
        self.requires_grad_(False)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The codec has no attention, so a choice made for the whole model does not concern it."""
        return "eager"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SledCodec:
        # `.to()`, `.half()` and their like all go through here; a round trip through a lower precision would lose bits.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.is_floating_point() and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)

    def __reduce__(self) -> tuple[Any, ...]:
        # PyTorch refuses to pickle the modules of normalized weights, and a model with them.
        return _rebuild_codec, (self.config, self.state_dict(), self.training)


def _rebuild_codec(config: EncodecConfig, weights: dict[str, Tensor], training: bool) -> SledCodec:
    codec = SledCodec(config)
    codec.load_state_dict(weights, assign=True)
    return codec.train(training).requires_grad_(False)


def copy_codec(codec: EncodecModel) -> SledCodec:
    """
    Copies a codec.

    Args:
        codec ([`~transformers.EncodecModel`]):
            A codec in float32.

    Returns:
        [`SledCodec`]: the copy, frozen.

    Raises:
        `ValueError`: if it is no codec, cannot be streamed, or is not in float32.
    """
    _check_codec(codec)
    copied = SledCodec(copy.deepcopy(codec.config))
    copied.load_state_dict(codec.state_dict())
    return copied


def load_codec(codec: EncodecModel | str | Path | None, **hub_kwargs: Any) -> SledCodec:
    """
    Loads a codec.

    Args:
        codec ([`~transformers.EncodecModel`], `str` or `Path`):
            A codec to copy, or the repository or folder of one.
        hub_kwargs:
            `cache_dir`, `token` and their like, as [`~transformers.PreTrainedModel.from_pretrained`] takes them.

    Returns:
        [`SledCodec`]: the codec, frozen and in float32.

    Raises:
        `ValueError`: if it is no codec, cannot be streamed, or lacks weights.
        `OSError`: if it cannot be found.
    """
    if isinstance(codec, EncodecModel):
        return copy_codec(codec)
    if not isinstance(codec, str | Path):
        raise ValueError(
            f"`codec` must be an `EncodecModel`, a repository or a folder, got {type(codec).__name__}. The checkpoint "
            "holds no codec and its `codec_id` names none."
        )
    try:
        config_dict, _ = EncodecConfig.get_config_dict(codec, **hub_kwargs)
        if not config_dict:
            raise ValueError(f"`codec` must be an EnCodec, but {str(codec)!r} has no `{CONFIG_NAME}`.")
        if config_dict.get("model_type") != "encodec":
            raise ValueError(
                f"`codec` must be an EnCodec, but {str(codec)!r} has the `model_type` {config_dict.get('model_type')!r}."
            )
        model, loading_info = SledCodec.from_pretrained(
            codec, dtype=torch.float32, output_loading_info=True, **hub_kwargs
        )
        if loading_info["missing_keys"]:
            raise ValueError(
                f"`codec` {str(codec)!r} is incomplete: {len(loading_info['missing_keys'])} weights are missing."
            )
        return model
    except OSError as error:
        raise OSError(
            f"The codec {str(codec)!r} could not be loaded. There are three ways to provide it: (1) let it be downloaded "
            f"once while the Hub is reachable, for example with `hf download {codec}`; (2) pass `codec=` a local folder "
            "or an `EncodecModel`; (3) save a checkpoint that holds its codec with `model.save_pretrained(...)` where it "
            "is at hand, and load that one."
        ) from error


def get_execution_device(module: nn.Module) -> torch.device:
    """
    Device that a module computes on.

    Args:
        module (`torch.nn.Module`):
            A module with weights of its own.

    Returns:
        `torch.device`: where its weights are, or, where accelerate keeps them elsewhere between calls, where they go.
    """
    # accelerate has no public way to ask; its hooks stand in `_hf_hook`, several in one's `hooks`.
    own_hook = getattr(module, "_hf_hook", None)
    for hook in getattr(own_hook, "hooks", [own_hook]):
        if getattr(hook, "offload", False):
            device = hook.execution_device
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(module.parameters()).device


@contextlib.contextmanager
def _weights_at_hand(module: nn.Module) -> Iterator[None]:
    """The module's weights on the device where it runs, also where accelerate keeps them elsewhere between calls."""
    with contextlib.ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


def _without_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


class _CausalConv:
    """`EncodecConv1d` with state, as a matrix product over (batch, time, channels).

    On a few time steps that is several times as fast on CPU as `conv1d`, which repacks its weights at every call.
    """

    def __init__(self, weight: Tensor, bias: Tensor, state: list[Tensor], stride: int, dilation: int, reflect: bool):
        # (out_channels, kernel_size, in_channels)
        self.weight = weight.flatten(1).contiguous()
        self.bias = bias
        self.stride = stride
        self.taps = range(0, weight.shape[1] * dilation, dilation)
        self.padding = self.taps[-1] + 1 - stride
        self.reflect = reflect
        # The last `padding` inputs; none yet where they have to be reflected from the first ones.
        self.state_idx = len(state)
        state.append(weight.new_zeros(1, 0 if reflect else self.padding, weight.shape[2]))

    def __call__(self, hidden_states: Tensor, state: list[Tensor]) -> Tensor:
        length = hidden_states.shape[1]
        if self.padding > 0:
            past = state[self.state_idx]
            if past.shape[1] == 0:
                # A signal shorter than its padding is reflected as if zeros followed it, as EncodecConv1d does.
                past = hidden_states[:, 1 : self.padding + 1].flip(1)
                past = F.pad(past, (0, 0, self.padding - past.shape[1], 0))
            hidden_states = torch.cat([past, hidden_states], dim=1)
            # A copy, because a view would keep the whole input in memory.
            state[self.state_idx] = hidden_states[:, length:].clone()
        if len(self.taps) > 1:
            taps = [hidden_states[:, start : start + length : self.stride] for start in self.taps]
            hidden_states = torch.cat(taps, dim=-1)
        return F.linear(hidden_states, self.weight, self.bias)


class _CausalConvTranspose:
    """`EncodecConvTranspose1d` trimmed on the right only, which is a causal convolution to `stride` samples a step.

    What the kernel adds to the samples of later steps is carried as the inputs that it comes from.
    """

    def __init__(self, weight: Tensor, bias: Tensor, state: list[Tensor], stride: int):
        self.out_channels = weight.shape[1]
        # A transposed matrix is copied several times as fast as more permuted dimensions are.
        kernel = weight.flatten(1).t().contiguous().view(self.out_channels, -1, stride, weight.shape[0])
        # (stride * out_channels, taps, in_channels); the latest input meets the first part of the kernel.
        taps = kernel.flip(1).permute(2, 0, 1, 3).flatten(0, 1)
        self.conv = _CausalConv(taps, bias.repeat(stride), state, stride=1, dilation=1, reflect=False)

    def __call__(self, hidden_states: Tensor, state: list[Tensor]) -> Tensor:
        return self.conv(hidden_states, state).view(hidden_states.shape[0], -1, self.out_channels)


class _LSTM:
    """`EncodecLSTM` with state."""

    def __init__(self, lstm: nn.LSTM, state: list[Tensor]):
        # For each layer the weights of inputs and of the hidden state, and their biases.
        self.weights = [[weight.detach() for weight in weights] for weights in lstm.all_weights]
        self.state_idx = len(state)
        # Hidden and cell state, rows first as all states here.
        state += [self.weights[0][0].new_zeros(1, lstm.num_layers, lstm.hidden_size) for _ in range(2)]

    def _step_by_step(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last_hidden, last_cell = [], []
        for weights, h, c in zip(self.weights, hidden, cell, strict=True):
            outputs = []
            if inputs.device.type == "cpu":
                input_weight, hidden_weight, input_bias, hidden_bias = weights
                for gates in F.linear(inputs, input_weight, input_bias + hidden_bias):
                    input_gate, forget_gate, candidate, output_gate = torch.addmm(gates, h, hidden_weight.t()).chunk(
                        4, 1
                    )
                    c = forget_gate.sigmoid() * c + input_gate.sigmoid() * candidate.tanh()
                    h = output_gate.sigmoid() * c.tanh()
                    outputs.append(h)
            else:
                # Two products and one fused kernel, where each operation has to be launched.
                for step in inputs:
                    h, c = torch.lstm_cell(step, (h, c), *weights)
                    outputs.append(h)
            inputs = torch.stack(outputs)
            last_hidden.append(h)
            last_cell.append(c)
        return inputs, torch.stack(last_hidden), torch.stack(last_cell)

    def __call__(self, hidden_states: Tensor, state: list[Tensor]) -> Tensor:
        inputs = hidden_states.transpose(0, 1)
        hidden, cell = (tensor.transpose(0, 1).contiguous() for tensor in state[self.state_idx : self.state_idx + 2])
        if inputs.device.type == "cpu" and inputs.shape[0] * inputs.shape[1] > _MIN_STEPS_TO_REPACK:
            weights = [weight for layer in self.weights for weight in layer]
            outputs, hidden, cell = torch.lstm(
                inputs, (hidden, cell), weights, True, len(self.weights), 0.0, False, False, False
            )
        else:
            outputs, hidden, cell = self._step_by_step(inputs, hidden, cell)
        state[self.state_idx : self.state_idx + 2] = [hidden.transpose(0, 1), cell.transpose(0, 1)]
        return outputs.transpose(0, 1) + hidden_states


class _ResnetBlock:
    """`EncodecResnetBlock` with state."""

    def __init__(self, convs: list[_CausalConv], shortcut: _CausalConv | None):
        self.convs = convs
        self.shortcut = shortcut

    def __call__(self, hidden_states: Tensor, state: list[Tensor]) -> Tensor:
        residual = hidden_states if self.shortcut is None else self.shortcut(hidden_states, state)
        for conv in self.convs:
            hidden_states = conv(F.elu(hidden_states), state)
        return residual + hidden_states


def _elu(hidden_states: Tensor, state: list[Tensor]) -> Tensor:
    return F.elu(hidden_states)


class _Network:
    """The encoder or the decoder of a codec with state, and with its weights as they are when it is made."""

    @torch.no_grad()
    def __init__(self, network: EncodecEncoder | EncodecDecoder, input_steps: int):
        # Steps of a frame, going in and coming out.
        self.input_steps = input_steps
        self.layers: list[_Layer] = []
        # Of one row, before its first frame.
        self.initial_state: list[Tensor] = []
        # Frames that the first outputs need, to be reflected.
        self.first_frames = 1
        self.output_channels = 0
        steps = Fraction(input_steps)

        def causal_conv(module: EncodecConv1d) -> _CausalConv:
            weight, bias = module.conv.weight.transpose(1, 2), module.conv.bias.detach()
            reflect = module.pad_mode == "reflect"
            stride, dilation = module.conv.stride[0], module.conv.dilation[0]
            conv = _CausalConv(weight, bias, self.initial_state, stride, dilation, reflect)
            if reflect and conv.padding > 0:
                self.first_frames = max(self.first_frames, math.ceil((conv.padding + 1) / steps))
            self.output_channels = len(bias)
            return conv

        with _weights_at_hand(network), _without_autocast(next(network.parameters()).device):
            for module in network.layers:
                if isinstance(module, EncodecConv1d):
                    self.layers.append(causal_conv(module))
                    steps /= module.conv.stride[0]
                elif isinstance(module, EncodecLSTM):
                    self.layers.append(_LSTM(module.lstm, self.initial_state))
                elif isinstance(module, EncodecConvTranspose1d):
                    weight, bias, stride = module.conv.weight, module.conv.bias.detach(), module.conv.stride[0]
                    self.layers.append(_CausalConvTranspose(weight, bias, self.initial_state, stride))
                    steps *= stride
                elif isinstance(module, EncodecResnetBlock):
                    convs = [causal_conv(layer) for layer in module.block if isinstance(layer, EncodecConv1d)]
                    shortcut = None if isinstance(module.shortcut, nn.Identity) else causal_conv(module.shortcut)
                    self.layers.append(_ResnetBlock(convs, shortcut))
                elif isinstance(module, nn.ELU):
                    self.layers.append(_elu)
                else:
                    raise ValueError(f"`codec` has a layer that cannot be streamed: {type(module).__name__}.")
        self.output_steps = int(steps)
        self.block_frames = max(_BLOCK_FRAMES, self.first_frames)

    @property
    def device(self) -> torch.device:
        return self.initial_state[0].device

    def get_initial_state(self, batch_size: int) -> list[Tensor]:
        # Layers replace their states and never write into them.
        return [tensor.expand(batch_size, -1, -1) for tensor in self.initial_state]

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, state: list[Tensor]) -> Tensor:
        with _without_autocast(hidden_states.device):
            for layer in self.layers:
                hidden_states = layer(hidden_states, state)
        return hidden_states

    def run_rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Runs rows `(frames * input_steps, channels)` of any lengths, each as it would run alone, block by block."""
        num_frames = [len(row) // self.input_steps for row in rows]
        outputs = [
            self.initial_state[0].new_empty(length * self.output_steps, self.output_channels) for length in num_frames
        ]
        # A row shorter than what is reflected sees its own end there, so it goes with rows of its length only.
        groups: dict[int, list[int]] = {}
        for index in sorted(range(len(rows)), key=lambda index: -num_frames[index]):
            groups.setdefault(min(num_frames[index], self.first_frames), []).append(index)
        for group in groups.values():
            state = self.get_initial_state(len(group))
            for start in range(0, num_frames[group[0]], self.block_frames):
                group = [index for index in group if num_frames[index] > start]
                state = [tensor[: len(group)] for tensor in state]
                ends = [min(num_frames[index], start + self.block_frames) for index in group]
                pieces = [
                    rows[index][start * self.input_steps : end * self.input_steps].to(self.device, torch.float32)
                    for index, end in zip(group, ends, strict=True)
                ]
                block = self(pad_sequence(pieces, batch_first=True), state)
                for index, end, output in zip(group, ends, block, strict=True):
                    piece = slice(start * self.output_steps, end * self.output_steps)
                    outputs[index][piece] = output[: piece.stop - piece.start]
        return outputs


@dataclass
class _SharedWeight:
    """What a weight was when a decoder was made of it. Its values are held, so that no others come to their address."""

    parameter: Tensor
    values: Tensor
    version: int

    def is_still(self, parameter: Tensor) -> bool:
        return (
            parameter is self.parameter
            and parameter.data_ptr() == self.values.data_ptr()
            and parameter._version == self.version
        )


class _SharedDecoders:
    """The decoders of codecs, made anew after their weights have changed: preparing them takes as long as some frames."""

    def __init__(self) -> None:
        self._networks: WeakKeyDictionary[nn.Module, tuple[list[_SharedWeight], _Network]] = WeakKeyDictionary()

    def get(self, codec: EncodecModel) -> _Network:
        parameters = list(codec.decoder.parameters())
        if any(parameter.is_meta or parameter.is_inference() for parameter in parameters):
            # Weights that are elsewhere between calls are not to stay, and those of inference mode count no changes.
            return _Network(codec.decoder, 1)
        if codec.decoder in self._networks:
            weights, network = self._networks[codec.decoder]
            if len(weights) == len(parameters) and all(map(_SharedWeight.is_still, weights, parameters)):
                return network
        weights = [_SharedWeight(parameter, parameter.detach(), parameter._version) for parameter in parameters]
        network = _Network(codec.decoder, 1)
        self._networks[codec.decoder] = (weights, network)
        return network


_decoders = _SharedDecoders()


def encode_codes(codec: EncodecModel, waveforms: Sequence[Tensor], bandwidth: float) -> list[Tensor]:
    """
    Turns waveforms of any lengths into codes. Each gets the codes that it would get alone.

    Args:
        codec ([`~transformers.EncodecModel`]):
            A codec in float32, as [`SledStreamingDecoder`] takes it.
        waveforms (sequence of `torch.FloatTensor` of shape `(samples,)`):
            Mono audio at the codec's sampling rate. A last frame that is not full is completed with silence.
        bandwidth (`float`):
            One of the codec's `target_bandwidths`, in kilobits a second.

    Returns:
        `list[torch.LongTensor]`: codes of shape `(codebooks, frames)` for each waveform, on the codec's device.

    Raises:
        `ValueError`: if the codec cannot be used, has no such bandwidth, or a waveform is of another shape or type.

    Example:

    ```python
    >>> import torch
    >>> from transformers import EncodecConfig, EncodecModel
    >>> from transformers_sled.codec_sled import decode_codes, decode_latents, encode_codes

    >>> codec = EncodecModel(EncodecConfig()).eval()
    >>> codes = encode_codes(codec, [torch.randn(24_000), torch.randn(7_000)], bandwidth=6.0)
    >>> [tuple(row.shape) for row in codes]
    [(8, 75), (8, 22)]
    >>> latents = [decode_codes(codec, row[None])[0] for row in codes]
    >>> [len(waveform) for waveform in decode_latents(codec, latents)]
    [24000, 7040]

    ```
    """
    _check_codec(codec)
    check_bandwidth(codec.config, bandwidth)
    for waveform in waveforms:
        if not isinstance(waveform, Tensor) or waveform.ndim != 1 or not waveform.is_floating_point():
            raise ValueError(
                f"`waveforms` must hold floating tensors of shape (samples,), got {_describe_tensor(waveform)}."
            )
    hop_length = codec.config.hop_length
    rows = [F.pad(waveform.detach(), (0, -len(waveform) % hop_length))[:, None] for waveform in waveforms]
    encoded = _Network(codec.encoder, hop_length).run_rows(rows)
    with torch.no_grad(), _weights_at_hand(codec.quantizer):
        return [_quantize(codec, row, bandwidth) for row in encoded]


def _quantize(codec: EncodecModel, embeddings: Tensor, bandwidth: float) -> Tensor:
    """Codes `(codebooks, frames)` of a row, block by block: each compares its frames with all entries of a codebook."""
    with _without_autocast(embeddings.device):
        blocks = [
            codec.quantizer.encode(block.t()[None], bandwidth)[:, 0] for block in embeddings.split(_BLOCK_FRAMES)
        ]
    return torch.cat(blocks, dim=1)


def decode_codes(codec: EncodecModel, audio_codes: Tensor) -> Tensor:
    """
    Looks codes up in the codebooks.

    Args:
        codec ([`~transformers.EncodecModel`]):
            A codec in float32.
        audio_codes (`torch.LongTensor` of shape `(batch_size, codebooks, frames)`):
            Codes of the first so many codebooks.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, frames, hidden_size)`: latents in float32 on the codec's device, the
        sums of the codebook vectors.

    Raises:
        `ValueError`: if there are more codebooks than the codec has, or a code is not an entry of its codebook.
    """
    _check_codec(codec)
    num_codebooks, size = codec.quantizer.num_quantizers, codec.quantizer.codebook_size
    if not isinstance(audio_codes, Tensor) or audio_codes.ndim != 3 or not 1 <= audio_codes.shape[1] <= num_codebooks:
        raise ValueError(
            f"`audio_codes` must be of shape (batch_size, up to {num_codebooks} codebooks, frames), got "
            f"{_describe_tensor(audio_codes)}."
        )
    if audio_codes.is_floating_point() or audio_codes.is_complex() or audio_codes.dtype == torch.bool:
        raise ValueError(f"`audio_codes` must hold integers, got {audio_codes.dtype}.")
    with torch.no_grad(), _weights_at_hand(codec.quantizer):
        codebooks = [layer.codebook.embed for layer in codec.quantizer.layers[: audio_codes.shape[1]]]
        codes = audio_codes.to(codebooks[0].device, torch.long)
        if codes.numel() > 0 and not 0 <= codes.min() <= codes.max() < size:
            raise ValueError(
                f"`audio_codes` must be from 0 to {size - 1}, got {int(codes.min())} to {int(codes.max())}."
            )
        latents = codebooks[0].new_zeros(codes.shape[0], codes.shape[2], codebooks[0].shape[1])
        for codebook, indices in zip(codebooks, codes.unbind(1), strict=True):
            latents += F.embedding(indices, codebook)
        return latents


def decode_latents(codec: EncodecModel, latents: Sequence[Tensor]) -> list[Tensor]:
    """
    Turns latents of any lengths into audio with the codec's decoder, without its quantizer. The rows are decoded side by
    side, each as it would be alone, and block by block: beyond the audio itself, long speech takes no more memory than
    short speech.

    Args:
        codec ([`~transformers.EncodecModel`]):
            A codec in float32, as [`SledStreamingDecoder`] takes it.
        latents (sequence of `torch.FloatTensor` of shape `(frames, latent_dim)`):
            Speech latents, of any floating type, on any device.

    Returns:
        `list[torch.FloatTensor]`: waveforms of shape `(frames * hop_length,)` in float32 on the codec's device.

    Raises:
        `ValueError`: if the codec cannot be used, or latents are of another shape or type.
    """
    _check_codec(codec)
    width = codec.config.hidden_size
    for row in latents:
        if not isinstance(row, Tensor) or row.ndim != 2 or row.shape[1] != width or not row.is_floating_point():
            raise ValueError(
                f"`latents` must hold floating tensors of shape (frames, {width}), got {_describe_tensor(row)}."
            )
    return [waveform[:, 0] for waveform in _decoders.get(codec).run_rows([row.detach() for row in latents])]


class SledStreamingDecoder:
    r"""
    Decodes EnCodec latents to audio as they come, in any portions, to the waveform that the codec's decoder makes of all
    latents at once. What the decoder's layers need of the past is carried from call to call: the last inputs of each
    convolution and the LSTM's state. The past is never decoded again, nothing is cross-faded, and the state does not
    grow.

    With reflect padding, as released, the first samples depend on the first few frames
    ([`~SledStreamingDecoder.frames_to_start`], 7 in the released codec), which are held back until then. After that,
    every frame gives its `hop_length` samples at once. Streaming by layers with a past is described in
    [High Fidelity Neural Audio Compression](https://huggingface.co/papers/2210.13438), section 3.1.

    The codec is not changed and may be shared by any number of decoders. A decoder holds the weights as they are when
    it is made: make a new one after the codec has been changed or moved to another device. Always runs in float32, also
    under autocast, and records no gradients.

    Args:
        codec ([`~transformers.EncodecModel`]):
            A mono codec in float32 with causal convolutions, such as `facebook/encodec_24khz`.
        batch_size (`int`, *optional*, defaults to 1):
            Number of rows that are decoded side by side.

    Raises:
        `ValueError`: if the codec cannot be streamed, naming the field of its configuration that rules it out.

    Example:

    ```python
    >>> import torch
    >>> from transformers import EncodecConfig, EncodecModel
    >>> from transformers_sled import SledStreamingDecoder

    >>> codec = EncodecModel(EncodecConfig()).eval()
    >>> latents = torch.randn(1, 20, codec.config.hidden_size)
    >>> decoder = SledStreamingDecoder(codec)
    >>> portions = [decoder.decode(latents[:, :9]), decoder.decode(latents[:, 9:]), decoder.finish()]
    >>> [portion.shape[1] // codec.config.hop_length for portion in portions]
    [9, 11, 0]
    >>> with torch.no_grad():
    ...     waveform = codec.decoder(latents.transpose(1, 2))[:, 0]
    >>> torch.allclose(torch.cat(portions, dim=1), waveform, atol=1e-5)
    True

    ```
    """

    def __init__(self, codec: EncodecModel, batch_size: int = 1):
        _check_codec(codec)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        self.codec = codec
        self._network = _decoders.get(codec)
        self._state = self._network.get_initial_state(batch_size)
        self._held = self._state[0].new_zeros(batch_size, 0, codec.config.hidden_size)
        self._is_started = self._is_finished = False

    @property
    def batch_size(self) -> int:
        """Number of rows (`int`)."""
        return self._held.shape[0]

    @property
    def frames_to_start(self) -> int:
        """Number of frames (`int`) that [`~SledStreamingDecoder.decode`] still needs to return its first samples."""
        return 0 if self._is_started else self._network.first_frames - self._held.shape[1]

    def _check(self, latents: Tensor) -> None:
        if self._is_finished:
            raise RuntimeError("Frames came after `finish`; a new signal needs a new decoder.")
        expected = (self.batch_size, self._held.shape[2])
        if not isinstance(latents, Tensor) or latents.ndim != 3 or (latents.shape[0], latents.shape[2]) != expected:
            got = f"shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"`latents` must be a tensor of shape ({expected[0]}, frames, {expected[1]}), got {got}.")
        if not latents.is_floating_point():
            raise ValueError(f"`latents` must be of a floating type, got {latents.dtype}.")

    def decode(self, latents: Tensor) -> Tensor:
        r"""
        Decodes the next frames.

        Args:
            latents (`torch.FloatTensor` of shape `(batch_size, frames, latent_dim)`):
                Any number of frames, 0 included. Of any floating type, on any device.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, samples)`: the audio in float32 on the codec's device. `samples`
            is `frames * hop_length`, except that the first frames may be held back and come out later.

        Raises:
            `ValueError`: if `latents` has another shape or is not of a floating type.
            `RuntimeError`: after [`~SledStreamingDecoder.finish`].
        """
        self._check(latents)
        latents = torch.cat([self._held, latents.detach().to(self._held)], dim=1)
        if not self._is_started and latents.shape[1] < self._network.first_frames:
            self._held = latents
            return latents.new_zeros(self.batch_size, 0)
        return self._run(latents)

    def finish(self) -> Tensor:
        r"""
        Ends the signal and decodes the frames that are still held back, which are there only if the whole signal is
        shorter than the codec's padding.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, samples)`: the rest of the audio, with which every frame has given
            `hop_length` samples.

        Raises:
            `RuntimeError`: if the decoder is finished already.
        """
        if self._is_finished:
            raise RuntimeError("`finish` was called twice; make a new decoder for a new signal.")
        waveform = self._run(self._held)
        self._is_finished = True
        return waveform

    def _run(self, latents: Tensor) -> Tensor:
        waveforms = [latents.new_zeros(self.batch_size, 0)]
        self._held = latents.new_zeros(self.batch_size, 0, latents.shape[2])
        if latents.shape[1] > 0:
            self._is_started = True
            for block in latents.split(self._network.block_frames, dim=1):
                waveforms.append(self._network(block, self._state)[:, :, 0])
        return torch.cat(waveforms, dim=1)

    def _with_rows(self, held: Tensor, state: list[Tensor]) -> SledStreamingDecoder:
        decoder = copy.copy(self)
        decoder._held, decoder._state = held, state
        return decoder

    def select_rows(self, indices: Sequence[int]) -> SledStreamingDecoder:
        r"""
        Some of the rows, in any order, as a decoder of their own that goes on from the same point in time. This decoder
        is left as it is.

        Args:
            indices (`Sequence[int]`):
                The rows to take. Rows that are not named are not part of the new decoder.

        Returns:
            [`SledStreamingDecoder`]: a decoder of `len(indices)` rows.

        Raises:
            `ValueError`: if `indices` is empty, a mask, or names a row that does not exist.
        """
        rows = torch.as_tensor(indices)
        if rows.ndim != 1 or len(rows) == 0 or rows.dtype == torch.bool or rows.is_floating_point():
            raise ValueError(f"`indices` must be one or more numbers of rows, got {indices!r}.")
        if rows.min() < 0 or rows.max() >= self.batch_size:
            raise ValueError(f"`indices` must be from 0 to {self.batch_size - 1}, got {rows.tolist()}.")
        rows = rows.to(self._held.device)
        return self._with_rows(self._held[rows], [tensor[rows] for tensor in self._state])

    @staticmethod
    def concatenate(decoders: Sequence[SledStreamingDecoder]) -> SledStreamingDecoder:
        r"""
        The rows of several decoders, one after another, as one decoder. The rows may be at different points in time,
        provided that all of them have given their first samples ([`~SledStreamingDecoder.frames_to_start`] is 0) or all
        of them still need the same number of frames for it: until then decode a new stream on its own. The decoders
        given are left as they are.

        Args:
            decoders (`Sequence[SledStreamingDecoder]`):
                One or more unfinished decoders of the same codec.

        Returns:
            [`SledStreamingDecoder`]: a decoder of all rows.

        Raises:
            `ValueError`: if there are no decoders, their codecs differ, one is finished, or they need different numbers
            of frames to start.
        """
        if len(decoders) == 0:
            raise ValueError("`decoders` must hold at least one decoder, got none.")
        first = decoders[0]
        if any(decoder.codec is not first.codec for decoder in decoders):
            raise ValueError("`decoders` must all be of the same codec.")
        if any(decoder._is_finished for decoder in decoders):
            raise ValueError("`decoders` must not be finished.")
        frames_to_start = [decoder.frames_to_start for decoder in decoders]
        if len(set(frames_to_start)) > 1:
            raise ValueError(
                f"`decoders` must all have started, or need the same number of frames to start; got {frames_to_start}."
            )
        return first._with_rows(
            torch.cat([decoder._held for decoder in decoders]),
            [torch.cat(tensors) for tensors in zip(*(decoder._state for decoder in decoders), strict=True)],
        )

    def split(self) -> list[SledStreamingDecoder]:
        r"""
        The rows as decoders of their own that go on from the same point in time: what
        [`~SledStreamingDecoder.concatenate`] takes. They are views, so that each keeps what all rows hold until it goes on.

        Returns:
            `list[SledStreamingDecoder]`: a decoder for each row.
        """
        states = zip(*(tensor.split(1) for tensor in self._state), strict=True)
        return [self._with_rows(held, list(state)) for held, state in zip(self._held.split(1), states, strict=True)]


class SledAudioChunker:
    r"""
    Decides when to decode and what to hand out: latents in, in any portions, waveforms out. The first waveform comes
    with the first frames that the decoder can turn into audio, each of the next has up to twice as much audio as the one
    before it, so that a listener who starts with the first need not wait for the second, until they last `chunk_duration`.
    The sizes do not depend on the portions in which the frames come. Quiet that may be left out between two parts of a
    text is handed out once it is known whether it is.

    Args:
        codec ([`~transformers.EncodecModel`] or [`SledStreamingDecoder`]):
            The codec, as [`SledStreamingDecoder`] takes it, or a decoder of one row, which from now on is the chunker's own.
        chunk_duration (`float`, *optional*, defaults to 0.2):
            Duration in seconds of every waveform but the first few and the last, rounded to whole frames.

    Raises:
        `ValueError`: if `chunk_duration` is not a positive finite number, the codec cannot be streamed, or the decoder has
            more than one row.

    Example:

    ```python
    >>> import torch
    >>> from transformers import EncodecConfig, EncodecModel
    >>> from transformers_sled import SledAudioChunker

    >>> codec = EncodecModel(EncodecConfig()).eval()
    >>> chunker = SledAudioChunker(codec, chunk_duration=0.2)
    >>> latents = torch.randn(1, 40, codec.config.hidden_size)
    >>> waveforms = [waveform for frame in latents.split(1, dim=1) for waveform in chunker.push(frame)]
    >>> waveforms += chunker.finish()
    >>> [len(waveform) / codec.config.hop_length for waveform in waveforms]
    [7.0, 14.0, 15.0, 4.0]

    ```
    """

    def __init__(self, codec: EncodecModel | SledStreamingDecoder, chunk_duration: float = 0.2):
        if not isinstance(chunk_duration, int | float) or not 0 < chunk_duration < math.inf:
            raise ValueError(f"`chunk_duration` must be a positive, finite number of seconds, got {chunk_duration!r}.")
        self.decoder = codec if isinstance(codec, SledStreamingDecoder) else SledStreamingDecoder(codec)
        if self.decoder.batch_size != 1:
            raise ValueError(f"`codec` must be a decoder of one row, got {self.decoder.batch_size}.")
        codec_config = self.decoder.codec.config
        self.hop_length = codec_config.hop_length
        self.chunk_frames = max(1, round(chunk_duration * codec_config.sampling_rate / self.hop_length))
        # Frames (1, frames, latent_dim) that are not decoded yet, as they have come.
        self._pending: list[Tensor] = []
        self._num_pending = 0
        # Frames of the waveform before, none at first.
        self._last_frames = 0
        # Samples of the prompt that the decoder has yet to return.
        self._prompt_samples = 0
        self._num_frames = 0
        self._pauses = SledPauseLimiter(self.hop_length, codec_config.sampling_rate)

    @property
    def _next_frames(self) -> int:
        if self._last_frames == 0:
            return max(1, self.decoder.frames_to_start)
        return min(2 * self._last_frames, self.chunk_frames)

    def push(self, latents: Tensor, is_prompt: bool = False) -> list[Tensor]:
        r"""
        Takes the next frames.

        Args:
            latents (`torch.FloatTensor` of shape `(1, frames, latent_dim)`):
                Any number of frames, 0 included.
            is_prompt (`bool`, *optional*, defaults to `False`):
                Whether the frames are those of a voice prompt: they are decoded, so that the speech goes on from them,
                and their audio is cut off. Prompts come before all speech.

        Returns:
            `list[torch.FloatTensor]`: the waveforms of shape `(samples,)` that are complete now, in float32 on the CPU.

        Raises:
            `ValueError`: if `latents` has another shape or is not of a floating type, or if a prompt follows speech.
            `RuntimeError`: after [`~SledAudioChunker.finish`].
        """
        if is_prompt:
            self.decoder._check(latents)
            if self._num_frames > 0:
                raise ValueError("`is_prompt` must be False once speech has been pushed, got True.")
            self._prompt_samples += latents.shape[1] * self.hop_length
            return self._cut(self.decoder.decode(latents))
        return self.push_each([self], [latents])[0]

    @staticmethod
    def push_each(chunkers: Sequence[SledAudioChunker], latents: Sequence[Tensor]) -> list[list[Tensor]]:
        r"""
        Takes the next frames of several chunkers of one codec, and decodes side by side what is complete in more than one.

        Args:
            chunkers (`Sequence[SledAudioChunker]`):
                The chunkers, each once.
            latents (`Sequence[torch.FloatTensor]` of shape `(1, frames, latent_dim)`):
                Any number of frames for each.

        Returns:
            `list[list[torch.FloatTensor]]`: what [`~SledAudioChunker.push`] of each returns.

        Raises:
            `ValueError`: if `latents` of one has another shape or is not of a floating type.
            `RuntimeError`: after [`~SledAudioChunker.finish`] of one.
        """
        for chunker, frames in zip(chunkers, latents, strict=True):
            chunker.decoder._check(frames)
            chunker._pending.append(frames.detach())
            chunker._num_pending += frames.shape[1]
            chunker._num_frames += frames.shape[1]
        waveforms: dict[SledAudioChunker, list[Tensor]] = {chunker: [] for chunker in chunkers}
        while True:
            groups: dict[tuple[int, int], list[SledAudioChunker]] = {}
            for chunker in chunkers:
                if chunker._num_pending >= chunker._next_frames:
                    key = (chunker._next_frames, chunker.decoder.frames_to_start)
                    groups.setdefault(key, []).append(chunker)
            if not groups:
                return list(waveforms.values())
            for (num_frames, _), group in groups.items():
                decoder = SledStreamingDecoder.concatenate([chunker.decoder for chunker in group])
                decoded = decoder.decode(torch.cat([chunker._take(num_frames) for chunker in group])).cpu()
                for chunker, row, waveform in zip(group, decoder.split(), decoded.split(1), strict=True):
                    chunker.decoder = row
                    chunker._last_frames = num_frames
                    waveforms[chunker] += chunker._cut(waveform)

    def _take(self, num_frames: int) -> Tensor:
        """The next frames of those that are not decoded yet, all that came together."""
        pending = torch.cat(self._pending, dim=1)
        self._pending = [pending[:, num_frames:]]
        self._num_pending -= num_frames
        return pending[:, :num_frames]

    def finish(self) -> list[Tensor]:
        r"""
        Ends the speech.

        Returns:
            `list[torch.FloatTensor]`: the rest of the audio as one waveform of shape `(samples,)`, or nothing if all of
            it has been handed out.

        Raises:
            `RuntimeError`: if called twice.
        """
        waveforms = [self.decoder.decode(self._take(self._num_pending))] if self._num_pending > 0 else []
        waveform = torch.cat([*waveforms, self.decoder.finish()], dim=1)
        waveform = torch.cat([*self._cut(waveform), self._pauses.finish()])
        return [waveform] if len(waveform) > 0 else []

    def end_part(self) -> None:
        """Says that the frames so far are a part of the text that another may follow: long quiet between is shortened."""
        self._pauses.end_part(self._num_frames)

    def _cut(self, waveform: Tensor) -> list[Tensor]:
        """What is heard of decoded audio (1, num_samples)."""
        samples = min(self._prompt_samples, waveform.shape[1])
        self._prompt_samples -= samples
        heard = self._pauses.push(waveform[0, samples:].cpu())
        return [heard] if len(heard) > 0 else []


__all__ = [
    "SledAudioChunker",
    "SledCodec",
    "SledStreamingDecoder",
    "check_bandwidth",
    "check_codec_config",
    "copy_codec",
    "decode_codes",
    "decode_latents",
    "encode_codes",
    "get_execution_device",
    "load_codec",
]
