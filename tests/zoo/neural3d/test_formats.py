"""Scene files: round trips, real files of every format, two formats of one scene, damaged and hostile
files."""

from __future__ import annotations

import gzip
import json
import os
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from zoo.errors import DataError
from zoo.neural3d.cameras import orbit
from zoo.neural3d.formats import read_splats, write_splats
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import Splats

DATA = Path(os.environ.get("ZOO_DATA", "missing"))
needs_scenes = pytest.mark.skipif(
    not (DATA / "splat-playcanvas").is_dir(), reason="the scenes are not there (ZOO_DATA)"
)
CORNERS = [[-1.0, 0, 0], [0, 0, 1], [0, 0, -1], [1, 0, 0]]


def some(count: int, degree: int, seed: int = 0) -> Splats:
    generator = torch.Generator().manual_seed(seed)
    return Splats(
        torch.randn(count, 3, generator=generator),
        torch.randn(count, 4, generator=generator),
        torch.rand(count, 3, generator=generator) * 3 - 5,
        torch.randn(count, generator=generator) * 2,
        torch.randn(count, (degree + 1) ** 2, 3, generator=generator) * 0.3,
    )


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_ply_keeps_every_bit(tmp_path: Path, degree: int) -> None:
    splats = some(37, degree)
    write_splats(tmp_path / "a.ply", splats)
    found = read_splats(tmp_path / "a.ply")
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, splats.tensors, strict=True))


