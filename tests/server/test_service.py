"""What the service does under load, when it fails, and when it starts and stops."""

import contextlib
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from transformers_sled.server.logs import JsonFormatter


SPEECH = {"model": "tts-1", "voice": "alloy", "input": "The dog barked.", "response_format": "pcm", "seed": 3}
# It goes on for a while: long text, spoken slowly.
LONG = {**SPEECH, "input": "The dog barked all night, and nobody slept. " * 20}


def read_metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def post_raw(port: int, body: dict, receive_buffer: int | None = None) -> socket.socket:
    """Sends a request and reads nothing."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = (
        "POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def count_streams(service) -> tuple[int, int]:
    """Streams that speak, and that wait."""
    with service.client() as client:
        return int(read_metric(client, "sled_active_streams")), int(read_metric(client, "sled_queued_streams"))


def test_it_tells_when_it_is_ready(make_service):
    with make_service(is_awaited=False) as service, service.client() as client:
        assert client.get("/health").status_code == 200
        early = client.get("/ready")
        refused = client.post("/v1/audio/speech", json=SPEECH)
        if early.status_code == 503:
            assert refused.status_code in (200, 503)
        service.wait_until(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v1/audio/speech", json=SPEECH).status_code == 200


def test_a_full_queue_refuses_and_says_when_to_come_again(make_service):
    with make_service(max_streams=1, max_queue=1) as service:
        first, second = (post_raw(service.port, LONG) for _ in range(2))
        service.wait_until(lambda: count_streams(service) == (1, 1))
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            client.audio.speech.create(model="tts-1", voice="alloy", input="No.")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "rate_limit_exceeded"
        # The other model has a queue of its own.
        assert client.audio.speech.create(model="sled-tiny-en-streaming", voice="alloy", input="No.").content
        # One that waits and leaves makes room, too.
        second.close()
        service.wait_until(lambda: service.service.num_speeches == 1)
        first.close()
        service.wait_until(lambda: count_streams(service) == (0, 0))
        assert client.audio.speech.create(model="tts-1", voice="alloy", input="No.").content


def test_a_client_who_leaves_frees_the_place_at_once(make_service):
    with make_service(max_streams=1) as service, service.client() as client:
        for _ in range(3):
            with client.stream("POST", "/v1/audio/speech", json=LONG) as response:
                next(response.iter_raw())
            start = time.perf_counter()
            service.wait_until(lambda: count_streams(service) == (0, 0))
            # A frame of speech lasts 33 ms, and a step takes less; the rest is what asking takes.
            assert time.perf_counter() - start < 1
        assert read_metric(client, "sled_cancellations_total") == 3
        assert service.service.num_speeches == 0
        assert client.post("/v1/audio/speech", json=SPEECH).status_code == 200


def test_who_does_not_read_is_dropped(make_service):
    with make_service(max_streams=2, client_timeout=0.5) as service, service.client() as client:
        body = {**LONG, "response_format": "wav", "speed": 0.25}
        reader = post_raw(service.port, body, receive_buffer=4096)
        service.wait_until(lambda: count_streams(service)[0] == 1)
        service.wait_until(lambda: count_streams(service)[0] == 0)
        assert read_metric(client, "sled_cancellations_total") == 1
        # What was sent ends without its end.
        reader.settimeout(30)
        received = b""
        while data := reader.recv(65536):
            received += data
        assert not received.endswith(b"0\r\n\r\n")


def test_who_reads_slowly_gets_everything(make_service):
    with make_service(client_timeout=5.0) as service, service.client() as client:
        whole = client.post("/v1/audio/speech", json=SPEECH).content
        with client.stream("POST", "/v1/audio/speech", json=SPEECH) as response:
            received = b""
            for piece in response.iter_raw(16_384):
                received += piece
                time.sleep(0.05)
        assert received == whole


def test_stopping_lets_speech_end(make_service):
    with make_service() as service, service.client() as client:
        whole = client.post("/v1/audio/speech", json={**SPEECH, "input": "The dog barked all night."}).content
        with client.stream(
            "POST", "/v1/audio/speech", json={**SPEECH, "input": "The dog barked all night."}
        ) as response:
            pieces = response.iter_raw()
            received = next(pieces)
            service.server.should_exit = True
            service.wait_until(lambda: service.service.is_draining)
            with service.client() as late:
                assert late.post("/v1/audio/speech", json=SPEECH).status_code == 503
                assert late.get("/ready").status_code == 503
            received += b"".join(pieces)
        assert received == whole
        service.thread.join(20)
        assert not service.thread.is_alive()


def test_nothing_is_left_when_it_has_stopped(make_service):
    threads = set(threading.enumerate())
    with make_service(max_streams=2) as service, service.client() as client:
        assert client.post("/v1/audio/speech", json=SPEECH).status_code == 200
        left = post_raw(service.port, LONG)
        service.wait_until(lambda: count_streams(service)[0] == 1)
        left.close()
        num_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert set(threading.enumerate()) <= threads
    if num_files:
        assert len(os.listdir("/proc/self/fd")) < num_files


def test_a_dead_model_is_told(make_service, monkeypatch):
    with make_service() as service, service.client() as client:
        synthesizer = service.service.synthesizers[0]

        def fail(*args, **kwargs):
            raise MemoryError("no memory left")

        monkeypatch.setattr(synthesizer.engine.model.generative_head, "forward", fail)
        response = client.post("/v1/audio/speech", json=SPEECH)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "synthesis_failed" and "memory" not in response.text
        service.wait_until(lambda: client.get("/health").status_code == 503)
        assert client.get("/ready").status_code == 503
        assert client.post("/v1/audio/speech", json=SPEECH).status_code == 503


def fail_midway(service, monkeypatch):
    """Lets the model fail after its first frames."""
    head = service.service.synthesizers[0].engine.model.generative_head
    forward, numbers = head.forward, itertools.count()

    def fail_later(*args, **kwargs):
        if next(numbers) >= 15:
            raise MemoryError("no memory left")
        return forward(*args, **kwargs)

    monkeypatch.setattr(head, "forward", fail_later)


def test_a_failure_midway_is_no_end(make_service, monkeypatch):
    with make_service() as service, service.client() as client:
        fail_midway(service, monkeypatch)
        with (
            pytest.raises(httpx.RemoteProtocolError),
            client.stream("POST", "/v1/audio/speech", json=LONG) as response,
        ):
            assert response.status_code == 200
            for _ in response.iter_raw():
                pass


def test_a_failure_midway_is_an_event(make_service, monkeypatch):
    with make_service() as service, service.client() as client:
        fail_midway(service, monkeypatch)
        response = client.post("/v1/audio/speech", json={**LONG, "stream_format": "sse"})
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line]
        assert [event["type"] for event in events[:-1]] == ["speech.audio.delta"] * (len(events) - 1) != []
        assert events[-1]["type"] == "error" and events[-1]["error"]["code"] == "synthesis_failed"


def test_bodies_are_limited(make_service):
    with make_service(max_body_bytes=10_000, max_input_characters=100) as service, service.client() as client:
        response = client.post("/v1/audio/speech", json={**SPEECH, "input": "a" * 20_000})
        assert response.status_code == 413 and response.json()["error"]["type"] == "invalid_request_error"

        def send_pieces():
            for _ in range(100):
                yield b" " * 1_000

        response = client.post("/v1/audio/speech", content=send_pieces(), headers={"content-type": "application/json"})
        assert response.status_code == 413
        response = client.post("/v1/audio/speech", json={**SPEECH, "input": "a" * 101})
        assert response.status_code == 400 and "100 characters" in response.json()["error"]["message"]


def test_a_body_that_takes_too_long_is_not_waited_for(make_service):
    with make_service(client_timeout=0.3) as service:
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            head = "POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            connection.settimeout(10)
            received = b""
            while data := connection.recv(4096):
                received += data
        assert received.startswith(b"HTTP/1.1 408")


def test_connections_are_limited(make_service):
    with make_service(max_connections=3) as service:
        idle = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(5)]
        time.sleep(0.1)
        with service.client() as client:
            assert client.get("/health").status_code == 503
        for connection in idle:
            connection.close()
        time.sleep(0.1)
        with service.client() as client:
            assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 5_000, "application/json"),
        (json.dumps(SPEECH).encode(), "text/plain"),
        (b"input=No.", "application/x-www-form-urlencoded"),
    ],
)
def test_rubbish_gets_an_error(service, content, content_type):
    with service.client() as client:
        response = client.post("/v1/audio/speech", content=content, headers={"content-type": content_type})
    assert response.status_code in (400, 415, 422)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_other_origins_only_where_they_are_named(service, make_service):
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    with service.client() as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=headers).headers
        assert client.options("/v1/audio/speech", headers=headers).status_code == 405
    with make_service(cors_origins=("https://example.org",)) as named, named.client() as client:
        preflight = client.options("/v1/audio/speech", headers=headers)
        assert preflight.headers["access-control-allow-origin"] == "https://example.org"
        other = client.get("/health", headers={"origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers


def test_logs_tell_all_but_the_text(service, caplog):
    with caplog.at_level(logging.INFO, logger="transformers_sled.server"), service.client() as client:
        client.post("/v1/audio/speech", json={**SPEECH, "input": "Xylophones barked."})
        client.post("/v1/audio/speech", json={**SPEECH, "input": "Xylophones barked.", "speed": 9})
        client.get("/v1/xylophones?text=Xylophones")
        service.wait_until(lambda: len(caplog.records) >= 3)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    assert "ylophones" not in json.dumps(lines)
    spoken = lines[0]
    assert spoken["event"] == "request" and spoken["route"] == "/v1/audio/speech" and spoken["status"] == 200
    assert spoken["voice"] == "af_heart" and spoken["characters"] == 18 and spoken["seconds"] > 0.2
    assert 0 < spoken["time_to_first_audio"] < 10 and spoken["request_id"].startswith("req_")


def test_metrics(service):
    with service.client() as client:
        before = read_metric(client, "sled_speech_seconds_total")
        content = client.post("/v1/audio/speech", json=SPEECH).content
        seconds = len(content) / 2 / 24_000
        assert read_metric(client, "sled_speech_seconds_total") - before == pytest.approx(seconds)
        text = client.get("/metrics").text
    for name in (
        "sled_requests_total",
        "sled_active_streams",
        "sled_queued_streams",
        "sled_cancellations_total",
        "sled_underrun_seconds_total",
        "sled_time_to_first_audio_seconds_bucket",
        "sled_real_time_factor_bucket",
    ):
        assert name in text


def test_it_describes_itself(service):
    with service.client() as client:
        schema = client.get("/openapi.json").json()
        assert client.get("/docs").status_code == 200
    assert "/v1/audio/speech" in schema["paths"]
    assert "audio/mpeg" in schema["paths"]["/v1/audio/speech"]["post"]["responses"]["200"]["content"]


def test_the_space_runs_as_it_stands():
    app = Path(__file__).parents[2] / "examples" / "space" / "app.py"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, app], env=environment, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 90
        while time.monotonic() < limit:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        page = httpx.get(f"http://127.0.0.1:{port}/")
        assert page.status_code == 200 and 'id="text"' in page.text
        for name in ("page.js", "playback.js", "style.css"):
            assert httpx.get(f"http://127.0.0.1:{port}/page/{name}").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/v1/audio/voice_consents").status_code == 403
    finally:
        process.terminate()
        assert process.wait(60) is not None


def test_what_takes_seconds_to_import_is_there_before_the_first_request(tmp_path):
    script = tmp_path / "first_text.py"
    script.write_text(
        "import sys\n"
        "from transformers_sled.server.engines import load_engine\n"
        "from transformers_sled.server.settings import ServiceSettings\n"
        "settings = ServiceSettings()\n"
        "engine = load_engine(settings.model, settings)\n"
        "before = set(sys.modules)\n"
        "with engine.server as server:\n"
        "    next(iter(server.add('It is 5 p.m.')))\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    completed = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert set(completed.stdout.split()) <= sys.stdlib_module_names | {"torch", "transformers_sled"}
