"""Errors of the core. Each message names the culprit, what was received and the remedy."""

from __future__ import annotations


class SparseError(Exception):
    """Base of every error that this project raises on purpose."""

    def __str__(self) -> str:
        # KeyError, a base of some subclasses, would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class PatternError(SparseError, ValueError):
    """A pattern that the shape, the count or the mask does not allow."""


class BudgetError(SparseError, ValueError):
    """A sparsity target that cannot be met, or cannot be met within the floors."""


class ScheduleError(SparseError, ValueError):
    """A schedule with impossible bounds or steps."""


class MaskError(SparseError, ValueError):
    """A mask that does not fit the model it is put on."""


class OptimizerStateError(MaskError):
    """Optimiser state whose meaning is unknown, so that its zeros cannot be kept."""


class GroupError(SparseError, ValueError):
    """A structure that cannot be cut as declared."""


class StructureError(SparseError, ValueError):
    """A model whose parts are not those that a method works on."""


class ActivationError(SparseError, ValueError):
    """Activations that cannot be measured: none, NaN, of a module that is not there or never runs."""


class FormatError(SparseError, ValueError):
    """A packed file that is truncated, corrupt, foreign or of an unknown version."""


class IdentityError(FormatError):
    """A sound file that belongs to another run: its options, data or model differ."""


class StorageError(SparseError, OSError):
    """A file that cannot be written: the disk is full, or the folder refuses."""


class TrainingError(SparseError, ValueError):
    """A training that cannot start or go on: a recipe out of range, data that do not fit, a lost loss."""


class OpError(SparseError, ValueError):
    """Arguments that a sparse operation refuses, or a back-end that is not there."""
