"""The picture of all bundles beside their dense twins."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from zoo.bundles.catalog import select
from zoo.cli import main
from zoo.errors import ConfigError
from zoo.report.plots import digest
from zoo.report.shelf import shelf_plot

COMMITTED = Path(__file__).parents[3] / "docs" / "shelf.png"


def test_points_are_shares_of_the_dense_twins(toy_zoo, tmp_path):
    cards = [bundle.card for bundle in select("toy/*")]
    points, twin = shelf_plot(cards).series
    sparse = [card for card in cards if card.metrics[0].dense is not None]
    assert points.label == f"toy ({len(sparse)})" and twin.y == [1.0]
    for card, x, y in zip(sparse, points.x, points.y, strict=True):
        assert x == pytest.approx(card.cost.bytes.sparse / card.cost.bytes.dense)
        assert y == pytest.approx(card.metrics[0].value / card.metrics[0].dense.value)
    path = tmp_path / "shelf.png"
    assert main(["list", "toy/*", "--picture", str(path)]) == 0
    assert Image.open(path).text["Plot"] == digest(shelf_plot(cards))
    assert main(["list", "toy/*", "--picture", str(tmp_path / "shelf.jpg")]) == 2


def test_lower_is_better_turns_the_share_round():
    [card] = [bundle.card for bundle in select("llm/wanda-50-stories")]
    [points, _] = shelf_plot([card]).series
    metric = card.metrics[0]
    assert metric.value > metric.dense.value, "perplexity or loss: higher is worse"
    assert points.y == [pytest.approx(metric.dense.value / metric.value)]


def test_a_point_far_above_the_others_stands_at_the_edge_with_its_figure():
    [card] = [bundle.card for bundle in select("graph/teddy-gcn-digits-g30-w80")]
    metric = card.metrics[0]
    twin = metric.dense.model_copy(update={"value": metric.value / 3})
    far = card.model_copy(update={"metrics": [metric.model_copy(update={"dense": twin})]})
    [points, _] = shelf_plot([card, far]).series
    assert points.y == [metric.value / metric.dense.value, 1.25]
    assert points.marks == ["", "\N{UPWARDS ARROW} 3.0"]


def test_domains_that_are_not_installed_are_left_out_and_named(toy_zoo, monkeypatch, caplog):
    def missing(name):
        raise ConfigError(f"task {name!r} needs the package 'diffusers', which is not installed")

    monkeypatch.setattr("zoo.report.shelf.get_task", missing)
    cards = [bundle.card for bundle in select("toy/*")]
    [twin] = shelf_plot(cards).series
    assert twin.y == [1.0] and "left out of the picture" in caplog.text and "diffusers" in caplog.text


def test_the_committed_picture_is_not_older_than_the_cards():
    cards = [bundle.card for bundle in select("*") if bundle.folder.parents[1].parent.name == "zoo"]
    assert Image.open(COMMITTED).text["Plot"] == digest(shelf_plot(cards)), (
        "draw it again: zoo list --picture docs/shelf.png"
    )
