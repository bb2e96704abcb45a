"""
What a codec is trained on: distances of spectrograms, a multi-scale STFT discriminator and the balance of their gradients
(section 3.4 of "High Fidelity Neural Audio Compression", https://huggingface.co/papers/2210.13438).
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from transformers.audio_utils import mel_filter_bank


class MelLoss(nn.Module):
    """
    Mean absolute differences of mel spectrograms and of their logarithms, averaged over several resolutions.

    Args:
        sampling_rate (`int`): Sampling rate, in Hz.
        n_ffts (`list[int]`): Windows, in samples; the hop is a quarter of each.
        num_bins (`list[int]`): Mel bins for each window.
        floor (`float`, *optional*, defaults to 1e-4): Magnitude, full scale being 1, that is as good as silence.
    """

    def __init__(self, sampling_rate: int, n_ffts: list[int], num_bins: list[int], floor: float = 1e-4):
        super().__init__()
        if len(n_ffts) != len(num_bins):
            raise ValueError(
                f"`mel_n_ffts` has {len(n_ffts)} values and `mel_num_bins` {len(num_bins)}: pass as many."
            )
        self.floor = floor
        self.windows, self.filters = nn.ParameterList(), nn.ParameterList()
        for n_fft, bins in zip(n_ffts, num_bins, strict=True):
            window = torch.hann_window(n_fft)
            filters = mel_filter_bank(n_fft // 2 + 1, bins, 0.0, sampling_rate / 2, sampling_rate, mel_scale="slaney")
            filters = torch.from_numpy(filters).float().T
            self.windows.append(nn.Parameter(window / window.sum(), requires_grad=False))
            self.filters.append(nn.Parameter(filters, requires_grad=False))

    def forward(self, audio: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compares two `(batch, 1, samples)` waveforms.

        Returns:
            `tuple` of scalars: the distance of the log magnitudes, in nepers, and that of the magnitudes, relative to
            the mean magnitude of the target.
        """
        log_distances, distances = [], []
        for window, filters in zip(self.windows, self.filters, strict=True):
            predicted, wanted = (self._mel(x, window, filters) for x in (audio, target))
            log_distances.append(F.l1_loss((predicted + self.floor).log(), (wanted + self.floor).log()))
            distances.append(F.l1_loss(predicted, wanted) / (wanted.mean() + self.floor))
        return torch.stack(log_distances).mean(), torch.stack(distances).mean()

    def _mel(self, audio: torch.Tensor, window: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        n_fft = len(window)
        spectrum = torch.stft(audio.squeeze(1), n_fft, n_fft // 4, window=window, return_complex=True)
        return filters @ (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()


def whitening_loss(latents: torch.Tensor) -> torch.Tensor:
    """
    Distance of the latents' distribution from zero mean and unit covariance. Without it all dimensions follow
    loudness for long, and what tells sounds apart drowns in the noise on the decoder's input.

    Args:
        latents (`torch.FloatTensor` of shape `(batch, hidden_size, frames)`): Output of the encoder.

    Returns:
        `torch.Tensor`: A scalar, per dimension.
    """
    vectors = latents.transpose(1, 2).flatten(0, 1)
    mean = vectors.mean(dim=0)
    centered = vectors - mean
    covariance = centered.T @ centered / (len(vectors) - 1)
    identity = torch.eye(len(mean), device=mean.device)
    return (mean.square().sum() + (covariance - identity).square().sum()) / len(mean)


class GradientBalancer:
    """
    Balances losses by the norms of their gradients with respect to the audio, so that weights are shares.

    Args:
        decay (`float`, *optional*, defaults to 0.999): Decay of the moving average of the norms.
    """

    def __init__(self, decay: float = 0.999):
        self.decay = decay
        self.totals: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def gradient(
        self, losses: dict[str, torch.Tensor], weights: dict[str, float], audio: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            losses (`dict`): Scalar losses.
            weights (`dict`): Their weights.
            audio (`torch.FloatTensor` of shape `(batch, 1, samples)`): What they depend on.

        Returns:
            `torch.FloatTensor` shaped as `audio`: The combined gradient.
        """
        combined = torch.zeros_like(audio)
        total_weight = sum(weights[name] for name in losses)
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, [audio], retain_graph=True)
            norm = float(gradient.flatten(1).norm(dim=1).mean())
            self.totals[name] = self.totals.get(name, 0.0) * self.decay + norm
            self.counts[name] = self.counts.get(name, 0.0) * self.decay + 1.0
            combined += weights[name] / total_weight * gradient / (self.totals[name] / self.counts[name] + 1e-12)
        return combined

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {"totals": self.totals, "counts": self.counts}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        self.totals, self.counts = dict(state["totals"]), dict(state["counts"])


class STFTDiscriminator(nn.Module):
    """
    Judges audio by its complex spectrogram, whose magnitudes are compressed: what is quiet counts, too.

    Args:
        n_fft (`int`): Window, in samples; the hop is a quarter of it.
        filters (`int`): Channels.
    """

    def __init__(self, n_fft: int, filters: int):
        super().__init__()
        window = torch.hann_window(n_fft)
        self.window = nn.Buffer(window / window.square().sum().sqrt(), persistent=False)
        # Kernels and padding are (time, frequency); frequency is halved where time is dilated.
        convolutions = [nn.Conv2d(2, filters, (3, 9), padding=(1, 4))]
        for dilation in (1, 2, 4):
            convolutions.append(
                nn.Conv2d(filters, filters, (3, 9), (1, 2), padding=(dilation, 4), dilation=(dilation, 1))
            )
        convolutions.append(nn.Conv2d(filters, filters, (3, 3), padding=1))
        convolutions.append(nn.Conv2d(filters, 1, (3, 3), padding=1))
        self.convolutions = nn.ModuleList(weight_norm(convolution) for convolution in convolutions)

    def forward(self, audio: torch.Tensor) -> list[torch.Tensor]:
        """Maps `(batch, 1, samples)` to the features of every layer; the last is the judgement."""
        n_fft = len(self.window)
        spectrum = torch.stft(audio.squeeze(1), n_fft, n_fft // 4, window=self.window, return_complex=True)
        spectrum = spectrum * (spectrum.abs() + 1e-4) ** -0.7
        hidden = torch.stack((spectrum.real, spectrum.imag), dim=1).transpose(2, 3)
        features = []
        for convolution in self.convolutions[:-1]:
            hidden = F.leaky_relu(convolution(hidden), 0.2)
            features.append(hidden)
        features.append(self.convolutions[-1](hidden))
        return features


class MultiScaleSTFTDiscriminator(nn.Module):
    """Several [`STFTDiscriminator`], one per window."""

    def __init__(self, n_ffts: list[int], filters: int):
        super().__init__()
        self.discriminators = nn.ModuleList(STFTDiscriminator(n_fft, filters) for n_fft in n_ffts)

    def forward(self, audio: torch.Tensor) -> list[list[torch.Tensor]]:
        return [discriminator(audio) for discriminator in self.discriminators]


def discriminator_loss(real: list[list[torch.Tensor]], fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge loss of the discriminator, given its features for real and decoded audio."""
    losses = [
        F.relu(1.0 - r[-1].float()).mean() + F.relu(1.0 + f[-1].float()).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge loss of the codec."""
    return torch.stack([F.relu(1.0 - f[-1].float()).mean() for f in fake]).mean()


def feature_matching_loss(real: list[list[torch.Tensor]], fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Difference of the discriminator's inner features, relative to their size for real audio."""
    losses = [
        F.l1_loss(f.float(), r.float()) / r.float().abs().mean().clamp(min=1e-6)
        for real_scale, fake_scale in zip(real, fake, strict=True)
        for r, f in zip(real_scale[:-1], fake_scale[:-1], strict=True)
    ]
    return torch.stack(losses).mean()
