"""Zeros held in transformers' Trainer: `Trainer(..., callbacks=[KeepZeros()])`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from zoo.errors import ConfigError
from zoo.shared.errors import MaskError
from zoo.shared.masks import MaskHandle, MaskSet, masks_of


class KeepZeros(TrainerCallback):
    """Callback that holds a model's masks from the first step of a Trainer to its last.

    Args:
        masks: by default those that the model carries.
    """

    def __init__(self, masks: MaskSet | None = None) -> None:
        self.masks = masks
        self._handle: MaskHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the masks to the model and to the optimiser that the Trainer made.

        Raises:
            ConfigError: no masks, or a model of peft.
        """
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "adapters of peft are held by zoo.training.peft_lora.hold_masks, without a callback"
            )
        masks = self.masks if self.masks is not None else masks_of(model)
        if not masks:
            raise ConfigError(f"this {type(model).__name__} carries no masks; pass KeepZeros(masks)")
        self._handle = masks.attach(model, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach; the model goes on carrying its masks.

        Raises:
            MaskError: something beside the optimiser changed a weight that is dropped.
        """
        if self._handle is None:
            return
        self._handle.detach()
        held, self._handle = self._handle.masks, None
        if lost := held.lost_zeros(kwargs["model"]):
            raise MaskError(f"{lost[0]!r} lost zeros while training, outside of the optimiser's steps")
