"""Activations: a calibration runner, streaming statistics, and modules that threshold what flows through
them.
"""

from shared.activations.calibrate import ActivationError, Tap, calibrate
from shared.activations.kth import ChunkedKth, check_share
from shared.activations.statistics import Accumulator, Gram, MagnitudeHistogram, Moments
from shared.activations.thresholds import (
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
