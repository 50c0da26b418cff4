"""DASS: cells and genotypes by hand, the three stages, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from zoo.errors import ConfigError
from zoo.methods.conformance import quarter_images
from zoo.shared.errors import BudgetError
from zoo.shared.train import Job, Recipe
from zoo.vision.methods.dass import DASS, EDGES, OPERATIONS, CellNet, counted, operation, random_genotype


def job(seed: int = 0) -> Job:
    images, labels = quarter_images(16, 8)
    return Job(DataLoader(TensorDataset(images, labels), 8, shuffle=True), recipe=Recipe(lr=0.05), seed=seed)


def test_operations_keep_or_halve_maps() -> None:
    x = torch.randn(2, 4, 8, 8)
    for name in OPERATIONS:
        assert operation(name, 4, 1)(x).shape == x.shape
        assert operation(name, 4, 2)(x).shape == (2, 4, 4, 4)
    assert operation("none", 4, 1)(x).abs().max().item() == 0


def test_the_two_strongest_edges_of_each_node_stay_by_hand() -> None:
    assert EDGES == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)]
    net = CellNet(4)
    with torch.no_grad():
        for alpha in net.alphas.values():
            alpha.zero_()
            alpha[0, 3] = 1.0
            alpha[1, 2] = 2.0
            alpha[2, 4] = 3.0
            alpha[3, 0] = 9.0  # none is no operation, however strong
            alpha[4, 1] = 2.0
    wanted = {0: "separable", 1: "pool", 2: "dilated", 4: "skip"}
    assert net.genotype() == {"normal": wanted, "reduction": wanted}
    assert counted(net.genotype()) == {"skip": 2, "pool": 2, "separable": 2, "dilated": 2}


def test_a_chosen_network_is_the_mix_with_all_weight_on_its_operations() -> None:
    torch.manual_seed(0)
    net = CellNet(4).eval()
    chosen = net.genotype()
    small = CellNet(4, genotype=chosen).eval()
    with torch.no_grad():
        for kind, alpha in net.alphas.items():
            alpha.fill_(-50.0)
            alpha[:, 0] = 0.0
            for number, name in chosen[kind].items():
                alpha[number] = -50.0
                alpha[number, OPERATIONS.index(name)] = 0.0
        state = {k: v for k, v in net.state_dict().items() if not k.startswith(("alphas", "cells"))}
        for place, kind in enumerate(net.kinds):
            for number, name in chosen[kind].items():
                source, target = (
                    f"cells.{place}.edges.{number}.{OPERATIONS.index(name)}.",
                    f"cells.{place}.edges.{number}.0.",
                )
                state |= {
                    target + k.removeprefix(source): v
                    for k, v in net.state_dict().items()
                    if k.startswith(source)
                }
            join = f"cells.{place}.join."
            state |= {k: v for k, v in net.state_dict().items() if k.startswith(join)}
        small.load_state_dict(state)
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(small(x), net(x), atol=1e-5, rtol=1e-4)


def test_the_last_stage_mixes_sparse_operations() -> None:
    genotype, net = DASS(0.75, (1, 1, 1), width=2).search(job(), job(1))
    assert set(genotype) == {"normal", "reduction"} and all(len(chosen) == 4 for chosen in genotype.values())
    weights = [m.weight for m in net.cells.modules() if isinstance(m, torch.nn.Conv2d)]
    for weight in weights:
        assert int((weight != 0).sum()) == max(1, round(0.25 * weight.numel()))
    assert all(alpha.std().item() > 0 for alpha in net.alphas.values())
    _, dense = DASS(0.75, (1, 0, 0), width=2).search(job(), job(1))
    assert all(bool((m.weight != 0).all()) for m in dense.cells.modules() if isinstance(m, torch.nn.Conv2d))
    assert random_genotype(1) == random_genotype(1) != random_genotype(2)


def test_what_is_refused() -> None:
    with pytest.raises(BudgetError):
        DASS(1.0).search(job(), job())
    for stages in ((0, 1, 1), (1, 1, 0), (1, 0, 1)):
        with pytest.raises(ConfigError, match="both or none of the others"):
            DASS(stages=stages).search(job(), job())
