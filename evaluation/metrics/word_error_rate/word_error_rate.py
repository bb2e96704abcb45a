"""Word and character error rate over a corpus, for judging synthetic speech by what a recognizer hears."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec

import datasets
import evaluate
import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer


_CITATION = ""

_DESCRIPTION = """
Word and character error rate, in percent, over the whole corpus: edits divided by reference words (characters), not
the mean of the rates of single sentences. Both texts pass Whisper's normalizer first: the English one for English,
the plain one (case, punctuation, brackets) for other languages.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): what was recognized, one text an utterance; may be empty.
    references (`list[str]`): what should have been said; not all may be empty.
    language (`str`, *optional*, defaults to `"en"`): language code that selects the normalizer.
    normalize (`bool`, *optional*, defaults to `True`): `False` compares the texts as they are.

Returns:
    `dict` with `word_error_rate` and `character_error_rate` (percent; insertions can bring them above 100),
    `insertions`, `deletions`, `substitutions`, `hits` and `reference_words` (counts of words), and
    `spelling_entries` (how many British spellings were mapped to American ones, 0 without the table).

Examples:

    >>> import evaluate
    >>> metric = evaluate.load("evaluation/metrics/word_error_rate")
    >>> result = metric.compute(predictions=["the dog barked"], references=["The dog barked all night."])
    >>> result["word_error_rate"], result["deletions"]
    (40.0, 2)
"""


@lru_cache
def spelling_table() -> dict[str, str]:
    """The table of British and American spellings of Whisper's normalizer, empty without `whisper-normalizer`."""
    if find_spec("whisper_normalizer") is None:
        return {}
    return json.loads((resources.files("whisper_normalizer") / "normalizers" / "english.json").read_text())


@lru_cache
def text_normalizer(language: str):
    """The normalizer of one language, a function from text to text."""
    if language == "en":
        return EnglishTextNormalizer(spelling_table())
    return BasicTextNormalizer()


def edit_counts(prediction: str, reference: str, language: str = "en", normalize: bool = True) -> dict[str, int]:
    """
    Count the edits between one recognized text and what should have been said.

    Args:
        prediction (`str`):
            Recognized text.
        reference (`str`):
            Text that should have been said.
        language (`str`, *optional*, defaults to `"en"`):
            Language code that selects the normalizer.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to normalize both texts first.

    Returns:
        `dict[str, int]`: `insertions`, `deletions`, `substitutions`, `hits`, `reference_words`, `word_errors`,
        `character_errors` and `reference_characters`.
    """
    if normalize:
        normalizer = text_normalizer(language)
        prediction, reference = normalizer(prediction), normalizer(reference)
    prediction, reference = prediction.strip(), reference.strip()
    words = jiwer.process_words(reference, prediction)
    characters = jiwer.process_characters(reference, prediction)
    edits = {name: getattr(words, name) for name in ("insertions", "deletions", "substitutions")}
    return {
        **edits,
        "hits": words.hits,
        "word_errors": sum(edits.values()),
        "reference_words": words.hits + words.substitutions + words.deletions,
        "character_errors": characters.insertions + characters.deletions + characters.substitutions,
        "reference_characters": characters.hits + characters.substitutions + characters.deletions,
    }


def error_rates(counts: list[dict[str, int]]) -> dict[str, float | int]:
    """
    Corpus-level rates from the counts of [`edit_counts`].

    Args:
        counts (`list[dict[str, int]]`):
            One entry an utterance.

    Returns:
        `dict`: `word_error_rate` and `character_error_rate` in percent, and the summed counts of words.

    Raises:
        ValueError: the references hold no word.
    """
    totals = {name: sum(entry[name] for entry in counts) for name in (counts[0] if counts else {})}
    if not totals.get("reference_words"):
        raise ValueError("references hold no word; at least one is needed to divide by.")
    return {
        "word_error_rate": 100 * totals["word_errors"] / totals["reference_words"],
        "character_error_rate": 100 * totals["character_errors"] / totals["reference_characters"],
        **{name: totals[name] for name in ("insertions", "deletions", "substitutions", "hits", "reference_words")},
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class WordErrorRate(evaluate.Metric):
    """Word and character error rate as an `evaluate` metric."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], language: str = "en", normalize: bool = True
    ) -> dict[str, float | int]:
        pairs = zip(predictions, references, strict=True)
        rates = error_rates([edit_counts(*pair, language=language, normalize=normalize) for pair in pairs])
        return {**rates, "spelling_entries": len(spelling_table()) if normalize and language == "en" else 0}
