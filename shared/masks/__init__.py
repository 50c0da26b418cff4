"""Masks: which entries of a tensor are kept, where zeros may lie, and what holds them during training."""

from .mask import Mask, MaskHandle, MaskSet, SparsityReport, masks_of, near_misses, set_masks, tighten, unwrap

__all__ = [
    "Mask",
    "MaskHandle",
    "MaskSet",
    "SparsityReport",
    "masks_of",
    "near_misses",
    "set_masks",
    "tighten",
    "unwrap",
]
