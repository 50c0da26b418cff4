"""What matters: scores of single weights, larger = more important, in the shape of the weight.

A score sees the weight and a `ScoreContext` with whatever else was measured: gradients (always the dense
ones, so that dropped entries can win their place back), norms of activations, Hessians. The `collect_*`
functions measure those on a model and a few batches without changing the model.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import MaskError
from ..measure.calibration import (
    collect_activations,
    collect_gradients,
    collect_hessian_gradients,
    collect_hessians,
)
from .hessians import inverse_diagonal

__all__ = [
    "OBS",
    "SCORES",
    "SNIP",
    "ActivationWeighted",
    "GraSP",
    "LAMP",
    "Magnitude",
    "Movement",
    "Random",
    "Score",
    "ScoreContext",
    "Taylor",
    "Wanda",
    "collect_activations",
    "collect_gradients",
    "collect_hessian_gradients",
    "collect_hessians",
]


@dataclass
class ScoreContext:
    """What scores may use, each by parameter name.

    Args:
        grads: dense gradients dL/dw of the masked network, also where the mask is zero.
        activations: norm of each input feature of the layer, [in] (for convolutions: of each input channel).
        hessians: input second moments 2/n sum x x^T of the layer, [in, in] (for convolutions in = I*kh*kw).
        hessian_gradients: Hessian-gradient products Hg, in the shape of the weight.
        state: what a score that follows training remembers, by tensor.
        generator: source of randomness, on the CPU.
    """

    grads: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    hessians: Mapping[str, Tensor] = field(default_factory=dict)
    hessian_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    state: MutableMapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None

    def get(self, kind: str, name: str, score: object) -> Tensor:
        """The entry `name` of one of the mappings.

        Raises:
            MaskError: it was not measured; the message names the function that does.
        """
        found = getattr(self, kind).get(name)
        if found is None:
            raise MaskError(
                f"the score {type(score).__name__} needs {kind} of {name!r}, which were not measured; "
                f"pass loss_fn and batches, or ScoreContext({kind}=collect_{_COLLECTOR[kind]}(...))"
            )
        return found


_COLLECTOR = {
    "grads": "gradients",
    "activations": "activations",
    "hessians": "hessians",
    "hessian_gradients": "hessian_gradients",
}


@runtime_checkable
class Score(Protocol):
    """A score. `needs` names the fields of the context it reads; `may_regrow` lets a dropped entry return
    when the masks are chosen anew (else pruning is nested: what is dropped stays dropped)."""

    needs: ClassVar[frozenset[str]]
    may_regrow: ClassVar[bool]

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        """The score of every entry of the tensor called `name`."""


class _Base:
    needs: ClassVar[frozenset[str]] = frozenset()
    may_regrow: ClassVar[bool] = False


@dataclass(frozen=True)
class Magnitude(_Base):
    """|w|."""

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        return weight.detach().abs()


@dataclass(frozen=True)
class LAMP(_Base):
    """Layer-adaptive magnitude: w^2 over the sum of all squares not smaller in the same tensor (Lee et al.
    2021, equation 3).

    With the global budget this spreads sparsity over the layers; the largest weight of each tensor scores 1.
    Among equal magnitudes the lower index counts as the larger.
    """

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        squares, order = weight.detach().reshape(-1).double().square().sort(descending=True, stable=True)
        tail = squares.cumsum(0)
        normalised = torch.where(squares > 0, squares / tail, 0.0).to(
            torch.promote_types(weight.dtype, torch.float32)
        )
        return torch.empty_like(normalised).scatter_(0, order, normalised).view(weight.shape)


@dataclass(frozen=True)
class Random(_Base):
    """Uniform numbers from the context's generator: the control at equal budget that every method is compared
    with."""

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        return torch.rand(weight.shape, generator=context.generator).to(weight.device)


@dataclass(frozen=True)
class SNIP(_Base):
    """|w g|, the connection sensitivity |dL/dm| at m = 1 (Lee et al. 2019), meant for initialisation."""

    needs = frozenset({"grads"})

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        return (weight.detach() * context.get("grads", name, self)).abs()


@dataclass(frozen=True)
class Taylor(_Base):
    """(w g)^2, the squared first-order change of the loss (Molchanov et al. 2019, equation 8).

    Ranks single weights as SNIP does; over blocks and slices, whose scores are means, it differs.
    """

    needs = frozenset({"grads"})

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        return (weight.detach() * context.get("grads", name, self)).square()


@dataclass(frozen=True)
class GraSP(_Base):
    """w (Hg): what the gradient norm loses without the weight (Wang et al. 2020, equation 8, whose sign is
    inverted: the paper removes the largest -w Hg). Signed; a negative score marks weights whose removal helps
    the gradient flow."""

    needs = frozenset({"hessian_gradients"})

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        return weight.detach() * context.get("hessian_gradients", name, self)


@dataclass(frozen=True)
class Wanda(_Base):
    """|w| times the norm of the input feature it multiplies (Sun et al. 2023, equation 1).

    Shapes: weight [out, in] or [out, in / groups, ...]; activations [in].
    """

    needs = frozenset({"activations"})

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        norms = context.get("activations", name, self).to(weight.device)
        out, fan_in = weight.shape[0], weight.shape[1]
        if norms.dim() != 1 or norms.numel() % fan_in or out % max(1, norms.numel() // fan_in):
            raise MaskError(
                f"{name!r} of shape {tuple(weight.shape)} cannot take input norms of shape "
                f"{tuple(norms.shape)}"
            )
        per_group = norms.view(-1, fan_in)
        rows = per_group.repeat_interleave(out // per_group.shape[0], dim=0)
        return weight.detach().abs() * rows.view(out, fan_in, *[1] * (weight.dim() - 2)).to(weight.dtype)


ActivationWeighted = Wanda


@dataclass(frozen=True)
class OBS(_Base):
    """w_j^2 / (2 [H^-1]_jj), the loss caused by removing one weight and adjusting the others (Hassibi and
    Stork 1993).

    Args:
        damping: added to the diagonal of H, as a fraction of its mean, so that it can be inverted.
    """

    damping: float = 0.01
    needs = frozenset({"hessians"})

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        matrix = weight.detach().flatten(1)
        hessian = context.get("hessians", name, self).to(weight.device)
        if hessian.shape != (matrix.shape[1], matrix.shape[1]):
            raise MaskError(
                f"{name!r} has {matrix.shape[1]} inputs per output; received a Hessian of shape "
                f"{tuple(hessian.shape)}"
            )
        inverse = inverse_diagonal(hessian, self.damping)
        return (matrix.double().square() / (2 * inverse)).to(weight.dtype).view(weight.shape)


@dataclass(frozen=True)
class Movement(_Base):
    """-sum over steps of w g: kept is what moves away from zero (Sanh et al. 2020, equation 3).

    `observe` adds one step; `Sparsifier` calls it with the dense gradient after every step, so that w is the
    weight just after the update, where the paper takes it just before. Without training the sum has the one
    term of the measured gradient.
    """

    needs = frozenset({"grads"})
    may_regrow = True

    def observe(self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext) -> None:
        """Adds -w g of this step to the running sum in `context.state`."""
        movement = -weight.detach() * context.get("grads", name, self)
        held = context.state.get(name)
        context.state[name] = movement if held is None else held + movement

    def score(
        self, name: str, weight: Float[Tensor, "*shape"], context: ScoreContext
    ) -> Float[Tensor, "*shape"]:
        held = context.state.get(name)
        return -weight.detach() * context.get("grads", name, self) if held is None else held


#: Scores by the name used in recipes and on the command line.
SCORES: dict[str, type[Score]] = {
    "magnitude": Magnitude,
    "lamp": LAMP,
    "random": Random,
    "snip": SNIP,
    "taylor": Taylor,
    "grasp": GraSP,
    "wanda": Wanda,
    "obs": OBS,
    "movement": Movement,
}
