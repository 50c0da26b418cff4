"""Graphs of your own: files, plug-ins, the same checks behind every door, tickets for other modules."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch_geometric.nn as pyg
from torch_geometric.data import Data

import zoo
from zoo.bundles.card import read_card
from zoo.bundles.sources import Source
from zoo.cli import main
from zoo.errors import ConfigError, DataError
from zoo.graph import (
    PrunedEdges,
    flops,  # noqa: F401  (registers the counters)
    load_graph,
    save_graph,
)
from zoo.graph.data import source_named
from zoo.graph.files import read_graph
from zoo.graph.models import GCN
from zoo.graph.teddy import ticket_mask
from zoo.graph.ticket import EdgeTicket
from zoo.harness.runner import evaluate
from zoo.harness.verify import verify
from zoo.registry import DATASETS
from zoo.shared.measure.account import count


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_graph_comes_back_as_it_was(graph, tmp_path, suffix):
    path = save_graph(graph, tmp_path / f"mine{suffix}")
    back = load_graph(str(path))
    for name in ("x", "y", "edge_index", "train_mask", "val_mask", "test_mask"):
        assert torch.equal(back[name], graph[name]), name
    assert source_named(str(path)).title == f"mine{suffix}"


def test_a_file_without_a_split_is_given_one_per_class(graph, tmp_path):
    for name in ("train_mask", "val_mask", "test_mask"):
        del graph[name]
    graph.y[:6] = -1  # unknown classes take no part
    data = read_graph(save_graph(graph, tmp_path / "mine.npz"))
    masks = torch.stack([data.train_mask, data.val_mask, data.test_mask]).int().sum(0)
    assert masks[:6].tolist() == [0] * 6 and masks[6:].tolist() == [1] * 54
    assert torch.equal(data.y[data.train_mask].unique(), graph.y[6:].unique())


def hostile(path, kind, graph):
    arrays = {"x": graph.x.numpy(), "y": graph.y.numpy(), "edge_index": graph.edge_index.numpy()}
    if kind == "directed":
        arrays["edge_index"] = arrays["edge_index"][:, 1:]
    elif kind == "repeated":
        arrays["edge_index"] = np.concatenate([arrays["edge_index"], arrays["edge_index"]], 1)
    elif kind == "out of range":
        arrays["edge_index"] = arrays["edge_index"] + 7
    elif kind == "nan":
        arrays["x"] = np.full_like(arrays["x"], np.nan)
    elif kind == "no labels":
        del arrays["y"]
    elif kind == "half a split":
        arrays["train_mask"] = np.ones(60, dtype=bool)
    elif kind == "objects":
        arrays["x"] = np.array([Harm()], dtype=object)
    np.savez_compressed(path, **arrays)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    return path


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("directed", "ToUndirected"),
        ("repeated", "coalesce"),
        ("out of range", "names node"),
        ("nan", "not finite"),
        ("no labels", "lacks 'y'"),
        ("half a split", "a split is train_mask, val_mask, test_mask"),
        ("objects", "plain arrays"),
        ("a bomb", "unpack to"),
        ("cut", "cannot be read"),
    ],
)
def test_files_that_are_refused(graph, tmp_path, kind, message, monkeypatch):
    if kind == "a bomb":
        monkeypatch.setenv("ZOO_MAX_UNPACKED", "1000")
    with pytest.raises(DataError, match=f"mine.npz: .*{message}"):
        load_graph(str(hostile(tmp_path / "mine.npz", kind, graph)))


@pytest.mark.parametrize("name", ["mine.pt", "mine.pkl"])
def test_pickles_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Harm()))
    with pytest.raises(DataError, match="is a pickle, .* not read.*save_graph"):
        load_graph(str(tmp_path / name))
    with pytest.raises(DataError, match="Unknown graph 'photo'. There are: citeseer.*or give a file"):
        load_graph("photo")


def test_a_data_set_of_another_package(graph, monkeypatch):
    def photo() -> Data:
        return graph

    photo.source = Source("Photo", "somewhere", "CC0")
    monkeypatch.setitem(DATASETS._entries, "graph/photo", photo)
    assert torch.equal(load_graph("photo").x, graph.x) and source_named("photo").licence == "CC0"
    graph.edge_index = graph.edge_index[:, 1:]
    with pytest.raises(DataError, match="The data set 'photo': The graph is directed"):
        load_graph("photo")


def test_an_own_graph_goes_through_every_command(graph, tmp_path, monkeypatch, capsys):
    """finetune makes a dense model of it, sparsify a ticket, eval and verify measure on it."""
    monkeypatch.chdir(tmp_path)
    save_graph(graph, "mine.npz")
    start = ["finetune", "graph", "--model", "graph/dense-gcn-digits", "--dataset", "mine.npz"]
    assert main([*start, "--epochs", "3", "--out", "dense"]) == 0
    card = read_card(tmp_path / "dense" / "card.yaml")
    assert card.metrics[0].task == "nodes:mine.npz" and card.data.source.startswith(
        "a file of its owner, sha"
    )
    assert card.architecture.args["out_channels"] == 3
    command = ["sparsify", "dense", "--method", "teddy", "--epochs", "2", "--edge-sparsity", "0.3"]
    assert main([*command, "--out", "teddy"]) == 0
    card = read_card(tmp_path / "teddy" / "card.yaml")
    assert [metric.task for metric in card.metrics] == ["nodes:mine.npz"]
    assert 0 < card.sparsity.parts["edges"].sparsity <= 0.3
    assert main(["eval", "teddy", "--data", "mine.npz"]) == 0
    assert [one.failed for one in verify(str(tmp_path / "teddy"))] == [[]]
    record = evaluate(zoo.load("teddy"), "nodes:mine.npz")[0]
    assert record.n == int(graph.test_mask.sum())
    capsys.readouterr()
    command = ["sparsify", "graph/dense-gcn-digits", "--method", "teddy", "--dataset", "mine.npz"]
    assert main([*command, "--out", "x"]) == 2
    assert "has 12 features and 3 classes, the model 64 and 10. Make a dense" in capsys.readouterr().err


def test_a_changed_model_is_saved_with_figures_of_its_own(tmp_path, caplog):
    ticket = "graph/teddy-gcn-digits-g60-w95"
    model, card = zoo.load(ticket), zoo.card(ticket)
    with torch.no_grad():
        model.conv2.lin.weight[:5].zero_()  # five classes are never chosen
    path = zoo.save(model, tmp_path / "mine", like=ticket)
    metric = read_card(path / "card.yaml").metrics[0]
    assert metric.value == metric.mean == evaluate(model, metric.task)[0].metrics["accuracy"].value
    assert metric.value < card.metrics[0].value - 0.1 and metric.dense == card.metrics[0].dense
    assert (
        list(metric.per_seed) == [card.method.seed]
        and "zoo.save" in read_card(path / "card.yaml").training.command
    )
    assert "other weights" not in caplog.text
    zoo.save(model, tmp_path / "copied", card=card)
    assert "figures were measured on other weights" in caplog.text and "like=" in caplog.text
    with pytest.raises(ConfigError, match="save it with like="):
        zoo.save(model, tmp_path / "x")


@pytest.mark.parametrize("door", ["mask", "draw", "file"])
def test_every_door_checks_the_graph(graph, tmp_path, door):
    graph.edge_index = graph.edge_index[:, 1:]
    with pytest.raises(DataError, match="directed"):
        if door == "mask":
            ticket_mask(graph.edge_index, 60, 0.3)
        elif door == "draw":
            PrunedEdges.draw(torch.nn.Identity(), graph, 0.3)
        else:
            save_graph(graph, tmp_path / "mine.npz")


class Stack(torch.nn.Module):
    """Convolutions that the zoo has no class for, one with weights of edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = pyg.GraphConv(12, 6), pyg.SAGEConv(6, 3)

    def forward(self, x, edge_index, edge_weight=None):
        return self.second(self.first(x, edge_index, edge_weight).relu(), edge_index)


