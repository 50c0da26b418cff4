"""Which input sites meet which output sites in a sparse convolution, and the convolution itself.

A dense convolution with stride s, padding p and dilation d computes out[o] = sum over k of weight[k] in[o s -
p + k d]. On sites only the products with a site on both sides are done. *Submanifold*: the outputs are the
input sites themselves (Graham, Engelcke, van der Maaten 2018). *Strided*: the outputs are all cells that some
input reaches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..errors import OpError
from .coordinates import SiteSet, unique_sites


@dataclass(frozen=True, eq=False)
class Rulebook:
    """Pairs of rows for each kernel offset.

    Attributes:
        inputs, outputs: rows of the pairs, those of offset 0 first, outputs rising within an offset.
        counts: number of pairs of each offset, in row-major order of the kernel.
        input_sites, output_sites: what the rows are rows of.
    """

    inputs: Tensor
    outputs: Tensor
    counts: tuple[int, ...]
    input_sites: SiteSet
    output_sites: SiteSet

    def inverse(self) -> Rulebook:
        """The same pairs the other way round: a transposed convolution back onto the input sites."""
        return Rulebook(self.outputs, self.inputs, self.counts, self.output_sites, self.input_sites)


def _per_dimension(name: str, value: Sequence[int] | int, dims: int, least: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or any(v < least for v in values):
        raise OpError(f"{name} is {list(values)}; expected {dims} integers, {least} or more")
    return values


def _offsets(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(size) for size in kernel)))


def neighbour_table(
    sites: SiteSet, kernel: Sequence[int] | int, dilation: Sequence[int] | int = 1
) -> Int64[Tensor, "sites offsets"]:
    """For each site and kernel offset the row of the neighbour there, -1 where there is none.

    Args:
        sites: sites whose first dimension is the sample.
        kernel: odd size in each spatial dimension; the middle offset is the site itself.
        dilation: step between offsets.

    Raises:
        OpError: an even kernel, or sizes that do not fit the grid's dimensions.
    """
    dims = len(sites.extent) - 1
    sizes, steps = _per_dimension("kernel", kernel, dims, 1), _per_dimension("dilation", dilation, dims, 1)
    if any(size % 2 == 0 for size in sizes):
        raise OpError(f"a submanifold kernel of {list(sizes)} has no middle; use odd sizes")
    columns = []
    for offset in _offsets(sizes):
        step = [(place - size // 2) * d for place, size, d in zip(offset, sizes, steps, strict=True)]
        columns.append(sites.lookup(sites.coords + sites.coords.new_tensor([0, *step])))
    return torch.stack(columns, 1)


def submanifold_rulebook(
    sites: SiteSet, kernel: Sequence[int] | int, dilation: Sequence[int] | int = 1
) -> Rulebook:
    """The pairs of a convolution whose outputs are its input sites; arguments as for `neighbour_table`."""
    table = neighbour_table(sites, kernel, dilation).t()
    outputs = (table >= 0).nonzero()[:, 1]
    return Rulebook(table[table >= 0], outputs, tuple((table >= 0).sum(1).tolist()), sites, sites)


def strided_rulebook(
    sites: SiteSet,
    kernel: Sequence[int] | int,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
) -> Rulebook:
    """The pairs of a convolution whose outputs are all cells that an input reaches, in row-major order.

    Args:
        sites: sites whose first dimension is the sample.
        kernel, stride, padding, dilation: as in a dense convolution, one number or one per spatial dimension.

    Raises:
        OpError: sizes that do not fit the grid's dimensions, or a kernel larger than the padded grid.
    """
    dims = len(sites.extent) - 1
    sizes, strides = _per_dimension("kernel", kernel, dims, 1), _per_dimension("stride", stride, dims, 1)
    pads, steps = _per_dimension("padding", padding, dims, 0), _per_dimension("dilation", dilation, dims, 1)
    spatial = zip(sites.extent[1:], sizes, strides, pads, steps, strict=True)
    extent = [(side + 2 * pad - step * (size - 1) - 1) // by + 1 for side, size, by, pad, step in spatial]
    if any(side < 1 for side in extent):
        raise OpError(
            f"a kernel of {list(sizes)} with dilation {list(steps)} is larger than the padded grid "
            f"of extent {list(sites.extent[1:])}; enlarge the padding or the grid"
        )
    space, inputs, targets, counts = sites.coords[:, 1:], [], [], []
    by, limit = space.new_tensor(strides), space.new_tensor(extent)
    for offset in _offsets(sizes):
        reach = [pad - place * step for place, pad, step in zip(offset, pads, steps, strict=True)]
        moved = space + space.new_tensor(reach)
        target = moved.div(by, rounding_mode="floor")
        meets = ((moved % by == 0) & (target >= 0) & (target < limit)).all(1)
        rows = meets.nonzero().squeeze(1)
        inputs.append(rows)
        targets.append(torch.cat([sites.coords[rows, :1], target[rows]], 1))
        counts.append(len(rows))
    found = unique_sites(torch.cat(targets), (sites.extent[0], *extent))
    return _sorted_pairs(torch.cat(inputs), found.inverse, counts, sites, found.sites)


def _sorted_pairs(
    inputs: Tensor, outputs: Tensor, counts: list[int], source: SiteSet, target: SiteSet
) -> Rulebook:
    """Pairs with rising outputs within each offset, so that the input rows' order does not decide theirs."""
    offset = torch.repeat_interleave(
        torch.arange(len(counts), device=inputs.device), torch.tensor(counts, device=inputs.device)
    )
    order = torch.argsort(offset * max(len(target), 1) + outputs)
    return Rulebook(inputs[order], outputs[order], tuple(counts), source, target)


def convolve(
    features: Float[Tensor, "inputs channels"],
    weight: Float[Tensor, "offsets channels filters"],
    rulebook: Rulebook,
) -> Float[Tensor, "outputs filters"]:
    """A sparse convolution in plain torch: gather, multiply and add up, offset by offset; differentiable.

    Args:
        features: one row per input site.
        weight: one matrix per kernel offset, in row-major order of the kernel.
        rulebook: the pairs.

    Raises:
        OpError: features or weights that do not fit the rulebook.
    """
    if len(features) != len(rulebook.input_sites) or len(weight) != len(rulebook.counts):
        raise OpError(
            f"{len(features)} rows of features and {len(weight)} offsets for a rulebook of "
            f"{len(rulebook.input_sites)} sites and {len(rulebook.counts)} offsets"
        )
    out = features.new_zeros(len(rulebook.output_sites), weight.shape[2])
    inputs, outputs = rulebook.inputs.split(rulebook.counts), rulebook.outputs.split(rulebook.counts)
    for rows, targets, matrix in zip(inputs, outputs, weight, strict=True):
        if len(rows):
            out = out.index_add(0, targets, features[rows] @ matrix)
    return out
