"""GQSA: groups, quantiser, tuning and packing."""

from __future__ import annotations

import copy

import pytest
import torch

from zoo.bundles.cardfile import dump_yaml
from zoo.bundles.catalog import find
from zoo.bundles.store import load
from zoo.cli.ship import export_command
from zoo.errors import BundleError, ConfigError
from zoo.llm.methods.ecoflap import language_loss
from zoo.llm.methods.gqsa import (
    Quantiser,
    Tuning,
    choose_groups,
    group_mask,
    group_saliency,
    pack_model,
    pad_ffn,
    quantise_blocks,
    stored_bits,
    tune_model,
)
from zoo.llm.models.quantised import GroupQuantLinear, PackedGroupLinear, group_arguments, with_empty_groups
from zoo.shared import ops
from zoo.shared.masks import MaskSet
from zoo.shared.ops import available, quant_sparse_linear, quantise_groups
from zoo.shared.ops.packing import pack
from zoo.shared.ops.quant_panel_linear import round_units
from zoo.shared.store.formats import load_packed, save_packed
from zoo.shared.store.io import sha256_file


def quantiser_of(rows=8, columns=64, seed=0, sparsity=0.5, bits=4):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    keep = group_mask(weight.unflatten(1, (-1, 16)).square().mean(-1), sparsity)
    return weight, keep, Quantiser.of(weight, keep.repeat_interleave(16, 1), 16, bits)


def test_saliency_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 32, generator=generator), torch.randn(80, 32, generator=generator)
    hessian = 2 / 80 * x.T @ x
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)).double()
    expected = (weight.double().square() / damped.inverse().diagonal().square()).reshape(3, 2, 16).mean(-1)
    torch.testing.assert_close(group_saliency(weight, hessian, 16).double(), expected, rtol=1e-5, atol=1e-7)


def test_rows_keep_equally_many_groups_or_the_layer_the_same_total():
    saliency = torch.rand(6, 10)
    by_row, by_layer = group_mask(saliency, 0.35), group_mask(saliency, 0.35, "layer")
    assert (by_row.sum(1) == 7).all() and int(by_layer.sum()) == 42
    assert float(saliency[by_layer].min()) >= float(saliency[~by_layer].max())
    with pytest.raises(ConfigError, match="drops none"):
        group_mask(saliency, 0.05)


