"""Scenes, detectors, their head, training, OpenPCDet's names, and the experiment's parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zoo.errors import ConfigError, DataError, TaskError
from zoo.shared.measure.account import count
from zoo.vision.lidar.average_precision import Detections
from zoo.vision.lidar.bev import BEVConfig, scatter_bev
from zoo.vision.lidar.boxes import points_per_box, wrapped
from zoo.vision.lidar.center_head import CenterHead, HeadConfig, diou, focal_loss, gaussian_radius
from zoo.vision.lidar.data import Batch, Frame, FrameBatches, augmented, scene_frames
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.dsvt import DSVT, DSVTConfig
from zoo.vision.lidar.openpcdet import OpenPCDetBackbone, detector_from_openpcdet, load_openpcdet_state
from zoo.vision.lidar.scenes import CLASSES, SceneConfig, make_scene
from zoo.vision.lidar.tasks import Scenes, detections, scores, truth_of
from zoo.vision.lidar.train import detector_job, detector_recipe
from zoo.vision.lidar.voxelise import Grid
from zoo.vision.studies.dsvt import DETECTORS as ARMS
from zoo.vision.studies.dsvt import DSVTOptions, equal_time_epochs, make_arm

TINY = SceneConfig(beams=12, steps=96, objects=((1, 2), (1, 2), (1, 1)), distractors=(1, 2))


def tiny_frames(count: int = 4, split: str = "train") -> tuple[Frame, ...]:
    return scene_frames(split, count, TINY)


def batch_of(frames: tuple[Frame, ...]) -> Batch:
    return FrameBatches(frames, len(frames)).take(range(len(frames)))


def openpcdet(voxel: bool = False) -> dict:
    """A small configuration with the keys of the released ones."""
    stages = 3 if voxel else 1
    backbone = {
        "NAME": "DSVT",
        "INPUT_LAYER": {
            "sparse_shape": [32, 32, 8 if voxel else 1],
            "downsample_stride": [[1, 1, 4], [1, 1, 2]][: stages - 1],
            "d_model": [16] * stages,
            "set_info": [[12, 1]] * stages,
            "window_shape": [[6, 6, 8], [6, 6, 2], [6, 6, 1]][-stages:],
            "hybrid_factor": [2, 2, 1],
            "shifts_list": [[[0, 0, 0], [3, 3, 0]]] * stages,
            "normalize_pos": False,
        },
        "block_name": ["DSVTBlock"] * stages,
        "set_info": [[12, 1]] * stages,
        "d_model": [16] * stages,
        "nhead": [4] * stages,
        "dim_feedforward": [32] * stages,
        "dropout": 0.0,
        "activation": "gelu",
        "reduction_type": "attention",
        "output_shape": [32, 32],
        "conv_out_channel": 16,
    }
    branch = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "iou": 1}
    head = {
        "NAME": "CenterHead",
        "CLASS_NAMES_EACH_HEAD": [["Vehicle", "Pedestrian", "Cyclist"]],
        "SHARED_CONV_CHANNEL": 16,
        "SEPARATE_HEAD_CFG": {
            "HEAD_DICT": {k: {"out_channels": v, "num_conv": 2} for k, v in branch.items()}
        },
        "TARGET_ASSIGNER_CONFIG": {"GAUSSIAN_OVERLAP": 0.1, "MIN_RADIUS": 2},
        "POST_PROCESSING": {
            "SCORE_THRESH": 0.1,
            "MAX_OBJ_PER_SAMPLE": 50,
            "IOU_RECTIFIER": [0.68, 0.71, 0.65],
            "NMS_CONFIG": {"NMS_THRESH": [0.7, 0.6, 0.55], "NMS_POST_MAXSIZE": [50, 50, 50]},
        },
    }
    return {
        "CLASS_NAMES": ["Vehicle", "Pedestrian", "Cyclist"],
        "DATA_CONFIG": {
            "POINT_CLOUD_RANGE": [-12.8, -12.8, -3, 12.8, 12.8, 1],
            "DATA_PROCESSOR": [{"NAME": "x"}, {"NAME": "y", "VOXEL_SIZE": [0.8, 0.8, 0.5 if voxel else 4]}],
        },
        "MODEL": {
            "VFE": {
                "NAME": "DynPillarVFE3D" if voxel else "DynPillarVFE",
                "WITH_DISTANCE": False,
                "USE_ABSLOTE_XYZ": True,
                "USE_NORM": True,
                "NUM_FILTERS": [16, 16],
            },
            "BACKBONE_3D": backbone,
            "BACKBONE_2D": {
                "NAME": "BaseBEVResBackbone",
                "LAYER_NUMS": [1, 1],
                "LAYER_STRIDES": [1, 2],
                "NUM_FILTERS": [16, 16],
                "UPSAMPLE_STRIDES": [0.5, 1],
                "NUM_UPSAMPLE_FILTERS": [8, 8],
            },
            "DENSE_HEAD": head,
        },
    }


def test_scenes_are_seeded_and_their_points_lie_where_they_say():
    one, again, other = make_scene(3), make_scene(3), make_scene(4)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert len(one.points) != len(other.points)
    found = points_per_box(
        torch.from_numpy(one.points[:, :3]).double(),
        torch.from_numpy(one.boxes + np.float32([0, 0, 0, 0.3, 0.3, 0.3, 0])).double(),
    )
    assert bool((found >= torch.from_numpy(one.hits) * 0.98).all()) and int(found.sum()) < 2 * one.hits.sum()
    assert set(one.labels) == {1, 2, 3} and one.points.dtype == np.float32
    assert float(np.abs(one.points[:, :2]).max()) < SceneConfig().extent


def test_rays_stop_at_the_nearest_surface():
    """Without noise nothing is seen behind or under anything: ranges grow only where objects end."""
    calm = SceneConfig(noise=0.0, lost=0.0, slope=0.0, beams=8, steps=128)
    scene = make_scene(0, calm)
    ground = np.abs(scene.points[:, 2] + calm.height) < 1e-4
    assert 0.2 < ground.mean() < 1
    # A ground point is the plane's own intersection with its ray: its elevation gives its range.
    points = scene.points[ground]
    elevation = np.degrees(np.arctan2(points[:, 2], np.linalg.norm(points[:, :2], axis=1)))
    steps = (elevation - calm.lowest) / ((calm.highest - calm.lowest) / (calm.beams - 1))
    np.testing.assert_allclose(steps, steps.round(), atol=1e-2)


def test_boxes_do_not_overlap_in_scenes():
    for seed in range(5):
        boxes = make_scene(seed).boxes
        apart = np.linalg.norm(boxes[:, None, :2] - boxes[None, :, :2], axis=2)
        reach = np.hypot(boxes[:, 3], boxes[:, 4]) / 2
        np.fill_diagonal(apart, 100)
        assert bool((apart > reach[:, None] + reach[None]).all())


def test_augmentation_keeps_points_in_their_boxes():
    frames = tiny_frames()
    batch = batch_of(frames)
    moved = augmented(batch, torch.Generator().manual_seed(1))
    assert not torch.allclose(moved.points, batch.points)
    for frame in range(len(frames)):
        before, after = (
            points_per_box(
                b.points[b.points[:, 0] == frame, 1:4].double(),
                (row := b.gt_boxes[frame])[row[:, 7] > 0][:, :7].double() * 1.0,
            )
            for b in (batch, moved)
        )
        assert int((before - after).abs().sum()) <= 2
    assert torch.equal(moved.gt_boxes[..., 7], batch.gt_boxes[..., 7])
    assert float(moved.gt_boxes[..., 6].abs().max()) <= math.pi + 1e-6


def head_and_boxes() -> tuple[CenterHead, torch.Tensor]:
    grid = Grid.of([-12.8, -12.8, -3, 12.8, 12.8, 1], [0.8, 0.8, 4])
    config = HeadConfig(CLASSES, channels=8, nms=(0.2,) * 3, rectify=(0.5,) * 3)
    boxes = torch.zeros(2, 3, 8)
    boxes[0, 0] = torch.tensor([1.0, 2.0, -0.9, 4.2, 1.8, 1.6, 0.7, 1])
    boxes[0, 1] = torch.tensor([-6.3, 5.1, -1.0, 0.8, 0.7, 1.7, -2.0, 2])
    boxes[1, 0] = torch.tensor([10.0, -11.0, -0.8, 1.8, 0.6, 1.7, 3.0, 3])
    return CenterHead(config, 8, grid, 1), boxes


def perfect_maps(head: CenterHead, boxes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The maps that say exactly what is there."""
    target = head.targets(boxes, (32, 32))
    maps = {"hm": torch.logit(target.heat.clamp(1e-4, 1 - 1e-4)), "iou": torch.ones(2, 1, 32, 32)}
    for name, value in target.values.items():
        flat = torch.zeros(2, value.shape[1], 32 * 32)
        flat[target.frame, :, target.cell] = value
        maps[name] = flat.unflatten(2, (32, 32))
    return maps


