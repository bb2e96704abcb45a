"""
Several utterances by one speaker, one after the other as a single utterance.

A model that has only learned single sentences takes the end of a sentence for the end of the text: it stops at once after
a voice prompt, and after the first sentence of several.
"""

import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..text_sled import encode_text
from .sources import check_columns, load_source


# The first phoneme of label_speech.py.
SILENCE = 0


def find_cuts(
    rows: Sequence[Mapping[str, Any]], alignments: Mapping[str, Mapping[str, Any]], pauses: Sequence[int]
) -> list[tuple[int, int]]:
    """
    Which frames of every row to keep, so that the silence between two is no longer than the pause there.

    Args:
        rows (sequence of `Mapping`):
            Rows of a prepared folder.
        alignments (`Mapping[str, Mapping]`):
            Rows of [`align_text`] by `id`.
        pauses (sequence of `int`):
            Frames of silence between a row and the next, one less than rows.

    Returns:
        `list[tuple[int, int]]`: the first frame of every row and the one after its last. Nothing is cut where one of two
        has no phonemes.
    """
    cuts = [[0, row["length"]] for row in rows]
    phonemes = [alignments.get(row["id"], {}).get("phonemes") for row in rows]
    for index, pause in enumerate(pauses):
        before, after = phonemes[index : index + 2]
        if before is None or after is None:
            continue
        num_before, num_after = count_silence(before[::-1]), count_silence(after)
        excess = max(num_before + num_after - pause, 0)
        from_before = excess * num_before // max(num_before + num_after, 1)
        cuts[index][1] -= from_before
        cuts[index + 1][0] += excess - from_before
    return [(first, last) for first, last in cuts]


def count_silence(phonemes: Sequence[int]) -> int:
    """Frames of silence at the start."""
    return next((index for index, phoneme in enumerate(phonemes) if phoneme != SILENCE), len(phonemes))


