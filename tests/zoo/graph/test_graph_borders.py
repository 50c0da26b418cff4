"""Several kinds of edges, sampled parts, links and many graphs: what is pruned, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch_geometric
import torch_geometric.transforms as T
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.loader import DataLoader, NeighborLoader, RandomNodeLoader
from torch_geometric.nn import GraphConv, HeteroConv, SAGEConv
from torch_geometric.utils import k_hop_subgraph

import zoo
from zoo.errors import ConfigError, DataError
from zoo.graph import PrunedEdges, PrunedRelations, TeddyPrune, load_graph, parts_job, save_graph
from zoo.graph.method import Teddy
from zoo.graph.models import GCN
from zoo.graph.ticket import EdgeTicket
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
        lambda data, folder: PrunedEdges.draw(torch.nn.Identity(), data, 0.3),
        lambda data, folder: save_graph(data, folder / "mine.npz"),
    ],
    ids=["wrapper", "file"],
)
def test_doors_for_one_kind_of_edges_refuse_several_with_the_ways_round(door, tmp_path):
    with pytest.raises(
        DataError, match=r"HeteroData with 2 kinds.*PrunedRelations.*ToUndirected.*to_homogeneous"
    ):
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


def reference(edge_index, sources, targets, sparsity):
    """TEDDY on the undirected graph over both sides, written out with dense matrices."""
    a = torch.zeros(sources + targets, sources + targets, dtype=torch.float64)
    a[edge_index[0], sources + edge_index[1]] = 1
    a = a + a.t()
    d = a.sum(1)
    inverse = torch.where(d > 0, 1 / d, 0.0)
    t = inverse * inverse * (a @ inverse.sqrt())
    scores = (t[:, None] * t)[edge_index[0], sources + edge_index[1]]
    dropped = int(2 * len(scores) * sparsity) // 2
    return scores.argsort(stable=True)[dropped:], scores


def test_each_relation_loses_its_edges_of_lowest_score():
    data = several_kinds()
    data["author", "wrote", "paper"].edge_attr = torch.arange(20.0)
    pruned = TeddyPrune(0.3)(data)
    for kind, (sources, targets) in (
        (("paper", "cites", "paper"), (20, 20)),
        (("author", "wrote", "paper"), (6, 20)),
    ):
        edges = data[kind].edge_index
        kept, scores = reference(edges, sources, targets, 0.3)
        found = {tuple(edge) for edge in pruned[kind].edge_index.t().tolist()}
        assert len(found) == edges.shape[1] - int(0.6 * edges.shape[1]) // 2 == len(kept)
        inside = torch.tensor([tuple(edge) in found for edge in edges.t().tolist()])
        assert scores[inside].min() >= scores[~inside].max() - 1e-12
    wrote = pruned["author", "wrote", "paper"]
    assert torch.equal(wrote.edge_attr.long() % 6, wrote.edge_index[0]), "cut with the edges"
    one = TeddyPrune({("author", "wrote", "paper"): 0.5})(data)
    assert one["author", "wrote", "paper"].num_edges == 10
    assert one["paper", "cites", "paper"].num_edges == data["paper", "cites", "paper"].num_edges
    with pytest.raises(DataError, match=r"no relation \('author', 'read', 'paper'\); it has"):
        TeddyPrune({("author", "read", "paper"): 0.5})(data)
    data["author", "wrote", "paper"].edge_index[0, 0] = 6
    with pytest.raises(DataError, match=r"relation \('author', 'wrote', 'paper'\): edge_index"):
        TeddyPrune(0.3)(data)


def test_a_relation_and_its_reverse_stay_one_set_of_edges():
    data = T.ToUndirected()(several_kinds())
    shuffled = data["paper", "rev_wrote", "author"].edge_index[:, torch.randperm(20)]
    data["paper", "rev_wrote", "author"].edge_index = shuffled
    pruned = TeddyPrune(0.4)(data)
    forth = {tuple(edge) for edge in pruned["author", "wrote", "paper"].edge_index.t().tolist()}
    back = {(b, a) for a, b in pruned["paper", "rev_wrote", "author"].edge_index.t().tolist()}
    assert forth == back and len(forth) == 12
    cites = pruned["paper", "cites", "paper"].edge_index  # undirected now: one decision for both directions
    assert {tuple(e) for e in cites.t().tolist()} == {(b, a) for a, b in cites.t().tolist()}


class Kinds(torch.nn.Module):
    """A layer for each relation."""

    def __init__(self, data):
        super().__init__()
        convolutions = {kind: GraphConv((4, 4), 3) for kind in data.edge_types}
        self.layer = HeteroConv(convolutions)

    def forward(self, x, edge_index, edge_weight_dict=None):
        weights = {} if edge_weight_dict is None else {"edge_weight_dict": edge_weight_dict}
        return self.layer(x, edge_index, **weights)["paper"]


def test_a_ticket_for_a_module_of_several_kinds():
    data = T.ToUndirected()(several_kinds())
    torch.manual_seed(0)
    module = Kinds(data).eval()
    pruned = PrunedRelations.draw(module, data, 0.4)
    kept = TeddyPrune(0.4)(data)
    expected = module(kept.x_dict, kept.edge_index_dict)
    torch.testing.assert_close(pruned(data.x_dict, data.edge_index_dict), expected)
    assert not torch.allclose(module(data.x_dict, data.edge_index_dict), expected)
    for kind in data.edge_types:
        data[kind].edge_weight = torch.ones(data[kind].num_edges)
    weighted = pruned(data.x_dict, data.edge_index_dict, edge_weight_dict=data.edge_weight_dict)
    torch.testing.assert_close(weighted, expected)
    masks = zoo.sparsify(pruned, sparsity=0.5)
    assert masks.lost_zeros(pruned) == []
    data["author", "wrote", "paper"].edge_index = data["author", "wrote", "paper"].edge_index[:, 1:]
    with pytest.raises(DataError, match=r"\('author', 'wrote', 'paper'\): .*belongs to the graph"):
        pruned(data.x_dict, data.edge_index_dict)
    data["author", "read", "paper"].edge_index = torch.tensor([[0], [0]])
    with pytest.raises(DataError, match="no ticket for the relation"):
        pruned(data.x_dict, data.edge_index_dict)


class Neighbours(torch.utils.data.DataLoader):
    """Nodes asked for and all their neighbours, in batches of the form that NeighborLoader gives."""

    def __init__(self, data, nodes, batch_size):
        self.data = data
        ids = nodes.nonzero().flatten().tolist()
        super().__init__(ids, batch_size=batch_size, shuffle=True, collate_fn=self.around)

    def around(self, seeds):
        seeds = torch.tensor(seeds)
        subset = k_hop_subgraph(seeds, 2, self.data.edge_index, num_nodes=self.data.num_nodes)[0]
        order = torch.cat([seeds, subset[~torch.isin(subset, seeds)]])
        place = torch.full((self.data.num_nodes,), -1)
        place[order] = torch.arange(len(order))
        ends = place[self.data.edge_index]
        part = Data(self.data.x[order], ends[:, (ends >= 0).all(0)], y=self.data.y[order], n_id=order)
        part.batch_size, part.input_id = len(seeds), seeds
        return part


LOADERS = {
    "random nodes": lambda data: RandomNodeLoader(data, 3, shuffle=True),
    "neighbours": lambda data: Neighbours(data, data.train_mask, 8),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_ticket_is_trained_on_parts_of_its_graph(graph, name):
    seen = []

    def loader(data):
        seen.append(data)
        return LOADERS[name](data)

    def made():
        torch.manual_seed(0)
        model = GCN(12, 8, 3)
        job = parts_job(model, graph, loader, zoo.Recipe(epochs=3, optimizer="adam", select="best"))
        return Teddy(edge_sparsity=0.3, weight_sparsity=0.5).sparsify(model, job)

    one, again = made(), made()
    ticket = one.model.ticket
    pruned = TeddyPrune(0.3)(graph)
    assert torch.equal(seen[1].edge_index, pruned.edge_index), "what is sampled is what is left"
    assert torch.equal(ticket.prune(graph).edge_index, pruned.edge_index)
    kept, total = (sum(getattr(mask, key) for mask in one.masks.values()) for key in ("kept", "numel"))
    assert 1 - kept / total == pytest.approx(0.5, abs=0.01)
    for a, b in zip(one.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), "the seed decides"
    assert one.model(graph.x, graph.edge_index).shape == (60, 3)


def test_parts_train_any_module_and_the_nodes_asked_for_alone(graph):
    """One part with all nodes is the whole graph; with `batch_size` only the first nodes count."""
    torch.manual_seed(0)
    graph.edge_weight = torch.rand(graph.num_edges)
    model = Weighted()
    whole = parts_job(model, graph, lambda data: [data])
    logits = model(graph.x, graph.edge_index, graph.edge_weight)
    nodes = graph.train_mask
    expected = torch.nn.functional.cross_entropy(logits[nodes], graph.y[nodes])
    torch.testing.assert_close(whole.loss(model, whole.batches.kept), expected)
    first = graph.clone()
    first.n_id, first.batch_size = torch.arange(60), 2
    expected = torch.nn.functional.cross_entropy(logits[:2], graph.y[:2])
    torch.testing.assert_close(whole.loss(model, first), expected)
    teacher = torch.randn(60, 3)
    taught = parts_job(model, graph, lambda data: [data], teacher=teacher, distillation=2.0)
    divergence = (teacher[:2].softmax(1) * (teacher[:2].log_softmax(1) - logits[:2].log_softmax(1))).sum(1)
    torch.testing.assert_close(taught.loss(model, first), expected + 2 * divergence.mean())
    del first.n_id
    with pytest.raises(DataError, match="needs n_id"):
        whole.loss(model, first)
    none = graph.subgraph(graph.test_mask)
    none.n_id = torch.arange(60)[graph.test_mask]
    assert whole.loss(model, none).item() == 0
    masks = zoo.sparsify(model, sparsity=0.5)
    whole.replace(recipe=zoo.Recipe(epochs=2, lr=0.01)).fit_masked(model)
    assert masks.lost_zeros(model) == []


class Weighted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = GraphConv(12, 3)

    def forward(self, x, edge_index, edge_weight=None):
        return self.layer(x, edge_index, edge_weight)


def test_neighbor_loader_itself(graph):
    if not (torch_geometric.typing.WITH_PYG_LIB or torch_geometric.typing.WITH_TORCH_SPARSE):
        pytest.skip("NeighborLoader needs pyg-lib or torch-sparse")
    torch.manual_seed(0)
    model = GCN(12, 8, 3)
    job = parts_job(model, graph, lambda data: NeighborLoader(data, [5, 5], input_nodes=data.train_mask))
    made = Teddy(epochs=2).sparsify(model, job.replace(recipe=zoo.Recipe(epochs=2, select="best")))
    assert made.model(graph.x, graph.edge_index).shape == (60, 3)


def test_candidates_of_a_link_task_stay(graph):
    torch.manual_seed(0)
    split = T.RandomLinkSplit(is_undirected=True, neg_sampling_ratio=1.0)(graph)[0]
    assert len(split.edge_label) == split.num_edges, "the case in which they look like entries"
    pruned = TeddyPrune(0.3)(split)
    assert pruned.num_edges < split.num_edges
    assert torch.equal(pruned.edge_label_index, split.edge_label_index)
    assert torch.equal(pruned.edge_label, split.edge_label)
    model = PrunedEdges.draw(SAGEConv(12, 4), split, 0.3)
    masks = zoo.sparsify(model, sparsity=0.5)

    def loss(trained, batch):
        a, b = trained(batch.x, batch.edge_index)[batch.edge_label_index]
        return torch.nn.functional.binary_cross_entropy_with_logits((a * b).sum(1), batch.edge_label)

    before = loss(model, split).item()
    zoo.Job([split], loss, recipe=zoo.Recipe(epochs=20, lr=0.02)).fit_masked(model)
    assert loss(model, split).item() < before and masks.lost_zeros(model) == []


def test_many_graphs_are_pruned_one_by_one(make_graph):
    graphs = [make_graph(nodes, seed=nodes) for nodes in (20, 30, 45)]
    alone = [TeddyPrune(0.4)(one) for one in graphs]
    batch = TeddyPrune(0.4)(Batch.from_data_list(graphs))
    assert torch.equal(batch.edge_index, Batch.from_data_list(alone).edge_index)
    assert torch.equal(next(iter(DataLoader(alone, batch_size=3))).edge_index, batch.edge_index)
    with pytest.raises(DataError, match="Shares by relation are for a HeteroData"):
        TeddyPrune({("a", "b", "c"): 0.3})(graphs[0])
    with pytest.raises(DataError, match=r"must lie in \[0, 1\)"):
        TeddyPrune({("a", "b", "c"): 1.0})


@pytest.mark.parametrize("method", [Teddy(), UGS()], ids=["teddy", "ugs"])
def test_jobs_of_which_the_whole_graph_is_unknown_are_refused_with_the_way_round(method):
    job = zoo.Job(Loader(), loss=lambda model, batch: model(batch.x, batch.edge_index).sum())
    with pytest.raises(
        ConfigError, match=r"scores and trains on a whole graph.*parts_job.*TeddyPrune"
    ) as refusal:
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


def test_a_ticket_sees_edits_that_no_version_counter_sees():
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    ticket = EdgeTicket.draw(edges, 3, torch.tensor([True, True, False, False]))
    assert ticket.mask_for(edges, 3).tolist() == [True, True, False, False]
    edges.numpy()[:] = edges.numpy()[:, ::-1].copy()  # the same graph in another order
    assert ticket.mask_for(edges, 3).tolist() == [False, False, True, True]
    edges.data[1, 0] = 0
    with pytest.raises(DataError, match="belongs to the graph"):
        ticket.mask_for(edges, 3)
    with pytest.raises(DataError, match="belongs to the graph"):
        ticket.mask_for(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), 2, targets=1)
