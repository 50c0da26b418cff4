"""LAPTOP-Diff (arXiv 2404.11098): whole layers removed at once, chosen by a knapsack on what removing each
alone does to the output, then normalised feature distillation from the dense network.

Removed transformers become identities, removed residual layers their shortcut. The guided score is ours: it
also weighs what a layer does to the difference that the prompt makes, which the plain score hardly sees.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from zoo.diffusion.parts import denoiser_of, require_plain
from zoo.diffusion.plan import Plan, drop_layer, set_module
from zoo.diffusion.prompting import Outputs, Prompted, check_prompted, seed_of, source_of
from zoo.diffusion.units import Layer, layers
from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, stated_options
from zoo.shared.errors import BudgetError
from zoo.shared.masks import MaskSet
from zoo.shared.pruning.knapsack import cheapest_cover
from zoo.shared.train import Distillation, Job


@dataclasses.dataclass
class Laptop(Prompted):
    """Remove whole layers by a knapsack on their output loss, and distil the dense network into the rest."""

    needs_job: ClassVar[bool] = True

    remove: float = 0.2
    """Share of the denoiser's parameters, or of its time, to remove, at least."""

    budget: Literal["parameters", "latency"] = "parameters"
    """What that share is of: parameters, or the time of a call as measured here."""

    timed: int = 1
    """Images in the call whose time is measured: as many as will be sampled at once."""

    score: Literal["output", "guided", "magnitude", "random"] = "output"
    """What a layer costs: the squared change of the output without it; the same for the output and for the
    difference that the prompt makes; the sum of its squared weights; or chance."""

    images: int = 128
    """Noisy images on which the change is measured."""

    distil: bool = False
    """Whether to train on with distillation, by the job's recipe."""

    output: float = 1.0
    """Weight of the distance to the dense network's output."""

    feature: float = 0.0
    """Weight of the plain distances between the outputs of stages."""

    normalised: float = 1.0
    """Weight of the normalised distances between the outputs of stages."""

    allow_unconditional: bool = False
    """Whether every attention of a conditional network may go."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Cut `model` in place, and distil if asked to.

        Raises:
            BudgetError: a share to remove outside (0, 1), or more than all removable layers together.
            ConfigError: no job to score or distil on, or a choice that leaves no attention to the prompt.
        """
        if not 0 < self.remove < 1:
            raise BudgetError(f"remove is between 0 and 1; received {self.remove}")
        if self.timed < 1:
            raise BudgetError(f"timed is at least one image; received {self.timed}")
        if job is None and self.distil:
            raise ConfigError("what is left is trained on images: give a job, or leave distil out")
        check_prompted(model, self)
        require_plain(model)
        network, teacher = denoiser_of(model), copy.deepcopy(model) if self.distil else None
        removable = removable_layers(network)
        freed, total = self.freed(model, removable, job)
        chosen = self.choose(removable, self.costs(model, removable, job), freed, total)
        target: Any = model
        target.cut(Plan(dropped=tuple(layer.name for layer in chosen)))
        if teacher is not None and job is not None:
            self.train_on(model, teacher, job)
        return Sparsified(
            model.eval(),
            MaskSet({}),
            extras={"layers/keep": torch.tensor([layer not in chosen for layer in removable])},
            hyperparameters=stated_options(self, job if self.distil else None)
            | {"dropped": [layer.name for layer in chosen]},
            parts={"layers": {"pattern": "channel"}},
            arguments=target.current_arguments(),
        )

    def freed(self, model: Any, removable: list[Layer], job: Job | None) -> tuple[list[int], int]:
        """What each layer frees of the budget, and what the whole denoiser takes: parameters or nanoseconds.

        Raises:
            ConfigError: no job whose images can be timed.
            BudgetError: all removable layers together have less than is to go.
        """
        network = denoiser_of(model)
        if self.budget == "latency":
            source = source_of(model, job, "a latency is measured on an image")
            freed, total = latencies(network, [layer.name for layer in removable], source.timed(self.timed))
        else:
            freed = [layer.parameters for layer in removable]
            total = sum(p.numel() for p in network.parameters())
        if sum(freed) < self.remove * total:
            raise BudgetError(
                f"{self.remove:.1%} of the {self.budget} cannot be removed: all removable layers together "
                f"have {sum(freed) / total:.1%}"
            )
        return freed, total

    def choose(self, removable: list[Layer], costs: list[float], freed: list[int], total: int) -> list[Layer]:
        """The layers to remove, cheapest together.

        Raises:
            ConfigError: they leave no attention to the prompt.
        """
        found = cheapest_cover(freed, costs, -int(-self.remove * total // 1))
        chosen = [removable[i] for i in found]
        if not self.allow_unconditional:
            _require_attention(removable, chosen)
        return chosen

    def costs(self, model: Any, removable: list[Layer], job: Job | None = None) -> list[float]:
        """What each layer costs, see `score`."""
        network = denoiser_of(model)
        if self.score == "random":
            return torch.rand(
                len(removable), generator=torch.Generator().manual_seed(seed_of(model, job))
            ).tolist()
        if self.score == "magnitude":
            sizes = [network.get_submodule(layer.name).parameters() for layer in removable]
            return [float(sum(p.detach().square().sum() for p in own)) for own in sizes]
        source = source_of(model, job, "layers are scored on noisy images with prompts")
        outputs = source.outputs(self.images, self.score == "guided")
        model.eval()
        return [output_loss(network, [layer.name], outputs) for layer in removable]

    def train_on(self, model: Any, teacher: nn.Module, job: Job) -> None:
        """Distil the dense model into the cut one, in place."""
        stages = [name for name, _ in stage_modules(denoiser_of(model))]
        prefix = next(path for path, module in model.named_modules() if module is denoiser_of(model))
        names = {f"{prefix}.{name}": f"{prefix}.{name}" for name in stages}
        distil = Distillation(
            teacher.requires_grad_(False),
            squared=self.output,
            feature=self.feature,
            normalised=self.normalised,
            features=names,
        )
        job.replace(distil=distil).fit(model).run()


def removable_layers(network: nn.Module) -> list[Layer]:
    """The layers of a network that may be dropped."""
    return [layer for layer in layers(network) if layer.removable]


@torch.no_grad()
def latencies(
    network: nn.Module, names: Sequence[str], call: Callable[[], object], calls: int = 15
) -> tuple[list[int], int]:
    """Nanoseconds that modules of a network take in a call, and the whole network: medians over calls."""
    modules = {network: "", **{network.get_submodule(name): name for name in names}}
    seen: dict[str, list[int]] = {name: [] for name in modules.values()}
    started: dict[nn.Module, int] = {}

    def begin(module: nn.Module, *_: object) -> None:
        started[module] = time.perf_counter_ns()

    def end(module: nn.Module, *_: object) -> None:
        seen[modules[module]].append(time.perf_counter_ns() - started[module])

    hooks = [one.register_forward_pre_hook(begin) for one in modules]
    hooks += [one.register_forward_hook(end) for one in modules]
    try:
        call()  # the first one allocates
        for times in seen.values():
            times.clear()
        for _ in range(calls):
            call()
    finally:
        for hook in hooks:
            hook.remove()
    middle = {name: int(statistics.median(times)) for name, times in seen.items()}
    return [middle[name] for name in names], middle[""]


@torch.no_grad()
def output_loss(network: nn.Module, dropped: list[str], outputs: Outputs) -> float:
    """E||eps(without the layers) - eps||^2, a mean over images and values, summed over the outputs; the
    network is left as it was."""
    before = outputs()
    held = [(name, drop_layer(network, name)) for name in dropped]
    try:
        after = outputs()
    finally:
        for name, layer in reversed(held):
            set_module(network, name, layer)
    return sum(float((a - b).square().mean()) for a, b in zip(after, before, strict=True))


def stage_modules(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Stages whose outputs keep their shape when layers go: down blocks, mid block and up blocks of a UNet,
    or every block of a transformer."""
    found = []
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList) and name.endswith("blocks"):
            found += [(f"{name}.{index}", block) for index, block in enumerate(child)]
        elif name == "mid_block":
            found.append((name, child))
    return found


def _require_attention(removable: list[Layer], chosen: list[Layer]) -> None:
    attention = {layer.name for layer in removable if layer.kind != "resnet"}
    if attention and attention <= {layer.name for layer in chosen}:
        raise ConfigError(
            "every attention would go, and with it all that the prompt does. Remove less, use "
            "score='guided', or allow it with allow_unconditional=True."
        )
