"""Servers that are no good hub: what arrives is the bundle, or an error and nothing in the cache."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import threading
from pathlib import Path
from unittest import mock

import torch

from tests.attack.tally import Lost, Tally, Wrong, seeds
from tests.zoo.test_bundle_fuzz import BYTES, TEXT
from tests.zoo.test_hub import FakeHub
from zoo.bundles import catalog, hub
from zoo.bundles.store import load
from zoo.errors import BundleError
from zoo.shared.errors import SparseError

NAME = "graph/teddy-gcn-digits-g30-w80"
ZERO = "0" * 40
PAGES: tuple[object, ...] = (
    *(None, [], {}, 5, "x"),
    *({"sha": 5}, {"sha": ZERO}, {"sha": ZERO, "siblings": 7}, {"siblings": [{"rfilename": 5}]}),
    {"id": "owner/tiny", "sha": ZERO, "siblings": [{"rfilename": "card.yaml", "size": "many"}]},
    {"id": [], "sha": "../..", "siblings": [{"rfilename": "card.yaml", "size": -1}]},
)


def attack(seconds: float, seed: int, folder: Path, out: Path) -> Tally:
    """One fault or several at a time, each against an empty cache."""
    logging.disable(logging.WARNING)
    tally, source = Tally(), catalog.find(NAME)
    files = {path.name: path.read_bytes() for path in source.folder.iterdir() if path.is_file()}
    files = {name: data for name, data in files.items() if name in ("card.yaml", source.card.weights.file)}
    expected = load(source.folder).state_dict()
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "ZOO_CACHE": str(folder / "cache")}
    os.environ.pop("ZOO_OFFLINE", None)

    def act(server: FakeHub) -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        try:
            state = load(hub.pull("hf://owner/tiny").folder).state_dict()
        except SparseError:
            _require_nothing(folder / "cache" / "hub")
            raise
        if any(not torch.equal(state[name], value) for name, value in expected.items()):
            raise Wrong("another model arrived")

    with (
        mock.patch("huggingface_hub.file_download.time.sleep"),
        mock.patch("huggingface_hub.utils._http.time.sleep"),
    ):
        for rng in seeds(seconds, seed, tally, out):
            with FakeHub() as server:
                thread = threading.Thread(
                    target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
                )
                thread.start()
                os.environ["HF_ENDPOINT"] = server.url
                what = _prepare(server, dict(files), source.card.weights.file, rng)
                tally.attempt(what, act, server)
                server.shutdown()
                thread.join()
    return tally


def _prepare(server: FakeHub, files: dict[str, bytes], weights: str, rng: random.Random) -> str:
    modes = rng.sample(["portal", "page", "cut", "tampered", "card", "weights", "missing", "down", "none"], 1)
    for mode in modes:
        name = rng.choice(["card.yaml", weights])
        if mode == "portal":
            server.portal = rng.choice([b"<html>log in</html>", b"\xff\xfe", b"", b"{", rng.randbytes(200)])
        elif mode == "page":
            server.portal = json.dumps(rng.choice(PAGES)).encode()
        elif mode == "cut":
            server.cut_after, server.cuts_left = {name: rng.randrange(2000)}, rng.choice([1, 2, 1000])
        elif mode == "tampered":
            server.tampered[name] = rng.choice(TEXT if name == "card.yaml" else BYTES)(files[name], rng)
        elif mode == "card":
            files["card.yaml"] = rng.choice(TEXT)(files["card.yaml"], rng)
        elif mode == "weights":
            files[weights] = rng.choice(BYTES)(files[weights], rng)
        elif mode == "missing":
            del files[name]
        elif mode == "down":
            server.down = True
    server.publish(files)
    return " ".join(modes)


def _require_nothing(cache: Path) -> None:
    """A refused pull leaves no bundle that does not agree with its card."""
    for card in cache.glob("*/snapshots/*/card.yaml"):
        if not card.parent.name.startswith("."):
            try:
                catalog.open_bundle(card.parent).check()
            except BundleError as error:
                raise Lost(f"a broken copy stayed: {error}") from error
