"""`CheckpointFile`, by its former name and place, until the studies have moved to `zoo.shared.train`."""

from __future__ import annotations

from zoo.shared.train import Checkpoint as CheckpointFile

__all__ = ["CheckpointFile"]
