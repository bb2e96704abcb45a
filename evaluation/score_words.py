"""
Counts what a recognizer misses by how often a word is in the training texts: how English words sound does not follow from
their letters, so a model has to have heard them.

    python evaluation/score_words.py --results outputs/sled-tiny-en --texts "corpus/train-*.parquet"

takes the folder of a run of run_eval.py and prints, for every system, the words of each frequency and the share of them, in
percent, that are not recognized. Words that are heard in addition belong to none.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jiwer

from metrics.word_error_rate.word_error_rate import text_normalizer
from results import RecordStore
from transformers_sled.training import load_source


# The lowest frequency of each group of words.
FREQUENCIES = {"never": 0, "1 to 3 times": 1, "4 to 30 times": 4, "more often": 31}


def count_missed(
    references: list[str], hypotheses: list[str], frequencies: Counter[str]
) -> dict[str, dict[str, float]]:
    """Numbers of reference words of each group of frequencies, and the percentages that are missed, of normalized texts."""
    words, missed = Counter[str](), Counter[str]()
    output = jiwer.process_words(references, hypotheses)
    for reference, chunks in zip(output.references, output.alignments, strict=True):
        for chunk in chunks:
            for word in reference[chunk.ref_start_idx : chunk.ref_end_idx]:
                group = max(
                    (name for name, lowest in FREQUENCIES.items() if frequencies[word] >= lowest), key=FREQUENCIES.get
                )
                words[group] += 1
                missed[group] += chunk.type != "equal"
    return {
        name: {"words": words[name], "missed": round(100 * missed[name] / words[name], 1)}
        for name in FREQUENCIES
        if words[name]
    }


def score(results: Path, texts: list[str]) -> dict[str, Any]:
    """What [`count_missed`] finds, for every system of a run."""
    if not (results / "plan.json").is_file():
        raise ValueError(f"`results` {str(results)!r} has no plan.json; a folder of run_eval.py has one.")
    plan = json.loads((results / "plan.json").read_text())
    normalize = text_normalizer(plan["settings"]["language"])
    spoken = {utterance["id"]: normalize(utterance["text"]) for utterance in plan["utterances"]}
    frequencies = Counter(word for text in texts for word in normalize(text).split())
    heard: dict[str, list[tuple[str, str]]] = {}
    for (system, utterance), record in RecordStore(results / "records").read("text").items():
        heard.setdefault(system, []).append((spoken[utterance], normalize(record["text"])))
    if not heard:
        raise ValueError(f"`results` {str(results)!r} has nothing that was recognized.")
    return {system: count_missed(*map(list, zip(*pairs, strict=True)), frequencies) for system, pairs in heard.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of a run of run_eval.py")
    parser.add_argument(
        "--texts", required=True, help="parquet files (a glob pattern) with the `text` of the training"
    )
    options = parser.parse_args(arguments)
    try:
        result = score(options.results, load_source(options.texts)["text"][:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
