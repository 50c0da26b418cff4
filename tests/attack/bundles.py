"""Bundles with other arguments, tensors and extras, and hashes that agree: loaded whole or refused."""

from __future__ import annotations

import copy
import hashlib
import logging
import random
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.attack.tally import Tally, Wrong, seeds
from zoo.bundles.card import CARD_FILE
from zoo.bundles.cardfile import dump_yaml
from zoo.bundles.catalog import select
from zoo.bundles.store import WEIGHTS_FILE, load
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet
from zoo.shared.store.formats import PackedContents, load_packed, save_packed

NUMBERS: tuple[Any, ...] = (
    -1,
    0,
    1,
    2,
    3,
    7,
    1000,
    20000,
    200_000,
    1 << 31,
    1 << 62,
    10**30,
    0.0,
    -1.5,
    1e300,
)
WORDS: tuple[Any, ...] = (None, True, False, "", "x", "../../etc", "silu", "somebody/kernel")
NESTED: tuple[Any, ...] = ([], [1], [8, 8], [-1], [10**9], [[]], {}, {"a": 1}, {"group": 16, "kept": {}})
ODD = NUMBERS + WORDS + NESTED
MEMORY, TIME = 3 << 30, 30.0  # bytes and seconds of the processor: more is no refusal in time


def attack(seconds: float, seed: int, folder: Path, out: Path) -> Tally:
    """Mutate one bundle after the other."""
    logging.disable(logging.WARNING)
    tally = Tally()
    small = [b for b in select("*") if b.card.base is None and b.card.weights.bytes < 400_000]
    originals = [(b, load_packed(b.weights)) for b in small]
    names = ARCHITECTURES.names()
    for rng in seeds(seconds, seed, tally, out):
        bundle, contents = rng.choice(originals)
        fields = bundle.card.to_dict()
        tensors, extras = dict(contents.tensors), dict(contents.extras)
        masks = dict(contents.masks.items())
        architecture = copy.deepcopy(fields["architecture"])
        what = rng.choice(["argument", "argument", "argument", "architecture", "tensor", "extra"])
        if what == "argument":
            _change(architecture["args"], rng)
        elif what == "architecture":
            architecture["name"] = rng.choice(names)
        elif what == "tensor":
            _spoil(tensors, masks, rng)
        elif extras:
            _spoil(extras, {}, rng)
        execution = rng.choice(["masked", "packed"])
        tally.attempt(
            f"{bundle.card.name} {execution} {what} {str(architecture)[:300]}",
            _try,
            folder,
            fields,
            architecture,
            PackedContents(tensors, MaskSet(masks), extras, contents.metadata),
            execution,
        )
    return tally


def _try(
    folder: Path,
    fields: dict[str, Any],
    architecture: dict[str, Any],
    contents: PackedContents,
    execution: Any,
) -> None:
    path = folder / WEIGHTS_FILE
    metadata = {**contents.metadata, "architecture": architecture}
    save_packed(path, contents.tensors, contents.masks, contents.extras, metadata)
    raw = path.read_bytes()
    weights = {"file": WEIGHTS_FILE, "sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    card = {**fields, "architecture": architecture, "weights": weights}
    card["cost"] = copy.deepcopy(fields["cost"])
    card["cost"]["bytes"]["on_disk"] = len(raw)
    (folder / CARD_FILE).write_text(dump_yaml(card), encoding="utf-8")
    start, before = time.process_time(), _peak()
    try:
        model = load(folder, execution)
    finally:
        if time.process_time() - start > TIME:
            raise Wrong(f"took {time.process_time() - start:.0f} s")
        if _peak() - before > MEMORY:
            raise Wrong(f"took {(_peak() - before) >> 20} MiB")
    if execution == "masked":
        state = model.state_dict()
        for name, tensor in contents.tensors.items():
            if not torch.equal(state[name].nan_to_num(), tensor.nan_to_num()):
                raise Wrong(f"{name!r} is not what the file holds")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _change(args: dict[str, Any], rng: random.Random) -> None:
    """Another value for an argument, at any depth, or one more."""
    where: Any = args
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys or rng.random() < 0.05:
            if isinstance(where, dict):
                where[rng.choice(["layers", "attn_implementation", "x", "dtype"])] = rng.choice(ODD)
            return
        key = rng.choice(keys)
        if isinstance(where[key], (dict, list)) and rng.random() < 0.8:
            where = where[key]
            continue
        if isinstance(where, dict) and rng.random() < 0.1:
            del where[key]
        else:
            where[key] = copy.deepcopy(rng.choice(ODD))
        return


def _spoil(tensors: dict[str, Tensor], masks: dict[str, Any], rng: random.Random) -> None:
    """A tensor gone, doubled under another name, of another shape or type, or with other values."""
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    masks.pop(name, None)
    match rng.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            tensors[f"{name}.more"] = tensor
        case 2:
            tensors[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)]
        case 3:
            tensors[name] = tensor.to(rng.choice([torch.int16, torch.uint8, torch.float64, torch.bool]))
        case 4:
            tensors[name] = torch.full_like(tensor, tensor.dtype == torch.bool or rng.choice([-1, 0, 1]))
        case 5:
            flat = tensor.clone().reshape(-1)
            if flat.numel():
                flat[rng.randrange(flat.numel())] = 1 if tensor.dtype == torch.bool else rng.choice([-1, 99])
            tensors[name] = flat.reshape(tensor.shape)
