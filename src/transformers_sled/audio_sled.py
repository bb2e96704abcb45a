"""Audio in and out: the one place that reads, checks, mixes, resamples and writes it."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch


# What a recording can plausibly have been made at, in Hz.
MIN_SAMPLING_RATE, MAX_SAMPLING_RATE = 1_000, 768_000

# The shorter axis of an array holds the channels of a recording if it is no longer than this: 64 are those of ambisonics
# of the seventh order, 80 the bands of a spectrogram.
MAX_CHANNELS = 64

# Floating point audio goes from -1 to 1, and beyond it where a recorder or a filter has overshot. What goes from about
# a hundredth of the range of 16-bit integers to its end is 16-bit audio in another type.
MAX_FLOAT_LEVEL = 10.0
MIN_16_BIT_LEVEL, MAX_16_BIT_LEVEL = 256.0, 1.1 * 32_768

# A mean of less than this part of the standard deviation is what chance leaves, not an offset.
MIN_OFFSET = 0.05

# A mix that keeps less than this part of its channels' mean level has lost it to channels of opposite phase.
MIN_MIX_LEVEL = 0.1

# Sound is measured in windows of this many seconds; what is this much below the loudest (40 dB) is silence.
WINDOW_DURATION = 0.02
SILENCE_LEVEL = 0.01

# A cut may ask for this much audio (seconds) beyond the end of its recording: manifests round their times.
CUT_TOLERANCE = 0.025

AUDIO_KINDS = (
    "an array, a tensor or a list of numbers, the path of a file, its bytes, an open file, (sampling rate, array), or an "
    "item of a `datasets` audio column"
)


class AudioError(ValueError):
    """
    Audio that cannot be used.

    Args:
        reason (`str`):
            The class of the error, in the same words for all errors of a kind, to count them by.
        message (`str`):
            What was wrong with this audio, and what is accepted.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