def test_targets_decode_to_the_boxes_they_were_made_of():
    head, boxes = head_and_boxes()
    found = head.decode(perfect_maps(head, boxes))
    for frame, one in enumerate(found):
        real = boxes[frame][boxes[frame, :, 7] > 0]
        best = one.scores > 0.99
        assert sorted(one.labels[best].tolist()) == sorted(real[:, 7].int().tolist())
        for box, label in zip(one.boxes[best], one.labels[best], strict=True):
            torch.testing.assert_close(box, real[real[:, 7] == label][0, :7], atol=1e-5, rtol=1e-5)


def test_losses_of_perfect_and_of_wrong_maps():
    head, boxes = head_and_boxes()
    good = head.losses(perfect_maps(head, boxes), boxes)
    assert float(good["box"]) < 1e-5 and float(good["diou"]) < 1e-5 and float(good["iou"]) < 1e-5
    assert float(good["heat"]) < 0.5
    wrong = {name: torch.zeros_like(value) for name, value in perfect_maps(head, boxes).items()}
    bad = head.losses(wrong, boxes)
    assert all(float(bad[name]) > float(good[name]) + 0.5 for name in good)
    empty = head.losses(wrong, torch.zeros(2, 1, 8))
    assert float(empty["box"]) == 0 and math.isfinite(float(empty["heat"]))


