"""KITTI's official AP, by hand and beside the official code's recorded figures; frames of your own."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo.errors import DataError, TaskError
from zoo.vision.domain import make_job, measured
from zoo.vision.finetune import Finetune
from zoo.vision.lidar.average_precision import Detections
from zoo.vision.lidar.frames import Detect, main, own_frames, read_points, split_of
from zoo.vision.lidar.kitti import (
    DIFFICULTIES,
    Labelled,
    average_precision,
    image_heights,
    kitti_ap,
    recall_thresholds,
    states_of_found,
)
from zoo.vision.lidar.real_tasks import Kitti, OwnFrames
from zoo.vision.lidar.scenes import make_scene
from zoo.vision.studies.dsvt import make_arm

MODERATE = DIFFICULTIES["moderate"]
PLACES = torch.tensor([[10.0 * n, 0, 0, 4, 2, 2, 0] for n in range(5)])


def labelled(names, heights=None, occlusion=None, truncation=None, within=None):
    count = len(names)
    return Labelled(
        PLACES[:count],
        tuple(names),
        np.full(count, 50.0) if heights is None else np.array(heights),
        np.zeros(count, int) if occlusion is None else np.array(occlusion),
        np.zeros(count) if truncation is None else np.array(truncation),
        within,
    )


def found(places, scores):
    return Detections(PLACES[places], torch.tensor(scores), torch.ones(len(places), dtype=torch.int64))


def car_ap(one, truth, level="moderate", heights=None, recalls=40):
    made = kitti_ap([one], [truth], ("Car",), (0.7,), DIFFICULTIES[level], heights, recalls)
    return made["Car"]


def test_a_box_counts_by_class_height_occlusion_truncation_and_range():
    truth = labelled(
        ["Car", "Van", "Pedestrian", "car", "Car"],
        heights=[41, 99, 99, 30, 25],
        occlusion=[1, 0, 0, 0, 0],
        within=np.array([True, True, True, False, True]),
    )
    assert truth.states("Car", DIFFICULTIES["easy"]).tolist() == [1, 1, -1, 1, 1]
    assert truth.states("Car", MODERATE).tolist() == [0, 1, -1, 1, 1]  # 25 pixels are not above 25
    assert truth.states("Pedestrian", MODERATE).tolist() == [-1, -1, 0, -1, -1]
    cut = labelled(["Car"], truncation=[0.4])
    assert [int(cut.states("Car", level)[0]) for level in DIFFICULTIES.values()] == [1, 1, 0]


def test_vans_low_boxes_and_what_lies_out_of_range_are_neither_right_nor_wrong():
    """One car of three boxes found first, then a van, then a box out of range, a false one last: precision 1
    at the only recall there is, that of the car."""
    truth = labelled(["Car", "Van", "Car"], within=np.array([True, True, False]))
    hits = found([0, 1, 2, 3], [0.9, 0.95, 0.99, 0.1])
    # One threshold: it stands for recall 0, which 40 points leave out and 11 points count once.
    assert car_ap(hits, truth) == (0.0, 0.0)
    assert car_ap(hits, truth, recalls=11) == pytest.approx((100 / 11, 100 / 11))
    # The same boxes, all of them cars that count: three thresholds, all right.
    whole = labelled(["Car", "Car", "Car"])
    assert car_ap(hits, whole) == pytest.approx((5.0, 5.0))
    # A false detection above all halves the first precision, and is forgiven where it is low in the image.
    wrong = found([0, 3], [0.5, 0.9])
    alone = labelled(["Car"])
    assert car_ap(wrong, alone, recalls=11)[0] == pytest.approx(50 / 11)
    assert car_ap(wrong, alone, heights=[np.array([50.0, 20.0])], recalls=11)[0] == pytest.approx(100 / 11)
    assert math.isnan(car_ap(hits, labelled(["Van"]))[0])


def test_thresholds_are_the_scores_nearest_to_the_points_of_recall():
    assert recall_thresholds([0.2, 0.9, 0.5], 3) == [0.9, 0.5, 0.2]
    scores = [1 - n / 100 for n in range(80)]  # 80 boxes, all found: the first, then recalls 2/80, 4/80, ...
    assert recall_thresholds(scores, 80)[:4] == pytest.approx([1.0, 0.99, 0.97, 0.95])
    assert len(recall_thresholds(scores, 80)) == 41


#: AP at 40 and at 11 points, of cars and pedestrians at the three difficulties, which the official code's
#: Python form (traveller59/kitti-object-eval-python, without numba) gives for these frames.
RECORDED = {
    "Car": [(0.087719, 0.324675), (5.973271, 7.011088), (18.232481, 20.445008)],
    "Pedestrian": [(0.0, 0.0), (0.263158, 1.298701), (1.127165, 2.194018)],
}


@pytest.mark.parametrize("name", RECORDED)
def test_figures_are_those_of_the_official_code(name):
    draw = np.random.default_rng(7)
    kinds, label = ("Car", "Pedestrian"), ("Car", "Pedestrian").index(name) + 1
    frames = []
    for _ in range(60):
        boxes, count = int(draw.integers(2, 7)), int(draw.integers(2, 9))
        names = draw.choice(np.array(["Car", "Car", "Car", "Van", "Pedestrian", "Truck"]), boxes)
        classes = draw.choice(np.array(["Car", "Car", "Pedestrian"]), count)
        heights, low = draw.uniform(15, 80, boxes), draw.uniform(15, 80, count)
        occlusion, truncation = draw.integers(0, 4, boxes), draw.uniform(0, 0.6, boxes)
        scores = np.round(draw.uniform(0, 1, count), 2)
        overlap = draw.uniform(0, 1, (count, boxes)) * (draw.uniform(0, 1, (count, boxes)) < 0.5)
        truth = Labelled(torch.zeros(boxes, 7), tuple(names), heights, occlusion, truncation)
        labels = torch.tensor([kinds.index(one) + 1 for one in classes])
        frames.append(
            (overlap, scores, truth, Detections(torch.zeros(count, 7), torch.ones(count), labels), low)
        )
    for level, wanted in zip(DIFFICULTIES.values(), RECORDED[name], strict=True):
        cases = [
            (overlap, scores, truth.states(name, level), states_of_found(one, label, low, level))
            for overlap, scores, truth, one, low in frames
        ]
        got = [average_precision(cases, 0.5, recalls) for recalls in (40, 11)]
        assert got == pytest.approx(list(wanted), abs=1e-5)


def test_heights_in_the_image():
    """A camera that looks along x: 2 m high at 10 m with a focal length of 100 are 20 pixels."""
    to_camera = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    projection = torch.tensor([[100.0, 0, 50, 0], [0, 100, 50, 0], [0, 0, 1, 0]])
    box = torch.tensor([[11.0, 0, 0, 2, 2, 2, 0]])
    assert image_heights(box, projection, to_camera, (100, 100)) == pytest.approx([20.0])
    assert image_heights(box, projection, to_camera, (55, 100)) == pytest.approx([14.0])  # cut at row 54


@pytest.mark.skipif("ZOO_DATA" not in os.environ, reason="the KITTI frames are below ZOO_DATA")
def test_the_official_figures_of_kittis_frames():
    with torch.no_grad():
        result = Kitti().evaluate(make_arm("dense pillars", 0))
    names = set(result.metrics)
    assert {"moderate_bev_ap", "hard_3d_ap_r11", "3d_ap/car/moderate", "bev_ap/car/easy_r11"} <= names
    assert all(0 <= measure.value <= 100 for measure in result.metrics.values())
    assert len(make_job("kitti", model=make_arm("dense pillars", 0)).batches) == 1


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six scenes as files, the first as a .npy, with a class that no detector knows."""
    for part in ("points", "labels"):
        (tmp_path / "own" / part).mkdir(parents=True)
    for number in range(6):
        points, boxes, labels, _ = make_scene(number)
        place = tmp_path / "own" / "points" / f"{number:03d}"
        if number:
            points.astype(np.float32).tofile(place.with_suffix(".bin"))
        else:
            np.save(place.with_suffix(".npy"), points.astype(np.float64)[:, :3])
        names = {1: "Car", 2: "Pedestrian", 3: "Cyclist"}
        lines = [
            " ".join(str(v) for v in box.tolist()) + f" {names[int(label)]}"
            for box, label in zip(boxes, labels, strict=True)
        ]
        lines.append("1 2 0 1 1 1 0 Tram")
        (tmp_path / "own" / "labels" / f"{number:03d}.txt").write_text("\n".join(lines))
    return tmp_path / "own"


