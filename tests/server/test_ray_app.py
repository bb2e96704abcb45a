"""The service on a Ray cluster on this machine: one cluster for all tests, with a replica of each model."""

import asyncio
import base64
import json
import socket
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
import websockets
import yaml
from test_voices_api import give_consent, make_voice

from ray_cluster import run_cluster, save_tiny_checkpoints
from transformers_sled import SledForSpeechSynthesis, SledProcessor


serve = pytest.importorskip("ray.serve", reason="needs the extra `ray`")

from ray.serve.schema import ServeDeploySchema  # noqa: E402

from transformers_sled.server.ray_app import RaySettings, app, make_application  # noqa: E402


pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).parents[2] / "examples" / "cluster"
SECONDS = 1.0
SPEECH = {"model": "tts-1", "voice": "default", "input": "The dog barked.", "response_format": "pcm", "seed": 3}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[str, str]:
    return save_tiny_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def url(checkpoints, tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with run_cluster():
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = RaySettings(
            model=checkpoints[0],
            streaming_model=checkpoints[1],
            max_streams=2,
            max_queue=1,
            max_duration=SECONDS,
            num_cpus=0.5,
            watermark=False,
            voices_folder=str(tmp_path_factory.mktemp("voices")),
        )
        serve.run(make_application(settings), name="sled")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def make_arguments(**changes) -> dict:
    """The same for the client, which knows no seeds."""
    known = {name: value for name, value in SPEECH.items() if name != "seed"}
    return {**known, **changes, "extra_body": {"seed": SPEECH["seed"]}}


def count(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_until(condition, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "It took too long."
        time.sleep(0.02)


def test_openai_client_gets_what_generate_gives(client, checkpoints):
    model = SledForSpeechSynthesis.from_pretrained(checkpoints[0])
    processor = SledProcessor.from_pretrained(checkpoints[0])
    generator = torch.Generator().manual_seed(SPEECH["seed"])
    [expected] = model.generate(**processor(SPEECH["input"]), generator=generator, max_new_tokens=75)
    with client.audio.speech.with_streaming_response.create(**make_arguments()) as response:
        pieces = list(response.iter_bytes())
    assert len(pieces) > 2, "It must leave as it is made."
    samples = np.frombuffer(b"".join(pieces), "<i2") / 32767
    assert len(samples) == SECONDS * 24_000
    np.testing.assert_allclose(samples, expected.numpy().clip(-1, 1), atol=3e-4)


def test_routes_around_it(url, client):
    for path in ("/health", "/ready", "/metrics", "/", "/v1/audio/voices", "/openapi.json"):
        assert httpx.get(url + path).status_code == 200, path
    assert {"offline", "streaming"} <= {model.id for model in client.models.list()}


def test_errors_come_back_from_the_replica(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(model="tts-1", voice="nobody", input="No.")
    assert caught.value.code == "voice_not_found"
    # What only the model refuses.
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(**make_arguments(input="\u200b"))
    assert "text" in caught.value.message and "Traceback" not in caught.value.message


def test_a_voice_that_is_made_is_spoken_in(client):
    voice = make_voice(client, give_consent(client))
    names = (voice.id, "anna", "default")
    spoken = [client.audio.speech.create(**make_arguments(voice=name)).content for name in names]
    assert spoken[0] == spoken[1] != spoken[2]
    assert client.audio.voices.delete(voice.id).deleted


def test_deepgram_gets_text_to_the_replica_as_it_is_written(url):
    async def run() -> tuple[list[bytes], list[str]]:
        address = url.replace("http", "ws") + "/v1/speak?encoding=linear16&sample_rate=24000&seed=1"
        audio, kinds = [], []
        async with websockets.connect(address) as connection:
            assert json.loads(await connection.recv())["type"] == "Metadata"
            # Enough for the first audio, which comes before the text ends.
            for word in ("The ", "dog ", "barked ", "all ", "night, ", "and ", "nobody ", "slept"):
                await connection.send(json.dumps({"type": "Speak", "text": word}))
            audio.append(await asyncio.wait_for(connection.recv(), 30))
            await connection.send(json.dumps({"type": "Speak", "text": " at all."}))
            await connection.send(json.dumps({"type": "Flush"}))
            while "Flushed" not in kinds:
                message = await asyncio.wait_for(connection.recv(), 30)
                if isinstance(message, bytes):
                    audio.append(message)
                else:
                    kinds.append(json.loads(message)["type"])
            await connection.send(json.dumps({"type": "Clear"}))
            assert json.loads(await connection.recv())["type"] == "Cleared"
            await connection.send(json.dumps({"type": "Close"}))
        return audio, kinds

    audio, _ = asyncio.run(run())
    assert isinstance(audio[0], bytes) and len(audio) > 2
    assert len(b"".join(audio)) == SECONDS * 48_000


def test_a_websocket_is_refused(url):
    async def run() -> int:
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url.replace("http", "ws") + "/v1/speak?model=nobody")
        return caught.value.response.status_code

    assert asyncio.run(run()) == 400


def test_elevenlabs_form(url):
    async def run() -> bytes:
        address = url.replace("http", "ws") + "/v1/text-to-speech/default/stream-input?output_format=pcm_24000"
        audio = b""
        async with websockets.connect(address) as connection:
            for text in (" ", "The dog barked all ", "night, and nobody slept. ", ""):
                await connection.send(json.dumps({"text": text}))
            while True:
                message = json.loads(await asyncio.wait_for(connection.recv(), 30))
                if message.get("isFinal"):
                    return audio
                audio += base64.b64decode(message["audio"])

    assert len(asyncio.run(run())) == SECONDS * 48_000


def test_who_leaves_frees_the_place(url):
    with httpx.Client(base_url=url, timeout=60) as http:
        for _ in range(3):
            with http.stream("POST", "/v1/audio/speech", json=SPEECH) as response:
                next(response.iter_raw())
        wait_until(lambda: count(url, "sled_active_streams") == 0)
        assert count(url, "sled_cancellations_total") >= 3
    # The replica, which hears of it a moment later, counts them no more either: as many as it has places speak at once.
    wait_until(lambda: [response.status_code for response in ask_together(url, 2)] == [200, 200])


def ask_together(url: str, num_clients: int) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            return await asyncio.gather(*(http.post("/v1/audio/speech", json=SPEECH) for _ in range(num_clients)))

    return asyncio.run(run())


def test_a_full_cluster_refuses(url):
    responses = ask_together(url, 12)
    refused = [response for response in responses if response.status_code != 200]
    assert 0 < len(refused) < 12
    for response in refused:
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
    # Sums over another number of streams differ in the last bit.
    spoken = [np.frombuffer(response.content, "<i2") for response in responses if response.status_code == 200]
    for samples in spoken:
        assert np.abs(samples.astype(int) - spoken[0]).max() <= 10


def test_settings_by_name():
    application = app({"max_replicas": "3", "num_gpus": "0.25", "max_streams": 5})
    assert application is not None
    with pytest.raises(ValueError, match="max_replica"):
        app({"max_replica": 3})
    with pytest.raises(ValueError, match="min_replicas"):
        app({"min_replicas": 3})
    with pytest.raises(ValueError, match="max_queue"):
        app({"max_queue": 0})


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_configurations(name):
    """What Ray Serve reads of them. The rest of a RayService is KubeRay's, which is not here to check it."""
    content = yaml.safe_load((EXAMPLES / name).read_text())
    if name == "rayservice.yaml":
        assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayService")
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(content)
    [described] = schema.applications
    assert described.import_path == f"{app.__module__}:app" and described.route_prefix == "/"
    assert app(described.args) is not None
    assert {deployment.name for deployment in described.deployments} <= {"Ingress", "Speaker", "StreamingSpeaker"}
    wrong = {**content["applications"][0], "import_path": "transformers_sled"}
    with pytest.raises(ValueError, match="import_path"):
        ServeDeploySchema.model_validate({**content, "applications": [wrong]})
