"""From names, patterns, scores and a budget to masks: what every way of sparsifying shares."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import BudgetError, MaskError, PatternError, ScheduleError
from ..masks import Mask, MaskSet, masks_of, near_misses
from ..masks.patterns import NM, Channel, Group, Pattern, Unstructured, parse_pattern, topk_mask
from .budgets import BUDGETS, Budget, Floor, check_sparsity
from .inventory import inventory, prunable_parameters
from .scores import SCORES, Score, ScoreContext

Names = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None
Patterns = str | Pattern | Mapping[str, Pattern]
_log = logging.getLogger("zoo")


def choose_masks(
    scores: Mapping[str, Tensor], sparsity: float, patterns: Mapping[str, Pattern], budget: Budget
) -> MaskSet:
    """The masks that keep the best units of each tensor, as many as the budget allots it.

    Raises:
        PatternError: a score is NaN (the tensor is named), or a shape its pattern does not allow.
        BudgetError: a sparsity that cannot be met.
    """
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise PatternError(
                f"{int(score.isnan().sum())} of {score.numel()} scores of {name!r} are NaN; "
                "repair the weights or the measurements they come from"
            )
        try:
            patterns[name].check_shape(tuple(score.shape))
        except PatternError as error:
            raise PatternError(f"{name!r}: {error}") from None
    counts = budget.allocate(scores, sparsity, patterns)
    return MaskSet(
        {
            name: Mask(patterns[name].keep(score, counts[name]), patterns[name])
            for name, score in scores.items()
        }
    )


def score_tensors(
    weights: Mapping[str, nn.Parameter],
    score: Score,
    context: ScoreContext,
    before: MaskSet,
    never: MaskSet,
) -> dict[str, Tensor]:
    """Scores of all tensors. Entries that `before` drops rank last unless the score lets them return; those
    that `never` drops, in any case."""
    scores = {}
    for name, weight in weights.items():
        value = score.score(name, weight, context)
        if value.shape != weight.shape:
            raise MaskError(
                f"the score {type(score).__name__} of {name!r} has shape {tuple(value.shape)}, not "
                f"{tuple(weight.shape)}"
            )
        held = never if score.may_regrow else before
        if name in held:
            value = value.masked_fill(~held[name].keep.to(value.device), -torch.inf)
        scores[name] = value
    return scores


def select_parameters(model: nn.Module, names: Names) -> dict[str, nn.Parameter]:
    """The chosen parameters in the model's order, tied ones once, under their first name."""
    known = dict(model.named_parameters())
    if names is None:
        chosen = prunable_parameters(model)
    elif callable(names):
        chosen = [name for name, parameter in known.items() if names(name, parameter)]
    else:
        aliases = dict(model.named_parameters(remove_duplicate=False))
        matched: set[int] = set()
        for wanted in [names] if isinstance(names, str) else names:
            found = [name for name in aliases if name == wanted or fnmatch.fnmatchcase(name, wanted)]
            if not found:
                raise MaskError(f"no parameter matches {wanted!r}{near_misses(wanted, aliases)}")
            matched |= {id(aliases[name]) for name in found}
        chosen = [name for name, parameter in known.items() if id(parameter) in matched]
    if not chosen:
        raise MaskError(f"no parameters to sparsify{near_misses('weight', known)}; choose some with names=")
    return {name: known[name] for name in chosen}


def resolve_patterns(
    model: nn.Module, weights: Mapping[str, nn.Parameter], pattern: Patterns, *, skip: bool = False
) -> dict[str, Pattern]:
    """The pattern of each tensor, checked against its shape. A plain "n:m" runs along the input axis, which
    the inventory knows: dimension 1 of convolutions, the last of matrices, the first of transformers' Conv1D.

    Args:
        model: owner of the weights.
        weights: parameters by name.
        pattern: one for all, by name or as an object, or one per name.
        skip: leave out tensors whose shape the pattern does not fit (the 3 channels of images, say) and say
            so through the logger `zoo`, instead of refusing; if no tensor fits, it is refused all the same.
            Output channels of the last weight, which are the model's outputs, are left out likewise.

    Raises:
        PatternError: a shape that its pattern does not allow; names that do not match.
    """
    if isinstance(pattern, Mapping):
        unknown = sorted(set(pattern) ^ set(weights))
        if unknown:
            raise PatternError(f"one pattern per chosen parameter is needed; differing names: {unknown[:5]}")
        return dict(pattern)
    parsed = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    along_inputs = isinstance(pattern, str) and isinstance(parsed, NM) and "@" not in pattern
    axes = inventory(model).axes if along_inputs else {}
    patterns: dict[str, Pattern] = {}
    misfits: dict[str, PatternError] = {}
    for name, weight in weights.items():
        own = NM(parsed.n, parsed.m, dim=axes.get(name, -1)) if isinstance(parsed, NM) and axes else parsed
        try:
            own.check_shape(tuple(weight.shape))
            patterns[name] = own
        except PatternError as error:
            misfits[name] = PatternError(f"{name!r}: {error}")
    if misfits and not (skip and patterns):
        raise next(iter(misfits.values()))
    if misfits:
        left = sum(weights[name].numel() for name in misfits)
        total = sum(weight.numel() for weight in weights.values())
        _log.warning(
            "%s leaves out %d of %d tensors (%.1f %% of the weights), whose shapes it does not fit: %s",
            parsed,
            len(misfits),
            len(weights),
            100 * left / total,
            ", ".join(f"{name} {tuple(weights[name].shape)}" for name in misfits),
        )
    if skip and isinstance(parsed, Channel) and parsed.dim == 0 and len(patterns) > 1:
        last = list(patterns)[-1]
        del patterns[last]
        _log.warning(
            "%s leaves out %s, the last weight, whose channels are the outputs of the model: a class without "
            "weights is never found. Give names to prune it, too",
            parsed,
            last,
        )
    return patterns


