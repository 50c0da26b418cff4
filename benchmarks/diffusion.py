"""Cut diffusion models really run faster: against their dense twins, zeros alone, and networks made by hand.

Bundles make one image in ten steps. At the shapes of the real families, one call: a UNet of one level, 320
channels at 32x32 latents with cross-attention to 77 tokens (Stable Diffusion 1.5's outer level), and a
transformer block of SDXL's inner level (width 1280, 20 heads) on 16x16 latents. The goal is 0.9 of the ratio
of counted operations; `masked` has zeros where the cut network has nothing, `by hand` is a network that was
built with the cut shapes, `Torch-Pruning` one that the library of that name cut (where it is installed),
and they show that nothing but the removal counts. Unstructured and 2:4 zeros run by
what `auto` picks. `cached` leaves inner levels out of two steps of three.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from zoo.bundles.catalog import find, list_models
from zoo.bundles.store import load
from zoo.diffusion.caching import sample_cached
from zoo.diffusion.models import TextToImage
from zoo.diffusion.plan import Plan, apply_plan
from zoo.diffusion.sampling import sample
from zoo.diffusion.units import unit_groups
from zoo.shared.bench import Cell, Goal, Later, main
from zoo.shared.masks import Mask, MaskSet
from zoo.shared.masks.patterns import NM, Pattern, Unstructured
from zoo.shared.measure.account import count
from zoo.shared.ops.packing import pack

SHARE = 0.9  # of the ratio of operations
STEPS, CACHED_STEPS = 10, 20
Call = Callable[[], object]
ZEROS: dict[str, Pattern] = {
    "half zeros, packed by auto": Unstructured(),
    "2:4 zeros, packed by auto": NM(2, 4),
}


def loaded(name: str, execution: Literal["masked", "packed"] = "masked") -> TextToImage:
    """A text-to-image model of the zoo."""
    model = load(name, execution)
    assert isinstance(model, TextToImage)
    return model


def twin_of(name: str) -> TextToImage:
    """The dense twin of one."""
    twin = find(name).card.dense_twin
    assert twin is not None
    return loaded(twin)


def sampling(model: TextToImage, steps: int = STEPS, run: Callable[..., Tensor] = sample) -> Call:
    """One image of a text-to-image model."""
    noise = torch.randn((1, *model.sample_shape), generator=torch.Generator().manual_seed(0))
    ids = model.tokenise(["a photo of a seven"])
    return lambda: run(model, noise, model.encode(ids), steps=steps)


def operations(network: nn.Module, arguments: tuple[Any, ...]) -> float:
    """Counted operations of a call."""
    return float(count(network, arguments).total.flops)


def halved(network: nn.Module) -> Plan:
    """Half of the heads and half of the neurons of every module."""
    return Plan({group.name: tuple(range(group.count // 2)) for group in unit_groups(network)})


def zeroed(network: nn.Module, plan: Plan) -> nn.Module:
    """A copy with zeros where a plan removes units, at full size."""
    made = copy.deepcopy(network)
    for group in unit_groups(made):
        gone = torch.ones(group.count, dtype=torch.bool)
        gone[list(plan.units.get(group.name, range(group.count)))] = False
        for part in group.columns:
            weight: Any = made.get_submodule(part.linear).weight
            weight[:, part.start : part.start + group.count * group.width][
                :, gone.repeat_interleave(group.width)
            ] = 0
    return made


def unet(heads: int = 8) -> nn.Module:
    """A UNet of one level with 320 channels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(320,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=768,
        attention_head_dim=heads,
    ).eval()


def block(heads: int = 20, neurons: int = 5120) -> nn.Module:
    """A transformer block of SDXL's inner level."""
    torch.manual_seed(0)
    return BasicTransformerBlock(1280, heads, 64, cross_attention_dim=2048, ff_inner_dim=neurons).eval()


