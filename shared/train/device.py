"""Devices by name."""

from __future__ import annotations

import torch

from ..errors import TrainingError


def device_named(name: str | torch.device) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one, else the processor.

    Raises:
        TrainingError: no device has such a name, or this machine has none of its kind.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"{name!r} is no device; write auto, cpu, cuda or cuda:1, say") from error
    there = {"cuda": torch.cuda.device_count(), "cpu": 1}.get(device.type, 1)
    if (device.index or 0) >= there:
        raise TrainingError(
            f"this machine has no device {str(name)!r}; train on cpu, or where torch finds one"
        )
    return device
