"""Indices damaged behind an op's back: refused, or computed right where they still fit; never a crash.

Run under the address sanitizer it shows that nothing is read or written outside:
`ZOO_FUZZ=2000 python -m zoo.shared.ops.build --sanitize address --test tests/shared/ops/test_invalid.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.decoder_layer import LayerWeights, layer_inputs, layer_outputs
from zoo.shared.ops.gated_product import gated_product
from zoo.shared.ops.gated_product import reference as gated_reference
from zoo.shared.ops.hash_encode import HashGrid, hash_encode
from zoo.shared.ops.quant_panel_linear import QuantPanels, quant_panel_linear
from zoo.shared.ops.quant_sparse_linear import quant_sparse_linear, quantise_groups
from zoo.shared.ops.rasterize import rasterize
from zoo.shared.ops.rulebook import conv_rulebook, submanifold_rulebook
from zoo.shared.ops.separable_conv import Depthwise, Pointwise, separable_conv
from zoo.shared.ops.sparse_conv import sparse_conv, sparse_max_pool, subm_conv
from zoo.shared.ops.sparse_conv1x1 import sparse_conv1x1
from zoo.shared.ops.sparse_conv2d import sparse_conv2d
from zoo.shared.ops.sparse_linear import sparse_linear
from zoo.shared.ops.sparse_tensor import SparseConvTensor
from zoo.shared.ops.spgemm import CSR, spgemm
from zoo.shared.ops.spmm import sddmm, spmm
from zoo.shared.ops.weights import SparseWeight, pack

TRIES = int(os.environ.get("ZOO_FUZZ", "60"))  # of each target
Target = tuple[list[Tensor], Callable[[], Tensor]]


def damage(tensor: Tensor, rng: random.Random) -> None:
    """Write one wrong number, as numpy would: no version counter notices."""
    if tensor.numel() == 0:
        return
    kind = torch.iinfo(tensor.dtype)
    flat: Any = tensor.view(-1).numpy()
    at = rng.choice([0, tensor.numel() - 1, rng.randrange(tensor.numel())])
    old = int(flat[at])
    new = rng.choice(
        [
            kind.min,
            kind.max,
            old + 1,
            old - 1,
            old ^ (1 << rng.randrange(kind.bits - 1)),
            rng.randrange(kind.max),
        ]
    )
    flat[at] = min(max(new, kind.min), kind.max)


def packed(layout: str, batch: int, trains: bool) -> Target:
    cols = 600 if layout != "wide" else 4500
    name = "csr" if layout == "wide" else layout
    weight = pack(torch.randn(12, cols), torch.rand(12, cols) < 0.3, name)
    if trains:
        weight = dataclasses.replace(weight, values=weight.values.requires_grad_())
    x = torch.randn(batch, cols)

    def run() -> Tensor:
        y = sparse_linear(x, weight)
        if not trains:
            return y
        (grad,) = torch.autograd.grad(y.sum(), weight.values)
        return torch.cat([y.flatten(), grad[: weight.kept]]).detach()

    return [weight.index, weight.pointer], run


def pointwise(layout: str) -> Target:
    weight, x = pack(torch.randn(8, 200), torch.rand(8, 200) < 0.3, layout), torch.randn(2, 200, 6, 7)
    return [weight.index, weight.pointer], lambda: sparse_conv1x1(x, weight)


def separable(layout: str) -> Target:
    weights = [pack(torch.randn(n, m), torch.rand(n, m) < 0.3, layout) for n, m in ((200, 9), (8, 200))]
    between, x = Depthwise(torch.randn(200, 1, 3, 3), padding=1), torch.randn(2, 9, 6, 7)
    index = [part for weight in weights for part in (weight.index, weight.pointer)]
    return index, lambda: separable_conv(x, Pointwise(weights[0]), between, Pointwise(weights[1]))


def spatial(layout: str) -> Target:
    weight, x = pack(torch.randn(8, 180), torch.rand(8, 180) < 0.3, layout), torch.randn(2, 20, 6, 7)
    return [weight.index, weight.pointer], lambda: sparse_conv2d(x, weight, kernel=3, stride=2, padding=1)


def grouped(batch: int, cols: int = 96, group: int = 16) -> Target:
    weight = quantise_groups(torch.randn(9, cols), torch.rand(9, cols // group) < 0.5, group)
    x = torch.randn(batch, cols)
    return [weight.columns, weight.pointer, weight.zeros], lambda: quant_sparse_linear(x, weight)


def panels(batch: int, rows: int = 9, group: int = 16) -> Target:
    groups = quantise_groups(torch.randn(rows, 96), torch.rand(rows, 96 // group) < 0.5, group)
    weight, x = QuantPanels.of(groups), torch.randn(batch, 96)
    return [weight.masks, weight.pointer, weight.zeros], lambda: quant_panel_linear(x, weight)


def one_token() -> Target:
    groups = [quantise_groups(torch.randn(32, 32) / 6, torch.rand(32, 2) < 0.7) for _ in range(7)]
    weights = [QuantPanels.of(each) for each in groups]
    layer = LayerWeights(*weights, torch.ones(32), torch.ones(32), epsilon=1e-5, head=8, scale=0.3)
    x, cosine, sine = torch.randn(32), torch.rand(8), torch.rand(8)

    def run() -> Tensor:
        q, k, v = (each.view(4, 1, 8) for each in layer_inputs(x, layer, cosine, sine))
        return layer_outputs(x, q.flatten(), k, v, layer)

    return [part for each in weights for part in (each.masks, each.pointer, each.zeros)], run


def gated() -> Target:
    up = pack(torch.randn(20, 70), torch.rand(20, 70) < 0.5, "bitmask")
    down = pack(torch.randn(20, 50), torch.rand(20, 50) < 0.5, "bitmask")
    x, g = torch.randn(2, 70), torch.randn(2, 20)

    def run() -> Tensor:
        for each in (up, down):
            SparseWeight(*each.parts, each.layout, each.shape)  # the reference reads no bits that are wrong
        if ops.dispatch.requested() == "reference":
            return gated_reference(x, g, up, down)
        return gated_product(x, g, up, down)

    return [up.index, up.pointer, down.index, down.pointer], run


def graph(index: torch.dtype, op: str) -> Target:
    row, col = torch.randint(0, 11, (60,)).sort().values, torch.randint(0, 7, (60,)).to(index)
    crow = torch.zeros(12, dtype=index)
    crow[1:] = torch.bincount(row, minlength=11).cumsum(0)
    x, values = torch.randn(7, 5, requires_grad=True), torch.randn(60)
    eye = CSR(torch.arange(8, dtype=index), torch.arange(7, dtype=index), torch.randn(7), 7)

    def run() -> Tensor:
        if op == "sddmm":
            return sddmm(crow, col, torch.ones(11, 5), x).detach()
        if op == "spgemm":
            return spgemm(CSR(crow, col, values, 7), eye).values
        if op == "max":
            return spmm(crow, col, x.detach(), values, reduce="max")
        y = spmm(crow, col, x, values)
        return torch.cat([y, torch.autograd.grad(y.sum(), x)[0]]).detach()

    return [crow, col], run


def convolution(kind: str) -> Target:
    sites = (torch.rand(2, 9, 9) < 0.4).nonzero().int().contiguous()
    grid = SparseConvTensor(torch.randn(len(sites), 4, requires_grad=True), sites, (9, 9), 2)
    weight = torch.randn(4, 3, 3, 1 if kind == "depthwise" else 4)
    if kind == "sites":
        return [sites], lambda: subm_conv(grid, weight).features.detach()
    book = (submanifold_rulebook if kind in ("subm", "depthwise") else conv_rulebook)(sites, (9, 9), 2, 3)
    pairs = [*book.forward[:3], *book.backward[:3]]

    def run() -> Tensor:
        if kind == "pool":
            result = sparse_max_pool(grid, 3, rulebook=book)
        elif kind == "conv":
            result = sparse_conv(grid, weight, rulebook=book)
        else:
            result = subm_conv(grid, weight, groups=4 if kind == "depthwise" else 1, rulebook=book)
        grad = torch.autograd.grad(result.features.sum(), grid.features)[0]
        return torch.cat([result.features, grad]).detach()

    return pairs, run


def targets() -> Iterator[tuple[str, Callable[[], Target]]]:
    for layout in ("bitmask", "csr", "wide", "rows4", "columns8"):
        for batch in (1, 7, 60):
            yield f"{layout}-{batch}", lambda layout=layout, batch=batch: packed(layout, batch, False)
        yield f"{layout}-trains", lambda layout=layout: packed(layout, 7, True)
    for layout in ("bitmask", "csr", "rows4"):
        yield f"conv1x1-{layout}", lambda layout=layout: pointwise(layout)
        yield f"separable-{layout}", lambda layout=layout: separable(layout)
        yield f"conv2d-{layout}", lambda layout=layout: spatial(layout)
    for batch in (1, 9):
        yield f"groups-{batch}", lambda batch=batch: grouped(batch)
        for rows, group in ((9, 16), (9, 32), (300, 16), (256, 48)):
            name = f"panels-{rows}-{group}-{batch}"
            yield name, lambda b=batch, r=rows, g=group: panels(b, r, g)
    yield "one-token", one_token
    yield "gated", gated
    for index in (torch.int32, torch.int64):
        for op in ("sum", "max", "sddmm", "spgemm"):
            yield f"{op}-{str(index)[6:]}", lambda index=index, op=op: graph(index, op)
    for kind in ("subm", "depthwise", "conv", "pool", "sites"):
        yield kind, lambda kind=kind: convolution(kind)


@pytest.mark.skipif(not _native.available(), reason="no native library")
@pytest.mark.parametrize(("name", "make"), list(targets()), ids=[name for name, _ in targets()])
def test_damaged_indices_are_refused_or_computed_right(name: str, make: Callable[[], Target]) -> None:
    rng = random.Random(name)
    torch.manual_seed(rng.randrange(2**31))
    refused = wrong = 0
    tensors, run = make()
    intact, right = [tensor.clone() for tensor in tensors], run()
    for _ in range(TRIES):
        with ops.backend("native"):
            run()  # so that what is remembered of calls is remembered
        wounds = rng.choice([1, 1, 2])
        for _ in range(wounds):
            damage(rng.choice(tensors), rng)
        try:
            with ops.backend(rng.choice(["native", "auto"])):
                found = run()
        except OpError:
            refused += 1
        else:
            try:
                with ops.backend("reference"):
                    expected = run()
            except OpError:  # of what no kernel reads, as bits far beyond the columns
                expected = right if wounds == 1 else found  # a second one may be of what they do read
            wrong += not torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
        for tensor, before in zip(tensors, intact, strict=True):
            tensor.copy_(before)
    print(f"{name}: {TRIES} tried, {refused} refused, {wrong} wrong")
    assert refused and not wrong


ODD = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-30, 1e30, 3.4e38)


def spoil(tensor: Tensor, rng: random.Random) -> Tensor:
    """The tensor with an odd value, without rows, or with one too few."""
    kind = rng.randrange(6)
    if kind == 0:
        return tensor[:0]
    if kind == 1:
        return tensor[:-1]
    changed = tensor.clone()
    if changed.numel():
        changed.view(-1)[rng.randrange(changed.numel())] = rng.choice(ODD)
    return changed


def encoding(rng: random.Random) -> tuple[Tensor, ...]:
    """A hash grid's features and gradients at points of which some are odd."""
    grid = HashGrid(2, rng.choice([1, 2, 3]), 4, 1, rng.choice([1, 4, 1 << 20]))
    tensors = [torch.rand(9, 3) * 3 - 1, torch.randn(grid.entries, grid.features), torch.rand(9)]
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(3)
        tensors[at] = spoil(tensors[at], rng)
    points, table, saliency = (each.requires_grad_() for each in tensors)
    out = inspect.unwrap(hash_encode)(points, table, grid, rng.choice([None, saliency]))
    to_points, to_table = torch.autograd.grad(out.sum(), (points, table))
    # Differences of infinite entries, or of millions: run, and compared by nobody.
    smooth = grid.finest < 9 and bool(table.isfinite().all()) and float(table.detach().abs().max()) < 9
    return out.detach(), to_table, *([to_points] if smooth else [])


