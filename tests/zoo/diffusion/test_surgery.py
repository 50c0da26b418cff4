"""Heads, neurons and layers of every family: found by type, cut exactly, saved and loaded as cut."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from diffusers import UNet2DConditionModel  # noqa: E402

from zoo.diffusion.families import FAMILIES, family, output  # noqa: E402
from zoo.diffusion.gates import gated  # noqa: E402
from zoo.diffusion.plan import Plan, apply_plan, drop_layer, set_module  # noqa: E402
from zoo.diffusion.pruned import load_network, plan_of, prune  # noqa: E402
from zoo.diffusion.units import layers, unit_groups  # noqa: E402
from zoo.errors import ConfigError  # noqa: E402


def some_units(net, empty: bool) -> dict[str, tuple[int, ...]]:
    """Every group loses a fixed random half; with `empty` every third group loses everything."""
    generator = torch.Generator().manual_seed(3)
    kept = {}
    for number, group in enumerate(unit_groups(net)):
        order = torch.randperm(group.count, generator=generator)[: group.count // 2]
        kept[group.name] = () if empty and number % 3 == 0 else tuple(sorted(order.tolist()))
    return kept


@pytest.mark.parametrize("empty", [False, True], ids=["halves", "emptied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gated_network_is_the_cut_one(name: str, empty: bool, tmp_path) -> None:
    net, inputs = family(name)
    before, whole = output(net, inputs), sum(p.numel() for p in net.parameters())
    kept = some_units(net, empty)
    groups = {group.name: group for group in unit_groups(net)}
    masks = {
        n: torch.zeros(groups[n].count).index_fill(0, torch.tensor(k, dtype=torch.long), 1)
        for n, k in kept.items()
    }
    with gated(net, masks):
        expected = output(net, inputs)
    assert torch.equal(output(net, inputs), before)  # the gates are gone
    assert not torch.allclose(expected, before, atol=1e-3)
    freed = sum((groups[n].count - len(k)) * groups[n].parameters(net) for n, k in kept.items())
    prune(net, Plan(kept))
    assert (output(net, inputs) - expected).abs().max() < 1e-5
    left = sum(p.numel() for p in net.parameters())
    assert left <= whole - freed if empty else left == whole - freed
    net.save_pretrained(tmp_path)
    again = load_network(tmp_path)
    assert torch.equal(output(again.eval(), inputs), output(net, inputs))
    assert plan_of(again) == plan_of(net)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_dropped_and_put_back(name: str, tmp_path) -> None:
    net, inputs = family(name)
    before = output(net, inputs)
    removable = [layer for layer in layers(net) if layer.removable]
    assert removable
    for layer in removable:
        held = drop_layer(net, layer.name)
        assert output(net, inputs).shape == before.shape
        assert not torch.equal(output(net, inputs), before), layer.name
        set_module(net, layer.name, held)
    assert torch.equal(output(net, inputs), before)
    whole = sum(p.numel() for p in net.parameters())
    chosen = removable[::2]
    prune(net, Plan(dropped=tuple(layer.name for layer in chosen)))
    assert sum(p.numel() for p in net.parameters()) == whole - sum(layer.parameters for layer in chosen)
    net.save_pretrained(tmp_path)
    assert torch.equal(output(load_network(tmp_path).eval(), inputs), output(net, inputs))


def test_the_stock_class_does_not_load_a_cut_folder_silently(tmp_path) -> None:
    net, _ = family("sd15")
    prune(net, Plan(some_units(net, False)))
    net.save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        UNet2DConditionModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "PrunedUNet2DConditionModel"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan({"no.such:heads": (0,)}), "which this"),
        (Plan({"down_blocks.0.attentions.0.transformer_blocks.0.attn1:heads": (9,)}), "that are not 0 to"),
        (Plan({"down_blocks.0.attentions.0.transformer_blocks.0.attn1:heads": (0, 0)}), "that are not 0 to"),
        (Plan(dropped=("conv_in",)), "no layer of this network"),
        (Plan(dropped=("mid_block.resnets.0", "mid_block.resnets.0")), "twice"),
    ],
)
def test_plans_of_other_networks_are_refused(plan: Plan, message: str) -> None:
    net, inputs = family("sd15")
    before = output(net, inputs)
    with pytest.raises(ConfigError, match=message):
        apply_plan(net, plan)
    assert torch.equal(output(net, inputs), before)


def test_a_malformed_plan_and_a_second_cut_are_refused() -> None:
    for plan in ({"units": [1]}, {"heads": {}}, {"units": {"a": [0.5]}}, {"dropped": [1]}):
        with pytest.raises(ConfigError, match="plan"):
            Plan.from_dict(plan)
    net, _ = family("sd15")
    prune(net, Plan(some_units(net, False)))
    with pytest.raises(ConfigError, match="cut already"):
        prune(net, Plan())


def test_fused_projections_are_refused() -> None:
    net, _ = family("sd15")
    net.fuse_qkv_projections()
    with pytest.raises(ConfigError, match="unfuse_qkv_projections"):
        unit_groups(net)


def test_adapters_are_refused() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    from peft import LoraConfig

    net, _ = family("sd15")
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ConfigError, match="unload_lora_weights"):
        unit_groups(net)
