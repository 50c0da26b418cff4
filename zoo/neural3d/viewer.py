"""A scene as one HTML page that turns it in a browser: WebGL 2, no server, nothing fetched.

The page holds the Gaussians rounded as in `packed.py`, at half its steps, deflated, in base64. Its policy
(Content-Security-Policy) lets nothing but its own script and style run, by their hashes.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import zlib
from importlib.resources import files
from pathlib import Path

from zoo.errors import DataError
from zoo.neural3d.importance import middle_of
from zoo.neural3d.packed import byte_planes, rounded, steps_for
from zoo.neural3d.scene import GaussianScene
from zoo.shared.store.io import atomic_write

FIELD = 0.8  # radians across the smaller side, as of `zoo.neural3d.cameras.orbit`
MOST = 128 << 20  # bytes of a page that browsers still open
DEGREE = 3  # of the harmonics that the page draws


def write_viewer(path: str | Path, scene: GaussianScene, title: str, finer: float = 0.5) -> int:
    """Write the page; returns its bytes.

    Args:
        finer: factor on the steps of `packed.py`.

    Raises:
        DataError: a Gaussian that cannot be drawn, an empty scene, or more than a browser opens.
    """
    if not len(scene):
        raise DataError(f"{title}: no Gaussian, so there is nothing to show")
    content = page(scene, title, finer).encode()
    if len(content) > MOST:
        raise DataError(
            f"{title}: a page of {len(content) >> 20} MiB, browsers open {MOST >> 20}; prune the scene first "
            "(zoo sparsify)"
        )
    atomic_write(Path(path), content)
    return len(content)


def page(scene: GaussianScene, title: str, finer: float = 0.5) -> str:
    """The page's text."""
    splats = scene.splats.with_degree(min(DEGREE, scene.sh_degree))
    steps = steps_for(splats, finer)
    splats, origin, columns = rounded(splats, steps, title)
    columns["harmonics"] = columns["harmonics"].clip(-32768, 32767)
    centre, reach = middle_of(splats)
    streams, body = [], b""
    for name, whole in columns.items():
        depth, planes = byte_planes(whole, differences=name == "position")
        streams.append(
            {"name": name, "width": whole.shape[1], "depth": depth, "differences": name == "position"}
        )
        body += planes
    meta = {
        "count": len(splats),
        "bases": splats.sh.shape[1],
        "origin": origin.tolist(),
        "steps": dataclasses.asdict(steps),
        "streams": streams,
        "background": scene.background.tolist(),
        "antialiased": scene.antialiased,
        "field_of_view": FIELD,
        "centre": centre.tolist(),
        "distance": 2.6 * reach,
        "up": [0, -1, 0],
    }
    template, script = (files(__package__).joinpath(f"viewer.{kind}").read_text() for kind in ("html", "js"))
    style = template.partition("<style>")[2].partition("</style>")[0]
    parts = {
        "title": html.escape(title),
        "count": f"{len(splats):,}",
        "meta": json.dumps(meta).replace("<", "\\u003c"),
        "data": base64.b64encode(zlib.compress(body, 9)).decode(),
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "script": script,
    }
    for name, text in parts.items():
        template = template.replace(f"{{{name}}}", text)
    return template


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
