"""`import zoo` is quick and imports no heavy library; neither does listing models."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import zoo
from zoo.errors import ConfigError, UnknownNameError
from zoo.registry import FINETUNERS

HEAVY = ["torch", "torch_geometric", "transformers", "diffusers", "timm", "scipy", "sklearn", "matplotlib"]


def run(code: str) -> subprocess.CompletedProcess[str]:
    check = f"import sys; heavy = [m for m in {HEAVY!r} if m in sys.modules]; assert not heavy, heavy"
    return subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "code",
    [
        "import zoo",
        "import zoo; zoo.list_models()",
        "import zoo.registry as r; r.TASKS.names(); r.METHODS.names(); r.STUDIES.names()",
        "import zoo; zoo.register_method; dir(zoo)",
        "import zoo.graph, zoo.llm, zoo.vision, zoo.diffusion, zoo.neural3d",
    ],
)
def test_light_things_import_nothing_heavy(code: str) -> None:
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_loading_imports_no_compiler() -> None:
    wanted = "vision/bip-convnet-digits-s90"
    code = f"import sys, zoo; zoo.load({wanted!r}); assert 'torch' in sys.modules; wanted = 'torch._dynamo'\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert wanted not in sys.modules"], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_import_takes_less_than_a_second() -> None:
    def seconds(code: str) -> float:
        start = time.perf_counter()
        assert run(code).returncode == 0
        return time.perf_counter() - start

    # Best of three, so that a busy machine does not decide; the interpreter's own start is included.
    assert min(seconds("import zoo") for _ in range(3)) < 1.0


def test_every_public_name_is_there() -> None:
    for name in zoo.__all__:
        assert callable(getattr(zoo, name)) and name in dir(zoo)
    assert sorted(zoo.__all__) == zoo.__all__ == sorted(zoo._HOMES)


def test_what_is_not_public() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'; it offers Job, Recipe, card"):
        _ = zoo.lode


def test_finetune_finds_its_domain(monkeypatch, tmp_path) -> None:
    class Tuner:
        def __init__(self, epochs: int) -> None:
            self.epochs = epochs

        def run(self):
            return tmp_path / str(self.epochs)

    FINETUNERS.names()
    monkeypatch.setitem(FINETUNERS._entries, "testdomain", Tuner)
    assert zoo.finetune("testdomain", epochs=3) == tmp_path / "3"
    with pytest.raises(ConfigError, match="keyword argument 'epoch'.*zoo finetune testdomain --help"):
        zoo.finetune("testdomain", epoch=3)
    with pytest.raises(UnknownNameError, match="testdomain"):
        zoo.finetune("testdomian")
