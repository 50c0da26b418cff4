"""TeddyPrune in a torch-geometric pipeline."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch_geometric.transforms as T
from torch_geometric.data import Data, HeteroData

from zoo.errors import DataError
from zoo.graph.teddy import ticket_mask
from zoo.graph.transform import TeddyPrune


def test_prunes_in_a_pipeline_and_leaves_its_input_alone(graph):
    before = graph.edge_index.clone()
    pruned = T.Compose([T.NormalizeFeatures(), TeddyPrune(0.3)])(graph)
    keep = ticket_mask(graph.edge_index, 60, 0.3)
    assert torch.equal(pruned.edge_index, graph.edge_index[:, keep])
    assert torch.equal(graph.edge_index, before)
    assert pruned.num_nodes == 60
    assert torch.equal(pruned.y, graph.y)
    assert torch.allclose(pruned.x.sum(1), torch.ones(60))


def test_what_belongs_to_edges_stays_aligned(graph):
    entries = graph.edge_index.shape[1]
    low, high = graph.edge_index.aminmax(dim=0)
    graph.edge_weight = 1.0 + (low * 60 + high) / 3600  # differs from edge to edge, the same both ways
    graph.edge_attr = torch.stack([graph.edge_index[0], graph.edge_index[1]], dim=1).float()
    pruned = TeddyPrune(0.4)(graph)
    assert 0 < pruned.num_edges < entries
    assert torch.equal(pruned.edge_attr.t(), pruned.edge_index.float())
    low, high = pruned.edge_index.aminmax(dim=0)
    assert torch.equal(pruned.edge_weight, 1.0 + (low * 60 + high) / 3600)


def test_zero_weights_are_edges_of_no_degree(graph):
    graph.edge_weight = torch.zeros(graph.edge_index.shape[1])
    assert TeddyPrune(0.5)(graph).num_edges < graph.num_edges


def test_self_loops_stay(graph):
    pruned = T.Compose([T.AddSelfLoops(), TeddyPrune(0.5)])(graph)
    assert int((pruned.edge_index[0] == pruned.edge_index[1]).sum()) == 60


def test_isolated_nodes_are_no_obstacle():
    lonely = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=5)
    assert TeddyPrune(0.0)(lonely).num_edges == 2
    nothing = Data(edge_index=torch.empty(2, 0, dtype=torch.int64), num_nodes=5)
    assert TeddyPrune(0.5)(nothing).num_edges == 0


def test_is_printed_and_pickled():
    transform = pickle.loads(pickle.dumps(TeddyPrune(0.3)))
    assert repr(transform) == "TeddyPrune(0.3)"


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_impossible_sparsities_are_refused_at_once(sparsity):
    with pytest.raises(DataError, match=r"must lie in \[0, 1\)"):
        TeddyPrune(sparsity)


def broken(graph: Data, what: str) -> Data:
    data = graph.clone()
    entries = data.edge_index.shape[1]
    if what == "directed":
        data.edge_index = data.edge_index[:, 1:]
    elif what == "repeated":
        data.edge_index = torch.cat([data.edge_index, data.edge_index[:, :1]], dim=1)
    elif what == "out of range":
        data.edge_index = torch.cat([data.edge_index, torch.tensor([[70, 0], [0, 70]])], dim=1)
    elif what == "negative id":
        data.edge_index[0, 0] = -1
    elif what == "nan features":
        data.x[3, 1] = float("nan")
    else:
        value = {"negative weight": -1.0, "nan weight": float("nan"), "infinite weight": float("inf")}
        data.edge_weight = torch.full((entries,), value.get(what, 1.0))
        if what == "lopsided weight":
            data.edge_weight[0] = 2.0
        if what == "short weight":
            data.edge_weight = data.edge_weight[1:]
    return data


@pytest.mark.parametrize(
    "what, message",
    [
        ("directed", "ToUndirected"),
        ("repeated", "coalesce"),
        ("out of range", "names node 70"),
        ("negative id", "names node -1"),
        ("nan features", "node 3, feature 1"),
        ("negative weight", "not negative"),
        ("nan weight", "finite"),
        ("infinite weight", "finite"),
        ("lopsided weight", "differs between"),
        ("short weight", "one entry per edge"),
    ],
)
def test_bad_graphs_are_refused(graph, what, message):
    with pytest.raises(DataError, match=message):
        TeddyPrune(0.3)(broken(graph, what))


def test_other_kinds_of_data_are_refused():
    with pytest.raises(DataError, match="no relation"):
        TeddyPrune(0.3)(HeteroData())
    with pytest.raises(DataError, match="homogeneous"):
        TeddyPrune(0.3)(Data(x=torch.ones(3, 1)))
