"""Masks attached to a model through training: what holds the zeros, and what lets go of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import MaskError
from .hold import Enforcer, replaced
from .mask import MaskSet, masks_of, set_masks, unwrap
from .shards import is_sharded


class MaskHandle:
    """Masks attached to a model, as a context manager; made by `MaskSet.attach`.

    `detach()` (or leaving the context) removes every hook and leaves the same Parameter objects under the
    same names. The model goes on carrying its masks as a record (`masks_of`), and so do its copies. A step of
    the optimiser, and leaving the context, refuse parameters that were replaced meanwhile, by `fully_shard`.
    """

    def __init__(
        self, masks: MaskSet, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None
    ) -> None:
        self.model = unwrap(model)
        optimizers: Iterable[Optimizer] = (
            () if optimizer is None else (optimizer,) if isinstance(optimizer, Optimizer) else optimizer
        )
        parameters = masks._parameters(self.model)
        keep = {name: masks[name].keep for name in parameters}
        self._places = {name: _place(self.model, name) for name in parameters}
        self._enforcer = Enforcer(parameters, keep, optimizers, self._refuse_replaced)
        _forget_reload_hook(self.model)  # a deepcopy of an attached model brings one along
        self.model.register_load_state_dict_post_hook(_mask_loaded_weights)
        self.masks = masks
        set_masks(self.model, masks)

    def step(self) -> None:
        """Re-zeroes weights, gradients and optimiser state; needed only if no optimiser was given.

        Raises:
            MaskError: a parameter object was replaced since attaching.
        """
        current = dict(self.model.named_parameters(remove_duplicate=False))
        for name, parameter in self._enforcer.parameters.items():
            if current.get(name) is not parameter and not is_sharded(parameter):
                raise replaced(name, current.get(name))
        self._enforcer.enforce()

    def _refuse_replaced(self) -> None:
        """The same where another parameter stands in the same place now, cheaply; a place that is empty, as
        that of a weight that was parametrised, is none."""
        for name, parameter in self._enforcer.parameters.items():
            module, attribute = self._places[name]
            now = module._parameters.get(attribute)
            if now is not None and now is not parameter and not is_sharded(parameter):
                raise replaced(name, now)

    def update(self, masks: MaskSet) -> None:
        """Goes over to new masks of the same tensors: a newly kept entry has weight zero and zero moments, an
        entry kept before and after keeps its own.

        Raises:
            MaskError: other names than before, or shapes that do not fit.
        """
        if set(masks) != set(self.masks):
            raise MaskError(
                f"new masks must name the same tensors; differing: {sorted(set(masks) ^ set(self.masks))}"
            )
        parameters = masks._parameters(self.model)
        self._enforcer.set_masks(
            {name: masks[name].keep for name in self._enforcer.parameters if name in parameters}
        )
        self.masks = masks
        set_masks(self.model, masks)

    def capture_gradients(self, on: bool) -> None:
        """Whether backward passes from now on also put aside the dense gradient (memory: one dense copy).

        Raises:
            MaskError: sharded parameters, whose dense gradients no process has.
        """
        if on and (sharded := [n for n, p in self._enforcer.parameters.items() if is_sharded(p)]):
            raise MaskError(
                f"{sharded[0]!r} is sharded: find masks by gradients before fully_shard, or under DDP"
            )
        self._enforcer.capture = on

    def take_dense_gradients(self) -> dict[str, Tensor]:
        """Removes and returns the dense gradients put aside, summed over backward passes, by parameter
        name."""
        return self._enforcer.take_dense_gradients()

    def detach(self) -> None:
        """Removes every hook from model and optimisers."""
        self._enforcer.remove()
        _forget_reload_hook(self.model)

    def __enter__(self) -> MaskHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if kind is None:
            self._refuse_replaced()


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and its name there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _mask_loaded_weights(model: nn.Module, incompatible_keys: Any) -> None:
    """After `load_state_dict`: a dense checkpoint must not revive dropped weights. Holds no state, so copies
    are safe."""
    masks = masks_of(model)
    if masks is not None:
        masks.apply_(model)


def _forget_reload_hook(model: nn.Module) -> None:
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _mask_loaded_weights]:
        del hooks[key]
