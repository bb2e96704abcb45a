"""
Train an EnCodec as a `transformers.EncodecModel`, following "High Fidelity Neural Audio Compression"
(https://huggingface.co/papers/2210.13438).

    python examples/train_codec.py \
        --train_files "corpus/train-*.parquet" \
        --config_name examples/tiny_voice/codec_config.json \
        --output_dir codec

Training has three phases, switched by step: an autoencoder, the same with the quantizer, and last the discriminator.
Run the same command again to go on from the latest checkpoint in `output_dir`. The codec is exported to
`output_dir/export`, where `EncodecModel.from_pretrained` and `EncodecFeatureExtractor.from_pretrained` find it.
"""

import json
import logging

import torch

from transformers_sled.training import (
    CodecDataArguments,
    CodecModelArguments,
    CodecTrainer,
    CodecTrainingArguments,
    create_codec,
    load_codec_data,
    parse_recipe,
    run_command,
)


def main() -> None:
    data_arguments, model_arguments, arguments = parse_recipe(
        [CodecDataArguments, CodecModelArguments, CodecTrainingArguments]
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    codec = create_codec(model_arguments)
    train_dataset, eval_dataset = load_codec_data(data_arguments, codec.config.sampling_rate, arguments.seed)
    trainer = CodecTrainer(codec, arguments, train_dataset, eval_dataset)
    if arguments.eval_only:
        print(json.dumps(trainer.evaluate(), indent=2))
    else:
        trainer.train()


if __name__ == "__main__":
    run_command(main)
