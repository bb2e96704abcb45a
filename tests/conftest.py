"""Settings for all tests."""

import os

import pytest


# Before torch is imported: the workers of pytest-xdist share the cores, and threads that wait for each other take them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SLOW_SECONDS = 3600


def pytest_collection_modifyitems(items):
    """Gives slow tests without a time limit of their own a longer one than the default."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
