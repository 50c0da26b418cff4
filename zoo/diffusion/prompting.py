"""What methods measure on: a model of the zoo with the batches of its job, or a pipeline of diffusers with
prompts.

A pipeline is run by its own `__call__`, which encodes prompts and steps as its family does. Its denoiser is
watched there, replayed on the inputs that it received, or followed by the gradient of the latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.diffusion.parts import denoiser_of, prompts_of, run_sampler
from zoo.diffusion.sampling import require_differentiable, sample
from zoo.errors import ConfigError
from zoo.shared.train import Job

Outputs = Callable[[], list[Tensor]]
Call = tuple[tuple[Any, ...], dict[str, Any]]
BATCH = 16  # prompts that are drawn together while activations are measured
STEPS = 10  # of the sampling runs whose denoiser calls are kept
DRAWN = 1 << 20  # seeds from here on belong to draws, so that none is that of the run before


@dataclasses.dataclass(kw_only=True)
class Prompted:
    """Options of a method whose scores may need prompts."""

    captions: Path | None = None
    """File with a prompt on each line, for the folder of a pipeline: what scores are measured on."""

    image_side: int = 0
    """Height and width of the images of these prompts in pixels; 0 for the pipeline's own."""


@runtime_checkable
class Source(Protocol):
    """Where scores come from."""

    def require_gradients(self) -> None:
        """Raise ConfigError if no gradient passes through the sampler."""

    def drawn(self, index: int, prompts: int, steps: int) -> Callable[[bool], Tensor]:
        """The sampler on the index-th draw of noise and prompts, as a function of whether each call of the
        denoiser is recomputed in the backward pass; gives the final values, [n, ...]."""

    def outputs(self, count: int, guided: bool) -> Outputs:
        """The denoiser on fixed inputs; guided, also the difference that the prompts make."""

    def timed(self, images: int) -> Callable[[], object]:
        """One call of the denoiser, on so many images."""

    def batches(self, prompts: int) -> Sequence[Any]:
        """Prompts for `run`."""

    def run(self, batch: Any, steps: int, guidance: float) -> Tensor:
        """Sample one of `batches`."""


def check_prompted(model: nn.Module, method: Prompted) -> None:
    """Refuse options of pipelines where there is none.

    Raises:
        ConfigError: captions for a model without a pipeline, or a size of images without captions.
    """
    if method.image_side and method.captions is None:
        raise ConfigError("image_side is the size of the images of captions: give captions, too")
    if method.captions is not None and getattr(model, "source", None) is None:
        raise ConfigError(
            "captions are for the folder of a pipeline; this model brings its own. Leave them out"
        )


def source_of(model: nn.Module, job: Job | None, need: str) -> Source:
    """What a model is measured on.

    Args:
        model: of the zoo, or with a pipeline as its attribute `source`.
        job: of a model of the zoo.
        need: what needs it, for the message.

    Raises:
        ConfigError: nothing to measure on.
    """
    own: Source | None = getattr(model, "source", None)
    if own is not None:
        return own
    if job is None:
        raise ConfigError(
            f"{need}: give a job, or for the folder of a pipeline captions=FILE (--captions FILE) with a "
            "prompt on each line"
        )
    return Jobs(model, job)


def seed_of(model: nn.Module, job: Job | None) -> int:
    """The seed of a job, or that of a model that has none."""
    return job.seed if job is not None else int(getattr(model, "seed", 0))


@dataclasses.dataclass(frozen=True)
class Jobs:
    """A text-to-image model of the zoo, measured on the batches of its job."""

    model: Any
    job: Job

    def require_gradients(self) -> None:
        """Raise ConfigError if the scheduler lets no gradient pass."""
        require_differentiable(self.model.scheduler)

    def drawn(self, index: int, prompts: int, steps: int) -> Callable[[bool], Tensor]:
        """See `Source`."""
        noise, ids = prompts_of(self.job.sample(1, seed_offset=1 + index), prompts)
        with torch.no_grad():
            condition = self.model.encode(ids)
        return lambda recompute: sample(self.model, noise, condition, steps=steps, recompute=recompute)

    def outputs(self, count: int, guided: bool = False) -> Outputs:
        """See `Source`."""
        return functools.partial(outputs_on, self.model, noisy_images(self.model, self.job, count), guided)

    def timed(self, images: int) -> Callable[[], object]:
        """See `Source`."""
        x, times, ids = (values[:images] for values in noisy_images(self.model, self.job, max(2, images)))
        return lambda: self.model(x, times, ids)

    def batches(self, prompts: int) -> list[tuple[Tensor, Tensor]]:
        """See `Source`."""
        noise, ids = prompts_of(self.job.sample(prompts), prompts)
        return [(noise[i : i + BATCH], ids[i : i + BATCH]) for i in range(0, len(ids), BATCH)]

    def run(self, batch: tuple[Tensor, Tensor], steps: int, guidance: float) -> Tensor:
        """See `Source`."""
        return run_sampler(self.model, batch, steps, guidance)


