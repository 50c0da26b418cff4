"""GTSP: tokens, heads and layers that are really gone, by hand; SMILES; refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import ConfigError, DataError
from zoo.graph.methods.gtsp import GTSP, GraphTransformer, NodeAttention, swapped
from zoo.graph.molecule_tasks import Barrier
from zoo.graph.molecules import Graphs, features_of, read_smiles
from zoo.graph.studies.gtsp import GraphBatches, graph_loss
from zoo.graph.studies.gtsp_nodes import Nodes, OneGraph, node_loss
from zoo.methods.conformance import images_job, plain_network
from zoo.shared.errors import BudgetError
from zoo.shared.train import Job, Recipe


def graphs(count: int = 16) -> Graphs:
    generator = torch.Generator().manual_seed(0)
    there = torch.arange(6) < torch.randint(2, 7, (count, 1), generator=generator)
    both = there[:, :, None] & there[:, None]
    edges = (torch.rand(count, 6, 6, generator=generator) < 0.4).float() * both
    features = torch.randn(count, 6, 5, generator=generator) * there[..., None]
    return Graphs(features, edges, there, (features[..., 0].sum(1) > 0).long())


def model() -> GraphTransformer:
    torch.manual_seed(0)
    return GraphTransformer(5, 8, (2, 2), 4)


def job() -> Job:
    return Job(GraphBatches(graphs(), 8), graph_loss, recipe=Recipe(epochs=4, lr=1e-3, optimizer="adam"))


def run(net: nn.Module, found: Graphs) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(found.features, found.edges, found.there)


def test_padding_changes_nothing() -> None:
    found = graphs()
    wide = Graphs(
        nn.functional.pad(found.features, (0, 0, 0, 3), value=7.0),
        nn.functional.pad(found.edges, (0, 3, 0, 3)),
        nn.functional.pad(found.there, (0, 3)),
        found.labels,
    )
    made = zoo.sparsify(model(), method="gtsp", job=job(), axis="tokens").model
    for net in (model(), made):
        torch.testing.assert_close(run(net, wide), run(net, found), atol=1e-5, rtol=1e-4)


def test_half_the_nodes_of_each_graph_attend_by_hand() -> None:
    torch.manual_seed(0)
    attention = NodeAttention(4, 1, 4, 0.5).eval()
    with torch.no_grad():
        attention.score.weight.copy_(torch.tensor([[1.0, 0, 0, 0]]))
    x = torch.randn(1, 5, 4)
    x[0, :, 0] = torch.tensor([3.0, 1, 2, 9, 0])
    there = torch.tensor([[True, True, True, False, False]])
    chosen, gate = attention._choose(x, there)
    assert chosen.tolist() == [[True, False, True, False, False]] and gate.unique().tolist() == [1]
    out = attention(x, there)
    assert out[0, [1, 3, 4]].abs().max().item() == 0
    torch.testing.assert_close(out[0, [0, 2]], attention._attend(x[:, [0, 2]], there[:, :2])[0])
    out.sum().backward()
    assert attention.score.weight.grad.abs().max().item() > 0


def test_heads_swap_by_importance_by_hand_and_a_cut_is_exact() -> None:
    gates, importance = torch.tensor([1.0, 1, 0, 0]), torch.tensor([5.0, 1, 3, 2])
    assert swapped(gates, importance, 1).tolist() == [1, 0, 1, 0]
    assert swapped(gates, importance, 9).tolist() == [0, 0, 1, 1]
    torch.manual_seed(0)
    attention = NodeAttention(8, 4, 2)
    x, there = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    attention.gates = torch.tensor([0.0, 1, 0, 1])
    masked = attention(x, there)
    attention.cut([1, 3])
    assert attention.heads == 2 and attention.qkv.out_features == 12
    torch.testing.assert_close(attention(x, there), masked)


@pytest.mark.parametrize("axis", ["tokens", "heads", "layers", "weights"])
def test_every_axis_leaves_half_out_and_comes_back_from_its_arguments(axis) -> None:
    net = model()
    made = zoo.sparsify(net, method="gtsp", job=job(), axis=axis)
    same = zoo.sparsify(net, method="gtsp", job=job(), axis=axis)
    found = graphs()
    assert torch.equal(run(made.model, found), run(same.model, found))
    kept, total = (sum(one.heads for one in m.attentions()) for m in (made.model, net))
    left = made.extras.get("heads/keep")
    assert (left is None) == (axis not in ("heads", "layers")) == (not made.parts)
    assert left is None or (int(left.sum()), len(left)) == (kept, total)
    again = GraphTransformer(**made.arguments)
    again.load_state_dict(made.model.state_dict())
    torch.testing.assert_close(run(again, found), run(made.model, found))
    arguments = made.arguments
    wanted = {"heads": [1, 1], "layers": [0, 2]}.get(axis, [2, 2])
    assert sorted(arguments["heads"]) == wanted and arguments["share"] == (0.5 if axis == "tokens" else 1)
    assert made.masks.sparsity() == 0.5 if axis == "weights" else not made.masks


def test_weights_of_any_module_and_the_rest_refused() -> None:
    made = zoo.sparsify(plain_network(0), method="gtsp", job=images_job(GTSP), share=0.5)
    assert made.masks.sparsity() == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ConfigError, match="gtsp leaves heads out of a GraphTransformer; of Sequential"):
        zoo.sparsify(plain_network(0), method="gtsp", job=images_job(GTSP), axis="heads")
    with pytest.raises(BudgetError, match="1.0"):
        zoo.sparsify(model(), method="gtsp", job=job(), share=1.0)
    with pytest.raises(ConfigError, match="none were given"):
        GTSP().sparsify(model())


def test_nodes_are_classified_each_for_itself() -> None:
    torch.manual_seed(0)
    one = graphs(1)
    n = one.features.shape[1]
    train = torch.tensor([True, True, False] + [False] * (n - 3))
    graph = Nodes(
        one.features, one.edges, torch.ones(1, n, dtype=torch.bool), torch.arange(n) % 3, train, ~train
    )
    net = GraphTransformer(5, 8, (2, 2), 4, classes=3, nodes=True)
    logits = net(*graph[:3])
    assert logits.shape == (1, n, 3)
    by_hand = -logits[0].log_softmax(1)[[0, 1], [0, 1]].mean()
    torch.testing.assert_close(node_loss(net, graph), by_hand)
    job = Job(OneGraph(graph), node_loss, recipe=Recipe(epochs=2, lr=1e-3, optimizer="adam"))
    made = zoo.sparsify(net, method="gtsp", job=job, axis="tokens")
    again = GraphTransformer(**made.arguments)
    again.load_state_dict(made.model.state_dict())
    assert made.arguments["nodes"] and torch.equal(again.eval()(*graph[:3]), made.model(*graph[:3]))


def test_smiles_by_hand() -> None:
    found = read_smiles("C[N+](C)=CC(=O)c1ccc(Cl)cc1.[Na+]")
    assert len(found.elements) == 14 and found.charge[1] == 1 and sum(found.aromatic) == 6
    bonds = dict(zip(found.bonds, found.orders, strict=True))
    assert bonds[0, 1] == 1 and bonds[1, 3] == 2 and bonds[4, 5] == 2 and bonds[6, 12] == 1.5
    assert bonds[9, 10] == 1 and len(bonds) == 13
    features, edges = features_of(read_smiles("CC=O"))
    assert edges.tolist() == [[0, 1, 0], [1, 0, 2], [0, 2, 0]]
    # The walk of two steps comes back to the middle for sure, to an end in one of two cases.
    assert features[:, -7].tolist() == [0.5, 1, 0.5] and features[1, 12].item() == 0.5
    for text, message in (("C!", "position 1"), ("C1CC", "left open"), ("CC)", "never open")):
        with pytest.raises(DataError, match=message):
            read_smiles(text)


def test_the_task_ranks_molecules(monkeypatch) -> None:
    found = graphs()
    monkeypatch.setattr("zoo.graph.molecule_tasks.split", lambda seed: (found, found))

    class Ranked(GraphTransformer):
        def forward(self, features, edges, there):
            # Right about all but the largest one of class 0, which is put above two of class 1.
            score = found.labels * 2.0 + torch.arange(len(found.labels)) * 1e-3
            score[(found.labels == 0).nonzero()[0]] = score[found.labels == 1].sort().values[1] + 5e-4
            return torch.stack([-score / 2, score / 2], 1) - torch.tensor([-0.5, 0.5])

    metrics = Barrier().evaluate(Ranked(5)).metrics
    ones, zeros = int(found.labels.sum()), int((found.labels == 0).sum())
    assert metrics["auc"].value == pytest.approx(1 - 2 / (ones * zeros))
    assert metrics["accuracy"].value == pytest.approx(1 - 1 / len(found.labels))
