"""
Training of EnCodec's residual vector quantizer: k-means, then moving averages (section 3.2 of "High Fidelity Neural Audio
Compression", https://huggingface.co/papers/2210.13438).
"""

import torch
from torch.nn import functional as F
from transformers.models.encodec.modeling_encodec import EncodecEuclideanCodebook, EncodecResidualVectorQuantizer


@torch.no_grad()
def initialize_codebooks(
    quantizer: EncodecResidualVectorQuantizer,
    latents: torch.Tensor,
    vectors_per_step: int,
    iterations: int,
    generator: torch.Generator,
) -> None:
    """
    Fills the codebooks with the k-means centers of latents, each from what the codebooks before it leave.

    Args:
        quantizer (`EncodecResidualVectorQuantizer`): Its buffers are overwritten.
        latents (`torch.FloatTensor` of shape `(vectors, hidden_size)`): At least `codebook_size` vectors.
        vectors_per_step (`int`): Latents in a training batch, which the moving averages count in.
        iterations (`int`): Iterations of k-means.
        generator (`torch.Generator`): Draws the first centers.
    """

    def nearest_codes(codebook: EncodecEuclideanCodebook, vectors: torch.Tensor) -> torch.Tensor:
        # In parts: the distances of all vectors to all codes at once take gigabytes.
        return torch.cat([codebook.quantize(part) for part in vectors.split(4096)])

    residual = latents
    for layer in quantizer.layers:
        codebook = layer.codebook
        if len(residual) < codebook.codebook_size:
            raise ValueError(f"{codebook.codebook_size} codes need as many latents, got {len(residual)}.")
        chosen = torch.randperm(len(residual), generator=generator)[: codebook.codebook_size].to(residual.device)
        codebook.embed.copy_(residual[chosen])
        for _ in range(iterations):
            indices = nearest_codes(codebook, residual)
            counts = torch.bincount(indices, minlength=codebook.codebook_size)
            sums = torch.zeros_like(codebook.embed).index_add_(0, indices, residual)
            used = counts > 0
            codebook.embed[used] = sums[used] / counts[used, None]
        indices = nearest_codes(codebook, residual)
        counts = torch.bincount(indices, minlength=codebook.codebook_size)
        codebook.cluster_size.copy_(counts * (vectors_per_step / len(residual)))
        codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[:, None])
        codebook.inited.fill_(1.0)
        residual = residual - codebook.decode(indices)


@torch.no_grad()
def update_codebook(
    codebook: EncodecEuclideanCodebook,
    vectors: torch.Tensor,
    indices: torch.Tensor,
    decay: float,
    dead_code_threshold: float,
) -> int:
    """
    Moves the codes of one codebook towards the vectors they stand for and revives dead ones.

    Args:
        codebook (`EncodecEuclideanCodebook`): Its buffers are updated.
        vectors (`torch.FloatTensor` of shape `(vectors, hidden_size)`): What was quantized.
        indices (`torch.LongTensor` of shape `(vectors,)`): The code of each.
        decay (`float`): Decay of the moving averages.
        dead_code_threshold (`float`): Share of the average use below which a code is replaced by a random vector.

    Returns:
        `int`: The number of codes replaced.
    """
    counts = torch.bincount(indices, minlength=codebook.codebook_size).to(vectors.dtype)
    sums = torch.zeros_like(codebook.embed_avg).index_add_(0, indices, vectors)
    codebook.cluster_size.lerp_(counts, 1.0 - decay)
    codebook.embed_avg.lerp_(sums, 1.0 - decay)
    average_use = codebook.cluster_size.mean()
    dead = codebook.cluster_size < dead_code_threshold * average_use
    num_dead = int(dead.sum())
    if num_dead > 0:
        chosen = torch.randint(len(vectors), (num_dead,)).to(vectors.device)
        codebook.cluster_size[dead] = average_use
        codebook.embed_avg[dead] = vectors[chosen] * average_use
    codebook.embed.copy_(codebook.embed_avg / codebook.cluster_size[:, None])
    return num_dead


def quantize(
    quantizer: EncodecResidualVectorQuantizer, latents: torch.Tensor, decay: float, dead_code_threshold: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """
    Quantizes latents for training: gradients pass straight through, codebooks follow by moving averages.

    Args:
        quantizer (`EncodecResidualVectorQuantizer`): Quantizer, whose codebooks are updated.
        latents (`torch.FloatTensor` of shape `(batch, hidden_size, frames)`): Output of the encoder.
        decay (`float`): See [`update_codebook`].
        dead_code_threshold (`float`): See [`update_codebook`].

    Returns:
        `tuple`: The quantized latents, shaped as `latents`; the commitment loss; the number of codes replaced.
    """
    vectors = latents.transpose(1, 2).reshape(-1, latents.shape[1])
    residual, total, commitment = vectors, torch.zeros_like(vectors), vectors.new_zeros(())
    num_dead = 0
    for layer in quantizer.layers:
        indices = layer.codebook.quantize(residual.detach())
        quantized = layer.codebook.decode(indices)
        commitment = commitment + F.mse_loss(residual, quantized)
        num_dead += update_codebook(layer.codebook, residual.detach(), indices, decay, dead_code_threshold)
        residual = residual - quantized
        total = total + quantized
    total = vectors + (total - vectors).detach()
    total = total.view(latents.shape[0], latents.shape[2], latents.shape[1]).transpose(1, 2)
    return total, commitment / len(quantizer.layers), num_dead