def test_heat_maps_by_hand():
    head, boxes = head_and_boxes()
    target = head.targets(boxes, (32, 32))
    row, column = int((2.0 + 12.8) / 0.8), int((1.0 + 12.8) / 0.8)
    assert float(target.heat[0, 0, row, column]) == 1
    sigma = 5 / 6  # radius 2, the least
    assert float(target.heat[0, 0, row, column + 2]) == pytest.approx(math.exp(-4 / (2 * sigma**2)))
    assert float(target.heat[0, 0, row, column + 3]) == 0
    assert float(target.heat[:, :, :, :].sum(dim=(2, 3))[1, 0]) == 0
    radius = float(gaussian_radius(torch.tensor([5.25]), torch.tensor([2.25]), 0.1))
    assert radius == pytest.approx((-1.5 + math.sqrt(2.25 + 16 * 0.1 * 0.9 * 5.25 * 2.25)) / 2, rel=1e-5)


def test_focal_loss_and_diou_by_hand():
    logits, heat = torch.tensor([0.0, 0.0, -50.0]), torch.tensor([1.0, 0.5, 0.0])
    expected = -(0.25 * math.log(0.5) + 0.5**4 * 0.25 * math.log(0.5))
    assert float(focal_loss(logits, heat)) == pytest.approx(expected, abs=1e-6)
    a = torch.tensor([[0.0, 0, 0, 2, 2, 2, 0]])
    b = torch.tensor([[1.0, 0, 0, 2, 2, 2, 1.0]])
    assert float(diou(a, a)) == 1
    assert float(diou(a, b)) == pytest.approx(4 / 12 - 1 / (9 + 4 + 4))