@torch.no_grad()
def noisy_images(model: Any, job: Job, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy images, time steps spread over the schedule, token ids): common to all layers."""
    batches = job.sample(-(-count // 16))
    images = torch.cat([batch[0] for batch in batches])[:count]
    noise, ids = prompts_of(batches, count)
    times = torch.linspace(0, int(model.scheduler.config.num_train_timesteps) - 1, len(images)).long()
    return model.scheduler.add_noise(images, noise, times), times, ids


def outputs_on(model: Any, inputs: tuple[Tensor, Tensor, Tensor], guided: bool = False) -> list[Tensor]:
    """The prediction on `noisy_images`; guided, also its difference to that without a prompt."""
    x, times, ids = inputs
    own = model(x, times, ids)
    if not guided:
        return [own]
    return [own, own - model(x, times, model.tokenise([""] * len(ids)))]


class Pipeline:
    """A pipeline of diffusers, measured on prompts.

    Args:
        pipe: the pipeline; its denoiser is the network that is pruned.
        prompts: at least two; for a pipeline of classes their numbers. They are used in turn.
        seed: of the noise.
        side: height and width of the images in pixels; 0 for the pipeline's own.
        told: called with their number before each sampling run and each replay.

    Raises:
        ConfigError: fewer than two prompts, no numbers where classes are asked for, or a size that is not
            positive or cannot be chosen.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seed: int = 0,
        side: int = 0,
        told: Callable[[int], object] | None = None,
    ) -> None:
        self.pipe, self.prompts, self.seed, self.side = pipe, list(prompts), seed, side
        self.told, self.passes = told, 0
        self.known = inspect.signature(type(pipe).__call__).parameters
        if len(self.prompts) < 2:
            raise ConfigError(f"at least two prompts are needed; received {len(self.prompts)}")
        if "class_labels" in self.known and not all(text.strip().isdecimal() for text in self.prompts):
            raise ConfigError(f"{type(pipe).__name__} draws classes: give their numbers instead of prompts")
        if side < 0 or (side and "height" not in self.known):
            raise ConfigError(
                f"image_side is a number of pixels, for pipelines that draw in any size; received {side} for "
                f"{type(pipe).__name__}"
            )
        pipe.set_progress_bar_config(disable=True)

    @property
    def network(self) -> nn.Module:
        """The denoiser."""
        return denoiser_of(self.pipe)

    def require_gradients(self) -> None:
        """Raise ConfigError if the pipeline returns no latents, or its scheduler lets no gradient pass."""
        if "prompt" not in self.known or "output_type" not in self.known:
            raise ConfigError(
                f"{type(self.pipe).__name__} returns finished images, through which no gradient passes. Use "
                "another score (--score norm)"
            )
        require_differentiable(self.pipe.scheduler, whole_runs=True)

    def drawn(self, index: int, prompts: int, steps: int) -> Callable[[bool], Tensor]:
        """See `Source`."""
        chosen = self._turn(index * prompts, prompts)

        def make(recompute: bool) -> Tensor:
            with recomputed(self.network) if recompute else contextlib.nullcontext():
                return self._call(chosen, steps, None, DRAWN + index)

        return make

    def outputs(self, count: int, guided: bool) -> Outputs:
        """See `Source`; so many calls of the denoiser, spread over whole sampling runs.

        Raises:
            ConfigError: guided, which a pipeline's call does not tell apart.
        """
        if guided:
            raise ConfigError("how a pipeline guides is its own: use score='output' (--score output)")
        runs = [self._recorded(self._turn(run, 1), STEPS, run) for run in range(-(-count // STEPS))]
        calls = [call for run in runs for call in run]
        kept = [calls[i * len(calls) // count] for i in range(min(count, len(calls)))]

        def replay() -> list[Tensor]:
            self._tell()
            return [torch.cat([_first(self.network(*args, **named)) for args, named in kept])]

        return replay

    def timed(self, images: int) -> Callable[[], object]:
        """See `Source`; guided calls are of twice as many."""
        (args, named), *_ = self._recorded(self._turn(0, images), 1, 0)
        return lambda: self.network(*args, **named)

    def _recorded(self, texts: list[str], steps: int, seed: int) -> list[Call]:
        """What the denoiser was called with in a sampling run."""
        calls: list[Call] = []
        hook = self.network.register_forward_pre_hook(
            lambda _, args, named: calls.append((args, named)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                self._call(texts, steps, None, seed)
        finally:
            hook.remove()
        return calls

    def batches(self, prompts: int) -> list[tuple[int, list[str]]]:
        """See `Source`; each with the seed of its noise."""
        texts = self._turn(0, prompts)
        return [(i, texts[i : i + BATCH]) for i in range(0, prompts, BATCH)]

    def run(self, batch: tuple[int, list[str]], steps: int, guidance: float) -> Tensor:
        """See `Source`."""
        seed, texts = batch
        return self._call(texts, steps, guidance, seed)

    def _tell(self) -> None:
        self.passes += 1
        if self.told is not None:
            self.told(self.passes)

    def _turn(self, start: int, count: int) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(start, start + count)]

    def _call(self, texts: list[str], steps: int, guidance: float | None, seed: int) -> Tensor:
        """What the pipeline's own call gives, outside the `no_grad` that it is wrapped in."""
        self._tell()
        named: dict[str, Any] = {"num_inference_steps": steps, "return_dict": False}
        named["generator"] = torch.Generator().manual_seed(self.seed + seed)
        if "prompt" in self.known:
            named |= {"prompt": texts, "output_type": "latent"}
        elif "class_labels" in self.known:
            named |= {"class_labels": [int(text) for text in texts], "output_type": "np"}
        else:
            named |= {"batch_size": len(texts), "output_type": "np"}
        if guidance is not None and "guidance_scale" in self.known:
            named["guidance_scale"] = guidance
        if self.side:
            named |= {"height": self.side, "width": self.side}
            if "use_resolution_binning" in self.known:  # PixArt's, to the sizes of its training
                named["use_resolution_binning"] = False
        call: Any = inspect.unwrap(type(self.pipe).__call__)
        (made, *_) = call(self.pipe, **named)
        return made if isinstance(made, Tensor) else torch.as_tensor(made)


@contextlib.contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """Let every call of a network be recomputed in the backward pass, with the same random numbers."""
    before = vars(network).get("forward")  # what a library may have put over the class's own
    network.forward = functools.partial(checkpoint, network.forward, use_reentrant=False)
    try:
        yield
    finally:
        if before is None:
            del network.forward
        else:
            network.forward = before


@contextlib.contextmanager
def in_single(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float32, and give every tensor its own precision back.

    What is not changed meanwhile comes back bit by bit, also where layers differ in precision. Tensors that
    are new, such as the bias that stands for an emptied attention, get the first one's of their part.
    """
    before = {name: tensor.dtype for name, tensor in _floating(model)}
    parts = {name.partition(".")[0]: dtype for name, dtype in reversed(before.items())}
    model.float()
    try:
        yield
    finally:
        for name, tensor in _floating(model):
            tensor.data = tensor.data.to(before.get(name, parts[name.partition(".")[0]]))


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    state = model.state_dict(keep_vars=True)
    return [(name, tensor) for name, tensor in state.items() if tensor.is_floating_point()]


def read_captions(path: Path) -> list[str]:
    """The prompts of a text file, a line each.

    Raises:
        ConfigError: it cannot be read as UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no prompts can be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _first(made: Any) -> Tensor:
    found: Tensor = made[0] if isinstance(made, tuple) else made.sample
    return found
