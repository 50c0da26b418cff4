"""UGS (Chen et al., ICML 2021), TEDDY's main rival: masks on edges and weights, trained, cut and rewound
round by round.

Each round trains the weights together with a mask for every edge and every weight, all starting at one, with
an l1 subgradient on the masks; at the best validation epoch the edges and weights of smallest mask are cut;
the weights are rewound to their initial values. A level's accuracy is that of a training with its cut edges
and weights alone.

Differs from the released code in: the two directions of an edge share one mask; a mask multiplies GIN's
messages and its magnitude GAT's exp(.) before the softmax, so that 0 is exactly the removal of the edge and
sums stay positive, as GCN's degrees do; self-loops are not cut; the cuts follow TEDDY's schedule (5 % of the
remaining edges, 10 % of the remaining weights), counted as TEDDY counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric.data import Data

from zoo.errors import ConfigError
from zoo.graph.adjacency import Adjacency
from zoo.graph.method import reinitialised
from zoo.graph.models import GAT, Features, GraphModel
from zoo.graph.teddy import keep_highest, released_level, with_self_loops
from zoo.graph.ticket import EdgeTicket
from zoo.graph.train import Best, FixedMasks, graph_job, graph_recipe, train_best, whole_graph
from zoo.methods.contract import Sparsified, required, stated_options
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.train import Job, Recipe


@dataclass(frozen=True)
class UGSConfig:
    """The paper's settings.

    Args:
        epochs: per training.
        lr, weight_decay: Adam's, for weights and masks alike.
        s1, s2: l1 coefficient of the edge masks and of the weight masks.
        noise: standard deviation of the noise on the masks' initial ones.
    """

    epochs: int = 200
    lr: float = 0.008
    weight_decay: float = 8e-5
    s1: float = 1e-2
    s2: float = 1e-2
    noise: float = 1e-5

    def recipe(self) -> Recipe:
        """Of weights and masks alike."""
        return graph_recipe(self.epochs, self.lr, self.weight_decay)

    @classmethod
    def released(cls, dataset: str, epochs: int = 200) -> UGSConfig:
        """The released settings for Cora and Citeseer; Citeseer's for any other graph."""
        if dataset == "cora":
            return cls(epochs)
        return cls(epochs, lr=0.01, weight_decay=5e-4)


@dataclass
class UGS:
    """Train masks on edges and weights, cut the smallest and rewind, round by round; then train what is left.

    The model that is given lends its shape. Training is on the processor.
    """

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {
        "epochs": 200,
        "lr": 0.008,
        "batch": 1,
        "weight_decay": 8e-5,
        "optimizer": "adam",
    }

    level: int = 10
    """Rounds: k of them cut 1 - 0.95^k of the edges and 1 - 0.9^k of the weights."""

    s1: float = 1e-2
    """l1 coefficient of the edge masks."""

    s2: float = 1e-2
    """l1 coefficient of the weight masks."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Train a ticket; `model` stays as it is.

        Args:
            model: one of the zoo's GCN, GAT and GIN.
            job: on a graph, see `zoo.graph.domain.make_job`; epochs, lr, weight decay and seed are read.

        Raises:
            ConfigError: a model or job of another kind, or no round.
        """
        if not isinstance(model, GraphModel):
            raise ConfigError(f"UGS trains the zoo's GCN, GAT and GIN. Received: {type(model).__name__}.")
        given = required(job, self)
        data = whole_graph(given, "UGS")
        if self.level < 1:
            raise ConfigError(f"level counts rounds and must be at least 1. Received: {self.level}.")
        recipe = given.recipe
        config = UGSConfig(recipe.epochs, recipe.lr, recipe.weight_decay, self.s1, self.s2)
        ticket = reinitialised(model, given.seed).cpu()
        loops = isinstance(model, GAT)
        found = ugs(ticket, data, config, (self.level,), self_loops_count=loops)[self.level]
        masks = MaskSet(found.best.masks)
        set_masks(ticket, masks)
        ticket.ticket = EdgeTicket.draw(data.edge_index, int(data.num_nodes), found.keep)
        options = stated_options(self, given)
        return Sparsified(ticket.eval(), masks, ticket.ticket.to_extras(), options)


@dataclass(frozen=True)
class UGSLevel:
    """What a level came to; `seconds` is the processor time from the start, all rounds included."""

    best: Best
    keep: Bool[Tensor, " E"]
    seconds: float


def ugs(
    model: GraphModel,
    data: Data,
    config: UGSConfig,
    levels: Collection[int],
    *,
    self_loops_count: bool = False,
    teacher: Float[Tensor, "nodes classes"] | None = None,
    distillation: float = 0.0,
) -> dict[int, UGSLevel]:
    """Run rounds 1 to max(levels), reading off the levels asked for.

    Args:
        model: freshly initialised; these weights are what each round rewinds to.
        data: features, labels and split.
        config: settings.
        levels: rounds k whose accuracy is wanted; sparsities as in `zoo.graph.teddy.released_level`.
        self_loops_count: count a self-loop for every node among the entries, as TEDDY does for GAT.
        teacher: logits that are distilled in every training, as TEDDY does; the paper does not.
        distillation: weight of that.
    """
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in initial.items()}
    nodes = int(data.num_nodes)
    full = with_self_loops(data.edge_index, nodes) if self_loops_count else data.edge_index
    keep = torch.ones(full.shape[1], dtype=torch.bool)
    entries = data.edge_index.shape[1]
    start = time.process_time()
    readout_seconds = 0.0
    found: dict[int, UGSLevel] = {}

    def job_of(keep: Tensor) -> Job:
        taught: dict[str, Any] = {"teacher": teacher, "distillation": distillation}
        return graph_job(model, data, config.recipe(), keep=keep[:entries], **taught)

    for k in range(1, max(levels) + 1):
        edge_sparsity, weight_sparsity = released_level(k)
        _rewind(model, initial, masks)
        edge_score, weight_score = _train_masks(model, job_of(keep), config, full, keep, masks)
        keep = keep_highest(edge_score, full, nodes, edge_sparsity)
        masks = _keep_weights(weight_score, masks, weight_sparsity)
        if k in levels:
            begun = time.process_time()
            _rewind(model, initial, masks)
            best = train_best(model, job_of(keep).replace(seed=_drawn_seed()), FixedMasks(masks))
            now = time.process_time()
            found[k] = UGSLevel(best, keep[:entries], now - start - readout_seconds)
            readout_seconds += (
                now - begun
            )  # the readings of earlier levels are no part of reaching a later one
    return found


