"""The floor of what gate sparsity can do: per token the largest |g_i u_i| are kept, which takes knowing u."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from zoo.llm.models.blocks import find_blocks
from zoo.shared.measure.activations import check_share


class TopInput(nn.Module):
    """Keeps, for each token, the inputs of largest magnitude; the others become zero before the layer.

    Args:
        linear: the layer.
        sparsity: share to drop, strictly between 0 and 1; int(features * sparsity) inputs are dropped.
    """

    def __init__(self, linear: nn.Linear, sparsity: float) -> None:
        super().__init__()
        self.linear, self.sparsity = linear, check_share(sparsity)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        dropped = int(x.shape[-1] * self.sparsity)
        smallest = x.abs().topk(dropped, dim=-1, largest=False).indices
        return self.linear(x.scatter(-1, smallest, 0.0))


def attach_oracle(model: nn.Module, sparsity: float) -> nn.Module:
    """Give the down projection of every block the oracle's inputs, in place; see `detach_oracle`."""
    for block in find_blocks(model):
        block.mlp.down_proj = TopInput(block.down, sparsity)
    return model


def detach_oracle(model: nn.Module) -> nn.Module:
    """The model before `attach_oracle`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, TopInput):
                setattr(module, name, child.linear)
    return model
