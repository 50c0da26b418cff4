"""SOG (PlayCanvas): a Gaussian is a pixel of several lossless WebP pictures; versions 1 and 2 read, 2
written.

A scene is a folder with `meta.json`, or the same in a zip file. Version 2 has codebooks of 256 numbers,
version 1 linear ranges. Harmonics beyond the first are rows of a palette.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from zoo.errors import DataError
from zoo.neural3d.formats.ply import from_three, to_three
from zoo.neural3d.splats import Splats, checked, logits
from zoo.shared.store.io import atomic_write

_PER_ROW = 64  # entries of the palette in a row of its picture
_MOST_META, _MOST_PICTURE = 1 << 20, 1 << 28  # bytes
_ENTRIES = 4096  # of the palette that is written
Load = Callable[[str], bytes]


def read(path: Path) -> Splats:
    """A scene from a folder, its meta.json or a .sog file.

    Raises:
        DataError: a missing part, a picture too small, a label outside the palette, or damaged JSON or WebP.
    """
    if path.suffix == ".sog":
        try:
            with zipfile.ZipFile(path) as archive:
                return checked(_decode(str(path), lambda name: _zipped(path, archive, name)), str(path))
        except zipfile.BadZipFile as error:
            raise DataError(f"{path}: a damaged zip file: {error}") from error
    folder = path if path.is_dir() else path.parent

    def load(name: str) -> bytes:
        if Path(name).name != name:
            raise DataError(f"{path}: names a file outside of its folder: {name!r}")
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read: {error.strerror}") from error

    return checked(_decode(str(folder), load), str(folder))


def write(path: Path, splats: Splats) -> None:
    """Write a .sog file, version 2; neighbours in space become neighbours in the pictures."""
    splats = splats.map(lambda tensor: tensor.detach().cpu())
    splats = splats.rows(morton_order(splats.means))
    n = len(splats)
    meta: dict[str, Any] = {"version": 2, "asset": {"generator": "sparse-model-zoo"}, "count": n}
    files: dict[str, bytes] = {}
    means = splats.means.double()
    spread = means.sign() * means.abs().log1p()
    low, high = (spread.amin(0), spread.amax(0)) if n else (torch.zeros(3), torch.ones(3))
    fixed = ((spread - low) / (high - low).clamp_min(1e-12) * 65535).round().to(torch.int32).numpy()
    files["means_l.webp"], files["means_u.webp"] = _picture(fixed & 255), _picture(fixed >> 8)
    meta["means"] = {"mins": low.tolist(), "maxs": high.tolist(), "files": ["means_l.webp", "means_u.webp"]}
    small, largest = to_three(splats.quats.double().numpy())
    bytes_of = numpy.rint((small / 2**0.5 + 0.5) * 255)
    files["quats.webp"] = _picture(numpy.concatenate([bytes_of, largest[:, None] + 252], 1))
    meta["quats"] = {"files": ["quats.webp"]}
    book, index = codebook(splats.scales.numpy())
    files["scales.webp"] = _picture(index)
    meta["scales"] = {"codebook": book.tolist(), "files": ["scales.webp"]}
    book, index = codebook(splats.sh[:, 0].numpy())
    alpha = (splats.opacities.sigmoid() * 255).round().numpy()[:, None]
    files["sh0.webp"] = _picture(numpy.concatenate([index, alpha], 1))
    meta["sh0"] = {"codebook": book.tolist(), "files": ["sh0.webp"]}
    if splats.sh_degree > 0 and n:
        meta["shN"] = _write_palette(splats.sh[:, 1:].numpy(), splats.sh_degree, files)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {"meta.json": json.dumps(meta).encode(), **files}.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    atomic_write(path, out.getvalue())


def _write_palette(rest: numpy.ndarray, bands: int, files: dict[str, bytes]) -> dict[str, Any]:
    from sklearn.cluster import MiniBatchKMeans

    n, per = len(rest), rest.shape[1]
    entries = min(_ENTRIES, max(1, n // 4))
    means = MiniBatchKMeans(entries, batch_size=4096, n_init=1, max_iter=10, random_state=0)
    labels = means.fit_predict(rest.reshape(n, -1))
    book, index = codebook(means.cluster_centers_.astype(numpy.float32))
    rows = -(-entries // _PER_ROW)
    grid = numpy.zeros((rows * _PER_ROW, per, 3))
    grid[:entries] = index.reshape(entries, per, 3)
    files["shN_centroids.webp"] = _webp(grid.reshape(rows, _PER_ROW * per, 3))
    files["shN_labels.webp"] = _picture(numpy.stack([labels & 255, labels >> 8, labels * 0], 1))
    names = ["shN_centroids.webp", "shN_labels.webp"]
    return {"count": entries, "bands": bands, "codebook": book.tolist(), "files": names}


def morton_order(points: torch.Tensor) -> torch.Tensor:
    """Order of points [N, 3] along a space-filling curve of 2^20 steps an axis."""
    if not len(points):
        return torch.zeros(0, dtype=torch.int64)
    low, high = points.amin(0), points.amax(0)
    grid = ((points - low).double() / (high - low).double().clamp_min(1e-12) * (2**20 - 1)).long()
    code = torch.zeros(len(points), dtype=torch.int64)
    for bit in range(20):
        for axis in range(3):
            code |= (grid[:, axis] >> bit & 1) << (3 * bit + axis)
    return code.argsort(stable=True)


def codebook(values: numpy.ndarray, size: int = 256, rounds: int = 8) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The `size` numbers, sorted, that stand best for all values (Lloyd's rounds from quantiles), and which
    number stands for which value."""
    flat = values.reshape(-1).astype(numpy.float64)
    if not len(flat):
        return numpy.zeros(size), numpy.zeros(values.shape, numpy.int64)
    book = numpy.quantile(flat, (numpy.arange(size) + 0.5) / size)
    book[0], book[-1] = flat.min(), flat.max()
    for _ in range(rounds):
        index = numpy.searchsorted((book[1:] + book[:-1]) / 2, flat)
        count = numpy.bincount(index, minlength=size)
        total = numpy.bincount(index, flat, minlength=size)
        book = numpy.sort(numpy.where(count > 0, total / numpy.maximum(count, 1), book))
    return book, numpy.searchsorted((book[1:] + book[:-1]) / 2, flat).reshape(values.shape)