def join(rows: Sequence[Mapping[str, Any]], cuts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Rows of a prepared folder as one, of each the frames that `cuts` names."""
    length = sum(last - first for first, last in cuts)
    codes = [np.asarray(row["audio_codes"])[:, first:last] for row, (first, last) in zip(rows, cuts, strict=True)]
    return {
        "id": "+".join(row["id"] for row in rows),
        "text": " ".join(row["text"] for row in rows),
        "speaker": rows[0]["speaker"],
        "duration": sum(row["duration"] for row in rows) * length / sum(row["length"] for row in rows),
        "length": length,
        "audio_codes": list(np.concatenate(codes, axis=1)),
    }


def join_alignments(
    alignments: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    cuts: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any] | None:
    """The alignment of rows as one from those of its parts; `None` where one of them has none."""
    if any(row["id"] not in alignments for row in rows):
        return None
    texts = [row["text"] for row in rows]
    num_tokens = len(encode_text(tokenizer, " ".join(texts)))
    joined: dict[str, Any] = {"id": "+".join(row["id"] for row in rows), "alignment": []}
    for index, (row, (first, last)) in enumerate(zip(rows, cuts, strict=True)):
        part = alignments[row["id"]]
        # Counted from the end: the space between the texts can be a token of its own.
        offset = num_tokens - len(encode_text(tokenizer, " ".join(texts[index:])))
        joined["alignment"] += [token + offset for token in part["alignment"][first:last]]
        if "phonemes" in part:
            joined["phonemes"] = joined.get("phonemes", []) + part["phonemes"][first:last]
    return joined


def choose_rows(
    speakers: Sequence[str | None],
    lengths: Sequence[int],
    num_joined: int,
    *,
    max_utterances: int,
    max_frames: int,
    favored_speakers: Sequence[str],
    favored_share: float,
    short_frames: int,
    short_share: float,
    chance: random.Random,
) -> list[tuple[int, ...]]:
    """
    Chooses rows by one speaker to join, of which any is equally likely to come first.

    Args:
        speakers (sequence of `str`):
            The speaker of every row; rows without one are left alone.
        lengths (sequence of `int`):
            Their lengths in frames.
        num_joined (`int`):
            How many to choose.
        max_utterances (`int`):
            The most rows in one. Every number from 2 on is equally likely, but for those that are too long.
        max_frames (`int`):
            The longest that they may be together, in frames.
        favored_speakers (sequence of `str`):
            Speakers of a share of them.
        favored_share (`float`):
            That share; the others are by any speaker.
        short_frames (`int`):
            The longest that a row may be to count as short, in frames.
        short_share (`float`):
            The share of what is chosen that has to end in a short row, by speakers who have some.
        chance (`random.Random`):
            Draws them.

    Returns:
        `list[tuple[int, ...]]`: the rows, in order; fewer than `num_joined` where most are too long.
    """
    rows_of: dict[str | None, list[int]] = {}
    for row, speaker in enumerate(speakers):
        rows_of.setdefault(speaker, []).append(row)
    rows_of.pop(None, None)
    candidates = [row for rows in rows_of.values() if len(rows) > 1 for row in rows]
    favored = [row for row in candidates if speakers[row] in favored_speakers]
    short_of = {speaker: [row for row in rows if lengths[row] <= short_frames] for speaker, rows in rows_of.items()}
    chosen: dict[tuple[int, ...], None] = {}
    for _ in range(10 * num_joined if candidates else 0):
        first = chance.choice(favored if favored and chance.random() < favored_share else candidates)
        others, wanted = rows_of[speakers[first]], chance.randint(2, max_utterances)
        short = [row for row in short_of[speakers[first]] if row != first] if chance.random() < short_share else []
        last = [chance.choice(short)] if short else []
        rows, total = [first], lengths[first] + sum(lengths[row] for row in last)
        for row in chance.sample(others, min(wanted, len(others))):
            if row not in (first, *last) and len(rows + last) < wanted and total + lengths[row] <= max_frames:
                rows.append(row)
                total += lengths[row]
        rows += last
        if len(rows) > 1 and total <= max_frames:
            chosen[tuple(rows)] = None
        if len(chosen) == num_joined:
            break
    return list(chosen)


def join_utterances(
    folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    split: str = "train",
    num_joined: int = 10_000,
    max_utterances: int = 6,
    max_frames: int = 360,
    pause: tuple[int, int] = (5, 18),
    favored_speakers: Sequence[str] = (),
    favored_share: float = 0.5,
    short_frames: int = 50,
    short_share: float = 0.0,
    seed: int = 0,
    alignments: datasets.Dataset | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[int, int]:
    """
    Copies a prepared folder and adds joined utterances to a split.

    Args:
        folder (`str` or `os.PathLike`):
            Folder from [`prepare_dataset`], with speakers.
        output_dir (`str` or `os.PathLike`):
            Folder to write.
        split (`str`, *optional*, defaults to `"train"`):
            The split to add to.
        num_joined (`int`, *optional*, defaults to 10000):
            How many to add.
        max_utterances (`int`, *optional*, defaults to 6):
            The most utterances in one, at least 2.
        max_frames (`int`, *optional*, defaults to 360):
            The longest that they may be together, in frames.
        pause (`tuple[int, int]`, *optional*, defaults to `(5, 18)`):
            The shortest and the longest silence between two, in frames: what is longer is cut, where `alignments` have
            phonemes.
        favored_speakers (sequence of `str`, *optional*):
            Speakers to join more often.
        favored_share (`float`, *optional*, defaults to 0.5):
            Their share of what is added.
        short_frames (`int`, *optional*, defaults to 50):
            The longest that an utterance may be to count as short, in frames.
        short_share (`float`, *optional*, defaults to 0.0):
            The share of what is added that has to end in a short utterance, by speakers who have some.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.
        alignments (`datasets.Dataset`, *optional*):
            From [`align_text`]. They are joined as well, in `alignments.parquet` of `output_dir`.
        tokenizer ([`PreTrainedTokenizerBase`], *optional*):
            The tokenizer of these alignments.

    Returns:
        `tuple(int, int)`: the numbers of utterances and of joined ones.

    Raises:
        `ValueError`: If `output_dir` is there, `folder` is no prepared one, only one of `alignments` and `tokenizer` is
        given, a number is out of range, a speaker is not there, or nothing can be joined.

    Example:

    ```python
    >>> from transformers_sled.training import join_utterances

    >>> join_utterances("my_codes/", "my_codes_joined/", num_joined=1000)  # doctest: +SKIP
    (8000, 1000)
    ```
    """
    folder, output_dir = Path(folder), Path(output_dir)
    if (alignments is None) != (tokenizer is None):
        raise ValueError("`alignments` and `tokenizer` need each other")
    if max_utterances < 2:
        raise ValueError(f"`max_utterances` must be at least 2, got {max_utterances}")
    if not 0 <= pause[0] <= pause[1]:
        raise ValueError(f"`pause` must be two numbers from 0 on, the shorter one first, got {tuple(pause)}")
    if not 0 <= short_share <= 1:
        raise ValueError(f"`short_share` must be between 0 and 1, got {short_share}")
    if output_dir.exists():
        raise ValueError(f"`output_dir` {output_dir} is already there")
    if not (folder / "preparation").is_dir():
        raise ValueError(f"`folder` {folder} was not written by prepare_data.py")
    dataset = load_source(str(folder), split=split)
    speakers = dataset["speaker"][:]
    if missing := set(favored_speakers) - set(speakers):
        raise ValueError(f"`favored_speakers` must be speakers of {folder}, which has no {', '.join(sorted(missing))}")
    chance = random.Random(seed)
    chosen = choose_rows(
        speakers,
        dataset["length"][:],
        num_joined,
        max_utterances=max_utterances,
        max_frames=max_frames,
        favored_speakers=favored_speakers,
        favored_share=favored_share,
        short_frames=short_frames,
        short_share=short_share,
        chance=chance,
    )
    if not chosen:
        raise ValueError(f"No speaker of {folder} has two utterances of {max_frames} frames together")
    if alignments is not None:
        check_columns(alignments, ["id", "alignment"], "alignments")
    known = {} if alignments is None else {row["id"]: row for row in alignments}
    joined, joined_alignments = [], []
    for indices in tqdm(chosen, desc="Joining"):
        rows = [dataset[index] for index in indices]
        cuts = find_cuts(rows, known, [chance.randint(*pause) for _ in rows[1:]])
        joined.append(join(rows, cuts))
        if tokenizer is not None and (alignment := join_alignments(known, rows, cuts, tokenizer)) is not None:
            joined_alignments.append(alignment)
    if alignments is not None and not joined_alignments:
        raise ValueError("`alignments` has no utterances of those that are joined")
    # Under another name until it is whole.
    unfinished = output_dir.with_name(f"{output_dir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(folder, unfinished)
    added = datasets.Dataset.from_list(joined, features=dataset.features)
    added.to_parquet(unfinished / "data" / f"{split}-joined.parquet")
    if alignments is not None:
        added = datasets.Dataset.from_list(joined_alignments, features=alignments.features)
        datasets.concatenate_datasets([alignments, added]).to_parquet(unfinished / "alignments.parquet")
    unfinished.rename(output_dir)
    return len(dataset), len(joined)
