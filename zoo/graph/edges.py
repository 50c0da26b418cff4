"""The edges of an undirected graph: what is refused, the canonical order, and the fingerprint that ties a
mask to it.

A graph is given as PyG's `edge_index` [2, E] of int64 with both directions of every edge. Its *canonical
order* is the lexicographic order of the entries (source, then target), which is the order of PyG's
`coalesce`. Everything here is
linear in the number of entries: the sorting is a counting sort (coordinates to CSR).
"""

from __future__ import annotations

import hashlib

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from zoo.errors import DataError


def homogeneous(data: object, what: str) -> Data:
    """A graph with one kind of nodes and edges.

    Raises:
        DataError: several kinds, or no graph of torch-geometric.
    """
    if isinstance(data, HeteroData):
        raise DataError(
            f"{what} needs a homogeneous graph. Received: HeteroData with {len(data.edge_types)} kinds of "
            "edges. TeddyPrune and PrunedRelations take it relation by relation; "
            "torch_geometric.transforms.ToUndirected()(data).to_homogeneous() makes one kind of them."
        )
    if not isinstance(data, Data) or data.edge_index is None:
        raise DataError(f"{what} needs a homogeneous graph with edge_index. Received: {type(data).__name__}.")
    return data


def cut_edges(data: Data, keep: Bool[Tensor, " E"]) -> Data:
    """The graph with its kept entries and all that belongs to them.

    The candidates of a link task (`edge_label`, `edge_label_index` of RandomLinkSplit) are no entries, also
    where there are as many of them, and stay.
    """
    pruned: Data = data.edge_subgraph(keep)
    for name in list(data.to_dict()):
        if name.startswith("edge_label"):
            pruned[name] = data[name]
    return pruned


def check_ids(edge_index: Tensor, num_nodes: int) -> None:
    """Refuse what is no edge list over `num_nodes` nodes.

    Raises:
        DataError: wrong shape or dtype, or an id below 0 or at least `num_nodes`.
    """
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise DataError(f"edge_index must have the shape [2, E]. Received: {list(edge_index.shape)}.")
    if edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype == torch.bool:
        raise DataError(f"edge_index must hold integers (int64). Received: {edge_index.dtype}.")
    if edge_index.numel() == 0:
        return
    low, high = int(edge_index.min()), int(edge_index.max())
    if low < 0 or high >= num_nodes:
        wrong = low if low < 0 else high
        raise DataError(
            f"edge_index names node {wrong}, but the graph has the nodes 0 to {num_nodes - 1}: "
            "fix the ids or the number of nodes."
        )


def check_features(x: Float[Tensor, "nodes features"]) -> None:
    """Refuse features that are not finite.

    Raises:
        DataError: NaN or infinity; the message names the first such node.
    """
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = (~finite).nonzero()
        raise DataError(
            f"Node features are not finite: {len(bad)} entries, the first of node {int(bad[0, 0])}, "
            f"feature {int(bad[0, 1])}. Impute or drop them first."
        )


def check_undirected(edge_index: Tensor, num_nodes: int) -> None:
    """Refuse a directed graph, and one that holds an entry twice.

    Raises:
        DataError: an id out of range, a repeated entry, or an entry without its opposite.
    """
    check_ids(edge_index, num_nodes)
    row, col = (ids.to(torch.int32).cpu().numpy() for ids in edge_index)
    ones = np.ones(len(row), dtype=np.int8)
    matrix = scipy.sparse.coo_matrix((ones, (row, col)), shape=(num_nodes, num_nodes)).tocsr()
    if matrix.nnz != len(row):  # the conversion has summed what was there twice
        raise DataError(
            f"edge_index holds {len(row) - matrix.nnz} repeated entries: "
            "merge them with torch_geometric.utils.coalesce."
        )
    mirror = matrix.tocsc()  # its columns are the rows of the transpose
    if np.array_equal(mirror.indptr, matrix.indptr) and np.array_equal(mirror.indices, matrix.indices):
        return
    lonely = (matrix - matrix.T.tocsr()).tocoo()
    first = int(np.flatnonzero(lonely.data > 0)[0])
    source, target = int(lonely.row[first]), int(lonely.col[first])
    raise DataError(
        f"The graph is directed: it has the edge ({source}, {target}) but not ({target}, {source}). "
        "Make it undirected with torch_geometric.transforms.ToUndirected()."
    )


def check_weight(edge_index: Int[Tensor, "2 E"], weight: Tensor, num_nodes: int) -> None:
    """Refuse weights that are no degrees' parts, or that differ between the directions of an edge.

    Raises:
        DataError: another shape, a negative or infinite weight, NaN, or two weights for one edge.
    """
    if weight.dim() != 1 or len(weight) != edge_index.shape[1]:
        raise DataError(
            f"edge_weight must have one entry per edge, shape [{edge_index.shape[1]}]. Received: "
            f"{list(weight.shape)}."
        )
    wrong = ~(weight >= 0) | torch.isinf(weight)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise DataError(
            f"Edge weights must be finite and not negative, as their sums are degrees. Received: "
            f"{float(weight[first])} at entry {first}."
        )
    order = canonical_order(edge_index, num_nodes)
    differ = weight[order] != weight[canonical_order(edge_index.flip(0), num_nodes)]
    if bool(differ.any()):
        source, target = edge_index[:, order[int(differ.nonzero()[0])]].tolist()
        raise DataError(
            f"edge_weight differs between ({source}, {target}) and ({target}, {source}): TEDDY prunes "
            "undirected graphs. Average the two with torch_geometric.transforms.ToUndirected(reduce='mean')."
        )


def canonical_order(edge_index: Int[Tensor, "2 E"], num_nodes: int) -> Int[Tensor, " E"]:
    """`edge_index[:, order]` is in canonical order (sorted by source, then by target)."""
    return torch.argsort(edge_index[0].long() * num_nodes + edge_index[1].long(), stable=True)


def fingerprint(edge_index: Int[Tensor, "2 E"], num_nodes: int) -> str:
    """SHA-256 (hexadecimal) of the number of nodes and the entries in canonical order, as little-endian
    int64.

    The order in which the entries are stored does not matter; each entry does.
    """
    ordered = edge_index[:, canonical_order(edge_index, num_nodes)].cpu().numpy().astype("<i8")
    digest = hashlib.sha256(np.array([num_nodes], dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(ordered).tobytes())
    return digest.hexdigest()


def apply_canonical_mask(
    edge_index: Int[Tensor, "2 E"], num_nodes: int, keep: Bool[Tensor, " E"]
) -> Bool[Tensor, " E"]:
    """Reorder a mask over the canonical order to the order in which `edge_index` stores its entries."""
    mask = torch.empty_like(keep)
    mask[canonical_order(edge_index, num_nodes)] = keep
    return mask
