"""The edges that a sparse bundle keeps, and the graph that they were drawn on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch_geometric.data import Data

from zoo.errors import DataError
from zoo.graph.edges import apply_canonical_mask, canonical_order, cut_edges, fingerprint
from zoo.graph.teddy import ticket_mask
from zoo.shared.ops.cache import digest


@dataclass
class EdgeTicket:
    """An edge mask over the canonical order of one graph.

    Args:
        keep: True for the entries that stay, in canonical order; both directions agree.
        graph: fingerprint of the graph (see `zoo.graph.edges.fingerprint`).
        num_nodes: nodes of that graph.
    """

    keep: Bool[Tensor, " E"]
    graph: str
    num_nodes: int
    _last: tuple[tuple[int, ...], Tensor] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def draw(
        cls, edge_index: Int[Tensor, "2 E"], num_nodes: int, keep: Bool[Tensor, " E"], targets: int = 0
    ) -> EdgeTicket:
        """From a mask in the order in which `edge_index` stores its entries.

        Args:
            targets: nodes that edges lead to where they are of another kind than the `num_nodes` sources;
                their ids then follow the sources'.
        """
        joined, nodes = _joined(edge_index, num_nodes, targets)
        return cls(keep[canonical_order(joined, nodes)], fingerprint(joined, nodes), nodes)

    def mask_for(
        self, edge_index: Int[Tensor, "2 E"], num_nodes: int, targets: int = 0
    ) -> Bool[Tensor, " E"]:
        """The mask in the order of `edge_index`, which must be the ticket's graph (its entries in any order).

        Args:
            targets: as for `draw`.

        Raises:
            DataError: another graph.
        """
        seen = (digest(edge_index), *edge_index.shape, num_nodes, targets)
        if self._last is not None and self._last[0] == seen:  # sorting takes far longer than reading
            return self._last[1]
        joined, nodes = _joined(edge_index, num_nodes, targets)
        found = fingerprint(joined, nodes)
        if found != self.graph:
            raise DataError(
                f"This model's edge ticket belongs to the graph {self.graph[:12]} ({self.num_nodes} nodes, "
                f"{len(self.keep)} entries). Received: graph {found[:12]} ({nodes} nodes, "
                f"{edge_index.shape[1]} entries). Pass the graph it was drawn on (for a loader of parts, "
                "prune it first: ticket.prune(data)), or set "
                'model.edges = "whole" to use all edges as given, or "rescored" to draw new ones by degree.'
            )
        mask = apply_canonical_mask(joined, nodes, self.keep.to(edge_index.device))
        self._last = (seen, mask)
        return mask

    def prune(self, data: Data) -> Data:
        """The ticket's graph with the kept entries only, e.g. to be sampled by a loader.

        Raises:
            DataError: another graph.
        """
        return cut_edges(data, self.mask_for(data.edge_index, int(data.num_nodes or 0)))

    def rescored(
        self,
        edge_index: Int[Tensor, "2 E"],
        num_nodes: int,
        *,
        edge_weight: Float[Tensor, " E"] | None = None,
        self_loops: bool = False,
    ) -> Bool[Tensor, " E"]:
        """The mask of this graph, or of another one TEDDY's at the same share of dropped entries.

        Args:
            edge_weight: entries of A, for the score.
            self_loops: whether the model adds self-loops that count as entries; of these none is dropped.

        Raises:
            DataError: a graph that `ticket_mask` refuses.
        """
        if fingerprint(edge_index, num_nodes) == self.graph:
            return self.mask_for(edge_index, num_nodes)
        entries, share = edge_index.shape[1], 1 - int(self.keep.sum()) / len(self.keep)
        if self_loops:
            share *= entries / (entries + num_nodes)
        return ticket_mask(edge_index, num_nodes, share, edge_weight=edge_weight, add_self_loops=self_loops)

    def to_extras(self) -> dict[str, Tensor]:
        """As named tensors for a bundle: `edges/keep`, `edges/graph` (the fingerprint's bytes),
        `edges/nodes`.
        """
        return {
            "edges/keep": self.keep.cpu(),
            "edges/graph": torch.tensor(list(bytes.fromhex(self.graph)), dtype=torch.uint8),
            "edges/nodes": torch.tensor([self.num_nodes]),
        }

    @classmethod
    def from_extras(cls, extras: dict[str, Tensor]) -> EdgeTicket | None:
        """The inverse of `to_extras`; None where a bundle has no ticket.

        Raises:
            DataError: some of the tensors are missing or of another kind.
        """
        names = {"edges/keep", "edges/graph", "edges/nodes"}
        found = names & set(extras)
        if not found:
            return None
        if found != names:
            raise DataError(f"An edge ticket needs {sorted(names)}. Received only: {sorted(found)}.")
        keep, graph, nodes = extras["edges/keep"], extras["edges/graph"], extras["edges/nodes"]
        if keep.dtype != torch.bool or keep.dim() != 1 or graph.dtype != torch.uint8 or graph.numel() != 32:
            raise DataError(
                "The edge ticket is malformed: edges/keep must be bool [E], edges/graph uint8 [32]."
            )
        return cls(keep, bytes(graph.tolist()).hex(), int(nodes))


def _joined(edge_index: Tensor, num_nodes: int, targets: int) -> tuple[Tensor, int]:
    """Edges and number of nodes where targets, if they are of another kind, follow the sources."""
    if not targets:
        return edge_index, num_nodes
    return edge_index + edge_index.new_tensor([[0], [num_nodes]]), num_nodes + targets
