"""A small codec and what the tests of decoding compare it by."""

import functools
import gc
import itertools

import torch
from transformers import EncodecConfig, EncodecModel


@functools.cache
def make_codec(**config) -> EncodecModel:
    torch.manual_seed(0)
    config = {"num_filters": 2, "hidden_size": 8, "codebook_size": 8, "upsampling_ratios": (4, 3, 2), **config}
    return EncodecModel(EncodecConfig(**config)).eval()


def decode_whole(codec: EncodecModel, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return codec.decoder(latents.transpose(1, 2))[:, 0]


def make_latents(frames: int, batch_size: int = 1, dim: int = 8) -> torch.Tensor:
    return torch.randn(batch_size, frames, dim, generator=torch.Generator().manual_seed(frames))


def split(frames: int, cuts: list[int]) -> list[slice]:
    """Portions of `frames` frames with cuts at any positions; equal cuts make empty portions."""
    bounds = [0, *sorted(cut % (frames + 1) for cut in cuts), frames]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def live_tensor_bytes() -> int:
    gc.collect()
    # What the compiler keeps of a step that another test has compiled has no storage.
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [item for item in gc.get_objects() if type(item) in kinds and item.layout is torch.strided]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
