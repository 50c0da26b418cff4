"""Errors of the zoo. Each message names the culprit, what was received and the remedy."""

from __future__ import annotations

from zoo.shared.errors import SparseError, StorageError


class ZooError(SparseError):
    """Base of the errors that the zoo raises on purpose."""


class UnknownNameError(ZooError, KeyError):
    """A model, task, method or experiment that nobody registered; the message lists near misses."""


class CardError(ZooError, ValueError):
    """A card that is unreadable or breaks the schema."""


class BundleError(ZooError):
    """A bundle that is incomplete, corrupt, or not what its card says."""


class UnwritableBundleError(BundleError, StorageError):
    """A bundle whose folder cannot be written: the disk is full, or the folder refuses."""


class HubError(ZooError):
    """A download that did not arrive whole, or a hub that cannot be reached."""


class DataError(ZooError, ValueError):
    """Data that are missing or not fit for the job."""


class MissingDataError(DataError):
    """Data that are not on this machine: nothing to mend in the command, but in the environment."""


class TaskError(ZooError, ValueError):
    """A task that cannot be run on the model it was given."""


class ConfigError(ZooError, ValueError):
    """Options that contradict each other or are out of range."""
