"""Recordings of a corpus: the wanted part of each, and why some cannot be used."""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import soundfile
import soxr


# A cut may ask for this much audio (seconds) beyond the end of its recording: manifests round their times.
_CUT_TOLERANCE = 0.025


class DroppedItemError(ValueError):
    """An item that cannot be trained on. `reason` is the class it is counted under, `detail` says what was wrong."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def read_audio(audio: str | os.PathLike | bytes | Mapping[str, Any], sampling_rate: int) -> np.ndarray:
    """
    Reads an utterance as mono audio at a given sampling rate. Only the wanted part of a long recording is decoded.

    Args:
        audio (`str`, `os.PathLike`, `bytes` or `Mapping`):
            A path, an encoded file's bytes, or a mapping with `array` and `sampling_rate`, or with `bytes` or `path`
            (as `datasets` has it with `Audio(decode=False)`). A mapping with `path` or `bytes` may also have `start`
            and `duration` in seconds, and `channel`; without a channel, all are averaged.
        sampling_rate (`int`):
            The rate to resample to, in hertz.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32.

    Raises:
        `DroppedItemError` (a `ValueError`): If the audio is missing, unreadable, empty or not finite, or ends before
        the cut does.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_sled.training.recordings import read_audio
    >>> read_audio({"array": np.zeros(16000), "sampling_rate": 16000}, sampling_rate=24000).shape
    (24000,)
    ```
    """
    audio = as_mapping(audio)
    if audio.get("array") is not None:
        samples, rate = np.asarray(audio["array"], dtype=np.float32), int(audio["sampling_rate"])
        if samples.ndim > 2:
            raise DroppedItemError("unreadable audio", f"an array of shape {samples.shape}")
        # `datasets` has channels first
        channels = samples.T if samples.ndim == 2 else samples[:, None]
    else:
        channels, rate = _decode(audio)
    channel = audio.get("channel")
    mono = channels.mean(axis=1) if channel is None or channel >= channels.shape[1] else channels[:, channel]
    if len(mono) == 0:
        raise DroppedItemError("empty audio", "no samples")
    if not np.isfinite(mono).all():
        raise DroppedItemError("audio is not finite", "it has NaN or infinite samples")
    return soxr.resample(mono, rate, sampling_rate) if rate != sampling_rate else mono


def _open_audio(audio: Mapping[str, Any]) -> soundfile.SoundFile:
    encoded, path = audio.get("bytes"), audio.get("path")
    if encoded is None:
        if path is None:
            raise DroppedItemError("audio is missing", "neither bytes nor a path")
        if not os.path.isfile(path):
            raise DroppedItemError("audio file is missing", str(path))
    if (os.path.getsize(str(path)) if encoded is None else len(encoded)) == 0:
        raise DroppedItemError("empty audio", f"{path or 'a file'} of 0 bytes")
    try:
        return soundfile.SoundFile(path if encoded is None else io.BytesIO(encoded))
    except (soundfile.LibsndfileError, OSError) as error:
        raise DroppedItemError("unreadable audio", str(error)) from error


def _decode(audio: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    with _open_audio(audio) as file:
        start = round((audio.get("start") or 0.0) * file.samplerate)
        duration = audio.get("duration")
        wanted = -1 if duration is None else round(duration * file.samplerate)
        if start > file.frames:
            raise DroppedItemError("cut is outside its recording", f"starts at {audio['start']} s of {file.frames}")
        try:
            file.seek(start)
            channels = file.read(wanted, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise DroppedItemError("unreadable audio", str(error)) from error
        if 0 < len(channels) < wanted - _CUT_TOLERANCE * file.samplerate:
            raise DroppedItemError(
                "cut is outside its recording", f"{len(channels)} of {wanted} samples are in {audio.get('path')}"
            )
        return channels, file.samplerate


def audio_duration(audio: str | os.PathLike | bytes | Mapping[str, Any]) -> float:
    """
    Measures an utterance without decoding it.

    Args:
        audio (`str`, `os.PathLike`, `bytes` or `Mapping`):
            As for [`read_audio`].

    Returns:
        `float`: seconds.

    Raises:
        `DroppedItemError` (a `ValueError`): If the audio is missing or unreadable.
    """
    audio = as_mapping(audio)
    if audio.get("duration") is not None:
        return float(audio["duration"])
    if audio.get("array") is not None:
        return np.shape(audio["array"])[-1] / audio["sampling_rate"]
    with _open_audio(audio) as file:
        return file.frames / file.samplerate


def as_mapping(audio: Any) -> Mapping[str, Any]:
    if audio is None:
        raise DroppedItemError("audio is missing", "null")
    if isinstance(audio, Mapping):
        return audio
    return {"bytes": audio} if isinstance(audio, bytes) else {"path": audio}
