"""What CATS and CHESS need to know of a dense decoder, in two sweeps over text.

The first sweep gives E[u_i^2] of every FFN channel and k-th smallest magnitudes of gates and attention
inputs; the second, over other windows, k-th smallest importances g_i^2 E[u_i^2]. All k-th values are taken
per chunk of windows and averaged. Several sparsities cost no more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.llm.loss import language_forward
from zoo.llm.models.blocks import find_blocks
from zoo.llm.models.thresholds import thresholds_of
from zoo.shared.measure.activations import Accumulator, ChunkedKth, Moments, Tap, calibrate


@dataclass(frozen=True)
class GateStatistics:
    """Of one block; keys are sparsities.

    Attributes:
        mlp: name of the FFN.
        attention: name of the attention.
        mean_square: E[u_i^2] of the up projection's outputs.
        gates: k-th smallest |g| over tokens and channels.
        attention_input: k-th smallest |x| of what enters q, k and v.
        attention_output: k-th smallest |a| of what enters o.
        importance: k-th smallest g_i^2 E[u_i^2].
    """

    mlp: str
    attention: str
    mean_square: Float[Tensor, " f"]
    gates: dict[float, float]
    attention_input: dict[float, float]
    attention_output: dict[float, float]
    importance: dict[float, float]


class _Importance:
    """Feeds g^2 m to another accumulator."""

    def __init__(self, mean_square: Float[Tensor, " f"], inner: Accumulator) -> None:
        self.mean_square, self.inner = mean_square, inner

    def update(self, rows: Float[Tensor, "rows f"]) -> None:
        m = self.mean_square.to(rows.device, torch.float32)
        self.inner.update(rows.float().square() * m)


def gate_statistics(
    model: nn.Module,
    first: Sequence[Int[Tensor, "batch length"]],
    second: Sequence[Int[Tensor, "batch length"]],
    sparsities: Sequence[float],
    chunk: int = 4,
) -> list[GateStatistics]:
    """Measure the blocks of a dense model.

    Args:
        model: a causal LM with a gated FFN and without thresholds.
        first: windows of token ids for the first sweep.
        second: other windows for the second; without any there are no importances (CATS needs none).
        sparsities: each strictly between 0 and 1.
        chunk: windows whose k-th value is taken together.

    Raises:
        ConfigError: a model that has thresholds already.
        BudgetError: a sparsity outside (0, 1), or so little text that k would be 0.
        ActivationError: NaN or infinite activations, by module and batch.
    """
    if thresholds_of(model):
        raise ConfigError("the model has thresholds already: calibrate the dense one (detach takes them off)")
    blocks = find_blocks(model)
    moments = [Moments() for _ in blocks]
    gates, inputs, outputs, importance = ([ChunkedKth(sparsities, chunk) for _ in blocks] for _ in range(4))
    taps = []
    for i, block in enumerate(blocks):
        taps += [
            Tap(f"{block.mlp_name}.act_fn", [gates[i]], "output"),
            Tap(f"{block.mlp_name}.up_proj", [moments[i]], "output"),
            Tap(f"{block.attention_name}.q_proj", [inputs[i]]),
            Tap(f"{block.attention_name}.o_proj", [outputs[i]]),
        ]
    _sweep(model, first, taps)
    squares = [one.second_moment() for one in moments]
    if second:
        accumulators = [_Importance(m, kth) for m, kth in zip(squares, importance, strict=True)]
        taps = [
            Tap(f"{block.mlp_name}.act_fn", [accumulator], "output")
            for block, accumulator in zip(blocks, accumulators, strict=True)
        ]
        _sweep(model, second, taps)

    def by_sparsity(kth: ChunkedKth) -> dict[float, float]:
        return dict(zip(kth.shares, kth.values(), strict=True))

    return [
        GateStatistics(
            block.mlp_name,
            block.attention_name,
            squares[i],
            by_sparsity(gates[i]),
            by_sparsity(inputs[i]),
            by_sparsity(outputs[i]),
            by_sparsity(importance[i]) if second else {},
        )
        for i, block in enumerate(blocks)
    ]


def _sweep(model: nn.Module, windows: Sequence[Tensor], taps: Sequence[Tap]) -> None:
    calibrate(model, windows, taps, language_forward)


def channel_spread(mean_square: Float[Tensor, " f"]) -> float:
    """90th over 10th percentile of sqrt(E[u_i^2]) over the channels: what CHESS knows that CATS does not."""
    root = mean_square.double().sqrt()
    low, high = torch.quantile(root, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return high / low if low > 0 else float("inf")
