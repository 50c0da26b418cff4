"""What a call sees after its tensors were written to behind torch's back: new products, never old ones."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops.cache import Calls, Derived, digest
from zoo.shared.ops.csr import csr_from_edges, transposed
from zoo.shared.ops.dense_rows import store_rows
from zoo.shared.ops.modules import SparseConv1x1, SparseLinear
from zoo.shared.ops.nm_linear import nm_linear, pack_nm
from zoo.shared.ops.quant_panel_linear import QuantPanels, quant_panel_linear, round_units
from zoo.shared.ops.quant_sparse_linear import quant_sparse_linear, quantise_groups
from zoo.shared.ops.rulebook import conv_rulebook, submanifold_rulebook
from zoo.shared.ops.sparse_linear import reference
from zoo.shared.ops.spmm import spmm, spmm_reference
from zoo.shared.ops.weights import pack


def by_data(parameter: Tensor, new: Tensor) -> None:
    parameter.data.copy_(new)


def by_new_data(parameter: Tensor, new: Tensor) -> None:
    parameter.data = new.clone()


def by_numpy(parameter: Tensor, new: Tensor) -> None:
    parameter.detach().numpy()[...] = new.numpy()


def by_copy(parameter: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(new)


def by_inference(parameter: Tensor, new: Tensor) -> None:
    with torch.inference_mode():
        parameter.copy_(new)


WRITES = (by_data, by_new_data, by_numpy, by_copy, by_inference)
Write = Callable[[Tensor, Tensor], None]
writes = pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
trains = pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])


def layer(rows: int = 24, cols: int = 600, sparsity: float = 0.5, layout: str = "auto") -> SparseLinear:
    weight = torch.randn(rows, cols) * (torch.rand(rows, cols) >= sparsity)
    return SparseLinear(pack(weight, layout=layout), torch.randn(rows))


def offered(run: Callable[[], Tensor]) -> list[str]:
    """The backends that take a call; each has then run it twice, and remembers what it remembers."""
    found = []
    for name in ("auto", "native", "dense", "vendor", "reference"):
        try:
            with ops.backend(name), torch.no_grad():
                run(), run()
        except OpError:
            continue
        found.append(name)
    return found


@writes
@trains
@pytest.mark.parametrize("batch", [1, 3, 8, 64])
@pytest.mark.parametrize("layout", ["bitmask", "csr", "rows4", "columns8"])
def test_a_layer_multiplies_by_the_values_that_it_has(
    layout: str, batch: int, trains: bool, write: Write
) -> None:
    torch.manual_seed(0)
    linear, x = layer(layout=layout).requires_grad_(trains), torch.randn(batch, 600)
    names = offered(lambda: linear(x))
    assert "reference" in names and "dense" in names
    write(linear.values, linear.values.detach() * 2 + 1)
    with torch.no_grad():
        expected = reference(x, linear.weight, linear.bias)
        for name in names:
            with ops.backend(name):
                torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-3)


@writes
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("layout", ["bitmask", "csr", "rows4", "columns8"])
def test_a_layer_multiplies_by_the_index_that_it_has(layout: str, batch: int, write: Write) -> None:
    torch.manual_seed(0)
    linear, x = layer(layout=layout).requires_grad_(False), torch.randn(batch, 600)
    names = offered(lambda: linear(x))
    moved = linear.index.flip(-1).contiguous() if layout == "bitmask" else linear.index.clone()
    if layout == "bitmask":  # the same number of bits, elsewhere
        used = 600 // 8
        moved = linear.index.clone()
        moved[:, :used] = linear.index[:, :used].flip(-1)
    else:
        step = 8 if layout == "columns8" else 1
        kept = linear.weight.index.numel() - 16
        moved[:kept] = 600 - step - linear.index[:kept]
    write(linear.index, moved)
    with torch.no_grad():
        expected = nn.functional.linear(x, linear.weight.to_dense(), linear.bias)
        for name in names:
            with ops.backend(name):
                torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-3)


@writes
def test_an_index_that_points_outside_is_refused_in_the_call(write: Write) -> None:
    torch.manual_seed(0)
    for layout, batch in (("bitmask", 1), ("csr", 1), ("csr", 64), ("rows4", 4), ("columns8", 1)):
        linear, x = layer(layout=layout).requires_grad_(False), torch.randn(batch, 600)
        names = offered(lambda linear=linear, x=x: linear(x))
        bad = linear.index.clone()
        bad.view(-1)[5] = 255 if layout == "bitmask" else 600
        write(linear.index, bad)
        for name in names:
            with ops.backend(name), pytest.raises(OpError):
                linear(x)


def test_vector_to_parameters_and_state_dicts_are_seen() -> None:
    torch.manual_seed(0)
    linear, other, x = layer().requires_grad_(False), layer(), torch.randn(64, 600)
    for name in offered(lambda: linear(x)):
        with ops.backend(name), torch.no_grad():
            twice = 2 * nn.utils.parameters_to_vector(linear.parameters())
            nn.utils.vector_to_parameters(twice, linear.parameters())
            expected = reference(x, linear.weight, linear.bias)
            torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-3)
    state = other.state_dict()
    same_kept = min(linear.values.numel(), other.values.numel())
    if same_kept == linear.values.numel() == other.values.numel():
        linear.load_state_dict(state)
    copied = copy.deepcopy(linear)
    copied.load_state_dict({name: tensor.clone() for name, tensor in linear.state_dict().items()})
    torch.testing.assert_close(copied(x), linear(x), rtol=0, atol=0)


@writes
def test_a_pointwise_convolution_sees_new_weights(write: Write) -> None:
    torch.manual_seed(0)
    for layout in ("csr", "bitmask", "rows4"):
        weight = torch.randn(12, 200) * (torch.rand(12, 200) < 0.4)
        conv = SparseConv1x1(pack(weight, layout=layout)).requires_grad_(False)
        x = torch.randn(2, 200, 7, 7)
        names = offered(lambda conv=conv, x=x: conv(x))
        write(conv.values, conv.values.detach() - 3)
        expected = nn.functional.conv2d(x, conv.weight.to_dense()[..., None, None])
        for name in names:
            with ops.backend(name):
                torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-3)


@writes
def test_grouped_and_patterned_and_stored_weights_are_seen(write: Write) -> None:
    torch.manual_seed(0)
    groups = quantise_groups(torch.randn(8, 64), torch.rand(8, 4) < 0.5)
    mask = (torch.rand(8, 16, 4).argsort(-1) < 2).reshape(8, 64)
    pattern, rows = pack_nm(torch.randn(8, 64), mask, 2, 4), store_rows(torch.randn(64, 8), "int8", group=16)
    panels = QuantPanels.of(groups)
    for batch in (1, 9):
        x = torch.randn(batch, 64)
        rounded = round_units(x, 16)
        calls: list[tuple[Callable[[], Tensor], Tensor]] = [
            (lambda x=x: quant_sparse_linear(x, groups), groups.scales),
            (lambda x=rounded: quant_panel_linear(x, panels), panels.scales),
            (lambda x=x: nm_linear(x, pattern), pattern.packed.values),
            (lambda x=x: ops.gather_linear(x, rows), rows.scales if rows.scales is not None else x),
        ]
        for call, part in calls:
            names = offered(call)
            before = call()
            write(part, part.detach() * 2)
            for name in names:
                with ops.backend(name):
                    torch.testing.assert_close(call(), 2 * before, rtol=1e-4, atol=1e-4)


def graph() -> tuple[Tensor, Tensor]:
    crow, col, _ = csr_from_edges(torch.randint(0, 9, (2, 40)), 9)
    return crow, col


@writes
def test_the_gradient_of_a_changed_graph_is_its_own(write: Write) -> None:
    torch.manual_seed(0)
    crow, col = graph()
    x = torch.randn(9, 5, requires_grad=True)
    spmm(crow, col, x).sum().backward()
    write(col, col.flip(0).contiguous())
    x.grad = None
    scale = torch.randn(9, 5)
    (spmm(crow, col, x) * scale).sum().backward()
    other = x.detach().clone().requires_grad_()
    (spmm_reference(crow, col, other) * scale).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@writes
def test_a_graph_that_points_outside_is_refused_in_the_call(write: Write) -> None:
    crow, col = graph()
    x = torch.randn(9, 5)
    for _ in range(3):
        spmm(crow, col, x)
    bad = col.clone()
    bad[3] = 10**8
    write(col, bad)
    with pytest.raises(OpError, match="columns must lie"):
        spmm(crow, col, x)
    with pytest.raises(OpError, match="columns must lie"):
        spmm(crow, col, x.clone().requires_grad_())


def test_row_pointers_that_wrap_do_not_pass() -> None:
    """0, 2^31 - 1, -2^31, -1, 6: every difference is positive in 32 bits."""
    crow = torch.tensor([0, 2**31 - 1, -(2**31), -1, 6], dtype=torch.int32)
    with pytest.raises(OpError, match="crow must rise"):
        spmm(crow, torch.zeros(6, dtype=torch.int32), torch.ones(4, 2))


@writes
def test_a_rulebook_belongs_to_the_sites_as_they_are(write: Write) -> None:
    sites = torch.tensor([[0, 1, 1], [0, 1, 2], [0, 3, 3]], dtype=torch.int32)
    before = submanifold_rulebook(sites, (8, 8), 1, 3).forward.source.numel()
    conv_rulebook(sites, (8, 8), 1, 3)
    write(sites, torch.tensor([[0, 1, 1], [0, 6, 6], [0, 3, 3]], dtype=torch.int32))
    assert before == 5 and submanifold_rulebook(sites, (8, 8), 1, 3).forward.source.numel() == 3
    fresh = conv_rulebook(sites.clone(), (8, 8), 1, 3)
    assert torch.equal(conv_rulebook(sites, (8, 8), 1, 3).indices, fresh.indices)
    write(sites, torch.tensor([[0, 1, 1], [0, 9, 6], [0, 3, 3]], dtype=torch.int32))
    with pytest.raises(OpError, match="outside"):
        submanifold_rulebook(sites, (8, 8), 1, 3)


@pytest.mark.parametrize("layout", ["csr", "rows4", "columns4", "columns8", "columns16"])
def test_columns_beyond_int16_are_refused(layout: str) -> None:
    """32767 + 1 is -32768 in the type of the index, and was in range."""
    weight = pack(torch.ones(8, 64), layout=layout)
    bad = weight.index.clone()
    bad[0] = 32767 if layout in ("csr", "rows4") else 32768 - int(layout.removeprefix("columns"))
    module = SparseLinear(weight)
    with pytest.raises(OpError, match="lies outside its panel"):
        type(weight)(weight.values, bad, weight.pointer, weight.layout, weight.shape, weight.width)
    module.load_state_dict({**module.state_dict(), "index": bad})
    for batch in (1, 64):
        with pytest.raises(OpError), torch.no_grad():
            module(torch.ones(batch, 64))


def every_change(tensor: Tensor) -> list[Tensor]:
    changed = []
    for at in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            other = tensor.clone()
            data: Any = other.view(-1).view(torch.uint8).numpy()
            data[at * tensor.element_size() + bit // 8] ^= numpy.uint8(1 << bit % 8)
            changed.append(other)
    return changed


@pytest.mark.parametrize("native", [True, False])
def test_a_digest_tells_every_bit_every_place_and_every_tensor(native: bool, monkeypatch: Any) -> None:
    if native and not _native.available():
        pytest.skip("no native library")
    monkeypatch.setattr(_native, "available", lambda: native)
    for dtype, count in ((torch.float32, 37), (torch.int16, 21), (torch.uint8, 13), (torch.int64, 9)):
        tensor = torch.arange(count).to(dtype)
        found = {digest(tensor), *map(digest, every_change(tensor))}
        assert len(found) == 1 + tensor.numel() * tensor.element_size() * 8
    a, b = torch.arange(20.0), torch.arange(20.0, 40.0)
    assert digest(a, b) != digest(b, a) and digest(a.view(4, 5)[:, :3]) != digest(a.view(4, 5)[:, 1:4])
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))


def test_what_is_derived_goes_with_its_source_and_is_never_kept_of_what_trains() -> None:
    cache = Derived[Tensor](capacity=3)
    source = torch.ones(4)
    first = cache.get((source,), lambda: source * 2)
    assert cache.get((source,), lambda: source * 2) is first and len(cache) == 1
    assert cache.get((source,), lambda: source * 3, "other") is not first and len(cache) == 2
    view = source[1:]
    del source
    assert len(cache) == 2  # the memory is there yet
    del view
    assert len(cache) == 0
    trained = torch.ones(4, requires_grad=True)
    cache.get((trained,), lambda: torch.ones(1))
    assert len(cache) == 0
    many = [torch.ones(2) for _ in range(5)]
    for each in many:
        cache.get((each,), lambda: torch.ones(1))
    assert len(cache) == 3


class Owner:
    """Has a run by a form of its tensor."""

    def __init__(self, cache: Derived[Tensor], source: Tensor) -> None:
        self.source, self.made = source, 0
        self.run = cache.run(self, (source,), Owner.build, lambda _, form: lambda x, bias: x * form)

    def build(self) -> Tensor:
        self.made += 1
        return 2 * self.source.detach()


@writes
@pytest.mark.parametrize("native", [True, False])
def test_a_run_by_a_form_sees_every_write_and_else_makes_it_once(
    native: bool, write: Write, monkeypatch: Any
) -> None:
    if not native:
        monkeypatch.setattr(_native, "available", lambda: False)
    cache = Derived[Tensor]()
    owner, one = Owner(cache, torch.arange(4.0)), torch.ones(4)
    for _ in range(3):
        torch.testing.assert_close(owner.run(one, None), 2 * torch.arange(4.0))
    assert owner.made == 1
    if write is by_new_data:
        return  # lies elsewhere: `Calls` does not find the run again
    write(owner.source, torch.full((4,), 5.0))
    for _ in range(3):
        torch.testing.assert_close(owner.run(one, None), torch.full((4,), 10.0))
    assert owner.made == 2
    owner.source.requires_grad_()
    for calls in (3, 4):
        owner.run(one, None)
        assert owner.made == calls
    assert len(cache) == 1
    gone = weakref.ref(owner)
    del owner
    assert gone() is None and len(cache) == 0  # without the collector: no cycle


def test_a_call_is_planned_anew_when_a_part_lies_elsewhere() -> None:
    """Another storage, as many bytes, the same type: what was planned for the old one reads freed memory."""
    calls, weight, x = Calls(), torch.randn(3, 4), torch.randn(2, 4)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        return x

    calls.keep(x, run, [weight])
    assert calls.find(x, None, 3) is run
    weight.data = torch.randn(3, 4)
    assert calls.find(x, None, 3) is None


def test_a_transposed_graph_is_made_once_while_nothing_changes() -> None:
    crow, col = graph()
    assert transposed(crow, col, 9) is transposed(crow, col, 9)
