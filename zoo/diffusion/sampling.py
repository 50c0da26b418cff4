"""Sampling loops, also differentiable through all steps with the memory of one."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.errors import ConfigError

DIFFERENTIABLE = (DDIMScheduler, FlowMatchEulerDiscreteScheduler)
REMEMBERING = (PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)  # where the run stands


@runtime_checkable
class Denoiser(Protocol):
    """A model that a sampling loop can run."""

    scheduler: Any

    def denoise(self, x: Tensor, times: Tensor, condition: Any) -> Tensor: ...


def sample(
    model: Denoiser,
    noise: Tensor,
    condition: Any,
    *,
    steps: int = 10,
    guidance: float = 1.0,
    unconditional: Any = None,
    recompute: bool = False,
) -> Tensor:
    """Images made from noise, [n, C, H, W].

    Args:
        model: see `Denoiser`.
        noise: the starting points.
        condition: what `model.denoise` takes beside image and time.
        steps: of the scheduler.
        guidance: scale of classifier-free guidance; 1 for none.
        unconditional: the condition without a prompt, for guidance.
        recompute: recompute each step in the backward pass instead of keeping its activations; gates must
            then draw no noise of their own inside the loop.

    Raises:
        ConfigError: guidance without an unconditional condition, or fewer than one step.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1; received {steps}")
    if guidance != 1.0 and unconditional is None:
        raise ConfigError("guidance needs the condition of an empty prompt; give unconditional=...")
    scheduler = type(model.scheduler).from_config(model.scheduler.config)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[(steps - i) / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)

    def step(x: Tensor, time: Tensor) -> Tensor:
        times = time.expand(len(x))
        out = model.denoise(x, times, condition)
        if guidance != 1.0:
            without = model.denoise(x, times, unconditional)
            out = without + guidance * (out - without)
        moved: Tensor = scheduler.step(out, time, x).prev_sample
        return moved

    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for time in scheduler.timesteps:
        x = checkpoint(step, x, time, use_reentrant=False) if recompute else step(x, time)
    return x


def require_differentiable(scheduler: Any, whole_runs: bool = False) -> None:
    """Refuse noise schedules through which gradients do not pass, or not the right ones.

    Args:
        scheduler: of diffusers.
        whole_runs: whether steps are never repeated, so that a scheduler may remember earlier ones.

    Raises:
        ConfigError: samples are clipped, steps are stochastic, or the class is not known to be
        differentiable.
    """
    if not isinstance(scheduler, DIFFERENTIABLE + (REMEMBERING if whole_runs else ())):
        raise ConfigError(
            f"a {type(scheduler).__name__} is not known to be deterministic and differentiable. Use "
            "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)."
        )
    if getattr(scheduler.config, "clip_sample", False) or getattr(scheduler.config, "thresholding", False):
        raise ConfigError("the scheduler clips samples, which stops gradients. Set clip_sample=False.")
    if getattr(scheduler.config, "stochastic_sampling", False):
        raise ConfigError("the scheduler draws noise in its steps. Set stochastic_sampling=False.")
    if "sde" in str(getattr(scheduler.config, "algorithm_type", "")):
        raise ConfigError("the scheduler draws noise in its steps. Set algorithm_type='dpmsolver++'.")