def read_audio(
    audio: Any,
    sampling_rate: int | None = None,
    target_rate: int | None = None,
    start: float | None = None,
    duration: float | None = None,
    channel: int | None = None,
    name: str = "audio",
) -> np.ndarray:
    """
    Reads one audio of any kind as a mono waveform.

    Integers are scaled by their type, and 16-bit values in another type to -1 to 1. Channels are averaged, a constant
    offset is removed. Of a file, only the wanted part is decoded, where `soundfile` knows its format.

    Args:
        audio (`np.ndarray`, `torch.Tensor`, sequence of numbers, `str`, `os.PathLike`, `bytes`, file object, `tuple` or `Mapping`):
            An array, tensor or list of numbers of shape `(num_samples,)`, `(num_channels, num_samples)` or
            `(num_samples, num_channels)`; a path, the bytes of a file, an open file or a `soundfile.SoundFile`, which is
            read from its beginning; `(sampling_rate, array)` or `(array, sampling_rate)`; a mapping with `array` and
            `sampling_rate`, with `bytes` or with `path`, as `datasets` has it; a decoder of torchcodec. Files are of a
            format that `soundfile` reads, or PyAV where it is installed (M4A, MP4, WebM).
        sampling_rate (`int`, *optional*):
            Sampling rate of `audio` in Hz, where it does not know its own.
        target_rate (`int`, *optional*):
            Sampling rate in Hz to resample to. That of `audio` by default.
        start (`float`, *optional*):
            Seconds at which the wanted part begins.
        duration (`float`, *optional*):
            Seconds that the wanted part lasts. To the end by default.
        channel (`int`, *optional*):
            The channel to take. All are averaged by default, and where there is no such channel.
        name (`str`, *optional*, defaults to `"audio"`):
            What error messages call the audio.

    Returns:
        `np.ndarray` of shape `(num_samples,)`: the waveform, in float32.

    Raises:
        `AudioError` (a `ValueError`): if the audio is missing, unreadable, empty, not finite or of no audio's level, or
        ends before the wanted part does. Its `reason` is one of `"audio is missing"`, `"audio file is missing"`,
        `"unreadable audio"`, `"empty audio"`, `"audio is not finite"`, `"level is not audio's"` and
        `"cut is outside its recording"`.
        `ValueError`: if a sampling rate is missing or out of range.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers_sled.audio_sled import read_audio

    >>> read_audio(np.zeros((2, 16_000), dtype=np.int16), sampling_rate=16_000, target_rate=24_000).shape
    (24000,)
    ```
    """
    if sampling_rate is not None:
        sampling_rate = check_sampling_rate(sampling_rate)
    if target_rate is not None:
        target_rate = check_sampling_rate(target_rate, "target_rate")
    channels, rate = _read_channels(audio, sampling_rate, start, duration, name)
    if channels.size == 0:
        raise AudioError("empty audio", f"`{name}` must not be empty, got {describe(audio)} without samples.")
    if not np.isfinite(channels).all():
        raise AudioError("audio is not finite", f"`{name}` has values that are not finite in float32.")
    channels = _scale_to_float(channels, name)
    has_channel = channel is not None and 0 <= channel < channels.shape[1]
    waveform = channels[:, channel] if has_channel else _mix(channels)
    offset = waveform.mean(dtype=np.float64)
    if abs(offset) > MIN_OFFSET * waveform.std(dtype=np.float64):
        waveform = (waveform - offset).astype(np.float32)
    if target_rate is not None and target_rate != rate:
        waveform = soxr.resample(waveform, rate, target_rate, quality="HQ")
        if len(waveform) == 0:
            raise AudioError("empty audio", f"`{name}` is too short: nothing is left of it at {target_rate} Hz.")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def measure_duration(audio: Any, sampling_rate: int | None = None, name: str = "audio") -> float:
    """
    Measures how long an audio lasts, without decoding a file whose format `soundfile` knows.

    Args:
        audio (as for [`read_audio`]):
            The audio.
        sampling_rate (`int`, *optional*):
            Sampling rate of `audio` in Hz, where it does not know its own.
        name (`str`, *optional*, defaults to `"audio"`):
            What error messages call the audio.

    Returns:
        `float`: seconds.

    Raises:
        `AudioError` (a `ValueError`): if the audio is missing, unreadable or empty.
        `ValueError`: if a sampling rate is missing or out of range.
    """
    source, sampling_rate = _get_source(audio, sampling_rate, name)
    if isinstance(source, str | BytesIO | soundfile.SoundFile):
        try:
            with _open(source) as file:
                return file.frames / file.samplerate
        except soundfile.LibsndfileError:
            pass
    channels, rate = _read_channels(audio, sampling_rate, None, None, name)
    return len(channels) / rate


def list_audio(audio: Any, num_texts: int, name: str = "audio") -> list[Any]:
    """
    Tells one audio from several: what is given with texts is one for all of them, or one for each.

    Args:
        audio (an audio, or a sequence or array of them):
            An audio as [`read_audio`] takes it, a list or a `datasets` column of them, or an array or a tensor of shape
            `(batch_size, num_samples)` or `(batch_size, num_channels, num_samples)`, whose first axis is the batch if
            it is as long as the texts are many.
        num_texts (`int`):
            Number of texts.
        name (`str`, *optional*, defaults to `"audio"`):
            What error messages call the audio.

    Returns:
        `list`: one audio, or `num_texts` of them.

    Raises:
        `ValueError`: if there are neither one nor `num_texts`.
    """
    if isinstance(audio, np.ndarray) and audio.dtype == object:
        audio = audio.tolist()
    try:
        if isinstance(audio, np.ndarray | torch.Tensor):
            is_batch = audio.ndim == 3 or (audio.ndim == 2 and num_texts > 1 and len(audio) == num_texts)
        else:
            is_batch = _is_sequence(audio) and not _is_with_rate(audio) and not _holds_numbers(audio)
        num_items = len(audio) if is_batch else 1
        if num_items in (1, num_texts):
            return list(audio) if is_batch else [audio]
    except ImportError as error:
        raise ValueError(
            f"`{name}` is a column that `datasets` cannot decode: {error} Leave the decoding to the processor, with "
            "`dataset.cast_column(column, datasets.Audio(decode=False))`."
        ) from error
    raise ValueError(
        f"`{name}` must be one audio or one for each of the {num_texts} texts, got {describe(audio)}, {num_items} in all."
    )


