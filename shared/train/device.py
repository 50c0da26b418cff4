"""Devices by name, and models that come back from one."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ..errors import TrainingError
from ..masks import masks_of, set_masks

Model = TypeVar("Model", bound=nn.Module)


def device_named(name: str | torch.device) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one, else the processor.

    Raises:
        TrainingError: no device has such a name, or this machine has none of its kind.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        there = torch.get_device_module(device.type).device_count()
    except RuntimeError as error:
        raise TrainingError(
            f"{str(name)!r} is no device to train on; write auto, cpu, cuda or cuda:1, say"
        ) from error
    if (device.index or 0) >= there:
        raise TrainingError(
            f"this machine has no device {str(name)!r}; train on cpu, or where torch finds one"
        )
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
