"""Fuzzing the bundle reader: of thousands of damaged bundles, none raises anything but the project's errors.

A bundle that still loads must give exactly the tensors, masks and extras that were saved: only the words and
figures of its card may have changed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from zoo.bundles import catalog
from zoo.bundles.store import load
from zoo.shared.errors import SparseError
from zoo.shared.masks import masks_of
from zoo.shared.store.formats import PackedContents, load_packed

WEIGHTS = "weights.safetensors"
CARD = "card.yaml"
Mutation = Callable[[bytes, random.Random], bytes]


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(data: bytes, rng: random.Random) -> bytes:
    start, count = rng.randrange(len(data)), rng.randint(1, 8)
    filling = rng.choice([bytes(count), b"\xff" * count, rng.randbytes(count)])
    return data[:start] + filling + data[start + count :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randint(1, 16)) + data[start:]


def delete(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 64) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = start + rng.randint(1, 200)
    return data[:end] + data[start:end] + data[end:]


def swap(data: bytes, rng: random.Random) -> bytes:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def change_number(data: bytes, rng: random.Random) -> bytes:
    """Another number where one stands, in the card or in the header of the weights."""
    spots = list(re.finditer(rb"\d+(?:\.\d+)?", data[:20_000]))
    spot = rng.choice(spots)
    old = spot.group()
    new = rng.choice(
        [
            b"0",
            b"-1",
            b"1",
            old + b"0",
            old[:-1] or b"7",
            b"9" * 30,
            b"1e400",
            b".nan",
            b"0x10",
            str(rng.randrange(1 << 40)).encode(),
        ]
    )
    return data[: spot.start()] + new + data[spot.end() :]


def change_word(data: bytes, rng: random.Random) -> bytes:
    """Another word or sign where a word stands."""
    spots = list(re.finditer(rb"[A-Za-z_/.-]{2,}", data[:20_000]))
    a, b = rng.choice(spots), rng.choice(spots)
    new = rng.choice(
        [
            b.group(),
            b"null",
            b"true",
            b"[]",
            b"{}",
            b"&a",
            b"*a",
            b"!!x",
            b"../x",
            b"'",
            b":",
            b"- ",
            b"\n",
            b"\t",
            b"\x00",
            "\u2028".encode(),
            b"\xed\xa0\x80",
        ]
    )
    return data[: a.start()] + new + data[a.end() :]


def move_line(data: bytes, rng: random.Random) -> bytes:
    """A line of the card dropped, doubled, moved or indented otherwise."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    what = rng.randrange(4)
    if what == 0:
        del lines[i]
    elif what == 1:
        lines.insert(j, lines[i])
    elif what == 2:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines[i] = rng.choice([b"  " + lines[i], lines[i].lstrip(), lines[i].replace(b"  ", b" ", 1)])
    return b"\n".join(lines)


BYTES: list[Mutation] = [
    flip_bit,
    set_bytes,
    truncate,
    insert,
    delete,
    repeat,
    swap,
    change_number,
    change_word,
]
TEXT: list[Mutation] = [*BYTES, move_line, move_line, change_number, change_word]


class Fuzzer:
    """One bundle, written again and again with damage, and what became of each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.card, self.weights = (folder / CARD).read_bytes(), (folder / WEIGHTS).read_bytes()
        model = load(folder)
        self.state, self.masks, self.extras = model.state_dict(), masks_of(model), model.zoo_info.extras
        self.refused, self.loaded = 0, 0
        self.written = self.card

    def damage(self, data: bytes, mutations: list[Mutation]) -> bytes:
        for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
            if data:
                data = self.rng.choice(mutations)(data, self.rng)
        return data

    def agreeing_card(self, weights: bytes) -> bytes:
        """The card with hash and size of damaged weights, so that the reader behind the hash is reached."""
        card = self.card.replace(
            hashlib.sha256(self.weights).hexdigest().encode(), hashlib.sha256(weights).hexdigest().encode()
        )
        size, old = str(len(weights)).encode(), str(len(self.weights)).encode()
        return re.sub(rb"(bytes|on_disk): " + old, rb"\1: " + size, card)

    def try_loading(self, card: bytes, weights: bytes) -> None:
        if card != self.written:
            (self.folder / CARD).write_bytes(card)
            catalog._read_cached.cache_clear()  # the clock of file systems ticks more slowly than this loop
            self.written = card
        (self.folder / WEIGHTS).write_bytes(weights)
        try:
            model = load(self.folder)
        except SparseError as error:
            assert 10 < len(str(error)) < 2000
            self.refused += 1
            return
        self.loaded += 1
        state = model.state_dict()
        assert state.keys() == self.state.keys()
        assert all(torch.equal(value, self.state[name]) for name, value in state.items())
        assert masks_of(model).equal(self.masks) and model.scale == 0.5
        extras = model.zoo_info.extras
        assert extras.keys() == self.extras.keys()
        assert all(torch.equal(value, self.extras[name]) for name, value in extras.items())


@pytest.fixture
def fuzzer(tiny_bundle: Path) -> Iterator[Fuzzer]:
    """Without the run-time shape checks of the suite: users have none, and they take most of the time."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield Fuzzer(tiny_bundle, seed=20240229)
    jaxtyping.config.update("jaxtyping_disable", before)


def test_damaged_cards(fuzzer: Fuzzer) -> None:
    for _ in range(1000):
        fuzzer.try_loading(fuzzer.damage(fuzzer.card, TEXT), fuzzer.weights)
    assert fuzzer.refused > 600, "most damage is noticed"
    assert fuzzer.loaded > 15, "and a changed word in the summary is none"


def test_damaged_weights(fuzzer: Fuzzer) -> None:
    for _ in range(300):
        weights = fuzzer.damage(fuzzer.weights, BYTES)
        if weights != fuzzer.weights:
            fuzzer.try_loading(fuzzer.card, weights)
    assert fuzzer.loaded == 0 and fuzzer.refused > 270, "the hash tells"


def test_damaged_weights_with_a_card_that_agrees(fuzzer: Fuzzer) -> None:
    for _ in range(1300):
        weights = fuzzer.damage(fuzzer.weights, BYTES)
        fuzzer.try_loading(fuzzer.agreeing_card(weights), weights)
    assert fuzzer.refused > 1200


def test_both_damaged(fuzzer: Fuzzer) -> None:
    for _ in range(400):
        weights = fuzzer.damage(fuzzer.weights, BYTES)
        fuzzer.try_loading(fuzzer.damage(fuzzer.agreeing_card(weights), TEXT), weights)
    assert fuzzer.refused > 380


def test_the_fuzzer_would_notice(fuzzer: Fuzzer, monkeypatch) -> None:
    """Both things it looks for, brought about on purpose."""

    def other_tensors(path: Path) -> PackedContents:
        contents = load_packed(path)
        contents.tensors["first.bias"][0] += 1
        return contents

    def other_error(path: Path) -> PackedContents:
        raise RuntimeError("not an error of this project")

    fuzzer.try_loading(fuzzer.card, fuzzer.weights)
    monkeypatch.setattr("zoo.bundles.store.load_packed", other_tensors)
    with pytest.raises(AssertionError):
        fuzzer.try_loading(fuzzer.card, fuzzer.weights)
    monkeypatch.setattr("zoo.bundles.store.load_packed", other_error)
    with pytest.raises(RuntimeError):
        fuzzer.try_loading(fuzzer.card, fuzzer.weights)
