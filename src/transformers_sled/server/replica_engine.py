"""Speech that replicas on a Ray cluster make."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import numpy as np
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from .engines import EngineFullError, LocalEngine, SpeakingStyle
from .text_relay import TextRelay, take_all
from .voice_library import Voice


async def speak_remotely(
    engine: LocalEngine,
    text: str | None,
    voice: Voice | None,
    style: SpeakingStyle,
    max_duration: float,
    relay: "ActorHandle[TextRelay]",
    name: str,
) -> AsyncGenerator[np.ndarray | None, None]:
    """
    What a replica does with a text: first gives `None`, when it has taken the text, then the waveforms. Without `text`, the
    relay has it by its name.
    """
    stream = await engine.add(text, voice, style, max_duration)

    async def feed() -> None:
        try:
            while True:
                for piece in await relay.get.remote(name):
                    if piece is None:
                        stream.finish()
                        return
                    stream.push(piece)
        except RayError:
            # The one who writes it is gone, and there is no end to wait for.
            stream.close()
            raise

    feeding = None if text is not None else asyncio.create_task(feed())
    try:
        yield None
        async for waveform in stream:
            yield waveform.numpy()
        if feeding is not None and feeding.done():
            feeding.result()
    finally:
        stream.close()
        if feeding is not None:
            feeding.cancel()


class ReplicaStream:
    """A text on its way through a replica. See [`SpeechStream`]."""

    def __init__(
        self,
        responses: DeploymentResponseGenerator[Any],
        relay: "ActorHandle[TextRelay]",
        name: str,
        is_written: bool,
        forget: Callable[["ReplicaStream"], None],
    ) -> None:
        self._responses = responses
        self._forget = forget
        self._relay = relay
        self._name = name
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._sending = asyncio.create_task(self._send()) if is_written else None

    async def _send(self) -> None:
        is_over = False
        while not is_over:
            pieces = await take_all(self._pieces)
            is_over = pieces[-1] is None
            # One after the other, because calls of an asynchronous actor may overtake each other.
            await self._relay.put.remote(self._name, pieces)

    def push(self, piece: str) -> None:
        """Gives the next piece of a text that is being written."""
        self._pieces.put_nowait(piece)

    def finish(self) -> None:
        """Ends a text that is being written."""
        self._pieces.put_nowait(None)

    def close(self) -> None:
        """Gives the speech up, where it has not ended: the replica gets a `CancelledError`."""
        self._forget(self)
        self._responses.cancel()
        if self._sending is not None:
            self._sending.cancel()
            self._relay.close.remote(self._name)

    async def take(self) -> np.ndarray | None:
        """What the replica gives next. Raises what it has raised."""
        try:
            return await anext(self._responses)
        except RayTaskError as error:
            raise error.cause from None

    async def __aiter__(self) -> AsyncIterator[np.ndarray]:
        while True:
            try:
                waveform = await self.take()
            except StopAsyncIteration:
                return
            if waveform is not None:
                yield waveform


class ReplicaEngine:
    r"""
    Speaks on replicas. Ray Serve chooses the one for each text, and lets texts wait until one has a place.

    Args:
        replicas (`DeploymentHandle`):
            The deployment. Its `speak` takes what [`speak_remotely`] takes after the engine.
        relay (`ActorHandle`):
            A [`TextRelay`].
    """

    def __init__(self, replicas: DeploymentHandle[Any], relay: "ActorHandle[TextRelay]") -> None:
        self._speak = replicas.options(method_name="speak", stream=True)
        self._relay = relay
        # Those of this process.
        self._active: set[ReplicaStream] = set()
        self._num_waiting = 0

    @property
    def is_alive(self) -> bool:
        """Always: Ray Serve replaces what is not."""
        return True

    @property
    def num_active_streams(self) -> int:
        """Number of texts that are being spoken for this process."""
        return len(self._active)

    @property
    def num_waiting_streams(self) -> int:
        """Number of texts of this process that wait for a replica."""
        return self._num_waiting

    def start(self) -> None:
        """Ray Serve has started the replicas."""

    def close(self) -> None:
        """Ray Serve stops the replicas."""

    async def add(
        self, text: str | None, voice: Voice | None, style: SpeakingStyle, max_duration: float
    ) -> ReplicaStream:
        """Takes a text, and waits until a replica has taken it. See [`SpeechEngine.add`]."""
        name = uuid.uuid4().hex
        is_written = text is None
        self._num_waiting += 1
        try:
            if is_written:
                await self._relay.open.remote(name)
            responses = self._speak.remote(text, voice, style, max_duration, self._relay, name)
            stream = ReplicaStream(responses, self._relay, name, is_written, self._active.discard)
            try:
                await stream.take()
            except BaseException:
                stream.close()
                raise
        except BackPressureError as error:
            raise EngineFullError("All streams of all replicas are taken, and too many requests wait.") from error
        except RayError as error:
            raise RuntimeError("The replica has failed.") from error
        finally:
            self._num_waiting -= 1
        self._active.add(stream)
        return stream


__all__ = ["ReplicaEngine", "speak_remotely"]