def test_own_frames_are_read_split_trained_on_and_measured(folder, tmp_path, capsys):
    assert split_of(folder) == {"train": ["000", "001", "002", "003", "005"], "test": ["004"]}
    first, scene = own_frames(str(folder), "train")[0], make_scene(0)
    assert torch.equal(first.points[:, :3], torch.from_numpy(scene[0][:, :3]))
    assert (first.points[:, 3] == 0).all() and first.labels[-1] == 0 and first.names[-1] == "Tram"
    torch.testing.assert_close(first.boxes[:-1], torch.from_numpy(scene[1]))
    # An echo's noise takes it out of its box now and then.
    assert ((first.hits[:-1] <= torch.from_numpy(scene[3])) & (first.hits[:-1] > 0)).all()
    tuned = Finetune(
        "vision/dense-pillars-scenes", tmp_path / "tuned", dataset=str(folder), epochs=1, batch=2
    ).run()
    model = zoo.load(tuned)
    metric = model.zoo_info.card.metrics[0]
    assert metric.task == f"frames:{folder}" and measured(str(folder))[0] == metric.task
    assert OwnFrames(str(folder)).evaluate(model).metrics["bev_ap_loose"].value == pytest.approx(metric.mean)
    capsys.readouterr()
    main(Detect(str(tuned), folder / "points" / "004.bin", least=0.0))
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.split()[7] in ("Car", "Pedestrian", "Cyclist") for line in lines)


def test_lists_of_frames_are_followed_and_files_that_are_none_are_refused(folder, tmp_path):
    lists = folder / "ImageSets"
    lists.mkdir()
    (lists / "train.txt").write_text("001\n002\n")
    (lists / "val.txt").write_text("001\n")
    with pytest.raises(DataError, match="001 is a training and a test frame"):
        split_of(folder)
    (lists / "val.txt").write_text("003\n")
    assert len(own_frames(str(folder), "test")) == 1
    (folder / "labels" / "003.txt").write_text("1 2 3 4 5 6 Car")
    with pytest.raises(DataError, match=r"003.txt:1: a label is `x y z dx dy dz yaw NAME`"):
        own_frames(str(folder), "test")
    (folder / "labels" / "003.txt").write_text("1 2 3 4 5 6 0 Tram")
    with pytest.raises(DataError, match=r"no label of the test frames .*names: Tram"):
        own_frames(str(folder), "test")
    for name, content, message in [
        ("a.bin", np.zeros(7, np.float32).tobytes(), "rows of four float32"),
        ("b.npy", b"no array", "cannot be read as points"),
        ("c.pcd", b"", "points are read from .bin and .npy"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_points(tmp_path / name)
    with pytest.raises(TaskError, match="takes detectors of Car, Pedestrian, Cyclist; received a Linear"):
        OwnFrames(str(folder)).evaluate(torch.nn.Linear(1, 1))
