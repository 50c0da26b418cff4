"""GCN, GAT and GIN as TEDDY trains them, on torch-geometric's convolutions.

`model(x, edge_index)` is torch-geometric's message passing on its own `GCNConv`, `GATConv` and `GINConv`.
Full-batch training on one graph calls the model hundreds of times on the same features and edges;
`model.prepare` turns them once into a `SparseMatrix` and an `Adjacency`, and `model(features, adjacency)`
then gives the same numbers from sparse products (tests compare the two, gradients included).

Differences from the convolutions' defaults, all from the released code of TEDDY: no biases; GIN's linear map
is applied before the sum (the two commute, as the map is linear), GIN averages two readouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch_geometric.nn as pyg
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from zoo.errors import DataError
from zoo.graph import sparse
from zoo.graph.adjacency import Adjacency, attention, weighted_gcn_value
from zoo.graph.edges import check_features, check_ids
from zoo.graph.sparse import SparseMatrix
from zoo.graph.ticket import EdgeTicket
from zoo.shared.masks import Mask
from zoo.shared.ops import SparseLinear, pack
from zoo.shared.ops.cache import Derived
from zoo.shared.ops.packing import MIN_SPARSITY, register_packer

Features = Tensor | SparseMatrix

# Below this share of non-zeros the features are kept sparse: Cora has 1.3 %, the digits 49 %.
_SPARSE_BELOW = 0.2


# torch-geometric tells layers apart by the bare class name, so these must not be named as their bases are.
class GCNLayer(pyg.GCNConv):
    """Kipf and Welling's convolution D^-1/2 (A + I) D^-1/2 X W; the degrees D are those of the edges it is
    given.
    """

    def forward(self, x: Features, graph: Tensor | Adjacency) -> Tensor:
        if isinstance(graph, Tensor):
            out: Tensor = super().forward(x, graph)
            return out
        hidden = project(x, self.lin)
        if graph.weight is None:
            return graph.normalised() @ hidden
        return graph.matrix.weighted(weighted_gcn_value(graph), hidden)


class GINLayer(pyg.GINConv):
    """Xu et al.'s convolution W ((1 + eps) x_i + sum_j x_j), as (1 + eps) W x_i + sum_j W x_j.

    W is linear, so the two are equal; messages are as wide as the output, not as the input (Coauthor-CS: 64
    against 6,805, or 4 GB of messages).
    """

    def forward(self, x: Features, graph: Tensor | Adjacency) -> Tensor:
        single = isinstance(self.nn, (nn.Linear, SparseLinear))
        hidden = project(x, self.nn) if single else self.nn(_as_dense(x))
        own = (1 + self.eps) * hidden
        if isinstance(graph, Tensor):
            out: Tensor = self.propagate(graph, x=(hidden, hidden), size=None) + own
            return out
        if graph.weight is None:
            return graph.matrix @ hidden + own
        return graph.matrix.weighted(graph.weight, hidden) + own


class GATLayer(pyg.GATConv):
    """Velickovic et al.'s attention over the neighbours and the node itself."""

    def forward(self, x: Features, graph: Tensor | Adjacency) -> Tensor:
        if isinstance(graph, Tensor):
            out: Tensor = super().forward(x, graph)
            return out
        hidden = project(x, self.lin).view(-1, self.heads, self.out_channels)
        source = (hidden * self.att_src).sum(-1)
        target = (hidden * self.att_dst).sum(-1)
        dropout = self.dropout if self.training else 0.0
        mixed = attention(graph, hidden, source, target, self.negative_slope, dropout)
        return mixed.flatten(1) if self.concat else mixed.mean(dim=1)


