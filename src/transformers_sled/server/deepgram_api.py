"""Deepgram's speech routes: text that is being written on a WebSocket, and whole text by POST."""

import asyncio
import contextlib
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Query, WebSocket
from pydantic import BaseModel, ConfigDict, Field, ValidationError
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


# What Deepgram's encodings and containers are here.
FORMATS = {
    ("linear16", "none"): "pcm",
    ("linear16", "wav"): "wav",
    ("mulaw", "none"): "mulaw",
    ("alaw", "none"): "alaw",
    ("mp3", "none"): "mp3",
    ("opus", "ogg"): "opus",
    ("flac", "none"): "flac",
    ("aac", "none"): "aac",
}
DEFAULT_CONTAINERS = {"linear16": "wav", "opus": "ogg"}

router = APIRouter(prefix="/v1")


class SpeakOptions(BaseModel):
    """What the query says. Parameters of Deepgram's that make no difference here are accepted."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(
        "aura-2-thalia-en", max_length=256, description="A voice; Deepgram's names are the default one."
    )
    encoding: Literal["linear16", "mulaw", "alaw", "mp3", "opus", "flac", "aac"] = "mp3"
    container: Literal["none", "wav", "ogg"] | None = None
    sample_rate: int = Field(24_000, description="8000, 16000, 22050, 24000, 32000, 44100 or 48000.")
    bit_rate: int | None = Field(None, ge=8000, le=320_000)
    speed: float = Field(1.0, ge=0.25, le=4.0)
    seed: int | None = Field(None, ge=0, lt=2**63, description="The same seed gives the same speech.")

    def get_format(self) -> str:
        """The name of the audio format. Raises a [`ServiceError`] for what there is not."""
        container = self.container or DEFAULT_CONTAINERS.get(self.encoding, "none")
        audio_format = FORMATS.get((self.encoding, container))
        if audio_format is None:
            raise ServiceError(400, f"`container`: {self.encoding} in {container} is not supported.", "container")
        rates = (
            (8000, 16000, 24000, 48000) if audio_format == "opus" else (8000, 16000, 22050, 24000, 32000, 44100, 48000)
        )
        if self.sample_rate not in rates:
            raise ServiceError(
                400,
                f"`sample_rate` must be one of {', '.join(map(str, rates))}, got {self.sample_rate}.",
                "sample_rate",
            )
        return audio_format

    def make_encoder(self, synthesizer: Synthesizer) -> AudioEncoder:
        """Makes an encoder for it."""
        return AudioEncoder(
            self.get_format(),
            synthesizer.sampling_rate,
            self.sample_rate,
            self.speed,
            self.bit_rate,
            get_metadata(synthesizer.name),
        )


class SpeakRequest(BaseModel):
    """Text to speak."""

    text: str = Field(min_length=1)


async def get_voice(name: str, service: SpeechService, owner: str) -> Voice:
    """Finds the voice that Deepgram's parameter `model` means."""
    if name.startswith("aura-"):
        return service.voices.default
    return await asyncio.to_thread(service.voices.get, name, owner)


@router.post(
    "/speak",
    response_class=Response,
    responses={
        **ERROR_RESPONSES,
        200: {
            "description": "The speech, while it is made.",
            "content": {audio_format.media_type: {} for audio_format in AUDIO_FORMATS.values()},
        },
    },
)
async def speak(
    options: Annotated[SpeakOptions, Query()], body: SpeakRequest, owner: Owner, service: Service, details: Details
) -> Response:
    """Speaks a text in Deepgram's form, and sends the speech while it is made."""
    service.check_length(len(body.text))
    if not body.text.strip():
        raise ServiceError(400, "`text` must not be empty.", "text")
    audio_format = options.get_format()
    synthesizer = service.get_synthesizer()
    voice = await get_voice(options.model, service, owner)
    details.update(model=synthesizer.name, voice=voice.id, characters=len(body.text), response_format=audio_format)
    content = service.speak_encoded(
        synthesizer, body.text, voice, SpeakingStyle(options.seed), options.make_encoder, details
    )
    headers = {"dg-model-name": voice.id, "dg-char-count": str(len(body.text)), "cache-control": "no-store"}
    media_type = AUDIO_FORMATS[audio_format].media_type
    return SpeechResponse(content, service.settings.client_timeout, media_type, headers)


