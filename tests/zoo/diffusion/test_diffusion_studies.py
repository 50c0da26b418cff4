"""What the studies compute by themselves: ratios of drifts, the knapsack against all subsets, tiles of
canvases, cases."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.studies import ecodiff, laptop, lomoe, parts, slimflow  # noqa: E402
from zoo.diffusion.units import Layer  # noqa: E402
from zoo.errors import ConfigError  # noqa: E402


def test_ratios_of_drifts_by_hand() -> None:
    rows = [
        {"arm": "magnitude", "level": level, "seed": 0, "drift": drift}
        for level, drift in ((0.2, 0.01), (0.35, 0.04), (0.5, 0.3))
    ]
    rows.append({"arm": parts.TEXT, "level": 0.7, "seed": 0, "drift": 0.02})
    made = {row["arm"]: row for row in parts.ratios(rows, parts.PartsOptions(seeds=2))[len(rows) :]}
    assert made[parts.KNEE]["ratio"] == pytest.approx(math.log(30))
    assert made[parts.TOLERANCE]["ratio"] == pytest.approx(math.log(2))
    assert {row["seed"] for row in made.values()} == {0}  # the second seed was not measured


def test_the_knapsack_is_held_against_all_subsets(monkeypatch) -> None:
    layers = [Layer(str(i), "block", size) for i, size in enumerate((4, 3, 3))]
    model = SimpleNamespace(unet=torch.nn.Linear(9, 1))  # ten parameters
    assert laptop.excess(layers, [5.0, 3.0, 3.0], 0.6, model) == 0.0
    monkeypatch.setattr(laptop, "cheapest_cover", lambda *_: [0, 1])  # 8 instead of 6
    assert laptop.excess(layers, [5.0, 3.0, 3.0], 0.6, model) == pytest.approx(1 / 3)


def test_rates_are_held_against_the_unmasked_one() -> None:
    rows = [
        {"arm": lomoe.LOMOE, "seed": 0, "inside": 0.6},
        {"arm": lomoe.UNMASKED, "seed": 0, "inside": 0.8},
        {"arm": lomoe.LOMOE, "seed": 1, "inside": 0.6},
    ]
    shares = [row.get("share") for row in lomoe.shares(rows, lomoe.LomoeOptions())]
    assert shares == [pytest.approx(0.75), 1.0, None]
    canvas = torch.arange(24.0).expand(1, 1, 8, 24)
    assert [float(tile[..., 0, 0]) for tile in lomoe.tiles(canvas)[0]] == [0.0, 8.0, 16.0]


def test_the_pruned_student_is_cut_and_repeats() -> None:
    first, second, other = (slimflow.pruned_unet(seed) for seed in (0, 0, 1))
    assert "pruning_plan" in first.current_arguments()
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("module", [ecodiff, laptop, lomoe, parts, slimflow])
def test_cases_are_of_known_arms_and_need_a_seed(module) -> None:
    options = module.STUDY.options()
    cases = list(module.STUDY.cases(options))
    assert cases and {case["seed"] for case in cases} == set(range(options.seeds))
    assert {case["arm"] for case in cases if "arm" in case} <= set(module.STUDY.arms)
    named = {arm for claim in module.STUDY.claims for arm in (claim.first, claim.second) if arm}
    assert named <= set(module.STUDY.arms)
    with pytest.raises(ConfigError, match="at least one seed"):
        module.STUDY.options(seeds=0)


def test_arms_of_ecodiff_are_chosen_by_name() -> None:
    cases = list(ecodiff.cases(ecodiff.EcoDiffOptions(seeds=2, arms=("norm", "random"))))
    assert [(case["arm"], case["seed"]) for case in cases] == [
        ("norm", 0),
        ("norm", 1),
        ("random", 0),
        ("random", 1),
    ]
    with pytest.raises(ConfigError, match="nothing"):
        ecodiff.EcoDiffOptions(arms=("nothing",))
