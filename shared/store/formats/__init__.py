"""Packed storage of sparse models: `zoo-packed` version 1 inside plain safetensors (see docs/format.md)."""

from __future__ import annotations

from .packed import (
    EntryReport,
    PackedContents,
    PackedFile,
    PackedReport,
    load_packed,
    open_packed,
    save_packed,
)

__all__ = [
    "EntryReport",
    "PackedContents",
    "PackedFile",
    "PackedReport",
    "load_packed",
    "open_packed",
    "save_packed",
]
