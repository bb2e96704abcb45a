"""
Labels recordings with the phonemes and the pitch of their speech, for train_latents.py and train_aligned.py.

    python examples/tiny_voice/label_speech.py --dataset "corpus/train-*.parquet" --output labels.parquet --silence 0.2 0.3

Needs the program espeak-ng, which turns text into phonemes, and the package `pyworld`, which finds pitch.
"""

import argparse
import logging

from transformers_sled.training import label_speech, load_source, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="parquet files (a glob pattern) with `id`, `text`, `audio`")
    parser.add_argument("--language", default="en-us", help="voice of espeak-ng (default: %(default)s)")
    parser.add_argument("--output", required=True, help="parquet file: `id`, `phonemes`, `pitch`")
    parser.add_argument("--iterations", type=int, default=14, help="rounds of alignment (default: %(default)s)")
    parser.add_argument(
        "--silence",
        type=float,
        nargs=2,
        default=(0.0, 0.0),
        metavar=("BEFORE", "AFTER"),
        help="seconds of silence around the speech, for the first round: much depends on it (default: none)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    dataset = load_source(arguments.dataset)
    labels = label_speech(dataset, arguments.language, arguments.iterations, tuple(arguments.silence))
    labels.to_parquet(arguments.output)


if __name__ == "__main__":
    run_command(main)
