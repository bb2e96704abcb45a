"""Settings for all tests."""

import os


# Before torch is imported: the workers of pytest-xdist share the cores, and threads that wait for each other take them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
