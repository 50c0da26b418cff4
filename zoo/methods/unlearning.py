"""Unlearning after pruning (Jia et al., NeurIPS 2023, "Model Sparsity Can Simplify Machine Unlearning").

Five ways to let a trained network forget some of its data, and the five figures by which they are compared
with training again without these data. Zeros that the network's masks drop stay zero in all of them, so that
pruning first is a matter of what is passed in. Forms are those of OPTML-Group/Unlearn-Sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from zoo.errors import DataError
from zoo.methods.training import train_held
from zoo.shared.masks import masks_of
from zoo.shared.measure.modes import eval_mode
from zoo.shared.structure.relatives import copied
from zoo.shared.train import Job

Way = Literal["fine-tune", "ascend", "influence", "fisher", "l1-sparse"]


class Part(NamedTuple):
    """Samples and their classes."""

    x: Tensor
    y: Int[Tensor, " n"]


@dataclass(frozen=True)
class Unlearning:
    """One way to forget.

    Args:
        way: descend on what is retained (FT); ascend on what is forgotten (GA); a Newton step by influence
            functions (IU); noise where the retained data do not care (FF); or FT with an L1 penalty.
        strength: learning rate of FT and GA, length of IU's step, variance of FF's noise, weight of L1.
        samples: for the curvature of IU and FF.
    """

    way: Way
    strength: float
    samples: int = 100

    def forget(self, model: nn.Module, gone: Part, kept: Part, job: Job) -> nn.Module:
        """A copy of a trained model that lost `gone` and keeps `kept`.

        Args:
            model: whose masks, if it carries any, stay in force.
            gone, kept: what to forget, and the other training data.
            job: recipe and seed; its batches are not used.

        Raises:
            DataError: nothing to forget, or nothing to keep.
        """
        if not len(gone.y) or not len(kept.y):
            raise DataError(
                f"{len(gone.y)} samples to forget and {len(kept.y)} to keep: give at least one of both"
            )
        made = copied(model)
        if self.way in ("influence", "fisher"):
            self._move(made, gone, kept, job.seed)
            return made.eval()
        part = gone if self.way == "ascend" else kept
        batch = min(job.recipe.batch, len(part.y))
        used = job.replace(batches=DataLoader(TensorDataset(*part), batch, shuffle=True, drop_last=True))
        if self.way == "ascend":
            used = used.replace(loss=lambda m, b: -job.loss(m.eval(), b))  # its statistics stay those of all
        fit = used.fit(made, lr=job.recipe.lr if self.way == "l1-sparse" else self.strength)
        if self.way == "l1-sparse":
            fit.penalty = lambda: self.strength * fading(fit.step, fit.steps) * l1(made)
        train_held(fit)
        if (masks := masks_of(made)) is not None:
            masks.apply_(made)
        return made.eval()

    def _move(self, model: nn.Module, gone: Part, kept: Part, seed: int) -> None:
        model.eval()
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(kept.y), generator=generator)[: self.samples]
        singles = (_flat(model, kept.x[i : i + 1], kept.y[i : i + 1]) for i in rows.tolist())
        if self.way == "influence":
            step = newton(_flat(model, *gone) - _flat(model, *kept), singles, len(rows))
        else:
            fisher = torch.stack([g.square() for g in singles]).mean(0)
            noise = torch.randn(len(fisher), generator=generator)
            step = noise / (fisher + 1e-8 * fisher.max()).sqrt()
        length = self.strength if self.way == "influence" else self.strength**0.5
        with torch.no_grad():
            own = nn.utils.parameters_to_vector(model.parameters())
            nn.utils.vector_to_parameters(own + length * step, model.parameters())
            if (masks := masks_of(model)) is not None:
                masks.apply_(model)


def newton(
    direction: Float[Tensor, " p"], gradients: Iterator[Float[Tensor, " p"]], count: int
) -> Float[Tensor, " p"]:
    """F^-1 of a direction by WoodFisher's recursion over the gradients of single samples (Singh and Alistarh,
    2020; as in the released code, where o follows the first gradient)."""
    k, o = direction, next(gradients)
    for g in gradients:
        below = count + o @ g
        k, o = k - (k @ g) / below * o, o - (o @ g) / below * o
    return k


def fading(step: int, steps: int) -> float:
    """1 - t / (T - T0), and 0 in the last fifth T0 of the steps."""
    return max(0.0, 1 - step / (0.8 * steps))


def l1(model: nn.Module) -> Float[Tensor, ""]:
    """Sum of |theta| over all parameters, norms and biases included."""
    return torch.stack([p.abs().sum() for p in model.parameters()]).sum()


def _flat(model: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, " p"]:
    """Gradient of the mean cross-entropy in all parameters, as one vector; 0 where masks drop."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(functional.cross_entropy(model(x), y), parameters)
    by = {id(p): g for p, g in zip(parameters, found, strict=True)}
    masks = masks_of(model)
    for name, mask in masks.items() if masks is not None else ():
        by[id(model.get_parameter(name))].mul_(mask.keep)
    return nn.utils.parameters_to_vector([by[id(p)] for p in parameters])


def figures(model: nn.Module, gone: Part, kept: Part, test: Part) -> dict[str, float]:
    """UA, MIA, RA and TA, from 0 to 1: error on what is forgotten, share of it judged never seen, accuracy on
    what is kept and on test data.

    Raises:
        DataError: fewer retained than test samples, as the attack needs as many members as others.
    """
    if len(kept.y) < len(test.y):
        raise DataError(
            f"the attack needs {len(test.y)} retained samples for as many others; there are {len(kept.y)}"
        )
    right, sure = zip(*(_judged(model, part) for part in (gone, kept, test)), strict=True)
    attack = membership(sure[1][: len(test.y)], sure[2])
    return {
        "ua": 1 - float(right[0].double().mean()),
        "mia": float((~attack(sure[0])).double().mean()),
        "ra": float(right[1].double().mean()),
        "ta": float(right[2].double().mean()),
    }


def membership(
    members: Float[Tensor, " n"], others: Float[Tensor, " n"]
) -> Callable[[Float[Tensor, " m"]], Tensor]:
    """Judges by the confidence in the true class whether samples were trained on: an RBF machine, C = 3."""
    from sklearn.svm import SVC

    x = torch.cat([members, others])[:, None].numpy()
    y = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).numpy()
    machine = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y)
    return lambda sure: torch.from_numpy(machine.predict(sure[:, None].numpy()) > 0.5)


def _judged(model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
    """Which samples are right, and the confidence in their true class."""
    with torch.no_grad(), eval_mode(model):
        chances = model(part.x).softmax(1)
    return chances.argmax(1) == part.y, chances.gather(1, part.y[:, None])[:, 0]
