"""
Adds several utterances by one speaker, one after the other as a single utterance, to a prepared folder.

    python examples/tiny_voice/join_utterances.py --dataset codes --alignments alignments.parquet --tokenizer tokenizer \
        --output-dir codes_joined

Alignments from align_text.py are joined as well, in `alignments.parquet` of the folder. Where they have phonemes, the
silence between two utterances is cut to the length of a pause.
"""

import argparse

from transformers import AutoTokenizer

from transformers_sled.training import join_utterances, load_source, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder from prepare_data.py, with speakers")
    parser.add_argument("--split", default="train", help="the split to add to (default: %(default)s)")
    parser.add_argument("--output-dir", required=True, help="folder to write: the same data and what is joined")
    parser.add_argument("--alignments", help="parquet file from align_text.py, to be joined as well")
    parser.add_argument("--tokenizer", help="the tokenizer of these alignments: repository or folder")
    parser.add_argument("--num-joined", type=int, default=10_000, help="how many to add (default: %(default)s)")
    parser.add_argument("--max-utterances", type=int, default=6, help="most utterances in one (default: %(default)s)")
    parser.add_argument("--max-frames", type=int, default=360, help="longest one, in frames (default: %(default)s)")
    parser.add_argument(
        "--pause",
        type=int,
        nargs=2,
        default=(5, 18),
        metavar=("SHORTEST", "LONGEST"),
        help="frames of silence between two, where there are phonemes (default: 5 18)",
    )
    parser.add_argument("--favored-speakers", nargs="+", default=[], help="speakers to join more often")
    parser.add_argument("--favored-share", type=float, default=0.5, help="theirs of the joined (default: %(default)s)")
    parser.add_argument(
        "--short-frames", type=int, default=50, help="longest short utterance, in frames (default: %(default)s)"
    )
    parser.add_argument(
        "--short-share", type=float, default=0.0, help="share that ends in a short utterance (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default: %(default)s)")
    arguments = parser.parse_args()
    num_utterances, num_joined = join_utterances(
        arguments.dataset,
        arguments.output_dir,
        split=arguments.split,
        num_joined=arguments.num_joined,
        max_utterances=arguments.max_utterances,
        max_frames=arguments.max_frames,
        pause=tuple(arguments.pause),
        favored_speakers=arguments.favored_speakers,
        favored_share=arguments.favored_share,
        short_frames=arguments.short_frames,
        short_share=arguments.short_share,
        seed=arguments.seed,
        alignments=load_source(arguments.alignments) if arguments.alignments else None,
        tokenizer=AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None,
    )
    print(f"{arguments.output_dir}: {num_utterances} utterances and {num_joined} joined")


if __name__ == "__main__":
    run_command(main)
