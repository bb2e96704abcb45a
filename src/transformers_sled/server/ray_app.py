"""
The speech service on a Ray cluster. It needs the extra `ray`.

    serve run transformers_sled.server.ray_app:app max_replicas=4 num_gpus=0.5

An ingress answers requests with the routes of the service; replicas, which Ray Serve starts, replaces and stops, speak.
They are apart because a stream has to be told when its replica has died, because a replica's places belong to texts
rather than to WebSockets and questions about its health, and because those who pack audio need no GPU.
"""

import asyncio
import os
from dataclasses import dataclass, replace
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import ConfigDict, TypeAdapter
from ray import cloudpickle, serve
from ray.serve import Application
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import text_relay
from .application import create_app
from .logs import log_as_json
from .metrics import ServiceMetrics
from .replica_engine import ReplicaEngine, Speaker
from .service import SpeechService
from .settings import ServiceSettings
from .synthesizers import Synthesizer, make_synthesizer
from .text_relay import TextRelay


APPLICATION_NAME = "sled"

# Streams of one replica, of all, at which another one is started.
TARGET_SHARE = 0.75

# Texts and WebSockets of one ingress at which another one is started.
INGRESS_TARGET = 64

# Calls that a relay keeps waiting: one for each text that is being written.
MAX_RELAYED_TEXTS = 10_000


@dataclass(frozen=True)
class RaySettings(ServiceSettings):
    r"""
    Settings of the speech service on a cluster: those of [`ServiceSettings`], of which `max_streams` holds for each
    replica, `max_queue` for each ingress, and `shutdown_timeout` (600 by default) for a replica that is being replaced.

    Args:
        min_replicas (`int`, *optional*, defaults to 1):
            Replicas of each model that there are at least.
        max_replicas (`int`, *optional*, defaults to 1):
            Replicas of each model that there are at most.
        num_cpus (`float`, *optional*, defaults to 1.0):
            Cores of a replica.
        num_gpus (`float`, *optional*, defaults to 0.0):
            GPUs of a replica, which may be a fraction of one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    shutdown_timeout: int = 600
    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                "`min_replicas` must be at least 1 and at most `max_replicas`, got "
                f"{self.min_replicas} and {self.max_replicas}."
            )
        if self.max_queue < 1:
            raise ValueError(
                f"`max_queue` must be at least 1 on a cluster, where a text waits until a replica has answered, got {self.max_queue}."
            )
        for name in ("num_cpus", "num_gpus"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")


@serve.ingress()
class Ingress:
    """Answers requests: the routes of the service."""

    def __init__(self, settings: RaySettings, *speakers: DeploymentHandle[Any]) -> None:
        log_as_json("transformers_sled.server")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        # So that the relay's process does not load the package, and PyTorch with it, for a few queues.
        cloudpickle.register_pickle_by_value(text_relay)
        options = {"num_cpus": 0, "max_concurrency": MAX_RELAYED_TEXTS, "scheduling_strategy": here}
        self._relay = ray.remote(TextRelay).options(**options).remote()
        self._settings = settings
        # Here, because handles belong to the event loop, and the service loads in a thread.
        self._engines = [ReplicaEngine(speaker, self._relay) for speaker in speakers]
        self._service: SpeechService | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        def load(settings: ServiceSettings, metrics: ServiceMetrics) -> list[Synthesizer]:
            return [
                make_synthesizer(checkpoint, engine, settings, metrics)
                for checkpoint, engine in zip(settings.checkpoints, self._engines, strict=True)
            ]

        app = create_app(self._settings, load)
        self._service = app.state.service
        return app

    async def check_health(self) -> None:
        """Raises an error if the ingress has to be replaced. Waits until it is loaded."""
        await self._relay.check.remote()
        while self._service is not None and self._service.is_healthy and not self._service.synthesizers:
            await asyncio.sleep(0.01)
        if self._service is None or not self._service.is_healthy:
            raise RuntimeError("The service has failed.")


def make_application(settings: RaySettings) -> Application:
    r"""
    Makes the application for Ray Serve.

    Args:
        settings ([`RaySettings`]):
            Its settings.

    Returns:
        `ray.serve.Application`: the ingress, `Ingress`, with the replicas `Speaker` and, for a second model,
        `StreamingSpeaker`.

    Example:

    ```python
    >>> from ray import cloudpickle, serve
    >>> from transformers_sled.server.ray_app import RaySettings, make_application

    >>> serve.run(make_application(RaySettings(max_replicas=4, num_gpus=0.5)))
    ```
    """
    autoscaling = {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": settings.shutdown_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        # The new ones are there before the old ones go.
        "max_surge_percent": 100,
    }
    device = "cuda" if settings.num_gpus else settings.device
    speakers = []
    for name, checkpoint in zip(("Speaker", "StreamingSpeaker"), settings.checkpoints, strict=False):
        deployment = serve.deployment(
            Speaker,
            name=name,
            max_ongoing_requests=settings.max_streams,
            max_queued_requests=settings.max_queue,
            autoscaling_config={**autoscaling, "target_ongoing_requests": TARGET_SHARE * settings.max_streams},
            ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
            **common,
        )
        speakers.append(deployment.bind(checkpoint, replace(settings, device=device)))
    ingress = serve.deployment(
        Ingress,
        name="Ingress",
        max_ongoing_requests=settings.max_connections,
        autoscaling_config={**autoscaling, "target_ongoing_requests": INGRESS_TARGET},
        ray_actor_options={"num_cpus": 1},
        **common,
    )
    return ingress.bind(settings, *speakers)


def app(arguments: dict[str, Any]) -> Application:
    r"""
    What `serve run` and the configuration of `serve deploy` name: `transformers_sled.server.ray_app:app`.

    Args:
        arguments (`dict[str, Any]`):
            Settings, by the names of [`RaySettings`]. Keys are taken from the environment variable `SLED_API_KEY` too.

    Returns:
        `ray.serve.Application`: the application.

    Raises:
        `ValueError`: if there is no such setting, or its value is out of range.
    """
    settings = TypeAdapter(RaySettings).validate_python(arguments)
    keys = os.environ.get("SLED_API_KEY", "").split()
    return make_application(replace(settings, api_keys=(*settings.api_keys, *keys)))


def run_on_ray(
    settings: RaySettings,
    host: str = "127.0.0.1",
    port: int = 8000,
    certificate: str | None = None,
    private_key: str | None = None,
) -> None:
    r"""
    Runs the service on the cluster of this machine, or that of `RAY_ADDRESS`, until it is told to stop.

    Args:
        settings ([`RaySettings`]):
            Settings of the service.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on, on every node.
        port (`int`, *optional*, defaults to 8000):
            Port to listen on.
        certificate, private_key (`str`, *optional*):
            Files for HTTPS.
    """
    http = HTTPOptions(host=host, port=port, ssl_certfile=certificate, ssl_keyfile=private_key)
    serve.start(proxy_location=ProxyLocation.EveryNode, http_options=http)
    try:
        serve.run(make_application(settings), name=APPLICATION_NAME, blocking=True)
    finally:
        # Which lets speech end.
        serve.delete(APPLICATION_NAME)
