"""GCN, GIN and GAT: the sparse path equals torch-geometric's message passing, and edges are where they should
be.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch_geometric.nn as pyg
from torch_geometric.utils import dense_to_sparse

from zoo.errors import DataError
from zoo.graph.adjacency import weighted_gcn_value
from zoo.graph.models import GAT, GCN, GIN
from zoo.graph.teddy import ticket_mask
from zoo.graph.ticket import EdgeTicket

BUILDERS = {
    "gcn": lambda: GCN(12, 16, 3),
    "gin": lambda: GIN(12, 16, 3),
    "gat": lambda: GAT(12, 4, 3, heads=2),
}


@pytest.fixture(params=sorted(BUILDERS))
def model(request):
    torch.manual_seed(1)
    return BUILDERS[request.param]().double().eval()


def logits_and_gradients(model, *inputs):
    model.zero_grad()
    out = model(*inputs)
    (out.sin() * torch.arange(out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_sparse_path_equals_message_passing_with_gradients(model, graph):
    x = graph.x.double()
    plain, plain_grads = logits_and_gradients(model, x, graph.edge_index)
    fast, fast_grads = logits_and_gradients(model, *model.prepare(x, graph.edge_index))
    assert torch.allclose(plain, fast, atol=1e-10)
    for name, grad in plain_grads.items():
        assert torch.allclose(grad, fast_grads[name], atol=1e-8), name


def test_order_of_edges_does_not_matter(model, graph):
    x = graph.x.double()
    shuffled = graph.edge_index[:, torch.randperm(graph.edge_index.shape[1])]
    assert torch.allclose(model(x, graph.edge_index), model(x, shuffled), atol=1e-12)


def test_gcn_is_its_formula_on_the_pruned_graph(graph):
    torch.manual_seed(0)
    model = GCN(12, 16, 3).double().eval()
    keep = ticket_mask(graph.edge_index, 60, 0.5)
    adjacency = torch.zeros(60, 60, dtype=torch.float64)
    adjacency[tuple(graph.edge_index[:, keep])] = 1.0
    adjacency += torch.eye(60)
    root = adjacency.sum(1).rsqrt()  # degrees of the pruned graph: normalised after masking
    norm = root[:, None] * adjacency * root
    x = graph.x.double()
    hidden = (norm @ x @ model.conv1.lin.weight.t()).relu()
    expected = norm @ hidden @ model.conv2.lin.weight.t()
    assert torch.allclose(model(*model.prepare(x, graph.edge_index, keep)), expected, atol=1e-12)


def test_gin_is_its_formula(graph):
    torch.manual_seed(0)
    model = GIN(12, 16, 3).double().eval()
    with torch.no_grad():
        model.conv1.eps.fill_(0.3)
        model.conv2.eps.fill_(-0.2)
    adjacency = torch.zeros(60, 60, dtype=torch.float64)
    adjacency[tuple(graph.edge_index)] = 1.0
    x, eye = graph.x.double(), torch.eye(60, dtype=torch.float64)
    first = ((adjacency + 1.3 * eye) @ x @ model.conv1.nn.weight.t()).relu()
    second = ((adjacency + 0.8 * eye) @ first @ model.conv2.nn.weight.t()).relu()
    expected = (first @ model.readout.weight.t() + second) / 2
    assert torch.allclose(model(x, graph.edge_index), expected, atol=1e-12)


def test_layers_hold_torch_geometrics_parameters():
    ours, theirs = GAT(12, 4, 3, heads=2), pyg.GATConv(12, 4, heads=2, bias=False)
    names = {name: tuple(p.shape) for name, p in ours.conv1.named_parameters()}
    assert names == {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert isinstance(GCN(12, 4, 3).conv1, pyg.GCNConv)
    assert isinstance(GIN(12, 4, 3).conv1, pyg.GINConv)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_weight_zero_is_the_removal_of_the_edge(name, graph):
    torch.manual_seed(0)
    model = BUILDERS[name]().double().eval()
    keep = ticket_mask(graph.edge_index, 60, 0.5)
    x = graph.x.double()
    features, whole = model.prepare(x, graph.edge_index)
    row, col = whole.matrix.row, whole.matrix.col.long()
    dense_keep = torch.eye(60, dtype=torch.float64)
    dense_keep[tuple(graph.edge_index[:, keep].flip(0))] = 1.0
    weighted = whole.with_weight(dense_keep[row, col])
    expected = model(*model.prepare(x, graph.edge_index, keep))
    assert torch.allclose(model(features, weighted), expected, atol=1e-12)


def test_attention_weights_pass_gradcheck(make_graph):
    graph = make_graph(nodes=9)
    torch.manual_seed(0)
    model = GAT(12, 2, 3, heads=2).double().eval()
    features, adjacency = model.prepare(graph.x.double(), graph.edge_index)
    weight = torch.rand(adjacency.matrix.entries, dtype=torch.float64).add_(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: model(features, adjacency.with_weight(w)), (weight,))


@pytest.mark.parametrize("name", ["gat", "gcn"])
def test_a_weight_that_training_carried_past_zero_stays_finite(name, graph):
    """Without the magnitude a node's sum is 1 - 1.5 times its neighbours: no softmax, and no square root."""
    torch.manual_seed(0)
    model = BUILDERS[name]().double().eval()
    features, whole = model.prepare(graph.x.double(), graph.edge_index)
    between = whole.matrix.row != whole.matrix.col
    weight = torch.where(between, -1.5, 1.0).double().requires_grad_()
    out = model(features, whole.with_weight(weight))
    out.square().sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(weight.grad).all()
    if name == "gat":
        torch.testing.assert_close(out, model(features, whole.with_weight(weight.abs())))
    else:  # degrees 1 + 1.5 n, by hand
        value = weighted_gcn_value(whole.with_weight(weight))
        degree = 1 + 1.5 * torch.zeros(60).double().index_add(0, whole.matrix.row, between.double())
        ends = degree[whole.matrix.row] * degree[whole.matrix.col.long()]
        torch.testing.assert_close(value, weight / ends.sqrt())