def test_untuned_packing_is_that_of_the_op_bit_for_bit():
    weight, keep, quantiser = quantiser_of()
    ours, theirs = quantiser.pack(), quantise_groups(weight, keep)
    for name in ("codes", "scales", "zeros", "columns", "pointer"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(quantiser.dequantised(), ours.to_dense())


def test_packing_is_exact_after_arbitrary_tuning():
    _, _, quantiser = quantiser_of()
    generator = torch.Generator().manual_seed(3)
    for part, size in zip(quantiser.parameters(), (0.2, 0.02, 1.5), strict=True):
        part += size * torch.randn(part.shape, generator=generator)
    assert torch.equal(quantiser.dequantised(), quantiser.pack().to_dense())
    x = torch.randn(5, 64, generator=generator)
    torch.testing.assert_close(
        quant_sparse_linear(x, quantiser.pack()), x @ quantiser.dequantised().T, rtol=1e-4, atol=1e-5
    )


def test_edge_cases_of_the_quantiser():
    cases = {
        "zeros": torch.zeros(16),
        "constant": torch.full((16,), 0.7),
        "negative constant": torch.full((16,), -0.7),
        "positive, far from zero": torch.linspace(5.0, 5.1, 16),
        "negative, far from zero": torch.linspace(-5.1, -5.0, 16),
        "one outlier": torch.cat([torch.full((15,), 1e-3), torch.tensor([3.0])]),
    }
    for name, row in cases.items():
        weight = row[None]
        quantiser = Quantiser.of(weight, torch.ones_like(weight, dtype=torch.bool), 16, 4)
        error = (quantiser.dequantised() - weight).abs().max()
        # Half a step, and what rounding the scale to fp16 moves the ends.
        assert float(error) <= float(quantiser.scale.max()) * 0.55, name
        assert float(quantiser.zero.min()) >= 0 and float(quantiser.zero.max()) <= 15, name
        assert torch.equal(quantiser.pack().to_dense(), quantiser.dequantised()), name
    nothing = Quantiser.of(torch.zeros(1, 16), torch.ones(1, 16).bool(), 16, 4)
    assert torch.equal(nothing.dequantised(), torch.zeros(1, 16))


def test_gradients_pass_straight_through_to_kept_weights_only():
    _, _, quantiser = quantiser_of()
    for part in quantiser.parameters():
        part.requires_grad_()
    quantiser.dequantised().square().sum().backward()
    assert bool((quantiser.weight.grad[quantiser.keep] != 0).any())
    assert bool((quantiser.weight.grad[~quantiser.keep] == 0).all())
    assert all(bool(torch.isfinite(part.grad).all()) for part in quantiser.parameters())


@pytest.fixture(scope="module")
def stages(make_llama_once):
    """Dense, one-shot, tuned by blocks and tuned as a whole."""
    llama, batches = make_llama_once
    dense = copy.deepcopy(llama)
    choose = choose_groups(16, 0.5)
    once = copy.deepcopy(llama)
    quantise_blocks(once, batches, choose)
    tuned = copy.deepcopy(llama)
    tuning = Tuning(block_epochs=4, model_epochs=2)
    quantisers = quantise_blocks(tuned, batches, choose, tuning=tuning)
    blockwise = copy.deepcopy(tuned)
    codes = tune_model(tuned, quantisers, batches, tuning)
    return dense, once, blockwise, tuned, quantisers, codes


@pytest.fixture
def compressed(stages):
    """The stages; a test may change the last model."""
    dense, once, blockwise, tuned, quantisers, codes = stages
    return dense, once, blockwise, copy.deepcopy(tuned), quantisers, codes


def test_each_stage_improves_what_it_minimises(compressed, batches):
    dense, once, blockwise, tuned, _, _ = compressed
    with torch.no_grad():
        target = [dense.model(batch).last_hidden_state for batch in batches]
        error = [
            sum(
                float((m.model(b).last_hidden_state - t).square().mean())
                for b, t in zip(batches, target, strict=True)
            )
            for m in (once, blockwise)
        ]
        loss = [sum(float(language_loss(m, b)) for b in batches) for m in (blockwise, tuned)]
    assert error[1] < 0.8 * error[0]
    assert loss[1] < loss[0]


def test_packed_models_agree_and_round_trip(compressed, batches):
    *_, tuned, quantisers, codes = compressed
    packed = copy.deepcopy(tuned)
    pack_model(packed, quantisers, codes)
    layers = [module for module in packed.modules() if isinstance(module, GroupQuantLinear)]
    assert len(layers) == 14
    for name, module in packed.named_modules():
        if isinstance(module, GroupQuantLinear):
            assert torch.equal(module.weight, tuned.get_submodule(name).weight)
    executed = pack(copy.deepcopy(packed), MaskSet({}))
    assert sum(isinstance(module, PackedGroupLinear) for module in executed.modules()) == 14
    with torch.no_grad():
        expected = tuned(batches[0]).logits
        torch.testing.assert_close(packed(batches[0]).logits, expected)
        # The packed product rounds its x to eight bits.
        for module in packed.modules():
            if isinstance(module, GroupQuantLinear):
                module.register_forward_pre_hook(lambda module, args: round_units(args[0], 16))
        with ops.backend("native" if available() else "reference"):
            found = executed(batches[0]).logits
        torch.testing.assert_close(found, packed(batches[0]).logits, rtol=1e-3, atol=1e-3)
        assert float((found - expected).norm()) < 0.02 * float(expected.norm())
    bits, weights = (sum(column) for column in list(zip(*stored_bits(packed), strict=True))[1:])
    rows = sum(module.out_features for module in layers)
    # 16 codes, scale, zero point and column of half the groups; a pointer per row
    assert bits == weights // 2 * (4 * 16 + 16 + 8 + 16) // 16 + 32 * (rows + len(layers))


def test_empty_layers_load_what_was_stored(compressed, make_llama, batches):
    *_, tuned, quantisers, codes = compressed
    pack_model(tuned, quantisers, codes)
    again = make_llama(seed=5)
    arguments = group_arguments(tuned)
    assert arguments == {"group": 16, "kept": {"32": 1, "64": 2}}
    with_empty_groups(again, **arguments)
    again.load_state_dict(tuned.state_dict())
    with torch.no_grad():
        assert torch.equal(again(batches[0]).logits, tuned(batches[0]).logits)


def test_only_scales_and_biases_train(compressed, batches):
    *_, tuned, quantisers, codes = compressed
    pack_model(tuned, quantisers, codes)
    layer = tuned.model.layers[0].mlp.up_proj
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.5)
    language_loss(tuned.float(), batches[0]).backward()
    optimizer.step()
    assert not torch.equal(before["scales"].float(), layer.scales)
    assert all(
        torch.equal(before[name], getattr(layer, name)) for name in ("codes", "zeros", "columns", "pointer")
    )
    dropped = layer.weight.unflatten(1, (-1, 16)).abs().amax(-1) == 0
    assert int(dropped.sum()) >= dropped.numel() // 2


