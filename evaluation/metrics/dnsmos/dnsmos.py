"""DNSMOS P.835: predicted opinion scores of noise and speech quality, by the `speechmos` package."""

from __future__ import annotations

from importlib.util import find_spec

import datasets
import evaluate
import numpy as np
import soxr


_DESCRIPTION = """
DNSMOS: what listeners would say of the quality of the speech (`signal`), of the background (`background`) and of the
whole (`overall`), from 1 to 5, predicted by the networks that the package `speechmos` carries. No reference is needed.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of float waveforms): the speech to judge, mono, not empty.
    sampling_rate (`int`): its sampling rate in hertz.

Returns:
    `dict` with the means `overall`, `signal` and `background`, and `overall_scores`, one value an utterance.

Examples:

    >>> import evaluate
    >>> metric = evaluate.load("evaluation/metrics/dnsmos")
    >>> metric.compute(predictions=[speech], sampling_rate=24000)  # doctest: +SKIP
"""

SAMPLING_RATE = 16_000


def check_installed() -> None:
    """Raise a `ValueError` that names the package DNSMOS lacks, if it lacks one."""
    for package in ("speechmos", "onnxruntime", "librosa"):
        if find_spec(package) is None:
            raise ValueError(
                f"DNSMOS needs the package {package}, which is not installed: "
                "pip install speechmos onnxruntime librosa requests"
            )


def quality(audio: np.ndarray, sampling_rate: int) -> dict[str, float]:
    """
    Predict the three opinion scores of one recording.

    Args:
        audio (`np.ndarray` of shape `(samples,)`):
            Mono waveform, not empty.
        sampling_rate (`int`):
            Its sampling rate in hertz.

    Returns:
        `dict[str, float]`: `overall`, `signal` and `background`, from 1 to 5.

    Raises:
        ValueError: `speechmos` or a package it needs is not installed, or the recording is empty.
    """
    check_installed()
    if not len(audio):
        raise ValueError("audio is empty; DNSMOS needs at least one sample.")
    from speechmos import dnsmos

    audio = soxr.resample(np.asarray(audio, dtype=np.float32), sampling_rate, SAMPLING_RATE)
    scores = dnsmos.run(np.clip(audio, -1, 1), sr=SAMPLING_RATE)
    return {
        name: float(scores[f"{key}_mos"])
        for name, key in {"overall": "ovrl", "signal": "sig", "background": "bak"}.items()
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DNSMOS(evaluate.Metric):
    """DNSMOS P.835 as an `evaluate` metric."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions: list[list[float]], sampling_rate: int) -> dict[str, float | list[float]]:
        scores = [quality(np.asarray(prediction), sampling_rate) for prediction in predictions]
        means = {
            name: float(np.mean([score[name] for score in scores])) for name in ("overall", "signal", "background")
        }
        return {**means, "overall_scores": [score["overall"] for score in scores]}
