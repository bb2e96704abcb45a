"""
Adds pairs of utterances by one speaker to a prepared folder, one after the other as a single utterance.

    python examples/tiny_voice/join_utterances.py --dataset codes --alignments alignments.parquet --tokenizer tokenizer \
        --output-dir codes_joined

Alignments from align_text.py are joined as well, in `alignments.parquet` of the folder.
"""

import argparse

from transformers import AutoTokenizer

from transformers_sled.training import join_utterances, load_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder from prepare_data.py, with speakers")
    parser.add_argument("--split", default="train", help="the split that gets pairs (default: %(default)s)")
    parser.add_argument("--output-dir", required=True, help="folder to write: the same data and the pairs")
    parser.add_argument("--alignments", help="parquet file from align_text.py, to be joined as well")
    parser.add_argument("--tokenizer", help="the tokenizer of these alignments: repository or folder")
    parser.add_argument("--num-pairs", type=int, default=2500, help="pairs to add (default: %(default)s)")
    parser.add_argument("--max-frames", type=int, default=240, help="longest pair, in frames (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default: %(default)s)")
    arguments = parser.parse_args()
    num_utterances, num_pairs = join_utterances(
        arguments.dataset,
        arguments.output_dir,
        split=arguments.split,
        num_pairs=arguments.num_pairs,
        max_frames=arguments.max_frames,
        seed=arguments.seed,
        alignments=load_source(arguments.alignments) if arguments.alignments else None,
        tokenizer=AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None,
    )
    print(f"{arguments.output_dir}: {num_utterances} utterances and {num_pairs} pairs")


if __name__ == "__main__":
    main()
