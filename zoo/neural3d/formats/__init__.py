"""Files of Gaussian scenes: .ply (plain and compressed), .splat, .spz and SOG, told apart by their first
bytes.

Nothing in a file is run. What a file says of itself is held against its size before memory is asked for, and
a damaged file is refused with the line or the byte where it stops making sense.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from zoo.errors import DataError
from zoo.neural3d.splats import Splats, checked

WRITERS = {".ply": "ply", ".spz": "spz", ".sog": "sog"}


def read_splats(path: str | Path) -> Splats:
    """The scene in a file, or in the folder of a SOG scene.

    Raises:
        DataError: no such file, a format that is none of these, or a damaged file.
    """
    path = Path(path)
    if path.is_dir() or path.name == "meta.json":
        return _module("sog").read(path)
    try:
        start = path.open("rb").read(4)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if start[:3] == b"ply":
        kind = "ply"
    elif start == b"NGSP" or start[:2] == b"\x1f\x8b":
        kind = "spz"
    elif start[:2] == b"PK":
        kind = "sog"
    elif path.suffix == ".splat":
        kind = "splat"
    else:
        raise DataError(
            f"{path} is no scene of Gaussians: .ply, .splat, .spz, .sog and folders of SOG are read"
        )
    return checked(_module(kind).read(path), str(path))


def write_splats(path: str | Path, splats: Splats) -> None:
    """Write a scene as .ply (exact), .spz or .sog (both rounded), by the name's ending.

    Raises:
        DataError: another ending, or a Gaussian that cannot be drawn.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise DataError(f"{path}: scenes are written as {', '.join(WRITERS)}; received {path.suffix!r}")
    _module(WRITERS[path.suffix]).write(path, checked(splats, str(path)))


def _module(kind: str) -> Any:
    return importlib.import_module(f"zoo.neural3d.formats.{kind}")
