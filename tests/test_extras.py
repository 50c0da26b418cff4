"""Every extra of pyproject.toml resolves against the package index: `make test-extras` runs this."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.skipif("ZOO_RESOLVE" not in os.environ, reason="make test-extras asks the package index")
@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_an_extra_resolves(extra: str) -> None:
    command = [
        sys.executable,
        *["-m", "uv", "pip", "compile", "--quiet", "--python-version", "3.11", "pyproject.toml", "--extra"],
    ]
    found = subprocess.run([*command, extra], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "torch==" in found.stdout


def test_all_holds_every_domain_and_not_nerfstudio() -> None:
    """nerfstudio 1.1.5 pins timm 0.6.7 and gsplat 1.4.0, so that no extra with both can resolve."""
    (combined,) = PROJECT["optional-dependencies"]["all"]
    assert combined == "sparse-model-zoo[graph,llm,vision,diffusion,neural3d]"
