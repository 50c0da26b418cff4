"""Coordinates on a grid (voxels, patches, points): the cell of a point, keys of cells, windows.

Sites are integer coordinates, one row each; rows of features go beside them in the same order. Everything is
integer arithmetic, so that the result does not depend on the order of the points or on threads. Which sites
meet in a convolution is in `zoo.shared.ops.rulebook`.
"""

from __future__ import annotations

from .coordinates import pack_keys, quantize, unpack_keys
from .windows import Windows, windows

__all__ = ["Windows", "pack_keys", "quantize", "unpack_keys", "windows"]
