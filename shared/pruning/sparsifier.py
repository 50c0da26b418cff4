"""The one loop of sparsification: pattern x score x budget x schedule (x regrowth), driven by `step()`.

    sparsifier = Sparsifier(model, optimizer, sparsity=0.9, schedule=Cubic(0.9, end=1000), every=100)
    for batch in loader:
        loss(model, batch).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()

`sparsify(model, sparsity=0.9)` is the same without training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import MaskError, ScheduleError
from ..masks import Mask, MaskHandle, MaskSet, masks_of, tighten, unwrap
from ..masks.hold import refuse_attached
from ..masks.patterns import pattern_from_dict
from ..measure.calibration import (
    Forward,
    LossFn,
    collect_activations,
    collect_gradients,
    collect_hessian_gradients,
    collect_hessians,
)
from .budgets import Budget, check_sparsity
from .choose import (
    Names,
    Patterns,
    check_goal,
    choose_masks,
    goal_sparsity,
    prunable_parameters,
    resolve_budget,
    resolve_patterns,
    resolve_score,
    score_tensors,
    select_parameters,
)
from .regrow import Regrow
from .schedules import OneShot, Schedule
from .scores import Score, ScoreContext

_log = logging.getLogger("zoo")

__all__ = ["Sparsifier", "choose_masks", "prunable_parameters", "sparsify"]


class Sparsifier:
    """Sparsifies a model while it trains.

    At construction the masks of step 0 are put on and held (`MaskSet.attach`). Call `step()` after each
    optimiser step: step t counts from 1; every `every` steps, and at the schedule's last, the masks are
    chosen anew for `schedule(t)`; with `regrow` each update ends in a drop-and-grow at equal count, also
    after the schedule is over. Pruning is nested, dropped entries stay dropped, unless the score says
    `may_regrow` or `regrow` is given. N:M is reached through N':M with falling N'. Each update is a function
    of weights, gradients, `seed` and the step, so a run resumed through `state_dict()` continues as it would
    have.

    Dense gradients, where score or regrowth need them, are those of the backward passes since the last update
    step; they are held only over the step before an update.

    Args:
        model: any module; what masks it already carries drop stays dropped, whatever score or regrowth say.
        optimizer: the optimiser (or several) that trains it; without it `step()` re-zeroes the weights.
        sparsity: final sparsity; with a schedule it may be left out. N:M patterns fix it themselves.
        schedule: sparsity over steps; default: all at step 0.
        pattern: where zeros may lie: a name ("2:4", "block4x1"), a pattern, or one per tensor. A plain "n:m"
            means the input axis, which is dimension 1 of convolutions.
        score: a name of `SCORES` or a score.
        budget: a name of `BUDGETS` or a budget.
        regrow: SET or RigL.
        names: which parameters: names or globs, or a function of name and parameter; default
            `prunable_parameters`, without those whose shape the pattern does not fit.
        every: steps between updates.
        seed: of random scores and random growth.
        context: measurements for the score, needed at step 0 if the schedule prunes at once by gradients.

    Raises:
        BudgetError, PatternError, ScheduleError, MaskError: impossible or contradictory requests.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        sparsity: float | None = None,
        schedule: Schedule | None = None,
        pattern: Patterns = "unstructured",
        score: str | Score = "magnitude",
        budget: str | Budget = "global",
        regrow: Regrow | None = None,
        names: Names = None,
        every: int = 1,
        seed: int = 0,
        context: ScoreContext | None = None,
    ) -> None:
        if every < 1:
            raise ScheduleError(f"every needs at least 1 step; received {every}")
        self.model = unwrap(model)
        self.weights = select_parameters(self.model, names)
        self.patterns = resolve_patterns(self.model, self.weights, pattern, skip=names is None)
        self.weights = {name: self.weights[name] for name in self.patterns}
        self.score = resolve_score(score)
        self.budget = resolve_budget(budget, self.patterns)
        self.schedule = schedule if schedule is not None else OneShot(goal_sparsity(sparsity, self.patterns))
        check_goal(self.schedule.final, sparsity, self.patterns)
        self.regrow, self.every, self.seed = regrow, every, seed
        self.step_count = 0
        self._needs_optimizer_help = optimizer is None
        self._context = context or ScoreContext()
        self._before = masks_of(self.model) or MaskSet({})
        start = check_sparsity(self.schedule(0))
        chosen = self._choose(start, self._seeded(self._context), self._before)
        self.handle: MaskHandle = (self._before & chosen).attach(self.model, optimizer)
        self._prepare_capture()

    @property
    def masks(self) -> MaskSet:
        """The masks now in force."""
        return self.handle.masks

    @property
    def finished(self) -> bool:
        """Whether masks will not change any more."""
        last = max(self.schedule.end, self.regrow.end if self.regrow else 0)
        return self.step_count >= last

    def step(self) -> bool:
        """Counts one optimiser step and, if it is time, chooses the masks anew; returns whether it did.

        Raises:
            ScheduleError: the schedule lowers the sparsity, which only a score that `may_regrow` can do.
        """
        self.step_count += 1
        if self._needs_optimizer_help:
            self.handle.step()
        context = self._context
        if self._uses_gradients and (gradients := self.handle.take_dense_gradients()):
            context = replace(context, grads=gradients)
        if self._observes and self.step_count <= self.schedule.end:
            for name, weight in self.weights.items():
                self.score.observe(name, weight, context)  # type: ignore[attr-defined]
        due = self._prunes_at(self.step_count) or self._regrows_at(self.step_count)
        if due:
            self._update(self._seeded(context))
        self._prepare_capture()
        return due

    def close(self) -> None:
        """Detaches the masks: no hooks are left, the model carries its masks as a record."""
        self.handle.detach()

    def state_dict(self) -> dict[str, Any]:
        """Step, masks and the score's memory, as tensors and plain values; weights are saved with the
        model."""
        return {
            "step": self.step_count,
            "keep": {name: mask.keep for name, mask in self.masks.items()},
            "patterns": {name: mask.pattern.to_dict() for name, mask in self.masks.items()},
            "score": dict(self._context.state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken; load model and optimiser first.

        Raises:
            MaskError: masks of another model.
        """
        self.handle.update(
            MaskSet(
                {n: Mask(keep, pattern_from_dict(state["patterns"][n])) for n, keep in state["keep"].items()}
            )
        )
        self.step_count = int(state["step"])
        self._context.state = dict(state["score"])
        self._prepare_capture()

    def __enter__(self) -> Sparsifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _uses_gradients(self) -> bool:
        return "grads" in self.score.needs or (self.regrow is not None and self.regrow.needs_gradients)

    @property
    def _observes(self) -> bool:
        return hasattr(self.score, "observe")

    def _previous(self, step: int) -> int:
        return (step - 1) // self.every * self.every

    def _prunes_at(self, step: int) -> bool:
        on_time = step == self.schedule.end or (step < self.schedule.end and step % self.every == 0)
        changes = self.score.may_regrow or self.schedule(step) != self.schedule(self._previous(step))
        return on_time and changes

    def _regrows_at(self, step: int) -> bool:
        return self.regrow is not None and step < self.regrow.end and step % self.every == 0

    def _prepare_capture(self) -> None:
        following = self.step_count + 1
        observing = self._observes and following <= self.schedule.end
        due = self._prunes_at(following) or self._regrows_at(following)
        self.handle.capture_gradients(self._uses_gradients and (observing or due))

    def _seeded(self, context: ScoreContext) -> ScoreContext:
        # A fresh generator per step: neither a resume nor the number of processes changes what is drawn.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step_count) % 2**63)
        return replace(context, generator=generator)

    def _update(self, context: ScoreContext) -> None:
        masks = dict(self.masks)
        if self._prunes_at(self.step_count):
            goal = check_sparsity(self.schedule(self.step_count))
            before = self.schedule(self._previous(self.step_count))
            if goal < before and not self.score.may_regrow:
                raise ScheduleError(
                    f"the schedule lowers the sparsity from {before:.6g} to {goal:.6g} at step "
                    f"{self.step_count}; {type(self.score).__name__} cannot choose what returns, use a score "
                    "that may_regrow"
                )
            masks |= self._choose(goal, context, self.masks)
        if self.regrow is not None and self._regrows_at(self.step_count):
            for name, weight in self.weights.items():
                within = self._before[name].keep if name in self._before else None
                masks[name] = self.regrow.update(
                    name, masks[name], weight, context, self.step_count, within=within
                )
        self.handle.update(self._before & MaskSet(masks))

    def _choose(self, sparsity: float, context: ScoreContext, before: MaskSet) -> MaskSet:
        patterns = {name: pattern.at(sparsity) for name, pattern in self.patterns.items()}
        if sparsity == 0:
            # Nothing to rank: gradient scores need not have been measured yet.
            return MaskSet(
                {n: Mask(torch.ones_like(w, dtype=torch.bool), patterns[n]) for n, w in self.weights.items()}
            )
        scores = score_tensors(self.weights, self.score, context, before, self._before)
        return choose_masks(scores, sparsity, patterns, self.budget)


def sparsify(
    model: nn.Module,
    *,
    sparsity: float | None = None,
    pattern: Patterns = "unstructured",
    score: str | Score = "magnitude",
    budget: str | Budget = "global",
    names: Names = None,
    seed: int = 0,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    context: ScoreContext | None = None,
) -> MaskSet:
    """Sparsifies a model in place, in one shot; it then carries the returned masks (`masks_of`).

    Entries that the model's masks already drop stay dropped and count towards the sparsity: a second pruning
    to less than what is there changes nothing (see `zoo.shared.masks.tighten`).

    Args:
        model: any module.
        sparsity: share of zeros over the chosen parameters; may be left out for N:M patterns, which fix it.
        pattern, score, budget, names, seed: as for `Sparsifier`.
        batches: data for scores that need more than weights.
        loss_fn: `loss_fn(model, batch) -> scalar`, for scores from gradients.
        forward: how to run the model on a batch, for scores from activations; default `model(batch)`.
        context: measurements made elsewhere, instead of `batches`.

    Raises:
        BudgetError, PatternError, MaskError: as for `Sparsifier`.
    """
    core = unwrap(model)
    weights = select_parameters(core, names)
    refuse_attached(weights)
    patterns = resolve_patterns(core, weights, pattern, skip=names is None)
    weights = {name: weights[name] for name in patterns}
    goal = goal_sparsity(sparsity, patterns)
    check_goal(goal, sparsity, patterns)
    chosen = resolve_score(score)
    if context is None:
        context = _measure(core, chosen, batches, loss_fn, forward)
    if context.generator is None:
        context = replace(context, generator=torch.Generator().manual_seed(seed))
    before = masks_of(core) or MaskSet({})
    scores = score_tensors(weights, chosen, context, before, before)
    masks = choose_masks(scores, goal, patterns, resolve_budget(budget, patterns))
    if whole := [name for name, mask in masks.items() if not mask.kept and mask.numel]:
        _log.warning(
            "nothing is left of %s: what passes through it is lost. budget='uniform' takes the same share of "
            "each tensor, names=... leaves tensors out",
            ", ".join(whole),
        )
    return tighten(core, masks)


def _measure(
    model: nn.Module,
    score: Score,
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
    forward: Forward | None,
) -> ScoreContext:
    """What the score needs, from the batches."""
    context = ScoreContext()
    if batches is None:
        return context
    if score.needs & {"grads", "hessian_gradients"} and loss_fn is None:
        raise MaskError(
            f"the score {type(score).__name__} needs a loss: pass loss_fn(model, batch) with batches"
        )
    if "grads" in score.needs and loss_fn is not None:
        context.grads = collect_gradients(model, loss_fn, batches)
    if "hessian_gradients" in score.needs and loss_fn is not None:
        context.hessian_gradients = collect_hessian_gradients(model, loss_fn, batches)
    if "activations" in score.needs:
        context.activations = collect_activations(model, batches, forward)
    if "hessians" in score.needs:
        context.hessians = collect_hessians(model, batches, forward)
    return context