def test_bad_boxes_and_labels_are_refused():
    head, boxes = head_and_boxes()
    flat = boxes.clone()
    flat[0, 0, 4] = 0
    with pytest.raises(DataError, match="gt_boxes: row 0 has the dimensions.*remove them"):
        head.targets(flat, (32, 32))
    boxes[0, 0, 7] = 4
    with pytest.raises(DataError, match="labels go from 1 to 3"):
        head.targets(boxes, (32, 32))
    with pytest.raises(ConfigError, match="nms needs a number"):
        HeadConfig(CLASSES, nms=(0.5,))
    with pytest.raises(ConfigError, match="differ in number"):
        BEVConfig(layer_nums=(1, 1))
    with pytest.raises(ConfigError, match="maps of different size"):
        BEVConfig(upsample_strides=(1, 2, 2))


def test_columns_on_the_map():
    coords = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 0]])
    bev = scatter_bev(torch.tensor([[1.0, 2], [3, 4]]), coords, (5, 4, 2), 2)
    assert tuple(bev.shape) == (2, 4, 4, 5)
    assert bev[0, :, 2, 3].tolist() == [0, 0, 1, 2] and bev[1, :, 0, 0].tolist() == [3, 4, 0, 0]
    assert int((bev != 0).sum()) == 4


def test_arms_have_equal_parameters():
    sizes = {name: sum(p.numel() for p in make_arm(name, 0).parameters()) for name in ARMS}
    assert max(sizes.values()) / min(sizes.values()) < 1.03
    with pytest.raises(ConfigError, match="Unknown arm 'dsvd'"):
        make_arm("dsvd", 0)


@pytest.mark.parametrize("name", list(ARMS))
def test_arms_train_and_detect(name):
    frames = tiny_frames()
    fit = detector_job(frames, detector_recipe(3, 2, 2e-3)).fit(make_arm(name, 0), macs=lambda: 0.0)
    losses = []
    fit.run(on_epoch=lambda f: losses.append(f.last_loss))
    assert losses[-1] < losses[0]
    found = detections(fit.model, frames)
    measured = scores(found, [truth_of(frame) for frame in frames])
    assert {"bev_ap", "ap_3d", "bev_ap_loose", "ap_3d_loose"} <= measured.keys()
    assert all(0 <= m.value <= 100 for m in measured.values())


def test_a_resumed_training_equals_an_uninterrupted_one():
    job = detector_job(tiny_frames(), detector_recipe(epochs=2, batch=2))
    whole = job.fit(make_arm("dsvt", 0), macs=lambda: 0.0).run()
    first = job.fit(make_arm("dsvt", 0), macs=lambda: 0.0)
    first.run(until=1)
    second = job.fit(make_arm("dsvt", 1), macs=lambda: 0.0)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    second.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_detections_do_not_depend_on_points_order_or_threads():
    model = make_arm("dsvt", 0).eval()
    batch = batch_of(tiny_frames())
    order = torch.randperm(len(batch.points), generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for points, threads in ((batch.points, 1), (batch.points[order], 1), (batch.points, 2)):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(model.maps(points, 4))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]) and torch.equal(value, found[2][name])


def test_batch_dict_in_both_modes():
    model, batch = make_arm("dense pillars", 0), batch_of(tiny_frames())
    given = {
        "points": batch.points,
        "batch_size": 5,
        "gt_boxes": torch.nn.functional.pad(batch.gt_boxes, (0, 0, 0, 0, 0, 1)),
    }
    terms = model.train()(given)
    total = sum(float(value.detach()) for name, value in terms.items() if name != "loss")
    assert float(terms["loss"].detach()) == pytest.approx(total, rel=1e-5)
    found = model.eval()(given)
    assert len(found) == 5 and sorted(given) == ["batch_size", "gt_boxes", "points"]
    assert set(found[0]) == {"pred_boxes", "pred_scores", "pred_labels"}
    with pytest.raises(DataError, match="batch_dict lacks 'batch_size'"):
        model({"points": batch.points})


