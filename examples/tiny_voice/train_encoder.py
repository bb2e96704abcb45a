"""
Teaches the encoder of a codec from train_decoder.py the latents that its decoder was trained on.

    python examples/tiny_voice/train_encoder.py --model_name_or_path decoder/export --codec examples/tiny_voice/codec \
        --train_files "corpus/train-*.parquet" --output_dir codec

Voices can then be cloned, and codes be made, with the codec in `output_dir/export` alone.

Run the same command again to go on from the latest checkpoint, with the decoder as it is by then.
"""

import logging
from dataclasses import dataclass, field

import torch
from transformers import EncodecModel

from transformers_sled.training import (
    CodecDataArguments,
    CodecModelArguments,
    EncoderTrainer,
    EncoderTrainingArguments,
    create_codec,
    encode_utterances,
    load_codec_data,
    parse_recipe,
    run_command,
)


@dataclass
class SourceArguments:
    codec: str = field(metadata={"help": "EnCodec whose encoder makes the latents: folder or repository."})


def main() -> None:
    source_arguments, data_arguments, model_arguments, arguments = parse_recipe(
        [SourceArguments, CodecDataArguments, CodecModelArguments, EncoderTrainingArguments]
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    source = EncodecModel.from_pretrained(source_arguments.codec).to(arguments.device)
    codec = create_codec(model_arguments)
    datasets = load_codec_data(data_arguments, source.config.sampling_rate, arguments.seed)
    train_dataset, eval_dataset = (encode_utterances(dataset, source) for dataset in datasets)
    EncoderTrainer(codec, source, arguments, train_dataset, eval_dataset).train()


if __name__ == "__main__":
    run_command(main)
