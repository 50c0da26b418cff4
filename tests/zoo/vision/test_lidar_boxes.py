"""Box conventions, rotated overlaps, suppression and average precision."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.vision.lidar.average_precision import Detections, Truth, average_precision, match, with_error
from zoo.vision.lidar.boxes import (
    corners_bev,
    from_bottom_centre,
    from_kitti_camera,
    from_quaternion,
    from_sustech,
    points_in_boxes,
    points_per_box,
    to_bottom_centre,
    to_kitti_camera,
    wrapped,
)
from zoo.vision.lidar.data import label_of, real_frame
from zoo.vision.lidar.iou import box_iou, intersection_bev, paired_iou, rotated_nms

needs_data = pytest.mark.skipif(not os.environ.get("ZOO_DATA"), reason="the real frames lie below ZOO_DATA")


def random_boxes(count: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    place = (torch.rand(count, 3, generator=generator, dtype=torch.float64) - 0.5) * spread
    size = 0.3 + 3 * torch.rand(count, 3, generator=generator, dtype=torch.float64)
    yaw = (torch.rand(count, 1, generator=generator, dtype=torch.float64) - 0.5) * 8
    return torch.cat([place, size, yaw], 1)


def clipped_area(a: np.ndarray, b: np.ndarray) -> float:
    """Area shared by two convex polygons, counter-clockwise, by clipping one edge after another."""
    polygon = list(a)
    for start, end in zip(b, np.roll(b, -1, 0), strict=True):
        edge = end - start
        side = [edge[0] * (p[1] - start[1]) - edge[1] * (p[0] - start[0]) for p in polygon]
        clipped = []
        for i, p in enumerate(polygon):
            j = (i + 1) % len(polygon)
            if side[i] >= 0:
                clipped.append(p)
            if (side[i] > 0) != (side[j] > 0) and side[i] != side[j]:
                clipped.append(p + (polygon[j] - p) * side[i] / (side[i] - side[j]))
        polygon = clipped
        if not polygon:
            return 0.0
    x, y = np.array(polygon).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def test_intersections_equal_polygon_clipping():
    a, b = random_boxes(400, 1), random_boxes(400, 2)
    expected = [
        clipped_area(p, q) for p, q in zip(corners_bev(a).numpy(), corners_bev(b).numpy(), strict=True)
    ]
    assert sum(value > 0 for value in expected) > 200
    np.testing.assert_allclose(intersection_bev(a, b).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("move", [0.0, 1e-12, -1e-12, 1e-7])
def test_coinciding_boxes_overlap_wholly(move):
    a = random_boxes(100, 3)
    b = a.clone()
    b[:, :2] += move
    b[:, 6] += torch.tensor([0, math.pi, 2 * math.pi, -math.pi], dtype=a.dtype).repeat(25)
    bev, whole = paired_iou(a, b)
    torch.testing.assert_close(bev, torch.ones_like(bev), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-5, rtol=0)


def test_intersections_of_easy_cases():
    unit = torch.tensor([[0.0, 0, 0, 2, 1, 1, 0]])
    others = torch.tensor(
        [
            [1.0, 0, 0, 2, 1, 1, 0],
            [0, 0, 0, 1, 0.5, 1, 0.3],
            [0, 0, 0, 2, 1, 1, math.pi / 2],
            [2, 0, 0, 2, 1, 1, 0],
            [0, 0, 0, 4, 3, 1, 0.2],
            [5, 5, 0, 1, 1, 1, 0.7],
        ]
    )
    shared = intersection_bev(unit.expand(len(others), 7), others)
    torch.testing.assert_close(shared, torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0, 0.0]), atol=1e-6, rtol=0)


def test_overlaps_do_not_depend_on_the_frame():
    a, b = random_boxes(50, 4), random_boxes(60, 5)
    far = torch.zeros(7, dtype=a.dtype)
    far[:3] = torch.tensor([5e4, -3e4, 10.0])
    for one, other in zip(box_iou(a, b), box_iou(a + far, b + far), strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


def test_all_pairs_equal_single_pairs_and_height_counts():
    a, b = random_boxes(20, 6), random_boxes(30, 7)
    bev, whole = box_iou(a, b)
    for i, j in [(0, 0), (3, 7), (19, 29), (5, 5)]:
        one = paired_iou(a[i : i + 1], b[j : j + 1])
        torch.testing.assert_close(torch.stack([bev[i, j], whole[i, j]]), torch.cat(one))
    above = a.clone()
    above[:, 2] += 10
    assert float(box_iou(a, above)[1].max()) == 0
    assert float(box_iou(a, above)[0].diagonal().min()) > 0.999


def test_suppression_equals_the_greedy_loop():
    boxes = random_boxes(150, 8, spread=12)
    scores = (torch.rand(150, generator=torch.Generator().manual_seed(9)) * 20).round() / 20  # with ties
    bev, _ = box_iou(boxes, boxes)
    for threshold in (0.1, 0.3, 0.7):
        kept: list[int] = []
        for row in scores.argsort(descending=True, stable=True).tolist():
            if all(bev[row, other] <= threshold for other in kept):
                kept.append(row)
        assert rotated_nms(boxes, scores, threshold).tolist() == kept
        assert rotated_nms(boxes, scores, threshold, most=5).tolist() == kept[:5]
    assert rotated_nms(boxes[:0], scores[:0], 0.5).numel() == 0


def test_boxes_without_size_are_refused():
    boxes = random_boxes(4)
    boxes[2, 4] = 0
    with pytest.raises(DataError, match="row 2 has the dimensions.*remove them"):
        rotated_nms(boxes, torch.ones(4), 0.5)
    with pytest.raises(DataError, match="row 2"):
        box_iou(boxes, boxes)
    with pytest.raises(DataError, match="finite scores"):
        rotated_nms(random_boxes(4), torch.full((4,), math.nan), 0.5)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        rotated_nms(random_boxes(4), torch.ones(4), 1.5)


def test_kitti_labels_there_and_back():
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.rand(3, 3, generator=generator, dtype=torch.float64))
    transform = torch.eye(4, dtype=torch.float64)
    transform[:3, :3], transform[:3, 3] = rotation, torch.tensor([0.1, -0.2, 0.3])
    boxes = random_boxes(20, 10)
    boxes[:, 6] = wrapped(boxes[:, 6])
    torch.testing.assert_close(from_kitti_camera(to_kitti_camera(boxes, transform), transform), boxes)
    torch.testing.assert_close(from_bottom_centre(to_bottom_centre(boxes)), boxes)
    assert float((to_bottom_centre(boxes)[:, 2] - boxes[:, 2] + boxes[:, 5] / 2).abs().max()) < 1e-12


def test_quaternions_and_sustech():
    yaw = torch.linspace(-3, 3, 7)
    rotation = torch.stack([(yaw / 2).cos(), 0 * yaw, 0 * yaw, (yaw / 2).sin()], 1)
    centre, size = torch.arange(21.0).view(7, 3), torch.tensor([[1.0, 4.0, 2.0]]).expand(7, 3)
    nuscenes = from_quaternion(centre, size, rotation, "wlh")
    torch.testing.assert_close(nuscenes[:, 3:], torch.cat([torch.tensor([[4.0, 1, 2]] * 7), yaw[:, None]], 1))
    argoverse = from_quaternion(centre, size, -rotation, "lwh")  # q and -q are one rotation
    torch.testing.assert_close(
        argoverse[:, 3:], torch.cat([torch.tensor([[1.0, 4, 2]] * 7), yaw[:, None]], 1)
    )
    with pytest.raises(ConfigError, match="wlh"):
        from_quaternion(centre, size, rotation, "hwl")
    labels = torch.tensor([[1.0, 2, 3, 4, 5, 6, 0.1, -0.1, 4.0]])
    torch.testing.assert_close(from_sustech(labels)[0, 6], torch.tensor(4.0 - 2 * math.pi))


@needs_data
@pytest.mark.parametrize(
    ("folder", "name", "share"),
    [
        ("lidar-kitti-mini", "000008", 1.0),
        ("lidar-kitti-mini", "000134", 1.0),
        ("lidar-nuscenes-1", "sample_ca9a282c", 1.0),
        ("lidar-sustech-4", "000950", 1.0),
        ("lidar-av2-mini", "7fab2350_315966265259836000", 1.0),
    ],
)
def test_points_in_the_boxes_of_real_frames(folder, name, share):
    """The counts that are stored beside the frames. Points on a face may fall to either side."""
    frame = real_frame(folder, name)
    found = points_per_box(frame.points[:, :3].double(), frame.boxes.double())
    assert int((found - frame.hits).abs().sum()) <= max(2, int(0.001 * int(frame.hits.sum())))


@needs_data
def test_kitti_camera_boxes_hold_the_points_only_with_the_shift_of_half_a_height():
    with np.load(os.path.join(os.environ["ZOO_DATA"], "lidar-kitti-mini", "000008.npz")) as file:
        transform = torch.from_numpy(file["velo_to_rect"])
    frame = real_frame("lidar-kitti-mini", "000008")
    boxes, xyz = frame.boxes.double(), frame.points[:, :3].double()
    again = from_kitti_camera(to_kitti_camera(boxes, transform), transform)
    assert points_per_box(xyz, again).tolist() == points_per_box(xyz, boxes).tolist()
    wrong = points_per_box(xyz, to_bottom_centre(boxes))  # what mmdetection3d calls the place of the same box
    assert bool((wrong < 0.75 * frame.hits).any())


@needs_data
def test_stated_counts_of_nuscenes():
    with np.load(os.path.join(os.environ["ZOO_DATA"], "lidar-nuscenes-1", "sample_ca9a282c.npz")) as file:
        stated = torch.from_numpy(file["stated_points"].astype(np.int64))
    frame = real_frame("lidar-nuscenes-1", "sample_ca9a282c")
    found = points_per_box(frame.points[:, :3].double(), frame.boxes.double())
    assert int(stated.sum()) == 999 and abs(int(found.sum()) - 984) <= 2
    assert float(torch.corrcoef(torch.stack([found, stated]).double())[0, 1]) > 0.999


def test_names_of_classes():
    names = ["Car", "REGULAR_VEHICLE", "vehicle.car", "pedestrian", "Rider", "BICYCLE", "traffic_cone"]
    assert [label_of(name) for name in names] == [1, 1, 1, 2, 3, 3, 0]
    with pytest.raises(DataError, match="ZOO_DATA"):
        real_frame("lidar-nothing", "0")


def test_points_in_boxes_by_hand():
    box = torch.tensor([[1.0, 1.0, 0.0, 4.0, 2.0, 2.0, math.pi / 2]])
    points = torch.tensor(
        [[1.0, 2.9, 0.9], [1.0, 3.1, 0.0], [1.9, 1.0, 0.0], [2.1, 1.0, 0.0], [1.0, 1.0, 1.1]]
    )
    assert points_in_boxes(points, box).tolist() == [[True, False, True, False, False]]


def detections(rows: list[tuple[float, float]]) -> Detections:
    """Unit boxes at x with a score."""
    boxes = torch.tensor([[x, 0.0, 0, 1, 1, 1, 0] for x, _ in rows]).view(-1, 7)
    return Detections(boxes, torch.tensor([s for _, s in rows]), torch.ones(len(rows), dtype=torch.int64))


def truth(places: list[float], ignored: list[bool] | None = None) -> Truth:
    boxes = torch.tensor([[x, 0.0, 0, 1, 1, 1, 0] for x in places]).view(-1, 7)
    left_out = torch.tensor(ignored or [False] * len(places), dtype=torch.bool)
    return Truth(boxes, torch.ones(len(places), dtype=torch.int64), left_out)


def test_average_precision_by_hand():
    # Of two boxes the first is found by the best detection, the second by the third: precision 1 up to recall
    # 1/2, and 2/3 after.
    found = detections([(0.0, 0.9), (20.0, 0.8), (10.0, 0.7), (0.1, 0.6)])
    bev, whole = match(found, truth([0.0, 10.0]), 1, 0.5)
    assert bev.right.tolist() == [True, False, True, False] and bev.truths == 2
    assert average_precision([bev]) == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    assert average_precision([whole]) == average_precision([bev])
    assert average_precision([match(found, truth([]), 1, 0.5)[0]]) != average_precision([bev])
    assert math.isnan(average_precision([match(detections([]), truth([]), 1, 0.5)[0]]))
    assert average_precision([match(detections([]), truth([0.0]), 1, 0.5)[0]]) == 0
    assert average_precision([match(detections([(0.0, 0.5)]), truth([0.0]), 1, 0.5)[0]]) == 100


def test_ignored_boxes_cost_nothing_and_earn_nothing():
    found = detections([(0.0, 0.9), (10.0, 0.8)])
    bev, _ = match(found, truth([0.0, 10.0], [True, False]), 1, 0.5)
    assert bev.right.tolist() == [True] and bev.truths == 1
    # A box that counts goes before an ignored one that overlaps more.
    bev, _ = match(detections([(0.2, 0.9)]), truth([0.2, 0.0], [True, False]), 1, 0.5)
    assert bev.right.tolist() == [True]


def test_classes_are_matched_apart():
    found, theirs = detections([(0.0, 0.9)]), truth([0.0])
    assert match(found, theirs, 2, 0.5)[0].truths == 0
    assert not match(found, Truth(theirs.boxes, theirs.labels + 1, theirs.ignored), 1, 0.5)[0].right.any()


def test_equal_scores_stand_together():
    mixed = detections([(0.0, 0.5), (20.0, 0.5)])
    turned = detections([(20.0, 0.5), (0.0, 0.5)])
    values = [average_precision([match(d, truth([0.0]), 1, 0.5)[0]]) for d in (mixed, turned)]
    assert values == [50.0, 50.0]


def test_jackknife_error():
    frames = [
        match(detections([(0.0, s)]), truth([x]), 1, 0.5)[0]
        for s, x in [(0.9, 0), (0.8, 5), (0.7, 0), (0.6, 0)]
    ]
    value, error = with_error([frames])
    left = [average_precision(frames[:i] + frames[i + 1 :]) for i in range(4)]
    assert value == average_precision(frames)
    assert error == pytest.approx(math.sqrt(3 / 4 * sum((v - sum(left) / 4) ** 2 for v in left)))
    assert with_error([frames[:1]])[1] == 0
