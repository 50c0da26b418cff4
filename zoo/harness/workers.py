"""Several processes, as `accelerate launch -m zoo eval ...` starts them: each does its share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from zoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This process among those that work together.

    Attributes:
        index: from 0; 0 is the one that prints and writes reports.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def owns(self, item: int) -> bool:
        """Whether an item, counted from 0, is this process's to measure."""
        return item % self.count == self.index

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of the items.

        Raises:
            ConfigError: there are fewer items than processes.
        """
        if len(items) < self.count > 1:
            raise ConfigError(f"{len(items)} pieces of work cannot be shared among {self.count} processes.")
        return [item for index, item in enumerate(items) if self.owns(index)]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a tensor that each has, in every process the same bits."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        total: Tensor = reduce(tensor.clone(), "sum")
        return total

    def gather(self, values: list[T]) -> list[T]:
        """All processes' values, in every process. Values are pickled between processes of one run."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object(values)
        return gathered


def workers() -> Workers:
    """The processes that a launcher started; one without a launcher, and then Accelerate is not imported."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Workers()
    from accelerate import PartialState

    state = PartialState()
    return Workers(state.process_index, state.num_processes)
