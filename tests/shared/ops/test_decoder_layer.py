"""One token through a layer of four-bit groups: the kernels against the definition, threads, damage,
refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import QuantPanels, _native, quantise_groups
from zoo.shared.ops.decoder_layer import LayerWeights, layer_inputs, layer_outputs
from zoo.shared.ops.quant_panel_linear import round_units

needs_native = pytest.mark.skipif(not _native.available(), reason=f"no native library: {_native.missing()}")


def groups(rows: int, cols: int, group: int = 16):
    keep = torch.rand(rows, cols // group) < 0.5
    return QuantPanels.of(quantise_groups(torch.randn(rows, cols) / math.sqrt(cols), keep, group))


def layer(width: int = 64, wide: int = 96, heads: int = 4, kv_heads: int = 2, head: int = 12) -> LayerWeights:
    inner, kept = heads * head, kv_heads * head
    sizes = [(inner, width), (kept, width), (kept, width), (width, inner), (wide, width), (wide, width)]
    norms = torch.rand(width) + 0.5, torch.rand(width) + 0.5
    return LayerWeights(
        *(groups(*size) for size in (*sizes, (width, wide))), *norms, epsilon=1e-5, head=head, scale=0.3
    )


def dense(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, cols) / math.sqrt(cols)).to(dtype)


def packed(
    rows: int, cols: int, dtype: torch.dtype = torch.float32, layout: str = "bitmask"
) -> ops.SparseWeight:
    keep = torch.rand(-(-rows // 4), cols).repeat_interleave(4, 0)[:rows] < 0.4
    return ops.pack(dense(rows, cols, dtype), keep, layout)


def mixed(width: int, wide: int, heads: int = 4, kv_heads: int = 2, head: int = 12) -> LayerWeights:
    """Dense weights and packed ones by turns."""
    inner, kept = heads * head, kv_heads * head
    sizes = [(inner, width), (kept, width), (kept, width), (width, inner), (wide, width), (wide, width)]
    weights = [(dense, packed)[i % 2](*size) for i, size in enumerate((*sizes, (width, wide)))]
    norms = torch.rand(2, width) + 0.5
    return LayerWeights(*weights, *norms, epsilon=1e-5, head=head, scale=0.3)


def thresholded(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    """Thresholds that drop about half, one for all inputs or one for each."""
    width, wide = weights.q.shape[1], weights.gate.shape[0]
    each = {"q": torch.tensor(0.6), "v": torch.rand(width) * 1.4, "down": torch.rand(wide) / 4}
    each = {name: value.to(dtype) for name, value in each.items()}
    return replace(weights, thresholds=each, gate_threshold=torch.rand(wide).to(dtype) / 2)


def token(weights: LayerWeights, count: int = 5) -> tuple[Tensor, ...]:
    kv_heads = weights.k.shape[0] // weights.head
    angle = torch.rand(weights.head // 2).repeat(2) * 3
    cache = torch.randn(2, kv_heads, count, weights.head)
    return torch.randn(weights.q.shape[1]), angle.cos(), angle.sin(), *cache


def run(
    weights: LayerWeights, x: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    q, k, v = layer_inputs(x, weights, cosine, sine)
    size = (-1, 1, weights.head)
    keys, values = torch.cat([keys, k.view(size)], 1), torch.cat([values, v.view(size)], 1)
    return torch.cat([q, k, v, layer_outputs(x, q, keys, values, weights)])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_the_kernels_are_the_definition(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(count)
    for weights in (
        layer(),
        layer(width=160, wide=320, heads=6, kv_heads=3, head=16),
        layer(heads=4, kv_heads=4),
        replace(layer(), k=groups(24, 64, 32), up=groups(96, 64, 32)),
        replace(layer(), q=dense(48, 64), v=dense(24, 64, torch.float16), down=dense(64, 96, torch.bfloat16)),
        replace(
            layer(), k=packed(24, 64), o=packed(64, 48, torch.float16), gate=packed(96, 64, layout="csr")
        ),
        replace(layer(), q=packed(48, 64), k=dense(24, 64), up=packed(96, 64, layout="rows4")),
        mixed(70, 37),
        thresholded(layer(), dtype),
        thresholded(mixed(70, 37), dtype),
    ):
        weights = replace(weights, input_norm=weights.input_norm.to(dtype))
        inputs = [each.to(dtype) for each in token(weights, count)]
        close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        with ops.backend("reference"):
            expected = run(weights, *inputs)
        with ops.backend("native"):
            found = run(weights, *inputs)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, **close)


@needs_native
def test_keys_and_values_may_have_another_precision_than_the_token() -> None:
    torch.manual_seed(0)
    weights = layer()
    x, cosine, sine, keys, values = token(weights)
    q = layer_inputs(x, weights, cosine, sine)[0]
    cache = keys.half(), values.half()
    with ops.backend("reference"):
        expected = layer_outputs(x, q, *cache, weights)
    with ops.backend("native"):
        torch.testing.assert_close(layer_outputs(x, q, *cache, weights), expected, rtol=1e-3, atol=1e-3)


def test_by_hand() -> None:
    """One head of two channels: the norm of (3, 4, 0 ...) is 5 / 4, a quarter turn swaps and negates. Of 127
    steps up to 3.2, 2.4 takes 95."""
    torch.manual_seed(0)
    whole = torch.ones(16, 1, dtype=torch.bool)
    eye = QuantPanels.of(quantise_groups(torch.eye(16) * 15, whole))  # 15 and 0 are codes
    weights = LayerWeights(eye, eye, eye, eye, eye, eye, eye, torch.ones(16), torch.ones(16), 0.0, 2, 1.0)
    x = torch.zeros(16)
    x[:2] = torch.tensor([3.0, 4.0])
    for backend in ("reference", "native") if _native.available() else ("reference",):
        with ops.backend(backend):
            q, k, v = layer_inputs(x, weights, torch.zeros(2), torch.ones(2))
            torch.testing.assert_close(v[:4], torch.tensor([48 * 95 / 127, 48, 0, 0]), rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(
                q[:4], torch.tensor([-48.0, 48 * 95 / 127, 0, 0]), rtol=1e-4, atol=1e-3
            )
            assert torch.equal(q, k)
            # One key: attention is its value. h = x + 15 v; n = h / rms; y = h + 15 silu(15 n) 15 n; both
            # times that something is multiplied by a weight it is rounded.
            y = layer_outputs(x, q, k.view(8, 1, 2), v.view(8, 1, 2), weights)
        h = x + 15 * v
        n = 15 * round_units(h / h.square().mean().sqrt(), 16)
        gated = round_units(torch.nn.functional.silu(n) * n, 16)
        torch.testing.assert_close(y, h + 15 * gated, rtol=1e-3, atol=1e-2)


def test_thresholds_by_hand() -> None:
    """x and the gates are zero where they are not above; a NaN stays, a closed gate makes zero of all."""
    one = torch.eye(2)
    weights = LayerWeights(*[one] * 7, torch.ones(2), torch.ones(2), epsilon=0.0, head=2, scale=1.0)
    weights = replace(weights, thresholds={"q": torch.tensor([1.0, 0.5]), "down": torch.tensor(0.3)})
    x = torch.tensor([1.0, 1.0])  # is its own norm
    for backend in ("reference", "native") if _native.available() else ("reference",):
        with ops.backend(backend):
            q, k, _ = layer_inputs(x, weights, torch.ones(2), torch.zeros(2))
            assert q.tolist() == [0.0, 1.0] and k.tolist() == [1.0, 1.0]
            none = torch.zeros(1, 1, 2)
            silu = 1 / (1 + math.exp(-1))
            y = layer_outputs(x, q, none, none, weights)
            torch.testing.assert_close(y, torch.full((2,), 1 + silu))
            closed = replace(weights, gate_threshold=torch.tensor([silu + 1e-3, silu - 1e-3]))
            y = layer_outputs(
                x, q, none, none, replace(closed, up=torch.tensor([[math.inf, 0.0], [0.0, 1.0]]))
            )
            torch.testing.assert_close(y, torch.tensor([1.0, 1 + silu]))
            smaller = replace(weights, thresholds={"down": torch.tensor(silu + 1e-3)})
            assert layer_outputs(x, q, none, none, smaller).tolist() == [1.0, 1.0]
            assert layer_inputs(x * math.nan, weights, torch.ones(2), torch.zeros(2))[0].isnan().all()


@needs_native
@pytest.mark.parametrize("kind", [layer, mixed])
def test_threads_do_not_change_a_bit(kind: Callable[..., LayerWeights]) -> None:
    torch.manual_seed(0)
    weights = kind(width=512, wide=1024, heads=8, kv_heads=4, head=64)
    inputs = token(weights, 300)
    one = run(weights, *inputs)
    torch.set_num_threads(2)
    two = run(weights, *inputs)
    torch.set_num_threads(1)
    assert torch.equal(one, two)


@needs_native
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_lost(value: float) -> None:
    torch.manual_seed(0)
    weights = layer()
    x, cosine, sine, keys, values = token(weights)
    x[3] = value
    assert not run(weights, x, cosine, sine, keys, values)[-64:].isfinite().all()
    x[3], keys[0, 2, 1] = 1.0, value
    assert not run(weights, x, cosine, sine, keys, values)[-64:].isfinite().all()


@needs_native
@pytest.mark.parametrize("name", ["q", "v", "o", "down"])
def test_a_damaged_index_is_refused(name: str) -> None:
    torch.manual_seed(0)
    weights = layer()
    inputs = token(weights)
    run(weights, *inputs)
    damaged = getattr(weights, name)
    damaged.masks[-1, -1, -1] = 1  # a row that is not there
    with pytest.raises(OpError, match="index"):
        run(weights, *inputs)
    damaged.masks[-1, -1, -1] = 0
    damaged.pointer[-1] += 1
    with pytest.raises(OpError, match="index"):
        run(weights, *inputs)


def test_a_weight_that_moves_is_found_again() -> None:
    torch.manual_seed(0)
    weights, inputs = layer(), token(layer())
    first = run(weights, *inputs)
    moved = weights.gate.scales.clone()
    weights.gate.scales.set_(moved.mul_(2))
    assert not torch.equal(run(weights, *inputs), first)


def test_a_dense_weight_that_changes_its_precision_is_found_again() -> None:
    torch.manual_seed(0)
    weights = mixed(64, 64)
    inputs = token(weights)
    first, gate = run(weights, *inputs), weights.gate
    held = gate.clone()
    place = gate.data_ptr()
    gate.data = gate.view(torch.float16).flatten()[: gate.numel()].view(gate.shape).copy_(held)
    assert gate.data_ptr() == place and gate.dtype == torch.float16
    torch.testing.assert_close(run(weights, *inputs), first, rtol=1e-2, atol=1e-2)


@needs_native
@pytest.mark.parametrize("name", ["k", "o"])
def test_a_damaged_packed_index_is_refused(name: str) -> None:
    torch.manual_seed(0)
    weights = mixed(64, 96)
    inputs = token(weights)
    run(weights, *inputs)
    getattr(weights, name).pointer[-1] += 1
    with pytest.raises(OpError, match="pointer"):
        run(weights, *inputs)


def test_refusals() -> None:
    weights = layer()
    x, cosine, sine, keys, values = token(weights)
    with pytest.raises(OpError, match=r"x must be \[64\]"):
        layer_inputs(x[:60], weights, cosine, sine)
    with pytest.raises(OpError, match=r"cosine and sine must be \[12\]"):
        layer_inputs(x, weights, cosine[:6], sine[:6])
    with pytest.raises(OpError, match=r"keys and values must be \[2, count, 12\]"):
        layer_outputs(x, torch.randn(48), keys[:1], values[:1], weights)
    with pytest.raises(OpError, match="up must be"):
        replace(weights, up=groups(32, 64))
    with pytest.raises(OpError, match="heads of 7"):
        replace(weights, head=7)
    with pytest.raises(OpError, match="input_norm must be float32"):
        replace(weights, input_norm=torch.ones(64, dtype=torch.float64))
    with pytest.raises(OpError, match="x must be float32"):
        layer_inputs(x.double(), weights, cosine, sine)
    with pytest.raises(OpError, match="keys and values must be both"):
        layer_outputs(x, torch.randn(48), keys.half(), values, weights)
    with pytest.raises(OpError, match="thresholds are of q"):
        replace(weights, thresholds={"w": torch.tensor(1.0)})
    for wrong in (torch.ones(5), torch.tensor(1.0, dtype=torch.float64)):
        with pytest.raises(OpError, match="threshold of q must be one number or 64"):
            replace(weights, thresholds={"q": wrong})
        with pytest.raises(OpError, match="threshold of the gate must be one number or 96"):
            replace(weights, gate_threshold=wrong)
    if _native.available():
        for wrong in (dense(48, 64, torch.float64), dense(64, 48).t()):
            with pytest.raises(OpError, match="dense weight must be contiguous fp32"):
                layer_inputs(x, replace(weights, q=wrong), cosine, sine)
