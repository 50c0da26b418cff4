"""Devices by name, and models that come back from one."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.shared.masks import masks_of, set_masks

Model = TypeVar("Model", bound=nn.Module)


def checked_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: no device has such a name, or this machine has none of its kind.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is no device; write cpu, cuda or cuda:1, say") from error
    there = torch.cuda.device_count() if device.type == "cuda" else int(device.type == "cpu")
    if (device.index or 0) >= there:
        raise ConfigError(f"this machine has no device {str(name)!r}; train on cpu, or where torch finds one")
    return device


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the processor if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def brought_back(model: Model, device: str | torch.device = "cpu") -> Model:
    """The model, in place, on a device in the usual memory layout, with its masks."""
    masks = masks_of(model)
    model.to(device)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if masks is not None:
        set_masks(model, masks.to(device))
    return model
