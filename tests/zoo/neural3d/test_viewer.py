"""The page that turns a scene: its data, its policy, its camera and order, a photograph of it; turntables."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.errors import ConfigError, DataError
from zoo.neural3d import exports, viewer
from zoo.neural3d.cameras import orbit
from zoo.neural3d.formats import write_splats
from zoo.neural3d.importance import middle_of
from zoo.neural3d.metrics import psnr
from zoo.neural3d.packed import Steps
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import SH_C0, Splats
from zoo.shared.ops.rasterize_reference import rotations

NAME = "neural3d/pruned-gaussians-shapes-k30"


def ball(count: int, degree: int) -> GaussianScene:
    generator = torch.Generator().manual_seed(count)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    splats = Splats(
        draw(count, 3) * 0.4,
        draw(count, 4),
        draw(count, 3) * 0.4 - 2,
        draw(count) * 2,
        draw(count, (degree + 1) ** 2, 3) * 0.3,
    )
    return GaussianScene.from_splats(splats, (1.0, 1.0, 1.0))


def in_node(page: str, expression: str) -> object:
    """A JavaScript expression of `meta` and `found` (the decoded streams), with the functions of the page."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    script = (
        "const fs = require('fs'), page = fs.readFileSync(0, 'utf8');"
        "const part = id => page.split(`id=\"${id}\">`)[1].split('</script>')[0];"
        "require('vm').runInThisContext(page.split('<script>')[1].split('</script>')[0]);"
        "const meta = JSON.parse(part('meta'));"
        "const packed = require('zlib').inflateSync(Buffer.from(part('data'), 'base64'));"
        "const found = decode(meta, new Uint8Array(packed));"
        f"console.log(JSON.stringify({expression}));"
    )
    done = subprocess.run([node, "-e", script], input=page, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_holds_the_scene() -> None:
    scene = ball(40, 2)
    text = viewer.page(scene, "a <b>", finer=0.01)
    rows = torch.tensor(in_node(text, "[...gaussians(meta, found)]")).reshape(-1, 16)
    splats = scene.splats
    order = torch.cdist(rows[:, :3], splats.means).argmin(1)
    assert order.sort().values.tolist() == list(range(40))
    splats = splats.rows(order)
    half = rotations(splats.quats) * splats.scales.exp()[:, None]
    sigma = (half @ half.mT).flatten(1)[:, [0, 1, 2, 4, 5, 8]]
    torch.testing.assert_close(rows[:, :3], splats.means, atol=1e-3, rtol=0)
    torch.testing.assert_close(rows[:, 3], splats.opacities.sigmoid(), atol=2e-4, rtol=0)
    torch.testing.assert_close(rows[:, 4:10], sigma, atol=1e-3, rtol=0.01)
    torch.testing.assert_close(rows[:, 10:13], splats.sh[:, 0] * SH_C0 + 0.5, atol=1e-3, rtol=0)
    waves = (
        torch.tensor(in_node(text, "[...found.harmonics]")).reshape(40, 8, 3) * Steps(1.0).harmonics * 0.01
    )
    torch.testing.assert_close(waves, splats.sh[:, 1:], atol=1e-3, rtol=0)


@pytest.mark.parametrize("up", [(0.0, -1.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 0.0, 0.0)])
def test_camera_and_order_are_ours(up: tuple[float, float, float]) -> None:
    scene, centre = ball(30, 0), torch.tensor([0.1, -0.2, 0.3])
    camera = orbit(centre, 0.1, 1, (8, 8), elevations=(0.5,), start=0.7, up=up)[0]
    view = {"target": centre.tolist(), "distance": 0.1, "azimuth": 0.7, "elevation": 0.5, "up": list(up)}
    text = viewer.page(scene, "s", finer=0.001)
    seen = in_node(
        text,
        f"(() => {{ const c = orbit({json.dumps(view)}), f = gaussians(meta, found), n = meta.count;"
        "const room = { keys: new Float32Array(n), one: new Uint32Array(n), other: new Uint32Array(n) };"
        "const seen = sorted(f, n, c, room);"
        "const order = [...room.other.subarray(0, seen)];"
        "return [c.right, c.down, c.ahead, c.eye, order.map(i => f[16 * i])]; })()",
    )
    assert isinstance(seen, list)
    torch.testing.assert_close(torch.tensor(seen[:3]), camera.viewmat[:3, :3], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(seen[3]), camera.centre, atol=1e-5, rtol=0)
    means = scene.splats.means
    depth = means @ camera.viewmat[2, :3] + camera.viewmat[2, 3]
    ahead = means[depth > 0.01, 0][depth[depth > 0.01].argsort(descending=True)]
    assert 0 < len(ahead) < 30
    torch.testing.assert_close(torch.tensor(seen[4]), ahead, atol=1e-3, rtol=0)


def test_nothing_but_its_own_script_runs() -> None:
    text = viewer.page(ball(5, 0), '"><script>alert(1)</script>')
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for tag in ("script", "style"):
        body = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        own = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{own}'" in policy[1]
    assert "alert(1)</script>" not in text and text.count("<script>") == 1
    assert not re.search(r"(src|href)=|https?:|url\(|style=\"| on\w+=", text.partition("<canvas")[0])
    assert "http" not in text.partition("<script>")[2]


def test_a_photograph_of_the_page_is_our_rendering(tmp_path: Path) -> None:
    """In a browser, where there is one: harmonics of degree 3, anti-aliasing, 300 pixels."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a browser")
    scene = ball(60, 3)
    scene.antialiased = True
    viewer.write_viewer(tmp_path / "page.html", scene, "ball", finer=0.3)
    software = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", *software, "--hide-scrollbars", "--window-size=300,300"]
        + ["--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}"]
        + [f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path}/page.html#bare&azimuth=2"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    photograph = torch.from_numpy(numpy.array(Image.open(tmp_path / "page.png").convert("RGB")) / 255).float()
    centre, reach = middle_of(scene.splats)
    camera = orbit(centre, 2.6 * reach, 1, (300, 300), elevations=(0.35,), start=2.0)[0]
    with torch.no_grad():
        assert psnr(photograph, scene(camera).clamp(0, 1)) > 40


def test_exports_of_names_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, turn, png = tmp_path / "p.html", tmp_path / "t.gif", tmp_path / "p.png"
    assert main(["export", NAME, "--to", "viewer", "--out", str(page), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gaussians"] == 600 and report["bytes"] == page.stat().st_size < 50_000
    splats = ball(20, 1).splats
    write_splats(tmp_path / "own.ply", splats)
    own = ["export", str(tmp_path / "own.ply"), "--to"]
    assert main([*own, "viewer", "--out", str(page)]) == 2  # it is there
    assert main([*own, "viewer", "--out", str(page), "--overwrite"]) == 0
    assert "own.ply, 20 Gaussians" in page.read_text()
    assert main([*own, "turntable", "--out", str(turn), "--frames", "3", "--size", "20"]) == 0
    with Image.open(turn) as picture:
        assert picture.size == (20, 20) and picture.n_frames == 3
    assert main(["show", NAME, "--picture", str(png)]) == 0
    assert Image.open(png).size == (4 * 96, 3 * 96)  # photographs, dense twin, this one


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    with pytest.raises(DataError, match="no Gaussian"):
        viewer.write_viewer(tmp_path / "p.html", ball(0, 0), "empty")
    monkeypatch.setattr(viewer, "MOST", 1000)
    with pytest.raises(DataError, match="browsers open"):
        viewer.write_viewer(tmp_path / "p.html", ball(5, 0), "large")
    with pytest.raises(ConfigError, match="is a Linear"):
        exports._scene(torch.nn.Linear(1, 1), "a model")
    for words, said in (
        (["--to", "viewer", "--out", "x.txt"], "ends in .html"),
        (["--to", "turntable", "--out", "x.gif", "--frames", "1"], "--frames from 2"),
        (["--to", "viewer", "--out", "x.html", "--finer", "0"], "--finer must be above 0"),
    ):
        assert main(["export", NAME, *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["show", NAME, "--picture", str(tmp_path / "x.bmp")]) == 2
    assert main(["show", "vision/dense-mlp-digits", "--picture", str(tmp_path / "x.png")]) == 2
    assert not list(tmp_path.iterdir())
