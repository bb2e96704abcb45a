"""
Trains the encoder and the codebooks of a small EnCodec on what its latents should tell, before its decoder is trained.

    python examples/tiny_voice/train_latents.py --config_name examples/tiny_voice/codec_config.json \
        --train_files "corpus/train-*.parquet" --labels labels.parquet --output_dir latents

The decoder then learns to speak from these latents:

    python examples/train_codec.py --model_name_or_path latents/export --freeze_encoder ...

Run the same command again to go on from the latest checkpoint.
"""

import logging

import torch

from transformers_sled.training import (
    CodecModelArguments,
    LatentDataArguments,
    LatentTrainer,
    LatentTrainingArguments,
    create_codec,
    load_labelled_data,
    parse_recipe,
    run_command,
)


def main() -> None:
    data_arguments, model_arguments, arguments = parse_recipe(
        [LatentDataArguments, CodecModelArguments, LatentTrainingArguments]
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    codec = create_codec(model_arguments)
    dataset = load_labelled_data(data_arguments, codec.config.sampling_rate)
    trainer = LatentTrainer(codec, arguments, dataset)
    if trainer.train():
        print(f"The codec, whose decoder is still to be trained: {trainer.output_dir / 'export'}")


if __name__ == "__main__":
    run_command(main)
