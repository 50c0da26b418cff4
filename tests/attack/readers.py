"""Packed files, damaged by structure: read as the decoder of docs/format.md reads them, or refused."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.attack.tally import Tally, Wrong, seeds
from tests.shared.test_format_fuzz import cut, edit, flip, pack, same
from zoo.shared.store.formats import PackedContents, load_packed

DOC = Path(__file__).parents[2] / "docs" / "format.md"


def independent_decoder() -> Any:
    """The reader printed in docs/format.md: NumPy and the standard library, none of our code."""
    namespace: dict[str, Any] = {}
    example = "".join(re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(example, str(DOC), "exec"), namespace)
    return namespace["read"]


def attack(seconds: float, seed: int, folder: Path, out: Path) -> Tally:
    """Flipped bits and cuts must give the original or nothing; edits with checksums that agree again must
    give what the independent decoder reads."""
    tally, decode, originals = Tally(), independent_decoder(), []
    for index in range(3):
        pack(folder / f"{index}", index)
        originals.append(((folder / f"{index}").read_bytes(), load_packed(folder / f"{index}")))
    path = folder / "damaged"

    def act(damage: Any, data: bytes, original: PackedContents, rng: random.Random) -> None:
        path.write_bytes(damage(bytearray(data), rng))
        got = load_packed(path)
        if damage is not edit:
            if not same(got, original):
                raise Wrong("another content than was saved")
            return
        expected = decode(path)
        ours = {**got.tensors, **got.extras}
        if set(expected) != set(ours):
            raise Wrong(f"names {sorted(set(expected) ^ set(ours))}")
        for name, tensor in ours.items():
            plain = tensor.float() if tensor.dtype in (torch.bfloat16,) else tensor
            if not np.array_equal(
                np.asarray(expected[name]), plain.numpy(), equal_nan=tensor.is_floating_point()
            ):
                raise Wrong(f"{name!r} differs from the independent decoder")

    for rng in seeds(seconds, seed, tally, out):
        damage = rng.choice([flip, cut, edit, edit, edit])
        data, original = rng.choice(originals)
        state = rng.getstate()
        tally.attempt(f"{damage.__name__} {hash(state)}", act, damage, data, original, rng)
    return tally
