"""Masks: which entries of a tensor are kept, where zeros may lie, and what holds them during training."""

from .handle import MaskHandle
from .hold import register_optimizer_state
from .mask import Mask, MaskSet, SparsityReport, masks_of, near_misses, set_masks, tighten, unwrap

__all__ = [
    "Mask",
    "MaskHandle",
    "MaskSet",
    "SparsityReport",
    "masks_of",
    "near_misses",
    "register_optimizer_state",
    "set_masks",
    "tighten",
    "unwrap",
]