def test_padding_an_ffn_changes_nothing_but_its_width(make_llama, batches):
    model = make_llama(ffn=44)
    wider = pad_ffn(model)
    assert wider.model.layers[0].mlp.up_proj.out_features == 48 and wider.config.intermediate_size == 48
    with torch.no_grad():
        torch.testing.assert_close(wider(batches[0]).logits, model(batches[0]).logits)


def test_inputs_that_do_not_divide_are_refused(make_llama, batches):
    with pytest.raises(ConfigError, match="groups of 16 do not fit 44 inputs"):
        quantise_blocks(make_llama(ffn=44), batches, choose_groups(16, 0.5))


def test_partly_kept_groups_cannot_be_packed():
    weight = torch.randn(4, 32)
    keep = torch.rand(4, 32) < 0.5
    with pytest.raises(ConfigError, match="kept or dropped whole"):
        Quantiser.of(weight, keep, 16, 4).pack()
    with pytest.raises(ConfigError, match="four-bit"):
        quantiser_of(bits=2)[2].pack()


@pytest.mark.parametrize("how", ["masked", "packed", "dense"])
def test_a_bundle_whose_groups_lie_at_columns_of_minus_one_is_refused_in_every_form(how, tmp_path):
    """Hashes agree; a gather at -1 would read the last column, a kernel foreign memory."""
    source = find("llm/gqsa-w4s50-shakespeare")
    contents = load_packed(source.weights)
    tensors = dict(contents.tensors)
    name = next(name for name in tensors if name.endswith(".columns"))
    tensors[name] = torch.full_like(tensors[name], -1)
    path = tmp_path / source.card.weights.file
    save_packed(path, tensors, contents.masks, contents.extras, contents.metadata)
    card = source.card.to_dict()
    card["weights"] |= {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    card["cost"]["bytes"]["on_disk"] = path.stat().st_size
    (tmp_path / "card.yaml").write_text(dump_yaml(card))
    with pytest.raises(BundleError, match="^llm/gqsa-w4s50-shakespeare in .*a group number lies outside"):
        if how == "dense":
            export_command([str(tmp_path), "--to", str(tmp_path / "dense.safetensors")])
        else:
            load(tmp_path, how)
    assert not (tmp_path / "dense.safetensors").exists()
