"""What `open_packed` refuses: foreign, truncated, damaged and hostile files, each with its message."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from zoo.shared.errors import FormatError
from zoo.shared.masks import Mask
from zoo.shared.masks.patterns import NM
from zoo.shared.store.formats import load_packed, open_packed, save_packed
from zoo.shared.store.formats.coding import decode_mask


def container(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def refuses(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        open_packed(tmp_path / "x")


def test_foreign_files(tmp_path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "t.pt")
    refuses(tmp_path, (tmp_path / "t.pt").read_bytes(), "zip archive, as torch.save writes.*save_packed")
    refuses(tmp_path, pickle.dumps({"w": [1, 2, 3]}), "a pickle; it is not opened because it can run code")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", "b")
    refuses(tmp_path, buffer.getvalue(), "zip archive")
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    refuses(tmp_path, buffer.getvalue(), "NumPy file")
    refuses(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull")
    refuses(tmp_path, b"<!DOCTYPE html><html>not found</html>", "download went wrong")
    refuses(tmp_path, b"", "too few")
    refuses(tmp_path, b"\0" * 100, "not a safetensors file")
    refuses(
        tmp_path,
        safetensors.torch.save({"w": torch.ones(2)}),
        "not a zoo-packed file; read it with safetensors",
    )
    with pytest.raises(FormatError, match="not a regular file"):
        open_packed(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        open_packed(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        open_packed(tmp_path / "absent")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (container(b'{"a":1}', size=2**63), "declares a header of 9223372036854775808 bytes in a file of 15"),
        (container({"a": F32}, bytes(8), size=10**6), "declares a header of 1000000"),
        (container(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "nested too deeply"),
        (container(b'{"a":1,"a":2}'), "a key occurs twice"),
        (container(b'{"a":NaN}'), "NaN is not a JSON number"),
        (container(b'{"a":' + b"9" * 5000 + b"}"), "header cannot be read"),
        (container(b'{"\xff":1}'), "header cannot be read"),
        (container({"a": 1}), "array 'a': its entry does not have exactly"),
        (container({"a": {**F32, "x": 1}}, bytes(8)), "does not have exactly"),
        (container({"a": {**F32, "dtype": "Q4"}}, bytes(8)), "dtype 'Q4' is not one of"),
        (container({"a": {**F32, "dtype": ["F32"]}}, bytes(8)), "dtype"),
        (
            container({"a": {**F32, "shape": [3]}}, bytes(8)),
            r"F32 of shape \[3\] takes 12 bytes, its data_offsets span 8",
        ),
        (container({"a": {**F32, "shape": [-2]}}, bytes(8)), "shape"),
        (container({"a": {**F32, "shape": [True, 2]}}, bytes(8)), "shape"),
        (container({"a": {**F32, "shape": [2.0]}}, bytes(8)), "shape"),
        (container({"a": {**F32, "shape": [1] * 40}}, bytes(8)), "shape"),
        (container({"a": {**F32, "shape": [2**62, 2**62]}}, bytes(8)), r"more than 2\*\*40 elements"),
        (container({"a": {**F32, "shape": [2**62, 0]}}, bytes(8)), r"more than 2\*\*40 elements"),
        (container({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "span -8"),
        (container({"a": {**F32, "data_offsets": [0, 8.0]}}, bytes(8)), "data_offsets"),
        (container({"a": {**F32, "data_offsets": [-8, 0]}}, bytes(8)), "data_offsets"),
        (container({"a": F32, "b": F32}, bytes(8)), "a gap or an overlap"),
        (container({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "a gap or an overlap"),
        (container({"a": F32}, bytes(7)), "has .* bytes where its header describes"),
        (container({"a": F32}, bytes(9)), "truncated or was appended to"),
        (container({"../a": F32}, bytes(8)), "its name looks like a path"),
        (container({"a\0": F32}, bytes(8)), "its name holds a control character"),
        (container({"__metadata__": {"format": 1}}), "__metadata__ does not map names to strings"),
        (container({"__metadata__": [1]}), "__metadata__ does not map"),
    ],
)
def test_hostile_headers(tmp_path, data, message) -> None:
    refuses(tmp_path, data, message)


def edited(tmp_path: Path, change, version: str = "1", fix_crc: bool = True) -> bytes:
    """A small packed file after `change(manifest, header)`, with checksums that agree with the change."""
    mask = Mask(torch.tensor([[True, False, True, False, False, True, True, False]] * 4), NM(2, 4))
    flag = torch.tensor([True, True, False])
    tensors = {"w": torch.ones(4, 8) * mask.keep, "d": torch.ones(3), "t": torch.ones(2), "flag": flag}
    save_packed(tmp_path / "e", tensors, {"w": mask, "flag": flag}, {"few": torch.arange(3000) % 700 == 7})
    data = (tmp_path / "e").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    manifest = json.loads(header["__metadata__"]["manifest"])
    change(manifest, header, body)
    for key, entry in header.items():
        if fix_crc and key in manifest.get("crc32", {}):
            manifest["crc32"][key] = zlib.crc32(body[slice(*entry["data_offsets"])])
    text = json.dumps(manifest)
    header["__metadata__"] = {
        "format": "zoo-packed",
        "version": version,
        "manifest": text,
        "manifest_crc32": f"{zlib.crc32(text.encode()):08x}",
    }
    return container(header, bytes(body))


def set_path(*path):
    *keys, last, value = path

    def change(manifest, header, body):
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return change


def poke(key: str, position: int, value: int):
    def change(manifest, header, body):
        body[header[key]["data_offsets"][0] + position] = value

    return change


def poke_gap(manifest, header, body) -> None:
    """The last gap becomes the escape, which keeps nothing."""
    low, high = header["extra.index/few"]["data_offsets"]
    body[low:high] = body[low : high - 2] + b"\xff\xff"


def grow(manifest, header, body) -> None:
    """A few bytes that declare half a terabyte of dropped entries."""
    manifest["tensors"]["w"] |= {"shape": [1 << 37, 8], "index": {"code": "empty"}, "kept": 0}
    low, high = header.pop("tensor.index/w")["data_offsets"]
    del manifest["crc32"]["tensor.index/w"]
    header["tensor.values/w"] |= {"shape": [0], "data_offsets": [0, 0]}
    del header["tensor/d"], header["tensor/t"], manifest["crc32"]["tensor/d"], manifest["crc32"]["tensor/t"]
    del manifest["tensors"]["d"], manifest["tensors"]["t"]
    manifest["extras"].clear()
    del header["extra.index/few"], manifest["crc32"]["extra.index/few"]
    for key in ("tensor.index/flag", "tensor.values/flag"):
        del header[key], manifest["crc32"][key]
    del manifest["tensors"]["flag"]
    body.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_path("tensors", "w", "encoding", "quantum"),
            "tensor 'w': unknown encoding 'quantum'.*newer version",
        ),
        (set_path("tensors", "w", "encoding", {}), "unknown encoding"),
        (set_path("tensors", "w", "index", "code", "huffman"), "unknown code 'huffman'"),
        (
            set_path("tensors", "w", "index", {"code": "bitmap", "units": "hexagon"}),
            "unknown units 'hexagon'",
        ),
        (
            set_path("tensors", "w", "index", {"code": "bitmap", "units": "block", "rows": 0, "cols": 1}),
            "rows is 0",
        ),
        (
            set_path("tensors", "w", "index", {"code": "bitmap", "units": "block", "rows": 3, "cols": 1}),
            "do not divide",
        ),
        (
            set_path("tensors", "w", "index", {"code": "bitmap", "units": "slice", "dim": 2}),
            "dim 2 does not exist",
        ),
        (set_path("tensors", "w", "index", "extra", 1), "has fields"),
        (set_path("tensors", "w", "index", "n", 5), "5:4 is not a pattern"),
        (set_path("tensors", "w", "index", "m", 10**30), "is not a pattern that this code can hold"),
        (set_path("tensors", "w", "index", "n", 1), "expected U8 with 2 entries"),
        (set_path("tensors", "w", "index", "dim", True), "dim True does not exist"),
        (set_path("tensors", "w", "index", 7), "index is not an object"),
        (set_path("tensors", "w", "kept", 15), "expected F32 with 15 entries"),
        (set_path("tensors", "w", "kept", -1), "kept is not a count"),
        (set_path("tensors", "w", "dtype", "F16"), "expected F16"),
        (set_path("tensors", "w", "dtype", "Q4"), "unknown dtype 'Q4'"),
        (set_path("tensors", "w", "shape", [4, 9]), "does not divide|multiple of 4"),
        (set_path("tensors", "w", "shape", [2**50, 8]), r"more than 2\*\*40 elements"),
        (
            set_path("tensors", "w", "pattern", {"kind": "nm", "n": 3, "m": 2, "dim": -1}),
            "N:M needs 1 <= n <= m",
        ),
        (set_path("tensors", "w", "pattern", {"kind": "spiral"}), "unknown pattern kind"),
        (set_path("tensors", "w", "pattern", {"kind": "block", "rows": 3, "cols": 1}), "'w': block3x1"),
        (set_path("tensors", "w", "pattern", None), "its pattern is not an object"),
        (set_path("tensors", "d", "shape", [4]), "missing or of another type or shape"),
        (set_path("tensors", "d", "kept", 3), "has fields"),
        (set_path("tensors", "t", {"encoding": "same", "of": "x"}), "the same as 'x', which is not there"),
        (set_path("tensors", "t", {"encoding": "same", "of": "t"}), "itself a second name"),
        (
            set_path("tensors", "t", {"encoding": "same", "of": "d", "pattern": {"kind": "unstructured"}}),
            "has no mask",
        ),
        (
            set_path("tensors", "t", {"encoding": "same", "of": "d"}),
            "the arrays do not match|checksums do not match",
        ),
        (set_path("tensors", "../t", {"encoding": "same", "of": "d"}), "looks like a path"),
        (set_path("extras", "few", "dtype", "U8"), "encoding bits is for BOOL"),
        (set_path("extras", "few", []), "not an object"),
        (set_path("extras", "few", "shape", [2**40]), "unpack to .* ZOO_MAX_UNPACKED"),
        (grow, "unpack to .* ZOO_MAX_UNPACKED"),
        (set_path("crc32", "tensor/none", 0), "checksums do not match"),
        (set_path("crc32", []), "crc32 is not an object"),
        (set_path("more", {}), "does not consist of"),
    ],
)
def test_hostile_manifests(tmp_path, change, message) -> None:
    refuses(tmp_path, edited(tmp_path, change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poke("tensor.index/w", 2, 0xFF), "a rank of 7 where 2:4 has 6 choices"),
        (poke_gap, "end without a kept entry"),
        (set_path("extras", "few", "shape", [2000]), "reach place 2808 of 2000"),
        (set_path("extras", "few", "kept", 4), "keeps 5 entries, 4 values"),
        (
            set_path("tensors", "w", "pattern", {"kind": "nm", "n": 1, "m": 4, "dim": -1}),
            "breaks its declared pattern",
        ),
        (set_path("tensors", "w", "pattern", {"kind": "group", "dim": 0}), "breaks its declared pattern"),
        (poke("tensor.values/flag", 1, 2), "booleans other than 0 and 1"),
    ],
)
def test_hostile_payloads(tmp_path, change, message) -> None:
    """Faults that only the arrays show, in a file whose checksums all agree."""
    (tmp_path / "x").write_bytes(edited(tmp_path, change))
    with pytest.raises(FormatError, match=message):
        load_packed(tmp_path / "x")


def test_edited_helper_is_sound(tmp_path) -> None:
    (tmp_path / "x").write_bytes(edited(tmp_path, lambda *_: None))
    assert load_packed(tmp_path / "x").masks["w"].kept == 16


def test_unused_bits_of_a_bitmap_must_be_zero() -> None:
    index = {"code": "bitmap", "units": "element"}
    with pytest.raises(ValueError, match="unused bits"):
        decode_mask(index, np.array([0b1110_0000], dtype=np.uint8), (5,))
    with pytest.raises(ValueError, match="2 bytes, 5 bits need 1"):
        decode_mask(index, np.zeros(2, dtype=np.uint8), (5,))


def test_versions_and_changed_manifests(tmp_path) -> None:
    refuses(
        tmp_path,
        edited(tmp_path, lambda *_: None, version="2"),
        "version '2'.*this package reads 1; install a newer",
    )
    data = edited(tmp_path, lambda *_: None)
    refuses(
        tmp_path, data.replace(b'\\"kept\\": 16', b'\\"kept\\": 17'), "manifest cannot be read .its checksum"
    )


def test_hostile_file_does_not_fill_the_memory(tmp_path) -> None:
    """Refused before anything of the declared size is allocated."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(tmp_path, edited(tmp_path, grow), "unpack to .* ZOO_MAX_UNPACKED")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
