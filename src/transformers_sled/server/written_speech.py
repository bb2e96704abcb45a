"""Speech of a text that is still being written, for the protocols on WebSockets."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import numpy as np

from .engines import SpeakingStyle
from .service import SpeechService
from .synthesizers import Speech, Synthesizer
from .voice_library import Voice


class WrittenSpeech:
    r"""
    A text that is being written, and its speech. It takes a place at the model from its first word on.

    Args:
        service ([`SpeechService`]):
            The service.
        synthesizer ([`Synthesizer`]):
            The model.
        voice ([`Voice`]):
            Who speaks.
        style ([`SpeakingStyle`]):
            How.
    """

    def __init__(self, service: SpeechService, synthesizer: Synthesizer, voice: Voice, style: SpeakingStyle) -> None:
        self._service = service
        self._synthesizer = synthesizer
        self._voice = voice
        self._style = style
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._num_characters = 0

    def write(self, piece: str) -> None:
        """Takes the next piece of the text. Raises a [`ServiceError`] if the text gets too long."""
        self._service.check_length(self._num_characters + len(piece))
        self._num_characters += len(piece)
        self._pieces.put_nowait(piece)

    def finish(self) -> None:
        """Ends the text."""
        self._pieces.put_nowait(None)

    async def speak(self, details: dict[str, Any]) -> AsyncGenerator[np.ndarray, None]:
        """Waveforms (num_samples,) in float32, as soon as there is text for them. None for a text without a word."""
        start = ""
        while not start.strip():
            piece = await self._pieces.get()
            if piece is None:
                return
            start += piece
        speech = await self._service.speak(self._synthesizer, None, self._voice, self._style)
        async with speech:
            speech.push(start)
            feeding = asyncio.create_task(self._feed(speech))
            try:
                async for waveform in speech:
                    yield waveform
            finally:
                feeding.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await feeding
                details["seconds"] = round(details.get("seconds", 0.0) + speech.duration, 3)
                details["characters"] = details.get("characters", 0) + speech.num_characters
                details.setdefault("time_to_first_audio", speech.summary["time_to_first_audio"])

    async def _feed(self, speech: Speech) -> None:
        while (piece := await self._pieces.get()) is not None:
            speech.push(piece)
        speech.finish()


class SpeechSequence:
    r"""
    Utterances that are written one after the other, and spoken in that order.

    Args:
        make_speech (`Callable[[], WrittenSpeech]`):
            Makes the next utterance.
        speak (`Callable[[WrittenSpeech], Awaitable[None]]`):
            Speaks an utterance to its end, and tells of what goes wrong by itself.
    """

    def __init__(
        self, make_speech: Callable[[], WrittenSpeech], speak: Callable[[WrittenSpeech], Awaitable[None]]
    ) -> None:
        self._make_speech = make_speech
        self._speak = speak
        self._tasks: list[asyncio.Task[None]] = []
        self._written: WrittenSpeech | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to speak."""
        return not self._tasks

    @property
    def num_pending(self) -> int:
        """Number of utterances that are not spoken to their end."""
        return len(self._tasks)

    @property
    def is_being_written(self) -> bool:
        """Whether an utterance has begun and not ended."""
        return self._written is not None

    def write(self, piece: str) -> None:
        """Takes the next piece of text. Raises a [`ServiceError`] if the utterance gets too long."""
        self._begin().write(piece)

    def finish(self) -> None:
        """Ends the utterance. Without any text, one that is empty comes and goes."""
        self._begin().finish()
        self._written = None

    async def clear(self) -> None:
        """Gives up all that is not spoken yet."""
        self._written = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def drain(self) -> None:
        """Waits until all is spoken."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def _begin(self) -> WrittenSpeech:
        if self._written is None:
            self._written = self._make_speech()
            task = asyncio.create_task(self._run(self._written, self._tasks[-1] if self._tasks else None))
            self._tasks.append(task)
            task.add_done_callback(self._tasks.remove)
        return self._written

    async def _run(self, speech: WrittenSpeech, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        await self._speak(speech)
