"""Keeping frozen zeros during training: gradient hooks, and the re-zeroing of weights and optimiser state.

The hooks sit on the parameters (before accumulation, so that gradient clipping, accumulation and
DistributedDataParallel all see masked gradients) and on the optimiser. They are never copied or pickled with
the model. Parameters that FSDP2 shards get their gradients from FSDP2, after they were summed over the
processes, so the hook on them runs after accumulation; each process zeroes its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import MaskError, OptimizerStateError
from .shards import is_sharded, local_mask, local_part

#: Optimiser state with one entry per weight that starts at zero; masked like the weight.
PER_WEIGHT_STATE = {
    "momentum_buffer",  # SGD, RMSprop, Muon
    "exp_avg",  # the Adam family
    "exp_avg_sq",
    "max_exp_avg_sq",  # AMSGrad
    "exp_inf",  # Adamax
    "square_avg",  # RMSprop, Adadelta
    "grad_avg",  # centred RMSprop
    "acc_delta",  # Adadelta
    "sum",  # Adagrad
    "prev",  # Rprop
    "ax",  # ASGD, an average of the weights
    "variance",  # Adafactor, vectors
}
#: State that holds no entry per weight, or none that a zero could revive.
OTHER_STATE = {"step", "mu_product", "mu", "eta", "step_size", "row_var", "col_var"}


def register_optimizer_state(key: str, per_weight: bool = True) -> None:
    """Say what a key of an optimiser's state means, so that masks take optimisers that are not torch's.

    Args:
        key: in `optimizer.state[parameter]`.
        per_weight: whether it holds one entry per weight that starts at zero, as a moment does, and which is
            zeroed where the weight is; else it is left alone, as a count of steps.
    """
    (PER_WEIGHT_STATE if per_weight else OTHER_STATE).add(key)


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimiser behind a wrapper such as Accelerate's, whose own hooks are never called."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


class _GradientHook:
    """Runs on the gradient of one parameter before it is accumulated."""

    # Tells torch.multiprocessing that losing this hook on the way to a worker is meant.
    __torch_unserializable__ = True

    def __init__(self, enforcer: Enforcer, name: str) -> None:
        self.enforcer, self.name = enforcer, name

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.enforcer.filter_gradient(self.name, gradient)


class _AccumulatedHook:
    """Runs on a sharded parameter after its gradient was summed over the processes."""

    __torch_unserializable__ = True

    def __init__(self, enforcer: Enforcer, name: str) -> None:
        self.enforcer, self.name = enforcer, name

    def __call__(self, parameter: Tensor) -> None:
        with torch.no_grad():
            self.enforcer.zero_gradient(self.name, parameter)


def refuse_attached(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises MaskError if one of the parameters is held by masks at the moment."""
    for name, parameter in parameters.items():
        hooks = [*(parameter._backward_hooks or {}).values()]
        hooks += (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
        if any(isinstance(hook, _GradientHook | _AccumulatedHook) for hook in hooks):
            raise MaskError(
                f"masks are already attached to {name!r}; detach that handle first, or use its update()"
            )


def replaced(name: str, now: Tensor | None) -> MaskError:
    """The error of a parameter that stands no longer where its masks were attached."""
    what = "sharded" if now is not None and is_sharded(now) else "replaced"
    return MaskError(
        f"parameter {name!r} was {what} since the masks were attached, so that nothing holds its zeros; "
        "attach them again (after fully_shard, with the optimiser that is made then)"
    )


class Enforcer:
    """Holds given entries of given parameters at zero until `remove()`.

    Args:
        parameters: the parameters by name, each once.
        keep: their masks, True = kept.
        optimizers: the optimisers that step them.
        check: called before each step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        keep: Mapping[str, Tensor],
        optimizers: Iterable[Optimizer],
        check: Callable[[], None],
    ) -> None:
        self.parameters = dict(parameters)
        self.optimizers = [unwrap_optimizer(optimizer) for optimizer in optimizers]
        self.capture, self._check = False, check
        self._dense_gradients: dict[str, Tensor] = {}
        self._dropped: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        refuse_attached(self.parameters)
        self.set_masks(keep)
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                continue
            if is_sharded(parameter):
                hook = _AccumulatedHook(self, name)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
            else:
                self._hooks.append(parameter.register_hook(_GradientHook(self, name)))
        for optimizer in self.optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            self._hooks.append(optimizer.register_load_state_dict_post_hook(self._zero_state))

    def set_masks(self, keep: Mapping[str, Tensor]) -> None:
        """Takes new masks: what is dropped now loses weight and state, what is kept anew starts from
        zeros."""
        self._dropped = {name: local_mask(~keep[name], p) for name, p in self.parameters.items()}
        self.enforce()

    def dropped(self, name: str, device: torch.device) -> Bool[Tensor, ...]:
        """The inverted mask of what this process holds, on the device where the parameter now lives."""
        dropped = self._dropped[name]
        if dropped.device != device:
            dropped = self._dropped[name] = dropped.to(device)
        return dropped

    def _zero(self, name: str, tensor: Tensor) -> None:
        part = local_part(tensor)
        part.masked_fill_(self.dropped(name, part.device), 0)

    def filter_gradient(self, name: str, gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The masked gradient; the dense one is put aside while `capture` is on."""
        if gradient.layout != torch.strided:
            raise MaskError(
                f"the gradient of {name!r} has layout {gradient.layout}; masks need strided gradients "
                "(build the embedding with sparse=False)"
            )
        if self.capture:
            held = self._dense_gradients.get(name)
            dense = gradient.detach()
            self._dense_gradients[name] = dense.clone() if held is None else held + dense
        return gradient.masked_fill(self.dropped(name, gradient.device), 0)

    def take_dense_gradients(self) -> dict[str, Tensor]:
        """The dense gradients put aside since the last call, removed from here.

        With several processes it is their average, since all of them must come to the same new masks.
        """
        gradients, self._dense_gradients = self._dense_gradients, {}
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and (gradients or self.capture):
            for name, parameter in self.parameters.items():
                # Every process must take part for every parameter, also where its own batch gave no gradient.
                gradient = gradients.setdefault(name, torch.zeros_like(parameter))
                torch.distributed.all_reduce(gradient)
                gradient /= torch.distributed.get_world_size()
        return gradients

    @torch.no_grad()
    def enforce(self) -> None:
        """Zeroes the dropped entries of weights, gradients and optimiser state."""
        for name, parameter in self.parameters.items():
            self._zero(name, parameter)
            self.zero_gradient(name, parameter)
        for optimizer in self.optimizers:
            self._zero_state(optimizer)

    def remove(self) -> None:
        """Takes every hook away. Parameters, their names and the optimiser stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._dense_gradients.clear()

    def zero_gradient(self, name: str, parameter: Tensor) -> None:
        """Zeroes the dropped entries of the gradient that a parameter holds, if it holds one."""
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            self._zero(name, parameter.grad)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._check()
        # Gradients set by hand (autograd.grad, a parameter unfrozen later) never met the gradient hook.
        for name, parameter in self.parameters.items():
            self.zero_gradient(name, parameter)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for name, parameter in self.parameters.items():
            self._zero(name, parameter)
        self._zero_state(optimizer)

    @torch.no_grad()
    def _zero_state(self, optimizer: Optimizer) -> None:
        for name, parameter in self.parameters.items():
            state = optimizer.state.get(parameter)
            for key, value in (state or {}).items():
                if key in PER_WEIGHT_STATE:
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        self._zero(name, value)
                elif key not in OTHER_STATE:
                    raise OptimizerStateError(
                        f"{type(optimizer).__name__} holds state {key!r} for {name!r} whose meaning is "
                        "unknown, so zeros cannot be kept; use a torch.optim optimiser, or say "
                        f"what it is: zoo.shared.masks.register_optimizer_state({key!r})"
                    )
