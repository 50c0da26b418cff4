"""Training of language models on packed windows: one loop for pretraining and fine-tuning.

Which windows a step sees, and its learning rate, follow from the step's number alone, so that a run that goes
on from a checkpoint equals one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from zoo.checkpoints import CheckpointFile, optimizer_tensors, part, restore_optimizer
from zoo.errors import ConfigError, DataError


@dataclass(frozen=True)
class TrainConfig:
    """How to train; raises ConfigError for values that cannot be.

    Args:
        steps: optimizer steps.
        batch: windows per step, over all processes.
        window: tokens per window.
        lr: AdamW's highest learning rate.
        warmup: share of the steps in which the rate rises to it; it then falls to zero along a cosine.
        weight_decay: of matrices; norms have none.
        clip: largest norm of the gradient.
        seed: of the order of the windows.
    """

    steps: int
    batch: int = 8
    window: int = 256
    lr: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1. Received: {getattr(self, name)}.")
        if not (0 < self.lr < math.inf and self.clip > 0 and 0 <= self.weight_decay < math.inf):
            raise ConfigError(
                f"lr and clip must be positive, weight_decay not negative. Received: {self.lr}, {self.clip}, "
                f"{self.weight_decay}."
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is a share of the steps, from 0 up to 1. Received: {self.warmup}.")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (self.steps - rise + 1)))


class Windows:
    """The windows of a text in an order drawn anew for each pass, as a function of the step.

    Each pass begins at another offset, so that the cuts between windows move.

    Args:
        tokens: the text.
        window: tokens to predict per window.
        batch: windows per step.
        seed: of the order.

    Raises:
        DataError: the text is shorter than two windows.
    """

    def __init__(self, tokens: Int[Tensor, " n"], window: int, batch: int, seed: int) -> None:
        self.per_pass = (len(tokens) - 1) // window - 1
        if self.per_pass < 1:
            raise DataError(
                f"The text has {len(tokens)} tokens, fewer than two windows of {window}. Give more text or a "
                "smaller window."
            )
        self.tokens, self.window, self.batch, self.seed = tokens, window, batch, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __call__(self, step: int) -> Int[Tensor, "batch window_1"]:
        """The windows of a step, each with the token before it."""
        numbers = range(step * self.batch, (step + 1) * self.batch)
        starts = torch.stack(
            [self._starts(number // self.per_pass)[number % self.per_pass] for number in numbers]
        )
        return self.tokens[starts[:, None] + torch.arange(self.window + 1)]

    def _starts(self, number: int) -> Tensor:
        if self._order[0] != number:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            offset = int(torch.randint(self.window, (), generator=generator))
            order = torch.randperm(self.per_pass, generator=generator)
            self._order = (number, offset + order * self.window)
        return self._order[1]


class Fit:
    """A training that can stop after any step, on the device where the model is.

    Args:
        model: a causal LM in single precision; its trainable parameters are trained.
        windows: the data.
        config: the recipe.
        optimizer: by default AdamW over the trainable parameters, see `adamw`.
        backward: called with the loss; Accelerate's, in several processes.
        share: (rank, processes): which part of each step's windows is this process's.
        distil: called with (logits, windows); a loss that is added, see `distillation`.
        autocast: precision of the matrix products, weights staying in single precision; None for theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Windows,
        config: TrainConfig,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        share: tuple[int, int] = (0, 1),
        distil: Callable[[Tensor, Tensor], Tensor] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        rank, processes = share
        if config.batch % processes:
            raise ConfigError(f"batch ({config.batch}) must be a multiple of the {processes} processes.")
        self.model, self.windows, self.config = model, windows, config
        self.optimizer = optimizer if optimizer is not None else adamw(model, config)
        self.backward, self.rank, self.processes, self.distil = backward, rank, processes, distil
        self.autocast = autocast
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.step = 0
        self.last_loss = math.nan

    @property
    def done(self) -> bool:
        """Whether all steps were made."""
        return self.step >= self.config.steps

    def advance(self) -> None:
        """One step.

        Raises:
            DataError: the loss is not finite.
        """
        self.model.train()
        device = self.parameters[0].device
        batch = self.windows(self.step)[self.rank :: self.processes].to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        mixed = torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)
        with mixed, torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # dropout, where a model has it
            logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = next_token_loss(logits, batch[:, 1:])
            self.last_loss = float(loss.detach())
            if not math.isfinite(self.last_loss):
                raise DataError(
                    f"The loss is {self.last_loss} at step {self.step}. Lower lr, or check the weights."
                )
            if self.distil is not None:
                loss = loss + self.distil(logits, batch)
        self.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def run(self, on_step: Callable[[Fit], None] | None = None) -> None:
        """All steps that are left; `on_step` is called after each."""
        while not self.done:
            self.advance()
            if on_step is not None:
                on_step(self)

    def write(
        self,
        file: CheckpointFile,
        facts: Mapping[str, str] | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Store the trainable weights, the optimizer's moments, the step, and further facts and tensors."""
        tensors = {**(more or {}), **{f"model/{name}": p for name, p in self._trainable().items()}}
        tensors |= {f"optimizer/{name}": v for name, v in optimizer_tensors(self.optimizer).items()}
        file.write(tensors, {**(facts or {}), "step": str(self.step)})

    def restore(self, file: CheckpointFile) -> bool:
        """Go on from a checkpoint; False if there is none.

        Raises:
            ConfigError: it is of another run or damaged.
        """
        if (found := file.read()) is None:
            return False
        tensors, facts = found
        stored = part(tensors, "model/")
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                parameter.copy_(stored[name])
        restore_optimizer(self.optimizer, part(tensors, "optimizer/"))
        self.step = int(facts["step"])
        return True

    def _trainable(self) -> dict[str, Tensor]:
        model = getattr(self.model, "module", self.model)  # DDP wraps the model
        return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (beta 0.9, 0.95) over the trainable parameters; only matrices decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(0.9, 0.95), fused=True)


def distillation(teacher: nn.Module, weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """weight * KL(teacher || model) in nats per token, of (logits, windows), for `Fit`."""

    def divergence(logits: Tensor, batch: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        own = logits.float().log_softmax(-1)
        loss = functional.kl_div(own, target, log_target=True, reduction="sum")
        return weight * loss / target[..., 0].numel()

    return divergence


def next_token_loss(
    logits: Float[Tensor, "batch tokens vocab"], targets: Int[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood in nats per token."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
