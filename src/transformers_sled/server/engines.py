"""What makes the speech of one model: a `SledStreamServer` in this process."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..configuration_sled import SledConfig
from ..modeling_sled import SledForSpeechSynthesis
from ..precision import Precision, choose_precision
from ..processing_sled import SledProcessor
from ..serving_sled import SledStream, SledStreamServer
from .settings import ServiceSettings
from .voice_library import DEFAULT_VOICE, Voice


logger = logging.getLogger(__name__)

# Voices that are kept encoded.
MAX_PROMPTS = 256


@dataclass(frozen=True)
class SpeakingStyle:
    """How a text is spoken. What is `None` is up to the model."""

    seed: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None


class EngineFullError(Exception):
    """Too many texts wait already."""


class SpeechStream(Protocol):
    """A text on its way through an engine. Its waveforms are arrays or tensors `(num_samples,)` in float32."""

    def push(self, piece: str) -> None:
        """Gives the next piece of a text that is being written."""

    def finish(self) -> None:
        """Ends a text that is being written."""

    def close(self) -> None:
        """Gives the speech up, where it has not ended."""

    def __aiter__(self) -> AsyncIterator[Any]: ...


class SpeechEngine(Protocol):
    """What makes the speech of one model, in this process or elsewhere."""

    @property
    def is_alive(self) -> bool:
        """Whether it can speak."""

    @property
    def num_active_streams(self) -> int:
        """Number of texts that are being spoken."""

    @property
    def num_waiting_streams(self) -> int:
        """Number of texts that wait for their turn."""

    def start(self) -> None:
        """Starts to take texts."""

    def close(self) -> None:
        """Ends all that is spoken."""

    async def add(
        self, text: str | None, voice: Voice | None, style: SpeakingStyle, max_duration: float
    ) -> SpeechStream:
        """
        Takes a text, or pieces of it that are pushed. Raises an [`EngineFullError`] if too many wait already, a
        `ValueError` if the model cannot take the text, and a `RuntimeError` if it does not speak any more.
        """


class LocalEngine:
    r"""
    Speaks in this process.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        processor ([`SledProcessor`]):
            Its processor.
        settings ([`ServiceSettings`]):
            How many streams it speaks, and how many wait.
    """

    def __init__(self, model: SledForSpeechSynthesis, processor: SledProcessor, settings: ServiceSettings) -> None:
        self.model = model
        self.server = SledStreamServer(model, processor, max_streams=settings.max_streams)
        self._processor = processor
        self._settings = settings
        # Texts that the server does not have yet.
        self._num_preparing = 0
        # Prepares texts and voices. One, because it needs the processor as the model's own thread does.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._prompts: dict[str, dict[str, Any]] = {}
        self._prompts_lock = threading.Lock()

    @property
    def is_alive(self) -> bool:
        """Whether it can speak."""
        return self.server.is_running

    @property
    def num_active_streams(self) -> int:
        """Number of texts that are being spoken."""
        return self.server.num_active_streams

    @property
    def num_waiting_streams(self) -> int:
        """Number of texts that wait for their turn."""
        return self.server.num_waiting_streams

    def start(self) -> None:
        """Starts to take texts."""
        self.server.start()

    def close(self) -> None:
        """Ends all that is spoken."""
        self.server.close()
        self._threads.shutdown()

    async def add(
        self, text: str | None, voice: Voice | None, style: SpeakingStyle, max_duration: float
    ) -> SledStream:
        """Takes a text. See [`SpeechEngine.add`]."""
        num_streams = self._num_preparing + self.server.num_active_streams + self.server.num_waiting_streams
        if num_streams >= self._settings.max_streams + self._settings.max_queue:
            raise EngineFullError(
                f"All {self._settings.max_streams} streams are taken and {self._settings.max_queue} requests wait."
            )
        self._num_preparing += 1
        try:
            return await self._run_closing(self._add, text, voice, style, max_duration)
        finally:
            self._num_preparing -= 1

    async def _run_closing(self, function: Callable[..., SledStream], *args: Any) -> SledStream:
        """Runs what takes a while and gives a stream, which is closed if nobody waits for it any more."""
        future = self._threads.submit(function, *args)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_stream)
            raise

    def _add(self, text: str | None, voice: Voice | None, style: SpeakingStyle, max_duration: float) -> SledStream:
        options: dict[str, Any] = {} if voice is None else dict(self._get_prompt(voice))
        for name in ("guidance_scale", "temperature"):
            if (value := getattr(style, name)) is not None:
                options[name] = value
        generator = torch.Generator()
        if style.seed is None:
            generator.seed()
        else:
            generator.manual_seed(style.seed)
        return self.server.add(text, max_duration=max_duration, generator=generator, **options)

    def _get_prompt(self, voice: Voice) -> dict[str, Any]:
        """The voice as the processor takes it."""
        if voice.id in self._processor.voices:
            return {"voice_preset": voice.id}
        if voice.recording is None:
            if voice.id != DEFAULT_VOICE:
                raise ValueError(f"This model has no voice {voice.id!r}, but {self._processor.voices}.")
            return {}
        with self._prompts_lock:
            if voice.id not in self._prompts:
                inputs = self._processor(voice.prompt_text, prompt_text=voice.prompt_text, prompt_audio=voice.read())
                latents = self.model.encode_prompt(inputs["prompt_values"], inputs["prompt_values_mask"])
                self._prompts[voice.id] = {"prompt_text": voice.prompt_text, **latents}
                if len(self._prompts) > MAX_PROMPTS:
                    del self._prompts[next(iter(self._prompts))]
            return self._prompts[voice.id]


def _close_stream(future: "Future[SledStream]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


def load_engine(checkpoint: str, settings: ServiceSettings) -> LocalEngine:
    """Loads a model to speak in this process: a repository on the Hub or a folder."""
    if settings.dtype is None and settings.quantization is None:
        config = SledConfig.from_pretrained(checkpoint)
        precision = choose_precision(config, settings.device, settings.max_streams)
    else:
        precision = Precision(settings.dtype or "bfloat16", settings.quantization)
    logger.info("loading", extra={"details": {"model": checkpoint, "precision": str(precision)}})
    model = SledForSpeechSynthesis.from_pretrained(
        checkpoint, device_map=settings.device, **precision.get_loading_arguments()
    )
    if settings.compiles:
        model.compile_generation()
    processor = SledProcessor.from_pretrained(checkpoint)
    # What writes numbers out takes seconds to import, which no request should wait for.
    processor.get_reader()
    return LocalEngine(model, processor, settings)
