"""OpenAI's speech routes."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, File, Form, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from ..audio_sled import measure_duration, read_audio
from .audio_formats import AUDIO_FORMATS, AudioEncoder
from .dependencies import CloningOwner, Details, Owner, Service
from .engines import SpeakingStyle
from .errors import ERROR_RESPONSES, ServiceError
from .provenance import get_metadata
from .responses import SpeechResponse
from .service import OPENAI_MODELS, SpeechService
from .synthesizers import Synthesizer
from .voice_library import MAX_SAMPLE_SECONDS, MIN_SAMPLE_SECONDS, Consent


MAX_RECORDING_BYTES = 10 * 2**20
MAX_RECORDING_SECONDS = 120.0


class VoiceReference(BaseModel):
    """A voice by its id."""

    id: str = Field(max_length=256)


class SpeechRequest(BaseModel):
    """Text to speak, and how."""

    model_config = ConfigDict(extra="allow")

    input: str = Field(min_length=1, description="Text to speak.")
    model: str = Field(max_length=256, description="A model of `/v1/models`.")
    voice: Annotated[str, Field(max_length=256)] | VoiceReference = Field(
        description="A voice of `/v1/audio/voices`, or one of OpenAI's names."
    )
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4.0, description="How much faster to speak, at the same pitch.")
    stream_format: Literal["audio", "sse"] = "audio"
    instructions: str | None = Field(None, description="Ignored, and named in the header `x-ignored-parameters`.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="The same seed gives the same speech.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="How closely to follow the text; 1 is off.")
    temperature: float | None = Field(None, ge=0, le=100, description="How much the speech varies.")


router = APIRouter(prefix="/v1", responses=ERROR_RESPONSES)


@router.post(
    "/audio/speech",
    response_class=Response,
    responses={
        200: {
            "description": "The speech, while it is made.",
            "content": {
                **{audio_format.media_type: {} for name, audio_format in AUDIO_FORMATS.items()},
                "text/event-stream": {},
            },
        }
    },
)
async def create_speech(body: SpeechRequest, owner: Owner, service: Service, details: Details) -> Response:
    """Speaks a text, and sends the speech while it is made."""
    service.check_length(len(body.input))
    if not body.input.strip():
        raise ServiceError(400, "`input` must not be empty.", "input")
    synthesizer = service.get_synthesizer(body.model)
    name = body.voice if isinstance(body.voice, str) else body.voice.id
    voice = await asyncio.to_thread(service.voices.get, name, owner)
    details.update(
        model=synthesizer.name, voice=voice.id, characters=len(body.input), response_format=body.response_format
    )
    ignored = [*(["instructions"] if body.instructions is not None else []), *(body.model_extra or {})]
    headers = {"x-ignored-parameters": ", ".join(map(_to_header, ignored))} if ignored else {}
    headers["cache-control"] = "no-store"

    def make_encoder(synthesizer: Synthesizer) -> AudioEncoder:
        metadata = get_metadata(synthesizer.name)
        return AudioEncoder(body.response_format, synthesizer.sampling_rate, speed=body.speed, metadata=metadata)

    style = SpeakingStyle(body.seed, body.guidance_scale, body.temperature)
    content = service.speak_encoded(synthesizer, body.input, voice, style, make_encoder, details)
    media_type = AUDIO_FORMATS[body.response_format].media_type
    if body.stream_format == "sse":
        content = _to_events(content, body, synthesizer, details)
        media_type = "text/event-stream"
    return SpeechResponse(content, service.settings.client_timeout, media_type, headers)


async def _to_events(
    content: AsyncGenerator[bytes, None], body: SpeechRequest, synthesizer: Synthesizer, details: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """The same as server-sent events."""
    has_started = False
    try:
        async for data in content:
            has_started = True
            if data:
                yield _to_event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
    except ServiceError as error:
        if not has_started:
            raise
        details["error"] = error.code or error.message
        yield _to_event({"type": "error", **error.body})
        return
    finally:
        await content.aclose()
    input_tokens = synthesizer.count_tokens(body.input)
    output_tokens = synthesizer.count_frames(details["num_samples"])
    usage = {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }
    yield _to_event({"type": "speech.audio.done", "usage": usage})


def _to_event(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


def _to_header(name: str) -> str:
    """The name of a parameter, which may be anything, as part of a header."""
    return "".join(letter if (letter.isalnum() and letter.isascii()) or letter in "_-." else "?" for letter in name)[
        :64
    ]


@router.get("/models")
async def list_models(owner: Owner, service: Service) -> dict[str, Any]:
    """Lists the names of models that a request may ask for."""
    return {"object": "list", "data": [_describe_model(name) for name in service.model_names]}


@router.get("/models/{model:path}")
async def get_model(model: str, owner: Owner, service: Service) -> dict[str, Any]:
    """Describes a model."""
    if model not in service.model_names:
        raise ServiceError(404, f"Model {model!r} does not exist.", "model", "model_not_found")
    return _describe_model(model)


def _describe_model(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "openai-alias" if name in OPENAI_MODELS else "sled",
    }


@router.get("/audio/models")
async def list_audio_models(owner: Owner, service: Service) -> dict[str, Any]:
    """Lists the models, for clients that ask here."""
    return {"models": [{"id": name, "name": name} for name in service.model_names]}


@router.get("/audio/voices")
async def list_voices(owner: Owner, service: Service) -> dict[str, Any]:
    """Lists the voices that the key may use."""
    voices = await asyncio.to_thread(service.voices.get_voices, owner)
    return {"voices": [{"id": voice.id, "name": voice.name} for voice in voices]}


@router.post("/audio/voice_consents")
async def create_voice_consent(
    owner: CloningOwner,
    service: Service,
    name: Annotated[str, Form(min_length=1, max_length=256)],
    language: Annotated[str, Form(min_length=2, max_length=35)],
    recording: Annotated[UploadFile, File(description="The speaker saying that they agree, at most 10 MiB.")],
) -> dict[str, Any]:
    """Keeps a recording in which a speaker agrees to have their voice cloned."""
    waveform = await _read_recording(recording, "recording", service)
    rate = service.get_synthesizer().sampling_rate
    consent = await asyncio.to_thread(service.voices.add_consent, name, language, waveform, rate, owner)
    return _describe_consent(consent)


@router.get("/audio/voice_consents")
async def list_voice_consents(owner: CloningOwner, service: Service) -> dict[str, Any]:
    """Lists the consents that were given under the key."""
    consents = await asyncio.to_thread(service.voices.get_consents, owner)
    return {
        "object": "list",
        "data": [_describe_consent(consent) for consent in consents],
        "first_id": consents[0].id if consents else None,
        "last_id": consents[-1].id if consents else None,
        "has_more": False,
    }


@router.get("/audio/voice_consents/{consent_id}")
async def get_voice_consent(consent_id: str, owner: CloningOwner, service: Service) -> dict[str, Any]:
    """Describes a consent."""
    return _describe_consent(await asyncio.to_thread(service.voices.get_consent, consent_id, owner))


@router.delete("/audio/voice_consents/{consent_id}")
async def delete_voice_consent(consent_id: str, owner: CloningOwner, service: Service) -> dict[str, Any]:
    """Withdraws a consent, and deletes the voices that were made on it."""
    await asyncio.to_thread(service.voices.delete_consent, consent_id, owner)
    return {"id": consent_id, "object": "audio.voice_consent", "deleted": True}


@router.post("/audio/voices")
async def create_voice(
    owner: CloningOwner,
    service: Service,
    name: Annotated[str, Form(min_length=1, max_length=256)],
    consent: Annotated[str, Form(max_length=256)],
    audio_sample: Annotated[UploadFile, File(description="The voice, at most 10 MiB.")],
    transcript: Annotated[
        str | None,
        Form(max_length=2000, description="What the sample says. Needed where the service has no recognizer."),
    ] = None,
) -> dict[str, Any]:
    """Makes a voice from a sample of it, on a consent that was given before."""
    given = await asyncio.to_thread(service.voices.get_consent, consent, owner)
    waveform = await _read_recording(audio_sample, "audio_sample", service)
    rate = service.get_synthesizer().sampling_rate
    seconds = len(waveform) / rate
    if not MIN_SAMPLE_SECONDS <= seconds <= MAX_SAMPLE_SECONDS:
        raise ServiceError(
            400,
            f"`audio_sample` must last {MIN_SAMPLE_SECONDS:g} to {MAX_SAMPLE_SECONDS:g} s, got {seconds:.2f} s.",
            "audio_sample",
        )
    transcript = (transcript or "").strip() or await service.transcribe(waveform, rate)
    try:
        for synthesizer in service.synthesizers:
            await asyncio.to_thread(synthesizer.check_voice, transcript, waveform)
    except ValueError as error:
        raise ServiceError(400, str(error), "audio_sample") from error
    voice = await asyncio.to_thread(service.voices.add, name, transcript, waveform, rate, given, owner)
    return {
        "id": voice.id,
        "object": "audio.voice",
        "type": "audio_sample",
        "name": voice.name,
        "created_at": voice.created_at,
        "transcript": voice.prompt_text,
    }


@router.delete("/audio/voices/{voice_id}")
async def delete_voice(voice_id: str, owner: CloningOwner, service: Service) -> dict[str, Any]:
    """Deletes a voice."""
    await asyncio.to_thread(service.voices.delete, voice_id, owner)
    return {"id": voice_id, "object": "audio.voice.deleted", "deleted": True}


def _describe_consent(consent: Consent) -> dict[str, Any]:
    return {
        "id": consent.id,
        "object": "audio.voice_consent",
        "name": consent.name,
        "language": consent.language,
        "created_at": consent.created_at,
    }


async def _read_recording(file: UploadFile, name: str, service: SpeechService) -> np.ndarray:
    """The waveform (num_samples,) of an uploaded file in float32, at the sampling rate of the models."""
    data = await file.read(MAX_RECORDING_BYTES + 1)
    if len(data) > MAX_RECORDING_BYTES:
        raise ServiceError(413, f"`{name}` must have at most {MAX_RECORDING_BYTES // 2**20} MiB.", name)
    rate = service.get_synthesizer().sampling_rate
    try:
        seconds = await asyncio.to_thread(measure_duration, data, name=name)
        if seconds > MAX_RECORDING_SECONDS:
            raise ValueError(f"`{name}` must last at most {MAX_RECORDING_SECONDS:g} s, got {seconds:.1f} s.")
        return await asyncio.to_thread(read_audio, data, target_rate=rate, name=name)
    except ValueError as error:
        raise ServiceError(400, str(error), name) from error
