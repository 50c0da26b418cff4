"""CHESS: thresholds per FFN channel from the other factor's mean square, and selective thresholds in the
attention (He, Wu, Wen, Cai, Li: CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective
Sparsification, EMNLP 2024).

Dropping channel i of the gated product h = g * u costs about g_i^2 u_i^2. At decode time u_i is what should
not be computed, so that its mean square m_i stands for it: g_i is dropped where g_i^2 m_i <= T, that is
|g_i| <= t_i = sqrt(T / m_i). Queries and the attention's output projection read inputs above a scalar
threshold; keys and values stay exact, because their errors would stay in the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.llm.data.calibration import Calibrated, extras_of
from zoo.llm.gate_statistics import GateStatistics, gate_statistics
from zoo.llm.models.thresholds import attach, to_extras
from zoo.methods.contract import Sparsified
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.measure.activations import channel_thresholds, check_share
from zoo.shared.measure.modes import float32
from zoo.shared.train import Job

Attention = Literal["selective", "none", "all"]
_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "selective": ("q_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
# Below this width attention does not bear the sparsity of the FFN.
_WIDE = 1024


def chess_thresholds(
    statistics: Sequence[GateStatistics],
    sparsity: float,
    attention: Attention = "selective",
    attention_sparsity: float | None = None,
) -> dict[str, Tensor]:
    """The thresholds of every block.

    Args:
        statistics: measured for `sparsity`, and for `attention_sparsity` where attention is not "none".
        sparsity: of the gates.
        attention: which projections read thresholded inputs.
        attention_sparsity: of those inputs; by default `sparsity`.
    """
    share = sparsity if attention_sparsity is None else attention_sparsity
    found: dict[str, Tensor] = {}
    for one in statistics:
        t = channel_thresholds(one.importance[sparsity], one.mean_square)
        found[f"{one.mlp}.act_fn"] = t.float()
        for projection in _PROJECTIONS[attention]:
            kth = one.attention_output if projection == "o_proj" else one.attention_input
            found[f"{one.attention}.{projection}"] = torch.tensor(kth[share])
    return found


@dataclasses.dataclass
class Chess(Calibrated):
    """Close FFN gates below a threshold per channel and skip small inputs of q and o; training-free."""

    sparsity: float = 0.5
    """Share of the gates to close, strictly between 0 and 1."""

    attention: Attention = "selective"
    """Thresholds in the attention: on the inputs of q and o, of none, or of all four projections."""

    attention_sparsity: float | None = None
    """Share of attention inputs to drop; by default `sparsity`, and half of it in models narrower than
    1,024."""

    chunk: int = 4
    """Windows whose k-th value is taken together."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Calibrate and put the thresholds on `model`, in place. As many windows again are drawn for the
        second sweep.

        Raises:
            BudgetError: a sparsity outside (0, 1).
            ConfigError, DataError: see `gate_statistics` and `Calibrated.batches`.
            ActivationError: NaN or infinite activations.
        """
        check_share(self.sparsity)
        share = check_share(self.share_of_attention(model), "attention_sparsity")
        shares = tuple(dict.fromkeys((self.sparsity, share)))
        with float32(model):
            windows = self.tokens(model, job, times=2)
            statistics = gate_statistics(
                model, windows[: len(windows) // 2], windows[len(windows) // 2 :], shares, self.chunk
            )
        found = chess_thresholds(statistics, self.sparsity, self.attention, share)
        attach(model, found)
        extras = extras_of(model) | to_extras(found)
        options = dataclasses.asdict(self) | {"attention_sparsity": share}
        return Sparsified(model, masks_of(model) or MaskSet({}), extras, options)

    def share_of_attention(self, model: nn.Module) -> float:
        """The attention's sparsity on this model."""
        if self.attention_sparsity is not None:
            return self.attention_sparsity
        config: Any = getattr(model, "config", None)
        if config is None:
            raise ConfigError(
                f"CHESS takes language models of transformers; {type(model).__name__} has no config"
            )
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return self.sparsity if int(text.hidden_size) >= _WIDE else self.sparsity / 2
