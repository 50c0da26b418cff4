"""Bundles that stand on another bundle's weights: what they store, how they load, and what is refused."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.bundles import base as bases
from zoo.bundles import catalog
from zoo.bundles import store as bundles
from zoo.bundles.card import read_card
from zoo.bundles.catalog import twin_of
from zoo.bundles.store import info, load, save
from zoo.cli import main
from zoo.errors import BundleError, CardError
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.masks.patterns import NM
from zoo.shared.store.formats import load_packed, save_packed
from zoo.shared.store.io import sha256_file

DENSE = "graph/tiny-dense"


@pytest.fixture
def dense_model(tiny_model: nn.Module) -> nn.Module:
    """The tiny model without its masks, and with other values where they drop."""
    model = copy.deepcopy(tiny_model)
    set_masks(model, None)
    with torch.no_grad():
        for value in model.parameters():
            value[value == 0] = -0.25
    return model


@pytest.fixture
def dense(
    dense_model: nn.Module, tiny_extras: dict[str, Tensor], tiny_fields: dict[str, Any], tmp_path: Path
) -> Path:
    """The base's bundle."""
    metric = tiny_fields["metrics"][0] | {"dense": None}
    fields = tiny_fields | {"name": DENSE, "dense_twin": None, "method": {"name": "dense", "seed": 0}}
    extras = {"thresholds": tiny_extras["thresholds"]}
    return save(dense_model, tmp_path / "dense", card=fields | {"metrics": [metric]}, extras=extras)


