"""A Ray cluster on this machine for tests, and small checkpoints with random weights for it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformers_sled import SledForSpeechSynthesis, SledProcessor


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
OBJECT_STORE_BYTES = 100_000_000


def save_tiny_checkpoints(folder: Path) -> tuple[str, str]:
    """Writes one for whole texts, and one for texts that are being written. Both speak as long as they may."""
    for name in ("offline", "streaming"):
        model = SledForSpeechSynthesis.from_pretrained(GOLDEN / name, codec=str(GOLDEN / "codec"))
        model.generation_config.eos_threshold = 1.0
        model.save_pretrained(folder / name)
        SledProcessor.from_pretrained(GOLDEN / name).save_pretrained(folder / name)
    return str(folder / "offline"), str(folder / "streaming")


@contextlib.contextmanager
def run_cluster(num_cpus: int = 8) -> Iterator[None]:
    """A node of its own, without a dashboard. The cores are only counted."""
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
    ray.init(
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        yield
    finally:
        ray.shutdown()