def test_a_ticket_for_any_stack_of_convolutions(graph):
    low, high = graph.edge_index.aminmax(dim=0)
    graph.edge_weight = 1.0 + (low * 60 + high) / 3600
    torch.manual_seed(0)
    stack = Stack().eval()
    pruned = PrunedEdges.draw(stack, graph, 0.4)
    keep = ticket_mask(graph.edge_index, 60, 0.4, edge_weight=graph.edge_weight)
    assert not torch.equal(keep, ticket_mask(graph.edge_index, 60, 0.4)), "weights count"
    expected = stack(graph.x, graph.edge_index[:, keep], graph.edge_weight[keep])
    found = pruned(graph.x, graph.edge_index, edge_weight=graph.edge_weight)
    torch.testing.assert_close(found, expected)
    with pytest.raises(DataError, match="Name what belongs to edges"):
        pruned(graph.x, graph.edge_index, graph.edge_weight)
    masks = zoo.sparsify(pruned, sparsity=0.5)
    assert masks.lost_zeros(pruned) == []


def test_another_graph_is_refused_or_scored_again(graph):
    pruned = PrunedEdges.draw(Stack().eval(), graph, 0.4)
    grown = torch.cat([graph.edge_index, absent_edge(graph)], 1)
    with pytest.raises(DataError, match="belongs to the graph"):
        pruned(graph.x, grown)
    pruned.changed = "rescore"
    keep = ticket_mask(grown, 60, 1 - int(pruned.ticket.keep.sum()) / graph.num_edges)
    torch.testing.assert_close(pruned(graph.x, grown), pruned.module(graph.x, grown[:, keep]))
    model = GCN(12, 4, 3)
    model.ticket = EdgeTicket.draw(graph.edge_index, 60, ticket_mask(graph.edge_index, 60, 0.4))
    model.edges = "rescored"
    assert torch.equal(model.surviving(grown, 60), grown[:, keep])
    same = graph.edge_index[:, ticket_mask(graph.edge_index, 60, 0.4)]
    assert torch.equal(model.surviving(graph.edge_index, 60), same)


