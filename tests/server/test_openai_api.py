"""OpenAI's routes, by OpenAI's own client and by curl."""

import asyncio
import base64
import json
import shutil
import subprocess
from io import BytesIO

import av
import numpy as np
import openai
import pytest
import soundfile
import torch

from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice


TEXT = "The dog barked."
FORMATS = ["mp3", "opus", "aac", "flac", "wav", "pcm"]
SPEECH = {"model": "tts-1", "voice": "alloy", "input": TEXT, "extra_body": {"seed": 3}}


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(service) -> np.ndarray:
    """What `generate` alone says in that voice with that seed."""
    processor = SledProcessor.from_pretrained(builtin_voice())
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice())
    inputs = processor(TEXT, voice_preset="af_heart")
    return model.generate(**inputs, generator=torch.Generator().manual_seed(3))[0].numpy()


def decode(data: bytes, audio_format: str) -> np.ndarray:
    if audio_format == "pcm":
        return np.frombuffer(data, "<i2") / 32767
    with av.open(BytesIO(data)) as file:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=24_000)
        frames = [piece for frame in file.decode(audio=0) for piece in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])


def assert_said(data: bytes, audio_format: str, expected: np.ndarray) -> None:
    audio = decode(data, audio_format)
    delay = {"mp3": 1105, "aac": 1024}.get(audio_format, 0)
    if delay:
        assert len(audio) >= len(expected) + delay
        audio = audio[delay : delay + len(expected)]
    assert len(audio) == len(expected)
    if audio_format in ("flac", "wav", "pcm"):
        np.testing.assert_allclose(audio, expected.clip(-1, 1), atol=2e-4)
    else:
        assert np.corrcoef(audio, expected)[0, 1] > 0.9


@pytest.mark.parametrize("audio_format", FORMATS)
def test_every_format_says_what_generate_says(client, audio_format, expected):
    with client.audio.speech.with_streaming_response.create(**SPEECH, response_format=audio_format) as response:
        pieces = list(response.iter_bytes())
    assert len(pieces) > 2, "It must stream."
    assert_said(b"".join(pieces), audio_format, expected)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_every_format_as_events(client, audio_format, expected):
    with client.audio.speech.with_streaming_response.create(
        **SPEECH, response_format=audio_format, stream_format="sse"
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"speech.audio.delta"} and len(deltas) > 2
    assert_said(b"".join(base64.b64decode(event["audio"]) for event in deltas), audio_format, expected)
    assert done["type"] == "speech.audio.done"
    usage = done["usage"]
    assert usage["output_tokens"] == len(expected) // 800
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"] and usage["input_tokens"] > 2


def test_mp3_is_the_default_and_audio_of_its_type(client):
    response = client.audio.speech.with_raw_response.create(**SPEECH)
    assert response.headers["content-type"] == "audio/mpeg"
    assert response.headers["x-request-id"].startswith("req_")
    assert decode(response.content, "mp3").any()


def test_asynchronous_client(service, expected):
    async def speak() -> list[bytes]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:

            async def speak_once() -> bytes:
                async with client.audio.speech.with_streaming_response.create(
                    **SPEECH, response_format="pcm"
                ) as response:
                    return b"".join([piece async for piece in response.iter_bytes()])

            return await asyncio.gather(speak_once(), speak_once(), speak_once())

    for data in asyncio.run(speak()):
        assert_said(data, "pcm", expected)


def test_writes_a_file_as_in_the_guide(client, tmp_path, expected):
    with client.audio.speech.with_streaming_response.create(**SPEECH, response_format="wav") as response:
        response.stream_to_file(tmp_path / "speech.wav")
    audio, rate = soundfile.read(tmp_path / "speech.wav")
    assert rate == 24_000 and len(audio) == len(expected)


def test_speed_changes_the_duration(client, expected):
    for speed in (0.5, 2.0):
        data = client.audio.speech.create(**SPEECH, response_format="pcm", speed=speed).content
        assert len(data) // 2 == pytest.approx(len(expected) / speed, rel=0.06)


@pytest.mark.parametrize(
    "voice",
    ["alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer", "verse", "marin", "cedar"],
)
def test_every_voice_of_openai_is_one_of_the_box(service, voice):
    assert service.service.voices.get(voice, "").id in ("af_heart", "am_michael", "bf_emma")


@pytest.mark.parametrize("model", ["tts-1", "tts-1-hd", "gpt-4o-mini-tts", "sled-tiny-en", "sled-tiny-en-streaming"])
def test_models_and_voices_by_id(client, model):
    speech = client.audio.speech.create(
        model=model, voice={"id": "bf_emma"}, input="No.", response_format="pcm", extra_body={"seed": 1}
    )
    assert len(speech.content) > 2_000


