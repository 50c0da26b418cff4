"""A quantiser whose scales, zero points and weights can be tuned, of groups of weights in few bits: GQSA."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.llm.models.quantised import check_group
from zoo.shared.learned.constraints.straight_through import pass_through, round_through
from zoo.shared.ops.quant_sparse_linear import QuantGroups


class Quantiser(nn.Module):
    """The tunable quantiser of one weight; its parameters are frozen until a stage trains them.

    Args:
        weight: [out, groups, G], zero where dropped.
        scale, zero: [out, groups, 1]; zero is rounded when used.
        keep: [out, groups, G].
        bits: per weight.
    """

    keep: Bool[Tensor, "out groups size"]

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor, keep: Tensor, bits: int) -> None:
        super().__init__()
        self.weight, self.scale, self.zero = (
            nn.Parameter(part, requires_grad=False) for part in (weight, scale, zero)
        )
        self.register_buffer("keep", keep)
        self.bits = bits

    @classmethod
    def of(
        cls, weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"], group: int, bits: int
    ) -> Quantiser:
        """Scale = (max - min) / (2^b - 1) over each group and zero, zero = round(-min / scale); a group of
        zeros has scale 1 (as `zoo.shared.ops.quantise_groups`)."""
        check_group(weight.shape[1], group)
        shape = (weight.shape[0], weight.shape[1] // group, group)
        kept = keep.reshape(shape)
        values = torch.where(kept, weight.detach().float().reshape(shape), 0.0)
        low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        levels = 2**bits - 1
        scale = ((high - low) / levels).half().float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return cls(values, scale, (-low / scale).round().clamp(0, levels), kept, bits)

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        positive = self.scale.clamp(min=2.0**-24)  # the smallest number that fp16 tells from zero
        scale = pass_through(positive, positive.half().float())
        return scale, round_through(self.zero).clamp(0, 2**self.bits - 1)

    def codes(self) -> Float[Tensor, "out groups size"]:
        """q of every weight, also of those dropped; differentiable through rounding."""
        scale, zero = self._scale_and_zero()
        return (round_through(self.weight / scale) + zero).clamp(0, 2**self.bits - 1)

    def dequantised(self, codes: Float[Tensor, "out groups size"] | None = None) -> Float[Tensor, "out in"]:
        """s (q - z) where kept, 0 elsewhere; with other codes, if they are frozen."""
        scale, zero = self._scale_and_zero()
        q = self.codes() if codes is None else codes
        return ((q - zero) * scale * self.keep).flatten(1)

    def pack(self, codes: Float[Tensor, "out groups size"] | None = None) -> QuantGroups:
        """The layout of the sparse op, exactly what `dequantised` gives.

        Raises:
            ConfigError: not four bits, or a group of which only a part is kept.
        """
        whole = self.keep.all(-1)
        if self.bits != 4 or not torch.equal(whole, self.keep.any(-1)):
            raise ConfigError("only four-bit weights whose groups are kept or dropped whole can be packed")
        scale, zero = (part.detach() for part in self._scale_and_zero())
        q = (self.codes() if codes is None else codes).detach()[whole].to(torch.uint8)
        pointer = torch.zeros(len(whole) + 1, dtype=torch.int32, device=whole.device)
        pointer[1:] = whole.sum(-1).cumsum(0)
        return QuantGroups(
            codes=(q[:, 0::2] | (q[:, 1::2] << 4)).contiguous(),
            scales=scale[whole].flatten().half(),
            zeros=zero[whole].flatten().to(torch.uint8),
            columns=whole.nonzero()[:, 1].to(torch.int16),
            pointer=pointer,
            shape=(whole.shape[0], whole.shape[1] * self.keep.shape[2]),
            group=self.keep.shape[2],
        )
