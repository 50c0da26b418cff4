"""Graphs of your own as files of plain arrays: `.npz` or `.safetensors`, never a pickle.

    save_graph(data, "mine.npz")       # any torch_geometric Data
    data = read_graph("mine.npz")      # checked; with a split

Arrays by name:

    x [n, f]              node features, floating-point
    edge_index [2, E]     both directions of every edge, each once
    y [n]                 class of each node from 0, -1 where it is not known
    edge_weight [E]       optional; the same for both directions
    train_mask, val_mask, test_mask [n]         optional, boolean, all three; else drawn, see `split_of`
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.data import BaseData

from zoo.bundles.sources import Source
from zoo.errors import DataError
from zoo.graph.edges import check_features, check_undirected, check_weight, homogeneous
from zoo.graph.splits import split_per_class
from zoo.shared.errors import FormatError
from zoo.shared.store.formats.manifest import check_unpacked
from zoo.shared.store.io import atomic_write, sha256_file

SUFFIXES = (".npz", ".safetensors")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")
_MASKS = ("train_mask", "val_mask", "test_mask")
_FORMAT = (FormatError, SafetensorError)
_NEEDED = ("x", "edge_index", "y")


def is_file(name: str) -> bool:
    """Whether a data set's name is that of a file."""
    return name.endswith((*SUFFIXES, *_PICKLES))


def save_graph(data: BaseData, path: str | os.PathLike[str]) -> Path:
    """Write a graph's arrays to a `.npz` or `.safetensors` file, the whole file or nothing.

    Raises:
        DataError: another ending, or a graph that `read_graph` would refuse.
    """
    path = Path(path)
    _check_suffix(path)
    checked = checked_graph(data, str(path))
    arrays = {name: array.contiguous() for name, array in checked.to_dict().items()}
    if path.suffix == ".npz":
        plain = {name: array.numpy() for name, array in arrays.items()}
        return atomic_write(path, lambda file: np.savez_compressed(file, **plain))
    return atomic_write(path, save(arrays))


def read_graph(path: str | os.PathLike[str]) -> Data:
    """The graph in a file, its entries in canonical order, with a split.

    Raises:
        DataError: the file is not there or of another kind, is a pickle, lacks an array, or holds a graph
            that is directed, has repeated entries, ids out of range, or values that are not finite.
    """
    path = Path(path)
    _check_suffix(path)
    try:
        arrays = _read_npz(path) if path.suffix == ".npz" else load_file(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file.") from error
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, *_FORMAT) as error:
        raise DataError(f"{path}: cannot be read as a {path.suffix} of plain arrays: {error}.") from error
    return _checked(arrays, str(path))


def checked_graph(data: BaseData, where: str) -> Data:
    """A graph of somebody else's, checked as one that was read from a file.

    Raises:
        DataError: as `read_graph`; the message starts with `where`.
    """
    graph = homogeneous(data, where)
    names = (*_NEEDED, "edge_weight", *_MASKS)
    return _checked(
        {name: graph[name].detach().cpu() for name in names if graph.get(name) is not None}, where
    )


def source_of(path: str | os.PathLike[str]) -> Source:
    """What a card says of a file: its name and content."""
    return Source(Path(path).name, f"a file of its owner, sha256 {sha256_file(path)}", "not stated")


def split_of(
    y: Int[Tensor, " nodes"],
) -> tuple[Bool[Tensor, " nodes"], Bool[Tensor, " nodes"], Bool[Tensor, " nodes"]]:
    """The split of a file that has none: 20 training and 30 validation nodes per class, drawn with seed 0,
    the rest for testing; of classes with fewer than 100 nodes a fifth and three tenths.
    """
    known = (y >= 0).nonzero().flatten()
    smallest = int(y[known].bincount().clamp(min=1).min()) if len(known) else 0
    train, val = (20, 30) if smallest >= 100 else (max(1, smallest // 5), max(1, 3 * smallest // 10))
    masks = []
    for part in split_per_class(y[known], train=train, val=val, seed=0):
        mask = torch.zeros(len(y), dtype=torch.bool)
        mask[known[part]] = True
        masks.append(mask)
    return masks[0], masks[1], masks[2]


def _check_suffix(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise DataError(
            f"{path} is a pickle, which can run code when it is read, and is not read. Load it yourself if "
            "you trust it, and write plain arrays: zoo.graph.save_graph(data, 'graph.npz')."
        )
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: a graph is a file {' or '.join(SUFFIXES)}.")


def _read_npz(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        check_unpacked(path, sum(entry.file_size for entry in archive.infolist()), path.stat().st_size)
    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _checked(arrays: dict[str, Tensor], where: str) -> Data:
    """The graph of these arrays.

    Raises:
        DataError: it is none that the zoo's methods can be run on.
    """
    if missing := [name for name in _NEEDED if name not in arrays]:
        raise DataError(f"{where}: it lacks {missing[0]!r}; a graph has {', '.join(_NEEDED)}.")
    x, y, edge_index = arrays["x"], arrays["y"], arrays["edge_index"]
    if x.dim() != 2 or not x.is_floating_point() or not x.numel():
        raise DataError(f"{where}: x is {x.dtype} {list(x.shape)}, not floating-point [nodes, features].")
    if y.shape != x.shape[:1] or y.dtype.is_floating_point or y.dtype == torch.bool or int(y.max()) < 1:
        raise DataError(
            f"{where}: y is {y.dtype} {list(y.shape)}, not the classes, two or more, of {len(x)} nodes."
        )
    edge_index, x, y = edge_index.long(), x.float(), y.long()
    weight = arrays.get("edge_weight")
    try:
        check_features(x)
        check_undirected(edge_index, len(x))
        if weight is not None:
            check_weight(edge_index, weight, len(x))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    given = [arrays[name] for name in _MASKS if name in arrays]
    if given and (len(given) < 3 or any(m.dtype != torch.bool or m.shape != y.shape for m in given)):
        raise DataError(f"{where}: a split is {', '.join(_MASKS)}, each boolean [{len(y)}].")
    masks = given or split_of(y)
    for name, mask in zip(_MASKS, masks, strict=True):
        if not bool(mask.any()) or bool((y[mask] < 0).any()):
            raise DataError(f"{where}: {name} is empty, or takes nodes of unknown class.")
    named = dict(zip(_MASKS, masks, strict=True))
    extra = {} if weight is None else {"edge_weight": weight.float()}
    data: Data = Data(x=x, edge_index=edge_index, y=y, **named, **extra).coalesce()
    return data
