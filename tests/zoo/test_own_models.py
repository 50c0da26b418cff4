"""Models of nobody's registered class: saved without a card, loaded into what their owner hands over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from zoo.bundles.card import parse_card
from zoo.cli import main
from zoo.errors import BundleError, CardError, ConfigError
from zoo.shared.masks import masks_of


class Net(nn.Module):
    """Two linear layers, a norm and a buffer of whole numbers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu())


@pytest.fixture
def sparse() -> Net:
    """A network of 16 hidden units, half of whose first weights are zero, with moved statistics."""
    torch.manual_seed(0)
    model = Net(16)
    model(torch.randn(32, 4))
    zoo.sparsify(model, sparsity=0.5)
    return model.eval()


def test_any_model_is_saved_and_comes_back(sparse, tmp_path, capsys):
    x = torch.randn(5, 4)
    folder = zoo.save(sparse, tmp_path / "My Net", arguments={"width": 16})
    for into in (Net, Net(16)):
        again = zoo.load(folder, into=into)
        assert torch.equal(again(x), sparse(x)) and not again.training
        assert masks_of(again).equal(masks_of(sparse)) and masks_of(again).sparsity() == 0.5
    packed = zoo.load(folder, execution="packed", into=Net)
    torch.testing.assert_close(packed(x), sparse(x))
    card = zoo.info(again).card
    assert card.name == "own/my-net" and card.metrics == [] and card.cost.flops is None
    assert card.sparsity.parts["weights"].sparsity == 0.5 and card.method.seed is None
    assert main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "own/my-net" in shown and "50.0" in shown and "FLOPs" not in shown and "Measured" not in shown
    assert zoo.save(again, tmp_path / "again", name="own/second") == tmp_path / "again"
    assert zoo.card(str(tmp_path / "again")).training.environment["torch"] == torch.__version__


def test_nothing_is_imported_by_a_name_on_a_card(sparse, tmp_path):
    folder = zoo.save(sparse, tmp_path / "net", arguments={"width": 16})
    with pytest.raises(BundleError, match="into=Net"):
        zoo.load(folder)
    with pytest.raises(ConfigError, match="received the class"):
        zoo.load(folder, into=nn.Linear)
    with pytest.raises(BundleError, match="does not fit"):
        zoo.load(folder, into=Net(8))
    bare = zoo.save(sparse, tmp_path / "bare", arguments={"height": 3})
    with pytest.raises(ConfigError, match="height"):
        zoo.load(bare, into=Net)
    with pytest.raises(ConfigError, match="leave into out"):
        zoo.load("graph/dense-gcn-digits", into=Net)


def test_what_nobody_measured_is_not_stated(sparse, tmp_path):
    with pytest.raises(ConfigError, match="own/"):
        zoo.save(sparse, tmp_path / "x", name="vision/mine")
    zoo_model = zoo.load("graph/dense-gcn-digits")
    with pytest.raises(ConfigError, match="like='graph/dense-gcn-digits'"):
        zoo.save(zoo_model, tmp_path / "x")
    fields = zoo.info(zoo_model).card.to_dict()
    for part, key in (("method", "seed"), ("cost", "flops"), ("training", "seconds")):
        with pytest.raises(CardError, match=f"{part}.{key} is missing"):
            parse_card({**fields, part: {**fields[part], key: None}})
    with pytest.raises(CardError, match="metrics is missing"):
        parse_card({**fields, "metrics": []})
    folder = zoo.save(sparse, tmp_path / "net")
    with pytest.raises(ConfigError, match="no figures to measure"):
        zoo.save(sparse, tmp_path / "y", like=str(folder))
