"""EcoDiff, "Effortless Efficiency" (arXiv 2412.02852): heads and neurons removed by masks that are learned
through the whole sampler, without touching a weight.

The loss is the distance of the final images, so that errors of single steps may cancel or add up as they do
in use. Each step is recomputed in the backward pass with the noise of its gates reproduced, so that the
gradient is that of the loss; the authors' code draws new noise there. An emptied attention returns the bias
of its projection; the authors' returns its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from zoo.diffusion.gates import gated
from zoo.diffusion.parts import denoiser_of, require_plain
from zoo.diffusion.plan import Plan
from zoo.diffusion.prompting import Prompted, Source, check_prompted, seed_of, source_of
from zoo.diffusion.units import UnitGroup, unit_groups
from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, stated_options
from zoo.shared.errors import BudgetError
from zoo.shared.learned.gates import hard_concrete
from zoo.shared.masks import MaskSet
from zoo.shared.masks.topk import topk_mask
from zoo.shared.train import Job

TEMPERATURE = 0.83


@dataclasses.dataclass
class EcoDiff(Prompted):
    """Remove attention heads and feed-forward neurons by masks learned through the whole sampler."""

    needs_job: ClassVar[bool] = True

    keep: float = 0.6
    """Share of the heads, and of the neurons, that stay."""

    score: Literal["learned", "norm", "random"] = "learned"
    """What ranks units: learned masks, the norm of their columns in the down-projection, or chance."""

    scope: Literal["global", "local"] = "global"
    """Whether units compete in the whole network or within their module."""

    updates: int = 45
    """Steps of learning."""

    sampling_steps: int = 8
    """Sampling steps through which it learns."""

    prompts: int = 16
    """Prompts per update."""

    rate: float = 0.15
    """Learning rate of the mask variables (AdamW without weight decay)."""

    beta: float = 0.02
    """Weight of the regulariser, the mean of sigmoid(0.4 lambda + 1)."""

    start: float = 1.5
    """Mask variables at the start; at the authors' 3 the gates are saturated and pass hardly any gradient."""

    epsilon: float = 0.5
    """How much the noise of the gates is tamed: log(u + epsilon) - log(1 - u + epsilon)."""

    recompute: bool = True
    """Recompute each step in the backward pass: the memory of one step, at 1.7 times the work."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Cut `model` in place; it must offer `denoise`, `encode`, `scheduler` and `cut`.

        Raises:
            BudgetError: a share outside (0, 1], or masks to learn in no update.
            ConfigError: no prompts to learn from, a model without units, a scheduler without gradients, or
                weights that are not finite.
        """
        if not 0 < self.keep <= 1:
            raise BudgetError(f"keep is a share of the units, above 0 and at most 1; received {self.keep}")
        if self.score == "learned" and self.updates < 1:
            raise BudgetError(
                f"without an update all masks are alike: give updates=1 or more; received {self.updates}"
            )
        check_prompted(model, self)
        require_plain(model)
        groups = unit_groups(denoiser_of(model))
        if not groups:
            raise ConfigError(f"{type(model).__name__} has no attention heads and no feed-forward neurons")
        scores = self.scores(model, groups, job)
        plan = Plan({name: tuple(kept) for name, kept in kept_units(groups, scores, self.keep, self.scope)})
        target: Any = model
        target.cut(plan)
        masks = keep_masks(groups, plan)
        return Sparsified(
            model.eval(),
            MaskSet({}),
            extras={f"{kind}/keep": mask for kind, mask in masks.items()},
            hyperparameters=stated_options(self, job),
            parts={kind: {"pattern": "channel"} for kind in masks},
            arguments=target.current_arguments(),
        )

    def scores(self, model: Any, groups: list[UnitGroup], job: Job | None) -> dict[str, Tensor]:
        """A score per unit, by group; larger stays.

        Raises:
            ConfigError: learning without prompts, or through a scheduler without gradients.
        """
        if self.score == "norm":
            return {group.name: column_norms(denoiser_of(model), group) for group in groups}
        if self.score == "random":
            generator = torch.Generator().manual_seed(seed_of(model, job))
            return {group.name: torch.rand(group.count, generator=generator) for group in groups}
        source = source_of(model, job, "masks are learned on prompts")
        source.require_gradients()
        return self._learn(model, groups, source, seed_of(model, job))

    def _learn(
        self, model: nn.Module, groups: list[UnitGroup], source: Source, seed: int
    ) -> dict[str, Tensor]:
        network = denoiser_of(model)
        variables = {g.name: torch.full((g.count,), float(self.start), requires_grad=True) for g in groups}
        optimizer = torch.optim.AdamW(variables.values(), lr=self.rate, weight_decay=0.0)
        trained = [p for p in model.parameters() if p.requires_grad]
        model.eval().requires_grad_(False)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for update in range(self.updates):
                    make = source.drawn(update, self.prompts, self.sampling_steps)
                    with torch.no_grad():
                        target = make(False)
                    optimizer.zero_grad()
                    self.descend(network, variables, make, target)
                    optimizer.step()
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        return {name: value.detach() for name, value in variables.items()}

    def descend(
        self,
        network: nn.Module,
        variables: dict[str, Tensor],
        make: Callable[[bool], Tensor],
        target: Tensor,
    ) -> float:
        """Add the gradient of ||F(z) - F_m(z)||^2 over the final images + beta R(lambda) to the variables.

        Returns:
            The loss, a mean over images and values.
        """
        with gated(network, gates(variables, self.epsilon)):  # also while steps are recomputed
            made = make(self.recompute)
            pull = torch.stack([torch.sigmoid(0.4 * value + 1).mean() for value in variables.values()]).mean()
            loss = (made - target).square().mean() + self.beta * pull
            loss.backward()
        return float(loss.detach())


