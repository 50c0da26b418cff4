"""TEDDY's edge pruning as a torch-geometric transform, for any pipeline and any model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch_geometric.data import Batch, HeteroData
from torch_geometric.data.data import BaseData
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.transforms import BaseTransform

from zoo.errors import DataError
from zoo.graph.edges import check_features, check_undirected, check_weight, cut_edges, homogeneous
from zoo.graph.relations import Shares, relation_masks
from zoo.graph.teddy import check_sparsity, edge_scores, keep_highest


@functional_transform("zoo_teddy_prune")
class TeddyPrune(BaseTransform):
    """Drop the edges of lowest TEDDY score, both directions of an edge together.

        transform = T.Compose([T.NormalizeFeatures(), TeddyPrune(0.3)])

    Everything that belongs to edges (`edge_attr`, `edge_weight`, ...) is cut with them. `edge_weight`, where
    there is one, holds the entries of A, so that degrees are its sums. Self-loops stay to the last. For
    attention with self-loops, put `T.AddSelfLoops()` first, as TEDDY does for GAT. A HeteroData is pruned
    relation by relation (`zoo.graph.relations`), a batch of graphs graph by graph; candidates of a link task
    (`edge_label_index`) stay.

    Args:
        sparsity: share of the entries to drop, in [0, 1); of a HeteroData also by relation.

    Raises:
        DataError: when made, a sparsity out of range; when called, no edges, ids out of range, a directed
            graph, repeated entries, features or weights that are not finite, negative weights, or weights
            that differ between the directions of an edge.
    """

    def __init__(self, sparsity: Shares) -> None:
        for share in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
            check_sparsity(share)
        self.sparsity = sparsity

    def forward(self, data: BaseData) -> BaseData:
        """The graph with its kept edges; nodes and everything else are as before."""
        if isinstance(data, HeteroData):
            return data.edge_subgraph(relation_masks(data, self.sparsity))
        if isinstance(data, Batch):
            return Batch.from_data_list([self.forward(one) for one in data.to_data_list()])
        if isinstance(self.sparsity, Mapping):
            raise DataError("Shares by relation are for a HeteroData: give this graph one number.")
        graph = homogeneous(data, "TeddyPrune")
        nodes = graph.num_nodes
        if nodes is None:
            raise DataError("TeddyPrune needs the number of nodes: set data.num_nodes or data.x.")
        if isinstance(graph.x, Tensor) and graph.x.is_floating_point():
            check_features(graph.x)
        check_undirected(graph.edge_index, nodes)
        weight = getattr(graph, "edge_weight", None)
        if weight is not None:
            check_weight(graph.edge_index, weight, nodes)
        scores = edge_scores(graph.edge_index, nodes, weight)
        keep = keep_highest(scores, graph.edge_index, nodes, self.sparsity)
        return cut_edges(graph, keep)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.sparsity})"
