"""What all protocols of the service share: its models, voices, keys and figures."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import numpy as np

from .audio_formats import AudioEncoder
from .authentication import Authenticator
from .engines import SpeakingStyle
from .errors import ServiceError
from .metrics import ServiceMetrics
from .recognition import Recognizer
from .settings import ServiceSettings
from .synthesizers import Speech, Synthesizer, load_synthesizers
from .voice_library import Voice, VoiceLibrary


logger = logging.getLogger(__name__)

SynthesizerLoader = Callable[[ServiceSettings, ServiceMetrics], list[Synthesizer]]

# OpenAI's models, whose names the model for whole texts answers to.
OPENAI_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15")


class SpeechService:
    r"""
    The models of the service with all that they need.

    Args:
        settings ([`ServiceSettings`]):
            The settings.
        load (`Callable[[ServiceSettings, ServiceMetrics], list[Synthesizer]]`, *optional*):
            Makes the models; by default in this process.
    """

    def __init__(self, settings: ServiceSettings, load: SynthesizerLoader = load_synthesizers) -> None:
        self.settings = settings
        self._load_synthesizers = load
        self.metrics = ServiceMetrics()
        self.authenticator = Authenticator(settings.api_keys)
        self.voices = VoiceLibrary(settings.voices_folder)
        self.is_draining = False
        self._synthesizers: list[Synthesizer] = []
        self._recognizer: Recognizer | None = None
        self._loading_error: Exception | None = None

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Loads the models while the service already tells that it is not ready, and closes them at the end."""
        loading = threading.Thread(target=self._load, name="load-models", daemon=True)
        loading.start()
        try:
            yield
        finally:
            self.is_draining = True
            await asyncio.to_thread(loading.join)
            for synthesizer in self._synthesizers:
                await asyncio.to_thread(synthesizer.close)

    def _load(self) -> None:
        try:
            synthesizers = self._load_synthesizers(self.settings, self.metrics)
            if self.settings.recognizer is not None and self.settings.cloning:
                self._recognizer = Recognizer(self.settings.recognizer, self.settings.device)
            for synthesizer in reversed(synthesizers):
                self.voices.add_shared(synthesizer.voices, synthesizer.default_voice)
            for synthesizer in synthesizers:
                synthesizer.start()
        except Exception as error:
            self._loading_error = error
            logger.exception("models_not_loaded")
            return
        self._synthesizers = synthesizers
        logger.info(
            "ready",
            extra={
                "details": {
                    "models": [synthesizer.name for synthesizer in synthesizers],
                    "watermark": self.settings.is_watermarking,
                }
            },
        )

    @property
    def synthesizers(self) -> list[Synthesizer]:
        """The models, none while they are loaded."""
        return list(self._synthesizers)

    @property
    def is_ready(self) -> bool:
        """Whether texts are taken."""
        return bool(self._synthesizers) and not self.is_draining and self.is_healthy

    @property
    def is_healthy(self) -> bool:
        """Whether nothing has failed that only a restart mends."""
        return self._loading_error is None and all(synthesizer.is_alive for synthesizer in self._synthesizers)

    @property
    def num_speeches(self) -> int:
        """Number of texts that are being spoken or wait."""
        return sum(synthesizer.num_speeches for synthesizer in self._synthesizers)

    @property
    def model_names(self) -> list[str]:
        """The names by which a request may ask for a model."""
        return [*(synthesizer.name for synthesizer in self._synthesizers), *OPENAI_MODELS]

    def get_synthesizer(self, name: str | None = None, for_written_text: bool = False) -> Synthesizer:
        r"""
        Finds the model of a request.

        Args:
            name (`str`, *optional*):
                Its name, or one of OpenAI's.
            for_written_text (`bool`, *optional*, defaults to `False`):
                Without a name, whether the text is still being written.

        Raises:
            [`ServiceError`]: if the service is not ready, or there is no such model.
        """
        if not self.is_ready:
            message = "The service is starting." if self.is_healthy else "The service has failed."
            if self.is_draining:
                message = "The service is shutting down."
            raise ServiceError(503, message, code="not_ready", headers={"Retry-After": "5"})
        for synthesizer in self._synthesizers:
            if synthesizer.name == name:
                return synthesizer
        if name is None or name in OPENAI_MODELS:
            return self._synthesizers[-1 if for_written_text else 0]
        raise ServiceError(
            404,
            f"Model {name!r} does not exist. There are {', '.join(self.model_names)}.",
            "model",
            "model_not_found",
        )

    async def speak(self, synthesizer: Synthesizer, text: str | None, voice: Voice, style: SpeakingStyle) -> Speech:
        """Gives a text to a model. See [`Synthesizer.open`]."""
        return await synthesizer.open(text, voice, style, self.settings.max_duration)

    async def speak_encoded(
        self,
        synthesizer: Synthesizer,
        text: str,
        voice: Voice,
        style: SpeakingStyle,
        make_encoder: Callable[[Synthesizer], AudioEncoder],
        details: dict[str, Any],
    ) -> AsyncGenerator[bytes, None]:
        r"""
        Speaks a whole text as the bytes of an audio format.

        Args:
            synthesizer ([`Synthesizer`]):
                The model.
            text (`str`):
                The text.
            voice ([`Voice`]):
                Who speaks.
            style ([`SpeakingStyle`]):
                How.
            make_encoder (`Callable[[Synthesizer], AudioEncoder]`):
                Makes the encoder.
            details (`dict[str, Any]`):
                Gets what is told of the speech in the log.

        Raises:
            [`ServiceError`]: if too many texts wait, or the speech fails.
        """
        encoder = make_encoder(synthesizer)
        async with await self.speak(synthesizer, text, voice, style) as speech:
            try:
                async for waveform in speech:
                    if data := encoder.encode(waveform):
                        yield data
                yield encoder.finish()
            finally:
                details.update(speech.summary)

    async def transcribe(self, waveform: np.ndarray, sampling_rate: int) -> str:
        r"""
        Writes down what the sample of a voice says.

        Args:
            waveform (`np.ndarray` of shape `(num_samples,)`):
                The sample in float32.
            sampling_rate (`int`):
                Its sampling rate in Hz.

        Raises:
            [`ServiceError`]: if the service has no recognizer, or it hears no words.
        """
        if self._recognizer is None:
            raise ServiceError(
                400, "`transcript` must say what the sample says: the service has no recognizer.", "transcript"
            )
        transcript = await asyncio.to_thread(self._recognizer.recognize, waveform, sampling_rate)
        if not transcript:
            raise ServiceError(400, "No words were heard in `audio_sample`.", "audio_sample")
        return transcript

    def check_length(self, num_characters: int) -> None:
        """Raises a [`ServiceError`] if a text is too long."""
        limit = self.settings.max_input_characters
        if num_characters > limit:
            raise ServiceError(
                400,
                f"`input` must have at most {limit} characters, got {num_characters}.",
                "input",
                "string_above_max_length",
            )
