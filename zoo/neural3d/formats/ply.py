"""PLY: the layout of 3DGS with harmonics of any degree, and SuperSplat's compressed one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from zoo.errors import DataError
from zoo.neural3d.splats import SH_C0, Splats, logits
from zoo.shared.store.io import atomic_write

_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
    "int8": "i1",
    "uint8": "u1",
    "int16": "i2",
    "uint16": "u2",
    "int32": "i4",
    "uint32": "u4",
    "float32": "f4",
    "float64": "f8",
}
_LONGEST_HEADER = 1 << 16
_CHUNK = 256  # Gaussians that share bounds in a compressed file
_REST = (0, 9, 24, 45, 72)


class _Element(NamedTuple):
    name: str
    rows: int
    fields: list[tuple[str, str]]


def read(path: Path) -> Splats:
    """A scene from a binary .ply file.

    Raises:
        DataError: a header that is none (with the line), missing properties, or a file that ends early (with
            the byte).
    """
    data = path.read_bytes()
    elements, at = _header(path, data)
    tables = {}
    for element in elements:
        kind = numpy.dtype(element.fields)
        size = element.rows * kind.itemsize
        if at + size > len(data):
            raise DataError(
                f"{path}: {element.name} needs bytes {at} to {at + size} of {len(data)}: the file is cut"
            )
        tables[element.name] = numpy.frombuffer(data, kind, element.rows, at)
        at += size
    if "vertex" not in tables:
        raise DataError(f"{path}: no element vertex; found {', '.join(tables) or 'none'}")
    if "packed_position" in (tables["vertex"].dtype.names or ()):
        return _unpack(path, tables)
    return _plain(path, tables["vertex"])


def write(path: Path, splats: Splats) -> None:
    """Write a scene in the layout of 3DGS, float32, little-endian."""
    n, bases = len(splats), splats.sh.shape[1]
    rest = splats.sh[:, 1:].transpose(1, 2).reshape(n, -1)
    columns = [splats.means, torch.zeros(n, 3), splats.sh[:, 0], rest]
    columns += [splats.opacities[:, None], splats.scales, splats.quats]
    names = [*"xyz", "nx", "ny", "nz", *(f"f_dc_{k}" for k in range(3))]
    names += [f"f_rest_{k}" for k in range(3 * (bases - 1))] + ["opacity"]
    names += [*(f"scale_{k}" for k in range(3)), *(f"rot_{k}" for k in range(4))]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {n}"]
    header += [f"property float {name}" for name in names] + ["end_header", ""]
    table = torch.cat([column.detach().float() for column in columns], 1).numpy().astype("<f4")
    atomic_write(path, "\n".join(header).encode() + table.tobytes())


def _header(path: Path, data: bytes) -> tuple[list[_Element], int]:
    end = data.find(b"end_header\n", 0, _LONGEST_HEADER)
    if end < 0:
        raise DataError(f"{path}: no line end_header in its first {_LONGEST_HEADER} bytes: not a .ply file")
    elements: list[_Element] = []
    order = ""
    for number, line in enumerate(data[:end].decode("latin-1").splitlines(), 1):
        match line.split():
            case ["ply"] | ["comment", *_] | ["obj_info", *_] | []:
                continue
            case ["format", "binary_little_endian", "1.0"]:
                order = "<"
            case ["format", "binary_big_endian", "1.0"]:
                order = ">"
            case ["element", name, count] if count.isdigit() and len(count) < 12:
                elements.append(_Element(name, int(count), []))
            case ["property", kind, name] if kind in _TYPES and elements and order:
                if name in dict(elements[-1].fields):
                    raise DataError(f"{path}, line {number}: property {name} twice")
                elements[-1].fields.append((name, order + _TYPES[kind]))
            case ["format", *_]:
                raise DataError(f"{path}, line {number}: only binary .ply files are read; received {line!r}")
            case ["property", "list", *_]:
                raise DataError(f"{path}, line {number}: lists are of meshes; Gaussians have none: {line!r}")
            case _:
                raise DataError(f"{path}, line {number}: not a line of a .ply header: {line[:80]!r}")
    return elements, end + len(b"end_header\n")


def _stack(table: numpy.ndarray, names: list[str]) -> torch.Tensor:
    columns = [table[name].astype(numpy.float32) for name in names]
    return torch.from_numpy(numpy.stack(columns, 1) if columns else numpy.zeros((len(table), 0), "f4"))


def _needs(path: Path, what: str, table: numpy.ndarray, names: list[str]) -> None:
    missing = [name for name in names if name not in (table.dtype.names or ())]
    if missing:
        raise DataError(f"{path}: {what} without {', '.join(missing)}: not a scene of Gaussians")


def _rest_of(path: Path, table: numpy.ndarray) -> list[str]:
    found = sum(name.startswith("f_rest_") for name in table.dtype.names or ())
    if found not in _REST:
        raise DataError(f"{path}: {found} properties f_rest_*, harmonics have {', '.join(map(str, _REST))}")
    names = [f"f_rest_{k}" for k in range(found)]
    _needs(path, "harmonics", table, names)
    return names


def _harmonics(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """[N, bases, 3] of the constant part [N, 3] and the rest [N, 3 * (bases - 1)], colour by colour."""
    rest = rest.reshape(len(rest), 3, rest.shape[1] // 3).transpose(1, 2)
    return torch.cat([first[:, None], rest], 1).contiguous()


def _plain(path: Path, table: numpy.ndarray) -> Splats:
    first = [f"f_dc_{k}" for k in range(3)]
    scales, quats = [f"scale_{k}" for k in range(3)], [f"rot_{k}" for k in range(4)]
    _needs(path, "vertices", table, ["x", "y", "z", *first, "opacity", *scales, *quats])
    sh = _harmonics(_stack(table, first), _stack(table, _rest_of(path, table)))
    means, opacities = _stack(table, ["x", "y", "z"]), _stack(table, ["opacity"])[:, 0]
    return Splats(means, _stack(table, quats), _stack(table, scales), opacities, sh)


def _share(value: numpy.ndarray, shift: int, bits: int) -> numpy.ndarray:
    """Some bits of packed integers as a number from 0 to 1."""
    most = (1 << bits) - 1
    return ((value >> shift) & most).astype(numpy.float64) / most


def _unpack(path: Path, tables: dict[str, numpy.ndarray]) -> Splats:
    """Positions and scales in 11 + 10 + 11 bits and colours in 4 x 8 between bounds per 256 Gaussians; of a
    quaternion the three smaller parts in 10 bits each."""
    vertex, chunks = tables["vertex"], tables.get("chunk")
    _needs(path, "vertices", vertex, [f"packed_{k}" for k in ("position", "rotation", "scale", "color")])
    if chunks is None or len(chunks) != -(-len(vertex) // _CHUNK):
        found = "no" if chunks is None else str(len(chunks))
        raise DataError(f"{path}: {len(vertex)} packed Gaussians with {found} chunks of {_CHUNK}")
    chunk = numpy.arange(len(vertex)) // _CHUNK

    def between(name: str, value: numpy.ndarray) -> numpy.ndarray:
        _needs(path, "chunks", chunks, [f"min_{name}", f"max_{name}"])
        low, high = (chunks[f"{end}_{name}"][chunk].astype(numpy.float64) for end in ("min", "max"))
        return low * (1 - value) + high * value

    def threes(field: str, prefix: str) -> numpy.ndarray:
        packed = vertex[field]
        parts = (_share(packed, 21, 11), _share(packed, 11, 10), _share(packed, 0, 11))
        return numpy.stack([between(prefix + axis, part) for axis, part in zip("xyz", parts, strict=True)], 1)

    colour, packed = vertex["packed_color"], vertex["packed_rotation"]
    shades = [_share(colour, shift, 8) for shift in (24, 16, 8)]
    if "min_r" in (chunks.dtype.names or ()):
        shades = [between(name, shade) for name, shade in zip("rgb", shades, strict=True)]
    small = numpy.stack([(_share(packed, shift, 10) - 0.5) * 2**0.5 for shift in (20, 10, 0)], 1)
    quats = from_three(small, packed >> 30)
    sh = torch.from_numpy((numpy.stack(shades, 1) - 0.5) / SH_C0).float()
    rest = torch.zeros(len(vertex), 0)
    if "sh" in tables:
        if len(tables["sh"]) != len(vertex):
            raise DataError(f"{path}: harmonics of {len(tables['sh'])} Gaussians for {len(vertex)}")
        rest = _stack(tables["sh"], _rest_of(path, tables["sh"]))
        rest = (torch.where(rest == 0, 0, torch.where(rest == 255, 256, rest + 0.5)) / 256 - 0.5) * 8
    return Splats(
        torch.from_numpy(threes("packed_position", "")).float(),
        torch.from_numpy(quats).float(),
        torch.from_numpy(threes("packed_scale", "scale_")).float(),
        logits(torch.from_numpy(_share(colour, 0, 8))),
        _harmonics(sh, rest),
    )


def from_three(small: numpy.ndarray, largest: numpy.ndarray) -> numpy.ndarray:
    """Unit quaternions [N, 4] of their smaller parts [N, 3], in order, and the place [N] of the largest."""
    quats = numpy.zeros((len(small), 4))
    whole = numpy.sqrt(numpy.maximum(0, 1 - (small**2).sum(1)))
    places = numpy.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])[largest]
    numpy.put_along_axis(quats, places, small, 1)
    numpy.put_along_axis(quats, largest.astype(numpy.int64)[:, None], whole[:, None], 1)
    return quats


def to_three(quats: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The three smaller parts, in order, of quaternions made unit and turned so that the largest is positive,
    and the place of the largest."""
    quats = quats / numpy.linalg.norm(quats, axis=1, keepdims=True)
    largest = numpy.abs(quats).argmax(1)
    quats = quats * numpy.where(numpy.take_along_axis(quats, largest[:, None], 1) < 0, -1, 1)
    places = numpy.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])[largest]
    return numpy.take_along_axis(quats, places, 1), largest
