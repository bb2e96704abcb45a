"""Speech as the bytes of an audio format, piece by piece as it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import av
import numpy as np
import soxr


@dataclass(frozen=True)
class AudioFormat:
    """How speech is packed: FFmpeg's names of container and codec, and what they are told."""

    media_type: str
    container: str
    codec: str
    options: Mapping[str, str] = field(default_factory=dict)
    bit_rate: int | None = None


# MP3 and AAC have no place for their length before the end is known, so decoders keep the encoder's delay.
AUDIO_FORMATS = {
    "mp3": AudioFormat("audio/mpeg", "mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "4"}, 64_000),
    # Pages of 100 ms in place of 1 s, so that speech leaves as it is made.
    "opus": AudioFormat("audio/ogg", "ogg", "libopus", {"page_duration": "100000"}, 48_000),
    "aac": AudioFormat("audio/aac", "adts", "aac", {"write_id3v2": "1"}, 64_000),
    "flac": AudioFormat("audio/flac", "flac", "flac"),
    "wav": AudioFormat("audio/wav", "wav", "pcm_s16le"),
    "pcm": AudioFormat("audio/pcm", "s16le", "pcm_s16le"),
    "mulaw": AudioFormat("audio/basic", "mulaw", "pcm_mulaw"),
    "alaw": AudioFormat("audio/x-alaw-basic", "alaw", "pcm_alaw"),
}


class _Buffer:
    """A file that can only be appended to, which is what makes FFmpeg write what a stream can hold."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self.data)
        self.data.clear()
        return data


class AudioEncoder:
    r"""
    Turns waveforms into the bytes of an audio format. The bytes of all calls, joined, are one file.

    Args:
        audio_format (`str`):
            A name in `AUDIO_FORMATS`.
        sampling_rate (`int`):
            Sampling rate of the waveforms in Hz.
        output_sampling_rate (`int`, *optional*):
            Sampling rate of the audio in Hz, the same by default.
        speed (`float`, *optional*, defaults to 1.0):
            How much faster to speak, at the same pitch.
        bit_rate (`int`, *optional*):
            Bits a second of a format that loses some, by default one that suits speech.
        metadata (`dict[str, str]`, *optional*):
            What the file says about itself, where the format has a place for it.

    Example:

    ```python
    >>> encoder = AudioEncoder("mp3", sampling_rate=24_000)
    >>> data = b"".join([*(encoder.encode(waveform) for waveform in waveforms), encoder.finish()])
    ```
    """

    def __init__(
        self,
        audio_format: str,
        sampling_rate: int,
        output_sampling_rate: int | None = None,
        speed: float = 1.0,
        bit_rate: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if audio_format not in AUDIO_FORMATS:
            raise ValueError(f"`audio_format` must be one of {', '.join(AUDIO_FORMATS)}, got {audio_format!r}.")
        settings = AUDIO_FORMATS[audio_format]
        rate = sampling_rate if output_sampling_rate is None else output_sampling_rate
        self._tempo = None if speed == 1.0 else _TempoFilter(sampling_rate, speed)
        self._resampler = None if rate == sampling_rate else soxr.ResampleStream(sampling_rate, rate, 1, "float32")
        self._rate = rate
        self._num_samples = 0
        self._buffer = _Buffer()
        self._container = av.open(
            self._buffer, "w", format=settings.container, options={**settings.options, "flush_packets": "1"}
        )
        self._container.metadata.update(metadata or {})
        self._stream = self._container.add_stream(settings.codec, rate=rate, layout="mono")
        if settings.bit_rate is not None:
            self._stream.bit_rate = bit_rate or settings.bit_rate

    def encode(self, waveform: np.ndarray) -> bytes:
        r"""
        Takes the next waveform.

        Args:
            waveform (`np.ndarray` of shape `(num_samples,)` in float32):
                Samples between -1 and 1. What lies outside is clipped.

        Returns:
            `bytes`: what is complete now, which may be nothing.
        """
        if self._tempo is not None:
            waveform = self._tempo.process(waveform)
        return self._write(waveform)

    def finish(self) -> bytes:
        """Ends the file. Returns the rest of its bytes."""
        rest = b"" if self._tempo is None else self._write(self._tempo.finish())
        if self._resampler is not None:
            rest += self._write_samples(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        if self._num_samples == 0:
            # A file without a sample must have its header, too.
            self._container.start_encoding()
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self._container.close()
        return rest + self._buffer.take()

    def _write(self, waveform: np.ndarray) -> bytes:
        if self._resampler is not None:
            waveform = self._resampler.resample_chunk(np.ascontiguousarray(waveform, np.float32))
        return self._write_samples(waveform)

    def _write_samples(self, waveform: np.ndarray) -> bytes:
        if len(waveform) == 0:
            return self._buffer.take()
        samples = np.rint(np.clip(waveform, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = self._rate
        frame.pts = self._num_samples
        self._num_samples += len(samples)
        for packet in self._stream.encode(frame):
            self._container.mux(packet)
        return self._buffer.take()


class _TempoFilter:
    """FFmpeg's `atempo`, by overlap and add of similar waveforms."""

    def __init__(self, sampling_rate: int, speed: float) -> None:
        self._sampling_rate = sampling_rate
        self._num_samples = 0
        self._graph = av.filter.Graph()
        source = self._graph.add_abuffer(sample_rate=sampling_rate, format="flt", layout="mono")
        # One filter halves or doubles at most: faster, it leaves samples out.
        num_filters = max(1, math.ceil(abs(math.log2(speed)) - 1e-9))
        filters = [self._graph.add("atempo", str(speed ** (1 / num_filters))) for _ in range(num_filters)]
        self._graph.link_nodes(source, *filters, self._graph.add("abuffersink")).configure()

    def process(self, waveform: np.ndarray) -> np.ndarray:
        if len(waveform) == 0:
            return np.zeros(0, np.float32)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[None], np.float32), "flt", "mono")
        frame.sample_rate = self._sampling_rate
        frame.pts = self._num_samples
        self._num_samples += len(waveform)
        self._graph.push(frame)
        return self._pull()

    def finish(self) -> np.ndarray:
        self._graph.push(None)
        return self._pull()

    def _pull(self) -> np.ndarray:
        pieces = [np.zeros(0, np.float32)]
        while True:
            try:
                pieces.append(self._graph.pull().to_ndarray().reshape(-1))
            except (av.BlockingIOError, av.EOFError):
                return np.concatenate(pieces)


__all__ = ["AUDIO_FORMATS", "AudioEncoder", "AudioFormat"]
