"""nuScenes' detection score, by hand and beside the development kit's recorded figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from zoo.errors import DataError
from zoo.vision.lidar.nuscenes import RANGES, Boxes, nuscenes_scores

RECORDED = json.loads((Path(__file__).parent / "nuscenes_cases.json").read_text())["cases"]


def read(frames, labelled):
    made = []
    for frame in frames:
        made.append(
            Boxes(
                np.array([one["box"] for one in frame], dtype=float).reshape(-1, 7),
                [one["name"] for one in frame],
                None if labelled else np.array([one["score"] for one in frame]),
                np.array([one["points"] for one in frame]) if labelled else None,
                np.array([one["velocity"] for one in frame], dtype=float).reshape(-1, 2),
                [one["attribute"] for one in frame],
            )
        )
    return made


@pytest.mark.parametrize("index", range(len(RECORDED)))
def test_all_figures_are_those_of_the_development_kit(index):
    """Recorded with nuscenes-devkit 1.2.0 on random scenes of ten classes."""
    case = RECORDED[index]
    found = nuscenes_scores(read(case["found"], False), read(case["truth"], True))
    assert found.keys() == case["official"].keys()
    for name, official in case["official"].items():
        expected = math.nan if official is None else official
        assert found[name] == pytest.approx(expected, abs=1e-6, nan_ok=True), name


def scene(places, scores=None, points=None, **fields):
    boxes = np.array([[x, 0, 0, 4, 2, 2, 0] for x in places], dtype=float).reshape(-1, 7)
    scores = None if scores is None else np.array(scores)
    return Boxes(boxes, ["car"] * len(places), scores, points, **fields)


def test_a_case_by_hand():
    """Two cars, the better guess 0.4 m off, a second one on the same car, none on the other: recall 1/2 at
    precision 1, at 0.50 itself 1/2, as the second guess adds no recall: 39 times 0.9 and once 0.4 of the 90
    recalls from 0.11 on, over 0.9, at every distance."""
    ap = (39 * 0.9 + 0.4) / 90 / 0.9
    found = scene([10.4, 10.2], [0.9, 0.8], velocity=np.array([[3.0, 0], [0, 0]]))
    truth = scene([10, 30], velocity=np.array([[0.0, 4.0], [0, 0]]), attributes=["vehicle.moving", ""])
    made = nuscenes_scores([found], [truth], ("car",))
    assert made["ap/car"] == pytest.approx(ap)
    assert made["trans_err/car"] == pytest.approx(0.4) and made["vel_err/car"] == pytest.approx(5)
    assert made["scale_err/car"] == made["orient_err/car"] == 0 and made["attr_err/car"] == 1
    assert made["NDS"] == pytest.approx((5 * ap + 0.6 + 1 + 1 + 0 + 0) / 10)


def test_what_counts_for_nothing():
    both = [scene([10, 60]), scene([10, 20], points=np.array([5, 0]))]
    made = [nuscenes_scores([scene([10], [0.5])], [truth], ("car",))["ap/car"] for truth in both]
    assert made == pytest.approx([1, 1]), "a car beyond 50 m, and one without points"
    assert nuscenes_scores([scene([10, 55], [0.5, 0.9])], [both[0]], ("car",))["ap/car"] == pytest.approx(1)
    assert RANGES["car"] == 50 and RANGES["barrier"] == 30


def test_what_is_refused():
    with pytest.raises(DataError, match="1 frames of found boxes for 2"):
        nuscenes_scores([scene([1], [0.5])], [scene([1])] * 2)
    with pytest.raises(DataError, match="received 'van'"):
        nuscenes_scores([], [], ("van",))
    with pytest.raises(DataError, match="need scores"):
        nuscenes_scores([scene([1])], [scene([1])])
