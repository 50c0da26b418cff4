"""Networks that DASS searched: their maker, their arguments, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.errors import ConfigError
from zoo.vision import searched as searching
from zoo.vision.data import Images
from zoo.vision.searched import SearchedNet, searched

CELL = {"0": "pool", "1": "skip", "2": "separable", "4": "dilated"}


def test_the_maker_trains_what_was_searched_under_the_masks_of_its_scores(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "load_images", lambda name: images)
    row = Row(
        "vision/tiny",
        "",
        "",
        arguments={"width": 4, "classes": 4, "channels": 1},
        options={"sparsity": 0.75, "search": [1, 1, 1], "stages": [1, 1, 1]},
        recipe={"lr": 0.05, "batch": 16},
    )
    made = searched(row, 0, None, Work(tmp_path))
    assert made.arguments is not None
    again = SearchedNet(**json.loads(json.dumps(made.arguments))).eval()
    again.load_state_dict(made.model.state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again(x), made.model(x))
    inner = {n: p for n, p in made.model.named_parameters() if n.startswith("cells") and p.dim() == 4}
    assert set(made.masks) == set(inner)
    for name, weight in inner.items():
        assert int((weight != 0).sum()) == made.masks[name].kept == max(1, round(0.25 * weight.numel()))


@pytest.mark.parametrize(
    "cell",
    [
        {"0": "pool", "1": "skip", "2": "separable"},
        {**CELL, "4": "none"},
        {"0": "pool", "1": "skip", "2": "pool", "-1": "pool"},
        {"0": "pool", "1": "skip", "2": "pool", "9": "pool"},
        {"0": "pool", "2": "skip", "3": "pool", "4": "pool"},
        None,
    ],
)
def test_what_is_no_genotype_is_refused(cell: Any) -> None:
    assert SearchedNet({"normal": CELL, "reduction": CELL}).arguments["genotype"]["normal"] == CELL
    with pytest.raises(ConfigError, match="two of the edges 0 to 4"):
        SearchedNet({"normal": CELL, "reduction": cell})