class GraphModel(nn.Module):
    """What the three share: preparing inputs, and the edges that a ticket keeps.

    `ticket` is the edge mask of a sparse bundle. It belongs to one graph; `model(x, edge_index)` drops the
    pruned edges of that graph by itself and refuses any other, unless `model.edges` says to use the edges as
    given (`"whole"`), or to draw new ones of another graph by degree (`"rescored"`).
    """

    self_loops = False

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.ticket: EdgeTicket | None = None
        self.edges = "ticket"

    def resized(self, in_channels: int, out_channels: int) -> GraphModel:
        """A new model of the same architecture and hidden width for other features and classes."""
        raise NotImplementedError

    def load_extras(self, extras: dict[str, Tensor]) -> None:
        """Take over what a bundle stores beside the weights: the edge ticket, if there is one."""
        self.ticket = EdgeTicket.from_extras(extras)

    def surviving(self, edge_index: Int[Tensor, "2 E"], num_nodes: int) -> Int[Tensor, "2 K"]:
        """The edges that the model uses of this graph.

        Raises:
            DataError: an id out of range, or a graph that is not the ticket's.
        """
        check_ids(edge_index, num_nodes)
        if self.edges not in ("ticket", "whole", "rescored"):
            raise DataError(f'model.edges must be "ticket", "whole" or "rescored". Received: {self.edges!r}.')
        if self.ticket is None or self.edges == "whole":
            return edge_index
        if self.edges == "rescored":
            keep = self.ticket.rescored(edge_index, num_nodes, self_loops=isinstance(self, GAT))
            return edge_index[:, keep]
        return edge_index[:, self.ticket.mask_for(edge_index, num_nodes)]

    def prepare(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int[Tensor, "2 E"],
        keep: Bool[Tensor, " E"] | None = None,
    ) -> tuple[Features, Adjacency]:
        """Convert inputs once for many calls.

        Args:
            x: node features.
            edge_index: both directions of every edge.
            keep: which entries of `edge_index` to use; by default those of the model's ticket, else all.

        Raises:
            DataError: features that are not finite, an id out of range, or a graph that is not the ticket's.
        """
        check_features(x)
        check_ids(edge_index, len(x))
        kept = self.surviving(edge_index, len(x)) if keep is None else edge_index[:, keep]
        features: Features = x
        if x.numel() and float(x.count_nonzero()) / x.numel() < _SPARSE_BELOW:
            features = SparseMatrix.from_dense(x)
        return features, Adjacency.build(kept, len(x), self_loops=self.self_loops, dtype=x.dtype)

    def forward(self, x: Features, graph: Tensor | Adjacency) -> Float[Tensor, "nodes classes"]:
        """Logits of every node, from plain tensors or from what `prepare` returned.

        Weights stored in another precision (bundles store half) are converted to that of `x` for the
        computation.
        """
        if isinstance(graph, Tensor):
            graph = self.surviving(graph, x.shape[0])
        dtype = x.value.dtype if isinstance(x, SparseMatrix) else x.dtype
        # A packed weight stays in its own precision, in which it is the smallest to read.
        modules = self.named_modules()
        packed = tuple(f"{name}." for name, module in modules if isinstance(module, SparseLinear))
        stored = {
            name: p
            for name, p in self.named_parameters()
            if p.dtype != dtype and not (packed and name.startswith(packed))
        }
        if not stored:
            return self.network(x, graph)
        converted = {name: p.to(dtype) for name, p in stored.items()}
        out: Tensor = functional_call(
            _Network(self), {f"model.{k}": v for k, v in converted.items()}, (x, graph)
        )
        return out

    def network(self, x: Features, graph: Tensor | Adjacency) -> Tensor:
        raise NotImplementedError


class _Network(nn.Module):
    """A model without its `forward`: what runs after inputs and precision are settled."""

    def __init__(self, model: GraphModel) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Features, graph: Tensor | Adjacency) -> Tensor:
        return self.model.network(x, graph)


