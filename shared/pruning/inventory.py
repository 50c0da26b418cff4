"""Inventory of a model's weights: what pruning reaches by default, what it leaves out, and the input axes.

Reached are the weights of linear layers and their subclasses, of transformers' Conv1D (stored inputs first),
of convolutions, of attention and recurrent layers and of layers of other libraries built alike, and the
fused three-dimensional experts of mixtures. Left out are embeddings, the output head of a vocabulary (tied or
of the shape of an embedding), norms and the routers of mixtures: they are small or fragile, and no tool of
the field takes them. Whoever wants them names them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from ..errors import MaskError
from ..masks import unwrap

LINEAR, CONVOLUTION, CONV1D, EXPERTS, OTHER = (
    "linear",
    "convolution",
    "Conv1D",
    "fused experts",
    "other layer",
)
ROUTER = "a router"


@dataclass(frozen=True)
class Weight:
    """One parameter of the inventory.

    Args:
        name: of the parameter.
        kind: of the layer that owns it.
        shape: of the parameter.
        axis: the input axis, over which a product sums: -1, 1 or 0.
        reason: why pruning leaves it out by default; empty if it is reached.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    axis: int = -1
    reason: str = ""


@dataclass(frozen=True)
class Inventory:
    """The matrices and kernels of a model, in its order; tied ones once, under their first name.

    Args:
        weights: all parameters of two or more dimensions.
        total: entries of all parameters of the model.
    """

    weights: tuple[Weight, ...]
    total: int

    @property
    def reached(self) -> list[Weight]:
        """What pruning takes by default."""
        return [weight for weight in self.weights if not weight.reason]

    @property
    def share(self) -> float:
        """Entries reached over the entries of all parameters."""
        return sum(weight.numel for weight in self.reached) / self.total if self.total else 0.0

    @property
    def axes(self) -> dict[str, int]:
        """The input axis by name."""
        return {weight.name: weight.axis for weight in self.weights}

    def __str__(self) -> str:
        lines = [f"pruning reaches {self.share:.1%} of {self.total:,} parameters"]
        groups: dict[tuple[str, str], list[Weight]] = {}
        for weight in self.weights:
            groups.setdefault((weight.reason, weight.kind), []).append(weight)
        for (reason, kind), members in sorted(groups.items()):
            what = f"left out, {reason}" if reason else "reached"
            count = sum(weight.numel for weight in members)
            lines.append(f"  {what}: {len(members)} x {kind}, {count:,} weights, such as {members[0].name}")
        return "\n".join(lines)


def inventory(model: nn.Module) -> Inventory:
    """The inventory of a model; see the module.

    Raises:
        MaskError: a parameter is not initialised yet.
    """
    model = unwrap(model)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    weights = []
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise MaskError(f"parameter {name!r} has no shape yet; run one forward pass first")
        if parameter.dim() < 2:
            continue
        kind, axis = _kind(model, name, parameter)
        reason = _reason(model, name, parameter, kind, aliases[id(parameter)])
        weights.append(Weight(name, kind, tuple(parameter.shape), parameter.numel(), axis, reason))
    return Inventory(tuple(weights), sum(parameter.numel() for parameter in model.parameters()))


def prunable_parameters(model: nn.Module) -> list[str]:
    """Names of the weights that pruning takes by default; see `inventory`.

    Raises:
        MaskError: a parameter is not initialised yet.
    """
    return [weight.name for weight in inventory(model).reached]


def _kind(model: nn.Module, name: str, parameter: nn.Parameter) -> tuple[str, int]:
    """What the layer is, and its input axis."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, _ConvNd):
        return CONVOLUTION, 0 if isinstance(owner, _ConvTransposeNd) else 1
    if type(owner).__name__ == "Conv1D" and parameter.dim() == 2:  # transformers': x @ weight
        return CONV1D, 0
    if isinstance(owner, nn.Linear):
        return LINEAR, -1
    if parameter.dim() == 3 and _is_weight_of_experts(owner, name):
        return EXPERTS, _experts_axis(owner, name, parameter)
    return OTHER, 1 if parameter.dim() > 2 else -1


def _is_weight_of_experts(owner: nn.Module, name: str) -> bool:
    fused = "experts" in name.split(".")[:-1] or "experts" in type(owner).__name__.lower()
    return fused and not name.endswith("bias")


def _experts_axis(owner: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """-1 where experts are stored (experts, outputs, inputs), 1 where (experts, inputs, outputs).

    transformers says so in `is_transposed`. Elsewhere the projection down gives it away: its outputs are what
    the projection up takes in, and up or gate-and-up have as many outputs as down has inputs, or twice.
    """
    if (transposed := getattr(owner, "is_transposed", None)) is not None:
        return 1 if transposed else -1
    width = getattr(owner, "hidden_size", getattr(owner, "hidden_dim", None))
    if width is None or parameter.shape[1] == parameter.shape[2]:
        return -1
    down = "down" in name.rpartition(".")[2] or name.endswith("w2")
    return -1 if (parameter.shape[2] == width) != down else 1


def _reason(model: nn.Module, name: str, parameter: nn.Parameter, kind: str, aliases: list[str]) -> str:
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    owners = [model.get_submodule(alias.rpartition(".")[0]) for alias in aliases]
    if any(isinstance(one, nn.Embedding | nn.EmbeddingBag) for one in owners):
        return "an embedding" + (", tied to the head" if len(aliases) > 1 else "")
    if kind == OTHER and "norm" in type(owner).__name__.lower():
        return "a norm"
    if kind == LINEAR and _is_vocabulary_head(model, owner):
        return "the head of a vocabulary"
    if _is_router(model, path, parameter):
        return ROUTER
    if kind == EXPERTS or last.startswith("weight") or last.endswith("weight"):
        return ""
    return "not the weight of a layer"


def _is_vocabulary_head(model: nn.Module, owner: nn.Module) -> bool:
    """Whether a linear layer is the model's last one and of the shape of an embedding."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    shape = tuple(linear[-1].weight.shape)
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return owner is linear[-1] and any(tuple(table.weight.shape) == shape for table in tables)


def _is_router(model: nn.Module, path: str, parameter: nn.Parameter) -> bool:
    """Whether the layer at `path` stands beside experts with one output for each, or one for all."""
    owner = model.get_submodule(path)
    if "router" in type(owner).__name__.lower():
        return True
    experts = getattr(model.get_submodule(path.rpartition(".")[0]), "experts", None) if path else None
    if not isinstance(experts, nn.Module) or owner is experts:
        return False
    counts = {1} | ({len(experts)} if isinstance(experts, nn.ModuleList) else set())
    counts |= {p.shape[0] for p in experts.parameters() if p.dim() == 3}
    return parameter.shape[0] in counts


def inner_weights(model: nn.Module) -> list[str]:
    """The prunable weights without those of the first and the last layer.

    Raises:
        MaskError: there are no others.
    """
    names = prunable_parameters(model)
    if len(names) < 3:
        raise MaskError(
            f"{type(model).__name__} has no layer between its first and its last; choose weights by names"
        )
    return names[1:-1]


def pointwise_weights(model: nn.Module) -> list[str]:
    """Names of the weights of 1x1 convolutions with stride 1 and one group.

    Raises:
        MaskError: the model has none.
    """
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
    ]
    if not names:
        raise MaskError(f"{type(model).__name__} has no 1x1 convolutions of stride 1")
    return names
