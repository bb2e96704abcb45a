"""
Another codec for a trained model, so that it need not learn to speak from nothing after the codec was trained anew.

Least squares on the latents of the same speech gives a linear map each way; the one back goes into the layer that reads
latents, the other into the last one of the generative head. What the maps miss, and what the old latents did not hold, is
for training to learn.
"""

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import EncodecModel

from ..modeling_sled import SledForSpeechSynthesis
from .base_codec_trainer import check_alike


def fit_linear_map(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """
    Least squares.

    Args:
        inputs (`torch.FloatTensor` of shape `(frames, input_dim)`): What the map is applied to.
        targets (`torch.FloatTensor` of shape `(frames, target_dim)`): What it should give.

    Returns:
        `tuple`: weight `(target_dim, input_dim)` and bias `(target_dim,)` as in `torch.nn.Linear`, and the share of the
        targets' variance that they explain.
    """
    # Latents can be nearly dependent, which float32 does not solve well.
    solution = torch.linalg.lstsq(F.pad(inputs, (0, 1), value=1.0).double(), targets.double()).solution.float()
    weight, bias = solution[:-1].T.contiguous(), solution[-1]
    residual = (F.linear(inputs, weight, bias) - targets).square().sum()
    return weight, bias, 1.0 - float(residual / (targets - targets.mean(dim=0)).square().sum())


@torch.no_grad()
def change_codec(model: SledForSpeechSynthesis, codec: EncodecModel, audio: list[torch.Tensor]) -> tuple[float, float]:
    """
    Gives the model the codec.

    Args:
        model ([`SledForSpeechSynthesis`]): Model with its old codec; it is changed in place.
        codec (`EncodecModel`): The new one, of the same sampling rate, frame rate and width of latents.
        audio (`list[torch.FloatTensor]`, each of shape `(samples,)`): Speech to compare the two on.

    Returns:
        `tuple(float, float)`: the shares of variance that the maps to the old and to the new latents explain.

    Raises:
        `ValueError`: if the codecs differ in sampling rate, samples of a frame or width of latents.
    """
    old = model.get_codec()
    check_alike(old, codec, ["sampling_rate", "hop_length", "hidden_size"])
    hop_length, pairs = codec.config.hop_length, []
    for samples in tqdm(audio, desc="Comparing"):
        samples = F.pad(samples, (0, -len(samples) % hop_length))[None, None]
        pairs.append((old.encoder(samples)[0].T, codec.encoder(samples)[0].T))
    old_latents, new_latents = (torch.cat(latents) for latents in zip(*pairs, strict=True))
    weight, bias, explained_old = fit_linear_map(new_latents, old_latents)
    reading = model.z_proj
    reading.bias.add_(reading.weight @ bias)
    reading.weight.copy_(reading.weight @ weight)
    weight, bias, explained_new = fit_linear_map(old_latents, new_latents)
    writing = model.generative_head.final_layer.linear
    writing.bias.copy_(weight @ writing.bias + bias)
    writing.weight.copy_(weight @ writing.weight)
    model.set_codec(codec)
    return explained_old, explained_new
