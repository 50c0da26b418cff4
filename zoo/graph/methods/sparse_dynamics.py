"""Dynamics with few ReLUs, and their control by mixed-integer programming.

Liu, Zhou, He, Marcucci, Fei-Fei, Wu, Li, "Model-Based Control with Sparse Neural Dynamics", NeurIPS 2023.
Each hidden unit chooses among ReLU, identity and zero by a Gumbel-softmax, straight through, while the
weights are trained; in stages the units most likely to be ReLUs stay, the others become the better of
identity and zero, and training goes on. Identity and zero fold away: every ReLU that is left sees the input
and the ReLUs before it through one affine map (`FoldedReLU`), and costs one binary variable in a
mixed-integer program.

Differs from the paper: the program is solved by HiGHS (scipy) in place of Gurobi.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, required, stated_options
from zoo.shared.errors import MaskError
from zoo.shared.learned.gates.functions import gumbel_categorical
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.structure.relatives import check_finite, copied, seeded
from zoo.shared.train import Job
from zoo.shared.train.device import brought_back, device_of

RELU, IDENTITY, ZERO = range(3)


class Choice(nn.Module):
    """ReLU, identity or zero for each unit: drawn while it is open, then fixed.

    Args:
        units: how many.
    """

    fixed: Tensor

    def __init__(self, units: int) -> None:
        super().__init__()
        start = torch.zeros(units, 3)
        start[:, RELU] = 1.0
        self.logits = nn.Parameter(start)
        self.register_buffer("fixed", torch.full((units,), -1))

    def forward(self, a: Float[Tensor, "*batch units"]) -> Float[Tensor, "*batch units"]:
        """k1 relu(a) + k2 a, with k a draw in training mode and the likeliest otherwise."""
        k = gumbel_categorical(self.logits, noisy=self.training)
        chosen = nn.functional.one_hot(self.fixed.clamp(min=0), 3).to(k)
        k = torch.where((self.fixed >= 0)[:, None], chosen, k)
        return k[:, RELU] * a.relu() + k[:, IDENTITY] * a

    def likely(self) -> Float[Tensor, " units"]:
        """The probability of a ReLU, 0 where a unit is fixed to another choice, 1 where to it."""
        share = self.logits.softmax(1)[:, RELU]
        return torch.where(self.fixed >= 0, (self.fixed == RELU).to(share), share)

    @torch.no_grad()
    def close(self, keep: Tensor, last: bool) -> None:
        """Fix the open units outside `keep` to the better of identity and zero; at last the others to
        ReLU."""
        others = 1 + self.logits[:, 1:].argmax(1)
        self.fixed = torch.where((self.fixed < 0) & ~keep, others, self.fixed)
        if last:
            self.fixed[self.fixed < 0] = RELU


class FoldedReLU(nn.Module):
    """An affine map of the input and a few ReLUs, each of which sees the input and those of the layers
    before.

    Args:
        inputs, outputs: widths.
        relus: of each layer.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.
    """

    full_precision: ClassVar[bool] = True

    def __init__(self, inputs: int, outputs: int, relus: list[int]) -> None:
        super().__init__()
        self.arguments = {"inputs": inputs, "outputs": outputs, "relus": list(relus)}
        widths = [inputs + sum(relus[:n]) for n in range(len(relus) + 1)]
        self.hidden = nn.ModuleList(nn.Linear(w, n) for w, n in zip(widths, relus, strict=False) if n)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        for layer in self.hidden:
            x = torch.cat([x, layer(x).relu()], -1)
        out: Tensor = self.head(x)
        return out

    @property
    def relus(self) -> int:
        """How many units bend."""
        return sum(len(layer.bias) for layer in self.hidden if isinstance(layer, nn.Linear))


@torch.no_grad()
def fold(layers: list[nn.Linear], choices: list[Tensor]) -> FoldedReLU:
    """The same function with the ReLUs alone.

    Args:
        layers: hidden ones and the last.
        choices: of the units of each hidden layer, RELU, IDENTITY or ZERO.
    """
    inputs = layers[0].in_features
    made = FoldedReLU(inputs, layers[-1].out_features, [int((c == RELU).sum()) for c in choices])
    made = made.to(layers[0].weight)
    # What a layer puts out, as an affine map of the input and the ReLUs so far.
    matrix, offset = torch.eye(inputs).to(layers[0].weight), torch.zeros(inputs).to(layers[0].weight)
    place = iter(made.hidden)
    for layer, choice in zip(layers, choices, strict=False):
        matrix, offset = layer.weight @ matrix, layer.weight @ offset + _bias(layer)
        bends = choice == RELU
        count, width = int(bends.sum()), matrix.shape[1]
        if count:
            unit: Any = next(place)
            unit.weight.copy_(matrix[bends])
            unit.bias.copy_(offset[bends])
        kept = (choice == IDENTITY).to(matrix)
        matrix = torch.cat([matrix * kept[:, None], matrix.new_zeros(len(choice), count)], 1)
        matrix[bends.nonzero().flatten(), width + torch.arange(count)] = 1.0
        offset = offset * kept
    made.head.weight.copy_(layers[-1].weight @ matrix)
    made.head.bias.copy_(layers[-1].weight @ offset + _bias(layers[-1]))
    return made


def _bias(layer: nn.Linear) -> Tensor:
    return layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features)


def perceptron(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of an `nn.Sequential` of linear layers and ReLUs in turn.

    Raises:
        ConfigError: it is anything else.
    """
    modules = list(model) if isinstance(model, nn.Sequential) else []
    layers = [module for module in modules[::2] if type(module) is nn.Linear]
    if (
        len(layers) < 2
        or len(modules) != 2 * len(layers) - 1
        or not all(isinstance(m, nn.ReLU) for m in modules[1::2])
    ):
        raise ConfigError(
            f"sparse-dynamics takes an nn.Sequential of linear layers with a ReLU between each two; received "
            f"{type(model).__name__} of {', '.join(type(m).__name__ for m in model.children()) or 'nothing'}"
        )
    return layers