@pytest.mark.parametrize("count", [0, 1, 50])
@pytest.mark.parametrize("degree", [0, 3])
def test_spz_rounds_to_its_steps(tmp_path: Path, count: int, degree: int) -> None:
    splats = some(count, degree)
    write_splats(tmp_path / "a.spz", splats)
    found = read_splats(tmp_path / "a.spz")
    torch.testing.assert_close(found.means, splats.means, atol=2**-13 + 1e-6, rtol=0)
    torch.testing.assert_close(found.scales, splats.scales, atol=1 / 32 + 1e-5, rtol=0)
    torch.testing.assert_close(
        found.opacities.sigmoid(), splats.opacities.sigmoid(), atol=1 / 510 + 1e-6, rtol=0
    )
    torch.testing.assert_close(found.sh[:, :1], splats.sh[:, :1], atol=1 / 76, rtol=0)
    most = 127 / 128
    rest = [tensor[:, 1:].clamp(-most, most) for tensor in (found.sh, splats.sh)]
    torch.testing.assert_close(*rest, atol=1 / 255, rtol=0)
    unit = splats.quats / splats.quats.norm(dim=1, keepdim=True)
    assert count == 0 or float(((found.quats * unit).sum(1).abs() - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("degree", [0, 2])
def test_sog_rounds_to_its_codebooks(tmp_path: Path, degree: int) -> None:
    splats = some(3000, degree)
    write_splats(tmp_path / "a.sog", splats)
    found = read_splats(tmp_path / "a.sog")
    nearest = torch.cdist(splats.means, found.means, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert float(nearest.values.max()) < 1e-3 and len(nearest.indices.unique()) == 3000
    found = found.rows(nearest.indices)
    torch.testing.assert_close(found.scales, splats.scales, atol=0.02, rtol=0)
    assert float((found.sh[:, 0] - splats.sh[:, 0]).abs().mean()) < 0.003
    unit = splats.quats / splats.quats.norm(dim=1, keepdim=True)
    assert float((found.quats * unit).sum(1).abs().min()) > 0.9999
    assert found.sh_degree == degree


def test_turning_twice_is_the_same_and_looks_the_same() -> None:
    splats = some(40, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(splats.turned().turned().tensors, splats.tensors, strict=True)
    )
    # Seen by a camera that is turned along with it, every picture stays.
    camera = orbit(torch.zeros(3), 5.0, 1, (24, 20))[0]
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    other = type(camera)(camera.viewmat @ flip, camera.intrinsics, 24, 20)
    with torch.no_grad():
        seen = GaussianScene.from_splats(splats)(camera)
        turned = GaussianScene.from_splats(splats.turned())(other)
    torch.testing.assert_close(seen, turned, atol=2e-4, rtol=0)
    assert float(seen.max()) > 0.2


@needs_scenes
def test_one_scene_in_two_formats_agrees() -> None:
    pytest.importorskip("zstandard", reason="SPZ 4 needs zstandard, an extra")
    folder = DATA / "splat-playcanvas"
    both = [read_splats(folder / name) for name in ("biker.compressed.ply", "biker.spz")]
    cameras = orbit(torch.tensor([-0.06, -1.64, 0.03]), 3.4, 3, (128, 128))
    with torch.no_grad():
        for camera in cameras:
            one, other = (GaussianScene.from_splats(splats)(camera).clamp(0, 1) for splats in both)
            assert float(one.mean()) > 0.01
            assert -10 * float((one - other).square().mean().log10()) >= 55


@needs_scenes
@pytest.mark.parametrize(
    "name", ["minimal.splat", "minimal-v2.spz", "minimal-v3.spz", "minimal-v4.spz", "minimal-raw.spz"]
)
def test_smallest_files_of_others(name: str) -> None:
    if "v4" in name:
        pytest.importorskip("zstandard", reason="SPZ 4 needs zstandard, an extra")
    splats = read_splats(DATA / "splat-format-fixtures" / name)
    assert len(splats) == 4 and splats.sh_degree == 0
    if "v3" in name or "v4" in name or name.endswith(".splat"):
        assert sorted(splats.means.round().tolist()) != [] and float(splats.means.abs().max()) == 1


@needs_scenes
def test_sog_of_others_has_harmonics() -> None:
    splats = read_splats(DATA / "splat-playcanvas" / "playbot-lod5")
    assert len(splats) == 3000 and splats.sh_degree == 2
    assert 0.01 < float(splats.sh[:, 1:].std()) < 1
    assert float(splats.means.abs().max()) < 1.1


def broken(path: Path, match: str) -> None:
    with pytest.raises(DataError, match=match):
        read_splats(path)


@pytest.mark.parametrize(
    "header, match",
    [
        ("ply\nformat ascii 1.0\nelement vertex 1\nend_header\n", "line 2: only binary"),
        (
            "ply\nformat binary_little_endian 1.0\nelement vertex 9999999999\nproperty float x\nend_header\n",
            "is cut",
        ),
        ("ply\nformat binary_little_endian 1.0\nelement vertex -1\nend_header\n", "line 3: not a line"),
        (
            "ply\nformat binary_little_endian 1.0\nelement vertex 0\nproperty list uchar int i\nend_header\n",
            "line 4: lists",
        ),
        (
            "ply\nformat binary_little_endian 1.0\nelement vertex 0\nproperty float x\nend_header\n",
            "without y, z, f_dc_0",
        ),
        (
            "ply\nformat binary_little_endian 1.0\nelement vertex 0\nproperty object x\nend_header\n",
            "line 4: not a line",
        ),
        ("ply\nformat binary_little_endian 1.0\nelement face 0\nend_header\n", "no element vertex"),
        ("ply\nno end", "no line end_header"),
    ],
)
def test_bad_ply_headers(tmp_path: Path, header: str, match: str) -> None:
    (tmp_path / "a.ply").write_bytes(header.encode())
    broken(tmp_path / "a.ply", match)


def test_bad_values_name_the_gaussian(tmp_path: Path) -> None:
    splats = some(5, 0)
    splats.means[3, 1] = float("nan")
    with pytest.raises(DataError, match="position of Gaussian 3 is not finite"):
        write_splats(tmp_path / "a.ply", splats)
    splats = some(5, 0)
    splats.quats[2] = 0
    with pytest.raises(DataError, match="rotation of Gaussian 2 has length zero"):
        write_splats(tmp_path / "a.ply", splats)
    (tmp_path / "a.splat").write_bytes(struct.pack("<6f8B", 0, 0, 0, 1, 1, -1, *range(8)))
    broken(tmp_path / "a.splat", "scale at byte 12")
    (tmp_path / "a.splat").write_bytes(bytes(70))
    broken(tmp_path / "a.splat", "the row at byte 64 has 6 of 32 bytes")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"hello")
    broken(tmp_path / "a.txt", "is no scene")
    broken(tmp_path / "absent.ply", "cannot be read")
    with pytest.raises(DataError, match="written as .ply, .spz, .sog"):
        write_splats(tmp_path / "a.obj", some(1, 0))


def test_spz_that_would_grow_is_refused(tmp_path: Path) -> None:
    header = struct.pack("<4sIIBBBB", b"NGSP", 3, 2**31, 0, 12, 0, 0)
    (tmp_path / "a.spz").write_bytes(gzip.compress(header))
    broken(tmp_path / "a.spz", "2147483648 Gaussians")
    header = struct.pack("<4sIIBBBB", b"NGSP", 3, 1000, 0, 12, 0, 0)
    (tmp_path / "a.spz").write_bytes(gzip.compress(header + bytes(10)))
    broken(tmp_path / "a.spz", "10 bytes of Gaussians where 1000 need 20000")
    (tmp_path / "a.spz").write_bytes(struct.pack("<4sIIBBBB", b"NGSP", 7, 1, 0, 12, 0, 0))
    broken(tmp_path / "a.spz", "version 7")


@pytest.mark.parametrize("change", ["outside", "codebook", "label", "missing", "version"])
def test_bad_sog(tmp_path: Path, change: str) -> None:
    write_splats(tmp_path / "a.sog", some(200, 1))
    folder = tmp_path / "scene"
    with zipfile.ZipFile(tmp_path / "a.sog") as archive:
        archive.extractall(folder)
    meta = json.loads((folder / "meta.json").read_text())
    assert len(read_splats(folder)) == 200
    match = {
        "outside": "outside of its folder",
        "codebook": "codebook of",
        "label": "entry .* of a palette",
        "missing": "lacks a field",
        "version": "SOG version 3",
    }[change]
    if change == "outside":
        meta["quats"]["files"] = ["../quats.webp"]
    elif change == "codebook":
        meta["scales"]["codebook"] = [1.0]
    elif change == "label":  # a picture of bytes that go up to 255 where labels go up to 49
        meta["shN"]["files"][1] = "means_l.webp"
    elif change == "missing":
        del meta["sh0"]
    else:
        meta["version"] = 3
    (folder / "meta.json").write_text(json.dumps(meta))
    broken(folder, match)


@pytest.mark.parametrize("suffix", [".ply", ".spz", ".sog", ".splat"])
def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path, suffix: str) -> None:
    """Cut and changed files give a DataError or a scene, never another error."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".splat":
        path.write_bytes(struct.pack("<6f8B", *range(6), *range(8)) * 20)
    else:
        write_splats(path, some(20, 1))
    good, draw = path.read_bytes(), random.Random(1)
    for trial in range(150):
        data = bytearray(good)
        if trial % 2:
            data = data[: draw.randrange(len(data))]
        else:
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data))
        try:
            splats = read_splats(path)
        except DataError as error:
            assert str(tmp_path) in str(error)
        else:
            assert splats.means.isfinite().all()