class UNetByHand(nn.Module):
    """The same with transformer blocks that were made with half the heads and neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = unet()
        modules: list[Any] = [*self.net.modules()]
        for module in modules:
            if hasattr(module, "transformer_blocks"):
                module.transformer_blocks[0] = BasicTransformerBlock(
                    320, 4, 40, cross_attention_dim=768, ff_inner_dim=640
                )

    def forward(self, *args: Any) -> Any:
        return self.net(*args)


def shaped(name: str) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """A dense network, one of the cut shapes by hand, and what both are called with."""
    if name.startswith("UNet"):
        arguments = torch.randn(1, 4, 32, 32), torch.tensor(10), torch.randn(1, 77, 768)
        return unet(), UNetByHand().eval(), arguments
    text = torch.randn(1, 77, 2048)
    return block(), block(10, 2560), (torch.randn(1, 256, 1280), None, text)


def torch_pruned(network: nn.Module, arguments: tuple[Any, ...]) -> nn.Module | None:
    """Half of the heads and neurons removed by Torch-Pruning's dependency graph; None without the package.

    It knows channels, not heads: which of them make a head, and how many are left, is told by hand.
    """
    try:
        import torch_pruning
    except ImportError:
        return None
    out = torch_pruning.prune_linear_out_channels
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(network, arguments)
    for module in [*network.modules()]:
        chosen: list[tuple[Any, list[int]]] = []
        if isinstance(module, Attention):
            rest, width = module.heads - module.heads // 2, module.to_q.out_features // module.heads
            chosen = [(layer, [*range(rest * width)]) for layer in (module.to_q, module.to_k, module.to_v)]
            module.heads //= 2
        elif isinstance(module, GEGLU):
            chosen = [(module.proj, [*range(module.proj.out_features // 4)])]
        for layer, gone in chosen:
            before = layer.out_features
            if chosen[0][0] is layer or before == len(gone) * 2:  # else it went with the one before
                graph.get_pruning_group(layer, out, idxs=gone).prune()
    return network


def with_zeros(network: nn.Module, pattern: Pattern) -> nn.Module:
    """A copy with half of each linear layer's smallest weights zero, packed."""
    made = copy.deepcopy(network)
    masks = MaskSet(
        {
            f"{name}.weight": Mask(pattern.keep(module.weight.abs(), module.weight.numel() // 2), pattern)
            for name, module in made.named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    masks.apply_(made)
    return pack(made, masks)


def cells(quick: bool, threads: int) -> Iterator[Later]:
    def of_bundle(labels: dict[str, object], name: str) -> Cell:
        model, dense = loaded(name), twin_of(name)
        flops = find(name).card.cost.flops
        ratio = flops.dense / flops.sparse
        labels["FLOPs"] = f"1/{ratio:.2f}"
        return Cell(labels, sampling(model), {"dense twin": sampling(dense)}, goal=Goal(SHARE * ratio))

    def of_zeros(labels: dict[str, object], name: str) -> Cell:
        model, dense = loaded(name, "packed"), twin_of(name)
        return Cell(labels, sampling(model), {"dense twin": sampling(dense)}, goal=Goal(0.97))

    def of_shape(labels: dict[str, object], name: str, cut: str) -> Cell:
        dense, by_hand, arguments = shaped(name)
        made = copy.deepcopy(dense)
        peers: dict[str, Call] = {"dense": lambda: dense(*arguments)}
        if cut in ZEROS:
            packed = with_zeros(dense, ZEROS[cut])
            return Cell(labels, lambda: packed(*arguments), peers, goal=Goal(0.97))
        if cut == "half of the heads and neurons":
            plan = halved(made)
            masked = zeroed(dense, plan)
            peers |= {"masked": lambda: masked(*arguments), "by hand": lambda: by_hand(*arguments)}
            other = torch_pruned(copy.deepcopy(dense), arguments)
            if other is not None:
                peers["Torch-Pruning"] = lambda: other(*arguments)
        else:
            plan = Plan(dropped=("up_blocks.0.attentions.0", "up_blocks.0.resnets.1"))
        apply_plan(made, plan)
        ratio = operations(dense, arguments) / operations(made, arguments)
        labels["FLOPs"] = f"1/{ratio:.2f}"
        return Cell(labels, lambda: made(*arguments), peers, goal=Goal(SHARE * ratio, over=("dense",)))

    def of_cache(labels: dict[str, object], name: str) -> Cell:
        model = loaded(name)
        cached = sampling(model, CACHED_STEPS, sample_cached)
        return Cell(labels, cached, {"every step whole": sampling(model, CACHED_STEPS)}, goal=Goal(1.5))

    cut = [name for name in list_models("diffusion/*-t2i-digits-*") if "pruning_plan" in _arguments(name)]
    for name in cut[:1] if quick else cut:
        labels: dict[str, object] = {"network": name, "cut": "as it is shipped"}
        yield Later(labels, functools.partial(of_bundle, dict(labels), name))
    for name in [] if quick else list_models("diffusion/magnitude-*"):
        labels = {"network": name, "cut": "zeros, packed by auto"}
        yield Later(labels, functools.partial(of_zeros, dict(labels), name))
    shapes = [
        ("UNet 320, 32x32", "half of the heads and neurons"),
        ("UNet 320, 32x32", "a resnet and a transformer dropped"),
        ("SDXL block 1280, 16x16", "half of the heads and neurons"),
        *(("SDXL block 1280, 16x16", cut) for cut in ZEROS),
    ]
    for name, how in shapes[2:3] if quick else shapes:
        labels = {"network": name, "cut": how}
        yield Later(labels, functools.partial(of_shape, dict(labels), name, how))
    for name in [] if quick else ["diffusion/dense-t2i-digits", *cut[:1]]:
        labels = {"network": name, "cut": f"cached, {CACHED_STEPS} steps"}
        yield Later(labels, functools.partial(of_cache, dict(labels), name))


def _arguments(name: str) -> Any:
    return find(name).card.architecture.args


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("cut diffusion models against their dense twins", cells))
