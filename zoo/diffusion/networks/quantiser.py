"""A codebook of unit vectors, with a straight-through gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

COMMITMENT = 0.25
FORGET, DEAD = 0.95, 0.1  # of a code's usage per step; below this share of even usage it is restarted


class Quantiser(nn.Module):
    """Nearest code of unit length, straight-through.

    Args:
        codes: how many.
        width: of a code.
    """

    usage: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codes, width)
        nn.init.uniform_(self.codebook.weight, -1 / codes, 1 / codes)
        self.register_buffer("usage", torch.ones(codes))

    def vectors(self, indices: Int[Tensor, "n L"]) -> Float[Tensor, "n L d"]:
        """Codes by number, of unit length."""
        return F.normalize(self.codebook(indices), dim=-1)

    def forward(
        self, z: Float[Tensor, "n L d"]
    ) -> tuple[Float[Tensor, "n L d"], Int[Tensor, "n L"], Float[Tensor, ""]]:
        """(codes with the gradient of z, their numbers, codebook loss + 0.25 commitment loss)."""
        z = F.normalize(z, dim=-1)
        if self.training:
            self._restart(z.detach().flatten(0, 1))
        indices = (z @ F.normalize(self.codebook.weight, dim=-1).T).argmax(-1)
        found = self.vectors(indices)
        loss = F.mse_loss(found, z.detach()) + COMMITMENT * F.mse_loss(z, found.detach())
        if self.training:
            share = torch.bincount(indices.flatten(), minlength=len(self.usage)) * (
                len(self.usage) / indices.numel()
            )
            self.usage.mul_(FORGET).add_(share.to(self.usage), alpha=1 - FORGET)
        return z + (found - z).detach(), indices, loss

    @torch.no_grad()
    def _restart(self, z: Float[Tensor, "m d"]) -> None:
        dead = (self.usage < DEAD).nonzero().flatten()
        if len(dead):
            self.codebook.weight[dead] = z[torch.randint(len(z), (len(dead),), device=z.device)]
            self.usage[dead] = 1.0
