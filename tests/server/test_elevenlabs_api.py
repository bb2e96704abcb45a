"""ElevenLabs' routes: text as it is written, in one context or in several."""

import base64
import json

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice


TEXT = "The dog barked all night."
LONG = "The dog barked all night, and nobody slept. " * 20


def open_socket(service, path="stream-input", voice="bf_emma", query="output_format=pcm_24000&seed=3", **kwargs):
    return connect(f"ws://127.0.0.1:{service.port}/v1/text-to-speech/{voice}/{path}?{query}", **kwargs)


def receive_all(socket) -> list[dict]:
    messages = []
    try:
        while True:
            messages.append(json.loads(socket.recv(60)))
    except ConnectionClosed:
        return messages


def get_audio(messages) -> bytes:
    return b"".join(base64.b64decode(message["audio"]) for message in messages if message.get("audio"))


@pytest.fixture(scope="module")
def expected(service) -> np.ndarray:
    processor = SledProcessor.from_pretrained(builtin_voice(interleaved=True))
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice(interleaved=True))
    # What is written ends with a space, as ElevenLabs asks for.
    generator = torch.Generator().manual_seed(3)
    return torch.cat(
        list(model.stream(iter([TEXT + " "]), processor, generator=generator, voice_preset="bf_emma"))
    ).numpy()


def test_one_text(service, expected):
    with open_socket(service) as socket:
        socket.send(json.dumps({"text": " ", "voice_settings": {"stability": 0.5}, "xi_api_key": "unused"}))
        for word in TEXT.split():
            socket.send(json.dumps({"text": f"{word} ", "try_trigger_generation": True}))
        socket.send(json.dumps({"text": ""}))
        messages = receive_all(socket)
        assert socket.close_code == 1000
    assert [message["isFinal"] for message in messages] == [None] * (len(messages) - 1) + [True]
    assert len(messages) > 3
    samples = np.frombuffer(get_audio(messages), "<i2") / 32767
    np.testing.assert_allclose(samples, expected.clip(-1, 1), atol=2e-4)


def test_a_flush_speaks_what_is_there(service):
    with open_socket(service) as socket:
        socket.send(json.dumps({"text": "No. ", "flush": True}))
        first = json.loads(socket.recv(60))
        assert base64.b64decode(first["audio"])
        socket.send(json.dumps({"text": "No. ", "flush": True}))
        socket.send(json.dumps({"text": ""}))
        audio = get_audio([first, *receive_all(socket)])
    half = len(audio) // 2
    assert audio[:half] == audio[half:] != b""


@pytest.mark.parametrize(
    ("output_format", "start"),
    [("mp3_44100_128", b"ID3"), ("mp3_22050_32", b"ID3"), ("opus_48000_64", b"OggS"), ("ulaw_8000", b""), ("pcm_16000", b"")],
)  # fmt: skip
def test_formats(service, output_format, start):
    with open_socket(service, query=f"output_format={output_format}&model_id=eleven_flash_v2_5") as socket:
        socket.send(json.dumps({"text": "No. "}))
        socket.send(json.dumps({"text": ""}))
        audio = get_audio(receive_all(socket))
    assert audio.startswith(start) and len(audio) > 1_000


def test_several_texts_at_a_time(service, expected):
    with open_socket(service, "multi-stream-input") as socket:
        for context in ("a", "b"):
            socket.send(json.dumps({"text": " ", "context_id": context}))
        for word in TEXT.split():
            for context in ("a", "b"):
                socket.send(json.dumps({"text": f"{word} ", "context_id": context}))
        socket.send(json.dumps({"text": "", "context_id": "a"}))
        socket.send(json.dumps({"context_id": "a", "close_context": True}))
        messages = []
        while not messages or messages[-1]["isFinal"] is not True:
            messages.append(json.loads(socket.recv(60)))
        assert messages[-1]["contextId"] == "a"
        # A name may be used again.
        socket.send(json.dumps({"text": "No. ", "context_id": "a"}))
        socket.send(json.dumps({"close_socket": True}))
        rest = receive_all(socket)
        assert socket.close_code == 1000
    assert sorted(message["contextId"] for message in rest if message["isFinal"]) == ["a", "b"]
    for context in ("a", "b"):
        of_context = [message for message in messages + rest if message["contextId"] == context]
        samples = np.frombuffer(get_audio(of_context), "<i2") / 32767
        np.testing.assert_allclose(samples[: len(expected)], expected.clip(-1, 1), atol=2e-4)