def check_sampling_rate(sampling_rate: Any, name: str = "sampling_rate") -> int:
    """
    Checks a sampling rate.

    Args:
        sampling_rate (`int`):
            Sampling rate in Hz.
        name (`str`, *optional*, defaults to `"sampling_rate"`):
            What error messages call it.

    Returns:
        `int`: the sampling rate.

    Raises:
        `ValueError`: if it is no whole number of Hz that a recording can have been made at.
    """
    if isinstance(sampling_rate, np.ndarray | torch.Tensor) and sampling_rate.ndim == 0:
        sampling_rate = sampling_rate.item()
    if (
        not _is_number(sampling_rate)
        or isinstance(sampling_rate, complex)
        or not MIN_SAMPLING_RATE <= sampling_rate <= MAX_SAMPLING_RATE
        or int(sampling_rate) != sampling_rate
    ):
        raise ValueError(
            f"`{name}` must be a whole number of Hz between {MIN_SAMPLING_RATE} and {MAX_SAMPLING_RATE}, got "
            f"{sampling_rate!r:.100}."
        )
    return int(sampling_rate)


def describe(value: Any) -> str:
    """
    Says what a value is, for error messages.

    Args:
        value (any type):
            The value.

    Returns:
        `str`: its type, with the shape of an array and what a list holds.
    """
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {sorted({type(item).__name__ for item in value})}"
    if isinstance(value, str | Path):
        return repr(str(value)) if len(str(value)) <= 100 else f"{str(value)[:100]!r}..."
    return type(value).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, Number | np.number) and not isinstance(value, bool | np.bool_)


