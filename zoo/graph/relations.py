"""TEDDY's score on graphs with several kinds of nodes and edges, relation by relation.

The paper prunes one undirected graph. A relation A [sources, targets], authors who wrote papers say, is one
over its sources and targets together,

    [[0, A], [A^T, 0]],

in which an author's degree is the papers and a paper's degree the authors. Each relation is scored by itself
and loses its own share; a relation among nodes of one kind is scored as it is where it is undirected, and
likewise as two sides where it is not (papers that cite papers). This is the zoo's extension. A relation and
its reverse (`ToUndirected` makes `rev_wrote`) are one set of edges: what goes from one goes from the other.

    pruned = TeddyPrune(0.3)(data)                            # or {("author", "wrote", "paper"): 0.5}
    model = PrunedRelations.draw(my_model, data, 0.3)         # model(data.x_dict, data.edge_index_dict)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from zoo.errors import DataError
from zoo.graph.edges import apply_canonical_mask, canonical_order, check_undirected
from zoo.graph.teddy import check_sparsity, ticket_mask
from zoo.graph.ticket import EdgeTicket

Kind = tuple[str, str, str]  # source, relation, target, as torch-geometric names edge types
Shares = float | Mapping[Kind, float]


def relation_masks(data: HeteroData, sparsity: Shares) -> dict[Kind, Bool[Tensor, " E"]]:
    """Which entries of each relation stay; both directions of an edge are one decision.

    Args:
        data: `edge_weight` of a relation, where there is one, are its entries of A.
        sparsity: share of the entries to drop of every relation, or by relation; those that are not named
            keep all.

    Raises:
        DataError: no relations, a share out of range, an unknown relation, ids out of range, repeated
            entries, or weights that `ticket_mask` refuses.
    """
    kinds = list(data.edge_types)
    if not kinds:
        raise DataError("The graph has no relation to prune.")
    unknown = [kind for kind in sparsity if kind not in kinds] if isinstance(sparsity, Mapping) else []
    if unknown:
        raise DataError(f"The graph has no relation {unknown[0]!r}; it has {', '.join(map(str, kinds))}.")
    masks: dict[Kind, Tensor] = {}
    for kind in kinds:
        share = sparsity.get(kind, 0.0) if isinstance(sparsity, Mapping) else sparsity
        twin = next((one for one in masks if _reverse(data, one, kind)), None)
        try:
            check_sparsity(share, f"sparsity of {kind}")
            if twin is None:
                masks[kind] = _mask(data, kind, share)
            else:
                masks[kind] = _mirrored(data, twin, kind, masks[twin])
        except DataError as error:
            raise DataError(f"The relation {kind}: {error}") from error
    return masks


def _sizes(data: HeteroData, kind: Kind) -> tuple[int, int]:
    """How many nodes its sources and its targets are."""
    sizes = [data[name].num_nodes for name in (kind[0], kind[2])]
    if None in sizes:
        raise DataError("the number of nodes is unknown: set num_nodes or x of both kinds.")
    return int(sizes[0]), int(sizes[1])


def _undirected(edge_index: Tensor, nodes: int) -> bool:
    try:
        check_undirected(edge_index, nodes)
    except DataError:
        return False
    return True


def _mask(data: HeteroData, kind: Kind, share: float) -> Tensor:
    store, (sources, targets) = data[kind], _sizes(data, kind)
    edges, weight = store.edge_index, store.get("edge_weight")
    if kind[0] == kind[2] and _undirected(edges, sources):
        return ticket_mask(edges, sources, share, edge_weight=weight)
    across = edges + edges.new_tensor([[0], [sources]])
    both = None if weight is None else torch.cat([weight, weight])
    nodes = sources + targets
    keep = ticket_mask(torch.cat([across, across.flip(0)], 1), nodes, share, edge_weight=both)
    return keep[: edges.shape[1]]


def _reverse(data: HeteroData, one: Kind, other: Kind) -> bool:
    """Whether two relations hold the same edges in opposite directions."""
    if (one[0], one[2]) != (other[2], other[0]):
        return False
    a, b = data[one].edge_index, data[other].edge_index.flip(0)
    if a.shape != b.shape:
        return False
    nodes = max(_sizes(data, one))
    return torch.equal(a[:, canonical_order(a, nodes)], b[:, canonical_order(b, nodes)])


def _mirrored(data: HeteroData, one: Kind, other: Kind, keep: Tensor) -> Tensor:
    """The mask of the reverse relation in its own order."""
    nodes, edges = max(_sizes(data, one)), data[one].edge_index
    canonical = keep[canonical_order(edges, nodes)]
    return apply_canonical_mask(data[other].edge_index.flip(0), nodes, canonical)


class PrunedRelations(nn.Module):
    """A module for several kinds of nodes that sees the kept edges only: HeteroConv, `to_hetero` models, HGT.

    Args:
        module: called as `module(x_dict, edge_index_dict, ...)`; keyword arguments that are dictionaries by
            relation and whose name starts with `edge_` are cut with the edges.
        tickets: which edges stay, by relation.

    Raises:
        DataError: when called, a relation without a ticket, or another graph than the tickets'.
    """

    def __init__(self, module: nn.Module, tickets: Mapping[Kind, EdgeTicket]) -> None:
        super().__init__()
        self.module, self.tickets = module, dict(tickets)

    @classmethod
    def draw(cls, module: nn.Module, data: HeteroData, sparsity: Shares) -> PrunedRelations:
        """Tickets of this graph, see `relation_masks`; to draw them of a changed graph, call it again.

        Raises:
            DataError: as `relation_masks`.
        """
        masks = relation_masks(data, sparsity)
        return cls(module, {kind: _drawn(data, kind, keep) for kind, keep in masks.items()})

    def forward(
        self, x: Mapping[str, Tensor], edge_index: Mapping[Kind, Int[Tensor, "2 E"]], **kwargs: Any
    ) -> Any:
        """What the module makes of the kept edges."""
        if unknown := [kind for kind in edge_index if kind not in self.tickets]:
            raise DataError(f"There is no ticket for the relation {unknown[0]}; draw them of this graph.")
        keep = {}
        for kind, edges in edge_index.items():
            sources, targets = len(x[kind[0]]), len(x[kind[2]])
            try:
                keep[kind] = self.tickets[kind].mask_for(edges, sources, targets)
            except DataError as error:
                raise DataError(f"The relation {kind}: {error}") from error
        cut = {
            name: {kind: value[keep[kind]] for kind, value in values.items()}
            if name.startswith("edge_") and isinstance(values, Mapping)
            else values
            for name, values in kwargs.items()
        }
        return self.module(x, {kind: edges[:, keep[kind]] for kind, edges in edge_index.items()}, **cut)


def _drawn(data: HeteroData, kind: Kind, keep: Tensor) -> EdgeTicket:
    sources, targets = _sizes(data, kind)
    return EdgeTicket.draw(data[kind].edge_index, sources, keep, targets)
