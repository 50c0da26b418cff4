"""SPZ (Niantic): fixed-point numbers; versions 2 and 3 in one gzip stream, version 4 in a zstd stream a
field.

Positions are y up, z backward; scenes here are y down, z forward.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy
import torch

from zoo.errors import DataError
from zoo.neural3d.formats.ply import from_three, to_three
from zoo.neural3d.splats import Splats, logits
from zoo.shared.store.io import atomic_write

_MAGIC = b"NGSP"
_HEADER = struct.Struct("<4sIIBBBB")
_COLOUR = 0.15  # of a byte's range per unit of the first harmonic
_MOST = 1 << 28  # Gaussians


def read(path: Path) -> Splats:
    """A scene from an .spz file of version 2, 3 or 4.

    Raises:
        DataError: another version, fields whose sizes do not fit the count, or damaged streams (with the
        byte).
    """
    data = path.read_bytes()
    zipped = data[:2] == b"\x1f\x8b"
    inflate = zlib.decompressobj(31)
    head = _inflated(path, inflate, data, _HEADER.size) if zipped else data[: _HEADER.size]
    if len(head) < _HEADER.size or head[:4] != _MAGIC:
        raise DataError(f"{path}, byte 0: not an .spz header: {head[:4]!r}")
    _, version, count, degree, fraction, _, streams = _HEADER.unpack(head)
    if version not in (2, 3, 4) or degree > 4 or fraction > 24 or count > _MOST:
        raise DataError(
            f"{path}: version {version}, degree {degree}, {fraction} fractional bits, {count} Gaussians; "
            f"read are versions 2 to 4, degrees to 4, 24 bits and {_MOST} Gaussians"
        )
    rest = 3 * ((degree + 1) ** 2 - 1)
    sizes = [9 * count, count, 3 * count, 3 * count, (3 if version == 2 else 4) * count, rest * count]
    if version == 4:
        fields = _streams(path, data, sizes, streams)
    else:
        size = sum(sizes)
        body = _inflated(path, inflate, inflate.unconsumed_tail, size) if zipped else data[_HEADER.size :]
        if len(body) < size:
            raise DataError(f"{path}: {len(body)} bytes of Gaussians where {count} need {size}; it is cut")
        ends = numpy.cumsum(sizes)
        fields = [body[end - part : end] for end, part in zip(ends, sizes, strict=True)]
    position, alpha, colour, scale, quat, sh = (numpy.frombuffer(field, numpy.uint8) for field in fields)
    low, middle, high = position.reshape(count, 3, 3).transpose(2, 0, 1).astype(numpy.int32)
    fixed = low | middle << 8 | high << 16
    fixed = fixed - ((fixed & 0x800000) << 1)
    first = (colour.reshape(count, 1, 3) / 255 - 0.5) / _COLOUR
    harmonics = numpy.concatenate([first, (sh.reshape(count, rest // 3, 3) - 128.0) / 128], 1)
    splats = Splats(
        torch.from_numpy(fixed / float(1 << fraction)).float(),
        torch.from_numpy(_quats(quat.reshape(count, sizes[4] // count if count else 4))).float(),
        torch.from_numpy(scale.reshape(count, 3) / 16 - 10.0).float(),
        logits(torch.from_numpy(alpha / 255)),
        torch.from_numpy(harmonics).float(),
    )
    return splats.turned()


def write(path: Path, splats: Splats) -> None:
    """Write version 3: 24-bit positions, bytes for the rest, 10 bits for the parts of a quaternion."""
    splats = splats.map(lambda tensor: tensor.detach().cpu()).turned()
    means = splats.means.double().numpy()
    reach = max(float(numpy.abs(means).max(initial=0.0)), 1e-9)
    fraction = int(numpy.clip(numpy.floor(22.99 - numpy.log2(reach)), 0, 12))
    if reach * 2**fraction >= 2**23:
        raise DataError(f"{path}: a position of {reach:.3g} does not fit 24 bits; scale the scene down")
    fixed = numpy.rint(means * 2**fraction).astype(numpy.int32).astype("<i4")
    position = fixed.view(numpy.uint8).reshape(len(splats), 3, 4)[:, :, :3]
    small, largest = to_three(splats.quats.double().numpy()[:, [1, 2, 3, 0]])
    packed = largest.astype(numpy.uint32)
    for part in small.T:
        size = numpy.minimum(numpy.rint(numpy.abs(part) * 2**0.5 * 511), 511).astype(numpy.uint32)
        packed = packed << 10 | (part < 0).astype(numpy.uint32) << 9 | size
    fields = [
        position,
        _bytes(splats.opacities.sigmoid() * 255),
        _bytes((splats.sh[:, 0] * _COLOUR + 0.5) * 255),
        _bytes((splats.scales + 10) * 16),
        packed.astype("<u4"),
        _bytes(splats.sh[:, 1:] * 128 + 128),
    ]
    header = _HEADER.pack(_MAGIC, 3, len(splats), splats.sh_degree, fraction, 0, 0)
    atomic_write(path, gzip.compress(header + b"".join(field.tobytes() for field in fields), mtime=0))


def _bytes(values: torch.Tensor) -> numpy.ndarray:
    return values.round().clamp(0, 255).to(torch.uint8).numpy()


def _quats(packed: numpy.ndarray) -> numpy.ndarray:
    """(w, x, y, z) of three bytes x, y, z, or of 32 bits: the place of the largest, then sign and size."""
    if packed.shape[1] == 3:
        vector = packed / 127.5 - 1
        return numpy.concatenate([numpy.sqrt(numpy.maximum(0, 1 - (vector**2).sum(1)))[:, None], vector], 1)
    word = numpy.ascontiguousarray(packed).view("<u4")[:, 0]
    parts = []
    for shift in (20, 10, 0):
        size = ((word >> shift) & 511) / 511 / 2**0.5
        parts.append(numpy.where((word >> (shift + 9)) & 1, -size, size))
    return from_three(numpy.stack(parts, 1), word >> 30)[:, [3, 0, 1, 2]]


def _inflated(path: Path, inflate: zlib._Decompress, data: bytes, size: int) -> bytes:
    """The next `size` bytes at most, whatever the stream would grow to."""
    try:
        return inflate.decompress(data, size) if size else b""
    except zlib.error as error:
        raise DataError(f"{path}: damaged gzip stream: {error}") from error


def _streams(path: Path, data: bytes, sizes: list[int], streams: int) -> list[bytes]:
    """The fields of version 4: byte 16 says where a table of sizes, packed and plain, begins; then zstd."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path} is version 4, which needs zstd: pip install zstandard") from error
    if streams not in (5, 6) or len(data) < 32:
        raise DataError(f"{path}, byte 15: {streams} streams where version 4 has 5 or 6")
    (table,) = struct.unpack_from("<I", data, 16)
    at = table + 16 * streams
    if table < 32 or at > len(data):
        raise DataError(f"{path}, byte 16: a table of streams at byte {table} of {len(data)}")
    fields = []
    for number in range(streams):
        packed, plain = struct.unpack_from("<QQ", data, table + 16 * number)
        if plain != sizes[number] or at + packed > len(data):
            raise DataError(
                f"{path}, byte {table + 16 * number}: stream {number} of {packed} bytes for {plain}, "
                f"expected {sizes[number]} within the {len(data)} bytes of the file"
            )
        stream = data[at : at + packed]
        try:
            if zstandard.frame_content_size(stream) not in (plain, -1):
                raise DataError(
                    f"{path}, byte {at}: the stream would grow beyond the {plain} bytes announced"
                )
            field = zstandard.ZstdDecompressor().decompress(stream, max_output_size=max(plain, 1))
        except zstandard.ZstdError as error:
            raise DataError(f"{path}, byte {at}: damaged zstd stream: {error}") from error
        if len(field) != plain:
            raise DataError(f"{path}, byte {at}: {len(field)} bytes where {plain} were announced")
        fields.append(field)
        at += packed
    if streams == 5 and sizes[5]:
        raise DataError(f"{path}, byte 15: harmonics are announced and have no stream")
    return fields if streams == 6 else [*fields, b""]