def _is_sequence(value: Any) -> bool:
    """Whether a value holds others in order: a list, a tuple, a column."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _holds_numbers(value: Any) -> bool:
    return len(value) > 0 and _is_number(value[0])


def _is_with_rate(audio: Any) -> bool:
    """Whether an audio is a pair of a sampling rate and samples, in either order."""
    return isinstance(audio, tuple) and len(audio) == 2 and _is_number(audio[0]) != _is_number(audio[1])


def _get_source(audio: Any, sampling_rate: int | None, name: str) -> tuple[Any, int | None]:
    """What an audio of any kind holds: a path (`str`), a file (`BytesIO`, `SoundFile`) or samples, and their rate."""
    own_rate = None
    if isinstance(audio, Mapping):
        if audio.get("array") is not None:
            audio, own_rate = audio["array"], audio.get("sampling_rate")
        elif audio.get("bytes") is not None:
            audio = audio["bytes"]
        elif audio.get("path") is not None:
            audio = audio["path"]
        elif {"array", "bytes", "path"} & set(audio):
            audio = None
        else:
            raise AudioError(
                "unreadable audio",
                f"`{name}` must have an 'array', 'bytes' or 'path', got the keys {sorted(map(str, audio))!s:.100}.",
            )
    elif _is_with_rate(audio):
        own_rate, audio = audio if _is_number(audio[0]) else audio[::-1]
    elif hasattr(audio, "get_all_samples"):
        try:
            samples = audio.get_all_samples()
        except RuntimeError as error:
            raise AudioError("unreadable audio", f"`{name}` cannot be decoded: {error}.") from error
        audio, own_rate = samples.data, samples.sample_rate
    if own_rate is not None:
        own_rate = check_sampling_rate(own_rate, f"{name}['sampling_rate']")
        if sampling_rate is not None and sampling_rate != own_rate:
            raise ValueError(f"`sampling_rate` is {sampling_rate}, but `{name}` is at {own_rate} Hz.")
        sampling_rate = own_rate

    if audio is None:
        raise AudioError("audio is missing", f"`{name}` must be {AUDIO_KINDS}, got None.")
    if isinstance(audio, str | os.PathLike):
        return _check_path(os.fspath(audio), name), sampling_rate
    if isinstance(audio, bytes | bytearray | memoryview):
        if len(audio) == 0:
            raise AudioError("empty audio", f"`{name}` must not be empty, got a file of 0 bytes.")
        return BytesIO(audio), sampling_rate
    if isinstance(audio, soundfile.SoundFile):
        return audio, sampling_rate
    if hasattr(audio, "read"):
        return _read_open_file(audio, name), sampling_rate
    return audio, sampling_rate


def _check_path(path: str | bytes, name: str) -> str:
    path = os.fsdecode(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", path):
        raise AudioError(
            "audio file is missing",
            f"`{name}` is the URL {describe(path)}, which is not fetched. Download it first, and give its path or its bytes.",
        )
    try:
        file = Path(path).expanduser()
        is_folder, is_there = file.is_dir(), file.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise AudioError(
            "audio file is missing", f"`{name}` {describe(path)} is not a path: {error!s:.60}."
        ) from error
    if is_folder or not is_there:
        problem = "is a folder, not a file" if is_folder else "does not exist"
        raise AudioError("audio file is missing", f"`{name}` {describe(path)} {problem}.")
    if file.is_file() and file.stat().st_size == 0:
        raise AudioError("empty audio", f"`{name}` {describe(path)} is a file of 0 bytes.")
    return str(file)


def _read_open_file(file: Any, name: str) -> BytesIO:
    """The content of an open file from its beginning, where it can be wound back."""
    try:
        is_seekable = file.seekable()
        position = file.tell() if is_seekable else None
        if is_seekable:
            file.seek(0)
        content = file.read()
        if is_seekable:
            file.seek(position)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise AudioError("unreadable audio", f"`{name}` is a file that cannot be read: {error}.") from error
    if not isinstance(content, bytes):
        raise AudioError(
            "unreadable audio",
            f"`{name}` must be a file that is open for reading bytes (mode 'rb'), got one that gives "
            f"{type(content).__name__}.",
        )
    if len(content) == 0:
        raise AudioError("empty audio", f"`{name}` must not be empty, got an open file of 0 bytes.")
    return BytesIO(content)


def _open(source: str | BytesIO | soundfile.SoundFile) -> Any:
    """A context that gives a `SoundFile`, and leaves one that was open as it was."""
    return _Borrowed(source) if isinstance(source, soundfile.SoundFile) else soundfile.SoundFile(source)


class _Borrowed:
    """Keeps the position of an open `SoundFile` for its owner."""

    def __init__(self, file: soundfile.SoundFile) -> None:
        self.file = file

    def __enter__(self) -> soundfile.SoundFile:
        self.position = self.file.tell()
        return self.file

    def __exit__(self, *args: object) -> None:
        self.file.seek(self.position)


def _read_channels(
    audio: Any, sampling_rate: int | None, start: float | None, duration: float | None, name: str
) -> tuple[np.ndarray, int]:
    """The wanted part of an audio of any kind, (num_samples, num_channels) in float32, and its sampling rate."""
    for value, label in ((start, "start"), (duration, "duration")):
        if value is not None and not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"`{label}` must be a number of seconds that is not negative, got {value!r:.100}.")
    source, sampling_rate = _get_source(audio, sampling_rate, name)
    if isinstance(source, str | BytesIO | soundfile.SoundFile):
        channels, rate = _decode(source, start, duration, name, describe(audio))
        if sampling_rate is not None and sampling_rate != rate:
            raise ValueError(f"`sampling_rate` is {sampling_rate}, but `{name}` is at {rate} Hz.")
        return channels, check_sampling_rate(rate, f"{name}['sampling_rate']")
    if sampling_rate is None:
        raise ValueError(f"`sampling_rate` is missing: `{name}` is {describe(audio)}, which does not know its own.")
    return _cut(_to_channels(source, name), sampling_rate, start, duration, name), sampling_rate


def _decode(
    source: str | BytesIO | soundfile.SoundFile,
    start: float | None,
    duration: float | None,
    name: str,
    description: str,
) -> tuple[np.ndarray, int]:
    try:
        with _open(source) as file:
            first = min(round((start or 0.0) * file.samplerate), file.frames)
            file.seek(first)
            num_samples = -1 if duration is None else round(duration * file.samplerate)
            channels = file.read(num_samples, dtype="float32", always_2d=True)
            _check_cut(len(channels), file.frames, file.samplerate, start, duration, name)
            return channels, file.samplerate
    except soundfile.LibsndfileError as error:
        if isinstance(source, soundfile.SoundFile):
            raise AudioError("unreadable audio", f"`{name}` is a file that cannot be read: {error}.") from error
    except (OSError, RuntimeError) as error:
        raise AudioError("unreadable audio", f"`{name}` {description} cannot be read: {error}.") from error
    channels, rate = _decode_with_pyav(source, name, description)
    return _cut(channels, rate, start, duration, name), rate


def _decode_with_pyav(source: str | BytesIO, name: str, description: str) -> tuple[np.ndarray, int]:
    """Decodes what `soundfile` does not know."""
    try:
        content = Path(source).read_bytes() if isinstance(source, str) else source.getvalue()
    except OSError as error:
        raise AudioError("unreadable audio", f"`{name}` {description} cannot be read: {error.strerror}.") from error
    try:
        import av
    except ImportError:
        raise AudioError(
            "unreadable audio",
            f"`{name}` {description} is of no format that soundfile reads, such as WAV, FLAC, Ogg or MP3. The package "
            "`av` reads M4A, MP4, WebM and AAC (`pip install av`).",
        ) from None
    blocks: list[np.ndarray] = []
    try:
        # From memory, so that no file can name another that is then read.
        with av.open(BytesIO(content)) as container:
            if not container.streams.audio:
                raise AudioError("unreadable audio", f"`{name}` {description} has no sound.")
            resampler = av.AudioResampler(format="fltp")
            for frame in container.decode(container.streams.audio[0]):
                blocks += [block.to_ndarray() for block in resampler.resample(frame)]
                rate = frame.sample_rate
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(
            "unreadable audio",
            f"`{name}` {description} is of no format that soundfile or PyAV reads, or broken.",
        ) from error
    if not blocks:
        raise AudioError("empty audio", f"`{name}` {description} has no samples.")
    return np.concatenate(blocks, axis=1).T, rate


def _cut(channels: np.ndarray, rate: int, start: float | None, duration: float | None, name: str) -> np.ndarray:
    first = round((start or 0.0) * rate)
    part = channels[first : None if duration is None else first + round(duration * rate)]
    _check_cut(len(part), len(channels), rate, start, duration, name)
    return part


def _check_cut(
    num_samples: int, num_all_samples: int, rate: int, start: float | None, duration: float | None, name: str
) -> None:
    wanted = 0.0 if duration is None else duration
    if (start is not None and start > num_all_samples / rate) or num_samples < (wanted - CUT_TOLERANCE) * rate:
        raise AudioError(
            "cut is outside its recording",
            f"`{name}` lasts {num_all_samples / rate:.3f} s, but the part that starts at {start or 0.0:.3f} s "
            + ("" if duration is None else f"and lasts {duration:.3f} s ")
            + "is not in it.",
        )


def _to_channels(samples: Any, name: str) -> np.ndarray:
    """Samples in memory as (num_samples, num_channels) in float32, integers scaled by their type."""
    try:
        if isinstance(samples, torch.Tensor):
            # NumPy has no bfloat16.
            array = (samples.float() if samples.is_floating_point() else samples).numpy(force=True)
        else:
            array = np.asarray(samples)
    except (RuntimeError, TypeError, ValueError) as error:
        raise AudioError(
            "unreadable audio", f"`{name}` must be {AUDIO_KINDS}, got {describe(samples)}: {error}."
        ) from error
    if array.ndim not in (1, 2) or (array.ndim == 2 and min(array.shape) > MAX_CHANNELS):
        raise AudioError(
            "unreadable audio",
            f"`{name}` must be of shape (num_samples,), (num_channels, num_samples) or (num_samples, num_channels), got "
            f"{describe(array) if isinstance(samples, np.ndarray | torch.Tensor | list | tuple) else describe(samples)}.",
        )
    if array.size == 0:
        raise AudioError("empty audio", f"`{name}` must not be empty, got {describe(array)}.")
    if array.ndim == 1:
        array = array[:, None]
    elif array.shape[0] <= array.shape[1]:
        array = array.T
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128.0) / 128.0
    if array.dtype.kind == "i":
        peak = max(-float(array.min()), float(array.max()))
        # 16-bit values in a wider type: of that type's own range they would be silence.
        if array.dtype.itemsize <= 2 or (array.dtype.itemsize == 4 and peak > 32_768):
            return array.astype(np.float32) / (np.iinfo(array.dtype).max + 1.0)
        if peak <= 32_768:
            return array.astype(np.float32) / 32_768.0
        raise AudioError(
            "level is not audio's",
            f"`{name}` has integers of {array.dtype} up to {peak:.0f}, from which the level does not follow. Give them as "
            "int16 or int32 of full range, or as floats from -1 to 1.",
        )
    raise AudioError(
        "unreadable audio",
        f"`{name}` must hold floating point numbers, signed integers or uint8, got "
        f"{describe(array) if array.dtype != object else describe(samples)}.",
    )


def _scale_to_float(channels: np.ndarray, name: str) -> np.ndarray:
    """Audio from -1 to 1, where what it is now leaves no doubt."""
    peak = float(np.abs(channels).max())
    if peak <= MAX_FLOAT_LEVEL:
        return channels
    if MIN_16_BIT_LEVEL <= peak <= MAX_16_BIT_LEVEL:
        return channels / np.float32(32_768.0)
    raise AudioError(
        "level is not audio's",
        f"`{name}` has floating point values up to {peak:.6g}, which are neither audio from -1 to 1 nor 16-bit values. "
        "Scale them to -1 to 1.",
    )


def _mix(channels: np.ndarray) -> np.ndarray:
    """The mean of the channels, or the loudest one where they cancel each other."""
    mix = channels.mean(axis=1, dtype=np.float32)
    levels = np.sqrt(np.square(channels, dtype=np.float64).mean(axis=0))
    if np.sqrt(np.square(mix, dtype=np.float64).mean()) < MIN_MIX_LEVEL * levels.mean():
        return channels[:, int(levels.argmax())]
    return mix


def measure_sound(waveform: np.ndarray, sampling_rate: int) -> tuple[float, float]:
    """
    Measures how much of a waveform can be heard.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`):
            The waveform, from -1 to 1.
        sampling_rate (`int`):
            Sampling rate in Hz.

    Returns:
        `tuple[float, float]`: the seconds that are no more than 40 dB below the loudest, and the level of the loudest, as
        the root mean square of 20 ms, from 0 to 1.
    """
    levels, _ = _measure_levels(waveform, sampling_rate)
    loudest = float(levels.max())
    if loudest == 0.0:
        return 0.0, 0.0
    return float((levels > SILENCE_LEVEL * loudest).mean() * len(waveform) / sampling_rate), loudest


def cut_silence(waveform: np.ndarray, sampling_rate: int, max_silence: float) -> np.ndarray:
    """
    Leaves out most of the silence at the end of a waveform.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`):
            The waveform, from -1 to 1.
        sampling_rate (`int`):
            Sampling rate in Hz.
        max_silence (`float`):
            Seconds that are left after what is no more than 40 dB below the loudest.

    Returns:
        `np.ndarray` of shape `(num_samples,)`: the start of the waveform, or all of it where the end is not silent for longer.
    """
    levels, window = _measure_levels(waveform, sampling_rate)
    end = (int(np.flatnonzero(levels >= SILENCE_LEVEL * levels.max())[-1]) + 1) * window
    return waveform[: end + round(max_silence * sampling_rate)]


def _measure_levels(waveform: np.ndarray, sampling_rate: int) -> tuple[np.ndarray, int]:
    """Root mean squares of windows of 20 ms, one after the other, and their length in samples."""
    window = min(max(round(WINDOW_DURATION * sampling_rate), 1), len(waveform))
    energy = np.concatenate([[0.0], np.cumsum(np.square(waveform, dtype=np.float64))])
    starts = np.arange(0, len(waveform) - window + 1, window)
    return np.sqrt((energy[starts + window] - energy[starts]).clip(0.0) / window), window


def write_audio(audio: Any, file: Any, sampling_rate: int, format: str | None = None) -> None:
    """
    Writes waveforms to files.

    Args:
        audio (an array, tensor or list of numbers, or a sequence of them):
            Waveforms of shape `(num_samples,)`, from -1 to 1 or integers of full range.
        file (`str`, `os.PathLike`, binary file object or a sequence of them):
            Where to write each waveform.
        sampling_rate (`int`):
            Sampling rate in Hz.
        format (`str`, *optional*):
            Format of the files, such as `"wav"` or `"flac"`. That of each file's extension by default.

    Raises:
        `ValueError`: if the numbers of waveforms and files differ, a waveform is not mono or not finite, a format is not
            known, or a file cannot be written. Nothing is written where that is known before.
    """
    sampling_rate = check_sampling_rate(sampling_rate)
    is_batch = audio.ndim > 1 if isinstance(audio, np.ndarray | torch.Tensor) else _is_sequence(audio)
    waveforms = list(audio) if is_batch and not _holds_numbers(audio) else [audio]
    files = list(file) if isinstance(file, list | tuple) else [file]
    if len(waveforms) != len(files):
        raise ValueError(
            f"`saving_path` must have a path for each of the {len(waveforms)} waveforms, got {len(files)}."
        )
    arrays = [_to_waveform(waveform) for waveform in waveforms]
    targets = [_check_target(one, format) for one in files]
    for array, (target, name_of_format) in zip(arrays, targets, strict=True):
        try:
            soundfile.write(target, array, sampling_rate, format=name_of_format)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"`saving_path` {describe(target)} cannot be written as {name_of_format} at {sampling_rate} Hz: {error}"
            ) from error


def _to_waveform(samples: Any) -> np.ndarray:
    if isinstance(samples, np.ndarray | torch.Tensor) and samples.ndim != 1:
        raise ValueError(f"`audio` must hold waveforms of shape (num_samples,), got {tuple(samples.shape)}.")
    if hasattr(samples, "__len__") and len(samples) == 0:
        return np.zeros(0, dtype=np.float32)
    channels = _to_channels(samples, "audio")
    if channels.shape[1] != 1:
        raise ValueError(f"`audio` must hold waveforms of shape (num_samples,), got {describe(samples)}.")
    if not np.isfinite(channels).all():
        raise ValueError("`audio` has values that are not finite in float32.")
    return _scale_to_float(channels, "audio")[:, 0]


def _check_target(file: Any, format: str | None) -> tuple[Any, str]:
    """A path or an open file to write to, and the format to write."""
    if isinstance(file, str | os.PathLike):
        path = Path(os.fsdecode(os.fspath(file))).expanduser()
        if path.is_dir():
            raise ValueError(f"`saving_path` {describe(path)} is a folder, not a file.")
        if not path.parent.is_dir():
            raise ValueError(f"`saving_path` {describe(path)} is in a folder that does not exist.")
        file, given = path, format or path.suffix[1:]
    elif hasattr(file, "write"):
        if format is None:
            raise ValueError(f"`format` is missing: `saving_path` is {describe(file)}, which has no extension.")
        given = format
    else:
        raise ValueError(f"`saving_path` must be a path or an open file, got {describe(file)}.")
    # Raw samples say neither their rate nor their type.
    known = sorted(name.lower() for name in soundfile.available_formats() if soundfile.default_subtype(name))
    if not isinstance(given, str) or given.lower() not in known:
        problem = (
            f"`format` is {format!r}" if format is not None else f"`saving_path` {describe(file)} has no extension"
        )
        raise ValueError(f"{problem} of a known audio format: {', '.join(known)}.")
    return file, given.upper()


__all__ = [
    "AudioError",
    "check_sampling_rate",
    "describe",
    "list_audio",
    "measure_duration",
    "measure_sound",
    "read_audio",
    "write_audio",
]
