"""The graph domain inside the zoo: bundles, tasks, counters, the method and the experiment."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from zoo.bundles.catalog import find, list_models
from zoo.bundles.store import load
from zoo.errors import ConfigError, DataError, TaskError
from zoo.graph.data import load_graph
from zoo.graph.flops import count_graph
from zoo.graph.method import Teddy
from zoo.graph.models import GAT, GCN, GIN
from zoo.graph.studies import teddy
from zoo.graph.studies.teddy import TeddyOptions, measure, new_model
from zoo.graph.teddy import ticket_mask
from zoo.graph.ticket import EdgeTicket
from zoo.harness.tasks import get_task
from zoo.shared.masks import masks_of
from zoo.shared.ops import SparseLinear
from zoo.studies.cells import CellCache

BUNDLES = [name.partition("/")[2] for name in list_models("graph/*")]
DIGITS = [slug for slug in BUNDLES if "-digits" in slug]


@pytest.mark.parametrize("slug", BUNDLES)
def test_every_bundle_is_there_small_and_has_its_seeds(slug):
    bundle = find(f"graph/{slug}")
    bundle.check()
    card = bundle.card
    assert card.weights.bytes < 2 * 2**20
    assert len(card.metrics[0].per_seed) >= 3
    if card.dense_twin:
        assert find(card.dense_twin).card.metrics[0].per_seed == card.metrics[0].dense.per_seed
    if card.method.name == "teddy":
        edges, weights = (card.method.hyperparameters[f"{part}_sparsity"] for part in ("edge", "weight"))
        parts = card.sparsity.parts
        assert parts["weights"].total - parts["weights"].kept == math.ceil(parts["weights"].total * weights)
        if "-gat-" not in slug:  # GAT counts self-loops among the entries
            dropped = int(parts["edges"].total * edges)
            assert parts["edges"].total - parts["edges"].kept == dropped - dropped % 2


@pytest.mark.parametrize("slug", DIGITS)
def test_digits_bundles_measure_what_their_cards_say(slug):
    card, model = find(f"graph/{slug}").card, load(f"graph/{slug}")
    result = get_task("graph/digits").evaluate(model)
    assert result.n == 1297
    assert result.metrics["accuracy"].value == pytest.approx(card.metrics[0].value, abs=1e-9)
    assert result.metrics["accuracy"].stderr == pytest.approx(card.metrics[0].stderr, abs=1e-9)
    flops = get_task("graph/digits").flops(model)
    assert (flops.dense, flops.sparse) == (card.cost.flops.dense, card.cost.flops.sparse)


def test_loaded_as_a_newcomer_would():
    data, model = load_graph("digits"), load("graph/teddy-gcn-digits-g30-w80")
    logits = model(data.x, data.edge_index)
    assert logits.shape == (1797, 10)
    assert float((logits.argmax(1) == data.y)[data.test_mask].double().mean()) > 0.95
    fast = model(*model.prepare(data.x, data.edge_index))
    assert torch.allclose(logits, fast, atol=1e-4)


@pytest.mark.usefixtures("packs_all")
@pytest.mark.parametrize("architecture", ["gcn", "gat", "gin"])
def test_packed_execution_gives_the_same_logits(architecture):
    data, name = load_graph("digits"), f"graph/teddy-{architecture}-digits-g60-w95"
    masked, packed = load(name), load(name, execution="packed")
    linear = [module for module in packed.modules() if isinstance(module, SparseLinear)]
    assert len(linear) == (3 if architecture == "gin" else 2)  # also torch-geometric's own linear layers
    for x in (data.x, data.x * (torch.rand_like(data.x) < 0.2)):  # dense, and kept sparse
        expected = masked(x, data.edge_index)
        assert torch.allclose(expected, packed(x, data.edge_index), atol=1e-4)
        assert torch.allclose(expected, packed(*packed.prepare(x, data.edge_index)), atol=1e-4)


def test_a_task_refuses_logits_of_another_shape():
    class Wrong(torch.nn.Module):
        def forward(self, x, edge_index):
            return torch.zeros(len(x), 3)

    with pytest.raises(TaskError, match=r"expects logits of shape \(1797, 10\)"):
        get_task("graph/digits").evaluate(Wrong())


def test_a_task_accepts_models_of_its_widths():
    card = find("graph/dense-gcn-digits").card
    assert get_task("graph/digits").accepts(card)
    assert not get_task("graph/cora").accepts(card)


@pytest.mark.parametrize(
    "model, dense",
    [
        # projections + messages along E edges and n self-loops (GIN: eps instead of loops), twice FLOPs a MAC
        (GCN(12, 16, 3), lambda n, e: n * 12 * 16 + (e + n) * 16 + n * 16 * 3 + (e + n) * 3),
        (GIN(12, 16, 3), lambda n, e: n * 12 * 16 + (e + n) * 16 + 2 * n * 16 * 3 + (e + n) * 3),
        (
            GAT(12, 4, 3, heads=2),
            lambda n, e: n * 12 * 8 + 2 * n * 8 + (e + n) * 8 + n * 8 * 3 + 2 * n * 3 + (e + n) * 3,
        ),
    ],
    ids=["gcn", "gin", "gat"],
)
def test_operations_are_counted_by_hand(graph, model, dense):
    entries = graph.edge_index.shape[1]
    total = count_graph(model, graph.x, graph.edge_index).total
    assert total.flops == total.flops_kept == 2 * dense(60, entries)
    model.ticket = EdgeTicket.draw(graph.edge_index, 60, ticket_mask(graph.edge_index, 60, 0.5))
    kept = int(model.ticket.keep.sum())
    total = count_graph(model, graph.x, graph.edge_index).total
    assert total.flops == 2 * dense(60, entries)
    assert total.flops_kept == 2 * dense(60, kept)


def test_the_method_trains_a_ticket_beside_its_teacher():
    teacher = load("graph/dense-gcn-digits")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    made = Teddy(edge_sparsity=0.3, weight_sparsity=0.8, epochs=3).sparsify(teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    total = sum(p.numel() for p in made.model.parameters())
    assert made.masks.equal(masks_of(made.model))
    assert sum(mask.kept for mask in made.masks.values()) == total - math.ceil(0.8 * total)
    assert made.masks.lost_zeros(made.model) == []
    keep = made.extras["edges/keep"]
    assert len(keep) - int(keep.sum()) == int(0.3 * len(keep)) // 2 * 2
    assert made.hyperparameters["dataset"] == "digits"
    again = Teddy(edge_sparsity=0.3, weight_sparsity=0.8, epochs=3).sparsify(teacher)
    for one, other in zip(made.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_method_refuses_what_it_cannot_train():
    with pytest.raises(ConfigError, match="GCN, GAT and GIN"):
        Teddy().sparsify(torch.nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="option dataset"):
        Teddy().sparsify(GCN(64, 8, 10))
    for option in ("edge_sparsity", "weight_sparsity"):
        with pytest.raises(DataError, match=option):
            Teddy(**{option: 1.0}).sparsify(GCN(64, 8, 10))


@pytest.fixture
def tiny():
    return TeddyOptions(
        architectures=("gcn", "gat"),
        datasets=("digits",),
        levels=(5, 20),
        main_levels=(20,),
        seeds=2,
        ugs_seeds=1,
        epochs=1,
        hidden=8,
    )


def test_the_experiment_runs_resumes_and_reports(tiny, tmp_path):
    tiny = dataclasses.replace(tiny, architectures=("gcn",), levels=(2,), main_levels=(2,))
    first = teddy.STUDY.run(tiny, CellCache(tmp_path))
    assert not [v for v in first.verdicts if v.verdict == "not measured" and "level" not in v.claim]
    assert {plot.name for plot in first.plots} == {"accuracy-digits-gcn", "time-digits-gcn"}
    rows = {(row["arm"], row["level"], row["seed"]) for row in first.rows}
    assert len(rows) == len(first.rows)
    again = CellCache(tmp_path)
    second = teddy.STUDY.run(tiny, again)
    assert again.misses == 0
    assert second.tables == first.tables
    assert second.verdicts == first.verdicts


def test_cases_of_a_comparison_share_what_they_should(tiny):
    work = list(teddy.cases(tiny))
    assert {case["seed"] for case in work} == {0, 1}
    assert [case["level"] for case in work if case["arm"] == "ugs"] == ["k5 k20"] * 2
    assert {case["level"] for case in work if case["arm"] == "reversed"} == {"k20"}
    assert len({str(case) for case in work}) == len(work)


def test_arms_at_a_level_have_equal_counts(tmp_path):
    options, cells = TeddyOptions(epochs=1, hidden=8), CellCache(tmp_path)
    place = {"dataset": "digits", "architecture": "gcn", "seed": 0, "level": "k7", "lambda": 1.0}

    def run(arm):
        return measure(teddy.ARMS[arm].make, options, {**place, "arm": arm}, cells)

    found = [run(arm) for arm in ("teddy", "random", "reversed")]
    assert len({(one["edges_kept"], one["weights_kept"]) for one in found}) == 1
    weights_only = run("magnitude weights")
    assert weights_only["weights_kept"] == found[0]["weights_kept"]
    assert weights_only["edges_kept"] == load_graph("digits").edge_index.shape[1]
    assert found[0]["seconds"] > run("dense")["seconds"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architectures": ("gnn",)}, "Unknown architecture 'gnn'"),
        ({"levels": (0,)}, "Levels go from 1 to 20"),
        ({"hidden": 12}, "multiple of 8"),
    ],
)
def test_impossible_experiments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TeddyOptions(**options)


def test_unknown_architectures_are_refused():
    with pytest.raises(ConfigError, match="'gat', 'gcn', 'gin'"):
        new_model("sage", load_graph("digits"), 8, 0)
