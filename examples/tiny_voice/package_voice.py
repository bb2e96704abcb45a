"""
Packages a trained checkpoint to ship: weights in half precision on disk, which load in float32.

    python examples/tiny_voice/package_voice.py --model sled --codec codec/export --output-dir voices/sled-tiny-en

One model that has learned both layouts is packaged twice, and its weights are stored once: the second folder's index says
that they lie in the first, beside which it has to stay.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTextToWaveform, AutoProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from transformers_sled.training import run_command


def refer_to(file: Path, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Gives a folder an index of weights that are stored in another folder's file."""
    stored = load_file(file)
    if stored.keys() != weights.keys() or not all(stored[name].equal(weights[name]) for name in weights):
        raise ValueError(f"{file} has other weights than the model")
    place = Path(os.path.relpath(file, folder)).as_posix()
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(weights), place)}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: Hub repository or folder")
    parser.add_argument("--codec", help="codec to package instead of the checkpoint's: repository or folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write; a model card there is kept")
    parser.add_argument(
        "--offline", action="store_true", help="package an interleaved model that has learned both layouts as offline"
    )
    parser.add_argument(
        "--weights-of", type=Path, help="folder of the same model in the other layout, to refer to for the weights"
    )
    parser.add_argument("--temperature", type=float, help="scale of the noise in its generation configuration")
    parser.add_argument("--min-new-tokens", type=int, help="frames before which its speech does not end")
    parser.add_argument("--normalizer", help="language in which its processor spells out numbers and the like")
    parser.add_argument("--max-part-seconds", type=float, help="length of the parts in which it speaks longer text")
    arguments = parser.parse_args()
    if arguments.min_new_tokens is not None and arguments.min_new_tokens < 0:
        parser.error(f"--min-new-tokens is {arguments.min_new_tokens}; at least 0 is accepted.")

    model = AutoModelForTextToWaveform.from_pretrained(arguments.model, codec=arguments.codec, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(arguments.model)
    settings = {"normalizer": arguments.normalizer, "max_part_seconds": arguments.max_part_seconds}
    settings = {name: value for name, value in settings.items() if value is not None}
    # Loading refuses what a processor cannot have, but its tokenizer would save the settings, too.
    AutoProcessor.from_pretrained(arguments.model, **settings)
    for name, value in settings.items():
        setattr(processor, name, value)
    if arguments.offline:
        model.config.update({"text_chunk_size": None, "speech_chunk_size": None})
        # The end of speech has another threshold where it is not asked at every frame.
        model.generation_config.eos_threshold = None
        model.fill_generation_config()
        processor.tokenizer.padding_side = "left"
    if arguments.temperature is not None:
        model.generation_config.temperature = arguments.temperature
    if arguments.min_new_tokens is not None:
        model.generation_config.min_new_tokens = arguments.min_new_tokens
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    file = arguments.output_dir / SAFE_WEIGHTS_NAME
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()
    }
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError(f"{arguments.model} has weights that are not finite, or not in half precision")
    if arguments.weights_of is None:
        save_file(weights, file, metadata={"format": "pt"})
    else:
        file.unlink()
        refer_to(arguments.weights_of / SAFE_WEIGHTS_NAME, weights, arguments.output_dir)
    size = sum(file.stat().st_size for file in arguments.output_dir.iterdir())
    print(f"{arguments.output_dir}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
