"""Coordinate sets (voxels, patches, tokens, points): unique, lookup, windows, neighbours, gather and scatter.

Sites are integer coordinates on a grid, one row each; rows of features go beside them in the same order.
Everything is integer arithmetic and sorting, so that the result does not depend on the order of the points or
on threads.
"""

from __future__ import annotations

from .coordinates import SiteSet, Unique, pack_keys, quantize, unique_sites, unpack_keys
from .groups import Padding, Windows, gather_rows, rank_in_group, scatter_rows, windows
from .rulebook import Rulebook, convolve, neighbour_table, strided_rulebook, submanifold_rulebook

__all__ = [
    "Padding",
    "Rulebook",
    "SiteSet",
    "Unique",
    "Windows",
    "convolve",
    "gather_rows",
    "neighbour_table",
    "pack_keys",
    "quantize",
    "rank_in_group",
    "scatter_rows",
    "strided_rulebook",
    "submanifold_rulebook",
    "unique_sites",
    "unpack_keys",
    "windows",
]
