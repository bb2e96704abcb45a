"""
Gives a trained model another codec, so that it need not learn to speak from nothing after the codec was trained anew.

    python examples/tiny_voice/change_codec.py --model src/transformers_sled/voices/sled-tiny-en --codec latents/export \
        --train-files "corpus/train-*.parquet" --output-dir sled_changed

The two codecs must have the same frame rate. Least squares on the latents of the same speech gives a linear map each way;
the one back goes into the layer that reads latents, the other into the last one of the generative head. What the maps
miss, and what the old latents did not hold, is for training to learn.
"""

import argparse
import io
import sys
from pathlib import Path

import datasets
import soundfile
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import EncodecModel

from transformers_sled import SledForSpeechSynthesis, SledProcessor


def fit(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
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
def change(model: SledForSpeechSynthesis, codec: EncodecModel, audio: list[torch.Tensor]) -> tuple[float, float]:
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
    old = model.codec
    for name in ("sampling_rate", "hop_length", "hidden_size"):
        if getattr(old.config, name) != getattr(codec.config, name):
            raise ValueError(
                f"`{name}` is {getattr(old.config, name)} in the old codec and {getattr(codec.config, name)} in the new."
            )
    hop_length, pairs = codec.config.hop_length, []
    for samples in tqdm(audio, desc="Comparing"):
        samples = F.pad(samples, (0, -len(samples) % hop_length))[None, None]
        pairs.append((old.encoder(samples)[0].T, codec.encoder(samples)[0].T))
    old_latents, new_latents = (torch.cat(latents) for latents in zip(*pairs, strict=True))
    weight, bias, explained_old = fit(new_latents, old_latents)
    reading = model.z_proj
    reading.bias += reading.weight @ bias
    reading.weight.copy_(reading.weight @ weight)
    weight, bias, explained_new = fit(old_latents, new_latents)
    writing = model.generative_head.final_layer.linear
    writing.bias.copy_(weight @ writing.bias + bias)
    writing.weight.copy_(weight @ writing.weight)
    model.set_codec(codec)
    return explained_old, explained_new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint with its codec: Hub repository or folder")
    parser.add_argument("--codec", required=True, help="the new codec: Hub repository or folder")
    parser.add_argument("--train-files", required=True, help="parquet files (a glob pattern) with an `audio` column")
    parser.add_argument("--num-utterances", type=int, default=750, help="to compare on (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()

    model = SledForSpeechSynthesis.from_pretrained(arguments.model, dtype=torch.float32)
    codec = EncodecModel.from_pretrained(arguments.codec)
    dataset = datasets.load_dataset("parquet", data_files=arguments.train_files, split="train")
    dataset = dataset.cast_column("audio", datasets.Audio(decode=False)).shuffle(seed=0)
    audio = []
    for row in dataset.select(range(min(arguments.num_utterances, len(dataset)))):
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32", always_2d=True)
        if rate != codec.config.sampling_rate:
            sys.exit(
                f"{arguments.train_files} has audio at {rate} Hz, the codec takes {codec.config.sampling_rate} Hz"
            )
        audio.append(torch.from_numpy(samples.mean(axis=1)))
    explained_old, explained_new = change(model, codec, audio)
    model.save_pretrained(arguments.output_dir)
    SledProcessor.from_pretrained(arguments.model).save_pretrained(arguments.output_dir)
    print(f"explained variance of the old latents: {explained_old:.2f}, of the new ones: {explained_new:.2f}")


if __name__ == "__main__":
    main()
