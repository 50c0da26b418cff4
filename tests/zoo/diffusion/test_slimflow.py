"""Flows and SlimFlow: signs of velocities, annealing and guidance by hand, pairs that are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.domain import make_job  # noqa: E402
from zoo.diffusion.flows import Flow, MLPFlow, UNetFlow, between, velocity_loss  # noqa: E402
from zoo.diffusion.methods.slimflow import (  # noqa: E402
    AnnealedPairs,
    OneStep,
    Pairs,
    SlimFlow,
    annealed,
    weights_digest,
)
from zoo.diffusion.plan import Plan  # noqa: E402
from zoo.diffusion.tasks import FlowDigits  # noqa: E402
from zoo.errors import ConfigError, TaskError  # noqa: E402
from zoo.shared.train import Recipe  # noqa: E402


class Straight(Flow):
    """The flow to one image: its velocity is what is left of noise, (x - image) / sigma."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__(2, 1, 4)
        self.image = nn.Parameter(image)

    def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return (x - self.image) / (times.view(-1, 1, 1, 1) / 1000)


IMAGE = torch.tensor([[[0.5, -1.0], [0.25, 1.0]]])


def test_a_straight_flow_ends_at_its_image_in_any_number_of_steps() -> None:
    noise = torch.randn(3, 1, 2, 2)
    flow = Straight(IMAGE)
    for steps in (1, 2, 5):
        assert torch.allclose(flow.images(noise, steps), IMAGE.expand(3, -1, -1, -1), atol=1e-5)


def test_the_velocity_is_noise_minus_image() -> None:
    images, noise, sigmas = IMAGE[None], torch.randn(1, 1, 2, 2), torch.tensor([0.25])
    assert torch.allclose(between(images, noise, sigmas), 0.75 * images + 0.25 * noise)
    assert velocity_loss(Straight(IMAGE), (images, noise, sigmas)).item() < 1e-9
    flipped = Straight(IMAGE)
    flipped.forward = lambda x, t: -Straight.forward(flipped, x, t)
    expected = 4 * (noise - images).square().mean()
    assert velocity_loss(flipped, (images, noise, sigmas)).item() == pytest.approx(float(expected), rel=1e-4)


def test_annealing_keeps_the_variance_and_ends_at_the_pairs() -> None:
    assert [annealed(k, 4) for k in (0, 1, 4, 9)] == [1.0, 0.75, 0.0, 0.0]
    assert annealed(2, 4, "cosine") == pytest.approx(0.5)
    assert annealed(4, 4, "exponential") == pytest.approx(0.36788, rel=1e-4)
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(noise, 2 * noise, "none")
    drawn = list(AnnealedPairs(pairs, 8, 4, 4000).draw(torch.Generator().manual_seed(1)))
    correlations = []
    for images, mixed, sigmas in drawn:
        assert float(mixed.std()) == pytest.approx(1.0, abs=0.05)
        assert float(sigmas.min()) >= 0 and float(sigmas.max()) < 1
        correlations.append(float((images / 2 * mixed).mean()))
    assert abs(correlations[0]) < 0.05  # noise of its own
    assert correlations[2] == pytest.approx(0.75**0.5, abs=0.05)  # half of it: sqrt(1 - 0.5^2)
    assert all(torch.equal(mixed, images / 2) for images, mixed, _ in drawn[4:])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_the_share_of_fresh_noise_never_rises_and_stays_a_share(schedule: str) -> None:
    shares = [annealed(step, 7, schedule) for step in range(12)]
    assert shares[0] == 1.0 and all(a >= b >= 0 for a, b in zip(shares, shares[1:], strict=False))


def test_the_two_guiding_steps_by_hand() -> None:
    guide, student = Straight(IMAGE), Straight(torch.zeros(1, 2, 2))
    noise, shares = torch.randn(2, 1, 2, 2), torch.tensor([0.25, 0.5])
    assert torch.allclose(OneStep(guide).target(student, noise, shares), IMAGE.expand(2, -1, -1, -1))
    own = OneStep(guide, "student").target(student, noise, shares)
    share = shares.view(-1, 1, 1, 1)
    x = noise - share * noise  # the student's own step, towards its image, zero
    expected = x - (1 - share) * (x - IMAGE) / (1 - share)
    assert torch.allclose(own, expected, atol=1e-6)
    batch = IMAGE[None].expand(2, -1, -1, -1), noise, torch.rand(2)
    assert OneStep(None)(guide, batch).item() < 1e-9
    assert OneStep(None)(student, batch).item() == pytest.approx(float(IMAGE.square().mean()), rel=1e-4)
    loss = OneStep(guide)(student, batch)
    loss.backward()
    assert guide.image.grad is None and student.image.grad is not None
    assert loss.item() == pytest.approx(2 * float(IMAGE.square().mean()), rel=1e-4)


