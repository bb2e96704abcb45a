"""
Pairs of utterances by one speaker, one after the other as a single utterance.

A model that has only learned single sentences takes the end of a sentence for the end of the text: it stops at once after
a voice prompt, and after the first sentence of several.
"""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..text_sled import encode_text
from .sources import load_source


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
    alignments: dict[str, dict[str, Any]],
    first: dict[str, Any],
    second: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
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
    rows_of: dict[str | None, list[int]] = {}
    for row, speaker in enumerate(speakers):
        rows_of.setdefault(speaker, []).append(row)
    rows_of.pop(None, None)
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


def join_utterances(
    folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    split: str = "train",
    num_pairs: int = 2500,
    max_frames: int = 240,
    seed: int = 0,
    alignments: datasets.Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[int, int]:
    """
    Copies a prepared folder and adds pairs to a split.

    Args:
        folder (`str` or `os.PathLike`):
            Folder from [`prepare_dataset`], with speakers.
        output_dir (`str` or `os.PathLike`):
            Folder to write.
        split (`str`, *optional*, defaults to `"train"`):
            The split that gets pairs.
        num_pairs (`int`, *optional*, defaults to 2500):
            Pairs to add.
        max_frames (`int`, *optional*, defaults to 240):
            The longest that a pair may be, in frames.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.
        alignments (`datasets.Dataset`, *optional*):
            From [`align_text`]. They are joined as well, in `alignments.parquet` of `output_dir`.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*):
            The tokenizer of these alignments.

    Returns:
        `tuple(int, int)`: the numbers of utterances and of pairs.

    Raises:
        `ValueError`: If `output_dir` is there, `folder` is no prepared one, only one of `alignments` and `tokenizer` is
        given, or no pair can be made.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    if (alignments is None) != (tokenizer is None):
        raise ValueError("`alignments` and `tokenizer` need each other")
    if output_dir.exists():
        raise ValueError(f"`output_dir` {output_dir} is already there")
    if not (folder / "preparation").is_dir():
        raise ValueError(f"`folder` {folder} was not written by prepare_data.py")
    dataset = load_source(str(folder), split=split)
    pairs = choose_pairs(dataset["speaker"][:], dataset["length"][:], num_pairs, max_frames, seed)
    if not pairs:
        raise ValueError(f"No speaker of {folder} has two utterances of {max_frames} frames together")
    parts = [(dataset[first], dataset[second]) for first, second in tqdm(pairs, desc="Reading")]
    joined = datasets.Dataset.from_list([join(*rows) for rows in parts], features=dataset.features)
    # Under another name until it is whole.
    unfinished = output_dir.with_name(f"{output_dir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(folder, unfinished)
    joined.to_parquet(unfinished / "data" / f"{split}-joined.parquet")
    if alignments is not None and tokenizer is not None:
        table = {row["id"]: row for row in alignments}
        for rows in parts:
            table |= join_alignments(table, *rows, tokenizer)
        if len(table) == len(alignments):
            raise ValueError("`alignments` has no utterances of the pairs")
        datasets.Dataset.from_list(list(table.values()), features=alignments.features).to_parquet(
            unfinished / "alignments.parquet"
        )
    unfinished.rename(output_dir)
    return len(dataset), len(joined)