@pytest.mark.parametrize("voxel", [False, True])
def test_openpcdet_configurations(voxel):
    torch.manual_seed(0)
    model = detector_from_openpcdet(openpcdet(voxel))
    names = set(model.state_dict())
    assert {
        "vfe.pfn_layers.0.linear.weight",
        "vfe.pfn_layers.1.norm.running_mean",
        "backbone_3d.stage_0.0.encoder_list.1.win_attn.self_attn.in_proj_weight",
        "backbone_3d.stage_0.0.encoder_list.0.norm.bias",
        "backbone_3d.residual_norm_stage_0.0.weight",
        "backbone_3d.input_layer.posembed_layers.0.0.1.position_embedding_head.3.weight",
        "backbone_2d.blocks.0.0.downsample_layer.0.weight",
        "backbone_2d.deblocks.1.0.weight",
        "dense_head.shared_conv.0.weight",
        "dense_head.heads_list.0.center.0.0.weight",
        "dense_head.heads_list.0.hm.1.bias",
    } <= names
    assert ("backbone_3d.stage_1_reduction.pos_embedding" in names) is voxel
    batch = batch_of(tiny_frames(2))
    maps = model.eval().maps(batch.points, 2)
    assert tuple(maps["hm"].shape) == (2, 3, 16, 16)  # upsample stride 1/2 of the first level
    assert model.dense_head.stride == 2


def test_openpcdet_configurations_that_are_not_understood():
    def changed(path: str, value: object) -> dict:
        config = openpcdet()
        *parents, last = path.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
        return config

    for path, value, message in [
        ("MODEL.DENSE_HEAD.NAME", "TransFusionHead", "DENSE_HEAD 'TransFusionHead' is not understood"),
        (
            "MODEL.BACKBONE_3D.INPUT_LAYER.sparse_shape",
            [30, 32, 1],
            "sparse_shape .30, 32, 1. is not the grid",
        ),
        ("MODEL.BACKBONE_3D.activation", "relu", "activation must be 'gelu'"),
        ("MODEL.BACKBONE_3D.INPUT_LAYER.window_shap", [], "unknown key 'window_shap'.*window_shape"),
        ("DATA_CONFIG.POINT_CLOUD_RANGE", [-12.8, -12.8, -3, 12.9, 12.8, 1], "whole number of voxels"),
    ]:
        with pytest.raises(ConfigError, match=message):
            detector_from_openpcdet(changed(path, value))
    config = openpcdet()
    del config["MODEL"]["VFE"]
    with pytest.raises(ConfigError, match="lacks 'VFE'"):
        detector_from_openpcdet(config)


def test_state_dicts_of_another_variant_are_refused():
    pillar, voxel = (detector_from_openpcdet(openpcdet(v)) for v in (False, True))
    other = detector_from_openpcdet(openpcdet(False))
    load_openpcdet_state(other, {**pillar.state_dict(), "global_step": torch.tensor(1)})
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in pillar.state_dict().items())
    backbone = DSVT(pillar.backbone_3d.config)
    load_openpcdet_state(backbone, pillar.state_dict())
    assert torch.equal(
        backbone.stage_0[0].encoder_list[0].norm.weight,
        pillar.backbone_3d.stage_0[0].encoder_list[0].norm.weight,
    )
    with pytest.raises(ConfigError, match="a state dict of another variant"):
        load_openpcdet_state(pillar, voxel.state_dict())
    with pytest.raises(ConfigError, match="a state dict of another variant"):
        load_openpcdet_state(voxel, pillar.state_dict())
    wide = {
        k: torch.cat([v, v]) if k.endswith("linear1.weight") else v for k, v in pillar.state_dict().items()
    }
    with pytest.raises(ConfigError, match=r"linear1.weight' is \[64, 16\], this network has \[32, 16\]"):
        load_openpcdet_state(pillar, wide)


