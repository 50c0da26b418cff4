"""TEAL: a threshold on the input of every projection, its sparsities shared out by a greedy search (Liu,
Ponnusamy, Cai, Guo, Kim, Athiwaratkun: Training-Free Activation Sparsity in Large Language Models, 2024).

All tokens and features of an input give one distribution of magnitudes. Starting from none, the search raises
in each step the sparsity of the one projection that harms the block's output least, by a step inversely
proportional to its size, until the block's weights are skipped to the target on average. Differences from the
released code: the distribution is not smoothed, and all of a prompt is thresholded, not its second half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.llm.data.calibration import Calibrated, extras_of
from zoo.llm.loss import language_forward
from zoo.llm.models.blocks import find_blocks
from zoo.llm.models.thresholds import ThresholdedLinear, attach, detach, thresholds_of, to_extras
from zoo.methods.contract import Sparsified
from zoo.shared.blocks import RunningBlock, walk_blocks
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.measure.activations import MagnitudeHistogram, Tap, calibrate, check_share
from zoo.shared.measure.modes import float32
from zoo.shared.train import Job

_MOST = 0.99  # sparsity of one projection
_LAST = 0.25  # share of each window, at its end, on which the error is taken


def input_histograms(
    model: nn.Module, windows: Sequence[Int[Tensor, "batch length"]]
) -> dict[str, MagnitudeHistogram]:
    """Magnitudes of what enters each of the seven projections of every block, by name.

    Raises:
        ConfigError: a model that has thresholds already.
        ActivationError: NaN or infinite activations.
    """
    if thresholds_of(model):
        raise ConfigError("the model has thresholds already: calibrate the dense one (detach takes them off)")
    found: dict[str, MagnitudeHistogram] = {}
    taps = []
    for block in find_blocks(model):
        # q, k and v share their input, and so do gate and up
        for names in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            histogram = MagnitudeHistogram()
            for letter in names:
                part = block.attention_name if letter in "qkvo" else block.mlp_name
                found[f"{part}.{letter}_proj"] = histogram
            taps.append(Tap(f"{part}.{letter}_proj", [histogram]))
    calibrate(model, windows, taps, language_forward)
    return found


def uniform_thresholds(histograms: Mapping[str, MagnitudeHistogram], sparsity: float) -> dict[str, Tensor]:
    """The same sparsity for every input of every projection."""
    check_share(sparsity)
    return {name: torch.tensor(_threshold(histogram, sparsity)) for name, histogram in histograms.items()}


def greedy_thresholds(
    model: nn.Module,
    windows: Sequence[Int[Tensor, "batch length"]],
    histograms: Mapping[str, MagnitudeHistogram],
    sparsities: Sequence[float],
    step: float = 0.05,
) -> dict[float, dict[str, Tensor]]:
    """Thresholds of the greedy search for each of several targets: one path passes them all.

    Args:
        model: dense; left as it was.
        windows: token ids on which the blocks' outputs are compared.
        histograms: of the inputs.
        sparsities: share of the blocks' weights to skip, each strictly between 0 and 1.
        step: by how much the sparsity of a projection of q's size is raised at a time.
    """
    for share in sparsities:
        check_share(share)
    found: dict[float, dict[str, Tensor]] = {share: {} for share in sparsities}

    def visit(block: RunningBlock) -> None:
        parts = dict(block.module.named_modules())
        layers = {name: part for name, part in parts.items() if isinstance(part, ThresholdedLinear)}
        names = {name: f"{block.name}.{name}" for name in layers}
        own = {name: histograms[full] for name, full in names.items()}
        for layer in layers.values():
            layer.threshold.threshold.zero_()
        path = _greedy(block, layers, own, max(sparsities), step)
        for share in sparsities:
            # the first point of the path that reaches the target
            point = next((shares for reached, shares in path if reached >= share), path[-1][1])
            for name, full in names.items():
                found[share][full] = torch.tensor(_threshold(histograms[full], point[name]))
        for layer in layers.values():
            layer.threshold.threshold.zero_()

    attach(model, dict.fromkeys(histograms, 0.0))
    try:
        walk_blocks(model, windows, visit, forward=language_forward)
    finally:
        detach(model)
    return found


def _greedy(
    block: RunningBlock,
    layers: Mapping[str, ThresholdedLinear],
    histograms: Mapping[str, MagnitudeHistogram],
    target: float,
    step: float,
) -> list[tuple[float, dict[str, float]]]:
    """Points of the search: the share of weights skipped and the sparsity of each projection."""
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    total, unit = sum(sizes.values()), next(size for name, size in sizes.items() if name.endswith("q_proj"))
    shares = dict.fromkeys(layers, 0.0)
    wanted = [block.run(batch) for batch in range(len(block.inputs))]
    path: list[tuple[float, dict[str, float]]] = []
    reached = 0.0

    def put(name: str, share: float) -> None:
        layers[name].threshold.threshold.fill_(_threshold(histograms[name], share))

    while reached < target:
        errors = {}
        for name in layers:
            raised = min(_MOST, shares[name] + step * unit / sizes[name])
            if raised <= shares[name]:
                continue
            put(name, raised)
            errors[name] = _error(block, wanted)
            put(name, shares[name])
        if not errors:
            break
        best = min(errors, key=errors.__getitem__)
        shares[best] = min(_MOST, shares[best] + step * unit / sizes[best])
        put(best, shares[best])
        reached = sum(shares[name] * sizes[name] for name in layers) / total
        path.append((reached, dict(shares)))
    return path


def _error(block: RunningBlock, wanted: Sequence[Tensor]) -> float:
    """Norm of the change of the block's output over the last part of the windows."""
    total = 0.0
    for batch, dense in enumerate(wanted):
        first = int(dense.shape[1] * (1 - _LAST))
        change = (block.run(batch) - dense)[:, first:]
        total += float(torch.linalg.vector_norm(change, dim=-1).mean())
    return total