def rendering(rng: random.Random) -> tuple[Tensor, ...]:
    """An image and its gradients of Gaussians, a camera and sizes of which some are odd."""
    tensors = [torch.randn(7, 3), torch.randn(7, 4), torch.rand(7, 3), torch.rand(7), torch.rand(7, 3)]
    tensors += [torch.eye(4), torch.tensor([[6.0, 0, 4], [0, 6, 4], [0, 0, 1]])]
    numbers: dict[str, Any] = {"width": 9, "height": 7, "near": 0.01, "eps2d": 0.3, "sh_degree": None}
    for _ in range(rng.choice([1, 1, 2])):
        if rng.random() < 0.7:
            at = rng.randrange(7)
            tensors[at] = spoil(tensors[at], rng)
        else:
            name = rng.choice(list(numbers))
            numbers[name] = rng.choice(ODD if name in ("near", "eps2d") else [-1, 0, 1, 2**31, -(2**63)])
    leaves = [each.requires_grad_() for each in tensors[:5]]
    seen = inspect.unwrap(rasterize)(*leaves, *tensors[5:], **numbers)
    grads = torch.autograd.grad(seen.colour.sum() + seen.depth.sum() + seen.alpha.sum(), leaves)
    if any(float(each.detach().abs().max()) > 1e9 for each in tensors if each.numel()):
        return ()  # squares beyond single precision, in which the reference computes here
    return seen.colour.detach(), seen.depth.detach(), *grads


