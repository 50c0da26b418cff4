"""A package with a study, as pip would have installed it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]


@pytest.fixture(scope="session")
def study_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its entry point."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(HERE / "toy_study.py", site)
    info = site / "toy_study-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-study\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zoo.studies]\narithmetic = toy_study:STUDY\n")
    return site


@pytest.fixture(scope="session")
def study_of_arithmetic(study_site: Path):
    """The study, registered in this process."""
    sys.path.insert(0, str(study_site))
    import toy_study

    from zoo.registry import STUDIES

    STUDIES.register("arithmetic", "toy_study:STUDY")
    return toy_study.STUDY


@pytest.fixture
def study_environment(study_site: Path, tmp_path: Path) -> dict[str, str]:
    """Environment of a process that finds the package by its entry point."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(study_site), str(ROOT)]),
        "ZOO_CACHE": str(tmp_path / "zoo-cache"),
        "OMP_NUM_THREADS": "1",
    }
