"""
Trains the decoder of an EnCodec on the latents of another one, whose shape it need not have.

    python examples/tiny_voice/train_decoder.py --config_name examples/tiny_voice/decoder_config.json \
        --codec examples/tiny_voice/codec --train_files "corpus/train-*.parquet" --output_dir decoder

Language models stay what they are, since the latents do. The codec in `output_dir/export` has the moving average of the
decoder and the codebooks of the other codec; its encoder is for train_encoder.py to teach.

Run the same command again to go on from the latest checkpoint.
"""

import logging
from dataclasses import dataclass, field

import torch
from transformers import EncodecModel

from transformers_sled.training import (
    CodecDataArguments,
    CodecModelArguments,
    DecoderTrainer,
    DecoderTrainingArguments,
    create_codec,
    encode_utterances,
    load_codec_data,
    parse_recipe,
    run_command,
)


@dataclass
class SourceArguments:
    codec: str = field(
        metadata={"help": "EnCodec whose encoder and codebooks make the latents: folder or repository."}
    )


def main() -> None:
    source_arguments, data_arguments, model_arguments, arguments = parse_recipe(
        [SourceArguments, CodecDataArguments, CodecModelArguments, DecoderTrainingArguments]
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    source = EncodecModel.from_pretrained(source_arguments.codec).to(arguments.device)
    codec = create_codec(model_arguments)
    datasets = load_codec_data(data_arguments, source.config.sampling_rate, arguments.seed)
    train_dataset, eval_dataset = (encode_utterances(dataset, source) for dataset in datasets)
    DecoderTrainer(codec, source, arguments, train_dataset, eval_dataset).train()


if __name__ == "__main__":
    run_command(main)
