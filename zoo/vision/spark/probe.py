"""A linear probe: the head of a network fitted on frozen features, in closed form."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.errors import ConfigError
from zoo.shared.measure.modes import eval_mode
from zoo.vision.data import Images, Split
from zoo.vision.models import ResNet

RIDGE = 1e-2  # relative to the mean square of a feature


def fit_head(model: ResNet, data: Images) -> None:
    """Set the network's linear layer to the ridge regression of the classes (one-hot) on what it is given.

    With features X, centred, and targets Y: W = (X^T X / n + r I)^-1 X^T Y / n, r = `RIDGE` times the mean of
    the diagonal. Deterministic; nothing else of the network changes.

    Args:
        model: its features are those of eval mode on whole images.
        data: its training images and labels.

    Raises:
        ConfigError: features that are not finite.
    """
    features = _features(model, data, data.train).double()
    if not bool(torch.isfinite(features).all()):
        raise ConfigError("the network's features are not finite; lower the learning rate of its training")
    classes = model.linear.out_features
    targets = torch.nn.functional.one_hot(data.train.labels, classes).double()
    mean, centre = features.mean(0), targets.mean(0)
    x, y = features - mean, targets - centre
    gram = x.T @ x / len(x)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + ridge, x.T @ y / len(x)).T
    with torch.no_grad():
        model.linear.weight.copy_(weight)
        model.linear.bias.copy_(centre - weight @ mean)


def _features(model: ResNet, data: Images, split: Split, batch: int = 500) -> Float[Tensor, "n features"]:
    found: list[Tensor] = []
    hook = model.linear.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        with torch.no_grad(), eval_mode(model):
            for start in range(0, len(split), batch):
                model(data.normalised(split.images[start : start + batch]))
    finally:
        hook.remove()
    return torch.cat(found)
