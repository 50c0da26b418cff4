"""Two processes: calibration and fine-tuning share the text and end with the same model in each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.bundles.catalog import find
from zoo.bundles.store import load
from zoo.shared.masks import masks_of

# A toy model on a task of a second, made, pruned by each method, and fine-tuned.
TOY = Path(__file__).with_name("toy_task.py")
WORK = (
    TOY.read_text()
    + """
import sys, torch
from pathlib import Path
from zoo.bundles.catalog import find
from zoo.harness.making import Origin, make_bundle
from zoo.harness.workers import workers
from zoo.llm.methods.cfsp import CFSP
from zoo.llm.methods.ecoflap import ECoFLaP
from zoo.llm.finetune import Finetune
from zoo.llm.methods.sparsegpt import SparseGPT
from zoo.llm.methods.wanda import Wanda
root = Path(sys.argv[1])
from zoo.bundles.publish import About
from zoo.llm.bundling import save_dense
from zoo.llm.models import llama
torch.manual_seed(0)
model = llama(1024, 32, 48, 2, 4, 2, context=64, tokenizer="shakespeare").eval()
about = About("llm/toy-dense", "s", "c", "nobody", {"name": "toy", "source": "toy", "licence": "toy"})
save_dense(model, root / "llm" / "toy-dense", about, ["llm/toy"])
text = {"text": "toy", "windows": 32, "length": 64}
for name, method in {
    "wanda": Wanda(sparsity=0.5, **text),
    "sparsegpt": SparseGPT(pattern="2:4", **text),
    "ecoflap": ECoFLaP(sparsity=0.5, **text),
    "cfsp": CFSP(ratio=0.5, **text),
}.items():
    make_bundle(find("llm/toy-dense"), method, Origin(f"llm/{name}", name, "c"), root / "llm" / name)
Finetune("llm/wanda", root / "llm" / "tuned", text="toy", steps=6, batch=4, window=32, lr=3e-3).run()
"""
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of the bundles that one process and two processes made."""
    repository = str(Path(__file__).parents[3])
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "work.py"
    script.write_text(WORK)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    found = {}
    for count, words in ((1, []), (2, [*launcher, "--num_processes", "2", "--main_process_port", port])):
        root = found[count] = folder / str(count)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": repository, "ZOO_PATH": str(root)}
        environment["ZOO_CACHE"] = str(folder / f"cache-{count}")
        done = subprocess.run(
            [sys.executable, *words, str(script), str(root)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    return found


def pair(made, name, monkeypatch):
    """The model that one process made, and that of two."""
    models = []
    for root in made.values():
        monkeypatch.setenv("ZOO_PATH", str(root))
        models.append(load(root / "llm" / name))
    return models


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "ecoflap"])
def test_two_processes_prune_as_one_does(name, made, monkeypatch):
    alone, shared = pair(made, name, monkeypatch)
    same = total = 0
    for key, mask in masks_of(alone).items():
        other = masks_of(shared)[key]
        assert mask.kept == other.kept
        same, total = same + int((mask.keep == other.keep).sum()), total + mask.numel
    # Sums in another order may swap two weights of nearly the same score.
    assert total - same <= 0.002 * total
    one, two = (find(root / "llm" / name).card.metrics[0].value for root in made.values())
    assert two == pytest.approx(one, rel=1e-3)


def test_two_processes_cut_the_same_channels(made, monkeypatch):
    alone, shared = pair(made, "cfsp", monkeypatch)
    for (key, a), b in zip(alone.state_dict().items(), shared.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_two_processes_fine_tune_as_one_does_and_keep_every_zero(made, monkeypatch):
    alone, shared = pair(made, "tuned", monkeypatch)
    start = load(made[2] / "llm" / "wanda")
    assert masks_of(shared).equal(masks_of(start)) and masks_of(start).lost_zeros(shared) == []
    moved = agree = 0.0
    before, other = start.state_dict(), alone.state_dict()
    for key, weight in shared.state_dict().items():
        moved += float((weight - before[key]).square().sum())
        agree += float((weight - other[key]).square().sum())
    assert agree < 0.01 * moved
    one, two = (find(root / "llm" / "tuned").card.metrics[0].value for root in made.values())
    assert two == pytest.approx(one, rel=1e-2) and two < find(made[2] / "llm" / "wanda").card.metrics[0].value
