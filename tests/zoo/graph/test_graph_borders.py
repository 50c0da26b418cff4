"""Graphs that TEDDY and UGS do not take - several kinds of edges, sampled parts - and the ways round."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.transforms as T
from torch_geometric.data import HeteroData
from torch_geometric.nn import SAGEConv

import zoo
from zoo.errors import ConfigError, DataError
from zoo.graph import PrunedEdges, TeddyPrune, load_graph, save_graph
from zoo.graph.method import Teddy
from zoo.graph.models import GCN
from zoo.graph.train import graph_job
from zoo.graph.ugs import UGS


def several_kinds() -> HeteroData:
    """Papers that cite each other, and authors who wrote them."""
    data = HeteroData()
    generator = torch.Generator().manual_seed(0)
    data["paper"].x, data["author"].x = torch.randn(20, 4), torch.randn(6, 4)
    data["paper"].y, data["author"].y = torch.arange(20) % 2, torch.arange(6) % 2
    cites = torch.randint(20, (2, 40), generator=generator)
    data["paper", "cites", "paper"].edge_index = cites[:, cites[0] != cites[1]].unique(dim=1)
    data["author", "wrote", "paper"].edge_index = torch.stack([torch.arange(20) % 6, torch.arange(20)])
    return data


@pytest.mark.parametrize(
    "door",
    [
        lambda data, folder: TeddyPrune(0.3)(data),
        lambda data, folder: PrunedEdges.draw(torch.nn.Identity(), data, 0.3),
        lambda data, folder: save_graph(data, folder / "mine.npz"),
    ],
    ids=["transform", "wrapper", "file"],
)
def test_several_kinds_of_edges_are_refused_at_every_door_with_the_way_round(door, tmp_path):
    with pytest.raises(DataError, match=r"Received: HeteroData with 2 of them.*ToUndirected.*to_homogeneous"):
        door(several_kinds(), tmp_path)


def test_the_way_round_works():
    data = T.ToUndirected()(several_kinds()).to_homogeneous()
    pruned = TeddyPrune(0.3)(data)
    assert 0 < pruned.num_edges < data.num_edges
    assert pruned.edge_type.shape == (pruned.num_edges,) and pruned.node_type.shape == (26,)
    ticket = PrunedEdges.draw(SAGEConv(4, 3), data, 0.3)
    assert ticket(data.x, data.edge_index).shape == (26, 3)


class Loader(torch.utils.data.IterableDataset):
    """Parts of a graph, as NeighborLoader samples them."""

    def __len__(self):
        return 2

    def __iter__(self):
        yield from (load_graph("digits").subgraph(torch.arange(n, n + 50)) for n in (0, 50))


@pytest.mark.parametrize("method", [Teddy(), UGS()], ids=["teddy", "ugs"])
def test_jobs_on_parts_of_a_graph_are_refused_with_the_way_round(method):
    job = zoo.Job(Loader(), loss=lambda model, batch: model(batch.x, batch.edge_index).sum())
    with pytest.raises(ConfigError, match=r"scores and trains on a whole graph.*TeddyPrune") as refusal:
        method.sparsify(GCN(64, 8, 10), job)
    assert "\n" not in str(refusal.value)


def test_a_ticket_that_meets_a_part_of_its_graph_says_so_and_pruning_first_serves_parts():
    data = load_graph("digits")
    model = zoo.load("graph/teddy-gcn-digits-g30-w80")
    nodes = torch.arange(200)
    part = data.subgraph(nodes)
    with pytest.raises(DataError, match='model.edges = "whole" to use all edges as given'):
        model(part.x, part.edge_index)
    pruned = TeddyPrune(0.3)(data)
    part = pruned.subgraph(nodes)
    model.edges = "whole"
    kept = set(map(tuple, pruned.edge_index.t().tolist()))
    assert part.num_edges < data.subgraph(nodes).num_edges
    assert all(edge in kept for edge in map(tuple, part.edge_index.t().tolist()))
    assert model(part.x, part.edge_index).shape == (200, 10)


def test_teddy_trains_on_the_graph_of_its_job():
    """A model without a card, and a graph that no data set's name stands for."""
    data = load_graph("digits").subgraph(torch.arange(300))
    torch.manual_seed(0)
    model = GCN(64, 8, 10)
    job = graph_job(model, data, zoo.Recipe(epochs=2))
    made = Teddy(edge_sparsity=0.3, weight_sparsity=0.5).sparsify(model, job)
    ticket = made.model.ticket
    assert ticket.num_nodes == 300 and len(ticket.keep) == data.num_edges
    assert made.hyperparameters["dataset"] is None and made.hyperparameters["epochs"] == 2
    assert made.model(data.x, data.edge_index).shape == (300, 10)
