"""DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets (Wang et al., CVPR 2023), the 3D backbone.

Differs from the released code: the position embedding of a layer sees the coordinates of the partition that
the layer works on (there: of the partition with the layer's number), and pooling leaves empty places out
(there: they are zeros, and the mask is one of integers). `compat=True` computes what the released code does,
for its checkpoints only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.names import suggestion
from zoo.shared.sites import unpack_keys
from zoo.vision.lidar.options import as_tuples
from zoo.vision.lidar.partition import Layout, Partition, Sets, partition
from zoo.vision.lidar.set_attention import AttentionPooling, Block, Places, PositionEmbedding, places

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class DSVTConfig:
    """What makes a backbone; the fields are named as the keys of OpenPCDet's BACKBONE_3D.

    Attributes:
        sparse_shape: voxels along x, y, z.
        window_shape: voxels of a window along x, y, z, per stage.
        set_info: (tau, number of blocks) per stage.
        d_model, nhead, dim_feedforward: width, heads and hidden width, per stage.
        hybrid_factor: by which windows of the second partition are larger, along x, y, z.
        shifts_list: shift of both partitions, per stage.
        downsample_stride: strides along x, y, z between stages.
        normalize_pos: scale coordinates to [-pi, pi].
        rotate: whether the second layer of a block uses the set list along x; an ablation without.
        compat: compute as the released code does, see the module's text.

    Raises:
        ConfigError: fields that do not fit each other.
    """

    sparse_shape: Triple
    window_shape: tuple[Triple, ...]
    set_info: tuple[tuple[int, int], ...]
    d_model: tuple[int, ...]
    nhead: tuple[int, ...]
    dim_feedforward: tuple[int, ...]
    hybrid_factor: Triple = (2, 2, 1)
    shifts_list: tuple[tuple[Triple, Triple], ...] = ()
    downsample_stride: tuple[Triple, ...] = ()
    normalize_pos: bool = False
    rotate: bool = True
    compat: bool = False

    def __post_init__(self) -> None:
        stages = len(self.window_shape)
        if not self.shifts_list:
            halves = tuple(((0, 0, 0), (wx // 2, wy // 2, 0)) for wx, wy, _ in self.window_shape)
            object.__setattr__(self, "shifts_list", halves)
        per_stage = ("set_info", "d_model", "nhead", "dim_feedforward", "shifts_list")
        lengths = {name: len(getattr(self, name)) for name in per_stage}
        if stages < 1 or set(lengths.values()) != {stages} or len(self.downsample_stride) != stages - 1:
            raise ConfigError(
                f"window_shape has {stages} stages; the others need as many (downsample_stride one fewer). "
                f"Received: {lengths}, downsample_stride {len(self.downsample_stride)}"
            )
        for width, heads in zip(self.d_model, self.nhead, strict=True):
            if heads < 1 or width % heads:
                raise ConfigError(f"d_model {width} is not a multiple of nhead {heads}; change one of them")
        if len(set(self.d_model)) > 1:
            raise ConfigError(f"attention pooling keeps the width: d_model must be equal; got {self.d_model}")
        if self.downsample_stride and self.d_model[0] % 8:
            raise ConfigError(f"attention pooling has 8 heads: d_model {self.d_model[0]} is no multiple of 8")
        shape = self.sparse_shape
        for stride in self.downsample_stride:
            if any(n % s for n, s in zip(shape, stride, strict=True)):
                raise ConfigError(f"a grid of {shape} voxels cannot be pooled by {stride}: not a multiple")
            shape = _divided(shape, stride)

    @classmethod
    def from_openpcdet(cls, backbone: Mapping[str, Any], **changes: Any) -> DSVTConfig:
        """From the BACKBONE_3D section of an OpenPCDet configuration.

        Raises:
            ConfigError: a missing key, an unknown one, or a setting that is not offered.
        """
        known = {
            "NAME",
            "INPUT_LAYER",
            "block_name",
            "set_info",
            "d_model",
            "nhead",
            "dim_feedforward",
            "dropout",
            "activation",
            "reduction_type",
            "output_shape",
            "conv_out_channel",
        }
        inner = {
            "sparse_shape",
            "downsample_stride",
            "d_model",
            "set_info",
            "window_shape",
            "hybrid_factor",
            "shifts_list",
            "normalize_pos",
        }
        layer = dict(backbone.get("INPUT_LAYER") or {})
        for section, allowed, where in ((backbone, known, "BACKBONE_3D"), (layer, inner, "INPUT_LAYER")):
            for key in section:
                if key not in allowed:
                    raise ConfigError(f"{where} has the unknown key {key!r}. {suggestion(key, allowed)}")
        for key, wanted in (("activation", "gelu"), ("reduction_type", "attention"), ("dropout", 0)):
            if backbone.get(key, wanted) != wanted:
                raise ConfigError(f"BACKBONE_3D.{key} must be {wanted!r}; received {backbone[key]!r}")
        try:
            given = {
                key: layer[key] for key in ("sparse_shape", "window_shape", "hybrid_factor", "shifts_list")
            }
            given |= {key: backbone[key] for key in ("set_info", "d_model", "nhead", "dim_feedforward")}
        except KeyError as error:
            raise ConfigError(f"BACKBONE_3D lacks the key {error.args[0]!r}") from error
        given |= {key: layer[key] for key in ("downsample_stride", "normalize_pos") if key in layer}
        return cls(**as_tuples(given), **changes)


def _divided(shape: Sequence[int], stride: Sequence[int]) -> Triple:
    x, y, z = (n // s for n, s in zip(shape, stride, strict=True))
    return x, y, z


class _InputLayer(nn.Module):
    """Holds the position embeddings under the reference's names."""

    def __init__(self, config: DSVTConfig) -> None:
        super().__init__()
        self.posembed_layers = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(PositionEmbedding(2 if window[2] == 1 else 3, width) for _ in range(2))
                for _ in range(blocks)
            )
            for window, (_, blocks), width in zip(
                config.window_shape, config.set_info, config.d_model, strict=True
            )
        )


