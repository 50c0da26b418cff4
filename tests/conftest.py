"""Settings of the whole suite: one thread per process, shapes checked at run time, no network."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "0")

import jaxtyping  # noqa: E402

# Public functions carry shape annotations; the tests run with them switched on, users do not pay for it.
_hook = jaxtyping.install_import_hook(["shared", "zoo"], "beartype.beartype")

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "zoo-cache"))