def _drawn_seed() -> int:
    """Of dropout, from torch's random state as everything else here."""
    return int(torch.randint(2**31, ()))


def _rewind(model: GraphModel, initial: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name] * masks[name])


def _train_masks(
    model: GraphModel,
    job: Job,
    config: UGSConfig,
    full: Int[Tensor, "2 F"],
    keep: Bool[Tensor, " F"],
    masks: dict[str, Tensor],
) -> tuple[Float[Tensor, " F"], dict[str, Tensor]]:
    """|mask| of every entry of `full` and of every weight at the best validation epoch; -1 for what is
    already cut.
    """
    nodes = int(job.batches.data.num_nodes)
    masked = _Masked(model, job.batches.graph, nodes, masks, config.noise)
    own = job.replace(seed=_drawn_seed())
    own.fit(masked, penalty=lambda: masked.l1(config.s1, config.s2), macs=lambda: 0.0).run()
    with torch.no_grad():
        edge_score = _entry_scores(full, keep, nodes, masked.pairs, masked.edge_mask.abs())
        found = {name: masked.weight_mask[name.replace(".", "/")].abs() for name in masks}
        return edge_score, {name: torch.where(masks[name], m, -1.0) for name, m in found.items()}


class _Masked(nn.Module):
    """A model with a mask for every undirected edge and for every weight, all of them trained.

    Args:
        graph: the edges as prepared for the model.
        nodes: of the graph.
        masks: which weights are left.
        noise: standard deviation around one of the masks at the start.
    """

    def __init__(
        self, model: GraphModel, graph: Adjacency, nodes: int, masks: dict[str, Tensor], noise: float
    ) -> None:
        super().__init__()
        self.model, self.left = model, masks
        self.pairs, self.pair_of, self.is_loop = _pairs(graph, nodes)

        def ones(shape: torch.Size) -> nn.Parameter:
            return nn.Parameter(1 + noise * torch.randn(shape))

        self.edge_mask = ones(self.pairs.shape)
        # A dot is no part of a parameter's name.
        self.weight_mask = nn.ParameterDict(
            {name.replace(".", "/"): ones(p.shape) for name, p in model.named_parameters()}
        )

    def l1(self, s1: float, s2: float) -> Float[Tensor, ""]:
        """s1 times the sum of the edge masks' magnitudes, plus s2 times that of the weight masks'."""
        weights = torch.stack([mask.abs().sum() for mask in self.weight_mask.values()]).sum()
        return s1 * self.edge_mask.abs().sum() + s2 * weights

    def forward(self, features: Features, graph: Adjacency) -> Float[Tensor, "nodes classes"]:
        soft = {
            name: p * (self.left[name] * self.weight_mask[name.replace(".", "/")])
            for name, p in self.model.named_parameters()
        }
        entry_weight = torch.where(self.is_loop, 1.0, self.edge_mask[self.pair_of])
        out: Tensor = functional_call(self.model, soft, (features, graph.with_weight(entry_weight)))
        return out


def _pairs(graph: Adjacency, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of the undirected edges, the index of each entry's key (0 for self-loops), and which entries are
    self-loops.
    """
    row, col = graph.matrix.row, graph.matrix.col.long()
    is_loop = row == col
    key = torch.minimum(row, col) * nodes + torch.maximum(row, col)
    pairs = torch.unique(key[~is_loop])
    pair_of = torch.searchsorted(pairs, key).clamp(max=max(len(pairs) - 1, 0))
    return pairs, pair_of.masked_fill(is_loop, 0), is_loop


def _entry_scores(full: Tensor, keep: Tensor, nodes: int, pairs: Tensor, score: Tensor) -> Tensor:
    low, high = full.aminmax(dim=0)
    index = torch.searchsorted(pairs, low * nodes + high).clamp(max=max(len(pairs) - 1, 0))
    entries = torch.where(keep, score.double()[index], -1.0)
    return entries.masked_fill(low == high, math.inf)


def _keep_weights(score: dict[str, Tensor], masks: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """The masks that keep all but ceil(P sparsity) weights, those of highest score."""
    flat = torch.cat([score[name].flatten() for name in masks])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    count = len(flat) - math.ceil(len(flat) * sparsity)
    kept[torch.argsort(flat, descending=True, stable=True)[:count]] = True
    pieces = kept.split([mask.numel() for mask in masks.values()])
    return {name: piece.view_as(masks[name]) for name, piece in zip(masks, pieces, strict=True)}