class GCN(GraphModel):
    """Two graph convolutions with ReLU and dropout between them.

    Args:
        in_channels, hidden_channels, out_channels: widths of input, hidden layer and output (classes).
        dropout: rate on the hidden layer.
    """

    self_loops = True

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, dropout: float = 0.5
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.conv1 = GCNLayer(in_channels, hidden_channels, bias=False)
        self.conv2 = GCNLayer(hidden_channels, out_channels, bias=False)
        self.dropout = dropout

    def resized(self, in_channels: int, out_channels: int) -> GCN:
        return GCN(in_channels, self.conv1.out_channels, out_channels, self.dropout)

    def network(self, x: Features, graph: Tensor | Adjacency) -> Tensor:
        hidden = _dropout(self.conv1(x, graph).relu(), self.dropout, self.training)
        return self.conv2(hidden, graph)


class GAT(GraphModel):
    """Two attention layers: `heads` concatenated heads and ELU, then one head; dropout on inputs and
    attention.

    Args:
        in_channels, out_channels: widths of input and output (classes).
        hidden_channels: width of one head.
        heads: heads of the first layer.
        dropout: rate on the inputs of both layers and on their attention.
    """

    self_loops = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        heads: int = 8,
        dropout: float = 0.6,
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.conv1 = GATLayer(in_channels, hidden_channels, heads=heads, dropout=dropout, bias=False)
        self.conv2 = GATLayer(
            heads * hidden_channels, out_channels, dropout=dropout, concat=False, bias=False
        )
        self.dropout = dropout

    def resized(self, in_channels: int, out_channels: int) -> GAT:
        return GAT(in_channels, self.conv1.out_channels, out_channels, self.conv1.heads, self.dropout)

    def network(self, x: Features, graph: Tensor | Adjacency) -> Tensor:
        hidden = functional.elu(self.conv1(_dropout(x, self.dropout, self.training), graph))
        return self.conv2(_dropout(hidden, self.dropout, self.training), graph)


class GIN(GraphModel):
    """Two sum aggregations with trainable eps and ReLU; the logits are the mean of a readout of each layer.

    Args:
        in_channels, hidden_channels, out_channels: widths of input, hidden layer and output (classes).
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.conv1 = GINLayer(nn.Linear(in_channels, hidden_channels, bias=False), train_eps=True)
        self.conv2 = GINLayer(nn.Linear(hidden_channels, out_channels, bias=False), train_eps=True)
        self.readout = nn.Linear(hidden_channels, out_channels, bias=False)

    def resized(self, in_channels: int, out_channels: int) -> GIN:
        return GIN(in_channels, self.readout.in_features, out_channels)

    def network(self, x: Features, graph: Tensor | Adjacency) -> Tensor:
        hidden = self.conv1(x, graph).relu()
        return (self.readout(hidden) + self.conv2(hidden, graph).relu()) / 2


def project(x: Features, linear: nn.Module) -> Float[Tensor, "nodes out"]:
    """x W^T for dense or sparse x, where `linear` is a dense or packed linear map without bias."""
    if not isinstance(x, SparseMatrix):
        out: Tensor = linear(x)
        return out
    if isinstance(linear, SparseLinear):
        # Both are sparse: the features are the sparser side, and decide which rows of W^T are read.
        weight, dtype = linear.weight, x.value.dtype
        return x @ _transposed.get(
            weight.content, lambda: weight.to_dense().t().to(dtype).contiguous(), dtype
        )
    return x @ cast(Tensor, linear.weight).t().contiguous()


_transposed = Derived[Tensor]()


@register_packer(pyg.Linear)
def _pack_linear(module: nn.Module, masks: Mapping[str, Mask]) -> nn.Module | None:
    """`zoo.shared.ops.SparseLinear` for torch-geometric's own linear layer."""
    keep = masks.get("weight")
    if not isinstance(module, pyg.Linear) or keep is None or keep.sparsity < MIN_SPARSITY:
        return None
    return SparseLinear(pack(module.weight, keep.keep), module.bias).requires_grad_(False)


def _as_dense(x: Features) -> Tensor:
    return x.dense() if isinstance(x, SparseMatrix) else x


def _dropout(x: Features, p: float, training: bool) -> Features:
    if isinstance(x, SparseMatrix):
        return x.dropout(p, training)
    return sparse.dropout(x, p, training)
