"""Kernel groups: magnitude and order by hand, the function under a new order, the method, committed
speeds."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import DataError
from zoo.methods.conformance import check_method, images_job
from zoo.shared.errors import PatternError
from zoo.shared.ops import SparseConv1x1, packing
from zoo.shared.pruning.inventory import pointwise_weights
from zoo.studies.benchmarks import outcome, rows_of
from zoo.studies.cells import CellCache
from zoo.studies.runner import get_study
from zoo.vision.methods.kernel_groups import KernelGroups, grouped, kept_magnitude, rearrange
from zoo.vision.mobilenet import MobileNetV1


def test_kept_magnitude_by_hand() -> None:
    weight = torch.tensor([[4.0, 1], [-4, 1], [0, 2], [2, 0]])
    # Groups of two rows: 8, 2 and 2, 2 of a sum of 14; half of them go.
    assert kept_magnitude(weight, 0.5, 2) == pytest.approx(10 / 14)
    assert kept_magnitude(weight, 0.0, 2) == 1
    assert kept_magnitude(weight, 0.5, 1) == pytest.approx(12 / 14)


def test_rows_that_need_the_same_inputs_become_neighbours() -> None:
    rows = torch.tensor([[5.0, 0], [0, 1], [4, 0.1], [0.1, -3]])
    assert grouped(rows, 2).tolist() == [0, 2, 3, 1]
    assert kept_magnitude(rows[grouped(rows, 2)], 0.5, 2) > 0.98 > 0.8 > kept_magnitude(rows, 0.5, 2)
    assert grouped(torch.ones(5, 2), 2).sort().values.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.traced
def test_a_network_is_the_same_function_in_another_order() -> None:
    torch.manual_seed(0)
    model = MobileNetV1(0.125, 10, 1, 1).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            module.running_mean.normal_()
    images = torch.randn(3, 1, 16, 16)
    before, weights = model(images), [model.get_parameter(n).clone() for n in pointwise_weights(model)]
    gained = rearrange(model, (images,), 0.7)
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-4)
    assert len(gained) > 8 and min(gained.values()) > 0
    after = [model.get_parameter(n) for n in pointwise_weights(model)]
    moved = sum(not torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    assert moved > 8


@pytest.mark.traced
def test_the_method_cuts_whole_groups_of_any_network() -> None:
    outcome = check_method("sparse-byte-nn")
    assert outcome.taken, outcome.refusal
    (name,) = outcome.made.masks
    keep = outcome.made.masks[name].keep.flatten(1).reshape(4, 4, -1)
    assert bool((keep.all(1) | ~keep.any(1)).all())
    layer = outcome.made.model.get_submodule(name.removesuffix(".weight"))
    packed = SparseConv1x1.from_convolution(layer, outcome.made.masks[name].keep)
    x = torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x), atol=1e-5, rtol=1e-4)


def test_a_network_that_cannot_be_traced_is_taken_without_an_order() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

        def forward(self, x):
            x = self.conv(x) if x.sum() > -1e9 else x
            return self.head(x.mean((2, 3)))

    model = Branching()
    with pytest.raises(zoo.shared.errors.GroupError):
        zoo.sparsify(model, method="sparse-byte-nn", job=images_job(KernelGroups), sparsity=0.5)
    made = zoo.sparsify(
        model, method="sparse-byte-nn", job=images_job(KernelGroups), sparsity=0.5, rearranged=False
    )
    assert made.masks.sparsity() == 0.5
    six = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    with pytest.raises(PatternError, match="needs the matrix view 6x3"):  # no whole groups of 4
        zoo.sparsify(
            six, method="sparse-byte-nn", job=images_job(KernelGroups), sparsity=0.5, rearranged=False
        )


def test_committed_speeds_are_read_and_judged(tmp_path) -> None:
    assert [outcome(1.1, 2.0), outcome(0.9, 2.0), outcome(0.5, 0.9)] == [
        "holds",
        "cannot be told",
        "does not hold",
    ]
    with pytest.raises(DataError, match=r"run benchmarks/mobilenet.py"):
        rows_of("mobilenet-9")
    (tmp_path / "odd-1.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(DataError, match="no result of a benchmark"):
        rows_of("odd-1", tmp_path)
    for name, number in (("fast-convnets", 29), ("smash", 38)):
        study = get_study(name)
        options = study.options()
        cases = list(study.cases(options))
        rows = [
            {**c, **r}
            for c in cases
            for r in study.measure(study.arm(c).make, options, c, CellCache(tmp_path))
        ]
        found = study.report(rows, options).verdicts
        assert len(found) == len(rows) and {v.paper for v in found} == {(number,)}
        assert "holds" in {v.verdict for v in found}


def test_packing_takes_groups_from_a_quarter_of_zeros_on() -> None:
    for pattern, sparsity, taken in (("block4x1", 0.3, 1), ("block4x1", 0.2, 0), ("unstructured", 0.3, 0)):
        model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU()).eval().requires_grad_(False)
        masks = zoo.sparsify(model, sparsity=sparsity, pattern=pattern)
        x = torch.randn(2, 16, 8, 8)
        wanted = model(x)
        packed = packing.pack(model, masks)
        assert sum(isinstance(m, SparseConv1x1) for m in packed.modules()) == taken
        torch.testing.assert_close(packed(x), wanted, atol=1e-5, rtol=1e-4)