@pytest.mark.skipif(not _native.available(), reason="no native library")
@pytest.mark.parametrize("make", [encoding, rendering])
def test_odd_values_and_sizes_are_refused_by_all_backends_or_by_none(make: Callable[..., Any]) -> None:
    refused, apart = 0, []
    for number in range(2 * TRIES):
        outcomes: list[Any] = []
        for backend in ("native", "reference"):
            torch.manual_seed(number)
            try:
                with ops.backend(backend):
                    outcomes.append(make(random.Random(number)))
            except OpError:
                outcomes.append(None)
        found, wanted = outcomes
        refused += found is None
        both = found is not None and wanted is not None
        pairs = zip(found, wanted, strict=True) if both else ()
        same = (found is None) == (wanted is None)
        if not same or not all(torch.allclose(*p, rtol=1e-3, atol=1e-3, equal_nan=True) for p in pairs):
            apart.append(number)
    print(f"{make.__name__}: {2 * TRIES} tried, {refused} refused, {len(apart)} differ: {apart[:9]}")
    assert refused and not apart


def test_impossible_sizes_are_refused_and_memory_that_is_not_there_is_a_memory_error() -> None:
    one = torch.tensor([0, 1], dtype=torch.int64)
    a = CSR(one, torch.zeros(1, dtype=torch.int64), torch.ones(1), 1)
    for cols in (-5, -(2**63)):
        with pytest.raises(OpError, match="columns"):
            spgemm(a, a._replace(cols=cols))
    if not _native.available():
        pytest.skip("no native library")
    with pytest.raises(MemoryError):
        _native.function("zoo_selftest_memory", "i")(2**62)
    with pytest.raises(MemoryError):
        _native.function("zoo_selftest_memory", "i")(-8)


def test_every_exported_function_lets_nothing_out() -> None:
    """An exception that left the library would end the interpreter."""
    sources = sorted((_native.FOLDER.resolve().parents[1] / "native" / "src").glob("*.cpp"))
    if not sources:
        pytest.skip("not a source checkout")
    plain = {"zoo_abi_version", "zoo_set_openmp", "zoo_digest", "zoo_finite"}  # which throw nothing
    for source in sources:
        text = source.read_text()
        for part in text.split("ZOO_EXPORT ")[1:]:
            name = part.split("(")[0].split()[-1]
            head, _, body = part.partition("{")
            assert name in plain or (head.rstrip().endswith("try") and "\n} ZOO_CATCH" in body), name