def _picture(channels: numpy.ndarray) -> bytes:
    """Rows [N, 3 or 4] of bytes as the pixels of a square picture."""
    n, depth = channels.shape
    side = max(1, math.isqrt(max(0, n - 1)) + 1)
    pixels = numpy.zeros((side * -(-max(n, 1) // side), depth))
    pixels[:n] = channels
    return _webp(pixels.reshape(-1, side, depth))


def _webp(pixels: numpy.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    picture = Image.fromarray(pixels.astype(numpy.uint8), "RGBA" if pixels.shape[2] == 4 else "RGB")
    picture.save(out, "WEBP", lossless=True, exact=True, method=4, quality=100)
    return out.getvalue()


def _zipped(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise DataError(f"{path}: no {name} in it; found {', '.join(archive.namelist()[:10])}") from error
    if info.file_size > _MOST_PICTURE:
        raise DataError(f"{path}: {name} would unpack to {info.file_size} bytes")
    return archive.read(info)


def _decode(source: str, load: Load) -> Splats:
    text = load("meta.json")
    try:
        meta: dict[str, Any] = json.loads(text) if len(text) <= _MOST_META else {}
        first = meta.get("version", 1)
        count = int(meta["means"]["shape"][0] if first == 1 else meta["count"])
        known = first in (1, 2) and count >= 0
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{source}: meta.json is not that of a SOG scene: {error!r}") from error
    if not known:
        raise DataError(f"{source}: SOG version {first} with {count} Gaussians; versions 1 and 2 are read")
    try:
        return _fields(source, load, meta, first, count)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{source}: meta.json lacks a field or has it wrong: {error!r}") from error


def _fields(source: str, load: Load, meta: dict[str, Any], version: int, count: int) -> Splats:
    def pixels(part: str, number: int = 0) -> numpy.ndarray:
        name = meta[part]["files"][number]
        picture = _pixels(f"{source}: {name}", load(name)).reshape(-1, 4)
        if len(picture) < count:
            raise DataError(f"{source}: {name} has {len(picture)} pixels for {count} Gaussians")
        return picture[:count].astype(numpy.float64)

    def numbers(part: str, values: numpy.ndarray) -> numpy.ndarray:
        """Bytes to numbers: by codebook, or linearly between the bounds of version 1."""
        if version == 2:
            return _book(source, meta[part])[values.astype(numpy.int64)]
        low, high = (numpy.array(meta[part][end], numpy.float64) for end in ("mins", "maxs"))
        return low + (high - low) * values / 255

    low, high = (numpy.array(meta["means"][end], numpy.float64) for end in ("mins", "maxs"))
    fixed = (pixels("means", 0) + 256 * pixels("means", 1))[:, :3] / 65535
    spread = low + (high - low) * fixed
    means = numpy.sign(spread) * numpy.expm1(numpy.abs(spread))
    turn = pixels("quats")
    if count and turn[:, 3].min() < 252:
        row = int(turn[:, 3].argmin())
        raise DataError(
            f"{source}: Gaussian {row} has mark {turn[row, 3]:.0f} for a quaternion, not 252 to 255"
        )
    quats = from_three((turn[:, :3] / 255 - 0.5) * 2**0.5, turn[:, 3].astype(numpy.int64) - 252)
    shade = pixels("sh0")
    if version == 2:
        first, opacity = numbers("sh0", shade[:, :3]), logits(torch.from_numpy(shade[:, 3] / 255))
    else:
        first = numbers("sh0", shade)
        opacity, first = torch.from_numpy(first[:, 3]).float(), first[:, :3]
    sh = first[:, None]
    if meta.get("shN"):
        sh = numpy.concatenate([sh, _palette(source, load, meta["shN"], version, pixels("shN", 1))], 1)
    return Splats(
        torch.from_numpy(means).float(),
        torch.from_numpy(quats).float(),
        torch.from_numpy(numbers("scales", pixels("scales")[:, :3])).float(),
        opacity,
        torch.from_numpy(sh).float(),
    )


def _book(source: str, part: dict[str, Any]) -> numpy.ndarray:
    book = numpy.array(part["codebook"], numpy.float64)
    if book.shape != (256,):
        raise DataError(f"{source}: a codebook of {book.shape} numbers where 256 are expected")
    return book


def _palette(
    source: str, load: Load, part: dict[str, Any], version: int, labels: numpy.ndarray
) -> numpy.ndarray:
    """Harmonics [N, bases - 1, 3] beyond the first."""
    picture = _pixels(f"{source}: {part['files'][0]}", load(part["files"][0]))
    per = picture.shape[1] // _PER_ROW
    if per not in (3, 8, 15) or picture.shape[1] % _PER_ROW:
        raise DataError(f"{source}: a palette {picture.shape[1]} wide; 64 times 3, 8 or 15 are read")
    entries = picture[:, :, :3].reshape(-1, per, 3)
    index = (labels[:, 0] + 256 * labels[:, 1]).astype(numpy.int64)
    if len(index) and index.max() >= len(entries):
        row = int(index.argmax())
        raise DataError(f"{source}: Gaussian {row} has entry {index[row]} of a palette of {len(entries)}")
    if version == 2:
        palette = _book(source, part)[entries.astype(numpy.int64)]
    else:
        palette = part["mins"] + (part["maxs"] - part["mins"]) * (entries / 255.0)
    return palette[index]


def _pixels(what: str, data: bytes) -> numpy.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as picture:
            if picture.width * picture.height * 4 > _MOST_PICTURE:
                raise DataError(f"{what}: a picture of {picture.width} x {picture.height} is refused")
            return numpy.asarray(picture.convert("RGBA"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{what}: not a WebP picture, or damaged: {error}") from error
