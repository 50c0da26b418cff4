"""A scene in few bytes: attributes rounded to steps, neighbours side by side, each stream entropy-coded.

The file is safetensors of byte streams (LZMA, raw) and steps.
"""

from __future__ import annotations

import lzma
import math
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from zoo.errors import DataError
from zoo.neural3d.formats.sog import morton_order
from zoo.neural3d.splats import SH_C0, Splats, checked
from zoo.shared.store.io import atomic_write

FORMAT = "zoo-splats-1"
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
_MOST = 1 << 30  # bytes of a stream


@dataclass(frozen=True)
class Steps:
    """To what the attributes are rounded.

    Attributes:
        position: in units of the scene.
        scale: of the natural logarithm.
        rotation: of the three last parts of a unit quaternion, the first being positive.
        colour: of the base colour, in units of 1, and of luminance before chrominance.
        opacity: of the opacity, in units of 1.
        harmonics: of the coefficients beyond the first.
    """

    position: float
    scale: float = 0.12
    rotation: float = 0.03
    colour: float = 0.012
    opacity: float = 0.02
    harmonics: float = 0.03

    def times(self, factor: float) -> Steps:
        """All steps coarser by a factor."""
        return Steps(*(factor * value for value in vars(self).values()))


def steps_for(splats: Splats, factor: float = 1.0) -> Steps:
    """Steps in proportion to the scene: a position may be off by a share of the typical Gaussian."""
    size = splats.scales.detach().amax(1).exp().median() if len(splats) else torch.tensor(1.0)
    return Steps(position=0.15 * float(size)).times(factor)


# Luminance and two differences, as JPEG XL's YCoCg: chrominance is rounded twice as coarsely.
_YCOCG = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.0, -0.5], [-0.25, 0.5, -0.25]])
_COARSER = torch.tensor([1.0, 2.0, 2.0])


def rounded(splats: Splats, steps: Steps, source: str) -> tuple[Splats, Tensor, dict[str, numpy.ndarray]]:
    """The Gaussians in the order of a file, the origin [3] of their positions, and their attributes as whole
    numbers of steps: int64 [n, k] by name.

    Raises:
        DataError: a Gaussian that cannot be drawn, or an attribute of more than 2^31 steps.
    """
    splats = checked(splats.map(lambda tensor: tensor.detach().cpu().float()), source)
    splats = splats.rows(morton_order(splats.means))
    origin = splats.means.amin(0) if len(splats) else torch.zeros(3)
    unit = splats.quats / splats.quats.norm(dim=1, keepdim=True)
    unit = unit * torch.where(unit[:, :1] < 0, -1.0, 1.0)
    colour = (splats.sh[:, 0] * SH_C0 + 0.5) @ _YCOCG.T
    columns = {
        "position": (splats.means - origin) / steps.position,
        "scale": splats.scales.clamp(-20, 20) / steps.scale,
        "rotation": unit[:, 1:] / steps.rotation,
        "colour": colour.clamp(-8, 8) / steps.colour / _COARSER,
        "opacity": splats.opacities.sigmoid()[:, None] / steps.opacity,
        "harmonics": splats.sh[:, 1:].flatten(1) / steps.harmonics,
    }
    whole = {}
    for name, values in columns.items():
        if values.numel() and float(values.abs().max()) >= 2**31:
            most = float(values.abs().max())
            raise DataError(f"{source}: {name} of {most:.3g} steps; choose a coarser one")
        whole[name] = values.double().round().to(torch.int64).numpy()
    return splats, origin, whole


def write_packed(path: str | Path, splats: Splats, steps: Steps) -> int:
    """Write a scene; returns the number of bytes.

    Raises:
        DataError: as for `rounded`.
    """
    splats, origin, columns = rounded(splats, steps, str(path))
    streams = {"origin": origin.numpy(), "steps": numpy.array([*vars(steps).values()], numpy.float64)}
    for name, whole in columns.items():
        streams[name] = numpy.frombuffer(pack_integers(whole, differences=name == "position"), numpy.uint8)
    meta = {"format": FORMAT, "count": str(len(splats)), "bases": str(splats.sh.shape[1])}
    content = save(streams, metadata=meta)
    atomic_write(Path(path), content)
    return len(content)