def gates(variables: dict[str, Tensor], epsilon: float) -> Callable[[UnitGroup], Tensor]:
    """Hard-concrete gates with fresh noise at every call of a layer, so in every sampling step.

    The noise comes from torch's own generator, whose state recomputation restores: the same gates are then
    drawn again.
    """

    def draw(group: UnitGroup) -> Tensor:
        logits = variables[group.name]
        tamed = (torch.rand_like(logits) + epsilon) / (1 + 2 * epsilon)
        return hard_concrete(logits, tamed, TEMPERATURE)

    return draw


def column_norms(network: nn.Module, group: UnitGroup) -> Tensor:
    """Per unit the norm of its columns in the down-projections, over the square root of their number."""
    total = torch.zeros(group.count)
    for part in group.columns:
        weight = network.get_submodule(part.linear).weight
        assert isinstance(weight, Tensor)
        own = weight.detach()[:, part.start : part.start + group.count * group.width].float()
        total += own.square().sum(0).view(group.count, group.width).sum(1)
    return (total / group.width).sqrt()


def keep_masks(groups: list[UnitGroup], plan: Plan) -> dict[str, Tensor]:
    """Which units a plan keeps, by kind (`heads`, `neurons`), over all groups of the kind in their order."""
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        kept = torch.zeros(group.count, dtype=torch.bool)
        kept[list(plan.units.get(group.name, range(group.count)))] = True
        found.setdefault(group.kind, []).append(kept)
    return {kind: torch.cat(masks) for kind, masks in found.items()}


def kept_units(
    groups: list[UnitGroup], scores: dict[str, Tensor], keep: float, scope: str
) -> list[tuple[str, list[int]]]:
    """The units that stay: the best `keep` of all heads and of all neurons, or of those of each module."""
    chosen: list[tuple[str, list[int]]] = []
    for kind in ("heads", "neurons"):
        own = [group for group in groups if group.kind == kind]
        pools = [own] if scope == "global" else [[group] for group in own]
        for pool in pools:
            if not pool:
                continue
            every = torch.cat([scores[group.name] for group in pool])
            mask = topk_mask(every, max(1, round(keep * len(every))))
            for group, part in zip(pool, mask.split([group.count for group in pool]), strict=True):
                chosen.append((group.name, part.nonzero().flatten().tolist()))
    return chosen
