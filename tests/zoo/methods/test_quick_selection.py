"""QuickSelection: products, drops, regrowth, strengths by hand; storage without a dense weight; refusals."""

from __future__ import annotations

import gc

import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.methods.quick_selection import QuickSelection, SparseLinear, standardised, step, strongest
from zoo.vision.features import FeatureAutoencoder, placed


def layer(values: list[float], flat: list[int], inputs: int = 3, outputs: int = 2) -> SparseLinear:
    """A layer with these weights at these places."""
    made = SparseLinear(inputs, outputs, 1.0, torch.Generator().manual_seed(0))
    made._place(torch.tensor(flat))
    made.values = torch.nn.Parameter(torch.tensor(values))
    return made


def test_a_product_is_that_of_the_dense_weight_and_so_are_its_gradients():
    one = layer([2.0, -1.0, 0.5], [0, 2, 4])
    x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    assert one(x).tolist() == [[-1.0], [1.0]]
    one(x).sum().backward()
    assert x.grad.tolist() == [[2.0], [0.5], [-1.0]] and one.values.grad.tolist() == [1.0, 3.0, 2.0]


def test_strength_is_the_sum_over_an_inputs_connections():
    one = layer([2.0, -1.0, 0.5, -3.0], [0, 2, 4, 5])
    assert one.strength().tolist() == [2.0, 0.5, 4.0]
    assert one.strength(torch.tensor([True, False, True, True])).tolist() == [2.0, 0.5, 3.0]
    assert strongest(one.strength(), 2).tolist() == [0, 2]
    with pytest.raises(ConfigError, match="4 of 3 features"):
        strongest(one.strength(), 4)


def test_each_sign_loses_its_share_nearest_zero():
    """One of three positive ones, 0.1, and one of three negative ones, -3: not 2, which is nearer zero."""
    one = layer([0.1, 5.0, -3.0, -4.0, 2.0, -9.0], [0, 1, 2, 3, 4, 5])
    assert one.survivors(1 / 3).tolist() == [False, True, False, True, True, True]


def test_regrowth_keeps_survivors_with_their_momentum_and_the_count():
    one = layer([1.0, 2.0, 3.0], [0, 4, 5], 50, 40)
    momentum, alive = torch.tensor([7.0, 8.0, 9.0]), torch.tensor([True, False, True])
    one.regrow(alive, momentum, torch.Generator().manual_seed(0))
    flat = one.flat.tolist()
    assert len(set(flat)) == 3 and flat == sorted(flat) and {0, 5} < set(flat)
    for place, value, moment in zip(flat, one.values.tolist(), momentum.tolist(), strict=True):
        expected = {0: (1.0, 7.0), 5: (3.0, 9.0)}.get(place)
        assert (value, moment) == expected if expected else (abs(value) < 1 and moment == 0)
    full = layer([1.0, 2.0, 3.0, 4.0, 5.0], [0, 1, 2, 3, 4])
    full.regrow(torch.tensor([True, False, False, True, True]), None, torch.Generator().manual_seed(1))
    assert len(set(full.flat.tolist())) == 5


def test_no_tensor_of_the_size_of_a_dense_weight_is_alive():
    generator = torch.Generator().manual_seed(0)
    sizes = (5003, 1000), (1000, 5003)
    layers = tuple(SparseLinear(a, b, 2.0, generator) for a, b in sizes)
    optimizer = torch.optim.SGD([p for one in layers for p in one.parameters()], lr=0.01, momentum=0.9)
    x = torch.randn(5003, 3, generator=generator)
    first = step(layers, x, x, optimizer, generator)
    for one in layers:
        state = optimizer.state[one.values]["momentum_buffer"]
        one.regrow(one.survivors(0.2), state, generator)
    assert step(layers, x, x, optimizer, generator) < first
    assert not any(t.numel() >= 5003 * 1000 for t in gc.get_objects() if isinstance(t, torch.Tensor))


def test_evolution_moves_connections_to_the_columns_that_belong_together():
    generator = torch.Generator().manual_seed(0)
    related = torch.randn(200, 1, generator=generator) + 0.1 * torch.randn(200, 10, generator=generator)
    x = torch.cat([related, torch.randn(200, 90, generator=generator)], 1)

    def found(moved: float) -> tuple[float, torch.Tensor]:
        made = QuickSelection(40, 2.0, moved, epochs=20, batch=20, lr=0.02).fit(x)
        counts = torch.bincount(made.layers[0].col.long(), minlength=100).float()
        return float(counts[:10].mean() / counts[10:].mean()), made.strength

    (evolved, strength), (stayed, _) = found(0.2), found(0.0)
    assert evolved > 1.5 and stayed < 1.1
    assert torch.equal(found(0.2)[1], strength)


def test_tables_and_densities_that_do_not_do_are_refused():
    x = torch.randn(20, 8)
    with pytest.raises(DataError, match="column 3 is constant"):
        standardised(x.index_fill(1, torch.tensor([3]), 1.0))
    with pytest.raises(DataError, match="finite table"):
        standardised(x.index_fill(1, torch.tensor([3]), torch.nan))
    with pytest.raises(ConfigError, match="do not fit a layer"):
        QuickSelection(hidden=4).fit(x)


def test_a_sparse_autoencoder_as_a_model_computes_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = SparseLinear(6, 4, 1.0, generator), SparseLinear(4, 6, 1.5, generator)
    model, x = FeatureAutoencoder(6, 4), torch.randn(3, 6, generator=generator)
    keep = [placed(layer, into) for layer, into in zip(layers, (model.encoder, model.decoder), strict=True)]
    torch.testing.assert_close(model(x), layers[1](layers[0](x.T).sigmoid()).T)
    assert [int(one.sum()) for one in keep] == [len(layer.values) for layer in layers]
    assert bool((model.encoder.weight[~keep[0]] == 0).all())
    model.columns.copy_(torch.tensor([1, 4, 9, 16, 25, 36]))
    model.strength.copy_(torch.tensor([0.1, 3.0, 0.2, 2.0, 0.0, 1.0]))
    assert model.chosen(3).tolist() == [4, 16, 36]
    with pytest.raises(ConfigError, match="at least 1"):
        FeatureAutoencoder(0, 4)
