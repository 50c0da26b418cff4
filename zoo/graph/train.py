"""Full-batch training on one graph, one epoch at a time.

`Fit` is TEDDY's recipe with its parts optional: cross-entropy on the training nodes, distillation from a
teacher's logits over all nodes, Adam, and a constraint on the weights after each step. The result is taken at
the epoch of best validation accuracy, the last of equals, measured after the constraint. `Fit.state_dict`
holds everything that decides what follows - weights, moments, best epoch, random number generator - so that a
resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.data import Data

from zoo.errors import ConfigError
from zoo.graph.models import Features, GraphModel
from zoo.shared.learned.constraints import project_l0_

# Called after each optimiser step; returns the mask of each parameter, by name.
Constraint = Callable[[GraphModel], dict[str, Tensor]]


@dataclass(frozen=True)
class TrainConfig:
    """The paper's recipe.

    Args:
        epochs: full-batch epochs.
        lr: Adam's learning rate.
        weight_decay: L2 penalty added to the gradient of every tensor.
        distillation: lambda, the weight of the distillation term.
    """

    epochs: int = 200
    lr: float = 0.01
    weight_decay: float = 5e-4
    distillation: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"epochs must be at least 1. Received: {self.epochs}.")
        for name in ("lr", "weight_decay", "distillation"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be finite and not negative. Received: {value}.")


@dataclass(frozen=True)
class L0Ball:
    """Keep the `kept` largest magnitudes over all parameters; a zero may come back at a later step."""

    kept: int

    @classmethod
    def for_sparsity(cls, model: nn.Module, sparsity: float) -> L0Ball:
        """ceil(P sparsity) of the P weights are zero."""
        total = sum(p.numel() for p in model.parameters())
        return cls(total - math.ceil(total * sparsity))

    def __call__(self, model: GraphModel) -> dict[str, Tensor]:
        names, tensors = zip(*model.named_parameters(), strict=True)
        return dict(zip(names, project_l0_([t.data for t in tensors], self.kept), strict=True))


@dataclass(frozen=True)
class FixedMasks:
    """The same zeros at every step, by parameter name."""

    masks: Mapping[str, Tensor]

    def __call__(self, model: GraphModel) -> dict[str, Tensor]:
        for name, parameter in model.named_parameters():
            if name in self.masks:
                parameter.data.mul_(self.masks[name])
        return dict(self.masks)


@dataclass
class Best:
    """What the best validation epoch left behind."""

    epoch: int
    val_accuracy: float
    logits: Float[Tensor, "nodes classes"]
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]


class Fit:
    """A training run on one graph.

    Args:
        model: trained in place.
        data: features, labels and split.
        config: the recipe.
        keep: the entries of `data.edge_index` to train on; all by default.
        teacher: logits of every node to distil from, weighted by `config.distillation`.
        constraint: applied to the weights after each step.
        optimizer: by default Adam with the recipe's settings.
    """

    def __init__(
        self,
        model: GraphModel,
        data: Data,
        config: TrainConfig,
        *,
        keep: Bool[Tensor, " E"] | None = None,
        teacher: Float[Tensor, "nodes classes"] | None = None,
        constraint: Constraint | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.model, self.config, self.constraint = model, config, constraint
        self.device = next(model.parameters()).device
        features, graph = model.prepare(data.x, data.edge_index, keep)
        self.features: Features = features.to(self.device)
        self.graph = graph.to(self.device)
        self.labels = data.y.to(self.device)
        self.train_nodes = data.train_mask.nonzero().flatten().to(self.device)
        self.val_nodes = data.val_mask.nonzero().flatten().to(self.device)
        self.teacher = (
            None if teacher is None or config.distillation == 0 else teacher.to(self.device).log_softmax(1)
        )
        self.optimizer = optimizer or torch.optim.Adam(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.backward = backward or (lambda loss: loss.backward())
        self.epoch = 0
        self.best: Best | None = None
        self.last_loss = math.nan

    @property
    def done(self) -> bool:
        return self.epoch >= self.config.epochs

    def run(self, on_epoch: Callable[[Fit], None] | None = None) -> Best:
        """Train to the end; `on_epoch` is called after each epoch."""
        while not self.done:
            self.step()
            if on_epoch is not None:
                on_epoch(self)
        return self.result()

    def result(self) -> Best:
        """The best epoch so far.

        Raises:
            ConfigError: no epoch has been trained.
        """
        if self.best is None:
            raise ConfigError("No epoch has been trained yet.")
        return self.best

    def step(self) -> None:
        """One epoch: loss, optimiser, constraint, validation."""
        self.model.train()
        logits = self.model(self.features, self.graph)
        loss = distilled_loss(logits, self.labels, self.train_nodes, self.teacher, self.config.distillation)
        self.optimizer.zero_grad()
        self.backward(loss)
        self.optimizer.step()
        masks = self.constraint(self.model) if self.constraint is not None else {}
        self.last_loss = float(loss.detach())
        self.epoch += 1
        self._validate(masks)

    @torch.no_grad()
    def _validate(self, masks: dict[str, Tensor]) -> None:
        self.model.eval()
        logits = self.model(self.features, self.graph)
        accuracy = accuracy_of(logits, self.labels, self.val_nodes)
        if self.best is None or accuracy >= self.best.val_accuracy:
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best = Best(self.epoch, accuracy, logits, weights, masks)


def distilled_loss(
    logits: Float[Tensor, "nodes classes"],
    labels: Int[Tensor, " nodes"],
    train_nodes: Int[Tensor, " train"],
    teacher: Float[Tensor, "nodes classes"] | None,
    weight: float,
) -> Float[Tensor, ""]:
    """Cross-entropy on the training nodes + weight (1/n) sum over all n nodes of KL(teacher || model),
    temperature 1.

    Args:
        logits: the model's output.
        labels: class of every node.
        train_nodes: ids of the nodes whose labels may be used.
        teacher: log-probabilities of the teacher, or None for no distillation.
        weight: lambda.
    """
    log_p = logits.log_softmax(1)
    loss = functional.nll_loss(log_p[train_nodes], labels[train_nodes])
    if teacher is not None:
        loss = loss + weight * functional.kl_div(log_p, teacher, reduction="batchmean", log_target=True)
    return loss


def accuracy_of(
    logits: Float[Tensor, "nodes classes"], labels: Int[Tensor, " nodes"], nodes: Int[Tensor, " chosen"]
) -> float:
    """Share of `nodes` whose largest logit is their label's."""
    return float((logits[nodes].argmax(1) == labels[nodes]).double().mean())
