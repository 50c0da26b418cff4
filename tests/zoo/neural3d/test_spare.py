"""The benchmark of sparse rendering: round trips of a small one, figures and cameras by hand, refusals."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.neural3d.cameras import orbit
from zoo.neural3d.spare import (
    SceneSplit,
    camera_of,
    evaluate,
    image_name,
    pack,
    read_projection,
    read_split,
    read_submission,
    score,
    write_split,
)
from zoo.neural3d.views import View

SPLIT = {"a": SceneSplit((0, 5), (1, 2), "DTU"), "b": SceneSplit((3,), (0, 4), "SpaRe")}
SIZE = {"a": (32, 24), "b": (32, 24)}


def truth() -> dict[str, dict[int, View]]:
    generator = torch.Generator().manual_seed(0)
    cameras = orbit(torch.zeros(3), 2.0, 6, (32, 24))
    mask = torch.zeros(24, 32)
    mask[4:20, 6:26] = 1
    return {
        scene: {
            number: View(camera, (torch.rand(24, 32, 3, generator=generator) * 255).round() / 255, mask)
            for number, camera in enumerate(cameras)
        }
        for scene in SPLIT
    }


def image(scene: str, view: int) -> Tensor:
    return truth()[scene][view].image


def test_what_is_packed_is_read_and_scored(tmp_path: Path) -> None:
    write_split(tmp_path / "Track1_split_test.json", SPLIT)
    split = read_split(tmp_path / "Track1_split_test.json")
    assert split == SPLIT
    assert image_name("DTU", 0) == "rect_001_3_r5000.png" and image_name("SpaRe", 9) == "cam_010_3_0000.png"
    found = read_submission(pack(tmp_path / "s.zip", split, image), split, SIZE)
    assert {scene: sorted(views) for scene, views in found.items()} == {"a": [1, 2], "b": [0, 4]}
    torch.testing.assert_close(found["a"][1], image("a", 1))
    figures = evaluate(found, truth(), split)
    assert figures["datasets"]["DTU"] == pytest.approx({"psnr_m": 100, "psnr": 100, "ssim_m": 1, "ssim": 1})
    assert figures["lpips"] == "not available"


def test_figures_by_hand() -> None:
    """Off by 0.1 inside the mask and 0.2 outside of it: 20 dB inside; the mean of squares over all."""
    view = replace(truth()["a"][1], image=torch.full((24, 32, 3), 0.5))
    assert view.mask is not None
    wrong = view.image + torch.where(view.mask > 0, 0.1, 0.2)[..., None]
    inside = 16 * 20
    mean = (inside * 0.01 + (24 * 32 - inside) * 0.04) / (24 * 32)
    found = score(wrong, view)
    assert found["psnr_m"] == pytest.approx(20, abs=1e-4)
    assert found["psnr"] == pytest.approx(-10 * torch.tensor(mean).log10().item(), abs=1e-4)
    assert found["ssim_m"] > found["ssim"]
    with pytest.raises(DataError, match="no mask"):
        score(wrong, replace(view, mask=None))


@pytest.mark.parametrize("scale", [1.0, -3.5])
def test_cameras_come_back_from_projections(scale: float, tmp_path: Path) -> None:
    camera = orbit(torch.tensor([0.3, -0.1, 0.2]), 3.0, 5, (64, 48), elevations=(0.4,))[3]
    k = camera.intrinsics.double().clone()
    k[1, 1] *= 1.1
    projection = scale * k @ camera.viewmat[:3].double()
    found = camera_of(projection, 64, 48)
    torch.testing.assert_close(found.viewmat, camera.viewmat, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.intrinsics.double(), k, atol=1e-4, rtol=1e-6)
    (tmp_path / "pos_001.txt").write_text("\n".join(" ".join(map(repr, row)) for row in projection.tolist()))
    torch.testing.assert_close(read_projection(tmp_path / "pos_001.txt"), projection)


def test_what_is_refused(tmp_path: Path) -> None:
    for wrong, said in (
        (SceneSplit((0, 1), (1, 2), "DTU"), "view 1 is both seen and asked for"),
        (SceneSplit((1,), (64,), "DTU"), "subtract one"),
        (SceneSplit((-1,), (2,), "DTU"), "counted from zero"),
        (SceneSplit((1,), (), "DTU"), "lists of whole numbers"),
        (SceneSplit((1,), (2, 2), "DTU"), "named twice"),
        (SceneSplit((1,), (2,), "LLFF"), "data set 'LLFF'"),
    ):
        write_split(tmp_path / "split.json", {"a": wrong})
        with pytest.raises(DataError, match=said):
            read_split(tmp_path / "split.json")
    for text in ("[]", "{}", '{"a": {"input_views": [0]}}', "no json"):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(DataError, match="no split|no scene"):
            read_split(tmp_path / "split.json")
    for matrix in (torch.zeros(3, 4), torch.full((3, 4), torch.nan)):
        with pytest.raises(DataError, match="no inverse"):
            camera_of(matrix, 8, 8)
    skewed = torch.tensor([[10.0, 2, 4, 0], [0, 10, 4, 0], [0, 0, 1, 0]])
    with pytest.raises(DataError, match="skewed"):
        camera_of(skewed, 8, 8)
    (tmp_path / "pos.txt").write_text("1 2 3")
    with pytest.raises(DataError, match="3 numbers"):
        read_projection(tmp_path / "pos.txt")


def test_what_a_submission_is_refused_for(tmp_path: Path) -> None:
    path = tmp_path / "s.zip"

    def again(change: dict[str, str | None], prefix: str = "") -> None:
        pack(path, SPLIT, image)
        with zipfile.ZipFile(path) as old:
            files = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, content in files.items():
                if (other := change.get(name, name)) is not None:
                    new.writestr(prefix + other, content)

    first = "a/rect_002_3_r5000.png"
    slip = {first: "a/rect_001_3_r5000.png", "a/rect_003_3_r5000.png": "a/rect_002_3_r5000.png"}
    slip |= {"b/cam_001_3_0000.png": "b/cam_000_3_0000.png", "b/cam_005_3_0000.png": "b/cam_004_3_0000.png"}
    for change, prefix, said in (
        ({first: None}, "", "1 images are missing, the first a/rect_002"),
        (slip, "", "one off"),
        ({}, "results/", "at the root, not in 'results'"),
    ):
        again(change, prefix)
        with pytest.raises(DataError, match=said):
            read_submission(path, SPLIT, SIZE)
    pack(path, SPLIT, image)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/readme.txt", "hello")
    with pytest.raises(DataError, match="not asked for, the first a/readme.txt"):
        read_submission(path, SPLIT, SIZE)
    pack(path, SPLIT, image)
    with pytest.raises(DataError, match="RGB of 33 x 24 is asked for"):
        read_submission(path, SPLIT, {**SIZE, "b": (33, 24)})
    again({}, "")
    with zipfile.ZipFile(path) as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in files.items():
            new.writestr(name, content[:40] if name == first else content)
    with pytest.raises(DataError, match="is no picture"):
        read_submission(path, SPLIT, SIZE)
    path.write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="no submission"):
        read_submission(path, SPLIT, SIZE)
