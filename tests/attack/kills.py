"""Writers that are killed, and files in which one bit flips: old content or new, never a mixture."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.attack.tally import Lost, Tally, Wrong, seeds
from zoo.bundles import catalog
from zoo.bundles.store import info, load, save
from zoo.shared.store.checked import read_checked, write_checked
from zoo.shared.store.formats import load_packed, save_packed

SIZE = 50_000


def attack(seconds: float, seed: int, folder: Path, out: Path) -> Tally:
    """A kill and a flip in turn, on checked files, packed files and bundles."""
    tally = Tally()
    model = load("graph/teddy-gcn-digits-g30-w80")
    card = info(model).card.to_dict()
    first = next(name for name, value in model.state_dict().items() if value.is_floating_point())

    def checked(number: int) -> None:
        write_checked(
            folder / "c", {"a": torch.full((SIZE,), number), "b": torch.full((SIZE,), number)}, {"n": number}
        )

    def packed(number: int) -> None:
        save_packed(folder / "p", {"a": torch.full((SIZE,), number), "b": torch.full((SIZE,), number)})

    def bundle(number: int) -> None:
        save(model, folder / "b", card=card | {"version": f"1.0.{number}"}, overwrite=True)

    def read_c() -> int:
        tensors, facts = read_checked(folder / "c")
        return _one([*tensors.values(), torch.tensor(facts["n"])])

    def read_p() -> int:
        return _one(list(load_packed(folder / "p").tensors.values()))

    def read_b() -> int:
        catalog._read_cached.cache_clear()
        state = load(folder / "b").state_dict()
        if not torch.equal(state[first], model.state_dict()[first]):
            raise Wrong("another tensor")
        return int(catalog.open_bundle(folder / "b").card.version.split(".")[-1])

    kinds: list[tuple[str, Callable[[int], None], Callable[[], int]]] = []
    kinds += [("checked", checked, read_c), ("packed", packed, read_p), ("bundle", bundle, read_b)]
    for rng in seeds(seconds, seed, tally, out):
        name, write, read = rng.choice(kinds)
        if rng.random() < 0.5:
            tally.attempt(f"kill {name}", _kill, write, read, rng)
        else:
            tally.attempt(f"flip {name}", _flip, folder, name, write, read, rng)
        for left in folder.glob(".*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return tally


def _one(tensors: list[torch.Tensor]) -> int:
    values = {int(value) for tensor in tensors for value in tensor.unique()}
    if len(values) != 1:
        raise Wrong(f"a mixture of {sorted(values)[:5]}")
    return values.pop()


def _kill(write: Callable[[int], None], read: Callable[[], int], rng: random.Random) -> None:
    write(0)
    child = os.fork()
    if child == 0:
        number = 0
        while True:  # until it is killed
            number = number % 100 + 1
            write(number)
    time.sleep(rng.uniform(0.0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        read()
    except Wrong:
        raise
    except Exception as error:
        raise Lost(f"after the kill: {type(error).__name__}: {error}") from error


def _flip(
    folder: Path, name: str, write: Callable[[int], None], read: Callable[[], int], rng: random.Random
) -> None:
    write(7)
    path = folder / {"checked": "c", "packed": "p", "bundle": "b/weights.safetensors"}[name]
    raw = bytearray(path.read_bytes())
    end = len(raw) if rng.random() < 0.5 else min(len(raw), 3000)  # half of them in the header
    raw[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    if read() != 7:
        raise Wrong("another content")
