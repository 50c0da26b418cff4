"""Graphs by name or file, each with features, labels and a fixed split.

A name is one of the zoo's or of a plug-in's (entry points `zoo.datasets`, `graph/NAME` -> a function that
returns a torch_geometric Data); a file is as `zoo.graph.files` says.

Planetoid's and the Coauthor graph go through torch-geometric's own loaders. Their raw files come from
`$ZOO_DATA/planetoid/<Name>/raw` and `$ZOO_DATA/graphs-npz` if that folder is set, else from torch-geometric's
download; they are processed once in the cache folder (`$ZOO_CACHE`, by default ~/.cache/sparse-model-zoo).
Planetoid's raw files are pickles, which can run code when read, and torch-geometric's own download compares
nothing: each must have the hash below before any is read. The Coauthor graph is an archive of plain arrays,
read without pickle. `digits` is embedded: it needs no file and no network.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from torch_geometric.data import Data
from torch_geometric.datasets import Coauthor, Planetoid
from torch_geometric.transforms import NormalizeFeatures

from zoo.bundles.catalog import cache_folder
from zoo.bundles.sources import Source
from zoo.errors import DataError, MissingDataError
from zoo.graph.digits import digits_graph
from zoo.graph.files import checked_graph, is_file, read_graph, source_of
from zoo.graph.splits import split_per_class
from zoo.registry import DATASETS
from zoo.shared.store.io import sha256_file

# SHA-256 of the raw files as kimiyoung/planetoid publishes them.
_SHA256 = {
    "ind.citeseer.allx": "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
    "ind.citeseer.ally": "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
    "ind.citeseer.graph": "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
    "ind.citeseer.test.index": "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
    "ind.citeseer.tx": "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
    "ind.citeseer.ty": "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
    "ind.citeseer.x": "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
    "ind.citeseer.y": "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
    "ind.cora.allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
    "ind.cora.ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
    "ind.cora.graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
    "ind.cora.test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    "ind.cora.tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
    "ind.cora.ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
    "ind.cora.x": "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
    "ind.cora.y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
    "ind.pubmed.ally": "0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e",
    "ind.pubmed.graph": "5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9",
    "ind.pubmed.test.index": "b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5",
    "ind.pubmed.tx": "4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d",
    "ind.pubmed.ty": "ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd",
    "ind.pubmed.x": "fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33",
    "ind.pubmed.y": "e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3",
}
# Of the largest file only the name of its git object (a SHA-1) could be read off the repository.
_GIT_BLOB = {"ind.pubmed.allx": "3b86bccf08111c37c632a9dd8ab63db25ea76361"}


SOURCES = {
    "cora": Source("Cora (Planetoid public split)", "kimiyoung/planetoid", "not stated (repository: MIT)"),
    "citeseer": Source(
        "CiteSeer (Planetoid public split)", "kimiyoung/planetoid", "not stated (repository: MIT)"
    ),
    "pubmed": Source(
        "PubMed (Planetoid public split)", "kimiyoung/planetoid", "not stated (repository: MIT)"
    ),
    "cs": Source(
        "Coauthor-CS (20 training and 30 validation nodes per class, fixed draw)",
        "shchur/gnn-benchmark",
        "not stated (repository: MIT)",
    ),
    "digits": Source(
        "8-nearest-neighbour graph over the scikit-learn digits",
        "UCI Optical Recognition of Handwritten Digits, through scikit-learn",
        "CC BY 4.0",
    ),
}


def load_graph(name: str) -> Data:
    """The graph of that name or file: x [n, f], edge_index [2, E] in canonical order, y [n], train_mask,
    val_mask, test_mask.

    Features of the citation and co-author graphs are row-normalised to sum 1, as TEDDY does.

    Raises:
        DataError: an unknown name, raw files that are neither in ZOO_DATA nor to be had by download, raw
            files that are not the published ones, or a graph that `zoo.graph.files.checked_graph` refuses.
    """
    if is_file(name):
        return read_graph(name)
    data: Data = _entry(name)()
    return data if name in SOURCES else checked_graph(data, f"The data set {name!r}")


def source_named(name: str) -> Source:
    """What a card says of a graph by name or file."""
    if is_file(name):
        return source_of(name)
    if name in SOURCES:
        return SOURCES[name]
    found: Source = getattr(_entry(name), "source", Source(name, "a plug-in", "not stated"))
    return found


def _entry(name: str) -> Callable[[], Any]:
    if f"graph/{name}" not in DATASETS:
        there = ", ".join(each.partition("/")[2] for each in DATASETS.names("graph/*"))
        raise DataError(
            f"Unknown graph {name!r}. There are: {there}; or give a file, graph.npz say, that "
            "zoo.graph.save_graph writes."
        )
    return DATASETS.get(f"graph/{name}")


def _published(name: str) -> Data:
    folder = cache_folder() / "graphs" / name
    if not (folder / _PLACES[name].processed).exists():
        _build(name, folder)
    data = _open(name, folder)
    if name == "cs":
        data.train_mask, data.val_mask, data.test_mask = split_per_class(data.y, train=20, val=30, seed=0)
    return data


cora = functools.partial(_published, "cora")
citeseer = functools.partial(_published, "citeseer")
pubmed = functools.partial(_published, "pubmed")
cs = functools.partial(_published, "cs")
digits = digits_graph


@dataclass(frozen=True)
class _Place:
    """Where torch-geometric looks for a graph's raw files, and where ZOO_DATA holds them."""

    source: str
    raw: str
    processed: str
    files: tuple[str, ...]


