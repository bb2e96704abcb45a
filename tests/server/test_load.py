"""Many clients at once on the loopback, bounded in number and time, and rubbish made after the service's own OpenAPI."""

import asyncio
import gc
import os
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from transformers_sled import SledForSpeechSynthesis, SledProcessor, builtin_voice


pytestmark = pytest.mark.slow

TEXTS = ["No.", "The dog barked.", "She left.", "Two plus two is four."]
NUM_CLIENTS, NUM_LEAVING, NUM_SLOW, NUM_RUBBISH = 200, 50, 20, 20


def make_request(number: int) -> dict:
    text = TEXTS[number % len(TEXTS)]
    return {"model": "tts-1", "voice": "bf_emma", "input": text, "response_format": "pcm", "seed": number % 8}


@pytest.fixture(scope="module")
def expected(service) -> dict[tuple[str, int], np.ndarray]:
    """What `generate` alone says, by text and seed."""
    processor = SledProcessor.from_pretrained(builtin_voice())
    model = SledForSpeechSynthesis.from_pretrained(builtin_voice())
    spoken = {}
    for number in range(8):
        request = make_request(number)
        inputs = processor(request["input"], voice_preset="bf_emma")
        generator = torch.Generator().manual_seed(request["seed"])
        spoken[request["input"], request["seed"]] = model.generate(**inputs, generator=generator)[0].numpy()
    return spoken


async def be_client(client: httpx.AsyncClient, number: int) -> tuple[str, dict, bytes]:
    """One of the clients: what kind it was, what it asked for, and what it got."""
    request = make_request(number)
    if number < NUM_RUBBISH:
        content = [b"", b"{", b'{"input": 5}', b"\xff" * 5000, b"[]"][number % 5]
        response = await client.post("/v1/audio/speech", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400
        return "rubbish", request, b""
    received = b""
    async with client.stream("POST", "/v1/audio/speech", json=request) as response:
        assert response.status_code == 200
        async for piece in response.aiter_raw():
            received += piece
            if number < NUM_RUBBISH + NUM_LEAVING:
                return "left", request, received
            if number < NUM_RUBBISH + NUM_LEAVING + NUM_SLOW:
                await asyncio.sleep(0.2)
    return "spoken", request, received


def test_many_clients_at_once(make_service, expected):
    threads = set(threading.enumerate())
    gc.collect()
    num_files = len(os.listdir("/proc/self/fd"))
    with make_service(max_streams=16, max_queue=200) as service:

        async def run():
            limits = httpx.Limits(max_connections=NUM_CLIENTS)
            async with httpx.AsyncClient(base_url=service.url, timeout=600, limits=limits) as client:
                return await asyncio.gather(*(be_client(client, number) for number in range(NUM_CLIENTS)))

        results = asyncio.run(run())
        service.wait_until(lambda: service.service.num_speeches == 0)
        service.wait_until(lambda: service.service.synthesizers[0].engine.num_active_streams == 0)
        with service.client() as client:
            assert client.get("/health").status_code == 200
    kinds = [kind for kind, _, _ in results]
    assert (kinds.count("rubbish"), kinds.count("left")) == (NUM_RUBBISH, NUM_LEAVING)
    for kind, request, received in results:
        if kind == "spoken":
            samples = np.frombuffer(received, "<i2") / 32767
            np.testing.assert_allclose(samples, expected[request["input"], request["seed"]].clip(-1, 1), atol=3e-4)
    assert set(threading.enumerate()) <= threads
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= num_files


def get_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("num_requests", [int(os.environ.get("SLED_NUM_REQUESTS", "10000"))])
def test_memory_does_not_grow(make_service, num_requests):
    """Resident memory after all requests is within 5 % of that after 500. An environment variable makes it shorter."""
    with make_service(max_streams=16, max_queue=64, max_duration=0.1) as service:

        async def run(count: int) -> None:
            async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:

                async def work(numbers) -> None:
                    for number in numbers:
                        response = await client.post("/v1/audio/speech", json=make_request(number))
                        assert response.status_code == 200

                numbers = iter(range(count))
                await asyncio.gather(*(work(numbers) for _ in range(32)))

        asyncio.run(run(500))
        gc.collect()
        before = get_resident_bytes()
        asyncio.run(run(num_requests - 500))
        gc.collect()
        assert get_resident_bytes() < 1.05 * before


def test_nothing_after_openapi_is_answered_with_an_error_of_the_service(make_service):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    with make_service(max_duration=0.2, api_keys=("a-key",)) as service:
        schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
        num_calls = 0
        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path == "/metrics":
                continue

            @settings(
                max_examples=25,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                database=None,
            )
            @given(case=operation.as_strategy())
            def check(case):
                nonlocal num_calls
                num_calls += 1
                response = case.call(base_url=service.url, headers={"authorization": "Bearer a-key"}, timeout=60)
                assert response.status_code < 500, (case.method, case.path, response.text)

            check()
        assert num_calls > 100
