"""The plug-ins, trained and measured by nerfstudio's own commands: `make test-nerfstudio` runs this."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.neural3d.shapes import shapes
from zoo.neural3d.views import View

pytestmark = pytest.mark.skipif(
    "ZOO_NERFSTUDIO" not in os.environ, reason="make test-nerfstudio runs this in an environment of its own"
)

STEPS = 60


def nerfstudio(folder: Path, *words: str) -> None:
    """Run one of its commands in a process of its own, as a user does."""
    launcher = Path(__file__).with_name("nerfstudio_command.py")
    ran = subprocess.run([sys.executable, launcher, *words], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]


def frame(view: View, folder: Path, ending: str) -> dict[str, object]:
    """A picture as nerfstudio and Blender note it, written to the folder, with its depth."""
    assert view.depth is not None
    name = view.name.replace(" ", "-")
    Image.fromarray((view.image * 255).round().byte().numpy()).save(folder / f"{name}.png")
    np.save(folder / f"{name}.npy", view.depth.numpy())
    pose = view.camera.to_world * torch.tensor([1.0, -1.0, -1.0, 1.0])
    return {
        "file_path": name + ending,
        "depth_file_path": f"{name}.npy",
        "transform_matrix": pose.tolist(),
    }


@pytest.fixture(scope="module")
def blender(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blender")
    views = shapes(48, train=12, test=3)
    focal = float(views.train[0].camera.intrinsics[0, 0])
    for split, own in (("train", views.train), ("val", views.test), ("test", views.test)):
        frames = [frame(view, folder, "") for view in own]
        held = {"camera_angle_x": 2 * float(np.arctan(24 / focal)), "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(held))
    return folder


@pytest.fixture(scope="module")
def with_depth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    views = shapes(48, train=6, test=2)
    k = views.train[0].camera.intrinsics
    train, test = ([frame(view, folder, ".png") for view in own] for own in (views.train, views.test))
    held = {
        "fl_x": float(k[0, 0]),
        "fl_y": float(k[1, 1]),
        "cx": float(k[0, 2]),
        "cy": float(k[1, 2]),
        "w": 48,
        "h": 48,
        "frames": train + test,
        "train_filenames": [one["file_path"] for one in train],
        "val_filenames": [one["file_path"] for one in test],
        "test_filenames": [one["file_path"] for one in test],
    }
    (folder / "transforms.json").write_text(json.dumps(held))
    return folder


def trained(
    method: str, data: Path, out: Path, *words: str
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Figures of `ns-eval` and the checkpoint's model after `STEPS` steps of `ns-train`."""
    nerfstudio(
        out,
        *("ns-train", method, "--data", str(data), "--output-dir", str(out), "--experiment-name", "shapes"),
        *("--timestamp", "now", "--max-num-iterations", str(STEPS), "--machine.device-type", "cpu", *words),
    )
    (config,) = out.glob(f"shapes/{method}/now/config.yml")
    nerfstudio(out, "ns-eval", "--load-config", str(config), "--output-path", str(out / "figures.json"))
    (checkpoint,) = config.parent.glob("nerfstudio_models/*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["pipeline"]
    return json.loads((out / "figures.json").read_text())["results"], state


def test_hollow_nerf_trains_hardens_and_is_evaluated_as_it_was_saved(blender: Path, tmp_path: Path) -> None:
    figures, state = trained(
        "hollow-nerf", blender, tmp_path, "--pipeline.model.cells", "16", "--pipeline.model.bound", "0.1"
    )
    saliency, table = state["_model.field.saliency"], state["_model.field.table"]
    assert bool(state["_model.hardened"])
    assert 0 < float((saliency == 0).float().mean()) < 1
    # Entries that no kept cell reaches are zero, after a fifth of the steps with momentum.
    assert bool((table == 0).all(1).any())
    assert figures["psnr"] > 14 and 0 < figures["ssim"] <= 1
    assert "lpips" not in figures


def test_splats_lose_half_of_their_rows_on_the_way(blender: Path, tmp_path: Path) -> None:
    figures, state = trained("zoo-splats", blender, tmp_path, "--pipeline.model.count", "600")
    assert len(state["_model.scene.means"]) == 300
    assert figures["psnr"] > 12


def test_sparse_nerf_takes_depth_of_nerfstudio_s_own_parser(with_depth: Path, tmp_path: Path) -> None:
    figures, state = trained("sparse-nerf", with_depth, tmp_path, "--pipeline.model.count", "600")
    assert len(state["_model.scene.means"]) == 600
    assert figures["psnr"] > 10
