"""Deepgram's routes: text as it is written."""

import json
import time

import numpy as np
import pytest
import torch
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice


TEXT = "The dog barked all night."
LONG = "The dog barked all night, and nobody slept. " * 20


def open_socket(service, query="model=bf_emma&encoding=linear16&sample_rate=24000&seed=3", **kwargs):
    return connect(f"ws://127.0.0.1:{service.port}/v1/speak?{query}", **kwargs)


def send(socket, kind, **kwargs):
    socket.send(json.dumps({"type": kind, **kwargs}))


def receive_until(socket, kind) -> tuple[bytes, dict]:
    """The audio until a message of that type, and the message."""
    audio = b""
    while True:
        message = socket.recv(60)
        if isinstance(message, bytes):
            audio += message
            continue
        content = json.loads(message)
        if content["type"] == kind:
            return audio, content
        assert content["type"] in ("Metadata", "Flushed", "Cleared"), content


@pytest.fixture(scope="module")
def expected(service) -> np.ndarray:
    """What the interleaved model alone says in that voice with that seed."""
    processor = SledProcessor.from_pretrained(builtin_voice(interleaved=True))
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice(interleaved=True))
    generator = torch.Generator().manual_seed(3)
    return torch.cat(list(model.stream(iter([TEXT]), processor, generator=generator, voice_preset="bf_emma"))).numpy()


def get_samples(audio: bytes) -> np.ndarray:
    return np.frombuffer(audio, "<i2") / 32767


def test_text_that_is_written_is_spoken_as_the_model_alone_speaks_it(service, expected):
    with open_socket(service) as socket:
        metadata = receive_until(socket, "Metadata")[1]
        assert metadata["model_name"] == "bf_emma" and metadata["request_id"].startswith("req_")
        for word in ("The do", "g barked", " all night."):
            send(socket, "Speak", text=word)
        send(socket, "Flush")
        audio, flushed = receive_until(socket, "Flushed")
        assert flushed["sequence_id"] == 0
        np.testing.assert_allclose(get_samples(audio), expected.clip(-1, 1), atol=2e-4)
        send(socket, "Speak", text=TEXT)
        send(socket, "Close")
        again, _ = receive_until(socket, "Flushed")
        assert again == audio
        with pytest.raises(Exception, match="1000"):
            socket.recv(10)


def test_it_speaks_before_the_text_ends(service):
    with open_socket(service) as socket:
        send(socket, "Speak", text="The dog barked all night, and nobody slept.")
        audio = b""
        while len(audio) < 20_000:
            message = socket.recv(60)
            audio += message if isinstance(message, bytes) else b""
        send(socket, "Speak", text=" Then it ran away.")
        send(socket, "Flush")
        rest, _ = receive_until(socket, "Flushed")
        assert len(rest) > 20_000


def test_utterances_come_in_order(service):
    with open_socket(service) as socket:
        for text in ("No.", TEXT, "No."):
            send(socket, "Speak", text=text)
            send(socket, "Flush")
        parts = [receive_until(socket, "Flushed") for _ in range(3)]
    assert [flushed["sequence_id"] for _, flushed in parts] == [0, 1, 2]
    assert parts[0][0] == parts[2][0] != parts[1][0] and len(parts[1][0]) > len(parts[0][0])


def test_clear_stops_at_once(service):
    model = service.service.synthesizers[1]
    with open_socket(service) as socket:
        send(socket, "Speak", text=LONG)
        send(socket, "Flush")
        send(socket, "Speak", text="Never said.")
        audio = b""
        while len(audio) < 20_000:
            message = socket.recv(60)
            audio += message if isinstance(message, bytes) else b""
        send(socket, "Clear")
        receive_until(socket, "Cleared")
        # All that is left by then is the frame that is being made.
        service.wait_until(lambda: model.engine.num_active_streams == 0, 1)
        send(socket, "Speak", text="No.")
        send(socket, "Flush")
        after, _ = receive_until(socket, "Flushed")
    with open_socket(service) as socket:
        send(socket, "Speak", text="No.")
        send(socket, "Flush")
        assert receive_until(socket, "Flushed")[0] == after


def test_who_leaves_frees_the_place(service):
    model = service.service.synthesizers[1]
    with open_socket(service) as socket:
        send(socket, "Speak", text=LONG)
        service.wait_until(lambda: model.engine.num_active_streams == 1)
    service.wait_until(lambda: model.engine.num_active_streams == 0, 2)
    assert model.num_speeches == 0


def test_nothing_to_say(service):
    with open_socket(service) as socket:
        send(socket, "Flush")
        assert receive_until(socket, "Flushed")[0] == b""
        send(socket, "Speak", text="  ")
        send(socket, "Flush")
        assert receive_until(socket, "Flushed")[0] == b""
        send(socket, "Clear")
        receive_until(socket, "Cleared")
    assert service.service.num_speeches == 0


