"""Search for masks by trainable scores: a gate on each weight that keeps the best-scored entries."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..masks import MaskSet, masks_of
from .gates import TopKGate, gate_weight

#: Score of what earlier masks drop: nothing brings it back, and weight decay leaves it a number.
NEVER = -1e30


def gate_all(model: nn.Module, scores: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, TopKGate]:
    """Gate these weights, in place, each keeping its best-scored entries; `harden` ends it.

    Args:
        model: owner of the weights. What its masks drop stays dropped.
        scores: by parameter name, of the parameter's shape; they become trainable (`gate.logits`).
        kept: entries to keep of each; `gate.kept` may be changed between steps.

    Returns:
        The gates by parameter name.
    """
    before = masks_of(model) or MaskSet({})
    gates = {}
    for name, score in scores.items():
        owner, _, attribute = name.rpartition(".")
        if name in before:
            score = score.masked_fill(~before[name].keep.to(score.device), NEVER)
        gate = TopKGate(tuple(score.shape), 0.0, score)
        gate.kept = kept[name]
        gate_weight(model.get_submodule(owner), attribute, gate)
        gates[name] = gate
    return gates
