"""The page of what structured pruning reaches: its lines, its networks, what another tool's failure says."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.vision import reach
from zoo.vision.reach_networks import C2f, network


def test_a_page_keeps_its_other_lines_in_order(tmp_path, monkeypatch):
    page = tmp_path / "reach.md"
    page.write_text("| timm/resnet50 | 100% | 37 | 0.25 | yes |\n| network | reach |\n")
    monkeypatch.setattr(reach, "line", lambda name: f"| {name} | 100% | 1 | 0.25 | yes | 0.25 |")
    reach.make(page, ["ultralytics/C2f", "timm/resnet18"])
    rows = [row for row in page.read_text().splitlines() if "0.25" in row]
    assert [row.split("|")[1].strip() for row in rows] == [
        "timm/resnet18",
        "timm/resnet50",
        "ultralytics/C2f",
    ]
    assert rows[1].endswith("| yes | not compared |") and rows[0].endswith("| 0.25 |")
    with pytest.raises(ConfigError, match="is no network of this page"):
        reach.make(page, ["timm/resnet51"])
    with pytest.raises(ConfigError, match="is no network"):
        network("timm/resnet51")


def test_a_line_says_what_is_reached_and_left():
    torch.manual_seed(0)
    model = nn.Sequential(C2f(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    row = reach._own("C2f", model, torch.randn(2, 3, 8, 8))
    assert row.startswith("| C2f | 99% | 4 |") and row.endswith("| yes |")
    assert 0.25 <= float(row.split("|")[4]) < 0.4


@pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is not installed"
)
def test_torch_pruning_is_asked_for_the_same_ratio():
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*body, nn.Linear(16, 10)).eval()
    left = float(reach.torch_pruned(model, torch.randn(2, 3, 8, 8)))
    assert left == pytest.approx(0.31, abs=0.05)
    assert sum(p.numel() for p in model.parameters()) == 1562, "the model itself stays"
