"""The toy package and its bundles, for the tests of harness and command line."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOY = Path(__file__).parent / "toy"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def toy_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy package as pip would have installed it."""
    site = tmp_path_factory.mktemp("site")
    for file in ("zoo_toy.py", "recipes.yaml"):
        shutil.copy(TOY / file, site)
    sys.path.insert(0, str(site))
    import zoo_toy

    info = site / "zoo_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(zoo_toy.ENTRY_POINTS)
    return site


@pytest.fixture(scope="session")
def toy(toy_site: Path) -> ModuleType:
    """The toy package, registered in this process."""
    import zoo_toy

    from zoo import registry
    from zoo.bundles import recipes

    # In this process entry points may have been read before the package was there.
    registry.ARCHITECTURES.register("toy/mlp", zoo_toy.MLP)
    registry.TASKS.register("toy_param", zoo_toy.Parametrised)
    registry.METHODS.register("toy-half", zoo_toy.Half)
    registry.STUDIES.register("toy", "zoo_toy:STUDY")
    registry.FINETUNERS.register("toy", zoo_toy.Finetune)
    registry.MAKERS.register("toy/dense", zoo_toy.make_dense)
    registry.RECIPES.register("toy", zoo_toy.recipes)
    recipes.rows.cache_clear()
    return zoo_toy


@pytest.fixture(scope="session")
def toy_bundles(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles `dense`, `half` and `tenth` in one folder. Tests that change them copy them first."""
    return toy.make_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def toy_zoo(toy_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The toy bundles, known by name."""
    monkeypatch.setenv("ZOO_PATH", str(toy_bundles["dense"].parent))
    return toy_bundles


@pytest.fixture
def toy_environment(toy_site: Path, toy_bundles: dict[str, Path], tmp_path: Path) -> dict[str, str]:
    """Environment of a subprocess that sees the toy package and its bundles."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(toy_site), str(ROOT)]),
        "ZOO_PATH": str(toy_bundles["dense"].parent),
        "ZOO_CACHE": str(tmp_path / "zoo-cache"),
        "OMP_NUM_THREADS": "1",
    }