@pytest.fixture
def on_dense(tiny_model, tiny_extras, tiny_fields, dense: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a model on the base, by default the tiny one, which has the base's weights under a mask."""

    def write(model: nn.Module = tiny_model, folder: str = "sparse", **options: Any) -> Path:
        fields = copy.deepcopy(tiny_fields) | options.pop("fields", {})
        where = tmp_path / folder
        return save(model, where, card=fields, extras=tiny_extras, base=dense, **options)

    return write


def stored(folder: Path) -> Any:
    return load_packed(folder / "weights.safetensors")


def test_only_what_differs_is_stored(on_dense, tiny_model, dense: Path, tiny_extras) -> None:
    folder = on_dense()
    contents = stored(folder)
    masks = masks_of(tiny_model)
    assert set(contents.tensors) == {"first.weight", "second.weight", "second_again.weight"}
    assert all(tensor.dtype == torch.bool for tensor in contents.tensors.values())
    assert torch.equal(contents.tensors["first.weight"], masks["first.weight"].keep)
    assert set(contents.extras) == {"edges/keep"}, "the thresholds are the base's"
    taken = contents.metadata["base"]
    assert taken["extras"] == ["thresholds"] and "norm.running_mean" in taken["tensors"]
    assert taken["masked"]["second_again.weight"] is None, "the mask belongs to the other name"


def test_it_loads_bit_for_bit(on_dense, tiny_model, tiny_extras) -> None:
    model = load(on_dense())
    expected = tiny_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert masks_of(model).equal(masks_of(tiny_model)) and masks_of(model).lost_zeros(model) == []
    assert model.second_again.weight is model.second.weight
    assert set(info(model).extras) == set(tiny_extras)
    assert all(torch.equal(info(model).extras[name], value) for name, value in tiny_extras.items())
    packed = load(info(model).folder, execution="packed")
    assert torch.allclose(packed(torch.ones(3, 4)), model(torch.ones(3, 4)), atol=1e-5)


def test_the_card_is_honest(on_dense, save_tiny, dense: Path, tmp_path: Path) -> None:
    folder, whole = on_dense(), read_card(save_tiny(tmp_path / "whole") / "card.yaml")
    card, base = read_card(folder / "card.yaml"), read_card(dense / "card.yaml")
    assert card.schema_version == 2 and whole.schema_version == base.schema_version == 1
    assert "base" not in whole.to_dict() and "base:" not in whole.to_yaml(), "old readers read it"
    assert card.base.model_dump() == {
        "name": DENSE,
        "version": "1.0.0",
        "sha256": sha256_file(dense / "weights.safetensors"),
        "bytes": (dense / "weights.safetensors").stat().st_size,
    }
    own = (folder / "weights.safetensors").stat().st_size
    assert card.cost.bytes.on_disk == card.weights.bytes == own < whole.weights.bytes
    assert card.bytes_needed == own + base.weights.bytes and whole.bytes_needed == whole.weights.bytes
    rest = {"on_disk": 0}
    assert card.cost.bytes.model_dump() | rest == whole.cost.bytes.model_dump() | rest
    assert card.cost.parameters == whole.cost.parameters and card.sparsity == whole.sparsity


def test_a_pattern_and_a_changed_tensor(dense_model, tiny_fields, dense, tmp_path: Path) -> None:
    model = copy.deepcopy(dense_model)
    masks = MaskSet({"first.weight": NM(2, 4).keep(model.first.weight.abs(), 0)})
    masks = MaskSet({name: type(mask)(mask.keep, NM(2, 4)) for name, mask in masks.items()})
    masks.apply_(model)
    with torch.no_grad():
        model.second.bias[3] = torch.nextafter(model.second.bias[3], torch.tensor(9.0))
        model.norm.running_mean[0] = -0.0
        dense_model.norm.running_mean[0] = 0.0
    set_masks(model, masks)
    folder = save(model, tmp_path / "nm", card=tiny_fields, base=dense)
    contents = stored(folder)
    assert set(contents.tensors) == {"first.weight", "second.bias", "norm.running_mean"}
    loaded = load(folder)
    assert loaded.norm.running_mean[0].signbit(), "-0 is not taken for the base's 0"
    assert torch.equal(loaded.second.bias, model.second.bias)
    assert masks_of(loaded)["first.weight"].pattern == NM(2, 4)
    wider = ARCHITECTURES.get("test/tiny")(16, 0.5)
    wider.norm.num_batches_tracked.fill_(7)
    tiny_fields["architecture"]["args"]["width"] = 16
    with pytest.raises(BundleError, match=f"on {DENSE}: no tensor is the same .* Save the model without"):
        save(wider.half(), tmp_path / "wide", card=tiny_fields, base=dense)
    assert not (tmp_path / "wide").exists()


def test_what_is_tuned_stands_by_itself(on_dense, dense: Path, tmp_path: Path) -> None:
    model = load(on_dense())
    with torch.no_grad():
        model.first.bias.add_(1)
    tuned = save(model, tmp_path / "else" / "tuned", card=info(model).card)
    shutil.rmtree(dense)
    card = read_card(tuned / "card.yaml")
    assert card.base is None and card.schema_version == 1
    assert torch.equal(load(tuned).first.bias, model.first.bias)


def test_the_base_is_the_twin_wherever_it_lies(on_dense, dense: Path, tmp_path: Path, monkeypatch) -> None:
    folder = on_dense()
    (tmp_path / "far").mkdir()
    moved, inside = tmp_path / "far" / "sparse", tmp_path / "far" / "sparse" / "base"
    folder.rename(moved)
    with pytest.raises(BundleError, match=f"stands on the weights of {DENSE}@1.0.0, which are not on this"):
        load(moved)
    shutil.copytree(dense, inside)
    assert twin_of(catalog.open_bundle(moved)).folder == inside
    load(moved)
    shutil.rmtree(inside)
    monkeypatch.setenv("ZOO_PATH", str(tmp_path))
    load(moved)
    assert catalog.base_of(catalog.open_bundle(moved)).folder == dense
    assert catalog.base_of(catalog.open_bundle(dense)) is None
    listed = {bundle.card.name: bundle for bundle in catalog.select("graph/tiny-*", max_bytes=10**9)}
    needed = listed["graph/tiny-test"].card.bytes_needed
    assert "graph/tiny-test" not in catalog.list_models("graph/tiny-*", max_bytes=needed - 1)


# -- what is refused


def test_a_base_with_other_weights(on_dense, dense_model, tiny_fields, dense: Path, monkeypatch) -> None:
    folder, card = on_dense(), read_card(dense / "card.yaml")
    with torch.no_grad():
        dense_model.first.bias.add_(1)
    save(dense_model, dense, card=card, overwrite=True)
    monkeypatch.setenv("ZOO_PATH", str(dense.parent))
    with pytest.raises(BundleError, match=f"stands on {DENSE}@1.0.0 with the sha256 .*Put the right one"):
        load(folder)


def test_a_damaged_base(on_dense, dense: Path) -> None:
    folder = on_dense()
    weights = dense / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{weights}: sha256 .* damaged"):
        load(folder)


def test_a_base_of_another_version(on_dense, dense_model, dense: Path, monkeypatch) -> None:
    folder, fields = on_dense(), read_card(dense / "card.yaml").to_dict()
    save(dense_model, dense, card=fields | {"version": "1.1.0"}, overwrite=True)
    monkeypatch.setenv("ZOO_PATH", str(dense.parent))
    with pytest.raises(BundleError, match=f"{DENSE}@1.0.0, which are not on this machine"):
        load(folder)


def test_one_level_is_enough(on_dense, tiny_model, tiny_fields, dense: Path, tmp_path: Path) -> None:
    folder = on_dense()
    with pytest.raises(BundleError, match=f"stands on {DENSE} itself and .*Pass base='{DENSE}'"):
        save(tiny_model, tmp_path / "third", card=tiny_fields | {"name": "graph/third"}, base=folder)
    with pytest.raises(CardError, match="base names the bundle itself"):
        on_dense(folder="itself", fields={"name": DENSE})


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda record: record.update(sha256="0" * 64), "base is not the one that its weights were saved on"),
        (lambda record: record.clear(), "base is not the one"),
        (lambda record: record.update(tensors=None), "do not say what they take"),
        (lambda record: record["tensors"].append("first.weight"), "'first.weight' to their base"),
        (lambda record: record["tensors"].append("nowhere"), "'nowhere' to their base, which cannot give it"),
        (lambda record: record["masked"].update({"first.bias": None}), "mask of 'first.bias' does not fit"),
        (lambda record: record["masked"].update({"first.weight": {"kind": "?"}}), "mask of .* is not one"),
        (
            lambda record: record["masked"].update({"first.weight": "2:4"}),
            "mask of 'first.weight' is not one",
        ),
        (lambda record: record["tensors"].remove("first.bias"), "lack 'first.bias'"),
        (lambda record: record.update(cut=["first.weight"]), "do not say what they take"),
        (lambda record: record["cut"].update({"first.weight": 0}), "what 'first.weight' keeps of the base's"),
        (lambda record: record["cut"].update({"first.weight": "0"}), "what 'first.weight' keeps"),
        (lambda record: record["cut"].update({"nowhere": 0}), "what 'nowhere' keeps"),
    ],
)
def test_weights_that_contradict_their_card(on_dense, change, message: str) -> None:
    folder = on_dense()
    contents = stored(folder)
    change(contents.metadata["base"])
    path = folder / "weights.safetensors"
    save_packed(path, contents.tensors, contents.masks, contents.extras, contents.metadata)
    fields = read_card(folder / "card.yaml").to_dict()
    size = path.stat().st_size
    fields["weights"] |= {"sha256": sha256_file(path), "bytes": size}
    fields["cost"]["bytes"]["on_disk"] = size
    (folder / "card.yaml").write_text(bundles.parse_card(fields).to_yaml())
    with pytest.raises(BundleError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"schema_version": 1}, "a card with a base has schema_version 2"),
        ({"base": None}, "a card with a base has schema_version 2"),
        ({"base": {"name": "x"}}, "base.name"),
    ],
)
def test_cards_with_a_base(on_dense, fields: dict[str, Any], message: str) -> None:
    card = read_card(on_dense() / "card.yaml").to_dict()
    with pytest.raises(CardError, match=message):
        bundles.parse_card(card | fields)


