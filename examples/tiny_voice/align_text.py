"""
Finds which text token is spoken in every frame of a prepared folder, for train_aligned.py.

    python examples/tiny_voice/align_text.py --dataset codes --tokenizer tokenizer --codec codec/export \
        --labels labels.parquet --output alignments.parquet
"""

import argparse
import logging

from transformers import AutoTokenizer, EncodecModel

from transformers_sled.training import align_text, load_source, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder from prepare_data.py")
    parser.add_argument("--split", default="train", help="its split (default: %(default)s)")
    parser.add_argument("--tokenizer", required=True, help="tokenizer of the model to train: repository or folder")
    parser.add_argument("--codec", required=True, help="the EnCodec that made the codes: repository or folder")
    parser.add_argument("--labels", help="parquet file from label_speech.py, whose phonemes are to be added")
    parser.add_argument("--output", required=True, help="parquet file to write, with `id` and `alignment`")
    parser.add_argument("--iterations", type=int, default=12, help="rounds of alignment (default: %(default)s)")
    parser.add_argument(
        "--silence",
        type=int,
        nargs=2,
        default=(0, 0),
        metavar=("BEFORE", "AFTER"),
        help="frames of silence around the speech, for the first round: much depends on it (default: none)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    aligned = align_text(
        load_source(arguments.dataset, split=arguments.split),
        AutoTokenizer.from_pretrained(arguments.tokenizer),
        EncodecModel.from_pretrained(arguments.codec),
        load_source(arguments.labels) if arguments.labels else None,
        arguments.iterations,
        tuple(arguments.silence),
    )
    aligned.to_parquet(arguments.output)


if __name__ == "__main__":
    run_command(main)