def test_isolated_nodes_and_an_empty_graph_give_finite_logits(model, graph):
    empty = torch.empty(2, 0, dtype=torch.int64)
    for edges in (graph.edge_index, empty):
        out = model(*model.prepare(graph.x.double(), edges))
        assert torch.isfinite(out).all()
        assert torch.allclose(out, model(graph.x.double(), edges), atol=1e-12)


def test_half_precision_weights_compute_in_the_precision_of_the_features(graph):
    torch.manual_seed(0)
    model = GCN(12, 16, 3).eval()
    stored = copy.deepcopy(model).half()
    rounded = copy.deepcopy(stored).float()
    out = stored(graph.x, graph.edge_index)
    assert out.dtype == torch.float32
    assert torch.equal(out, rounded(graph.x, graph.edge_index))
    assert all(p.dtype == torch.float16 for p in stored.parameters())


def test_ticket_prunes_its_own_graph_in_any_order_and_refuses_others(model, graph):
    x = graph.x.double()
    keep = ticket_mask(graph.edge_index, 60, 0.4)
    expected = model(x, graph.edge_index[:, keep])
    model.ticket = EdgeTicket.draw(graph.edge_index, 60, keep)
    assert torch.allclose(model(x, graph.edge_index), expected, atol=1e-12)
    shuffled = graph.edge_index[:, torch.randperm(graph.edge_index.shape[1])]
    assert torch.allclose(model(x, shuffled), expected, atol=1e-12)
    assert torch.allclose(copy.deepcopy(model)(x, graph.edge_index), expected, atol=1e-12)
    other, _ = dense_to_sparse(1 - torch.eye(60))
    with pytest.raises(DataError, match='ticket belongs to the graph.*model.edges = "whole"'):
        model(x, other)
    model.edges = "whole"
    assert torch.isfinite(model(x, other)).all()
    model.edges = "some"
    with pytest.raises(DataError, match='must be "ticket", "whole" or'):
        model(x, graph.edge_index)


def test_ticket_notices_that_a_graph_was_changed_in_place(model, graph):
    edges = graph.edge_index.clone()
    model.ticket = EdgeTicket.draw(edges, 60, torch.ones(edges.shape[1], dtype=torch.bool))
    model(graph.x.double(), edges)
    edges[:, 0] = torch.tensor([59, 58])
    with pytest.raises(DataError, match="ticket belongs"):
        model(graph.x.double(), edges)


def test_ticket_survives_as_extras(graph):
    ticket = EdgeTicket.draw(graph.edge_index, 60, ticket_mask(graph.edge_index, 60, 0.4))
    again = EdgeTicket.from_extras(ticket.to_extras())
    assert again.graph == ticket.graph
    assert again.num_nodes == 60
    assert torch.equal(again.keep, ticket.keep)
    assert EdgeTicket.from_extras({}) is None
    with pytest.raises(DataError, match="needs"):
        EdgeTicket.from_extras({"edges/keep": ticket.keep})
    with pytest.raises(DataError, match="malformed"):
        EdgeTicket.from_extras({**ticket.to_extras(), "edges/keep": ticket.keep.float()})


@pytest.mark.parametrize("wrong, message", [(60, "names node 60"), (-1, "names node -1")])
def test_ids_out_of_range_are_refused(model, wrong, message, graph):
    edges = graph.edge_index.clone()
    edges[0, 3] = wrong
    with pytest.raises(DataError, match=message):
        model(graph.x.double(), edges)
    with pytest.raises(DataError, match=message):
        model.prepare(graph.x.double(), edges)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(model, value, graph):
    x = graph.x.double()
    x[7, 2] = value
    with pytest.raises(DataError, match="node 7, feature 2"):
        model.prepare(x, graph.edge_index)
