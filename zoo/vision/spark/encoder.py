"""The encoder: an unmodified convnet that is shown the visible cells of its images only."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.shared.measure.modes import eval_mode
from zoo.vision.models import ResNet
from zoo.vision.spark.masking import Choice, MaskContext, Mode, Visible, draw_cells
from zoo.vision.spark.modules import check_layers, convert
from zoo.vision.spark.timing import fastest_choice

Execution = Literal["auto", "masked", "pairs", "grid", "plain"] | Choice
NormKind = Literal["batch", "layer"]


@dataclass(frozen=True)
class Trunk:
    """What a family of networks is to SparK.

    Attributes:
        features: computes the feature maps; the modules of `stages` run inside of it.
        stages: the modules whose outputs are taken, finest first.
        norm: kind of the network's norms.
        head: prefixes of the parameters that make no feature map.
    """

    features: Callable[[nn.Module, Tensor], object]
    stages: tuple[str, ...]
    norm: NormKind
    head: tuple[str, ...]


def trunk_of(model: nn.Module) -> Trunk:
    """How to take the feature maps of a network: the zoo's CIFAR ResNets, or timm's convnets.

    Raises:
        ConfigError: a network of another kind.
    """
    if isinstance(model, ResNet):
        return Trunk(_resnet_features, ("layer1", "layer2", "layer3"), "batch", ("linear.",))
    if _is_timm(model):
        from zoo.vision.spark.timm_models import timm_trunk

        return timm_trunk(model)
    raise ConfigError(
        f"SparK takes the ResNets of zoo.vision and the convnets of timm; received {type(model).__name__}"
    )


def _is_timm(model: nn.Module) -> bool:
    return hasattr(model, "feature_info") and hasattr(model, "forward_features")


def _resnet_features(model: nn.Module, x: Tensor) -> object:
    net = cast(ResNet, model)
    x = torch.relu(net.bn1(net.conv1(x)))
    return net.layer3(net.layer2(net.layer1(x)))


class SparKEncoder(nn.Module):
    """A copy of a convnet that computes on visible sites (SparK, section 3.2).

    `encoder(images, cells)` gives the feature maps of all stages, finest first, zero at hidden sites. The
    network's own parameters keep their names: `export` gives what the untouched network loads strictly.

    Args:
        model: the network; it stays as it is.
        size: side or (height, width) of the images.
        cell: side of a cell; a multiple of the network's stride, which is the default and the paper's choice.
        channels: of the images.

    Attributes:
        stride: of the coarsest map.
        strides, widths: of the maps, finest first.

    Raises:
        ConfigError: sizes that do not divide, layers that mix hidden and visible sites, or stages whose
            resolutions do not halve.
    """

    def __init__(
        self, model: nn.Module, size: int | tuple[int, int], cell: int | None = None, channels: int = 3
    ) -> None:
        super().__init__()
        self.trunk = trunk_of(model)
        more = _replacements(model)
        for part in _parts(model, self.trunk):
            check_layers(part, more)
        self.context = MaskContext()
        self.channels = channels
        # With the channels last, rows of sites and weights are what the kernels over pairs take as they are.
        self.model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.strides, self.widths = self._measured()
        self.stride = self.strides[-1]
        self.cell = cell or self.stride
        if self.cell % self.stride or any(side % self.cell for side in self.size):
            raise ConfigError(
                f"images of {self.size[0]}x{self.size[1]} cannot be cut into cells of {self.cell}: the cell "
                f"must be a multiple of the network's stride, {self.stride}, and divide the images' sides"
            )
        for part in _parts(self.model, self.trunk):
            convert(part, self.context, more)
        _probe(self)
        self._fastest: dict[tuple[object, ...], Choice] = {}

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of an image, down and across."""
        return self.size[0] // self.cell, self.size[1] // self.cell

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        cells: Bool[Tensor, "B f g"],
        execution: Execution = "auto",
    ) -> list[Tensor]:
        """Feature maps [B, C_i, h_i, w_i] of the visible sites, finest first.

        Args:
            images: what is hidden has no influence.
            cells: True where visible.
            execution: `auto` takes the fastest for this shape and device.

        Raises:
            ConfigError: images or cells of another size.
        """
        visible = self.look(images, cells, execution)
        maps = self.stage_rows(images, visible)
        return [visible.scatter(rows) for rows in maps] if visible.rows else maps

    def look(self, images: Tensor, cells: Tensor, execution: Execution = "auto") -> Visible:
        """The visible cells, checked, with the mode in which to compute.

        Raises:
            ConfigError: see `forward`.
        """
        self._check(images, cells)
        if isinstance(execution, str):
            execution = self.fastest(images, cells) if execution == "auto" else Choice(execution)
        return Visible(cells, *execution)

    def stage_rows(self, images: Tensor, visible: Visible) -> list[Tensor]:
        """Outputs of the stages as the layers compute them: maps, or rows of visible sites."""
        shown = images * visible.plane(*images.shape[-2:])
        with self.context.looking_at(visible):
            return self._stages(visible.gather(shown) if visible.rows else shown)

    def _stages(self, x: Tensor) -> list[Tensor]:
        with outputs_of(self.model, self.trunk.stages) as found:
            self.trunk.features(self.model, x)
        return [found[name] for name in self.trunk.stages]

    def fastest(self, images: Tensor, cells: Tensor) -> Choice:
        """The way whose forward and backward pass took the least time when first tried on this shape and
        device; a choice for a training run is made once and kept."""
        key = (images.device, tuple(images.shape), cells.shape[1:], self.training, torch.get_num_threads())
        if key not in self._fastest:
            self._fastest[key] = fastest_choice(copy.deepcopy(self), images, cells)
        return self._fastest[key]

    def export(self) -> dict[str, Tensor]:
        """The weights under the network's own names, for a strict load into the untouched network; the head
        is as it was given."""
        return {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The parameters that make feature maps."""
        named = self.model.named_parameters()
        return [p for name, p in named if not name.startswith(self.trunk.head)]

    def _measured(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Strides and widths of the stages, from one image."""
        with torch.no_grad(), eval_mode(self.model):
            first = next(self.model.parameters())
            image = torch.zeros(1, self.channels, *self.size, dtype=first.dtype, device=first.device)
            try:
                maps = self._stages(image)
            except RuntimeError as error:
                raise ConfigError(
                    f"the network does not take {self.channels} channels of {self.size[0]}x{self.size[1]}: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        strides = tuple(self.size[0] // m.shape[2] for m in maps)
        exact = all((m.shape[2] * s, m.shape[3] * s) == self.size for m, s in zip(maps, strides, strict=True))
        if not exact or any(b != 2 * a for a, b in zip(strides, strides[1:], strict=False)):
            sides = ", ".join(f"{m.shape[2]}x{m.shape[3]}" for m in maps)
            raise ConfigError(
                f"images of {self.size[0]}x{self.size[1]} give maps of {sides}: every stage must halve the "
                "one before; take images whose sides are multiples of the network's stride"
            )
        return strides, tuple(m.shape[1] for m in maps)

    def _check(self, images: Tensor, cells: Tensor) -> None:
        expected = (images.shape[0], self.channels, *self.size)
        if tuple(images.shape) != expected or tuple(cells.shape) != (images.shape[0], *self.grid):
            raise ConfigError(
                f"this encoder takes images {expected} with visible cells {(images.shape[0], *self.grid)}; "
                f"received {tuple(images.shape)} and {tuple(cells.shape)}"
            )


def _replacements(model: nn.Module) -> Mapping[type[nn.Module], type[nn.Module]]:
    if not _is_timm(model):
        return {}
    from zoo.vision.spark.timm_models import replacements

    return replacements()


def _parts(model: nn.Module, trunk: Trunk) -> Iterator[nn.Module]:
    """The children of a network that make its maps, each below a module that gives its layers their names."""
    heads = {prefix.rstrip(".") for prefix in trunk.head}
    for name, child in model.named_children():
        if name not in heads:
            holder = nn.Module()
            holder.add_module(name, child)
            yield holder


def _probe(encoder: SparKEncoder) -> None:
    """Run both ways of computing on random numbers, and refuse a network for which they differ: some layer of
    it mixes sites in a way that no visible counterpart was found for."""
    trial = copy.deepcopy(encoder).double().cpu().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters():  # fresh networks hide branches behind zeros
            scale = 1 if parameter.dim() == 1 else (2 / max(1, parameter[0].numel())) ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        images = torch.randn(2, encoder.channels, *encoder.size, generator=generator, dtype=torch.float64)
        if encoder.grid == (1, 1):
            raise ConfigError(
                f"images of {encoder.size[0]}x{encoder.size[1]} are one cell of {encoder.cell}: nothing "
                "could be hidden; take larger images or a network with a smaller stride"
            )
        cells = draw_cells(2, encoder.grid, 0.5, generator)
        outputs = []
        modes: tuple[Mode, ...] = ("masked", "grid")
        for mode in modes:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outputs.append(trial(images, cells, Choice(mode)))
    for stage, first, second in zip(encoder.trunk.stages, *outputs, strict=True):
        if not torch.allclose(first, second, rtol=1e-6, atol=1e-6 * float(first.abs().max())):
            raise ConfigError(
                f"up to {stage!r} this {type(encoder.model).__name__} mixes hidden and visible sites in a "
                "layer that SparK does not know; take a ResNet or ConvNeXt, or give the layer a visible "
                "counterpart"
            )


def occupancy(
    encoder: SparKEncoder, images: Tensor, cells: Tensor, names: Sequence[str], mode: Mode
) -> list[float]:
    """Share of the sites of these layers' outputs at which any channel is not zero."""
    with torch.no_grad(), outputs_of(encoder.model, names) as found:
        encoder.stage_rows(images, Visible(cells, mode))
    return [float((found[name] != 0).any(1).double().mean()) for name in names]


@contextmanager
def outputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collects what these modules give to the present thread inside the block."""
    with _collected(model, names, lambda inputs, output: output) as found:
        yield found


@contextmanager
def inputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collects what these modules are given by the present thread inside the block."""
    with _collected(model, names, lambda inputs, output: inputs[0]) as found:
        yield found


@contextmanager
def _collected(
    model: nn.Module, names: Iterable[str], pick: Callable[[tuple[Tensor, ...], Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}
    thread = threading.get_ident()
    hooks = []
    for name in names:

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            if threading.get_ident() == thread:
                found[name] = pick(inputs, output)

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
