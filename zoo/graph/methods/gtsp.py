"""GTSP: a graph transformer with fewer tokens, heads, layers or weights.

Liu et al., "Exploring Sparsity in Graph Transformers", 2023. Tokens: each layer keeps the best-scored share
of a graph's nodes in attention, chosen by a Gumbel top-k, straight through. Heads: those of least gradient
importance are dropped while training, as many of largest gradient grow, fewer and fewer. Layers: attention
is left out at random while training. Weights: gradual magnitude pruning that regrows by gradients (GraNet).

Differs from the released code: what is dropped is really gone (there, masked tokens stay keys, and masked
heads and layers are computed); the share of nodes is of each graph without its padding; no noise in eval
mode; at the end the attention whose loss costs least leaves for good, as many as the share says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.bundles.store import PART_MASK
from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, required, stated_options
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.measure.modes import eval_mode
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.pruning.regrow import RigL
from zoo.shared.pruning.schedules import Cubic
from zoo.shared.pruning.sparsifier import Sparsifier
from zoo.shared.structure.relatives import check_finite, copied, seeded
from zoo.shared.train import Job
from zoo.shared.train.device import brought_back, device_of


class NodeAttention(nn.Module):
    """Attention among the nodes of a graph, or among the best-scored of them.

    Args:
        dim: of a node.
        heads: of width `width`.
        width: of a head.
        share: of the nodes that take part.
    """

    order: Tensor

    def __init__(self, dim: int, heads: int, width: int, share: float = 1.0) -> None:
        super().__init__()
        self.heads, self.width, self.share = heads, width, share
        self.qkv = nn.Linear(dim, 3 * heads * width)
        self.out = nn.Linear(heads * width, dim)
        self.score = nn.Linear(dim, 1) if share < 1 else None
        self.by_chance = False
        self.gates: Tensor | None = None

    def forward(self, x: Float[Tensor, "g n dim"], there: Bool[Tensor, "g n"]) -> Float[Tensor, "g n dim"]:
        if self.score is None:
            return self._attend(x, there)
        chosen, gate = self._choose(x, there)
        width = int(chosen.sum(1).max())
        places = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        index = places[..., None].expand(-1, -1, x.shape[2])
        inside = chosen.gather(1, places)
        out = self._attend((x * gate[..., None]).gather(1, index), inside) * inside[..., None]
        return torch.zeros_like(x).scatter(1, index, out)

    def _choose(self, x: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes that take part, and a gate of 1 whose gradient is that of their soft scores."""
        assert self.score is not None
        logits = self.score(x)[..., 0]
        if self.by_chance:
            logits = torch.rand(logits.shape, generator=torch.Generator().manual_seed(logits.shape[1])).to(x)
        elif self.training:
            logits = logits - (-torch.rand_like(logits).clamp(1e-9, 1 - 1e-9).log()).log()
        logits = logits.masked_fill(~there, -math.inf)
        count = (there.sum(1) * self.share).ceil().long()
        rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        soft = logits.softmax(1) * count[:, None]
        return (rank < count[:, None]) & there, 1.0 - soft.detach() + soft

    def _attend(self, x: Tensor, there: Tensor) -> Tensor:
        g, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(g, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
        if self.gates is not None:
            mixed = mixed * self.gates[:, None, None]
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(g, n, -1))
        return out

    @torch.no_grad()
    def cut(self, keep: Sequence[int]) -> None:
        """Leave some heads, in place."""
        rows = torch.tensor([h * self.width + i for h in keep for i in range(self.width)])
        stride = self.heads * self.width
        all_rows = torch.cat([part * stride + rows for part in range(3)])
        weight, bias, out = self.qkv.weight[all_rows], self.qkv.bias[all_rows], self.out
        self.heads, self.gates = len(keep), None
        self.qkv = nn.Linear(weight.shape[1], len(all_rows))
        self.qkv.weight.copy_(weight)
        self.qkv.bias.copy_(bias)
        self.out = nn.Linear(len(rows), out.out_features)
        self.out.weight.copy_(out.weight[:, rows])
        self.out.bias.copy_(out.bias)


