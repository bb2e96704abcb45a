"""
Adds pairs of utterances by one speaker to a prepared folder, one after the other as a single utterance.

    python examples/tiny_voice/join_utterances.py --dataset codes --alignments alignments.parquet --tokenizer tokenizer \
        --output-dir codes_joined

A model that has only learned single sentences takes the end of a sentence for the end of the text: it stops at once after
a voice prompt, and after the first sentence of several. Alignments from align_text.py are joined as well, in
`alignments.parquet` of the folder.
"""

import argparse
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm
from transformers import AutoTokenizer

from transformers_sled.data_sled import load_source
from transformers_sled.text_sled import encode_text


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two rows of a prepared folder as one."""
    return {
        "id": f"{first['id']}+{second['id']}",
        "text": f"{first['text']} {second['text']}",
        "speaker": first["speaker"],
        "duration": first["duration"] + second["duration"],
        "length": first["length"] + second["length"],
        "audio_codes": [
            [*codes, *more] for codes, more in zip(first["audio_codes"], second["audio_codes"], strict=True)
        ],
    }


def join_alignments(
    alignments: dict[str, dict[str, Any]], first: dict[str, Any], second: dict[str, Any], tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """The alignment of two rows as one, by its id, from those of the two; nothing where one of them has none."""
    if first["id"] not in alignments or second["id"] not in alignments:
        return {}
    row = join(first, second)
    before, after = alignments[first["id"]], alignments[second["id"]]
    # Counted from the end: the space between the texts can be a token of its own.
    offset = len(encode_text(tokenizer, row["text"])) - len(encode_text(tokenizer, second["text"]))
    joined = {"id": row["id"], "alignment": [*before["alignment"], *(token + offset for token in after["alignment"])]}
    if "phonemes" in before:
        joined["phonemes"] = [*before["phonemes"], *after["phonemes"]]
    return {row["id"]: joined}


def choose_pairs(
    speakers: list[str | None], lengths: list[int], num_pairs: int, max_frames: int, seed: int
) -> list[tuple[int, int]]:
    """
    Pairs of rows by one speaker, of which any utterance is equally likely to come first.

    Args:
        speakers (`list[str | None]`):
            The speaker of every row; rows without one are left alone.
        lengths (`list[int]`):
            Their lengths in frames.
        num_pairs (`int`):
            Pairs to choose.
        max_frames (`int`):
            The longest that a pair may be, in frames.
        seed (`int`):
            Seed of the choice.

    Returns:
        `list[tuple[int, int]]`: the pairs; fewer than `num_pairs` where most are too long.
    """
    chance = random.Random(seed)
    rows_of: dict[str, list[int]] = {}
    for row, speaker in enumerate(speakers):
        if speaker is not None:
            rows_of.setdefault(speaker, []).append(row)
    candidates = [row for rows in rows_of.values() if len(rows) > 1 for row in rows]
    chosen: dict[tuple[int, int], None] = {}
    for _ in range(10 * num_pairs if candidates else 0):
        first = chance.choice(candidates)
        second = chance.choice(rows_of[speakers[first]])
        if first != second and lengths[first] + lengths[second] <= max_frames:
            chosen[first, second] = None
        if len(chosen) == num_pairs:
            break
    return list(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="folder from prepare_data.py, with speakers")
    parser.add_argument("--split", default="train", help="the split that gets pairs (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write: the same data and the pairs")
    parser.add_argument("--alignments", type=Path, help="parquet file from align_text.py, to be joined as well")
    parser.add_argument("--tokenizer", help="the tokenizer of these alignments: repository or folder")
    parser.add_argument("--num-pairs", type=int, default=2500, help="pairs to add (default: %(default)s)")
    parser.add_argument("--max-frames", type=int, default=240, help="longest pair, in frames (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default: %(default)s)")
    arguments = parser.parse_args()
    if (arguments.alignments is None) != (arguments.tokenizer is None):
        parser.error("--alignments and --tokenizer need each other")
    if arguments.output_dir.exists():
        sys.exit(f"{arguments.output_dir} is already there")
    if not (arguments.dataset / "preparation").is_dir():
        sys.exit(f"{arguments.dataset} was not written by prepare_data.py")

    dataset = load_source(str(arguments.dataset), split=arguments.split)
    pairs = choose_pairs(
        dataset["speaker"][:], dataset["length"][:], arguments.num_pairs, arguments.max_frames, arguments.seed
    )
    if not pairs:
        sys.exit(f"No speaker of {arguments.dataset} has two utterances of {arguments.max_frames} frames together")
    parts = [(dataset[first], dataset[second]) for first, second in tqdm(pairs, desc="Reading")]
    joined = datasets.Dataset.from_list([join(*rows) for rows in parts], features=dataset.features)
    # Under another name until it is whole.
    unfinished = arguments.output_dir.with_name(f"{arguments.output_dir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(arguments.dataset, unfinished)
    joined.to_parquet(unfinished / "data" / f"{arguments.split}-joined.parquet")
    if arguments.alignments is not None:
        aligned = datasets.Dataset.from_parquet(str(arguments.alignments))
        table = {row["id"]: row for row in aligned}
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        num_aligned = len(table)
        for rows in parts:
            table |= join_alignments(table, *rows, tokenizer)
        if len(table) == num_aligned:
            sys.exit(f"{arguments.alignments} has no utterances of the pairs")
        datasets.Dataset.from_list(list(table.values()), features=aligned.features).to_parquet(
            unfinished / "alignments.parquet"
        )
    unfinished.rename(arguments.output_dir)
    print(f"{arguments.output_dir}: {len(dataset)} utterances and {len(joined)} pairs")


if __name__ == "__main__":
    main()
