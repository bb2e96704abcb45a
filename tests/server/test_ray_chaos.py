"""What the service on several Ray nodes does when replicas and nodes die, and when load comes and goes."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from ray_cluster import OBJECT_STORE_BYTES, save_tiny_checkpoints


ray = pytest.importorskip("ray", reason="needs the extra `ray`")
serve = pytest.importorskip("ray.serve", reason="needs the extra `ray`")

from ray.cluster_utils import Cluster  # noqa: E402
from ray.util.state import list_actors  # noqa: E402


pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPEECH = {"model": "tts-1", "voice": "default", "input": "The dog barked. " * 20, "stream_format": "sse"}
SPEECH["response_format"] = "pcm"


class RunningCluster:
    """A head that is large enough for ingresses alone, nodes for a replica each, and where the service on them listens."""

    def __init__(self, config: Path) -> None:
        self.config = config
        os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": OBJECT_STORE_BYTES}
        )
        self.dashboard = ray.init(address=self.cluster.address, log_to_driver=False).dashboard_url
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port})

    def deploy(self, num_replicas: int, **settings) -> None:
        """Deploys the service, and adds a node for each replica once the ingresses are on the head."""
        self.apply(settings)
        wait_until(lambda: len(get_replicas("Ingress")) == settings.get("min_replicas", 1))
        self.nodes = [self.add_node() for _ in range(num_replicas)]
        wait_until(lambda: serve.status().applications["sled"].status == "RUNNING")

    def apply(self, settings: dict, **autoscaling) -> None:
        """Says what the service is to be, by `serve deploy`."""
        application = {
            "name": "sled",
            "import_path": "transformers_sled.server.ray_app:app",
            "args": {"num_cpus": 3, **settings},
            "deployments": [{"name": "Speaker", "autoscaling_config": autoscaling}] if autoscaling else [],
        }
        self.config.write_text(yaml.safe_dump({"applications": [application]}))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(self.config)]
        subprocess.run([*command, "--address", f"http://{self.dashboard}"], check=True)

    def add_node(self):
        return self.cluster.add_node(num_cpus=3, object_store_memory=OBJECT_STORE_BYTES)

    def stop(self) -> None:
        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()


def get_replicas(name: str = "Speaker") -> dict[int, str]:
    """Processes of the replicas of a deployment, and their nodes."""
    actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    return {actor.pid: actor.node_id for actor in actors if actor.class_name == f"ServeReplica:sled:{name}"}


@pytest.fixture
def cluster(tmp_path):
    running = RunningCluster(tmp_path / "serve.yaml")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("chaos")
    checkpoint, _ = save_tiny_checkpoints(folder)
    return {
        "model": checkpoint,
        "max_streams": 2,
        "max_queue": 8,
        "max_duration": 20.0,
        "watermark": False,
        "voices_folder": str(folder / "voices"),
    }


def wait_until(condition, seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "It took too long."
        time.sleep(0.2)


class Listener:
    """Listens to a text, and keeps what came."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.last: dict = {}

    async def listen(self, http: httpx.AsyncClient, seed: int) -> None:
        async with http.stream("POST", "/v1/audio/speech", json={**SPEECH, "seed": seed}) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line:
                    self.last = json.loads(line[6:])
                    self.num_bytes += len(base64.b64decode(self.last.get("audio", "")))


async def listen_while(url: str, num_streams: int, act) -> list[Listener]:
    """Listens to several texts, and acts once all of them speak."""
    listeners = [Listener() for _ in range(num_streams)]
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        tasks = [asyncio.create_task(listener.listen(http, seed)) for seed, listener in enumerate(listeners)]
        while not all(listener.num_bytes for listener in listeners):
            assert not any(task.done() for task in tasks)
            await asyncio.sleep(0.05)
        await asyncio.to_thread(act)
        await asyncio.gather(*tasks)
    return listeners


def check_that_some_end(listeners: list[Listener]) -> None:
    """Those of the replica that died were told, and the others heard everything."""
    kinds = [listener.last["type"] for listener in listeners]
    assert sorted(kinds) == ["error", "error", "speech.audio.done", "speech.audio.done"]
    for listener in listeners:
        if listener.last["type"] == "speech.audio.done":
            assert listener.num_bytes == 20 * 48_000


def test_a_replica_that_dies_ends_its_own_streams_and_is_replaced(cluster, settings):
    cluster.deploy(2, **settings, min_replicas=2, max_replicas=2)
    before = get_replicas()
    assert len(before) == 2 and len(set(before.values())) == 2, "One on each node."
    victim = min(before)
    listeners = asyncio.run(listen_while(cluster.url, 4, lambda: os.kill(victim, signal.SIGKILL)))
    check_that_some_end(listeners)
    wait_until(lambda: len(get_replicas()) == 2)
    assert victim not in get_replicas()


def test_a_node_that_dies(cluster, settings):
    cluster.deploy(2, **settings, min_replicas=2, max_replicas=2)
    victim = cluster.nodes[0]
    listeners = asyncio.run(
        listen_while(cluster.url, 4, lambda: cluster.cluster.remove_node(victim, allow_graceful=False))
    )
    check_that_some_end(listeners)
    cluster.add_node()
    wait_until(lambda: len(get_replicas()) == 2)


def test_who_leaves_makes_room_at_once(cluster, settings):
    cluster.deploy(1, **{**settings, "max_streams": 1})

    def ask(seed: int, is_leaving: bool = False) -> tuple[float, float]:
        """Seconds to the first audio, and to the end."""
        start = time.monotonic()
        with httpx.stream(
            "POST", f"{cluster.url}/v1/audio/speech", json={**SPEECH, "seed": seed}, timeout=300
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            first = time.monotonic() - start
            if not is_leaving:
                assert sum(1 for _ in lines) > 100
        return first, time.monotonic() - start

    ask(0)
    first, whole = ask(1)
    ask(2, is_leaving=True)
    # Had the replica gone on with the one before, this one would have waited for most of that.
    first_after, _ = ask(3)
    print(f"first audio after {first:.3f} s, {first_after:.3f} s where another has just left; all after {whole:.1f} s")
    assert first_after < first + 0.3 * (whole - first)


def test_replicas_come_and_go_with_the_load(cluster, settings):
    cluster.deploy(2, **settings, max_replicas=2)
    assert len(get_replicas()) == 1
    # Ray Serve waits half a minute before it adds a replica, and ten before it takes one away.
    cluster.apply(
        {**settings, "max_replicas": 2},
        min_replicas=1,
        max_replicas=2,
        target_ongoing_requests=1.5,
        upscale_delay_s=1,
        downscale_delay_s=20,
    )
    listeners = asyncio.run(listen_while(cluster.url, 2, lambda: wait_until(lambda: len(get_replicas()) == 2)))
    assert [listener.last["type"] for listener in listeners] == ["speech.audio.done"] * 2
    wait_until(lambda: len(get_replicas()) == 1)


def test_an_update_breaks_no_stream(cluster, settings):
    cluster.deploy(3, **settings)
    before = set(get_replicas())

    def update() -> None:
        cluster.apply({**settings, "max_duration": 5.0})

    listeners = asyncio.run(listen_while(cluster.url, 2, update))
    assert [listener.last["type"] for listener in listeners] == ["speech.audio.done"] * 2
    assert [listener.num_bytes for listener in listeners] == [20 * 48_000] * 2
    wait_until(lambda: not before & set(get_replicas()))
    assert httpx.post(f"{cluster.url}/v1/audio/speech", json=SPEECH, timeout=300).status_code == 200
