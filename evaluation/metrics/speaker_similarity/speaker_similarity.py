"""Speaker similarity: the cosine of speaker embeddings of two recordings."""

from __future__ import annotations

from functools import lru_cache

import datasets
import evaluate
import numpy as np

from .speaker_encoders import embed, load_speaker_encoder


_DESCRIPTION = """
How alike the voices of two recordings are: the cosine of their speaker embeddings, from -1 to 1, averaged over pairs.
Against the prompt it measures voice cloning; against the original recording it measures it with the words alike.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of float waveforms): the speech to judge, mono.
    references (`list` of float waveforms): the prompts or the originals, mono.
    sampling_rate (`int`): sampling rate of both, in hertz.
    encoder (`str`, *optional*, defaults to `"microsoft/wavlm-base-plus-sv"`): Hub id or folder of a transformers
        model with an x-vector head, or `"resemblyzer"`.
    device (`str`, *optional*, defaults to `"cpu"`): where to run the encoder.

Returns:
    `dict` with `speaker_similarity`, the mean (`None` if no pair could be compared), and `speaker_similarities`,
    one value a pair, `None` where one side is silence.

Examples:

    >>> import evaluate
    >>> metric = evaluate.load("evaluation/metrics/speaker_similarity")
    >>> metric.compute(predictions=[speech], references=[prompt], sampling_rate=24000)  # doctest: +SKIP
"""

_cached_encoder = lru_cache(maxsize=1)(load_speaker_encoder)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SpeakerSimilarity(evaluate.Metric):
    """Cosine similarity of speaker embeddings as an `evaluate` metric."""

    def _info(self) -> evaluate.MetricInfo:
        waveform = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": waveform, "references": waveform}),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[float]],
        sampling_rate: int,
        encoder: str = "microsoft/wavlm-base-plus-sv",
        device: str = "cpu",
    ) -> dict[str, float | list[float | None] | None]:
        speaker_encoder = _cached_encoder(encoder, device)
        similarities = []
        for prediction, reference in zip(predictions, references, strict=True):
            sides = [embed(speaker_encoder, np.asarray(side), sampling_rate) for side in (prediction, reference)]
            similarities.append(None if any(side is None for side in sides) else float(sides[0] @ sides[1]))
        known = [similarity for similarity in similarities if similarity is not None]
        return {"speaker_similarity": float(np.mean(known)) if known else None, "speaker_similarities": similarities}