class GraphLayer(nn.Module):
    """Messages along edges and attention, side by side, then a perceptron on each node (GPS)."""

    def __init__(self, dim: int, heads: int, width: int, share: float) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.attention = NodeAttention(dim, heads, width, share) if heads else None
        self.rest = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim)
        )
        self.norm = nn.LayerNorm(dim)
        self.skipped = 0.0

    def forward(self, x: Tensor, edges: Tensor, there: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.local(normed + edges @ normed)
        leave_out = self.training and self.skipped and float(torch.rand(())) < self.skipped
        if self.attention is not None and not leave_out:
            x = x + self.attention(normed, there)
        x = x + self.rest(x)
        return x


class GraphTransformer(nn.Module):
    """A graph's class from its padded nodes, or the class of each node.

    Args:
        features: of a node.
        dim: of a node inside.
        heads: of each layer; 0 for a layer without attention.
        width: of a head.
        share: of the nodes that take part in attention.
        classes: of graphs, or of nodes.
        nodes: whether nodes are classified instead of graphs.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True

    def __init__(
        self,
        features: int,
        dim: int = 32,
        heads: Sequence[int] = (4, 4, 4, 4),
        width: int = 8,
        share: float = 1.0,
        classes: int = 2,
        nodes: bool = False,
    ) -> None:
        super().__init__()
        self.nodes = nodes
        self.arguments = {"features": features, "dim": dim, "width": width, "classes": classes}
        if nodes:
            self.arguments["nodes"] = True
        self.enter = nn.Linear(features, dim)
        self.layers = nn.ModuleList(GraphLayer(dim, count, width, share) for count in heads)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(
        self, features: Float[Tensor, "g n f"], edges: Float[Tensor, "g n n"], there: Bool[Tensor, "g n"]
    ) -> Float[Tensor, "g *n classes"]:
        x = self.enter(features)
        for layer in self.layers:
            x = layer(x, edges, there)
        if not self.nodes:
            x = (x * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
        out: Tensor = self.head(x)
        return out

    def attentions(self) -> list[NodeAttention]:
        """Those that there are."""
        return [m for m in self.modules() if isinstance(m, NodeAttention)]

    def current_arguments(self) -> dict[str, Any]:
        """Arguments that make a module of these shapes."""
        layers: list[Any] = list(self.layers)
        heads = [layer.attention.heads if layer.attention is not None else 0 for layer in layers]
        share = min([a.share for a in self.attentions()], default=1.0)
        return {**self.arguments, "heads": heads, "share": share}


@dataclass
class GTSP:
    """Train a graph transformer with a share of its tokens, heads, layers' attention or weights left out."""

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {
        "epochs": 15,
        "lr": 1e-3,
        "optimizer": "adam",
        "weight_decay": 1e-5,
    }

    axis: Literal["tokens", "heads", "layers", "weights"] = "weights"
    """What is left out; weights of any module, the rest of a `GraphTransformer`."""

    share: float = 0.5
    """Of it, from 0 up to 1."""

    by_chance: bool = False
    """Whether tokens and heads are chosen at random, as a control."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """A sparse relative of `model`, trained on from it; the model given stays as it is.

        Raises:
            BudgetError: a share outside [0, 1).
            ConfigError: another model than the axis can be cut of, a share that leaves nothing, or no job.
        """
        check_sparsity(self.share)
        if self.axis != "weights" and not isinstance(model, GraphTransformer):
            raise ConfigError(
                f"gtsp leaves {self.axis} out of a GraphTransformer; of {type(model).__name__} it can prune "
                "weights: axis='weights'"
            )
        job = required(job, self)
        check_finite(model)
        made: Any = copied(model).to(job.device)
        with seeded(job.seed):
            left = getattr(self, f"_{self.axis}")(made, job)
        made = brought_back(made, device_of(model)).eval()
        arguments = getattr(made, "current_arguments", None)
        return Sparsified(
            made,
            masks_of(made) or MaskSet({}),
            extras={} if left is None else {f"heads{PART_MASK}": left},
            hyperparameters=stated_options(self, job),
            parts={} if left is None else {"heads": {"pattern": "channel"}},
            arguments=arguments() if callable(arguments) else None,
        )

    def _weights(self, model: nn.Module, job: Job) -> None:
        fit = job.fit(model, macs=lambda: 0.0)
        end = max(1, int(0.8 * fit.steps))
        every = max(1, end // 20)
        regrow = RigL(end=end, fraction=0.5)
        with Sparsifier(
            model, fit.optimizer, schedule=Cubic(self.share, end), every=every, seed=job.seed, regrow=regrow
        ) as cuts:
            fit.run(cuts.step)

    def _tokens(self, model: GraphTransformer, job: Job) -> None:
        for attention in model.attentions():
            attention.share = 1 - self.share
            attention.score = nn.Linear(attention.qkv.in_features, 1)
            attention.by_chance = self.by_chance
        job.fit(model, macs=lambda: 0.0).run()

    def _heads(self, model: GraphTransformer, job: Job) -> Bool[Tensor, " heads"]:
        attentions = model.attentions()
        kept = [max(1, round(a.heads * (1 - self.share))) for a in attentions]
        importance = [torch.zeros(a.heads) for a in attentions]
        for attention, count in zip(attentions, kept, strict=True):
            attention.gates = torch.zeros(attention.heads).index_fill(
                0, torch.randperm(attention.heads)[:count], 1.0
            )
            attention.gates.requires_grad_(True)
        fit = job.fit(model, macs=lambda: 0.0)
        end, every = int(0.75 * fit.steps), max(1, fit.steps // 20)

        def step() -> None:
            for attention, count, total in zip(attentions, kept, importance, strict=True):
                assert attention.gates is not None
                if attention.gates.grad is not None:
                    total += attention.gates.grad.abs()
                    attention.gates.grad = None
                if fit.step % every == 0 and fit.step < end and not self.by_chance:
                    share = 0.5 * (1 + math.cos(math.pi * fit.step / end))
                    attention.gates = swapped(attention.gates.detach(), total, math.ceil(share * count / 2))
                    attention.gates.requires_grad_(True)
                    total.zero_()

        fit.run(step)
        left = []
        for attention in attentions:
            assert attention.gates is not None
            left.append(attention.gates.detach() > 0)
            attention.cut(attention.gates.nonzero().flatten().tolist())
        return torch.cat(left)

    def _layers(self, model: GraphTransformer, job: Job) -> Bool[Tensor, " heads"]:
        layers: list[Any] = [layer for layer in model.layers if layer.attention is not None]
        heads = [layer.attention.heads for layer in layers]
        for layer in layers:
            layer.skipped = self.share
        fit = job.fit(model, macs=lambda: 0.0)
        fit.run(until_step=round(0.6 * fit.steps))
        batches = job.sample(8)
        for _ in range(round(self.share * len(layers))):
            left = [layer for layer in layers if layer.attention is not None]
            costs = [loss_without(model, layer, job, batches) for layer in left]
            left[costs.index(min(costs))].attention = None
        for layer in layers:
            layer.skipped = 0.0
        fit.run()
        there = torch.tensor([layer.attention is not None for layer in layers])
        return there.repeat_interleave(torch.tensor(heads))


def swapped(gates: Float[Tensor, " heads"], importance: Float[Tensor, " heads"], count: int) -> Tensor:
    """Gates with the least important open ones closed and as many closed ones of largest importance open."""
    count = min(count, int((gates == 0).sum()), int(gates.sum()))
    lowest = torch.where(gates > 0, importance, math.inf).argsort(stable=True)[:count]
    highest = torch.where(gates == 0, importance, -math.inf).argsort(descending=True, stable=True)[:count]
    return gates.clone().index_fill(0, lowest, 0.0).index_fill(0, highest, 1.0)


@torch.no_grad()
def loss_without(model: nn.Module, layer: Any, job: Job, batches: list[Any]) -> float:
    """The loss on batches if a layer had no attention."""
    attention, layer.attention = layer.attention, None
    try:
        with eval_mode(model):
            return sum(float(job.loss(model, batch)) for batch in batches)
    finally:
        layer.attention = attention
