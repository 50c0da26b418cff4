"""Packed modules give the outputs of the masked ones they replace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zoo.shared import ops
from zoo.shared.errors import MaskError
from zoo.shared.masks import Mask, MaskSet, masks_of
from zoo.shared.masks.patterns import NM
from zoo.shared.ops import SparseLinear, dispatch, packing
from zoo.shared.ops.dispatch import Plan
from zoo.shared.ops.modules import LinearByRows
from zoo.shared.ops.packing import pack


def masked(model: nn.Module, sparsity: float) -> tuple[nn.Module, MaskSet]:
    generator = torch.Generator().manual_seed(0)
    masks = MaskSet(
        {
            name: torch.rand(p.shape, generator=generator) >= sparsity
            for name, p in model.named_parameters()
            if p.dim() == 2
        }
    )
    masks.apply_(model)
    return model.eval(), masks


@pytest.mark.usefixtures("packs_all")
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (3,), (2, 3)])
def test_a_packed_layer_equals_the_masked_one(
    dtype: torch.dtype, tolerance: float, bias: bool, batch: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, masks = masked(nn.Sequential(nn.Linear(13, 7, bias=bias, dtype=dtype)), 0.7)
    x = torch.randn(*batch, 13, dtype=dtype)
    expected = model(x)
    packed = pack(model, masks)
    assert isinstance(packed[0], SparseLinear) and not any(p.requires_grad for p in packed.parameters())
    torch.testing.assert_close(packed(x), expected, atol=tolerance, rtol=tolerance)


def test_a_layer_without_any_weight() -> None:
    layer = nn.Linear(4, 3)
    masks = MaskSet({"weight": torch.zeros(3, 4, dtype=torch.bool)})
    masks.apply_(layer)
    assert torch.equal(pack(layer, masks)(torch.randn(2, 4)), layer.bias.expand(2, 3))


@pytest.mark.usefixtures("packs_all")
def test_sparse_layers_are_replaced_and_the_others_stay() -> None:
    torch.manual_seed(0)
    model, masks = masked(nn.Sequential(nn.Linear(1000, 800), nn.ReLU(), nn.Linear(800, 10)), 0.95)
    masks = MaskSet({**masks, "2.weight": torch.ones(10, 800, dtype=torch.bool)})
    x = torch.randn(4, 1000)
    expected = model(x)
    packed = pack(copy.deepcopy(model), masks)
    assert isinstance(packed[0], SparseLinear) and isinstance(packed[2], nn.Linear)
    assert list(masks_of(packed)) == ["2.weight"] and not packed[0].training
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)


def test_a_layer_that_would_not_gain_stays() -> None:
    model, masks = masked(nn.Sequential(nn.Linear(100, 80)), 0.3)
    assert isinstance(pack(model, masks)[0], nn.Linear)
    double, masks = masked(nn.Sequential(nn.Linear(100, 80)).double(), 0.95)
    assert isinstance(pack(double, masks)[0], nn.Linear)


@pytest.mark.usefixtures("packs_all")
def test_an_nm_mask_is_packed_in_the_layout_of_its_pattern() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    mask = Mask(NM(2, 4).keep(layer.weight.abs(), 0), NM(2, 4))
    masks = MaskSet({"0.weight": mask})
    model = nn.Sequential(layer)
    masks.apply_(model)
    x = torch.randn(5, 64)
    expected = model(x)
    packed = pack(copy.deepcopy(model), masks)
    assert packed[0].width == 4  # of each eight columns
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)
    fewer = mask.keep.clone()
    fewer[0] = False
    thinned = MaskSet({"0.weight": Mask(fewer, NM(2, 4))})
    thinned.apply_(model)
    again = pack(model, thinned)
    torch.testing.assert_close(again(x)[:, 0], layer.bias[0].expand(5))
    assert again[0].width == 1


def test_modules_that_need_no_mask_are_packed_if_they_say_so() -> None:
    class Doubled(nn.Linear):
        pass

    packing.register_packer(Doubled, masked=False)(lambda module, masks: nn.Identity())
    try:
        packed = pack(nn.Sequential(Doubled(3, 3), nn.Linear(3, 3)), MaskSet({}))
    finally:
        del packing._CONVERTERS[Doubled]
        packing._WITHOUT_MASKS.discard(Doubled)
    assert isinstance(packed[0], nn.Identity) and isinstance(packed[1], nn.Linear)


@pytest.mark.parametrize("backend,kind", [("dense", nn.Linear), ("reference", SparseLinear)])
def test_a_layer_that_would_always_run_dense_stays(backend: str, kind: type[nn.Module]) -> None:
    model, masks = masked(nn.Sequential(nn.Linear(40, 30)), 0.8)
    x = torch.randn(6, 40)
    expected = model(x)
    with ops.backend(backend):
        packed = pack(model, masks)
    assert type(packed[0]) is kind
    assert (list(masks_of(packed) or {}) == ["0.weight"]) == (kind is nn.Linear)
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)


def times(monkeypatch, few: float, some: float, many: float) -> None:
    """Let a packed layer take these times for 1, up to 256 and more rows of x, where a plain one takes 1 and
    looking a copy up nothing."""

    def choose(op, device, offered, layout, sizes, copied=0):
        taken = few if sizes[1] == 1 else some if sizes[1] <= 256 else many
        backend = "native" if taken <= dispatch.MARGIN else "dense"
        return Plan(op, backend, "", {"native": taken, "dense": 1.0})

    monkeypatch.setattr(packing, "choose", lambda *case: Plan(*_native(choose(*case))))
    monkeypatch.setattr(dispatch, "choose", choose)


def _native(plan: Plan) -> tuple[str, str, str, dict[str, float]]:
    return plan.op, "native", plan.reason, dict(plan.measured)


@pytest.mark.parametrize(
    ("side", "rows", "kind"),
    [
        (300, (0.9, 0.5, 0.9), SparseLinear),  # 4 bytes each of 90,000 weights
        (300, (1.1, 0.5, 0.5), LinearByRows),  # slower for one row
        (300, (1.1, 0.9, 0.5), LinearByRows),  # and for some
        (300, (1.1, 0.5, 1.2), LinearByRows),  # and for many
        (300, (1.0, 0.9, 0.96), nn.Linear),  # no clear gain
        (600, (1.1, 0.5, 0.5), SparseLinear),  # more than a cache holds: fewer bytes gain more
    ],
)
def test_a_layer_is_packed_where_it_gains_and_is_nowhere_slower(side, rows, kind, monkeypatch) -> None:
    times(monkeypatch, *rows)
    model, masks = masked(nn.Sequential(nn.Linear(side, side)), 0.8)
    assert type(pack(model, masks)[0]) is kind


def by_rows(monkeypatch, some: float = 0.5) -> tuple[LinearByRows, nn.Linear]:
    """A layer that skips its zeros from 2 rows of x on (from 512 if some are slower), and the plain one."""
    times(monkeypatch, 1.1, some, 0.5)
    plain, _ = masked(nn.Linear(60, 40), 0.8)
    return LinearByRows(copy.deepcopy(plain).requires_grad_(False)), plain


@pytest.mark.parametrize(
    "rows,skips", [((), False), ((1,), False), ((0,), False), ((2,), True), ((3, 5), True)]
)
def test_a_layer_by_rows_skips_zeros_for_many_rows_and_is_plain_for_few(rows, skips, monkeypatch) -> None:
    layer, plain = by_rows(monkeypatch)
    x = torch.randn(*rows, 60)
    x[..., 0] = torch.inf  # the plain product makes a NaN of it wherever a zero meets it
    y = layer(x)
    assert bool(y.isnan().any()) == (not skips and x.numel() > 0)
    x[..., 0] = 1.0
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
    assert [layer.faster(n) for n in (0, 1, 2, 511, 512)] == [False, False, True, True, True]
    late = by_rows(monkeypatch, 0.9)[0]
    assert [late.faster(n) for n in (0, 1, 2, 511, 512)] == [False, False, False, False, True]
    assert list(layer.state_dict()) == list(plain.state_dict())


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_layer_by_rows_sees_edits_and_leaves_gradients_and_autocast_to_the_plain_one(monkeypatch) -> None:
    layer, plain = by_rows(monkeypatch)
    x = torch.randn(4, 60)
    layer(x)
    for held in (layer.weight, plain.weight):
        held.data.numpy()[1, 2] += 7.0  # leaves no trace in a version counter
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.weight.sum(0).expand(4, -1))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with ops.backend("dense"):
        assert torch.equal(layer(x), plain(x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(4, 61))


def test_tied_layers_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80))
    model[1].weight = model[0].weight
    model, masks = masked(model, 0.95)
    packed = pack(model, masks)
    assert isinstance(packed[0], nn.Linear) and packed[1].weight is packed[0].weight


@pytest.mark.usefixtures("packs_all")
def test_a_model_that_is_one_layer() -> None:
    layer, masks = masked(nn.Linear(1000, 800), 0.95)
    assert isinstance(pack(layer, masks), SparseLinear)


def test_masks_of_another_model_are_refused() -> None:
    with pytest.raises(MaskError, match="shape"):
        pack(nn.Linear(3, 4), MaskSet({"weight": torch.ones(3, 3, dtype=torch.bool)}))


def test_other_types_can_be_registered(monkeypatch) -> None:
    class Mine(nn.Linear):
        pass

    monkeypatch.setattr(packing, "_CONVERTERS", dict(packing._CONVERTERS))
    packing.register_packer(Mine)(lambda module, masks: nn.Identity())
    model, masks = masked(nn.Sequential(Mine(5, 4), nn.Linear(4, 3)), 0.4)
    assert isinstance(pack(model, masks)[0], nn.Identity)


@pytest.mark.usefixtures("packs_all")
def test_composites_are_packed_after_their_parts_and_take_their_masks() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    class PackedPair(nn.Module):
        def __init__(self, pair: Pair) -> None:
            super().__init__()
            self.kinds = (type(pair.first), type(pair.second))

    def convert(module: nn.Module) -> nn.Module | None:
        return PackedPair(module) if isinstance(module, Pair) else None

    model = nn.Sequential(Pair(), nn.Linear(8, 8))
    masks = MaskSet(
        {
            "0.first.weight": torch.rand(8, 8) < 0.2,
            "0.second.weight": torch.ones(8, 8, dtype=torch.bool),
            "1.weight": torch.ones(8, 8, dtype=torch.bool),
        }
    )
    masks.apply_(model)
    packing.register_composite_packer(convert)
    try:
        packed = pack(model.eval(), masks)
    finally:
        packing._COMPOSITES.remove(convert)
    assert packed[0].kinds == (SparseLinear, nn.Linear) and not packed[0].training
    assert list(masks_of(packed)) == ["1.weight"]
