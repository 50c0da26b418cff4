"""Bundles whose hashes agree and whose content is hostile: refused by BundleError, fast and cheaply."""

from __future__ import annotations

import hashlib
import json
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zoo.bundles import building
from zoo.bundles.cardfile import dump_yaml, load_yaml
from zoo.bundles.store import load
from zoo.errors import BundleError
from zoo.registry import ARCHITECTURES
from zoo.shared.errors import FormatError
from zoo.shared.store.formats import load_packed, open_packed, save_packed


def rewrite(folder: Path, args: dict[str, Any] | None = None, name: str | None = None) -> Path:
    """Give a bundle other arguments or another architecture, in card and weights, with hashes that agree."""
    path, card_path = folder / "weights.safetensors", folder / "card.yaml"
    contents = load_packed(path)
    architecture = dict(contents.metadata["architecture"])
    architecture |= {"args": args} if args is not None else {}
    architecture |= {"name": name} if name is not None else {}
    metadata = {**contents.metadata, "architecture": architecture}
    save_packed(path, contents.tensors, contents.masks, contents.extras, metadata)
    card = load_yaml(card_path.read_bytes(), "card")
    raw = path.read_bytes()
    card["architecture"] = architecture
    card["weights"] |= {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    card["cost"]["bytes"]["on_disk"] = len(raw)
    card_path.write_text(dump_yaml(card))
    return folder


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"width": 200_000_000}, "has the shape"),
        ({"width": 1 << 40}, "larger than any size"),
        ({"width": -1}, "refuses the arguments"),
        ({"width": 0}, "has the shape|refuses the arguments"),
        ({"width": "8"}, "refuses the arguments"),
        ({"depth": 3}, "refuses the arguments"),
    ],
)
def test_sizes_are_compared_before_they_are_allocated(tiny_bundle, args, message) -> None:
    rewrite(tiny_bundle, args)
    before, start = peak(), time.perf_counter()
    with pytest.raises(BundleError, match=message):
        load(tiny_bundle)
    assert peak() - before < 200 << 20 and time.perf_counter() - start < 5


def test_a_builder_without_end_is_stopped(tiny_bundle, monkeypatch) -> None:
    def endless(layers: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))

    monkeypatch.setitem(ARCHITECTURES._entries, "test/endless", endless)
    rewrite(tiny_bundle, {"layers": 20_000_000}, "test/endless")
    start = time.perf_counter()
    with pytest.raises(BundleError, match="many more parameters than the"):
        load(tiny_bundle)
    assert time.perf_counter() - start < 5


def _raise(error: BaseException) -> Callable[..., nn.Module]:
    def build(**_: Any) -> nn.Module:
        raise error

    return build


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        MemoryError(),
        ImportError("no module named x"),
        AttributeError("no attribute"),
        AssertionError(),
        IndexError("out of range"),
        KeyError("a"),
        OSError(5, "input/output error"),
        RecursionError("too deep"),
    ],
)
def test_whatever_building_raises_is_a_bundle_error(tiny_bundle, monkeypatch, error) -> None:
    monkeypatch.setitem(ARCHITECTURES._entries, "test/tiny", _raise(error))
    with pytest.raises(BundleError, match=f"^graph/tiny-test: the architecture .*{type(error).__name__}"):
        load(tiny_bundle)


def test_whatever_filling_raises_is_a_bundle_error(tiny_bundle, monkeypatch) -> None:
    class Picky(ARCHITECTURES.get("test/tiny")):  # type: ignore[misc]
        def load_extras(self, extras: dict[str, torch.Tensor]) -> None:
            raise AttributeError("'NoneType' object has no attribute 'shape'")

    monkeypatch.setitem(ARCHITECTURES._entries, "test/tiny", Picky)
    with pytest.raises(BundleError, match="^graph/tiny-test in .*AttributeError"):
        load(tiny_bundle)


def test_masked_execution_refuses_what_a_module_cannot_run(tiny_bundle, monkeypatch) -> None:
    class Checked(ARCHITECTURES.get("test/tiny")):  # type: ignore[misc]
        def check_loaded(self) -> None:
            raise FormatError("columns of -1")

    monkeypatch.setitem(ARCHITECTURES._entries, "test/tiny", Checked)
    with pytest.raises(BundleError, match="columns of -1"):
        load(tiny_bundle)


def test_a_file_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "bomb.safetensors"
    shape = (1 << 14, 1 << 14)
    save_packed(path, {"w": torch.zeros(2, 2)}, {"w": torch.zeros(2, 2, dtype=torch.bool)})
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["manifest"])
    manifest["tensors"]["w"] |= {"shape": list(shape)}
    manifest["metadata"] = {"filling": "x" * (1 << 20)}  # a megabyte earns no more
    text = json.dumps(manifest)
    header["__metadata__"] |= {"manifest": text, "manifest_crc32": f"{zlib.crc32(text.encode()):08x}"}
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + raw[8 + size :])
    with pytest.raises(FormatError, match="unpack to 1342177280, more .*ZOO_MAX_UNPACKED=1342177280"):
        open_packed(path)
    monkeypatch.setenv("ZOO_MAX_UNPACKED", "1342177280")
    assert open_packed(path).shape("w") == shape
    monkeypatch.setenv("ZOO_MAX_UNPACKED", "all")
    with pytest.raises(FormatError, match="'all', no number of bytes"):
        open_packed(path)


def test_a_header_of_a_hundred_megabytes_is_not_parsed(tmp_path) -> None:
    path = tmp_path / "header.safetensors"
    size = 99_000_000
    with path.open("wb") as file:
        file.write(struct.pack("<Q", size) + b"{")
        file.truncate(8 + size)
    before = peak()
    with pytest.raises(FormatError, match="has a header of 99000000 bytes, more than 10000000"):
        open_packed(path)
    assert peak() - before < 50 << 20


def test_the_count_of_parts_is_per_thread() -> None:
    with building._at_most(0):
        nn.Sequential(*(nn.Linear(1, 1) for _ in range(100)))
        with pytest.raises(BundleError, match="many more"):
            nn.Sequential(*(nn.Linear(1, 1) for _ in range(2000)))
    nn.Sequential(*(nn.Linear(1, 1) for _ in range(2000)))
