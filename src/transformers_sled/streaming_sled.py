"""Streaming parts of SLED: EnCodec decoding with state, chunking of audio, and tokenization of text as it arrives."""

from __future__ import annotations

import copy
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncodecModel
from transformers.generation.streamers import BaseStreamer
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecLSTM,
    EncodecResnetBlock,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A layer of the decoder: (batch, time, channels) and the state of the stream, which it updates, to (batch, time, channels).
_Layer = Callable[[Tensor, list[Tensor]], Tensor]

# Frames decoded in one pass, which bounds the memory that a long input takes.
_BLOCK_FRAMES = 32

# What the pre-tokenizer of GPT-2 and RoBERTa splits off as soon as it is spelled out, whatever follows.
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class _CausalConv:
    """`EncodecConv1d` with state, as a matrix product over (batch, time, channels).

    On a few time steps that is several times as fast on CPU as `conv1d`, which repacks its weights at every call.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dilation: int, pad_mode: str, state: list[Tensor]):
        # (out_channels, kernel_size, in_channels)
        self.weight = weight.flatten(1).contiguous()
        self.bias = bias
        self.dilation = dilation
        self.padding = (weight.shape[1] - 1) * dilation
        self.reflect = pad_mode == "reflect"
        # The last `padding` inputs; none yet where they have to be reflected from the first ones.
        self.state_idx = len(state)
        state.append(weight.new_zeros(1, 0 if self.reflect else self.padding, weight.shape[2]))

    def __call__(self, hidden_states: Tensor, state: list[Tensor]) -> Tensor:
        if self.padding > 0:
            past = state[self.state_idx]
            if past.shape[1] == 0:
                # A signal shorter than its padding is reflected as if zeros followed it, as EncodecConv1d does.
                past = hidden_states[:, 1 : self.padding + 1].flip(1)
                past = F.pad(past, (0, 0, self.padding - past.shape[1], 0))
            length = hidden_states.shape[1]
            hidden_states = torch.cat([past, hidden_states], dim=1)
            # A copy, because a view would keep the whole input in memory.
            state[self.state_idx] = hidden_states[:, length:].clone()
            taps = [hidden_states[:, start : start + length] for start in range(0, self.padding + 1, self.dilation)]
            hidden_states = torch.cat(taps, dim=-1)
        return F.linear(hidden_states, self.weight, self.bias)


class _CausalConvTranspose:
    """`EncodecConvTranspose1d` trimmed on the right only, which is a causal convolution to `stride` samples a step.

    What the kernel adds to the samples of later steps is carried as the inputs that it comes from.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, state: list[Tensor]):
        self.out_channels = weight.shape[1]
        # (stride, out_channels, taps, in_channels); the latest input meets the first part of the kernel.
        taps = torch.stack([part.permute(2, 1, 0) for part in reversed(weight.split(stride, dim=2))], dim=2)
        self.conv = _CausalConv(taps.flatten(0, 1), bias.repeat(stride), 1, "constant", state)

    def __call__(self, hidden_states: Tensor, state: list[Tensor]) -> Tensor:
        return self.conv(hidden_states, state).view(hidden_states.shape[0], -1, self.out_channels)


