"""SlimFlow (arXiv 2407.12718): a small flow that makes images in one step, from a large one of many steps.

The teacher's ordinary differential equation gives pairs of noise and image. Annealing reflow trains the small
network on them, from noise of its own at first to the pairs' at last; distillation then makes it one step,
guided by two steps of the reflowed network on fresh noise. Two things are ours: distances are squared errors
(the paper's published networks use a perceptual one), and student and guide both start from the average of
the reflowed weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.diffusion.flows import TIMES, Flow, MLPFlow, velocity_loss
from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, required, stated_options
from zoo.shared.masks import MaskSet
from zoo.shared.store.identity import data_digest
from zoo.shared.train import Job, Recipe

Schedule = Literal["linear", "cosine", "exponential"]
Guide = Literal["guide", "student", "none"]
RECIPE: dict[str, Any] = {
    "lr": 2e-3,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "clip": 1.0,
    "ema": 0.995,
    "decay": "cosine",
}


@dataclass(frozen=True)
class Pairs:
    """Noise and the images that a teacher makes of it, [n, C, H, W] each.

    Attributes:
        noise, images: the pairs.
        teacher: digest of the teacher's weights.
    """

    noise: Tensor
    images: Tensor
    teacher: str

    @classmethod
    def of(cls, teacher: Flow, count: int, steps: int, seed: int) -> Pairs:
        """Pairs by Euler's method."""
        noise = torch.randn((count, *teacher.sample_shape), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return cls(noise, teacher.eval().images(noise, steps), weights_digest(teacher))

    def check(self, batch: int, teacher: Flow | None = None) -> None:
        """Refuse pairs that cannot be trained on.

        Raises:
            ConfigError: fewer than a batch, images of another shape or not finite, noise that is not standard
                normal, or another teacher than the one given.
        """
        if len(self.noise) < batch:
            raise ConfigError(f"{len(self.noise)} pairs are fewer than a batch of {batch}: make more pairs")
        finite = all(bool(torch.isfinite(values).all()) for values in (self.noise, self.images))
        if self.noise.shape != self.images.shape or not finite:
            raise ConfigError("noise and images of the pairs must be finite and of one shape: make them anew")
        mean, deviation = float(self.noise.mean()), float(self.noise.std())
        error = 5 / math.sqrt(self.noise.numel())
        if abs(mean) > error or abs(deviation - 1) > error:
            raise ConfigError(
                f"the pairs' noise has mean {mean:.3f} and deviation {deviation:.3f}; a flow starts "
                "from 0 and 1: store noise as it was drawn"
            )
        if teacher is not None and weights_digest(teacher) != self.teacher:
            raise ConfigError("the pairs were made by another teacher: make them anew with this one")


def weights_digest(model: nn.Module) -> str:
    """Digest of a model's weights."""
    return data_digest({name: value.detach().cpu() for name, value in model.state_dict().items()})


def annealed(step: int, steps: int, schedule: Schedule = "linear") -> float:
    """Share beta of fresh noise, 1 at the first step; 0 from `steps` on for the linear and cosine ones."""
    if schedule == "exponential":
        return math.exp(-step / steps)
    done = min(1.0, step / steps)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class AnnealedPairs:
    """Training batches (images, noise, sigmas) of pairs whose noise is mixed with fresh noise at first:
    z' = sqrt(1 - beta^2) z + beta xi.

    Args:
        pairs: the teacher's.
        steps: of the whole training, one epoch.
        annealing: steps until no fresh noise is left; 0 for plain reflow.
        batch: pairs per step.
        schedule: how the share falls.
    """

    pairs: Pairs
    steps: int
    annealing: int
    batch: int = 128
    schedule: Schedule = "linear"

    def __len__(self) -> int:
        return self.steps

    def sized(self, batch: int) -> AnnealedPairs:
        """The same pairs in batches of another size."""
        return AnnealedPairs(self.pairs, self.steps, self.annealing, batch, self.schedule)

    def draw(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches, in the order of the annealing."""
        for step in range(self.steps):
            chosen = torch.randint(len(self.pairs.noise), (self.batch,), generator=generator)
            noise = self.pairs.noise[chosen]
            if self.annealing:
                beta = annealed(step, self.annealing, self.schedule)
                fresh = torch.randn(noise.shape, generator=generator)
                noise = math.sqrt(1 - beta**2) * noise + beta * fresh
            yield self.pairs.images[chosen], noise, torch.rand(self.batch, generator=generator)

    def example(self) -> tuple[Tensor, Tensor]:
        """One image with its time, as the model takes it."""
        return self.pairs.images[:1], torch.tensor([0.0])


@dataclass(frozen=True)
class OneStep:
    """The loss of one-step distillation on a batch (images, noise, shares in [0, 1)) of pairs.

    The student's image of a pair's noise is near the pair's image; its image of fresh noise near what two
    steps make of it, the first of t ~ U(0.2, 0.8): both by the guide (the paper's form), or the first by the
    student itself (the form that the authors' code runs).

    Attributes:
        guide: the reflowed network, frozen; None for pairs only.
        first: who takes the first step.
    """

    guide: Flow | None
    first: Guide = "guide"

    def __call__(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """The loss."""
        images, noise, shares = batch
        whole = torch.full((len(noise),), float(TIMES), device=noise.device)
        loss = F.mse_loss(noise - model(noise, whole), images)
        if self.guide is None:
            return loss
        fresh = torch.randn_like(noise)
        target = self.target(model, fresh, 0.2 + 0.6 * shares)
        return loss + F.mse_loss(fresh - model(fresh, whole), target)

    @torch.no_grad()
    def target(self, model: nn.Module, noise: Tensor, shares: Tensor) -> Tensor:
        """What a step of `shares` and one of the rest make of noise."""
        assert self.guide is not None
        share = shares.view(-1, *[1] * (noise.dim() - 1))
        start: nn.Module = model if self.first == "student" else self.guide
        x = noise - share * start(noise, torch.full_like(shares, float(TIMES)))
        out: Tensor = x - (1 - share) * self.guide(x, TIMES * (1 - shares))
        return out


@dataclass
class SlimFlow:
    """Train a small flow that makes images in one step, from a large one of many steps."""

    needs_job: ClassVar[bool] = True

    width: int = 48
    """Width of the small network's residual stream."""

    blocks: int = 2
    """Residual blocks of the small network."""

    pairs: int = 300
    """Pairs of noise and image that the teacher makes."""

    teacher_steps: int = 50
    """Euler steps of the teacher for a pair."""

    reflow_steps: int = 2000
    """Training steps of reflow."""

    annealing: float = 0.5
    """Share of these until no fresh noise is left; 0 for plain reflow."""

    schedule: Schedule = "linear"
    """How the share of fresh noise falls."""

    distil_steps: int = 1500
    """Training steps of one-step distillation; 0 for none."""

    guide: Guide = "guide"
    """Who takes the first of the two guiding steps: the reflowed network, the student itself (what the
    authors' code does), or none for distillation by pairs only."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Train the small network; the teacher is left as it is.

        Raises:
            ConfigError: a model that is no flow of a perceptron, no job, shares out of range, an unknown
                schedule, or guidance by a network that was never reflowed.
        """
        job = required(job, self)
        if not isinstance(model, MLPFlow):
            raise ConfigError(f"SlimFlow slims the zoo's MLPFlow; received {type(model).__name__}")
        self.check()
        pairs = Pairs.of(model, self.pairs, self.teacher_steps, job.seed)
        channels, side, _ = model.sample_shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            small = MLPFlow(side, channels, 1, self.width, self.blocks)
        self.slim(small, pairs, job)
        return Sparsified(
            small.eval(),
            MaskSet({}),
            hyperparameters={**stated_options(self), "seed": job.seed},
            arguments=small.current_arguments(),
        )

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: see `sparsify`.
        """
        if not 0 <= self.annealing <= 1:
            raise ConfigError(f"annealing is a share of the steps, 0 to 1; received {self.annealing}")
        if self.schedule not in get_args(Schedule):
            raise ConfigError(
                f"the share of fresh noise falls by one of {', '.join(get_args(Schedule))}; received "
                f"{self.schedule!r}"
            )
        if self.distil_steps and self.guide != "none" and not self.reflow_steps:
            raise ConfigError(
                "the guide of the distillation was never reflowed, and its two steps are far from an image: "
                "give reflow_steps, or guide='none'"
            )

    def slim(self, student: Flow, pairs: Pairs, job: Job) -> None:
        """Reflow and distil a network of any kind, in place; the job gives seed, device and batch."""
        self.reflow(student, pairs, job)
        self.distil(student, pairs, job)

    def reflow(self, student: Flow, pairs: Pairs, job: Job) -> None:
        """Train on the pairs, annealed."""
        pairs.check(job.recipe.batch)
        steps = self.reflow_steps
        if steps:
            annealing = round(self.annealing * steps)
            batches = AnnealedPairs(pairs, steps, annealing, job.recipe.batch, self.schedule)
            _train(student, batches, velocity_loss, steps, job)

    def distil(self, student: Flow, pairs: Pairs, job: Job) -> None:
        """Train for a single step."""
        if not self.distil_steps:
            return
        guide = copy.deepcopy(student).eval().requires_grad_(False) if self.guide != "none" else None
        batches = AnnealedPairs(pairs, self.distil_steps, 0, job.recipe.batch)
        _train(student, batches, OneStep(guide, self.guide), self.distil_steps, job)
        student.steps = 1


def _train(student: Flow, batches: AnnealedPairs, loss: Any, steps: int, job: Job) -> None:
    recipe = Recipe(steps=steps, batch=job.recipe.batch, **RECIPE)
    Job(batches, loss=loss, recipe=recipe, seed=job.seed, device=job.device).fit(student.train()).run()
