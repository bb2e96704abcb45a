"""
A watermark that listeners do not hear and that tells speech as made by a model.

It is Perth's, a network that changes magnitudes below 2 kHz. The package `resemble-perth` brings the weights (its own code
needs torchaudio and is not used). The network was made for 32 kHz; at 24 kHz, windows of the same duration see the same
frequencies, so that nothing has to be resampled.
"""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn


SAMPLING_RATE = 24_000
WINDOW_SIZE, HOP_SIZE = 1536, 240
# Windows of 2,048 samples at 32 kHz see magnitudes that are larger by this.
MAGNITUDE_SCALE = 2048 / WINDOW_SIZE
NUM_BANDS, HIDDEN_SIZE = 128, 256
MIN_DECIBELS, HEADROOM_DECIBELS = -180.0, 15.0
# Frames that are quieter than this share of the loudest are left alone.
QUIET_SHARE = 0.05
WEIGHTS = Path("perth_net", "pretrained", "implicit", "perth_net_250000.pth.tar")


def is_available() -> bool:
    """Whether the weights are installed: the extra `watermark`."""
    return importlib.util.find_spec("perth") is not None


class WatermarkNetworks(nn.Module):
    """Perth's networks: one that writes the mark, and three that read it at different speeds."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _make_layers(NUM_BANDS)
        self.slow, self.normal, self.fast = (_make_layers(2) for _ in range(3))

    def detect(self, magnitudes: torch.Tensor) -> float:
        """How sure it is, from 0 to 1, that normalized magnitudes (num_frames, num_bins) hold the mark."""
        loudness = magnitudes.sum(dim=1)
        mask = (loudness > QUIET_SHARE * loudness.max()).float()[None, None]
        bands = magnitudes.T[None, :NUM_BANDS]
        means = []
        for layers, speed in ((self.slow, 1.25), (self.normal, 1.0), (self.fast, 0.75)):
            size = int(bands.shape[-1] * speed)
            outputs = layers(nn.functional.interpolate(bands, size, mode="linear", align_corners=True))
            weights = nn.functional.interpolate(mask, size, mode="nearest")
            means.append((outputs * weights).sum(dim=-1) / weights.sum(dim=-1))
        weights, marks = torch.cat(means).unbind(dim=1)
        return float((weights.softmax(dim=0) * marks).sum().clamp(0, 1))


def _make_layers(num_outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv1d(NUM_BANDS, HIDDEN_SIZE, 1), nn.LeakyReLU()]
    for _ in range(5):
        layers += [nn.Conv1d(HIDDEN_SIZE, HIDDEN_SIZE, 7, padding=3), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Conv1d(HIDDEN_SIZE, num_outputs, 1))


@cache
def load_networks() -> WatermarkNetworks:
    """Loads the networks. Raises `ImportError` where the weights are not installed."""
    spec = importlib.util.find_spec("perth")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("The watermark needs `pip install 'transformers-sled[watermark]'`.")
    file = Path(spec.submodule_search_locations[0], WEIGHTS)
    weights = torch.load(file, map_location="cpu", weights_only=True)["model"]
    networks = WatermarkNetworks()
    names = {"encoder.layers": "encoder"} | {f"decoder.{name}_layers": name for name in ("slow", "normal", "fast")}
    state = {}
    for name, value in weights.items():
        for theirs, ours in names.items():
            if name.startswith(theirs):
                index, _, kind = name.removeprefix(f"{theirs}.").split(".")
                state[f"{ours}.{2 * int(index)}.{kind}"] = value
    networks.load_state_dict(state)
    return networks.eval()


def _get_spectrum(frames: torch.Tensor) -> torch.Tensor:
    """Of windows (num_frames, window_size): (num_frames, num_bins)."""
    return torch.fft.rfft(frames * torch.hann_window(WINDOW_SIZE))


def _normalize(spectrum: torch.Tensor) -> torch.Tensor:
    """The magnitudes in decibels, as the networks know them."""
    decibels = 20 * torch.log10((spectrum.abs() * MAGNITUDE_SCALE).clamp(min=10 ** (MIN_DECIBELS / 20)))
    return (decibels - MIN_DECIBELS) / (HEADROOM_DECIBELS - MIN_DECIBELS)


def detect_watermark(waveform: np.ndarray) -> float:
    r"""
    Looks for the watermark.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)` in float32):
            Speech at 24 kHz.

    Returns:
        `float`: how sure it is, from 0 to 1; marked speech is above 0.5.
    """
    padded = torch.from_numpy(np.pad(waveform, WINDOW_SIZE // 2))
    with torch.inference_mode():
        return load_networks().detect(_normalize(_get_spectrum(padded.unfold(0, WINDOW_SIZE, HOP_SIZE))))


class _StreamingConvolution:
    """A convolution over frames that come in pieces: what comes out is 3 frames late, and the same as in one piece."""

    def __init__(self, convolution: nn.Conv1d) -> None:
        self.convolution = convolution
        self.margin = convolution.kernel_size[0] // 2
        self.frames = torch.zeros(1, convolution.in_channels, self.margin)

    def push(self, frames: torch.Tensor, is_last: bool) -> torch.Tensor:
        end = [torch.zeros(1, frames.shape[1], self.margin)] if is_last else []
        self.frames = torch.cat([self.frames, frames, *end], dim=-1)
        if self.frames.shape[-1] <= 2 * self.margin:
            return frames.new_zeros(1, self.convolution.out_channels, 0)
        outputs = nn.functional.conv1d(self.frames, self.convolution.weight, self.convolution.bias)
        self.frames = self.frames[..., self.frames.shape[-1] - 2 * self.margin :]
        return outputs


class Watermarker:
    r"""
    Marks speech while it is made. What comes out is 0.2 s behind what goes in.

    Args:
        sampling_rate (`int`, *optional*, defaults to 24000):
            Sampling rate of the speech in Hz. There is no other so far.

    Example:

    ```python
    >>> marker = Watermarker()
    >>> marked = np.concatenate([*(marker.mark(waveform) for waveform in waveforms), marker.finish()])
    ```
    """

    def __init__(self, sampling_rate: int = SAMPLING_RATE) -> None:
        if sampling_rate != SAMPLING_RATE:
            raise ValueError(f"`sampling_rate` must be {SAMPLING_RATE} for a watermark, got {sampling_rate}.")
        self._layers: list[_StreamingConvolution | nn.Module] = [
            _StreamingConvolution(layer) if isinstance(layer, nn.Conv1d) else layer
            for layer in load_networks().encoder
        ]
        self._window = torch.hann_window(WINDOW_SIZE)
        # What is not in a window yet. The first window is centered on the first sample.
        self._samples = torch.zeros(WINDOW_SIZE // 2)
        self._spectra = torch.zeros(0, WINDOW_SIZE // 2 + 1, dtype=torch.complex64)
        self._masks = torch.zeros(0)
        self._loudest = torch.zeros(1)
        # Sums of windows, and of their squares, from the first sample that is not complete.
        self._sums = torch.zeros(WINDOW_SIZE)
        self._squares = torch.zeros(WINDOW_SIZE)
        self._num_taken = 0
        self._num_given = 0
        self._num_ahead = WINDOW_SIZE // 2

    def mark(self, waveform: np.ndarray) -> np.ndarray:
        r"""
        Takes the next waveform.

        Args:
            waveform (`np.ndarray` of shape `(num_samples,)` in float32):
                Speech at 24 kHz.

        Returns:
            `np.ndarray` of shape `(num_samples,)` in float32: what is marked now, which may be nothing.
        """
        self._num_taken += len(waveform)
        return self._push(torch.from_numpy(np.ascontiguousarray(waveform, np.float32)), is_last=False)

    def finish(self) -> np.ndarray:
        """Ends the speech. Returns the rest of it."""
        missing = self._num_taken - self._num_given
        rest = self._push(torch.zeros(WINDOW_SIZE + HOP_SIZE), is_last=True)[:missing]
        return rest

    def _push(self, samples: torch.Tensor, is_last: bool) -> np.ndarray:
        with torch.inference_mode():
            self._samples = torch.cat([self._samples, samples])
            num_frames = max(0, (len(self._samples) - WINDOW_SIZE) // HOP_SIZE + 1)
            spectra = self._spectra[:0]
            if num_frames:
                spectra = _get_spectrum(self._samples.unfold(0, WINDOW_SIZE, HOP_SIZE))
                self._samples = self._samples[num_frames * HOP_SIZE :]
            magnitudes = _normalize(spectra)
            loudness = magnitudes.sum(dim=1)
            loudest = torch.cat([self._loudest, loudness]).cummax(dim=0).values
            self._loudest = loudest[-1:]
            self._spectra = torch.cat([self._spectra, spectra])
            self._masks = torch.cat([self._masks, (loudness > QUIET_SHARE * loudest[1:]).float()])
            changes = magnitudes.T[None, :NUM_BANDS]
            for layer in self._layers:
                changes = layer.push(changes, is_last) if isinstance(layer, _StreamingConvolution) else layer(changes)
            return self._synthesize(changes[0].T)

    def _synthesize(self, changes: torch.Tensor) -> np.ndarray:
        """Applies the changes (num_frames, num_bands) of the next frames, and gives the samples that are complete then."""
        num_frames = len(changes)
        if num_frames == 0:
            return np.zeros(0, np.float32)
        spectra, self._spectra = self._spectra[:num_frames].clone(), self._spectra[num_frames:]
        masks, self._masks = self._masks[:num_frames], self._masks[num_frames:]
        decibels = changes * masks[:, None] * (HEADROOM_DECIBELS - MIN_DECIBELS)
        spectra[:, :NUM_BANDS] *= 10 ** (decibels / 20)
        windows = torch.fft.irfft(spectra, n=WINDOW_SIZE) * self._window
        outputs = []
        for window in windows:
            self._sums += window
            self._squares += self._window**2
            outputs.append(self._sums[:HOP_SIZE] / self._squares[:HOP_SIZE].clamp(min=1e-8))
            self._sums = torch.cat([self._sums[HOP_SIZE:], torch.zeros(HOP_SIZE)])
            self._squares = torch.cat([self._squares[HOP_SIZE:], torch.zeros(HOP_SIZE)])
        joined = torch.cat(outputs)
        # What lies before the first sample.
        skipped = min(self._num_ahead, len(joined))
        self._num_ahead -= skipped
        given = joined[skipped:].numpy()
        self._num_given += len(given)
        return given


__all__ = ["Watermarker", "detect_watermark", "is_available"]