def read_packed(path: str | Path) -> Splats:
    """The scene that `write_packed` wrote.

    Raises:
        DataError: another file, another version, or a damaged stream.
    """
    try:
        with safe_open(str(path), "numpy") as file:
            meta = file.metadata() or {}
            streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a packed scene: {error}") from error
    if meta.get("format") != FORMAT or not (meta.get("count", "x") + meta.get("bases", "x")).isdigit():
        raise DataError(f"{path}: format {meta.get('format')!r}; this code reads {FORMAT}")
    count, bases = int(meta["count"]), int(meta["bases"])
    if bases not in (1, 4, 9, 16, 25) or count >= _MOST:
        raise DataError(f"{path}: {count} Gaussians with {bases} harmonics")
    widths = {
        "position": 3,
        "scale": 3,
        "rotation": 3,
        "colour": 3,
        "opacity": 1,
        "harmonics": 3 * (bases - 1),
    }
    try:
        steps = Steps(**dict(zip(vars(Steps(1.0)), map(float, streams["steps"]), strict=True)))
        values: dict[str, Tensor] = {}
        for name, width in widths.items():
            whole = unpack_integers(streams[name].tobytes(), count, width, differences=name == "position")
            values[name] = torch.from_numpy(whole).double()
        origin = torch.from_numpy(streams["origin"]).double()
    except (KeyError, TypeError, ValueError, lzma.LZMAError) as error:
        raise DataError(f"{path}: a stream is missing or damaged: {error!r}") from error
    vector = values["rotation"] * steps.rotation
    first = (1 - vector.square().sum(1, keepdim=True)).clamp_min(1e-6).sqrt()
    colour = values["colour"] * steps.colour * _COARSER @ torch.linalg.inv(_YCOCG.double()).T
    sh = torch.cat(
        [
            ((colour - 0.5) / SH_C0)[:, None],
            (values["harmonics"] * steps.harmonics).reshape(count, bases - 1, 3),
        ],
        1,
    )
    opacity = (values["opacity"][:, 0] * steps.opacity).clamp(1e-6, 1 - 1e-6)
    splats = Splats(
        (values["position"] * steps.position + origin).float(),
        torch.cat([first, vector], 1).float(),
        (values["scale"] * steps.scale).float(),
        opacity.logit().float(),
        sh.float(),
    )
    return checked(splats, str(path))


def byte_planes(whole: numpy.ndarray, differences: bool) -> tuple[int, bytes]:
    """Integers [n, k], signs folded in, as their low bytes column by column, then the next ones: the number
    of bytes of each, and the bytes."""
    if differences and len(whole):
        whole = numpy.diff(whole, axis=0, prepend=0)
    folded = numpy.where(whole < 0, -2 * whole - 1, 2 * whole).astype("<u8")
    depth = max(1, math.ceil(int(folded.max(initial=0)).bit_length() / 8))
    planes = folded.T.copy().view(numpy.uint8).reshape(folded.shape[1], len(folded), 8)[:, :, :depth]
    return depth, numpy.ascontiguousarray(planes.transpose(2, 0, 1)).tobytes()


def pack_integers(whole: numpy.ndarray, differences: bool) -> bytes:
    """Integers [n, k] as few bytes: their number of planes, and the planes as LZMA."""
    depth, body = byte_planes(whole, differences)
    return bytes([depth]) + lzma.compress(body, lzma.FORMAT_RAW, filters=_FILTERS)


def unpack_integers(stream: bytes, count: int, width: int, differences: bool) -> numpy.ndarray:
    """The integers [count, width] of `pack_integers`, int64.

    Raises:
        ValueError, lzma.LZMAError: a damaged stream, or one of another size.
    """
    depth = stream[0] if stream else 0
    size = depth * width * count
    if not 1 <= depth <= 8 or size > _MOST:
        raise ValueError(f"{depth} bytes a number for {count} x {width} numbers")
    body = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS).decompress(stream[1:], size + 1)
    planes = numpy.frombuffer(body, numpy.uint8)
    if len(planes) != size:
        raise ValueError(f"{len(planes)} bytes where {size} are expected")
    full = numpy.zeros((width, count, 8), numpy.uint8)
    full[:, :, :depth] = planes.reshape(depth, width, count).transpose(1, 2, 0)
    folded = full.view("<u8")[:, :, 0].T.astype(numpy.int64)
    whole = numpy.where(folded & 1, -(folded >> 1) - 1, folded >> 1)
    return whole.cumsum(0) if differences else whole