@dataclass
class _Stage:
    """Partitions of one stage's voxels, made when a block first asks for one."""

    make: Callable[[int], tuple[Partition, Triple]]
    layout: Callable[[Sets], Layout]
    normalise: bool
    _made: dict[int, tuple[tuple[Layout, Layout], Places]] = field(default_factory=dict)

    def get(self, shift: int) -> tuple[tuple[Layout, Layout], Places]:
        if shift not in self._made:
            found, window = self.make(shift)
            first, second = (self.layout(sets) for sets in found.sets)
            self._made[shift] = (first, second), places(found.local, window, self.normalise)
        return self._made[shift]


class DSVT(nn.Module):
    """The backbone: stages of blocks on sparse voxels, pooled along z between stages.

    After each block x = LN(block(x) + x); blocks work on partition (number of the block mod 2).
    """

    def __init__(self, config: DSVTConfig) -> None:
        super().__init__()
        self.config = config
        self.input_layer = _InputLayer(config)
        volumes = [math.prod(stride) for stride in config.downsample_stride]
        for stage, (_, blocks) in enumerate(config.set_info):
            width, heads = config.d_model[stage], config.nhead[stage]
            hidden = config.dim_feedforward[stage]
            self.add_module(
                f"stage_{stage}", nn.ModuleList(Block(width, heads, hidden) for _ in range(blocks))
            )
            norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
            self.add_module(f"residual_norm_stage_{stage}", norms)
            if stage < len(volumes):
                self.add_module(
                    f"stage_{stage}_reduction", AttentionPooling(width, volumes[stage], config.compat)
                )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @property
    def width(self) -> int:
        """Features of a voxel, in and out."""
        return self.config.d_model[-1]

    @property
    def size(self) -> Triple:
        """Voxels of the last stage's grid along x, y, z."""
        shape = self.config.sparse_shape
        for stride in self.config.downsample_stride:
            shape = _divided(shape, stride)
        return shape

    def forward(
        self, x: Float[Tensor, "voxels width"], coords: Int64[Tensor, "voxels 4"], batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Features and (batch, z, y, x) of the last stage's voxels.

        Raises:
            DataError: voxels outside of the grid or there twice, or features of another width.
        """
        if x.shape[1] != self.config.d_model[0]:
            raise DataError(f"voxels have {x.shape[1]} features, the backbone takes {self.config.d_model[0]}")
        shape, number = self.config.sparse_shape, 0
        for stage in range(len(self.config.set_info)):
            cut = self._cut(stage, coords, shape, batch_size)
            blocks: Any = getattr(self, f"stage_{stage}")
            norms: Any = getattr(self, f"residual_norm_stage_{stage}")
            for index, (block, norm) in enumerate(zip(blocks, norms, strict=True)):
                layouts, here = cut.get(number % 2)
                layouts = layouts if self.config.rotate else (layouts[1], layouts[1])
                embed: Any = self.input_layer.posembed_layers[stage][index]  # type: ignore[index]
                where = [cut.get(layer)[1] if self.config.compat else here for layer in range(2)]
                positions = [layer(at, x.dtype) for layer, at in zip(embed, where, strict=True)]
                x = norm(block(x, positions, layouts) + x)
                number += 1
            if stage < len(self.config.downsample_stride):
                stride = self.config.downsample_stride[stage]
                x, coords, shape = self._pooled(stage, x, coords, shape, stride, batch_size)
        return x, coords

    def _cut(self, stage: int, coords: Tensor, shape: Triple, batch_size: int) -> _Stage:
        config, tau = self.config, self.config.set_info[stage][0]

        def make(shift: int) -> tuple[Partition, Triple]:
            wx, wy, wz = config.window_shape[stage]
            if shift:
                wx, wy, wz = (w * f for w, f in zip((wx, wy, wz), config.hybrid_factor, strict=True))
            moved = config.shifts_list[stage][shift]
            return partition(coords, shape, batch_size, (wx, wy, wz), moved, tau), (wx, wy, wz)

        layout = Sets.padded if coords.is_cuda else Sets.ragged
        return _Stage(make, layout, config.normalize_pos)

    def _pooled(
        self, stage: int, x: Tensor, coords: Tensor, shape: Triple, stride: Triple, batch_size: int
    ) -> tuple[Tensor, Tensor, Triple]:
        """The next stage's features, coordinates and grid."""
        coarse = _divided(shape, stride)
        steps = coords.new_tensor((1, *stride[::-1]))
        box = coords.div(steps, rounding_mode="floor")
        _, z, y, place_x = (coords - box * steps).unbind(1)
        place = (place_x * stride[1] + y) * stride[2] + z
        extent = (batch_size, *coarse[::-1])
        keys = ((box[:, 0] * extent[1] + box[:, 1]) * extent[2] + box[:, 2]) * extent[3] + box[:, 3]
        present, pool = torch.unique(keys, return_inverse=True)
        reduction: Any = getattr(self, f"stage_{stage}_reduction")
        return reduction(x, pool, place, len(present)), unpack_keys(present, extent), coarse
