"""What graph convolutions cost, told to `zoo.shared.measure.account`: projections of all nodes and
messages along all
edges.

A self-loop costs a message and is never dropped. GIN's linear map is counted before the sum, where it is
cheaper.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch_geometric.nn as pyg
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.graph.adjacency import Adjacency
from zoo.graph.models import GINLayer, GraphModel
from zoo.shared.masks import masks_of, set_masks
from zoo.shared.measure.account import Account, Counting, Macs, count, register_counter, register_messages


def count_graph(
    model: GraphModel, x: Float[Tensor, "nodes features"], edge_index: Int[Tensor, "2 E"]
) -> Account:
    """The account of one forward pass on a graph: dense with all its edges, kept with those of the model's
    ticket.
    """
    masks = masks_of(model)
    whole = copy.deepcopy(model).float().eval()  # half-precision storage is computed on as float32
    set_masks(whole, masks)
    edges = None
    if model.ticket is not None and model.edges == "ticket":
        edges = model.ticket.mask_for(edge_index, len(x))
    whole.edges = "whole"
    with torch.no_grad():
        return count(whole, (x, edge_index), masks=masks, edges=edges)


def _gcn(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any, counting: Counting) -> Macs:
    nodes, width = output.shape
    edges, loops = _edges(args[1], nodes, loops=True)
    return counting.product(module.lin.weight, nodes).plus(counting.messages(edges, width, loops))  # type: ignore


def _gin(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any, counting: Counting) -> Macs:
    nodes, width = output.shape
    edges, _ = _edges(args[1], nodes, loops=False)
    return counting.product(module.nn.weight, nodes).plus(counting.messages(edges, width, loops=nodes))  # type: ignore


def _gat(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any, counting: Counting) -> Macs:
    nodes = output.shape[0]
    edges, loops = _edges(args[1], nodes, loops=True)
    width = int(module.heads * module.out_channels)  # type: ignore[operator]
    total = counting.product(module.lin.weight, nodes)  # type: ignore
    for attention in (module.att_src, module.att_dst):
        total = total.plus(counting.product(attention, nodes))  # type: ignore[arg-type]
    return total.plus(counting.messages(edges, width, loops))


def _edges(graph: Tensor | Adjacency, nodes: int, *, loops: bool) -> tuple[int, int]:
    """Edges as given, and self-loops that the layer adds."""
    if isinstance(graph, Adjacency):
        inside = int((graph.matrix.row == graph.matrix.col).sum()) if loops else 0
        return graph.matrix.entries - inside, inside
    if not loops:
        return graph.shape[1], 0
    return graph.shape[1], nodes - int(torch.unique(graph[0, graph[0] == graph[1]]).numel())


register_messages(pyg.MessagePassing)  # what has no counter of its own: SAGEConv, GraphConv, GINConv ...
register_counter(pyg.GCNConv, _gcn)
register_counter(GINLayer, _gin)
register_counter(pyg.GATConv, _gat)
