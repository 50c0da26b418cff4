"""Bundles: saved whole, loaded exactly, found by path and by name."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.bundles import catalog
from zoo.bundles import store as bundles
from zoo.bundles.card import read_card
from zoo.bundles.store import ModelInfo, info, load, save
from zoo.errors import BundleError, CardError, ConfigError, UnknownNameError
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.ops import SparseLinear
from zoo.shared.store.formats import load_packed


def test_what_is_saved_is_loaded(tiny_bundle, tiny_model, tiny_extras) -> None:
    model = load(tiny_bundle)
    assert not model.training and model.scale == 0.5
    expected = tiny_model.state_dict()
    assert {name: value.dtype for name, value in model.state_dict().items()} == {
        name: value.dtype for name, value in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert masks_of(model).equal(masks_of(tiny_model)) and masks_of(model).lost_zeros(model) == []
    assert model.second_again.weight is model.second.weight, "ties hold"
    assert torch.equal(model.edges, tiny_extras["edges/keep"]), "load_extras was called"
    found = info(model)
    assert found.folder == tiny_bundle and found.execution == "masked"
    assert all(torch.equal(found.extras[name], value) for name, value in tiny_extras.items())
    assert model(torch.ones(3, 4)).allclose(tiny_model.eval()(torch.ones(3, 4)))


def test_a_card_tells_what_was_measured(tiny_bundle, tiny_model) -> None:
    card = read_card(tiny_bundle / "card.yaml")
    masks = masks_of(tiny_model)
    masked = [masks[name] for name in ("first.weight", "second.weight")]
    kept, total = sum(mask.kept for mask in masked), sum(mask.numel for mask in masked)
    assert total == 4 * 8 + 8 * 8
    weights, edges = card.sparsity.parts["weights"], card.sparsity.parts["edges"]
    assert (weights.kept, weights.total, weights.pattern) == (kept, total, "unstructured")
    assert (edges.kept, edges.total) == (15, 20)
    assert card.sparsity.overall == pytest.approx(1 - (kept + 15) / (total + 20))
    assert card.cost.parameters.dense == sum(p.numel() for p in tiny_model.parameters())
    assert card.cost.parameters.kept == card.cost.parameters.dense - (total - kept)
    # A dense model stores no mask of its edges, and a tied tensor once.
    state = {tensor.data_ptr(): tensor for tensor in tiny_model.state_dict().values()}.values()
    assert card.cost.bytes.dense == sum(tensor.numel() * tensor.itemsize for tensor in state)
    size = (tiny_bundle / "weights.safetensors").stat().st_size
    assert card.weights.bytes == card.cost.bytes.on_disk == size > card.cost.bytes.sparse
    assert sorted(path.name for path in tiny_bundle.iterdir()) == ["card.yaml", "weights.safetensors"]


def test_a_card_cannot_lie_through_save(tiny_model, tiny_fields, tmp_path: Path) -> None:
    tiny_fields["sparsity"] = {
        "overall": 0.99,
        "parts": {"weights": {"kept": 1, "total": 100, "sparsity": 0.99, "pattern": "2:4"}},
    }
    tiny_fields["weights"] = {"file": "../x", "sha256": "0", "bytes": 3}
    tiny_fields["cost"] |= {"parameters": {"kept": 1}, "bytes": {"sparse": 1, "on_disk": 1}}
    honest = read_card(save(tiny_model, tmp_path / "b", card=tiny_fields) / "card.yaml")
    assert honest.sparsity.overall == pytest.approx(masks_of(tiny_model).report(tiny_model).masked)
    assert honest.cost.parameters.kept > 1 and honest.cost.bytes.on_disk > 1


def test_what_was_loaded_can_be_saved_again(tiny_bundle, tmp_path: Path) -> None:
    model = load(tiny_bundle)
    again = save(model, tmp_path / "again", card=info(model).card)
    assert (again / "card.yaml").read_text() == (tiny_bundle / "card.yaml").read_text()
    assert (again / "weights.safetensors").read_bytes() == (tiny_bundle / "weights.safetensors").read_bytes()


def test_a_dense_model(tiny_fields, tmp_path: Path) -> None:
    tiny_fields["method"]["name"] = "dense"
    tiny_fields["dense_twin"] = tiny_fields["metrics"][0]["dense"] = None
    torch.manual_seed(0)
    model = load(save(ARCHITECTURES.get("test/tiny")(8, 0.5), tmp_path / "dense", card=tiny_fields))
    assert len(masks_of(model)) == 0 and info(model).card.sparsity.parts == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_survives(tiny_model, tiny_fields, tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model.to(dtype)
    model = load(save(tiny_model, tmp_path / "b", card=tiny_fields))
    assert model.first.weight.dtype == dtype and torch.equal(model.first.weight, tiny_model.first.weight)
    assert model.second_again.weight is model.second.weight
    assert model.norm.num_batches_tracked.dtype == torch.int64


def test_nan_and_signed_zeros_survive(tiny_model, tiny_fields, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.first.bias[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    model = load(save(tiny_model, tmp_path / "b", card=tiny_fields))
    assert torch.equal(model.first.bias.view(torch.int32), tiny_model.first.bias.view(torch.int32))


def test_loading_leaves_the_random_state_alone(tiny_bundle) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load(tiny_bundle)
    assert torch.equal(torch.rand(2), expected)


def test_info_follows_copies(tiny_bundle) -> None:
    model = copy.deepcopy(load(tiny_bundle))
    assert info(model).card.name == "graph/tiny-test"
    assert isinstance(pickle.loads(pickle.dumps(info(model))), ModelInfo)
    with pytest.raises(BundleError, match="not loaded by zoo.load"):
        info(nn.Linear(2, 2))


@pytest.mark.usefixtures("packs_all")
def test_packed_execution_gives_the_same_outputs(tiny_fields, tmp_path: Path, monkeypatch) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(800, 700), nn.ReLU(), nn.Linear(700, 5))

    monkeypatch.setitem(ARCHITECTURES._entries, "test/wide", build)
    torch.manual_seed(0)
    model = build()
    masks = MaskSet({"0.weight": torch.rand(700, 800) >= 0.95, "2.weight": torch.rand(5, 700) >= 0.3})
    masks.apply_(model)
    tiny_fields["architecture"] = {"name": "test/wide"}
    folder = save(model, tmp_path / "b", card=tiny_fields, masks=masks)
    x = torch.randn(5, 800)
    expected, packed = load(folder)(x), load(folder, execution="packed")
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(packed[0], SparseLinear) and isinstance(packed[2], nn.Linear)
    assert info(packed).execution == "packed" and not packed.training


def test_an_unknown_execution(tiny_bundle) -> None:
    with pytest.raises(ConfigError, match="'masked' or 'packed', received 'fast'"):
        bundles._check_execution("fast")


def test_saving_refuses_lost_zeros(tiny_model, tiny_fields, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.first.weight.fill_(1.0)
    with pytest.raises(BundleError, match=r"'first.weight' has non-zero values .* masks.apply_"):
        save(tiny_model, tmp_path / "b", card=tiny_fields)
    assert list(tmp_path.iterdir()) == []


def test_saving_refuses_what_would_not_load(tiny_model, tiny_fields, tmp_path: Path) -> None:
    tiny_fields["architecture"]["args"]["width"] = 9
    with pytest.raises(BundleError, match="has the shape"):
        save(tiny_model, tmp_path / "b", card=tiny_fields)
    tiny_fields["architecture"] = {"name": "test/tinny"}
    with pytest.raises(UnknownNameError, match="test/tiny"):
        save(tiny_model, tmp_path / "b", card=tiny_fields)
    tiny_fields["architecture"] = {"name": "test/tiny", "args": {"depth": 3}}
    with pytest.raises(BundleError, match="refuses the arguments .*depth"):
        save(tiny_model, tmp_path / "b", card=tiny_fields)
    assert list(tmp_path.iterdir()) == []


def test_saving_refuses_an_incomplete_card(tiny_model, tiny_fields, tmp_path: Path) -> None:
    del tiny_fields["training"]
    with pytest.raises(CardError, match="b/card.yaml: training"):
        save(tiny_model, tmp_path / "b", card=tiny_fields)
    assert list(tmp_path.iterdir()) == []


# -- where a bundle is written


def test_overwriting_is_asked_for(save_tiny, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "deep" / "er" / "b")
    with pytest.raises(BundleError, match="holds a bundle already. Pass overwrite=True"):
        save_tiny(folder, version="2.0.0")
    assert read_card(folder / "card.yaml").version == "1.0.0"
    save_tiny(folder, overwrite=True, version="2.0.0")
    assert read_card(folder / "card.yaml").version == "2.0.0"
    assert [path.name for path in folder.parent.iterdir()] == ["b"], "nothing is left behind"


def test_foreign_files_are_never_replaced(save_tiny, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="holds 'thesis.tex'"):
        save_tiny(tmp_path, overwrite=True)
    with pytest.raises(BundleError, match="exists and is not a folder"):
        save_tiny(tmp_path / "thesis.tex", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_may_be_filled(save_tiny, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert load(save_tiny(tmp_path / "empty")).scale == 0.5


# -- where a bundle is found


@pytest.fixture
def shelf(save_tiny, tmp_path: Path, monkeypatch) -> Path:
    """A folder of bundles named by ZOO_PATH, in which alone names are looked up."""
    root = tmp_path / "shelf"
    save_tiny(root / "old", version="1.9.0")
    save_tiny(root / "new", version="1.10.0")
    save_tiny(root / "other" / "w80", name="graph/tiny-w80")
    dense = copy.deepcopy(read_card(root / "old" / "card.yaml").to_dict())
    save_tiny(root / "other" / "w8", name="graph/tiny-w8", method={**dense["method"], "name": "graph/random"})
    monkeypatch.setenv("ZOO_PATH", str(root))
    monkeypatch.setattr(catalog, "DOMAINS", ())
    return root


def test_a_bundle_by_its_path(tiny_bundle, monkeypatch) -> None:
    assert catalog.find(tiny_bundle).card.name == "graph/tiny-test"
    assert catalog.find(str(tiny_bundle / "card.yaml")).folder == tiny_bundle
    monkeypatch.chdir(tiny_bundle.parent)
    assert catalog.find("tiny").card.name == catalog.find("./tiny").card.name == "graph/tiny-test"
    assert catalog.card("tiny", version="1.0.0").version == "1.0.0"
    with pytest.raises(BundleError, match="version 1.0.0 of graph/tiny-test, but 2.0.0"):
        catalog.find("tiny", version="2.0.0")
    for missing in ("./nothing", tiny_bundle.parent, "/nowhere/at/all"):
        with pytest.raises(BundleError, match="no bundle here"):
            catalog.find(missing)


def test_the_newest_version_unless_pinned(shelf: Path) -> None:
    assert catalog.find("graph/tiny-test").card.version == "1.10.0"
    assert catalog.find("graph/tiny-test@1.9.0").folder == shelf / "old"
    assert catalog.find("graph/tiny-test", version="1.9.0").folder == shelf / "old"
    assert load("graph/tiny-test@1.9.0").zoo_info.card.version == "1.9.0"
    with pytest.raises(UnknownNameError, match=r"no version '3.0.0' here. There is 1.9.0, 1.10.0\."):
        catalog.find("graph/tiny-test@3.0.0")
    with pytest.raises(ConfigError, match="Give one of them"):
        catalog.find("graph/tiny-test@1.9.0", version="1.10.0")


def test_names_are_listed_and_filtered(shelf: Path) -> None:
    every = ["graph/tiny-test", "graph/tiny-w8", "graph/tiny-w80"]
    assert catalog.list_models() == every
    assert catalog.list_models("graph/*-w*") == every[1:]
    assert catalog.list_models("graph/tiny-test@*") == ["graph/tiny-test@1.9.0", "graph/tiny-test@1.10.0"]
    assert catalog.list_models(method="random") == catalog.list_models(method="graph/random") == [every[1]]
    assert catalog.list_models(domain="graph", task="cora") == every
    overall = catalog.card(every[0]).sparsity.overall
    assert catalog.list_models(min_sparsity=overall) == every
    assert catalog.list_models(min_sparsity=overall + 0.01) == []
    size = catalog.card(every[0]).weights.bytes
    assert catalog.list_models(every[0], max_bytes=size) == [every[0]]
    assert catalog.list_models(every[0], max_bytes=size - 1) == []


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: catalog.find("graph/tiny-tset"), "Unknown model .*tset'. Did you mean 'graph/tiny-test'"),
        (lambda: catalog.find("tiny-w80"), "Did you mean 'graph/tiny-w80'"),
        (lambda: catalog.find("graph/tiny-*"), "is a pattern, one name is wanted. See `zoo list"),
        (lambda: catalog.find("graph/../shelf/old"), "Unknown model"),
        (lambda: catalog.list_models("grahp/tiny-t*"), "No model matches 'grahp.*Did you mean 'graph/tiny"),
        (lambda: catalog.list_models("graph/tiny-test@9*"), "Did you mean 'graph/tiny-test@1.9.0'"),
        (lambda: catalog.list_models(domain="graf"), "No model has the domain 'graf'. Did you mean 'graph'"),
        (lambda: catalog.list_models(method="magnitud"), "Did you mean 'graph/magnitude'"),
        (lambda: catalog.list_models(task="coar"), "Did you mean 'graph/cora'"),
    ],
)
def test_a_typo_brings_near_misses(shelf: Path, call, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        call()


@pytest.mark.parametrize("bounds", [{"min_sparsity": 1.1}, {"min_sparsity": float("nan")}, {"max_bytes": -1}])
def test_impossible_bounds(shelf: Path, bounds) -> None:
    with pytest.raises(ConfigError, match="received"):
        catalog.list_models(**bounds)


def test_a_broken_card_hides_no_other(shelf: Path, caplog) -> None:
    broken = shelf / "other" / "tiny-broken"
    broken.mkdir()
    (broken / "card.yaml").write_text("name: graph/tiny-broken\n")
    with caplog.at_level(logging.WARNING, "zoo"):
        assert len(catalog.list_models()) == 3
    assert "tiny-broken/card.yaml: schema_version" in caplog.text
    with pytest.raises(CardError, match="tiny-broken"):
        catalog.find("graph/tiny-broken")
    assert catalog.find("graph/tiny-w8").card.name == "graph/tiny-w8"


def test_the_first_place_decides(shelf: Path, save_tiny, monkeypatch, tmp_path: Path) -> None:
    save_tiny(tmp_path / "second" / "x", version="9.0.0")
    monkeypatch.setenv("ZOO_PATH", f"{shelf}:{tmp_path / 'second'}")
    assert catalog.find("graph/tiny-test").card.version == "1.10.0"
    assert catalog.find("graph/tiny-test@9.0.0").card.version == "9.0.0"
    assert catalog.list_models("graph/tiny-test@*")[-1] == "graph/tiny-test@1.10.0"
    monkeypatch.setenv("ZOO_PATH", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="ZOO_PATH names .*missing"):
        catalog.list_models()


def test_one_name_with_two_contents_is_refused(shelf: Path, tiny_model, tiny_fields, tiny_extras) -> None:
    with torch.no_grad():
        tiny_model.first.bias.add_(1)
    tiny_fields["version"] = "1.10.0"
    save(tiny_model, shelf / "impostor", card=tiny_fields, extras=tiny_extras)
    with pytest.raises(BundleError, match="twice with different weights"):
        catalog.find("graph/tiny-test")


def test_a_changed_card_is_read_again(tiny_bundle, save_tiny) -> None:
    assert catalog.card(tiny_bundle).version == "1.0.0"
    save_tiny(tiny_bundle, overwrite=True, version="1.0.1")
    assert catalog.card(tiny_bundle).version == "1.0.1"


def test_packaged_bundles_lie_where_their_names_say() -> None:
    package = Path(catalog.__file__).parent
    for path in package.glob("*/cards/*/card.yaml"):
        card = read_card(path)
        assert card.name == f"{path.parents[2].name}/{path.parent.name}"
        catalog.Bundle(card, path.parent).check()


def test_the_weights_are_packed(tiny_bundle) -> None:
    contents = load_packed(tiny_bundle / "weights.safetensors")
    assert contents.metadata["architecture"] == {"name": "test/tiny", "args": {"width": 8, "scale": 0.5}}


def test_a_former_name_goes_on_finding_its_bundle(shelf: Path, save_tiny, caplog) -> None:
    save_tiny(shelf / "newer", name="graph/tiny-renamed", version="2.0.0", formerly=["graph/tiny-before"])

    assert catalog.find("graph/tiny-before").card.name == "graph/tiny-renamed"
    assert "graph/tiny-before is called graph/tiny-renamed now" in caplog.text
    assert catalog.find("graph/tiny-before@2.0.0").card.version == "2.0.0"
    assert catalog.list_models("graph/tiny-before") == ["graph/tiny-renamed"]
    with pytest.raises(UnknownNameError, match=r"'graph/tiny-renamed' has no version '1\.0\.0'"):
        catalog.find("graph/tiny-before@1.0.0")
    # A bundle that has the name itself is never replaced by one that had it.
    save_tiny(shelf / "claims", name="graph/claims", formerly=["graph/tiny-test"])
    assert catalog.find("graph/tiny-test").card.name == "graph/tiny-test"


def test_a_former_name_of_several_bundles_is_refused(shelf: Path, save_tiny) -> None:
    for name in ("graph/one", "graph/two"):
        save_tiny(shelf / name[-3:], name=name, formerly=["graph/both"])
    with pytest.raises(UnknownNameError, match="was the name of graph/one and of graph/two"):
        catalog.find("graph/both")


def test_a_card_that_had_its_own_name_before_is_refused(tiny_bundle, save_tiny) -> None:
    with pytest.raises(CardError, match="formerly has the name that the bundle has now"):
        save_tiny(tiny_bundle.parent / "again", formerly=["graph/tiny-test"])


def test_a_folder_that_is_no_bundle_is_told_from_a_name(
    shelf: Path, save_tiny, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "my-odd-net")
    (tmp_path / "my-llm").mkdir()
    with pytest.raises(BundleError, match=r"my-llm: no bundle here.*holds it\. "):
        catalog.find("my-llm")
    (tmp_path / "my-llm" / "config.json").write_text("{}")
    for name in ("my-llm", "./my-llm", tmp_path / "my-llm"):
        with pytest.raises(BundleError, match="another library's model, which `zoo sparsify .*my-llm` takes"):
            catalog.find(name)
    with pytest.raises(UnknownNameError, match="Did you mean 'my-odd-net'"):
        catalog.find("my-od-net")
    with pytest.raises(BundleError, match="Did you mean 'my-odd-net'"):
        catalog.find("./my-od-net")