@pytest.fixture(scope="module")
def teacher() -> MLPFlow:
    torch.manual_seed(0)
    return MLPFlow(width=16, blocks=1, steps=4)


def test_a_small_flow_of_one_step_comes_out(teacher) -> None:
    job = make_job("digits", recipe=Recipe(batch=8), model=teacher)
    before = weights_digest(teacher)
    method = SlimFlow(width=8, blocks=1, pairs=64, teacher_steps=2, reflow_steps=3, distil_steps=2)
    first, again = (method.sparsify(teacher, job) for _ in range(2))
    assert weights_digest(first.model) == weights_digest(again.model) and weights_digest(teacher) == before
    assert first.model.steps == 1 and first.arguments["width"] == 8 and first.arguments["steps"] == 1
    assert weights_digest(MLPFlow(**first.arguments)) != weights_digest(first.model)
    found = FlowDigits().evaluate(first.model)
    assert set(found.metrics) == {"frechet", "pixel_frechet"}
    whole, own = (FlowDigits().flops(model).dense for model in (teacher, first.model))
    assert whole > 8 * own


def test_a_pruned_unet_is_a_student(teacher) -> None:
    torch.manual_seed(0)
    student = UNetFlow(widths=(8, 8), steps=4)
    student.cut(Plan({"mid_block.attentions.0:heads": ()}, ("mid_block.resnets.1",)))
    pairs = Pairs.of(teacher, 16, 2, seed=0)
    job = make_job("digits", recipe=Recipe(batch=8), model=student)
    SlimFlow(reflow_steps=2, distil_steps=2).slim(student, pairs, job)
    again = UNetFlow(**student.current_arguments())
    again.load_state_dict(student.state_dict())
    assert torch.equal(again.eval().images(pairs.noise, 1), student.eval().images(pairs.noise))


def test_what_is_refused(teacher) -> None:
    job = make_job("digits", recipe=Recipe(batch=8), model=teacher)
    with pytest.raises(ConfigError, match="never reflowed"):
        SlimFlow(reflow_steps=0).sparsify(teacher, job)
    for share in (1.5, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="annealing is a share of the steps, 0 to 1"):
            SlimFlow(annealing=share).sparsify(teacher, job)
    rising = SlimFlow()
    rising.schedule = "rising"
    with pytest.raises(ConfigError, match="linear, cosine, exponential; received 'rising'"):
        rising.sparsify(teacher, job)
    with pytest.raises(ConfigError, match="MLPFlow"):
        SlimFlow().sparsify(nn.Linear(1, 1), job)
    with pytest.raises(ConfigError, match="data"):
        SlimFlow().sparsify(teacher)
    pairs = Pairs.of(teacher, 16, 2, seed=0)
    with pytest.raises(ConfigError, match="fewer than a batch"):
        pairs.check(32)
    with pytest.raises(ConfigError, match="another teacher"):
        pairs.check(8, MLPFlow(width=8, blocks=1))
    with pytest.raises(ConfigError, match="deviation"):
        dataclasses.replace(pairs, noise=2 * pairs.noise).check(8)
    with pytest.raises(ConfigError, match="finite"):
        dataclasses.replace(pairs, images=pairs.images * torch.nan).check(8)
    with pytest.raises(ConfigError, match="finite"):
        dataclasses.replace(pairs, noise=pairs.noise * torch.nan).check(8)
    with pytest.raises(ConfigError, match="of one shape"):
        dataclasses.replace(pairs, images=pairs.images[:8]).check(8)
    with pytest.raises(TaskError, match="8x8"):
        FlowDigits().evaluate(UNetFlow(side=16, widths=(8, 8)))
