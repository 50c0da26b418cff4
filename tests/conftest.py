"""Settings of the whole suite: one thread per process, shapes checked at run time, no network."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "0")

import jaxtyping  # noqa: E402

# Public functions carry shape annotations; the tests run with them switched on, users do not pay for it.
_CHECKED = "ZOO_TEST_UNCHECKED" not in os.environ
if _CHECKED:
    jaxtyping.install_import_hook(["zoo"], "beartype.beartype")

import subprocess  # noqa: E402
import sys  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# The same examples in every run, so that a red run is a change's fault and not chance's; ZOO_TEST_SEARCH=1
# looks for new ones. How long an example takes to draw says something about the machine only.
slow = [HealthCheck.too_slow]
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=slow)
settings.register_profile("search", deadline=None, suppress_health_check=slow)
settings.load_profile("search" if "ZOO_TEST_SEARCH" in os.environ else "same")


def pytest_pyfunc_call(pyfuncitem):
    """Run a test marked `alone` in a process of its own, where no shape checks wrap what is compiled."""
    if pyfuncitem.get_closest_marker("alone") is None or not _CHECKED:
        return None
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=pyfuncitem.config.rootpath,
        env={**environment, "ZOO_TEST_UNCHECKED": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@pytest.fixture(autouse=True)
def _shape_checks(request):
    """Switches the shape checks off while a test marked `traced` runs: they cannot be traced, and would
    refuse before our own errors do."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("traced") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "zoo-cache"))


@pytest.fixture
def packs_all(monkeypatch) -> None:
    """Packing replaces every sparse linear layer, whichever is faster on this machine."""
    monkeypatch.setattr("zoo.shared.ops.packing._gains", lambda weight: True)
