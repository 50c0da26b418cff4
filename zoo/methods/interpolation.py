"""Interpolation between a zero-shot and a fine-tuned network (Abdollahpoorrostam et al., 2024): sharpness by
layer, layers that are behind, and the pruning that mends the path.

On the line (1 - a) theta0 + a theta1 some inner networks can be worse than both ends. A layer whose own line
has a barrier is a straggler. Sharpness is adaptive and worst-case (Kwon et al. 2021; Andriushchenko et al.
2023): the largest rise of the loss when no weight moves by more than a share rho of its size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import ConfigError
from zoo.shared.masks.topk import topk_mask
from zoo.shared.pruning.budgets import check_sparsity, kept_count

State = Mapping[str, Tensor]
Measure = Callable[[nn.Module], Tensor]


def check_ends(model: nn.Module, first: State, last: State) -> None:
    """Refuse ends that no line joins.

    Raises:
        ConfigError: other keys or shapes, by name, or batch norms, whose statistics belong to one end.
    """
    known = model.state_dict()
    for state in (first, last):
        wrong = [
            n
            for n in {*known, *state}
            if n not in state or n not in known or state[n].shape != known[n].shape
        ]
        if wrong:
            raise ConfigError(
                f"the ends must be states of this {type(model).__name__}: {sorted(wrong)[0]!r} differs"
            )
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ConfigError("batch norms have statistics of one end only: interpolate a network without them")


def between(
    first: State, last: State, share: float, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """(1 - a) theta0 + a theta1 of all tensors; or of those named, with the others at theta1."""
    return {
        n: torch.lerp(first[n], one, share)
        if (names is None or n in names) and one.is_floating_point()
        else one
        for n, one in last.items()
    }


def placed(model: nn.Module, state: State) -> nn.Module:
    """A copy of the model with these weights, in eval mode."""
    made = copy.deepcopy(model)
    made.load_state_dict(dict(state))
    return made.eval()


def sharpness(
    model: nn.Module, loss: Measure, rho: float = 0.05, steps: int = 10, names: Collection[str] | None = None
) -> float:
    """max L(w + d) - L(w) over |d| <= rho |w|, by ascent along the sign of the gradient.

    Args:
        model: stays as it is.
        loss: of a model on fixed data; of normalised logits, if networks are to be compared.
        rho: largest share by which a weight moves.
        steps: of the ascent, each of 2 rho / steps.
        names: of the parameters that may move; by default all.
    """
    moved = copy.deepcopy(model).eval()
    parameters = {n: p for n, p in moved.named_parameters() if names is None or n in names}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    before = float(loss(moved).detach())
    best = before
    for _ in range(steps):
        found = torch.autograd.grad(
            loss(moved), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            for (n, p), g in zip(parameters.items(), found, strict=True):
                room = rho * start[n].abs()
                p.add_(g.sign() * room * 2 / steps)
                p.copy_(torch.clamp(p, start[n] - room, start[n] + room))
            best = max(best, float(loss(moved)))
    return best - before


def barriers(
    model: nn.Module, first: State, last: State, layers: Sequence[str], loss: Measure, points: int = 5
) -> dict[str, float]:
    """By layer max over a of L(a) - ((1 - a) L(0) + a L(1)), with this layer alone between the ends and all
    others at theta1."""
    found = {}
    with torch.no_grad():
        for name in layers:
            shares = [i / (points + 1) for i in range(points + 2)]
            values = [float(loss(placed(model, between(first, last, a, (name,))))) for a in shares]
            line = [(1 - a) * values[0] + a * values[-1] for a in shares]
            found[name] = max(value - straight for value, straight in zip(values, line, strict=True))
    return found


def stragglers(found: Mapping[str, float], count: int) -> list[str]:
    """The layers with the largest barriers."""
    return sorted(found, key=lambda name: -found[name])[:count]


def mended(first: State, last: State, layers: Collection[str], sparsity: float) -> dict[str, Tensor]:
    """theta1 with only the largest changes from theta0 in some layers, exactly as many as asked for.

    Raises:
        BudgetError: a sparsity outside [0, 1).
    """
    check_sparsity(sparsity)
    state = dict(last)
    for name in layers:
        change = last[name] - first[name]
        keep = topk_mask(change.abs(), kept_count(change.numel(), sparsity))
        state[name] = first[name] + change * keep
    return state
