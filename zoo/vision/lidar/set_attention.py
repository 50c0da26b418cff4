"""Attention within sets, and what DSVT builds of it: encoder layers, blocks, position embedding, pooling.

Parameters have the names of the reference, so that its state dicts load. Queries, keys and values are
projected once per voxel, not once per slot, and only the attention itself sees sets: a padded execution
spends most of its time on slots that repeat a voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.vision.lidar.partition import Layout


def set_attention(
    attention: nn.MultiheadAttention,
    x: Float[Tensor, "voxels width"],
    position: Float[Tensor, "voxels width"],
    layout: Layout,
) -> Float[Tensor, "voxels width"]:
    """Multi-head attention of each voxel to its set: queries and keys of x + position, values of x.

    On processors results do not depend on the number of threads, but for heads of 8 features: there torch's
    kernel rounds by where a thread's buffer starts (widths 4 and 12 to 64 were tried and do not).

    Args:
        attention: the module whose parameters are used.
        x: features of the voxels.
        position: embedding of the voxels' places.
        layout: of one set list.
    """
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    width, heads = attention.embed_dim, attention.num_heads
    both = F.linear(x + position, weight[: 2 * width], bias[: 2 * width])
    values = F.linear(x, weight[2 * width :], bias[2 * width :])
    slots = torch.cat([both, values], 1)[layout.rows].unflatten(1, (3, heads, width // heads))
    attended = []
    parts = slots.split([sets * length for sets, length, _ in layout.buckets])
    for part, (sets, length, used) in zip(parts, layout.buckets, strict=True):
        # Each [sets, heads, length, head width].
        query, key, value = part.unflatten(0, (sets, length)).permute(2, 0, 3, 1, 4)
        mask = None if used is None else used[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, mask)
        attended.append(out.transpose(1, 2).reshape(sets * length, width))
    return attention.out_proj(torch.cat(attended)[layout.place])


class SetAttention(nn.Module):
    """t = LN(x + MHA(x)), then LN(t + W2 gelu(W1 t)) (post-norm)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, layout: Layout) -> Tensor:
        t = self.norm1(x + set_attention(self.self_attn, x, position, layout))
        return self.norm2(t + self.linear2(F.gelu(self.linear1(t))))


class EncoderLayer(nn.Module):
    """LN(x + SetAttention(x)): one more residual than a usual transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.win_attn = SetAttention(width, heads, hidden)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, layout: Layout) -> Tensor:
        return self.norm(x + self.win_attn(x, position, layout))


class Block(nn.Module):
    """Two encoder layers on the two set lists of one partition: rotated sets."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.encoder_list = nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(2))

    def forward(self, x: Tensor, positions: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
        for layer, position, layout in zip(self.encoder_list, positions, layouts, strict=True):
            x = layer(x, position, layout)
        return x


class Places(NamedTuple):
    """Where voxels lie in their windows: `table[cell]` per voxel, in voxels from the window's middle."""

    table: Float[Tensor, "cells dims"]
    cell: Int64[Tensor, " voxels"]


def places(local: Int64[Tensor, "voxels 3"], window: Sequence[int], normalise: bool) -> Places:
    """The coordinates that position embeddings take: z is left out where windows are one voxel high.

    Args:
        local: (x, y, z) within the window.
        window: voxels of a window along x, y, z.
        normalise: scale to [-pi, pi], as `normalize_pos` of the reference.
    """
    dims = 2 if window[2] == 1 else 3
    sides = local.new_tensor(window)
    axes = [torch.arange(side, device=local.device) for side in window]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    table = (cells - sides / 2)[:, :dims]
    if normalise:
        table = table / sides[:dims] * (2 * math.pi)
    return Places(table, (local[:, 0] * window[1] + local[:, 1]) * window[2] + local[:, 2])


class PositionEmbedding(nn.Module):
    """Linear, batch norm, ReLU, Linear of a voxel's place in its window."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.position_embedding_head = nn.Sequential(
            nn.Linear(dims, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, width)
        )

    def forward(self, where: Places, dtype: torch.dtype) -> Float[Tensor, "voxels width"]:
        """Raises:
        ConfigError: one voxel only in training, of which the batch norm has no variance.
        """
        table = where.table.to(dtype)
        if self.training:  # the batch norm's statistics are those of the voxels
            if len(where.cell) < 2:
                raise ConfigError("a batch with a single voxel cannot be trained on: batch norm needs two")
            return self.position_embedding_head(table[where.cell])
        if len(table) < len(where.cell):  # in evaluation each place of a window is embedded once
            return self.position_embedding_head(table)[where.cell]
        return self.position_embedding_head(table[where.cell])


class AttentionPooling(nn.Module):
    """Attention-style 3D pooling (section 3.3): the maximum of a pool asks all voxels of the pool.

    Args:
        width: of the features.
        volume: places in a pool.
        zeros: count empty places as voxels of zeros, as the reference does; else they take no part.
    """

    def __init__(self, width: int, volume: int, zeros: bool = False) -> None:
        super().__init__()
        self.volume, self.zeros = volume, zeros
        self.norm = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, 8, batch_first=True)
        self.pos_embedding = nn.Parameter(torch.empty(volume, width))
        nn.init.normal_(self.pos_embedding, std=0.01)

    def forward(
        self,
        x: Float[Tensor, "voxels width"],
        pool: Int64[Tensor, " voxels"],
        place: Int64[Tensor, " voxels"],
        pools: int,
    ) -> Float[Tensor, "pools width"]:
        """Args:
        x: features.
        pool: the pool of each voxel.
        place: its place there, 0 <= place < volume, no two voxels at one.
        pools: how many; none is empty.
        """
        at = pool * self.volume + place
        values = x.new_zeros(pools * self.volume, x.shape[1]).index_copy(0, at, x)
        values = values.unflatten(0, (pools, self.volume))
        empty = torch.ones(pools * self.volume, dtype=torch.bool, device=x.device)
        empty = empty.index_fill(0, at, False).unflatten(0, (pools, self.volume))
        if self.zeros:
            empty = torch.zeros_like(empty)
        query = values.masked_fill(empty[..., None], -math.inf).amax(1, keepdim=True)
        attended, _ = self.self_attn(
            query, values + self.pos_embedding, values, key_padding_mask=empty, need_weights=False
        )
        return self.norm(query + attended)[:, 0]
