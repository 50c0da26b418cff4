"""Base of tasks that one kind of network takes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn

from zoo.errors import TaskError
from zoo.harness.tasks import Flops, Task
from zoo.shared.measure.account import count


class NetworkTask(Task):
    """A task for one kind of network.

    Attributes:
        network: the class.
    """

    network: ClassVar[type[nn.Module]]

    def accepts(self, card: Any) -> bool:
        """Models that were measured on this."""
        return self.is_on(card)

    def fitting(self, model: nn.Module) -> Any:
        """The model itself.

        Raises:
            TaskError: it is of another kind.
        """
        if not isinstance(model, self.network):
            raise TaskError(f"{self.name} takes a {self.network.__name__}; received {type(model).__name__}")
        return model

    @abstractmethod
    def example(self, model: Any) -> tuple[Any, ...]:
        """One sample, as the model takes it."""

    def flops(self, model: nn.Module) -> Flops:
        """Operations of one pass over one sample."""
        own = self.fitting(model)
        total = count(own, self.example(own)).total
        return Flops(total.flops, total.flops_kept)
