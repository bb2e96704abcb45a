"""Speech that replicas on a Ray cluster make: the replica, and the engine that speaks on replicas."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ..serving_sled import SledStream
from .engines import EngineFullError, SpeakingStyle, load_engine
from .logs import log_as_json
from .settings import ServiceSettings
from .text_relay import TextRelay, take_all
from .voice_library import Voice


class Speaker:
    r"""
    A replica: one model, which speaks up to `max_streams` texts at a time.

    Args:
        checkpoint (`str`):
            The model: a repository on the Hub or a folder.
        settings ([`ServiceSettings`]):
            How many streams it speaks, and where it computes.
    """

    def __init__(self, checkpoint: str, settings: ServiceSettings) -> None:
        log_as_json("transformers_sled.server")
        # Ray Serve lets a text come when there is a place for it. Another may still be leaving that.
        self._engine = load_engine(checkpoint, replace(settings, max_queue=settings.max_streams))
        self._engine.start()

    async def speak(
        self,
        text: str | None,
        voice: Voice | None,
        style: SpeakingStyle,
        max_duration: float,
        relay: "ActorHandle[TextRelay]",
        name: str,
    ) -> AsyncGenerator[np.ndarray | None, None]:
        """
        Speaks a text: first gives `None`, when it has taken the text, then the waveforms. Without `text`, the relay has
        it by its name.
        """
        stream = await self._engine.add(text, voice, style, max_duration)
        feeding = None if text is not None else asyncio.create_task(_feed(stream, relay, name))
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

    def check_health(self) -> None:
        """Raises a `RuntimeError` if the model does not speak any more, so that the replica is replaced."""
        if not self._engine.is_alive:
            raise RuntimeError("The model does not speak any more.")


async def _feed(stream: SledStream, relay: "ActorHandle[TextRelay]", name: str) -> None:
    """Gives a stream its text as it is written."""
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
            The deployment, of [`Speaker`].
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
            with contextlib.ExitStack() as on_failure:
                if is_written:
                    on_failure.callback(self._relay.close.remote, name)
                    await self._relay.open.remote(name)
                responses = self._speak.remote(text, voice, style, max_duration, self._relay, name)
                stream = ReplicaStream(responses, self._relay, name, is_written, self._active.discard)
                on_failure.callback(stream.close)
                await stream.take()
                on_failure.pop_all()
        except BackPressureError as error:
            raise EngineFullError("All streams of all replicas are taken, and too many requests wait.") from error
        except (RayError, RayServeException) as error:
            raise RuntimeError("The replica has failed.") from error
        finally:
            self._num_waiting -= 1
        self._active.add(stream)
        return stream


__all__ = ["ReplicaEngine", "Speaker"]