def absent_edge(graph):
    there = set(map(tuple, graph.edge_index.t().tolist()))
    a, b = next((a, b) for a in range(60) for b in range(a) if (a, b) not in there)
    return torch.tensor([[a, b], [b, a]])


@pytest.mark.parametrize(
    ("layer", "width", "weights"),
    [
        (pyg.SAGEConv(12, 5), 12, 2 * 12 * 5),  # neighbours are added before the projection
        (pyg.GraphConv(12, 5), 12, 2 * 12 * 5),
        (pyg.GINConv(torch.nn.Linear(12, 5)), 12, 12 * 5),
        (pyg.models.GCN(12, 5, num_layers=1), 5, 12 * 5),
    ],
)
def test_messages_of_other_convolutions_are_counted(graph, layer, width, weights):
    loops = 60 * width if isinstance(layer, pyg.models.GCN) else 0
    account = count(layer, (graph.x, graph.edge_index))
    assert account.total.macs == graph.num_edges * width + loops + 60 * weights and not account.uncounted
    keep = ticket_mask(graph.edge_index, 60, 0.4)
    kept = count(layer, (graph.x, graph.edge_index), edges=keep).total.macs_kept
    assert account.total.macs - kept == int((~keep).sum()) * width


def test_edge_weights_are_not_left_out_silently(graph, tmp_path):
    graph.edge_weight = torch.ones(graph.num_edges)
    path = save_graph(graph, tmp_path / "mine.npz")
    with pytest.raises(DataError, match="has edge weights, which GCN does not use"):
        evaluate(GCN(12, 4, 3).eval(), f"nodes:{path}")
