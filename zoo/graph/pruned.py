"""An edge ticket around any module of torch-geometric: convolutions, stacks of them, models of your own.

model = PrunedEdges.draw(my_model, data, 0.3)     # TEDDY's score, edge_weight if there is one
logits = model(data.x, data.edge_index, edge_weight=data.edge_weight)
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor, nn
from torch_geometric.data.data import BaseData

from zoo.errors import DataError
from zoo.graph.edges import homogeneous
from zoo.graph.teddy import ticket_mask
from zoo.graph.ticket import EdgeTicket


class PrunedEdges(nn.Module):
    """A module that sees the kept edges only.

    Args:
        module: called as `module(x, edge_index, ...)`; keyword arguments with an entry per edge whose name
            starts with `edge_` are cut with the edges.
        ticket: which edges stay, of which graph.
        changed: what happens to another graph, one with a new edge say: `refuse` it, or `rescore` it by
            TEDDY at the ticket's share.

    Raises:
        DataError: when called, a graph that `ticket_mask` refuses, or another graph than the ticket's.
    """

    def __init__(
        self, module: nn.Module, ticket: EdgeTicket, changed: Literal["refuse", "rescore"] = "refuse"
    ) -> None:
        super().__init__()
        self.module, self.ticket, self.changed = module, ticket, changed

    @classmethod
    def draw(
        cls,
        module: nn.Module,
        data: BaseData,
        sparsity: float,
        changed: Literal["refuse", "rescore"] = "refuse",
    ) -> PrunedEdges:
        """A ticket of this graph by TEDDY's score, weighted if the graph has `edge_weight`.

        Raises:
            DataError: as `ticket_mask`.
        """
        graph = homogeneous(data, "PrunedEdges")
        nodes = int(graph.num_nodes or 0)
        keep = ticket_mask(graph.edge_index, nodes, sparsity, edge_weight=graph.get("edge_weight"))
        return cls(module, EdgeTicket.draw(graph.edge_index, nodes, keep), changed)

    def forward(self, x: Tensor, edge_index: Int[Tensor, "2 E"], *args: Any, **kwargs: Any) -> Any:
        """What the module makes of the kept edges."""
        entries = edge_index.shape[1]
        per_edge = [value for value in args if isinstance(value, Tensor) and value.shape[:1] == (entries,)]
        if per_edge and entries != len(x):
            raise DataError("Name what belongs to edges: edge_weight=..., edge_attr=....")
        if self.changed == "rescore":
            keep = self.ticket.rescored(edge_index, len(x), edge_weight=kwargs.get("edge_weight"))
        else:
            keep = self.ticket.mask_for(edge_index, len(x))
        cut = {
            name: value[keep] if name.startswith("edge_") and isinstance(value, Tensor) else value
            for name, value in kwargs.items()
        }
        return self.module(x, edge_index[:, keep], *args, **cut)
