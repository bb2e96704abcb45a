"""From records to figures: corpus-level rates, means, bootstrap intervals and the sanity of the speaker encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from metrics.word_error_rate.word_error_rate import edit_counts, error_rates, spelling_table
from results import RecordStore


RESAMPLES = 1000


def system_name(protocol: str, guidance_scale: float) -> str:
    """Name under which a protocol's synthesis is kept."""
    return f"{protocol}-guidance-{guidance_scale:g}"


def interval(statistic: Callable[..., np.ndarray], *samples: list[float]) -> list[float] | None:
    """
    Bootstrap 95 % interval of a statistic over utterances, with a fixed seed.

    Args:
        statistic (`Callable`):
            Function of the samples and `axis`.
        *samples (`list[float]`):
            Values of the utterances, resampled together.

    Returns:
        `list[float]` or `None`: lower and upper bound; `None` for fewer than two utterances.
    """
    if len(samples[0]) < 2:
        return None
    result = bootstrap(
        samples, statistic, paired=True, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    return [round(float(bound), 4) for bound in result.confidence_interval]


def ratio(errors: np.ndarray, totals: np.ndarray, axis: int = -1) -> np.ndarray:
    """Corpus-level rate in percent; a resample without a single reference word counts as all wrong."""
    errors, totals = np.sum(errors, axis=axis), np.sum(totals, axis=axis)
    return 100 * np.divide(errors, totals, out=np.ones_like(errors, dtype=float), where=totals > 0)


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> float:
    """
    Equal error rate of telling same-speaker pairs from different-speaker pairs by their similarity.

    Args:
        same (`np.ndarray` of shape `(pairs,)`):
            Similarities of pairs by one speaker.
        different (`np.ndarray` of shape `(pairs,)`):
            Similarities of pairs by two speakers.

    Returns:
        `float`: percent, where as many same pairs are refused as different ones accepted.
    """
    same, different = np.sort(same), np.sort(different)
    thresholds = np.concatenate([same, different])
    refused = np.searchsorted(same, thresholds) / len(same)
    accepted = 1 - np.searchsorted(different, thresholds) / len(different)
    best = np.argmin(np.abs(refused - accepted))
    return float(50 * (refused[best] + accepted[best]))


def encoder_sanity(embeddings: list[np.ndarray], speakers: list[str]) -> dict[str, Any] | None:
    """
    Whether the speaker encoder separates the voices of the data set, over all pairs of recordings.

    Args:
        embeddings (`list[np.ndarray]`):
            Embeddings of recordings.
        speakers (`list[str]`):
            Who speaks in them.

    Returns:
        `dict[str, Any]` or `None`: equal error rate in percent and the numbers of pairs; `None` where the data set has
        no pair by one speaker or none by two.
    """
    if len(embeddings) < 2:
        return None
    similarities = np.stack(embeddings) @ np.stack(embeddings).T
    names = np.array(speakers)
    upper = np.triu_indices(len(names), 1)
    same = (names[:, None] == names[None, :])[upper]
    if same.all() or not same.any():
        return None
    pairs = similarities[upper]
    return {
        "equal_error_rate": round(equal_error_rate(pairs[same], pairs[~same]), 2),
        "same_speaker_pairs": int(same.sum()),
        "different_speaker_pairs": int((~same).sum()),
    }


class Scores:
    """
    Every score of every utterance, computed from the records of a run.

    Args:
        plan (`dict[str, Any]`):
            Settings, utterances and pairs of the run.
        store ([`RecordStore`]):
            Its records.
    """

    def __init__(self, plan: dict[str, Any], store: RecordStore):
        self.plan = plan
        self.settings = plan["settings"]
        self.utterances = {utterance["id"]: utterance for utterance in plan["utterances"]}
        self.audio = store.read("audio")
        self.texts = store.read("text")
        self.embeddings = {key: record["embedding"] for key, record in store.read("embedding").items()}
        self.opinions = store.read("dnsmos")

    def systems(self, protocol: str) -> dict[str, dict[str, Any]]:
        """Rows of a protocol's table: their titles, and the system and guidance scale behind them."""
        rows = {"Ground truth": "original", "Codec resynthesis": "resynthesis"}
        rows = {title: {"system": system, "guidance_scale": None} for title, system in rows.items()}
        for scale in self.settings["guidance_scales"]:
            rows[f"SLED, guidance {scale:g}"] = {"system": system_name(protocol, scale), "guidance_scale": scale}
        return rows

    def similarity(self, first: tuple[str, ...], second: tuple[str, ...]) -> float | None:
        """Cosine of two embeddings, 4 digits; `None` where one of them is of silence."""
        first, second = self.embeddings.get(first), self.embeddings.get(second)
        return None if first is None or second is None else round(float(np.dot(first, second)), 4)

    def utterance(self, protocol: str, system: str, utterance_id: str, prompt_id: str | None) -> dict[str, Any]:
        """All scores of one utterance under one system."""
        text = self.texts[system, utterance_id]["text"]
        audio = self.audio[system, utterance_id]
        scores = {
            "id": utterance_id,
            "hypothesis": text,
            "counts": edit_counts(text, self.utterances[utterance_id]["text"], self.settings["language"]),
            "seconds": self.utterances[utterance_id]["seconds"],
            "spoken_seconds": audio["seconds"],
            "error": audio.get("error"),
            "cut_off": audio.get("cut_off", False),
            "empty": audio.get("empty", False),
        }
        whole = (system, utterance_id, "whole")
        scores["voiceless"] = self.embeddings[whole] is None
        if protocol == "continuation":
            prompt = ("prompt", utterance_id, "whole")
            scores["similarity_to_prompt"] = self.similarity(whole, prompt)
            scores["similarity_of_new_speech_to_prompt"] = self.similarity((system, utterance_id, "new"), prompt)
        elif protocol == "reference":
            scores["similarity_to_prompt"] = self.similarity(whole, ("original", prompt_id, "whole"))
        if system != "original":
            scores["similarity_to_original"] = self.similarity(whole, ("original", utterance_id, "whole"))
        if self.opinions:
            scores["dnsmos"] = self.opinions[system, utterance_id]["overall"]
        return scores

    def protocol(self, protocol: str) -> dict[str, list[dict[str, Any]]]:
        """The scores of all utterances of a protocol, by row title."""
        pairs = self.plan["protocols"][protocol]["pairs"]
        return {
            title: [self.utterance(protocol, row["system"], *pair) for pair in pairs]
            for title, row in self.systems(protocol).items()
        }

    def summary(self) -> dict[str, Any]:
        """
        The figures of the run, without its timings.

        Returns:
            `dict[str, Any]`: what goes into `summary.json`.
        """
        known = [
            (embedding, self.utterances[key[1]]["speaker"])
            for key, embedding in sorted(self.embeddings.items())
            if key[0] == "original" and key[2] == "whole" and embedding is not None
        ]
        protocols = {}
        for name, entry in self.plan["protocols"].items():
            systems = self.systems(name)
            rows = {title: systems[title] | aggregate(scores) for title, scores in self.protocol(name).items()}
            protocols[name] = {"utterances": len(entry["pairs"]), "left_out": entry["left_out"], "rows": rows}
        return {
            "settings": self.settings,
            "spelling_entries": len(spelling_table()) if self.settings["language"] == "en" else 0,
            "utterances": self.plan["selected"],
            "left_out": self.plan["left_out"],
            "speaker_encoder": encoder_sanity([np.array(item[0]) for item in known], [item[1] for item in known]),
            "protocols": protocols,
        }


def aggregate(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """
    One row of a table from the scores of its utterances.

    Args:
        scores (`list[dict[str, Any]]`):
            Scores of the utterances.

    Returns:
        `dict[str, Any]`: rates and means with their 95 % intervals, and counts.
    """
    counts = [entry["counts"] for entry in scores]
    row = error_rates(counts)
    row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
    for unit in ("word", "character"):
        columns = [[entry[f"{unit}_errors"] for entry in counts], [entry[f"reference_{unit}s"] for entry in counts]]
        row[f"{unit}_error_rate_interval"] = interval(ratio, *columns)
    for name in ("similarity_to_prompt", "similarity_of_new_speech_to_prompt", "similarity_to_original", "dnsmos"):
        values = [entry[name] for entry in scores if entry.get(name) is not None]
        if values:
            row[name] = round(float(np.mean(values)), 4)
            row[f"{name}_interval"] = interval(np.mean, values)
    row["spoken_seconds"] = round(sum(entry["spoken_seconds"] for entry in scores), 2)
    row["unheard"] = sum(not entry["hypothesis"] for entry in scores)
    row["voiceless"] = sum(entry["voiceless"] for entry in scores)
    row["ended_at_once"] = sum(entry["empty"] for entry in scores)
    row["never_ended"] = sum(entry["cut_off"] for entry in scores)
    row["failed"] = sum(entry["error"] is not None for entry in scores)
    return row