def _threshold(histogram: MagnitudeHistogram, share: float) -> float:
    """Below which `share` of the magnitudes lie."""
    k = int(histogram.count * share)
    return histogram.kth(k) if k else 0.0


@dataclasses.dataclass
class Teal(Calibrated):
    """Skip small inputs of every projection, most where it harms least; training-free."""

    sparsity: float = 0.5
    """Share of the blocks' weights to skip, strictly between 0 and 1."""

    budget: str = "greedy"
    """How it is shared out: `greedy` by the error of the block's output, or `uniform`."""

    step: float = 0.05
    """Step of the greedy search for a projection of the size of q."""

    search_windows: int = 8
    """Windows on which the greedy search compares."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Calibrate and put the thresholds on `model`, in place.

        Raises:
            BudgetError: a sparsity outside (0, 1).
            ConfigError, DataError: an unknown budget, a step that is not positive; see `Calibrated.batches`.
            ActivationError: NaN or infinite activations.
        """
        check_share(self.sparsity)
        if self.budget not in ("greedy", "uniform") or not self.step > 0 or self.search_windows < 1:
            raise ConfigError(
                "budget is 'greedy' or 'uniform', step and search_windows are positive; received "
                f"{self.budget!r}, {self.step} and {self.search_windows}"
            )
        with float32(model):
            windows = self.tokens(model, job, size=self.search_windows)
            histograms = input_histograms(model, windows)
            if self.budget == "uniform":
                found = uniform_thresholds(histograms, self.sparsity)
            else:
                target = self.sparsity
                found = greedy_thresholds(model, windows[:1], histograms, (target,), self.step)[target]
        attach(model, found)
        extras = extras_of(model) | to_extras(found)
        return Sparsified(model, masks_of(model) or MaskSet({}), extras, dataclasses.asdict(self))