def test_the_backbone_as_openpcdet_calls_it():
    config = DSVTConfig((8, 8, 1), ((4, 4, 1),), ((5, 1),), (16,), (4,), (32,))
    layer = OpenPCDetBackbone(config).eval()
    coords = torch.tensor([[0, 0, 1, 2], [0, 0, 5, 5]], dtype=torch.int32)
    given = {"voxel_features": torch.randn(2, 16), "voxel_coords": coords, "batch_size": 1}
    out = layer(given)
    assert out is given and out["pillar_features"] is out["voxel_features"]
    assert layer.num_point_features == 16
    with pytest.raises(DataError, match="lacks 'voxel_coords'"):
        layer({"voxel_features": torch.zeros(2, 16), "batch_size": 1})


def test_operations_grow_with_the_voxels():
    """Sparse convolutions and attention count what occupied voxels cost."""
    few, many = (FrameBatches(scene_frames("train", 1, c), 1).take([0]) for c in (TINY, SceneConfig()))
    for name in ("dsvt", "sparse convolution"):
        model = make_arm(name, 0).eval()
        costs = [
            {
                layer.name: layer.macs
                for layer in count(model, ({"points": b.points, "batch_size": 1},)).layers
            }
            for b in (few, many)
        ]
        sums = [sum(v for k, v in cost.items() if k.startswith("backbone_3d")) for cost in costs]
        assert 0 < sums[0] < sums[1]
        assert costs[0]["dense_head.shared_conv.0"] == costs[1]["dense_head.shared_conv.0"]


def test_the_task_takes_detectors_only(monkeypatch):
    monkeypatch.setattr(Scenes, "frames", 2)
    task, model = Scenes(), make_arm("dense pillars", 0).eval()
    result = task.evaluate(model)
    assert result.n == 2 and result.metrics["bev_ap_loose"].stderr is not None
    assert result.metrics == task.evaluate(model).metrics
    flops = task.flops(model)
    assert flops is not None and flops.dense == flops.sparse > 0
    with pytest.raises(TaskError, match="takes detectors of Car, Pedestrian, Cyclist"):
        task.evaluate(torch.nn.Linear(1, 1))


def test_equal_time_gives_faster_arms_more_epochs():
    config = DSVTOptions(arms=("dsvt", "dense pillars"), epochs=10)
    assert equal_time_epochs(config, {"dsvt": 0.3, "dense pillars": 0.2}) == {"dsvt": 10, "dense pillars": 15}
    with pytest.raises(ConfigError, match="Unknown arm"):
        DSVTOptions(arms=("dsvd",))


def test_angles_wrap():
    angles = torch.tensor([0.0, 3.5, -3.5, math.pi, 9 * math.pi / 2])
    expected = torch.tensor([0, 3.5 - 2 * math.pi, 2 * math.pi - 3.5, -math.pi, math.pi / 2])
    torch.testing.assert_close(wrapped(angles), expected)


def test_unknown_parts_are_refused():
    arguments = {**ARMS["dense pillars"], "encoder": "pilars"}
    with pytest.raises(ConfigError, match="Unknown encoder 'pilars'.*pillars"):
        Detector(**arguments)
    with pytest.raises(ConfigError, match="an option that the detector does not have"):
        Detector(**{**ARMS["dsvt"], "head": {**ARMS["dsvt"]["head"], "colour": 1}})
    with pytest.raises(ConfigError, match="no options"):
        Detector(**{**ARMS["dense pillars"], "backbone": {"d": 1}})
    with pytest.raises(DataError, match="'train' or 'test'"):
        scene_frames("val", 1)


def test_empty_detections_score_nothing():
    frames = tiny_frames(2)
    none = Detections(torch.zeros(0, 7), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    measured = scores([none, none], [truth_of(frame) for frame in frames])
    assert measured["bev_ap"].value == 0