@dataclass
class SparseDynamics:
    """Train a perceptron until few ReLUs are left, the other units linear or gone, and fold it."""

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {"epochs": 5, "lr": 3e-3, "optimizer": "adam", "weight_decay": 0.0}

    relus: int = 4
    """ReLUs that are left, over all layers."""

    stages: int = 3
    """Trainings, after each of which fewer units are open, by equal ratios; the last one has none."""

    penalty: float = 0.01
    """Weight of the expected share of ReLUs in the loss."""

    order: str = "learned"
    """Which units stay ReLUs: learned, by magnitude or random, where all others become linear at once."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """A `FoldedReLU` with the function that was trained; the model given stays as it is.

        Raises:
            ConfigError: no perceptron, or options out of range.
            MaskError: the model carries masks.
        """
        layers = perceptron(model)
        units = sum(layer.out_features for layer in layers[:-1])
        if not 1 <= self.relus <= units or self.stages < 1 or self.penalty < 0:
            raise ConfigError(
                f"sparse-dynamics needs a stage, no negative penalty and from 1 to {units} relus; received "
                f"stages {self.stages}, penalty {self.penalty}, relus {self.relus}"
            )
        if self.order not in ("learned", "magnitude", "random"):
            raise ConfigError(f"the order is learned, magnitude or random; received {self.order!r}")
        job = required(job, self)
        if masks_of(model):
            raise MaskError("folding units fills the zeros that the model's masks hold")
        check_finite(model)
        net: Any = copied(model).to(job.device)
        choices = [Choice(layer.out_features).to(layer.weight) for layer in perceptron(net)[:-1]]
        for number, choice in enumerate(choices):
            net[2 * number + 1] = choice
        with seeded(job.seed):
            self._train(net, choices, units, job)
        folded = fold(perceptron_of(net), [choice.fixed for choice in choices])
        made = brought_back(folded, device_of(model)).eval()
        facts = {"relus_by_layer": [int((choice.fixed == RELU).sum()) for choice in choices]}
        return Sparsified(made, MaskSet({}), hyperparameters={**stated_options(self, job), **facts})

    def _train(self, net: nn.Sequential, choices: list[Choice], units: int, job: Job) -> None:
        if self.order != "learned":
            close_by(choices, _scores(net, self.order), self.relus, True, IDENTITY)
        for stage in range(1, self.stages + 1):

            def penalty() -> Tensor:
                return self.penalty * torch.cat([c.likely() for c in choices]).mean()

            job.fit(net, macs=lambda: 0.0, penalty=penalty if self.order == "learned" else None).run()
            if self.order == "learned" and stage < self.stages:
                left = max(self.relus, math.ceil(units * (self.relus / units) ** (stage / (self.stages - 1))))
                close_by(choices, [c.likely() for c in choices], left, stage == self.stages - 1)
        if self.order == "learned" and self.stages == 1:
            close_by(choices, [c.likely() for c in choices], self.relus, True)


def close_by(
    choices: list[Choice], scores: list[Tensor], left: int, last: bool, other: int | None = None
) -> None:
    """Leave the best-scored units of all layers open; `other` is what the rest become, by default the better
    of identity and zero."""
    joined = torch.cat([score.detach() for score in scores])
    keep = torch.zeros(len(joined), dtype=torch.bool)
    keep[joined.argsort(descending=True, stable=True)[:left]] = True
    for choice, part in zip(choices, keep.split([len(score) for score in scores]), strict=True):
        if other is not None:
            choice.fixed[~part] = other
        choice.close(part, last)


def perceptron_of(net: nn.Sequential) -> list[nn.Linear]:
    """The linear layers between choices."""
    return [module for module in net if isinstance(module, nn.Linear)]


def _scores(net: nn.Sequential, order: str) -> list[Tensor]:
    """Norm of a unit's weights in times out, or noise."""
    layers = perceptron_of(net)
    if order == "random":
        return [torch.rand(layer.out_features) for layer in layers[:-1]]
    return [
        first.weight.norm(dim=1) * second.weight.norm(dim=0)
        for first, second in zip(layers, layers[1:], strict=False)
    ]
