"""Models that speak for the service, and the texts on their way through them."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from ..processing_sled import SledProcessor
from .engines import EngineFullError, SpeakingStyle, SpeechEngine, SpeechStream, load_engine
from .errors import ServiceError
from .metrics import ServiceMetrics
from .settings import ServiceSettings
from .voice_library import Voice
from .watermark import Watermarker


logger = logging.getLogger(__name__)


class Speech:
    r"""
    A text on its way through a [`Synthesizer`]. Iterate over it for its waveforms, `(num_samples,)` in float32, and close
    it: in an `async with` block.
    """

    def __init__(
        self, synthesizer: "Synthesizer", stream: SpeechStream, num_characters: int, start_time: float | None
    ) -> None:
        self._synthesizer = synthesizer
        self._stream = stream
        self._is_closed = False
        self.num_characters = num_characters
        self.num_samples = 0
        # Of the first text.
        self.start_time = start_time
        self.first_audio_time: float | None = None
        self.last_audio_time: float | None = None
        self.underrun = 0.0
        self._marker = synthesizer.make_marker()
        self.has_ended = False

    @property
    def duration(self) -> float:
        """Seconds of speech made so far."""
        return self.num_samples / self._synthesizer.sampling_rate

    @property
    def time_to_first_audio(self) -> float | None:
        """Seconds from the first text to the first audio."""
        if self.start_time is None or self.first_audio_time is None:
            return None
        return self.first_audio_time - self.start_time

    @property
    def real_time_factor(self) -> float | None:
        """Seconds from the first text to the last audio, over seconds of speech."""
        if self.start_time is None or self.last_audio_time is None or self.num_samples == 0:
            return None
        return (self.last_audio_time - self.start_time) / self.duration

    @property
    def summary(self) -> dict[str, Any]:
        """What is told of it in the log."""
        first, factor = self.time_to_first_audio, self.real_time_factor
        return {
            "num_samples": self.num_samples,
            "seconds": round(self.duration, 3),
            "time_to_first_audio": None if first is None else round(first, 3),
            "real_time_factor": None if factor is None else round(factor, 3),
            "underrun": round(self.underrun, 3),
            "cancelled": not self.has_ended,
        }

    def push(self, piece: str) -> None:
        """Gives the next piece of a text that is being written."""
        if self.start_time is None and piece.strip():
            self.start_time = time.perf_counter()
        self.num_characters += len(piece)
        self._stream.push(piece)

    def finish(self) -> None:
        """Ends a text that is being written."""
        self._stream.finish()

    async def __aiter__(self) -> AsyncIterator[np.ndarray]:
        async for waveform in self._mark(self._synthesizer.listen(self._stream)):
            now = time.perf_counter()
            if self.first_audio_time is None:
                self.first_audio_time = now
            # A listener who plays what comes as it comes has waited for what is more than the time since then.
            late = now - self.first_audio_time - self.duration - self.underrun
            self.underrun += max(0.0, late)
            self.last_audio_time = now
            self.num_samples += len(waveform)
            yield waveform
        self.has_ended = True

    async def _mark(self, waveforms: AsyncIterator[np.ndarray]) -> AsyncIterator[np.ndarray]:
        """Watermarks the speech, where that is wanted, in a thread, because it takes a while."""
        async for waveform in waveforms:
            marked = waveform if self._marker is None else await asyncio.to_thread(self._marker.mark, waveform)
            if len(marked):
                yield marked
        if self._marker is not None and len(rest := await asyncio.to_thread(self._marker.finish)):
            yield rest

    def close(self) -> None:
        """Gives the speech up, where it has not ended, and leaves its place to another."""
        if not self._is_closed:
            self._is_closed = True
            self._stream.close()
            self._synthesizer.forget(self)

    async def __aenter__(self) -> "Speech":
        return self

    async def __aexit__(self, *args: object) -> None:
        self.close()


class Synthesizer:
    r"""
    A model that speaks for the service.

    Args:
        name (`str`):
            The model's name for clients.
        processor ([`SledProcessor`]):
            Its processor.
        engine ([`SpeechEngine`]):
            What makes the speech.
        settings ([`ServiceSettings`]):
            Settings of the service.
        metrics ([`ServiceMetrics`]):
            Where it counts.
    """

    def __init__(
        self,
        name: str,
        processor: SledProcessor,
        engine: SpeechEngine,
        settings: ServiceSettings,
        metrics: ServiceMetrics,
    ) -> None:
        self.name = name
        self.sampling_rate = processor.sampling_rate
        self.engine = engine
        self._processor = processor
        self._metrics = metrics
        self._num_speeches = 0
        self._mean_seconds = 1.0
        self._is_marking = settings.is_watermarking
        metrics.streams.labels(name).set_function(lambda: engine.num_active_streams)
        metrics.queue.labels(name).set_function(lambda: engine.num_waiting_streams)

    def start(self) -> None:
        """Starts to take texts."""
        self.engine.start()

    def check_voice(self, prompt_text: str, waveform: np.ndarray) -> None:
        """Raises a `ValueError` for a recording, `(num_samples,)` at the model's rate, that makes no voice."""
        self._processor("a", prompt_text=prompt_text, prompt_audio=waveform, sampling_rate=self.sampling_rate)

    def close(self) -> None:
        """Ends all that is spoken."""
        self.engine.close()

    @property
    def is_alive(self) -> bool:
        """Whether it can speak."""
        return self.engine.is_alive

    @property
    def num_speeches(self) -> int:
        """Number of texts that are being spoken or wait."""
        return self._num_speeches

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self._processor.tokenizer(text)["input_ids"])

    def count_frames(self, num_samples: int) -> int:
        """Number of frames, the tokens of speech, that a number of samples takes."""
        return math.ceil(num_samples / self._processor.hop_length)

    async def open(self, text: str | None, voice: Voice | None, style: SpeakingStyle, max_duration: float) -> Speech:
        r"""
        Takes a text.

        Args:
            text (`str`, *optional*):
                The text. Without it, it is pushed.
            voice ([`Voice`], *optional*):
                Who speaks.
            style ([`SpeakingStyle`]):
                How.
            max_duration (`float`):
                Seconds after which the speech is cut off.

        Raises:
            [`ServiceError`]: if too many wait already, or the model cannot take the text.
        """
        self._num_speeches += 1
        start_time = None if text is None else time.perf_counter()
        is_open = False
        try:
            stream = await self.engine.add(text, voice, style, max_duration)
            is_open = True
        except EngineFullError as error:
            retry_after = max(1, math.ceil(self._mean_seconds))
            raise ServiceError(
                429,
                f"{error} Try again in {retry_after} s.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(retry_after)},
            ) from error
        except ValueError as error:
            raise ServiceError(400, str(error), "input") from error
        except RuntimeError as error:
            raise ServiceError(503, "The model does not speak any more.", code="model_unavailable") from error
        finally:
            if not is_open:
                self._num_speeches -= 1
        return Speech(self, stream, len(text or ""), start_time)

    def forget(self, speech: Speech) -> None:
        """Counts a speech that is closed."""
        self._num_speeches -= 1
        metrics = self._metrics
        if not speech.has_ended:
            metrics.cancellations.labels(self.name).inc()
        metrics.speech_seconds.labels(self.name).inc(speech.duration)
        metrics.underrun_seconds.labels(self.name).inc(speech.underrun)
        if (seconds := speech.time_to_first_audio) is not None:
            metrics.time_to_first_audio.labels(self.name).observe(seconds)
        if (factor := speech.real_time_factor) is not None:
            metrics.real_time_factor.labels(self.name).observe(factor)
            self._mean_seconds = 0.9 * self._mean_seconds + 0.1 * factor * speech.duration

    def make_marker(self) -> Watermarker | None:
        """What watermarks a speech, if anything does."""
        return Watermarker(self.sampling_rate) if self._is_marking else None

    async def listen(self, stream: SpeechStream) -> AsyncIterator[np.ndarray]:
        """The waveforms of a stream. Raises a [`ServiceError`] for what ends it before its time."""
        try:
            async for waveform in stream:
                yield np.asarray(waveform)
        except ValueError as error:
            raise ServiceError(400, str(error), "input") from error
        except Exception as error:
            logger.exception("speech_failed", extra={"details": {"model": self.name}})
            raise ServiceError(500, "The speech could not be made.", code="synthesis_failed") from error

    @property
    def voices(self) -> list[str]:
        """Names of the voices that the model brings along."""
        return self._processor.voices

    @property
    def default_voice(self) -> str | None:
        """The one of them that it takes where none is named."""
        return self._processor.default_voice


def make_synthesizer(
    checkpoint: str, engine: SpeechEngine, settings: ServiceSettings, metrics: ServiceMetrics
) -> Synthesizer:
    """Gives an engine the name and the processor of the checkpoint that it speaks with."""
    name = Path(checkpoint).name if Path(checkpoint).exists() else checkpoint
    return Synthesizer(name, SledProcessor.from_pretrained(checkpoint), engine, settings, metrics)


def load_synthesizers(settings: ServiceSettings, metrics: ServiceMetrics) -> list[Synthesizer]:
    """Loads the models that the settings name: one for whole texts, and one for texts that are being written."""
    return [
        make_synthesizer(checkpoint, load_engine(checkpoint, settings), settings, metrics)
        for checkpoint in settings.checkpoints
    ]
