"""Unlearning: the Newton step against an inverse, signs of descent and ascent, figures by hand, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import DataError
from zoo.methods.conformance import plain_network, quarter_images
from zoo.methods.unlearning import Part, Unlearning, fading, figures, l1, membership, newton
from zoo.shared.masks import masks_of
from zoo.shared.pruning.sparsifier import sparsify
from zoo.vision.unlearned import Forgotten, parts_of


def test_the_recursion_is_that_of_woodfisher():
    """Two gradients e1, e2 and N = 2: o = e1, k = (3, 4); below = 2 + 0, k - 4 / 2 e1 = (1, 4)."""
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert newton(torch.tensor([3.0, 4.0]), iter([one, two]), 2).tolist() == [1.0, 4.0]
    # o = (2, 0), g = (1, 0): k = 6 - 6 / (2 + 2) * 2 = 3
    assert newton(torch.tensor([6.0, 1.0]), iter([2 * one, one]), 2).tolist() == [3.0, 1.0]
    # after (1, 1): k = (2/3, 4), o = (2/3, 0); then k = 2/3 - (2/3) / (2 + 2/3) * 2/3 = 1/2
    found = newton(torch.tensor([3.0, 4.0]), iter([one, one + two, one]), 2)
    torch.testing.assert_close(found, torch.tensor([0.5, 4.0]))


def test_the_penalty_fades_and_ends_before_the_end():
    assert [fading(t, 10) for t in (0, 4, 8, 9)] == [1.0, 0.5, 0.0, 0.0]
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, -2.0)
    nn.init.constant_(layer.bias, 0.5)
    assert l1(layer).item() == 4.5


@pytest.fixture(scope="module")
def trained():
    """A network that knows its images, the images of one class, and the others."""
    x, y = quarter_images(32)
    model = plain_network(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    gone = y == 0
    return model.eval(), Part(x[gone], y[gone]), Part(x[~gone], y[~gone])


def loss_of(model: nn.Module, part: Part) -> float:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(part.x), part.y).item()


@pytest.mark.parametrize("way", ["fine-tune", "ascend", "influence", "fisher", "l1-sparse"])
def test_every_way_forgets_and_keeps_zeros(way, trained, job_of):
    model, gone, kept = trained
    strength = {"influence": 1.0, "fisher": 1e-3, "l1-sparse": 1e-3}.get(way, 0.05)
    job = job_of(batch=8, epochs=4, lr=0.1)
    made = Unlearning(way, strength, samples=8).forget(model, gone, kept, job)
    if way == "fine-tune":
        assert loss_of(made, kept) < loss_of(model, kept)
    elif way != "l1-sparse":
        assert loss_of(made, gone) > loss_of(model, gone)
    if way == "ascend":
        assert torch.equal(made[1].running_mean, model[1].running_mean)
    if way == "l1-sparse":
        assert l1(made) < l1(Unlearning("l1-sparse", 0.0).forget(model, gone, kept, job))
    sparse = plain_network(0)
    sparse.load_state_dict(model.state_dict())
    sparsify(sparse, sparsity=0.5)
    made = Unlearning(way, strength, samples=8).forget(sparse, gone, kept, job)
    assert not masks_of(sparse).lost_zeros(made) and masks_of(made).equal(masks_of(sparse))


class Table(nn.Module):
    """Chances that are looked up: 0.9 in the class of the sign of x."""

    def forward(self, x):
        return torch.cat([-x, x], 1)


def test_the_four_figures_by_hand():
    high, low = torch.full((4, 1), 3.0), torch.full((4, 1), 0.1)
    ones = torch.ones(4, dtype=torch.long)
    gone = Part(torch.tensor([[3.0], [0.1], [-3.0], [0.1]]), ones)
    found = figures(Table(), gone, Part(high, ones), Part(low, torch.tensor([1, 1, 1, 0])))
    assert found == {"ua": 0.25, "mia": 0.75, "ra": 1.0, "ta": 0.75}
    attack = membership(torch.tensor([0.9, 0.95]), torch.tensor([0.2, 0.3]))
    assert attack(torch.tensor([0.92, 0.25])).tolist() == [True, False]


def test_what_cannot_be_forgotten_is_refused(trained, job_of):
    model, gone, kept = trained
    nothing = Part(gone.x[:0], gone.y[:0])
    for parts in ((nothing, kept), (gone, nothing)):
        with pytest.raises(DataError, match="at least one of both"):
            Unlearning("ascend", 0.1).forget(model, *parts, job_of())
    with pytest.raises(DataError, match="the attack needs"):
        figures(model, gone, gone, kept)


def test_the_task_of_a_forgotten_digit() -> None:
    gone, kept, test = parts_of()
    assert set(gone.y.tolist()) == {0} and 0 not in kept.y and 0 not in test.y

    class Knows(nn.Module):
        """Right about everything but zeros, which it takes for ones."""

        def forward(self, x):
            known = {part.x.data_ptr(): part.y for part in parts}
            labels = known.get(x.data_ptr(), torch.zeros(len(x), dtype=torch.long))
            return 20.0 * nn.functional.one_hot(labels.clamp(min=1), 10)

    parts = (gone, kept, test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.vision.unlearned.parts_of", lambda: parts)
        found = Forgotten().evaluate(Knows()).metrics
    assert (found["ua"].value, found["ra"].value, found["ta"].value) == (1.0, 1.0, 1.0)