def test_what_is_ignored_is_named(client):
    response = client.audio.speech.with_raw_response.create(
        model="tts-1",
        voice="alloy",
        input="No.",
        instructions="Whisper.",
        extra_body={"seed": 1, "lang_code": "a", "we\nird ü": 1},
    )
    assert response.headers["x-ignored-parameters"] == "instructions, lang_code, we?ird??"


@pytest.mark.parametrize(
    ("arguments", "error", "param", "code"),
    [
        ({"input": ""}, openai.BadRequestError, "input", "string_too_short"),
        ({"input": " \n"}, openai.BadRequestError, "input", None),
        ({"input": "a" * 4097}, openai.BadRequestError, "input", "string_above_max_length"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found"),
        ({"voice": "nobody"}, openai.BadRequestError, "voice", "voice_not_found"),
        ({"voice": {"id": "voice_123"}}, openai.BadRequestError, "voice", "voice_not_found"),
        ({"voice": 5}, openai.BadRequestError, "voice", None),
        ({"speed": 5}, openai.BadRequestError, "speed", "less_than_equal"),
        ({"speed": float("nan")}, openai.BadRequestError, None, None),
        ({"response_format": "midi"}, openai.BadRequestError, "response_format", "literal_error"),
        ({"stream_format": "tape"}, openai.BadRequestError, "stream_format", "literal_error"),
        ({"extra_body": {"seed": -1}}, openai.BadRequestError, "seed", "greater_than_equal"),
        ({"extra_body": {"input": 5}}, openai.BadRequestError, "input", "string_type"),
        ({"extra_body": {"guidance_scale": "much"}}, openai.BadRequestError, "guidance_scale", "float_parsing"),
        ({"input": "\ud800"}, openai.BadRequestError, "input", None),
    ],
)
def test_errors_have_the_form_of_openai(client, arguments, error, param, code):
    if arguments.get("speed") != arguments.get("speed") or arguments.get("input") == "\ud800":
        # What no client sends by itself.
        body = json.dumps({"model": "tts-1", "voice": "alloy", "input": "No.", **arguments})
        with pytest.raises(error) as caught:
            client.post(
                "/audio/speech",
                cast_to=object,
                content=body.encode(),
                options={"headers": {"content-type": "application/json"}},
            )
    else:
        with pytest.raises(error) as caught:
            client.audio.speech.create(**{**SPEECH, "extra_body": None, **arguments})
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"
    if param is not None:
        assert body["param"] == param and param in body["message"].lower()
    if code is not None:
        assert body["code"] == code


def test_lists(client, service):
    models = [model.id for model in client.models.list()]
    assert models[:2] == ["sled-tiny-en", "sled-tiny-en-streaming"] and "tts-1" in models
    assert client.models.retrieve("tts-1").id == "tts-1"
    with service.client() as http:
        assert {"id": "tts-1", "name": "tts-1"} in http.get("/v1/audio/models").json()["models"]
        voices = http.get("/v1/audio/voices").json()["voices"]
    assert {"id": "bf_emma", "name": "bf_emma"} in voices


def test_keys(service_with_keys):
    service = service_with_keys
    for key in ("first-key", "second-key"):
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0)
        assert client.audio.speech.create(**{**SPEECH, "input": "No."}).content
    for key in ("first-ke", "first-key2", "third", "ü"):
        with service.client() as http, pytest.raises(openai.AuthenticationError):
            response = http.post("/v1/audio/speech", headers={"authorization": f"Bearer {key}".encode()}, json={})
            raise openai.AuthenticationError("wrong", response=response, body=response.json())
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    with service.client() as http:
        for path in ("/v1/models", "/v1/audio/voices", "/metrics", "/v1/audio/voice_consents"):
            assert http.get(path).status_code == 401
        for path in ("/health", "/ready"):
            assert http.get(path).status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_as_in_the_guide(service, tmp_path, expected):
    command = [
        "curl", "-sS", "--fail", f"{service.url}/v1/audio/speech",
        "-H", "Authorization: Bearer unused",
        "-H", "Content-Type: application/json",
        "-d", json.dumps({"model": "gpt-4o-mini-tts", "input": TEXT, "voice": "alloy", "response_format": "flac", "seed": 3}),
        "--output", str(tmp_path / "speech.flac"),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=60)
    assert_said((tmp_path / "speech.flac").read_bytes(), "flac", expected)
