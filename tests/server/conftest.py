"""A speech service on a free port of the loopback, with the voices in the box, run as `sled serve` runs it."""

import contextlib
import importlib.util
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest


# The extra `serve` needs Python 3.11.
if importlib.util.find_spec("fastapi") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from transformers_sled.server import ServiceSettings, SpeechServer

KEYS = ("first-key", "second-key")


class RunningService:
    """A service in a thread, and where it listens."""

    def __init__(self, settings: "ServiceSettings", **kwargs):
        self.server = SpeechServer(settings, port=0, **kwargs)
        self.service = self.server.service
        self.thread = threading.Thread(target=self.server.run)

    def start(self) -> None:
        self.thread.start()
        self.wait_until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_until(self, condition, seconds: float = 60) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, "It took too long."
            time.sleep(0.005)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def client(self, **kwargs):
        import httpx

        return httpx.Client(base_url=self.url, timeout=60, **kwargs)


@contextlib.contextmanager
def run_service(settings: "ServiceSettings", is_awaited: bool = True, **kwargs) -> Iterator[RunningService]:
    service = RunningService(settings, **kwargs)
    service.start()
    try:
        if is_awaited:
            service.wait_until(lambda: service.service.is_ready)
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="session")
def make_service(tmp_path_factory):
    """Runs a service with some settings of its own: `with make_service(max_streams=1) as service`."""

    def make(is_awaited: bool = True, certificate=None, private_key=None, **settings):
        folder: Path = settings.pop("voices_folder", None) or tmp_path_factory.mktemp("voices")
        return run_service(
            replace(ServiceSettings(voices_folder=folder, watermark=False), **settings),
            is_awaited,
            certificate=certificate,
            private_key=private_key,
        )

    return make


@pytest.fixture(scope="session")
def service(make_service) -> Iterator[RunningService]:
    """One that asks for no keys."""
    with make_service() as running:
        yield running


@pytest.fixture(scope="session")
def service_with_keys(make_service) -> Iterator[RunningService]:
    """One that asks for one of `KEYS`."""
    with make_service(api_keys=KEYS) as running:
        yield running
