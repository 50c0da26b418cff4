"""DiffuseSG: codecs, relations, GIoU and preconditioning by hand, masks, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.networks.diffusesg import (  # noqa: E402
    CLASSES,
    MOST,
    Agreement,
    DiffuseSG,
    SceneGraphs,
    bits_of,
    decoded,
    encoded,
    from_bits,
    giou,
    graph_loss,
    graphs,
    independent,
    preconditioning,
    relations_of,
    to_bits,
)
from zoo.errors import ConfigError, DataError  # noqa: E402
from zoo.shared.train import Recipe  # noqa: E402


@pytest.fixture
def model() -> DiffuseSG:
    return DiffuseSG.fresh(0, width=16, depth=1).eval()


def isolated(field: str) -> SceneGraphs:
    """A graph of three nodes with a fourth that is not counted."""
    three = next(graphs("test")[i : i + 1] for i in range(99) if graphs("test").counts[i] == 3)
    values = getattr(three, field).clone()
    values[:, 4] = 1
    return dataclasses.replace(three, **{field: values})


def test_binary_digits_by_hand() -> None:
    assert to_bits(torch.tensor([0, 1, 4, 5]), 6).tolist() == [
        [-1, -1, -1],
        [1, -1, -1],
        [-1, -1, 1],
        [1, -1, 1],
    ]
    assert from_bits(torch.tensor([[0.2, -3.0, 0.1], [1.0, 1.0, 1.0]]), 6).tolist() == [5, 5]  # 7 is no class
    assert [bits_of(n) for n in (2, 4, 5, 8)] == [1, 2, 3, 3]
    with pytest.raises(ConfigError, match="two values; received 1"):
        to_bits(torch.zeros(1, dtype=torch.long), 1)
    with pytest.raises(DataError, match="0 to 5; received 2 to 6"):
        to_bits(torch.tensor([2, 6]), 6)


def test_relations_by_hand() -> None:
    """A large box; one inside it; one to its right; one below the large one, overlapping it in x."""
    boxes = torch.tensor(
        [[[0.3, 0.3, 0.4, 0.4], [0.3, 0.2, 0.1, 0.1], [0.8, 0.3, 0.2, 0.2], [0.3, 0.8, 0.3, 0.2]]]
    )
    pairs = ~torch.eye(4, dtype=torch.bool)[None]
    found = relations_of(boxes, pairs)[0]
    assert found[1, 0] == 3 and found[0, 1] == 0  # inside, and nothing back
    assert found[0, 2] == found[1, 2] == found[3, 2] == 1 and (found[2, :2] == 0).all()
    assert found[0, 3] == found[1, 3] == 2 and found[3, 0] == 0
    assert (found.diagonal() == 0).all()


def test_generalised_iou_by_hand() -> None:
    """Unit squares of side 0.2: shifted by half, overlap 0.02, union 0.06, hull 0.06; apart by one side,
    hull 0.12 of which 0.04 lie between."""
    box = torch.tensor([0.3, 0.5, 0.2, 0.2])
    assert float(giou(box, box)) == pytest.approx(1, abs=1e-5)
    assert float(giou(box, box + torch.tensor([0.1, 0, 0, 0]))) == pytest.approx(1 / 3, abs=1e-4)
    assert float(giou(box, box + torch.tensor([0.4, 0, 0, 0]))) == pytest.approx(-1 / 3, abs=1e-4)
    moved = torch.tensor([0.55, 0.5, 0.2, 0.2], requires_grad=True)
    giou(box, moved).backward()
    assert moved.grad[0] < 0  # nearer is better, also where nothing overlaps


def test_preconditioning_by_hand() -> None:
    skip, out, into = preconditioning(torch.tensor([0.5]))
    assert (float(skip), float(out), float(into)) == pytest.approx((0.5, 0.5 / 2**0.5, 2**0.5))


def test_agreement_and_triplets_by_hand() -> None:
    boxes = torch.zeros(1, MOST, 4)
    boxes[0, :2] = torch.tensor([[0.2, 0.5, 0.1, 0.1], [0.8, 0.5, 0.1, 0.1]])
    relations = torch.zeros(1, MOST, MOST, dtype=torch.long)
    relations[0, 0, 1], relations[0, 1, 0] = 1, 2
    classes = torch.tensor([[3, 1, 0, 0, 0, 0]])
    graph = SceneGraphs(classes, boxes, relations, torch.tensor([2]))
    assert graph.agreement().tolist() == [0.5]
    shares = graph.triplets()
    assert shares.sum() == 1 and shares[(3 * 4 + 1) * CLASSES + 1] == shares[(1 * 4 + 2) * CLASSES + 3] == 0.5


def test_drawn_graphs_agree_with_themselves_and_come_back() -> None:
    train, test = graphs("train"), graphs("test")
    assert len(train) == 4000 and len(test) == 500
    shares = [float((train.relations == kind).sum()) / float(train.pairs.sum()) for kind in (1, 2, 3)]
    assert all(0.05 < share < 0.5 for share in shares)
    known = train.agreement()
    assert (known[~known.isnan()] == 1).all()
    again = decoded(*encoded(test), test.counts)
    for field in dataclasses.fields(SceneGraphs):
        torch.testing.assert_close(getattr(again, field.name), getattr(test, field.name))
    mixed = independent(train, 400, torch.Generator().manual_seed(0))
    assert float(mixed.agreement().nanmean()) < 0.6


def test_what_is_not_there_neither_counts_nor_moves(model) -> None:
    nodes, edges = encoded(graphs("test")[:4])
    flags = graphs("test").flags[:4]
    flags[:, 3:] = False
    sigma = torch.full((4,), 0.7)
    made = model(nodes, edges, sigma, flags)
    other = model(
        torch.where(flags[..., None], nodes, 9.0),
        torch.where((flags[:, :, None] & flags[:, None])[..., None], edges, 9.0),
        sigma,
        flags,
    )
    for one, two in zip(made, other, strict=True):
        torch.testing.assert_close(one, two)
    assert (made[0][~flags] == 0).all() and (made[1].diagonal(dim1=1, dim2=2) == 0).all()
    # At a low noise level the network returns its input.
    quiet = model(nodes, edges, torch.full((4,), 1e-4), flags)
    assert (quiet[0] - nodes * flags[..., None]).abs().max() < 1e-2


def test_order_of_the_nodes_does_not_matter(model) -> None:
    nodes, edges = encoded(graphs("test")[:2])
    flags = torch.ones(2, MOST, dtype=torch.bool)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    made = model(nodes, edges, torch.ones(2), flags)
    turned = model(nodes[:, order], edges[:, order][:, :, order], torch.ones(2), flags)
    torch.testing.assert_close(made[0][:, order], turned[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made[1][:, order][:, :, order], turned[1], atol=1e-5, rtol=1e-4)


def test_the_loss_by_hand(monkeypatch) -> None:
    """Two nodes at sigma 0.5: weight (0.25 + 0.25) / 0.25^2 = 8; all of the nodes and one of two edges are
    off by 1; the boxes are those of 1 against 0.5, unweighted."""
    nodes = torch.zeros(1, MOST, 7)
    edges = torch.zeros(1, MOST, MOST, 2)
    flags = torch.arange(MOST)[None] < 2
    off = nodes + flags[..., None], edges.clone()
    off[1][0, 0, 1] = 1.0

    class Fixed(torch.nn.Module):
        box_loss = 0.0

        def forward(self, *_):
            return off

    batch = (nodes, edges, torch.tensor([0.5]), flags, nodes, edges)
    assert float(graph_loss(Fixed(), batch)) == pytest.approx(8 * (1 + 0.5))
    Fixed.box_loss = 2.0
    more = 2 * (1 - float(giou(torch.full((4,), 1.0), torch.full((4,), 0.5))))
    assert float(graph_loss(Fixed(), batch)) == pytest.approx(8 * 1.5 + more, rel=1e-5)


def test_heuns_second_look_is_at_the_next_level_by_hand(model, monkeypatch) -> None:
    """The clean graph is zero, so the slope x / sigma: a step takes x to x times the ratio of levels."""
    seen: list[tuple[torch.Tensor, float]] = []

    def nothing(nodes: torch.Tensor, edges: torch.Tensor, sigmas: torch.Tensor, flags: torch.Tensor) -> list:
        seen.append((nodes, float(sigmas[0])))
        return [torch.zeros_like(nodes), torch.zeros_like(edges)]

    monkeypatch.setattr(model, "forward", nothing)
    model.generate(torch.tensor([3]), steps=3, generator=torch.Generator().manual_seed(0))
    assert len(seen) == 5, "two looks a step, one in the last"
    for (x, now), (after, then) in zip(seen, seen[1:], strict=False):
        assert torch.allclose(after, x * (then / now), rtol=1e-4, atol=1e-3)


def test_training_and_sampling(model, monkeypatch) -> None:
    monkeypatch.setattr(Agreement, "count", 20)
    job = model.learn("scene-graphs", recipe=Recipe(steps=3, lr=3e-3, optimizer="adamw", weight_decay=0.0))
    assert float(job.cost.seconds) > 0
    made = [
        model.generate(torch.tensor([1, 4, 6]), steps=3, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(made[0].boxes, made[1].boxes) and not torch.equal(made[0].boxes, made[2].boxes)
    assert made[0].flags.sum(1).tolist() == [1, 4, 6]
    result = Agreement().evaluate(model)
    assert 0 <= result.metrics["agreement"].value <= 1 and Agreement().flops(model).dense > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate(torch.tensor([7])), ConfigError, r"1 to 6 nodes.*\[7\]"),
        (lambda m: m.generate(torch.tensor([0])), ConfigError, r"\[0\]"),
        (lambda m: m.generate(torch.tensor([3]), steps=1), ConfigError, "and 1"),
        (lambda m: m.make_job("vg"), DataError, "'vg'.*scene-graphs"),
        (
            lambda m: dataclasses.replace(graphs("test")[:1], counts=torch.tensor([7])),
            DataError,
            "1 to 6 nodes",
        ),
        (
            lambda m: dataclasses.replace(graphs("test")[:1], boxes=torch.full((1, 6, 4), 1.5)),
            DataError,
            "1.5",
        ),
        (
            lambda m: dataclasses.replace(graphs("test")[:1], boxes=torch.full((1, 6, 4), torch.nan)),
            DataError,
            "nan",
        ),
        (
            lambda m: dataclasses.replace(graphs("test")[:1], relations=torch.ones(1, 6, 6).long()),
            DataError,
            "itself",
        ),
        (lambda m: isolated("classes"), DataError, "where no node is.*Sort them to the front"),
        (lambda m: isolated("boxes"), DataError, "where no node is.*leave the other rows 0"),
    ],
)
def test_what_is_refused(model, call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(model)
