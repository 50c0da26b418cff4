"""Measuring what scores need on a model and a few batches: gradients, Hessian-gradient products, input
statistics.

The model is not changed: `.grad` stays as it is, and buffers (running statistics) are put back. Train or eval
mode is the caller's choice. `loss_fn(model, batch)` returns a scalar; results are means over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..errors import MaskError

LossFn = Callable[[nn.Module, Any], Tensor]
Forward = Callable[[nn.Module, Any], Any]


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])


class LossModule(nn.Module):
    """`loss_fn` as a module, so that `functional_call` can evaluate it at stand-ins for the parameters, which
    are then named `model.<name>`.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)

    def gradients(
        self, batch: Any, create_graph: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Aliases of the trainable parameters, and the gradient of the loss with respect to each.

        Aliases, because the hooks of attached masks sit on the parameters and would mask the gradients.
        """
        aliases = {
            name: parameter.detach().requires_grad_()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        with torch.enable_grad():
            loss = functional_call(
                self, {f"model.{name}": alias for name, alias in aliases.items()}, (batch,)
            )
        return aliases, _differentiate(loss, aliases, create_graph)


def _differentiate(value: Tensor, inputs: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    if not value.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    found = torch.autograd.grad(value, list(inputs.values()), create_graph=create_graph, allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(inputs.items(), found, strict=True)
    }


def _add(total: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        total[name] = total[name] + value.detach() if name in total else value.detach()


def collect_gradients(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> dict[str, Tensor]:
    """dL/dw of every trainable parameter, the mean over batches. Dense, also where masks are attached.

    Raises:
        MaskError: no batch.
    """
    loss, total, count = LossModule(model, loss_fn), dict[str, Tensor](), 0
    with _buffers_restored(model):
        for batch in batches:
            count += 1
            _add(total, loss.gradients(batch)[1])
    _counted(count)
    return {name: value / count for name, value in total.items()}


def collect_hessian_gradients(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Hg of every trainable parameter by double differentiation; g is the mean gradient and H the mean
    Hessian over the batches, which are therefore kept in memory.

    Raises:
        MaskError: no batch.
    """
    batches = list(batches)
    mean = collect_gradients(model, loss_fn, batches)
    loss, total = LossModule(model, loss_fn), dict[str, Tensor]()
    with _buffers_restored(model):
        for batch in batches:
            aliases, gradients = loss.gradients(batch, create_graph=True)
            inner = torch.stack([(gradients[name] * mean[name]).sum() for name in aliases]).sum()
            _add(total, _differentiate(inner, aliases))
    return {name: value / len(batches) for name, value in total.items()}


def collect_activations(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None = None
) -> dict[str, Float[Tensor, " features"]]:
    """The L2 norm of each input feature (Linear) or input channel (Conv) over all positions of all batches.

    Keys are the names of the weights. `forward(model, batch)` defaults to `model(batch)`.

    Raises:
        MaskError: no batch.
    """

    def squares(module: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
        rows = _features(module, inputs)
        return rows.square().sum(0), len(rows)

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    sums = _accumulate(model, batches, forward, lambda module: isinstance(module, layers), squares)
    return {name: total.sqrt() for name, (total, _) in sums.items()}


def collect_hessians(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None = None
) -> dict[str, Float[Tensor, "features features"]]:
    """2/n sum x x^T over the n input rows of each Linear and ungrouped 2-D convolution (x: unfolded patches).

    Raises:
        MaskError: no batch, or a convolution with padding given as a word.
    """

    def moment(module: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
        rows = _patches(module, inputs) if isinstance(module, nn.Conv2d) else _features(module, inputs)
        return 2 * rows.T @ rows, len(rows)

    def accepts(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)

    return {
        name: total / n for name, (total, n) in _accumulate(model, batches, forward, accepts, moment).items()
    }


def _counted(count: int) -> None:
    if not count:
        raise MaskError("no batches to measure on; pass at least one")


def _accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    accepts: Callable[[nn.Module], bool],
    statistic: Callable[[nn.Module, Tensor], tuple[Tensor, int]],
) -> dict[str, tuple[Tensor, int]]:
    """Sums a statistic of the accepted layers' inputs, and the rows it was taken over, over the batches."""
    totals: dict[str, tuple[Tensor, int]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def measure(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            value, rows = statistic(module, inputs[0].detach())
            if name in totals:
                value, rows = value + totals[name][0], rows + totals[name][1]
            totals[name] = (value, rows)

        return measure

    handles = [
        module.register_forward_pre_hook(hook(f"{name}.weight" if name else "weight"))
        for name, module in model.named_modules()
        if accepts(module)
    ]
    count = 0
    try:
        with torch.no_grad(), _buffers_restored(model):
            for batch in batches:
                count += 1
                _ = forward(model, batch) if forward else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    _counted(count)
    return totals


def _features(module: nn.Module, inputs: Tensor) -> Float[Tensor, "positions features"]:
    """Inputs as [positions, features or channels] in single precision."""
    inputs = inputs.float()
    if not isinstance(module, nn.Linear):
        inputs = inputs.movedim(-1 - len(module.kernel_size), -1)  # type: ignore[arg-type]
    return inputs.reshape(-1, inputs.shape[-1])


def _patches(module: nn.Conv2d, inputs: Tensor) -> Float[Tensor, "positions features"]:
    """The inputs of a convolution unfolded to [positions, I*kh*kw], the order of its flattened weight."""
    if isinstance(module.padding, str):
        raise MaskError(f"Hessians need numeric padding; received padding={module.padding!r}")
    batch = inputs.float() if inputs.dim() == 4 else inputs.float().unsqueeze(0)
    patches = F.unfold(batch, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
