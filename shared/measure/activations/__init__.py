"""Activations: a calibration runner, streaming statistics, and modules that threshold what flows through
them.
"""

from ...errors import ActivationError
from .calibrate import Tap, calibrate
from .kth import ChunkedKth, check_share
from .statistics import Accumulator, Gram, MagnitudeHistogram, Moments
from .thresholds import (
    ActivationThreshold,
    channel_thresholds,
    counting_sparsity,
    realised_sparsity,
)

__all__ = [
    "Accumulator",
    "ActivationError",
    "ActivationThreshold",
    "ChunkedKth",
    "Gram",
    "MagnitudeHistogram",
    "Moments",
    "Tap",
    "calibrate",
    "channel_thresholds",
    "check_share",
    "counting_sparsity",
    "realised_sparsity",
]