@router.websocket("/speak")
async def speak_written_text(websocket: WebSocket, service: Service) -> None:
    """Speaks text while it is being written, in Deepgram's form."""
    connection = Connection(websocket, service)
    try:
        owner = connection.authenticate()
        try:
            options = SpeakOptions.model_validate(
                {"encoding": "linear16", "container": "none", **websocket.query_params}
            )
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise ServiceError(400, f"`{name}`: {first['msg']}.", name) from error
        if options.get_format() not in ("pcm", "mulaw", "alaw"):
            raise ServiceError(400, "On a WebSocket, `encoding` must be linear16, mulaw or alaw.", "encoding")
        synthesizer = service.get_synthesizer(for_written_text=True)
        voice = await get_voice(options.model, service, owner)
    except ServiceError as error:
        await connection.refuse(error)
        return
    connection.details.update(model=synthesizer.name, voice=voice.id, response_format=options.get_format())
    await DeepgramSession(connection, options, synthesizer, voice).run()


class DeepgramSession:
    """What happens on one WebSocket: utterances, which end where a `Flush` comes, are spoken one after the other."""

    def __init__(self, connection: Connection, options: SpeakOptions, synthesizer: Synthesizer, voice: Voice) -> None:
        self.connection = connection
        self.options = options
        self.synthesizer = synthesizer
        self.voice = voice
        self.sequence = SpeechSequence(self._make_speech, self._speak)
        self.num_replies = 0

    async def run(self) -> None:
        """Runs until the client leaves or closes the WebSocket."""
        request_id = self.connection.details["request_id"]
        await self.connection.accept({"dg-request-id": request_id, "dg-model-name": self.voice.id})
        code = 1000
        try:
            await self.connection.send(
                {
                    "type": "Metadata",
                    "request_id": request_id,
                    "model_name": self.voice.id,
                    "model_version": self.synthesizer.name,
                    "model_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, self.synthesizer.name)),
                    "additional_model_uuids": [],
                }
            )
            while await self._take_message():
                pass
            await self.sequence.drain()
        except WebSocketDisconnect as error:
            code = error.code
        finally:
            await self.sequence.clear()
            await self.connection.close(code)

    async def _take_message(self) -> bool:
        """Does what the next message says. Returns whether there may be more."""
        try:
            message = await self.connection.receive(lambda: self.sequence.is_idle)
            kind = message.get("type")
            if kind == "Speak":
                self.sequence.write(get_text(message))
            elif kind == "Flush":
                self.sequence.finish()
            elif kind == "Clear":
                await self.sequence.clear()
                await self._reply("Cleared")
            elif kind == "Close":
                if self.sequence.is_being_written:
                    self.sequence.finish()
                return False
            else:
                raise ServiceError(400, "`type` must be Speak, Flush, Clear or Close.", "type", "invalid_message")
        except ServiceError as error:
            await self._tell(error)
        return True

    async def _reply(self, kind: str) -> None:
        await self.connection.send({"type": kind, "sequence_id": self.num_replies})
        self.num_replies += 1

    async def _tell(self, error: ServiceError) -> None:
        """Tells of an error, which Deepgram's clients take for the end of the WebSocket."""
        message = {"type": "Error", "description": error.message, "err_msg": error.message, "code": error.code}
        await self.connection.fail(message, error)

    def _make_speech(self) -> WrittenSpeech:
        style = SpeakingStyle(self.options.seed)
        return WrittenSpeech(self.connection.service, self.synthesizer, self.voice, style)

    async def _speak(self, speech: WrittenSpeech) -> None:
        encoder = self.options.make_encoder(self.synthesizer)
        try:
            async with contextlib.aclosing(speech.speak(self.connection.details)) as waveforms:
                async for waveform in waveforms:
                    if data := encoder.encode(waveform):
                        await self.connection.send(data)
            if data := encoder.finish():
                await self.connection.send(data)
            await self._reply("Flushed")
        except ServiceError as error:
            await self._tell(error)
        except WebSocketDisconnect:
            # `receive` tells of it, too.
            return


__all__ = ["router"]
