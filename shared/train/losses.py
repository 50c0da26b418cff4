"""Losses of a model on a batch: cross-entropy, and distillation from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ..errors import TrainingError

Loss = Callable[[nn.Module, Any], Tensor]


def cross_entropy(model: nn.Module, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Mean cross-entropy of a classifier on a batch `(inputs, labels)`."""
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def output_kl(
    student: Float[Tensor, "*n classes"], teacher: Float[Tensor, "*n classes"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) in nats, the mean over all but the classes
    (Hinton, Vinyals and Dean 2015)."""
    target = (teacher.float() / temperature).log_softmax(-1)
    own = (student.float() / temperature).log_softmax(-1)
    divergence = functional.kl_div(own, target, log_target=True, reduction="sum")
    return temperature**2 * divergence / (student.numel() / student.shape[-1])


def feature_loss(student: Float[Tensor, "*s"], teacher: Float[Tensor, "*s"]) -> Float[Tensor, ""]:
    """Mean squared difference of two feature maps."""
    return functional.mse_loss(student, teacher)


def normalised_feature_loss(student: Float[Tensor, "*s"], teacher: Float[Tensor, "*s"]) -> Float[Tensor, ""]:
    """||f_T - f_S||^2 / ||f_T||^2: layers of any scale weigh alike (LAPTOP-Diff, Zhang et al. 2024)."""
    scale = teacher.detach().square().sum().clamp(min=torch.finfo(teacher.dtype).tiny)
    return (teacher - student).square().sum() / scale


class Distillation:
    """A loss plus what keeps a student near its teacher, on the student's own calls.

    The student's forward is watched while the loss runs: the teacher, in eval mode and without gradients, is
    called with the same arguments. The total is task * loss + output * `output_kl` + squared * the mean
    squared difference of the outputs (of regression, or noise prediction) + feature * sum `feature_loss` +
    normalised * sum `normalised_feature_loss`.

    Args:
        teacher: on the device of the student.
        task, output, squared, feature, normalised: weights of the terms.
        temperature: of the outputs' divergence.
        features: module of the student -> module of the teacher, whose outputs must have equal shapes.

    Raises:
        TrainingError: a weight that is negative, no module of that name, or features that are asked for
            without modules.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        task: float = 1.0,
        output: float = 0.0,
        squared: float = 0.0,
        feature: float = 0.0,
        normalised: float = 0.0,
        temperature: float = 1.0,
        features: Mapping[str, str] | None = None,
    ) -> None:
        weights = {
            "task": task,
            "output": output,
            "squared": squared,
            "feature": feature,
            "normalised": normalised,
        }
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise TrainingError(
                    f"the weight of {name} must be finite and not negative; received {weight}"
                )
        if not temperature > 0:
            raise TrainingError(f"temperature must be positive; received {temperature}")
        self.features = dict(features or {})
        if (feature or normalised) and not self.features:
            raise TrainingError("features to distil need modules: give features={student's: teacher's}")
        self.teacher = teacher.eval()
        self.task, self.output, self.squared = task, output, squared
        self.feature, self.normalised = feature, normalised
        self.temperature = temperature

    def __call__(self, loss: Loss, model: nn.Module, batch: Any) -> Tensor:
        """The total of one batch."""
        calls: list[tuple[Any, Any, Any]] = []
        own, theirs = dict[str, Tensor](), dict[str, Tensor]()
        hooks = [
            model.register_forward_hook(lambda _, a, k, out: calls.append((a, k, out)), with_kwargs=True)
        ]
        hooks += _watch(model, self.features.keys(), own)
        try:
            total = self.task * loss(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) != 1:
            raise TrainingError(
                f"distillation needs a loss that calls the model once per batch; this one called it "
                f"{len(calls)} times"
            )
        arguments, keywords, out = calls[0]
        hooks = _watch(self.teacher, self.features.values(), theirs)
        try:
            with torch.no_grad():
                target = self.teacher(*arguments, **keywords)
        finally:
            for hook in hooks:
                hook.remove()
        if self.output:
            total = total + self.output * output_kl(_logits(out), _logits(target), self.temperature)
        if self.squared:
            total = total + self.squared * feature_loss(_logits(out), _logits(target))
        for student, teacher in self.features.items():
            pair = own[student], theirs[teacher]
            if pair[0].shape != pair[1].shape:
                raise TrainingError(
                    f"features {student!r} {tuple(pair[0].shape)} and {teacher!r} {tuple(pair[1].shape)} "
                    "differ in shape; distil between stages of equal shape"
                )
            if self.feature:
                total = total + self.feature * feature_loss(*pair)
            if self.normalised:
                total = total + self.normalised * normalised_feature_loss(*pair)
        return total


def _logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _watch(model: nn.Module, names: Any, into: dict[str, Tensor]) -> list[RemovableHandle]:
    modules = dict(getattr(model, "module", model).named_modules())  # DDP wraps the model
    if missing := [name for name in names if name not in modules]:
        raise TrainingError(f"{type(model).__name__} has no module {missing[0]!r} to distil")

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            into[name] = output[0] if isinstance(output, tuple) else output

        return hook

    return [modules[name].register_forward_hook(keep(name)) for name in names]
