"""Drift from the dense model's images, image by image, and what sampling costs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.bundles.catalog import find  # noqa: E402
from zoo.bundles.store import load  # noqa: E402
from zoo.diffusion.paired import drift, images_of  # noqa: E402
from zoo.errors import TaskError  # noqa: E402
from zoo.harness.conformance import check_task  # noqa: E402
from zoo.harness.runner import Cell  # noqa: E402
from zoo.harness.subjects import resolve  # noqa: E402
from zoo.harness.tasks import get_task  # noqa: E402

T2I, FLOW = "diffusion/drift-t2i-digits", "diffusion/drift-flow-digits"


@pytest.fixture(autouse=True)
def few_images(monkeypatch) -> None:
    monkeypatch.setattr("zoo.diffusion.tasks.DRIFTS", 4)
    monkeypatch.setattr("zoo.diffusion.tasks.STEPS", 2)


def test_drift_by_hand() -> None:
    own = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    dense = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    assert drift(own, dense).tolist() == [2.5, 0.0]


def test_the_dense_model_drifts_by_nothing_and_a_sparse_one_image_by_image() -> None:
    task, sparse = get_task(T2I), load("diffusion/magnitude-t2i-digits-s20").eval()
    assert task.evaluate(load("diffusion/dense-t2i-digits").eval()).samples["drift"] == [0.0] * 4
    found = task.evaluate(sparse)
    assert min(found.samples["drift"]) > 0 and found.n == 4
    noise = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    dense = load("diffusion/dense-t2i-digits").eval()
    own, theirs = (images_of(model, noise, steps=2, batch=3) for model in (sparse, dense))
    assert found.samples["drift"] == pytest.approx(drift(own, theirs).tolist(), rel=1e-4)
    assert task.accepts(find("diffusion/magnitude-t2i-digits-s20").card)
    assert not task.accepts(find("diffusion/slimflow-digits-w48").card)
    assert task.measured_on() == find("diffusion/dense-t2i-digits").card.weights.sha256


def test_flows_drift_too_and_others_are_refused() -> None:
    check_task(FLOW, load("diffusion/slimflow-digits-w48").eval())
    with pytest.raises(TaskError, match="takes a TextToImage of images of .1, 8, 8.; received MLPFlow"):
        get_task(T2I).evaluate(load("diffusion/slimflow-digits-w48").eval())


def test_the_cost_of_sampling_is_timed_anew_and_its_memory_grows_with_the_network() -> None:
    task = get_task("diffusion/sampling-cost")
    wide, narrow = (load(f"diffusion/slimflow-digits-w{width}").eval() for width in (96, 48))
    big, small = task.evaluate(wide), task.evaluate(narrow)
    assert small.n == 5 and min(small.samples["seconds"]) > 0
    assert big.metrics["peak_bytes"].value > small.metrics["peak_bytes"].value
    assert task.evaluate(narrow).metrics["peak_bytes"] == small.metrics["peak_bytes"]
    [subject] = resolve("diffusion/slimflow-digits-w48")
    kept, timed = (Cell(subject, get_task(name), "masked", 0).key() for name in (FLOW, task.name))
    assert kept and not timed, "of a time no record is found again"
    assert task.accepts(find("diffusion/dense-t2i-digits").card)
    assert not task.accepts(find("diffusion/iter-digits").card)
    with pytest.raises(TaskError, match="text-to-image models and flows; got a Linear"):
        task.evaluate(torch.nn.Linear(1, 1))
