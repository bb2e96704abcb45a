"""ElevenLabs' speech routes: text that is being written on a WebSocket, alone or in several contexts, and whole text."""

import asyncio
import base64
import contextlib
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, WebSocket
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect

from .audio_formats import AUDIO_FORMATS, AudioEncoder
from .connections import Connection, get_text
from .dependencies import Details, Owner, Service
from .engines import SpeakingStyle
from .errors import ERROR_RESPONSES, ServiceError
from .provenance import get_metadata
from .responses import SpeechResponse
from .service import SpeechService
from .synthesizers import Synthesizer
from .voice_library import Voice
from .written_speech import SpeechSequence, WrittenSpeech


# What ElevenLabs' codecs are here, and the rates that they come at.
FORMATS = {
    "mp3": ("mp3", (22050, 24000, 44100)),
    "pcm": ("pcm", (8000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "wav": ("wav", (8000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "ulaw": ("mulaw", (8000,)),
    "alaw": ("alaw", (8000,)),
    "opus": ("opus", (48000,)),
}

# Contexts of one WebSocket at a time.
MAX_CONTEXTS = 10

router = APIRouter(prefix="/v1/text-to-speech")


@dataclass(frozen=True)
class OutputFormat:
    """A format by ElevenLabs' name for it, such as `mp3_44100_128`."""

    audio_format: str
    sampling_rate: int
    bit_rate: int | None

    @classmethod
    def parse(cls, name: str) -> "OutputFormat":
        """Reads the name. Raises a [`ServiceError`] for one that there is not."""
        codec, *numbers = name.split("_")
        audio_format, rates = FORMATS.get(codec, ("", ()))
        if not numbers or not all(number.isascii() and number.isdigit() for number in numbers) or len(numbers) > 2:
            rates = ()
        rate = int(numbers[0]) if rates else 0
        kilobits = int(numbers[1]) if rates and len(numbers) == 2 else None
        if rate not in rates or (kilobits is not None and not 8 <= kilobits <= 320):
            raise ServiceError(400, f"`output_format` {name[:64]!r} is not supported.", "output_format")
        return cls(audio_format, rate, None if kilobits is None else 1000 * kilobits)

    def make_encoder(self, synthesizer: Synthesizer, speed: float = 1.0) -> AudioEncoder:
        """Makes an encoder for it."""
        return AudioEncoder(
            self.audio_format,
            synthesizer.sampling_rate,
            self.sampling_rate,
            speed,
            self.bit_rate,
            get_metadata(synthesizer.name),
        )


class VoiceSettings(BaseModel):
    """How to speak. Settings of ElevenLabs' that make no difference here are accepted."""

    model_config = ConfigDict(extra="ignore")

    speed: float | None = Field(None, ge=0.25, le=4.0)


class TextToSpeechRequest(BaseModel):
    """Text to speak, and how. Parameters of ElevenLabs' that make no difference here are accepted."""

    model_config = ConfigDict(extra="ignore")

    text: str = Field(min_length=1)
    voice_settings: VoiceSettings | None = None
    seed: int | None = Field(None, ge=0, lt=2**63, description="The same seed gives the same speech.")


@router.post("/{voice_id}", response_class=Response, responses=ERROR_RESPONSES)
@router.post("/{voice_id}/stream", response_class=Response, responses=ERROR_RESPONSES)
async def speak(
    voice_id: Annotated[str, Path(max_length=256)],
    body: TextToSpeechRequest,
    owner: Owner,
    service: Service,
    details: Details,
    output_format: Annotated[str, Query(max_length=64)] = "mp3_44100_128",
) -> Response:
    """Speaks a text in ElevenLabs' form, and sends the speech while it is made."""
    service.check_length(len(body.text))
    if not body.text.strip():
        raise ServiceError(400, "`text` must not be empty.", "text")
    output = OutputFormat.parse(output_format)
    synthesizer = service.get_synthesizer()
    voice = await asyncio.to_thread(service.voices.get, voice_id, owner)
    details.update(model=synthesizer.name, voice=voice.id, characters=len(body.text), response_format=output_format)
    speed = (body.voice_settings.speed if body.voice_settings else None) or 1.0
    content = service.speak_encoded(
        synthesizer,
        body.text,
        voice,
        SpeakingStyle(body.seed),
        lambda synthesizer: output.make_encoder(synthesizer, speed),
        details,
    )
    media_type = AUDIO_FORMATS[output.audio_format].media_type
    return SpeechResponse(content, service.settings.client_timeout, media_type, {"cache-control": "no-store"})


@router.websocket("/{voice_id}/stream-input")
async def speak_written_text(websocket: WebSocket, voice_id: str, service: Service) -> None:
    """Speaks text while it is being written, in ElevenLabs' form."""
    await _run(websocket, voice_id, service, SingleSession)


@router.websocket("/{voice_id}/multi-stream-input")
async def speak_written_texts(websocket: WebSocket, voice_id: str, service: Service) -> None:
    """Speaks several texts at a time while they are being written, in ElevenLabs' form."""
    await _run(websocket, voice_id, service, MultiSession)


async def _run(websocket: WebSocket, voice_id: str, service: SpeechService, session_class: "type[Session]") -> None:
    connection = Connection(websocket, service)
    try:
        owner = connection.authenticate()
        output = OutputFormat.parse(websocket.query_params.get("output_format", "mp3_44100_128"))
        seed = websocket.query_params.get("seed")
        if seed is not None and not (seed.isascii() and seed.isdigit() and int(seed) < 2**63):
            raise ServiceError(400, "`seed` must be a whole number of at least 0.", "seed")
        synthesizer = service.get_synthesizer(for_written_text=True)
        voice = await asyncio.to_thread(service.voices.get, voice_id, owner)
    except ServiceError as error:
        await connection.refuse(error)
        return
    connection.details.update(model=synthesizer.name, voice=voice.id, response_format=output.audio_format)
    style = SpeakingStyle(None if seed is None else int(seed))
    await session_class(connection, output, synthesizer, voice, style).run()


class Context:
    """A text on a WebSocket: its utterances, which end where it is flushed, and one encoder for all of them."""

    def __init__(self, session: "Session", name: str | None, speed: float) -> None:
        self.session = session
        self.name = name
        self.is_closing = False
        self.encoder = session.output.make_encoder(session.synthesizer, speed)
        self.sequence = SpeechSequence(self._make_speech, self._speak)

    def _make_speech(self) -> WrittenSpeech:
        session = self.session
        return WrittenSpeech(session.connection.service, session.synthesizer, session.voice, session.style)

    async def _speak(self, speech: WrittenSpeech) -> None:
        try:
            async with contextlib.aclosing(speech.speak(self.session.connection.details)) as waveforms:
                async for waveform in waveforms:
                    await self._send(self.encoder.encode(waveform))
            if self.is_closing and not self.sequence.is_being_written and self.sequence.num_pending == 1:
                await self._send(self.encoder.finish())
                await self.session.connection.send(self._describe(None, is_final=True))
                self.session.forget(self)
        except ServiceError as error:
            await self.session.tell(error, self.name)
        except WebSocketDisconnect:
            # `receive` tells of it, too.
            return

    async def _send(self, data: bytes) -> None:
        if data:
            await self.session.connection.send(self._describe(base64.b64encode(data).decode(), is_final=False))

    def _describe(self, audio: str | None, is_final: bool) -> dict[str, Any]:
        message: dict[str, Any] = {
            "audio": audio,
            "isFinal": True if is_final else None,
            "alignment": None,
            "normalizedAlignment": None,
        }
        return message if self.name is None else {**message, "contextId": self.name}

    def write(self, text: str, is_flushed: bool) -> None:
        """Takes the next piece of the text."""
        if text.strip() or self.sequence.is_being_written:
            self.sequence.write(text)
        if is_flushed and self.sequence.is_being_written:
            self.sequence.finish()

    def close(self) -> None:
        """Ends the text."""
        if not self.is_closing:
            self.is_closing = True
            self.sequence.finish()


class Session:
    """What happens on one WebSocket."""

    def __init__(
        self,
        connection: Connection,
        output: OutputFormat,
        synthesizer: Synthesizer,
        voice: Voice,
        style: SpeakingStyle,
    ) -> None:
        self.connection = connection
        self.output = output
        self.synthesizer = synthesizer
        self.voice = voice
        self.style = style
        self.contexts: dict[str | None, Context] = {}

    async def run(self) -> None:
        """Runs until the client leaves or ends its text."""
        await self.connection.accept()
        code = 1000
        try:
            while await self._take_message():
                pass
            for context in list(self.contexts.values()):
                context.close()
            for context in list(self.contexts.values()):
                await context.sequence.drain()
        except WebSocketDisconnect as error:
            # As ElevenLabs ends a WebSocket after an error.
            code = 1008 if error.code == 1011 else error.code
        finally:
            for context in list(self.contexts.values()):
                await context.sequence.clear()
            await self.connection.close(code)

    def forget(self, context: Context) -> None:
        """Leaves out a context that is spoken to its end."""
        if self.contexts.get(context.name) is context:
            del self.contexts[context.name]

    async def tell(self, error: ServiceError, context: str | None = None) -> None:
        """Tells of an error, which ends the WebSocket."""
        message: dict[str, Any] = {"message": error.message, "error": error.code or "invalid_request", "code": 1008}
        await self.connection.fail(message if context is None else {**message, "contextId": context}, error)

    async def _take_message(self) -> bool:
        """Does what the next message says. Returns whether there may be more."""
        try:
            message = await self.connection.receive(
                lambda: all(context.sequence.is_idle for context in self.contexts.values())
            )
            return self._take(message)
        except ServiceError as error:
            await self.tell(error)
            return True

    def _take(self, message: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _get_context(self, name: str | None, message: dict[str, Any]) -> Context:
        if name not in self.contexts:
            if len(self.contexts) >= MAX_CONTEXTS:
                raise ServiceError(400, f"There may be {MAX_CONTEXTS} contexts at a time.", code="too_many_contexts")
            settings = message.get("voice_settings")
            speed = settings.get("speed") if isinstance(settings, dict) else None
            if speed is not None and not (isinstance(speed, int | float) and 0.25 <= speed <= 4):
                raise ServiceError(400, "`speed` must be between 0.25 and 4.", "speed")
            self.contexts[name] = Context(self, name, float(speed or 1.0))
        return self.contexts[name]


class SingleSession(Session):
    """One text, which an empty piece ends."""

    def _take(self, message: dict[str, Any]) -> bool:
        context = self._get_context(None, message)
        text = get_text(message)
        if not text:
            return False
        context.write(text, is_flushed=message.get("flush") is True)
        return True


class MultiSession(Session):
    """Several texts by the names of their contexts."""

    def _take(self, message: dict[str, Any]) -> bool:
        if message.get("close_socket") is True:
            return False
        name = message.get("context_id", message.get("contextId", "default"))
        if not isinstance(name, str) or len(name) > 256:
            raise ServiceError(400, "`context_id` must be a string of at most 256 letters.", "context_id")
        if message.get("close_context") is True:
            if name in self.contexts:
                self.contexts[name].close()
            return True
        text = "" if message.get("text") is None else get_text(message)
        if text or name in self.contexts:
            context = self._get_context(name, message)
            if context.is_closing:
                raise ServiceError(400, f"Context {name!r} is closed.", "context_id", "context_closed")
            context.write(text, is_flushed=message.get("flush") is True)
        return True


__all__ = ["router"]