def _planetoid(folder: str) -> _Place:
    parts = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
    files = tuple(f"ind.{folder.lower()}.{part}" for part in parts)
    return _Place(f"planetoid/{folder}/raw", f"{folder}/raw", f"{folder}/processed/data.pt", files)


_PLACES = {
    "cora": _planetoid("Cora"),
    "citeseer": _planetoid("CiteSeer"),
    "pubmed": _planetoid("PubMed"),
    "cs": _Place("graphs-npz", "CS/raw", "CS/processed/data.pt", ("ms_academic_cs.npz",)),
}


class _CheckedPlanetoid(Planetoid):
    """Planetoid that refuses unknown pickles."""

    def process(self) -> None:
        for path in map(Path, self.raw_paths):
            _check_hash(path)
        super().process()


def _check_hash(path: Path) -> None:
    known, found = _SHA256.get(path.name), sha256_file(path)
    if blob := _GIT_BLOB.get(path.name):
        content = path.read_bytes()
        known, found = blob, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if known != found:
        expected = f"{known[:16]}..." if known else "a known one"
        raise DataError(
            f"{path} is not the published file: its hash is {found[:16]}... instead of {expected}. It is a "
            "pickle, could run code when read, and is not read. Delete it and fetch it again."
        )


def _open(name: str, folder: Path) -> Data:
    transform = NormalizeFeatures()
    with contextlib.redirect_stderr(io.StringIO()):  # torch-geometric reports its processing there
        dataset: Any
        if name == "cs":
            dataset = Coauthor(str(folder), "CS", transform=transform)
        else:
            dataset = _CheckedPlanetoid(str(folder), _PLACES[name].raw.split("/")[0], transform=transform)
    data: Data = dataset[0].coalesce()
    return data


def _build(name: str, folder: Path) -> None:
    """Fill `folder` with raw and processed files, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}."))
    except OSError as error:
        raise DataError(
            f"The cache {folder.parent} cannot be written ({error.strerror}): set ZOO_CACHE."
        ) from error
    try:
        copied = _copy_raw(name, scratch)
        if not copied and os.environ.get("ZOO_OFFLINE") == "1":
            raise MissingDataError(
                f"The raw files of {name} are not in ZOO_DATA, and ZOO_OFFLINE=1 forbids the download."
            )
        try:
            _open(name, scratch)
        except (OSError, aiohttp.ClientError, asyncio.TimeoutError) as error:  # what the download may raise
            if copied:
                raise
            raise MissingDataError(
                f"The raw files of {name} are not in ZOO_DATA and could not be downloaded "
                f"({type(error).__name__}: {error}). Put them into $ZOO_DATA/{_PLACES[name].source}."
            ) from error
        with contextlib.suppress(OSError):  # another process was faster: its copy is as good
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copy_raw(name: str, target: Path) -> bool:
    """Copy a graph's raw files from ZOO_DATA; False if they are not there."""
    root = os.environ.get("ZOO_DATA")
    if not root:
        return False
    if not Path(root).is_dir():
        raise MissingDataError(f"ZOO_DATA names a folder that is not there: {root}.")
    place = _PLACES[name]
    source = Path(root) / place.source
    if not all((source / file).is_file() for file in place.files):
        return False
    raw = target / place.raw
    raw.mkdir(parents=True)
    for file in place.files:
        shutil.copyfile(source / file, raw / file)
    return True