def test_empty_and_scalar_tensors() -> None:
    state = {"none": torch.empty(0, 3), "one": torch.tensor(2.0), "nan": torch.tensor([float("nan"), 1.0])}
    base = bundles.PackedContents({k: v.clone() for k, v in state.items()}, MaskSet({}), {}, {})
    own = bases.subtract(state, MaskSet({}), {}, base)
    assert own.tensors == {} and own.metadata["base"]["tensors"] == ["none", "one", "nan"]
    again = bases.restore(own, base)
    assert all(again.tensors[name] is value for name, value in base.tensors.items())


def test_a_layer_that_lost_channels_is_slices_of_the_base() -> None:
    """Rows and columns are found in their order, also beside equal ones; another order is no cut."""
    base = {"rows": torch.arange(12.0).reshape(4, 3), "bias": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    base |= {"columns": torch.arange(24.0).reshape(2, 4, 3), "turned": torch.arange(6.0).reshape(3, 2)}
    kept = torch.tensor([1, 3])
    state = {"rows": base["rows"][kept], "bias": base["bias"][[2, 3]], "columns": base["columns"][:, kept]}
    state |= {"turned": base["turned"][[2, 0]]}
    there = bundles.PackedContents(base, MaskSet({}), {}, {})
    own = bases.subtract(state, MaskSet({}), {}, there)
    assert own.metadata["base"]["cut"] == {"rows": 0, "bias": 0, "columns": 1}
    assert own.tensors["rows"].tolist() == own.tensors["columns"].tolist() == [False, True, False, True]
    assert own.tensors["bias"].tolist() == [True, True, False, False], "the first that fit, in order"
    assert torch.equal(own.tensors["turned"], state["turned"]), "another order is stored whole"
    again = bases.restore(own, there)
    assert all(torch.equal(again.tensors[name], value) for name, value in state.items())
    assert all(value.is_contiguous() for value in again.tensors.values())


def test_a_tensor_cut_along_two_axes_or_of_another_type_is_stored_whole() -> None:
    base = {"both": torch.arange(16.0).reshape(4, 4), "half": torch.ones(4, 2)}
    state = {"both": base["both"][:2, :2], "half": base["half"][:2].half(), "same": torch.ones(1)}
    there = bundles.PackedContents(base | {"same": torch.ones(1)}, MaskSet({}), {}, {})
    own = bases.subtract(state, MaskSet({}), {}, there)
    assert own.metadata["base"]["cut"] == {} and set(own.tensors) == {"both", "half"}


# -- commands


def test_rebasing_changes_no_figure(save_tiny, dense: Path, tmp_path: Path, capsys) -> None:
    whole = save_tiny(tmp_path / "whole")
    before = read_card(whole / "card.yaml").to_dict()
    assert main(["rebase", str(whole), "--out", str(tmp_path / "less")]) == 0
    assert f"beside {DENSE}" in " ".join(capsys.readouterr().err.split())
    less = read_card(tmp_path / "less" / "card.yaml").to_dict()
    changed = {key for key in less if less[key] != before.get(key)}
    assert changed == {"schema_version", "base", "weights", "cost"}
    assert main(["rebase", str(tmp_path / "less"), "--whole", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "card.yaml").read_text() == (whole / "card.yaml").read_text()
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == stored_bytes(whole)
    assert main(["rebase", str(whole), "--whole", "--base", DENSE, "--out", str(tmp_path / "x")]) == 2
    assert main(["show", str(tmp_path / "less")]) == 0
    assert f"Stands on: {DENSE}@1.0.0" in " ".join(capsys.readouterr().out.split())


def stored_bytes(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()