def resolve_score(score: str | Score) -> Score:
    """A score, or the one of that name."""
    if not isinstance(score, str):
        return score
    if score not in SCORES:
        raise MaskError(f"unknown score {score!r}{near_misses(score, SCORES)}")
    return SCORES[score]()


def resolve_budget(budget: str | Budget, patterns: Mapping[str, Pattern]) -> Budget:
    """A budget, or the one of that name. By name, whole slices go only as far as each tensor keeps one: a
    layer without any channel computes nothing, which whoever wants it asks for with a budget object."""
    if not isinstance(budget, str):
        return budget
    if budget not in BUDGETS:
        raise BudgetError(f"unknown budget {budget!r}{near_misses(budget, BUDGETS)}")
    named = BUDGETS[budget]()
    return Floor(named) if all(isinstance(pattern, Group) for pattern in patterns.values()) else named


def goal_sparsity(sparsity: float | None, patterns: Mapping[str, Pattern]) -> float:
    """The sparsity asked for, or the one that N:M patterns fix."""
    if sparsity is not None:
        return check_sparsity(sparsity)
    densities = {pattern.fixed_density for pattern in patterns.values()}
    only = densities.pop() if len(densities) == 1 else None
    if only is None:
        raise BudgetError(
            "sparsity is needed: give a number in [0, 1), such as sparsity=0.9 (command line: --sparsity 0.9)"
        )
    return float(1 - only)


def check_goal(goal: float, sparsity: float | None, patterns: Mapping[str, Pattern]) -> None:
    """The schedule's end, the sparsity asked for and what N:M patterns fix must agree."""
    check_sparsity(goal)
    if sparsity is not None and goal != sparsity:
        raise ScheduleError(
            f"the schedule ends at sparsity {goal}, but sparsity={sparsity} was given; give one of them"
        )
    densities = {pattern.fixed_density for pattern in patterns.values()}
    only = densities.pop() if len(densities) == 1 else None
    if only is not None and abs(float(1 - only) - goal) > 1e-6:
        raise BudgetError(
            f"{next(iter(patterns.values()))} fixes the sparsity at {float(1 - only):.6g}; received {goal}: "
            "leave sparsity out, or choose another n:m"
        )


def magnitude_masks(model: nn.Module, sparsity: float) -> MaskSet:
    """The masks of one global magnitude threshold within those that the model carries; it is not changed."""
    weights = select_parameters(model, None)
    before = masks_of(model) or MaskSet({})
    scores = score_tensors(weights, SCORES["magnitude"](), ScoreContext(), before, before)
    chosen = choose_masks(scores, sparsity, dict.fromkeys(weights, Unstructured()), BUDGETS["global"]())
    return MaskSet({name: chosen[name] & before[name] if name in before else chosen[name] for name in chosen})


def random_masks(model: nn.Module, counts: Mapping[str, int], seed: int) -> MaskSet:
    """Masks with these counts at places drawn with `seed`, within the masks that the model carries, which
    may leave fewer."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    before = masks_of(model) or MaskSet({})
    masks = {}
    for name, count in counts.items():
        drawn = torch.rand(weights[name].shape, generator=generator)
        if name in before:
            drawn.masked_fill_(~before[name].keep.to(drawn.device), -torch.inf)
        masks[name] = Mask((topk_mask(drawn, count) & (drawn >= 0)).to(weights[name].device))
    return MaskSet(masks)
