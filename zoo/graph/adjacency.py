"""One graph's edges, laid out for repeated aggregation by any of the three architectures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from zoo.graph import sparse
from zoo.graph.sparse import SparseMatrix


@dataclass(frozen=True)
class Adjacency:
    """The rows of `matrix` are the nodes that receive; its entries the edges (and self-loops, where asked
    for).

    Args:
        matrix: A or A + I, values 1.
        weight: a factor for each entry of `matrix`, which may carry gradients (UGS's mask), or None for 1.
    """

    matrix: SparseMatrix
    weight: Float[Tensor, " entries"] | None = None
    _gcn: list[SparseMatrix] = field(default_factory=list, repr=False, compare=False)
    _heads: dict[int, tuple[SparseMatrix, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        edge_index: Int[Tensor, "2 E"],
        num_nodes: int,
        *,
        self_loops: bool,
        dtype: torch.dtype = torch.float32,
    ) -> Adjacency:
        """From both directions of every edge; with `self_loops`, each node that lacks one gets one."""
        source, target = edge_index
        if self_loops:
            between = source != target
            loops = torch.arange(num_nodes, device=edge_index.device)
            source, target = torch.cat([source[between], loops]), torch.cat([target[between], loops])
        value = torch.ones(source.numel(), dtype=dtype, device=source.device)
        return cls(SparseMatrix.from_coo(target, source, value, (num_nodes, num_nodes)))

    def with_weight(self, weight: Float[Tensor, " entries"]) -> Adjacency:
        """The same edges, each with a factor."""
        return replace(self, weight=weight)

    def to(self, device: torch.device | str) -> Adjacency:
        """The same graph on another device."""
        weight = None if self.weight is None else self.weight.to(device)
        return Adjacency(self.matrix.to(device), weight)

    def normalised(self) -> SparseMatrix:
        """D^-1/2 A D^-1/2 of the unweighted entries, computed once; 1/0 := 0."""
        if not self._gcn:
            unweighted = replace(self, weight=None)
            self._gcn.append(self.matrix.with_value(weighted_gcn_value(unweighted)))
        return self._gcn[0]

    def per_head(self, heads: int) -> tuple[SparseMatrix, Tensor]:
        """The block-diagonal matrix over (node, head) pairs in which every head has all the edges.

        Returns:
            The matrix, and the order of its entries: its entry e is the entry `order[e]` of a flat [entries,
                heads].
        """
        if heads not in self._heads:
            head = torch.arange(heads, device=self.matrix.col.device)
            row = (self.matrix.row[:, None] * heads + head).flatten()
            col = (self.matrix.col.long()[:, None] * heads + head).flatten()
            size = self.matrix.shape[0] * heads
            value = self.matrix.value.repeat_interleave(heads)
            order = torch.argsort(row * size + col, stable=True)
            self._heads[heads] = SparseMatrix.from_coo(row, col, value, (size, size)), order
        return self._heads[heads]


def weighted_gcn_value(graph: Adjacency) -> Float[Tensor, " entries"]:
    """Entries of D^-1/2 (A * weight) D^-1/2, where D are the row sums of |A * weight|; differentiable in
    `weight`.

    A trained weight passes zero on its way; a sum of signed ones has no square root then.
    """
    matrix, weight = graph.matrix, graph.weight
    if weight is None:
        weight = matrix.value
    row, col = matrix.row, matrix.col.long()
    degree = weight.new_zeros(matrix.shape[0]).index_add(0, row, weight.abs())
    root = torch.where(degree > 0, degree.clamp(min=torch.finfo(degree.dtype).tiny).rsqrt(), 0.0)
    return root[row] * weight * root[col]


def attention(
    graph: Adjacency,
    hidden: Float[Tensor, "nodes heads width"],
    source: Float[Tensor, "nodes heads"],
    target: Float[Tensor, "nodes heads"],
    negative_slope: float,
    dropout: float,
) -> Float[Tensor, "nodes heads width"]:
    """sum_j alpha_ij hidden_j with alpha = softmax over j of leaky_relu(source_j + target_i), times the
    edge's weight.

    A weight's magnitude multiplies exp(.) before the normalisation, so that weight 0 is exactly the removal
    of the edge, and a weight that training carried past zero cannot make the sum of a node zero or negative.
    """
    weight = None if graph.weight is None else graph.weight.abs()
    alpha = _EdgeSoftmax.apply(source, target, weight, graph, negative_slope)
    mixed: Tensor = _HeadProduct.apply(sparse.dropout(alpha, dropout, dropout > 0), hidden, graph)
    return mixed


class _EdgeSoftmax(torch.autograd.Function):
    """alpha[e, h] = w_e exp(s_e,h) / sum over the edges e' into the same node, s = leaky_relu(source +
    target).

    The exponent is shifted by leaky_relu(max_j source_j + target_i), an upper bound over all nodes that costs
    no pass over the edges; it cannot overflow. Sums over edges run on the compressed rows, several times
    faster than the scatter that autograd would use.
    """

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, target: Tensor, weight: Tensor | None, graph: Adjacency, slope: float
    ) -> Tensor:
        matrix = graph.matrix
        bound = functional.leaky_relu(target + source.amax(0), slope)
        raw = source.index_select(0, matrix.col) + target.index_select(0, matrix.row)
        power = (functional.leaky_relu(raw, slope) - bound.index_select(0, matrix.row)).exp_()
        weighted = power if weight is None else power * weight[:, None]
        total = (
            matrix.sum_rows(weighted).clamp_(min=torch.finfo(power.dtype).tiny).index_select(0, matrix.row)
        )
        alpha = weighted / total
        ctx.graph, ctx.slope = graph, slope
        ctx.save_for_backward(raw, alpha, None if weight is None else power / total)
        return alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        raw, alpha, unweighted = ctx.saved_tensors
        matrix = ctx.graph.matrix
        centred = grad - matrix.sum_rows(alpha * grad).index_select(0, matrix.row)
        to_weight = None if unweighted is None else (unweighted * centred).sum(1)
        to_raw = torch.where(raw > 0, 1.0, ctx.slope) * alpha * centred
        return matrix.sum_columns(to_raw), matrix.sum_rows(to_raw), to_weight, None, None


class _HeadProduct(torch.autograd.Function):
    """out[i, h] = sum over the edges e into i of alpha[e, h] * hidden[source of e, h]."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, hidden: Tensor, graph: Adjacency) -> Tensor:
        nodes, heads, width = hidden.shape
        matrix, order = graph.per_head(heads)
        value = alpha.flatten()[order]
        ctx.graph = graph
        ctx.save_for_backward(value, hidden)
        flat = hidden.reshape(nodes * heads, width)
        return sparse.rows_sum(flat, matrix.col, matrix.rowptr, value).view(nodes, heads, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        value, hidden = ctx.saved_tensors
        nodes, heads, width = hidden.shape
        edges, (matrix, _) = ctx.graph.matrix, ctx.graph.per_head(heads)
        grad = grad.contiguous()
        both = grad.flatten(1).index_select(0, edges.row) * hidden.flatten(1).index_select(0, edges.col)
        to_alpha = both.view(edges.entries, heads, width).sum(-1)
        flat = grad.view(nodes * heads, width)
        to_hidden = sparse.rows_sum(flat, matrix.t_col, matrix.t_rowptr, value[matrix.t_order])
        return to_alpha, to_hidden.view(nodes, heads, width), None
