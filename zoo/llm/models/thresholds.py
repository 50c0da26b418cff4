"""Thresholds on the activations of a decoder: put on any gated model without touching its code, taken off,
stored, and counted.

A model with thresholds stays transformers' own: the state dict, `save_pretrained`, `generate`, the KV cache
and batching are those of the dense model. Two modules take the place of what they wrap:

- `ThresholdedActivation` for the activation of an FFN, so that the gate g = act(W_gate x) becomes zero where
  |g| <= t: the rows of W_up and W_down of such a channel are then not needed (CHESS, CATS);
- `ThresholdedLinear` for a projection, whose input becomes zero where |x| <= t (CHESS's q and o, TEAL's all).

In a bundle they are the extras `thresholds/<name of the module>`: a vector per FFN or a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.llm.models.blocks import Block, find_blocks
from zoo.shared.masks import near_misses
from zoo.shared.measure.activations import ActivationThreshold, counting_sparsity, realised_sparsity
from zoo.shared.measure.modes import eval_mode

PREFIX = "thresholds"


class ThresholdedActivation(nn.Module):
    """act(z) where |act(z)| > t, else 0.

    Args:
        activation: between gate and product.
        threshold: one number, or one per channel.
    """

    def __init__(self, activation: nn.Module, threshold: float | Tensor) -> None:
        super().__init__()
        self.activation = activation
        self.threshold = ActivationThreshold(threshold, persistent=False)

    def forward(self, z: Float[Tensor, "*batch f"]) -> Float[Tensor, "*batch f"]:
        return self.threshold(self.activation(z))


class ThresholdedLinear(nn.Linear):
    """A linear layer of x where |x| > t; weight and bias are those of the layer it takes the place of.

    Args:
        linear: the layer.
        threshold: one number, or one per input.
    """

    def __init__(self, linear: nn.Linear, threshold: float | Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.threshold = ActivationThreshold(threshold, persistent=False)

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return super().forward(self.threshold(input))

    def plain(self) -> nn.Linear:
        """The layer without its threshold, with the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


def attach(model: nn.Module, thresholds: Mapping[str, Tensor | float]) -> nn.Module:
    """Put thresholds on a model, in place, in addition to those it has; same names are replaced.

    Args:
        model: a causal LM with a gated FFN.
        thresholds: by the name of the module: an FFN's `act_fn` or one of the seven projections.

    Raises:
        ConfigError: a module that is not there, or a threshold that does not fit it (those of another model).
        BudgetError: a negative or NaN threshold.
    """
    places = _places(model)
    for name, value in thresholds.items():
        if name not in places:
            raise ConfigError(
                f"thresholds for {name!r}, which this {type(model).__name__} lacks"
                f"{near_misses(name, places)}: they belong to another model"
            )
        width = places[name]
        if isinstance(value, Tensor) and value.ndim and tuple(value.shape) != (width,):
            raise ConfigError(
                f"thresholds for {name!r} have the shape {tuple(value.shape)}, the model has {width} "
                "channels there: they belong to another model"
            )
    for name, value in thresholds.items():
        module = model.get_submodule(name)
        device = next(model.parameters()).device
        on = value.to(device) if isinstance(value, Tensor) else torch.tensor(value, device=device)
        if isinstance(module, (ThresholdedActivation, ThresholdedLinear)):
            module.threshold = ActivationThreshold(on, persistent=False)
        elif name.endswith("act_fn"):
            _swap(model, name, ThresholdedActivation(module, on))
        elif isinstance(module, nn.Linear):
            _swap(model, name, ThresholdedLinear(module, on))
        else:
            raise ConfigError(
                f"{name} is a {type(module).__name__}, whose input takes no threshold: attach thresholds "
                "before the weights are packed"
            )
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take all thresholds off, in place: the dense model again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ThresholdedActivation):
            _swap(model, name, module.activation)
        elif isinstance(module, ThresholdedLinear):
            _swap(model, name, module.plain())
    return model


def thresholds_of(model: nn.Module) -> dict[str, Tensor]:
    """The thresholds on a model, packed or not, by module name, as `attach` takes them."""
    return {
        name.removesuffix(".threshold"): module.threshold
        for name, module in model.named_modules()
        if isinstance(module, ActivationThreshold)
    }


def to_extras(thresholds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Thresholds as the extra tensors of a bundle."""
    return {f"{PREFIX}/{name}": value.detach().cpu() for name, value in thresholds.items()}


def held_out_shares(
    model: nn.Module, batches: Iterable[Int[Tensor, "batch length"]]
) -> list[dict[str, float | str]]:
    """What the thresholds drop on a text, layer by layer.

    Args:
        model: with thresholds.
        batches: token ids, best of a text that the thresholds were not calibrated on.

    Returns:
        For each block its name; `ffn`, the share of closed gates, and the share of zero inputs of each
        thresholded projection by its letter or name; and `skipped`, the share of the block's linear weights
        that these spare a token from reading.

    Raises:
        DataError: no batch.
        BudgetError: the model has no thresholds.
    """
    seen = 0
    with counting_sparsity(model), eval_mode(model), torch.inference_mode():
        for ids in batches:
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
            seen += 1
    if not seen:
        raise DataError("There is no batch of tokens; give held-out text.")
    shares = {name.removesuffix(".threshold"): share for name, share in realised_sparsity(model).items()}
    return [{"block": block.name, **_block_shares(block, shares)} for block in find_blocks(model)]


def skipped_share(report: list[dict[str, float | str]]) -> float:
    """The mean of `skipped` over the blocks of a report, which all have the same size."""
    return sum(float(row["skipped"]) for row in report) / len(report)


def _block_shares(block: Block, shares: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    skipped = total = 0.0
    gates = shares.get(f"{block.mlp_name}.act_fn")
    if gates is not None:
        found["ffn"] = gates
    for name, linear in block.linears():
        weights = linear.in_features * linear.out_features
        part = name.rpartition(".")[2].removesuffix("_proj")
        share = shares.get(name)
        if share is not None:
            found[part] = share
        elif gates is not None and part in ("up", "down"):
            share = gates
        skipped, total = skipped + weights * (share or 0.0), total + weights
    return {**found, "skipped": skipped / total}


def _places(model: nn.Module) -> dict[str, int]:
    """Where thresholds may go: the name of a module and the width of what is compared."""
    places = {}
    for block in find_blocks(model):
        places[f"{block.mlp_name}.act_fn"] = block.gate.out_features
        places.update({name: linear.in_features for name, linear in block.linears()})
    return places


def _swap(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.training = model.get_submodule(name).training
    setattr(model.get_submodule(parent), child, module)