class _LSTM:
    """`EncodecLSTM` with state."""

    def __init__(self, lstm: nn.LSTM, state: list[Tensor]):
        self.lstm = lstm
        self.weights = [[weight.detach() for weight in weights] for weights in lstm.all_weights]
        self.state_idx = len(state)
        # Hidden and cell state, rows first as all states here.
        state += [self.weights[0][0].new_zeros(1, lstm.num_layers, lstm.hidden_size) for _ in range(2)]

    def _step_by_step(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        last_hidden, last_cell = [], []
        for weights, h, c in zip(self.weights, hidden, cell, strict=True):
            input_weight, hidden_weight, input_bias, hidden_bias = weights
            outputs = []
            for gates in F.linear(inputs, input_weight, input_bias + hidden_bias):
                input_gate, forget_gate, candidate, output_gate = torch.addmm(gates, h, hidden_weight.t()).chunk(4, 1)
                c = forget_gate.sigmoid() * c + input_gate.sigmoid() * candidate.tanh()
                h = output_gate.sigmoid() * c.tanh()
                outputs.append(h)
            inputs = torch.stack(outputs)
            last_hidden.append(h)
            last_cell.append(c)
        return inputs, (torch.stack(last_hidden), torch.stack(last_cell))

    def __call__(self, hidden_states: Tensor, state: list[Tensor]) -> Tensor:
        inputs = hidden_states.transpose(0, 1)
        past = tuple(tensor.transpose(0, 1).contiguous() for tensor in state[self.state_idx : self.state_idx + 2])
        if inputs.device.type == "cpu":
            # nn.LSTM repacks its weights on CPU at every call, which costs as much as a dozen frames.
            outputs, past = self._step_by_step(inputs, *past)
        else:
            outputs, past = self.lstm(inputs, past)
        state[self.state_idx : self.state_idx + 2] = [tensor.transpose(0, 1) for tensor in past]
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
        self._check_codec(codec)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        self.codec = codec
        self._layers: list[_Layer] = []
        self._state: list[Tensor] = []
        self._first_frames = 1
        self._is_started = self._is_finished = False
        with torch.no_grad():
            self._add_layers(codec.decoder.layers)
            # Layers replace their states and never write into them.
            self._state = [tensor.expand(batch_size, -1, -1) for tensor in self._state]
            self._held = self._state[0].new_zeros(batch_size, 0, codec.config.hidden_size)

    @staticmethod
    def _check_codec(codec: EncodecModel) -> None:
        if not isinstance(codec, EncodecModel):
            raise ValueError(f"`codec` must be an `EncodecModel`, got {type(codec).__name__}.")
        for field, accepted in {
            "use_causal_conv": [True],
            "norm_type": ["weight_norm"],
            "trim_right_ratio": [1.0],
            "pad_mode": ["reflect", "constant"],
            "audio_channels": [1],
        }.items():
            value = getattr(codec.config, field)
            if value not in accepted:
                accepted_values = " or ".join(map(repr, accepted))
                raise ValueError(
                    f"This codec cannot be streamed: `{field}` in its configuration must be {accepted_values}, "
                    f"got {value!r}."
                )
        if codec.dtype != torch.float32:
            raise ValueError(f"`codec` must be in torch.float32, got {codec.dtype}.")

    def _add_layers(self, modules: nn.ModuleList) -> None:
        rate = 1

        def causal_conv(module: EncodecConv1d) -> _CausalConv:
            weight, bias, dilation = module.conv.weight.transpose(1, 2), module.conv.bias.detach(), module.conv.dilation[0]
            conv = _CausalConv(weight, bias, dilation, module.pad_mode, self._state)
            if conv.reflect and conv.padding > 0:
                self._first_frames = max(self._first_frames, math.ceil((conv.padding + 1) / rate))
            return conv

        for module in modules:
            if isinstance(module, EncodecConv1d):
                self._layers.append(causal_conv(module))
            elif isinstance(module, EncodecLSTM):
                self._layers.append(_LSTM(module.lstm, self._state))
            elif isinstance(module, EncodecConvTranspose1d):
                weight, bias, stride = module.conv.weight, module.conv.bias.detach(), module.conv.stride[0]
                self._layers.append(_CausalConvTranspose(weight, bias, stride, self._state))
                rate *= stride
            elif isinstance(module, EncodecResnetBlock):
                convs = [causal_conv(layer) for layer in module.block if isinstance(layer, EncodecConv1d)]
                shortcut = None if isinstance(module.shortcut, nn.Identity) else causal_conv(module.shortcut)
                self._layers.append(_ResnetBlock(convs, shortcut))
            elif isinstance(module, nn.ELU):
                self._layers.append(_elu)
            else:
                raise ValueError(f"`codec` has a layer that cannot be streamed: {type(module).__name__}.")

    @property
    def batch_size(self) -> int:
        """Number of rows (`int`)."""
        return self._held.shape[0]

    @property
    def frames_to_start(self) -> int:
        """Number of frames (`int`) that [`~SledStreamingDecoder.decode`] still needs to return its first samples."""
        return 0 if self._is_started else self._first_frames - self._held.shape[1]

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
        if self._is_finished:
            raise RuntimeError("`decode` was called after `finish`; make a new decoder for a new signal.")
        expected = (self.batch_size, self._held.shape[2])
        if not isinstance(latents, Tensor) or latents.ndim != 3 or (latents.shape[0], latents.shape[2]) != expected:
            got = f"shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"`latents` must be a tensor of shape ({expected[0]}, frames, {expected[1]}), got {got}.")
        if not latents.is_floating_point():
            raise ValueError(f"`latents` must be of a floating type, got {latents.dtype}.")
        latents = torch.cat([self._held, latents.detach().to(self._held)], dim=1)
        if not self._is_started and latents.shape[1] < self._first_frames:
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

    @torch.no_grad()
    def _run(self, latents: Tensor) -> Tensor:
        waveforms = [latents.new_zeros(self.batch_size, 0)]
        self._held = latents[:, :0]
        if latents.shape[1] > 0:
            self._is_started = True
            with torch.autocast(latents.device.type, enabled=False):
                for hidden_states in latents.split(max(_BLOCK_FRAMES, self._first_frames), dim=1):
                    for layer in self._layers:
                        hidden_states = layer(hidden_states, self._state)
                    waveforms.append(hidden_states[:, :, 0])
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
            `ValueError`: if there is no such row.
        """
        rows = torch.tensor([int(index) for index in indices], dtype=torch.long)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= self.batch_size:
            raise ValueError(
                f"`indices` must be one or more rows from 0 to {self.batch_size - 1}, got {rows.tolist()}."
            )
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