def test_who_leaves_frees_the_place(service):
    model = service.service.synthesizers[1]
    with open_socket(service, "multi-stream-input") as socket:
        for context in ("a", "b"):
            socket.send(json.dumps({"text": LONG, "context_id": context}))
        service.wait_until(lambda: model.engine.num_active_streams == 2)
    service.wait_until(lambda: service.service.num_speeches == 0, 2)
    service.wait_until(lambda: model.engine.num_active_streams == 0, 2)


@pytest.mark.parametrize(
    ("path", "voice", "query", "named"),
    [
        ("stream-input", "nobody", "", "nobody"),
        ("multi-stream-input", "nobody", "", "nobody"),
        ("stream-input", "bf_emma", "output_format=midi_1", "midi"),
        ("stream-input", "bf_emma", "output_format=mp3", "mp3"),
        ("stream-input", "bf_emma", "output_format=mp3_44100_999", "mp3"),
        ("stream-input", "bf_emma", "seed=-1", "seed"),
    ],
)
def test_bad_queries_are_refused_in_the_handshake(service, path, voice, query, named):
    with pytest.raises(InvalidStatus) as caught:
        open_socket(service, path, voice, query)
    assert caught.value.response.status_code == 400
    assert named in json.loads(caught.value.response.body)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("stream-input", b"\x00"),
        ("stream-input", "rubbish"),
        ("stream-input", "{}"),
        ("stream-input", '{"text": 5}'),
        ("stream-input", json.dumps({"text": "a" * 5_000})),
        ("stream-input", json.dumps({"text": "No.", "voice_settings": {"speed": 9}})),
        ("multi-stream-input", json.dumps({"text": "No.", "context_id": 5})),
        ("multi-stream-input", json.dumps({"text": 5, "context_id": "a"})),
    ],
)
def test_rubbish_gets_an_error(service, path, message):
    with open_socket(service, path) as socket:
        socket.send(message)
        error = receive_all(socket)[-1]
        assert error["message"] and error["code"] == 1008 and socket.close_code == 1008
    service.wait_until(lambda: service.service.num_speeches == 0)


def test_contexts_are_limited(service):
    with open_socket(service, "multi-stream-input") as socket:
        for number in range(11):
            socket.send(json.dumps({"text": " ", "context_id": str(number)}))
        assert receive_all(socket)[-1]["error"] == "too_many_contexts"


def test_keys(service_with_keys):
    with open_socket(service_with_keys, additional_headers={"xi-api-key": "second-key"}) as socket:
        socket.send(json.dumps({"text": ""}))
        receive_all(socket)
        assert socket.close_code == 1000
    for headers in ({}, {"xi-api-key": "third"}):
        with pytest.raises(InvalidStatus) as caught:
            open_socket(service_with_keys, additional_headers=headers)
        assert caught.value.response.status_code == 401


def test_whole_text_by_post(service):
    with service.client() as client:
        for path in ("/v1/text-to-speech/bf_emma", "/v1/text-to-speech/bf_emma/stream"):
            response = client.post(path, json={"text": "No.", "voice_settings": {"stability": 1}, "seed": 1})
            assert response.status_code == 200 and response.content.startswith(b"ID3")
        assert client.post("/v1/text-to-speech/nobody", json={"text": "No."}).status_code == 400
        assert client.post("/v1/text-to-speech/bf_emma?output_format=x", json={"text": "No."}).status_code == 400
