"""Fewer deep blocks per sample: what a UNet's inner levels gave a step ago is used again (after DeepCache,
arXiv 2312.00858).

Only the outermost level runs at every step; the rest runs at every `every`-th step. It stands beside
pruning, and multiplies with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from zoo.diffusion.parts import denoiser_of
from zoo.diffusion.sampling import Denoiser, sample
from zoo.errors import ConfigError

LEAST_STEPS = 5


def sample_cached(
    model: Denoiser,
    noise: Tensor,
    condition: Any,
    *,
    steps: int = 20,
    every: int = 3,
    guidance: float = 1.0,
    unconditional: Any = None,
) -> Tensor:
    """Images like those of `zoo.diffusion.sampling.sample`, with the inner levels at every `every`-th step.

    Raises:
        ConfigError: fewer than five steps, between which too much changes; an interval below one; or a
            denoiser that is no UNet of several levels.
    """
    if steps < LEAST_STEPS:
        raise ConfigError(
            f"between the steps of a sampler of {steps} too much changes to use anything again: take at "
            f"least {LEAST_STEPS} steps, or sample without the cache"
        )
    with cached(denoiser_of(model), every, 1 if guidance == 1.0 else 2):
        return sample(model, noise, condition, steps=steps, guidance=guidance, unconditional=unconditional)


@contextmanager
def cached(network: nn.Module, every: int, branches: int = 1) -> Iterator[None]:
    """Let a UNet's inner levels run at every `every`-th step only, while the context lasts.

    Args:
        network: whose calls are counted, the first of which runs whole.
        every: interval, in steps.
        branches: calls per step, each of which keeps results of its own (two with guidance).

    Raises:
        ConfigError: see `sample_cached`.
    """
    if every < 1:
        raise ConfigError(f"every is at least 1 (no caching); received {every}")
    found: Any = network
    if len(getattr(found, "down_blocks", ())) < 2:
        raise ConfigError(f"{type(network).__name__} has no inner levels that could be left out of a step")
    inner = [*found.down_blocks[1:], *([found.mid_block] if found.mid_block is not None else [])]
    inner += found.up_blocks[:-1]
    calls, kept = [-1], dict[tuple[int, int], Any]()

    def count(*_: Any) -> None:
        calls[0] += 1

    def again(place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            step, branch = divmod(calls[0], branches)
            if step % every == 0:
                kept[place, branch] = forward(*args, **kwargs)
            return kept[place, branch]

        return run

    handle = network.register_forward_pre_hook(count)
    for place, block in enumerate(inner):
        block.forward = again(place, block.forward)
    try:
        yield
    finally:
        handle.remove()
        for block in inner:
            del block.forward  # what the class has