@pytest.mark.parametrize(("encoding", "rate", "size"), [("linear16", 8000, 2), ("mulaw", 8000, 1), ("alaw", 16000, 1)])
def test_encodings(service, expected, encoding, rate, size):
    with open_socket(service, f"model=bf_emma&encoding={encoding}&sample_rate={rate}&seed=3") as socket:
        send(socket, "Speak", text=TEXT)
        send(socket, "Flush")
        audio, _ = receive_until(socket, "Flushed")
    assert len(audio) / size == pytest.approx(len(expected) * rate / 24_000, abs=2)


@pytest.mark.parametrize(
    ("query", "status", "named"),
    [
        ("encoding=mp3", 400, "encoding"),
        ("encoding=midi", 400, "encoding"),
        ("sample_rate=44000", 400, "sample_rate"),
        ("sample_rate=x", 400, "sample_rate"),
        ("speed=9", 400, "speed"),
        ("model=nobody", 400, "nobody"),
    ],
)
def test_bad_queries_are_refused_in_the_handshake(service, query, status, named):
    with pytest.raises(InvalidStatus) as caught:
        open_socket(service, query)
    assert caught.value.response.status_code == status
    assert named in json.loads(caught.value.response.body)["error"]["message"]


@pytest.mark.parametrize(
    "message",
    [b"\x00\x01", "rubbish", "[]", "{}", '{"type": "Sing"}', '{"type": "Speak"}', '{"type": "Speak", "text": 5}',
     '{"type": "Speak", "text": "\\ud800"}', json.dumps({"type": "Speak", "text": "a" * 5000})],
)  # fmt: skip
def test_rubbish_gets_an_error(service, message):
    with open_socket(service) as socket:
        socket.send(message)
        _, error = receive_until(socket, "Error")
        assert error["description"]
        with pytest.raises(Exception, match="1011"):
            socket.recv(10)
    assert service.service.num_speeches == 0


def test_keys_and_origins(service_with_keys, service):
    headers = {"authorization": "Token first-key"}
    with open_socket(service_with_keys, additional_headers=headers) as socket:
        receive_until(socket, "Metadata")
    with open_socket(service_with_keys, subprotocols=["token", "second-key"]) as socket:
        assert socket.subprotocol == "token"
        receive_until(socket, "Metadata")
    for wrong in ({}, {"authorization": "Token third"}):
        with pytest.raises(InvalidStatus) as caught:
            open_socket(service_with_keys, additional_headers=wrong)
        assert caught.value.response.status_code == 401
    with pytest.raises(InvalidStatus) as caught:
        open_socket(service, origin="https://example.org")
    assert caught.value.response.status_code == 403
    with open_socket(service, origin=service.url) as socket:
        receive_until(socket, "Metadata")


def test_a_full_queue_is_told(make_service):
    with make_service(max_streams=1, max_queue=0) as service, open_socket(service) as first:
        send(first, "Speak", text=LONG)
        service.wait_until(lambda: service.service.num_speeches == 1)
        with open_socket(service) as second:
            send(second, "Speak", text="No.")
            _, error = receive_until(second, "Error")
            assert error["code"] == "rate_limit_exceeded"


def test_silence_is_not_borne_for_ever(make_service):
    with make_service(idle_timeout=0.5) as service, open_socket(service) as socket:
        start = time.monotonic()
        receive_until(socket, "Metadata")
        send(socket, "Speak", text="The dog barked all night, and nobody slept.")
        send(socket, "Flush")
        receive_until(socket, "Flushed")
        with pytest.raises(Exception, match="1000"):
            socket.recv(20)
        assert time.monotonic() - start > 0.7


def test_whole_text_by_post(service, expected):
    with service.client() as client:
        query = {"model": "bf_emma", "encoding": "linear16", "container": "none", "sample_rate": 24000, "seed": 3}
        response = client.post("/v1/speak", params=query, json={"text": TEXT})
        assert response.status_code == 200 and response.headers["dg-model-name"] == "bf_emma"
        assert len(response.content) > 20_000
        for encoding, start in (("mp3", b"ID3"), ("opus", b"OggS"), ("flac", b"fLaC"), ("linear16", b"RIFF")):
            response = client.post("/v1/speak", params={"encoding": encoding}, json={"text": "No."})
            assert response.content.startswith(start)
        for params, body in (({}, {}), ({}, {"text": " "}), ({"sample_rate": 5}, {"text": "No."})):
            assert client.post("/v1/speak", params=params, json=body).status_code == 400
