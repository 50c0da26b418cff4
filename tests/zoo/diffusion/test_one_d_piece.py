"""One-D-Piece: the quantiser by hand, tail token drop, prefixes, what is refused, and its study's figures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.domain import make_job  # noqa: E402
from zoo.diffusion.networks.one_d_piece import OneDPiece, Tokens, token_loss  # noqa: E402
from zoo.diffusion.networks.quantiser import Quantiser  # noqa: E402
from zoo.diffusion.studies.one_d_piece import DROP, PHOTOS, SCAN, STUDY, WEBP, beside_smallest, codec  # noqa: E402
from zoo.errors import ConfigError, TaskError  # noqa: E402
from zoo.shared.train import Recipe  # noqa: E402
from zoo.studies.view import View  # noqa: E402


@pytest.fixture
def model() -> OneDPiece:
    return OneDPiece.fresh(0, side=8, patch=4, tokens=4, codes=8, code_width=4, width=16, depth=1).eval()


def test_the_quantiser_by_hand() -> None:
    """Codes (3, 4) and (-2, 0) are (0.6, 0.8) and (-1, 0); z = (2, 0) is (1, 0), nearest the first by cosine
    0.6, and its loss is 1.25 * ((1 - 0.6)^2 + 0.8^2) / 2."""
    quantiser = Quantiser(2, 2).eval()
    quantiser.codebook.weight.data = torch.tensor([[3.0, 4.0], [-2.0, 0.0]])
    z = torch.tensor([[[2.0, 0.0], [-5.0, 1.0]]], requires_grad=True)
    found, indices, _ = quantiser(z)
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(found.detach(), torch.tensor([[[0.6, 0.8], [-1.0, 0.0]]]))
    loss = quantiser(z[:, :1])[2]
    assert float(loss.detach()) == pytest.approx(1.25 * (0.4**2 + 0.8**2) / 2)
    # Straight-through: the codes' gradient is the unit vector's, whose tangent at (1, 0) is (0, 1).
    (found[0, 0] * torch.tensor([5.0, 3.0])).sum().backward()
    torch.testing.assert_close(z.grad[0, 0], torch.tensor([0.0, 1.5]))
    # Commitment pulls z to the code, the codebook loss the code to z, four times as strongly.
    unit = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    quantiser.codebook.weight.data[0] = torch.tensor([0.6, 0.8])
    quantiser(unit)[2].backward()
    assert unit.grad[0, 0, 1] < 0 and quantiser.codebook.weight.grad[0, 0] < 0
    assert float(quantiser.codebook.weight.grad[0].norm() / unit.grad[0, 0].norm()) == pytest.approx(
        4, rel=1e-4
    )


def test_the_first_tokens_stand_at_the_first_places(model) -> None:
    codes = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.paint(codes)
        model.latent_places[2:] += 1.0
        assert torch.equal(model.paint(codes), before)
        model.latent_places[:2] += torch.linspace(-1, 1, 16)
        assert not torch.equal(model.paint(codes), before)


def test_codes_that_nobody_uses_start_again_where_images_are() -> None:
    quantiser = Quantiser(4, 2).train()
    quantiser.usage[2:] = 0.0
    quantiser(torch.tensor([[[1.0, 0.0]]]))
    assert quantiser.codebook.weight[2:].tolist() == [[1.0, 0.0]] * 2
    before = quantiser.codebook.weight.clone()
    quantiser.usage.zero_()
    quantiser.eval()(torch.tensor([[[0.0, 1.0]]]))
    assert torch.equal(before, quantiser.codebook.weight)


def test_one_length_is_drawn_for_a_batch_in_training_only(model) -> None:
    seen: list[int] = []
    inner = model.paint

    def paint(codes: torch.Tensor) -> torch.Tensor:
        seen.append(codes.shape[1])
        return inner(codes)

    model.paint = paint
    x = torch.randn(2, 1, 8, 8)
    torch.manual_seed(0)
    for _ in range(60):
        model.train()(x)
    assert set(seen) == {1, 2, 3, 4}
    assert all(8 <= seen.count(k) <= 24 for k in (1, 2, 3, 4))
    seen.clear()
    model.eval()(x)
    model.tail_drop = False
    model.train()(x)
    assert seen == [4, 4]


def test_any_beginning_decodes_and_later_tokens_do_not_matter(model) -> None:
    x = torch.randn(3, 1, 8, 8)
    tokens = model.encode(x)
    assert tokens.shape == (3, 4)
    for k in (1, 2, 4):
        torch.testing.assert_close(model.decode(tokens[:, :k]), model(x, k))
    assert not torch.allclose(model.decode(tokens[:, :2]), model.decode(tokens))
    # Order matters: each place has its own embedding.
    swapped = tokens[:1].clone()
    swapped[0, :2] = torch.tensor([1, 2])
    assert not torch.allclose(model.decode(swapped), model.decode(swapped.flip(1)))
    assert model.bits(3) == 9.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 1, 8, 8), 0), "1 to 4 tokens; received 0"),
        (lambda m: m(torch.zeros(1, 1, 8, 8), 5), "1 to 4 tokens; received 5"),
        (lambda m: m.encode(torch.zeros(1, 1, 12, 8)), r"\(1, 8, 8\); received \(1, 12, 8\)"),
        (lambda m: m.decode(torch.full((1, 2), 8)), "0 to 7; received 8"),
        (lambda m: m.decode(torch.full((1, 2), -1)), "0 to 7; received -1"),
        (lambda m: m.decode(torch.zeros(1, 5, dtype=torch.long)), "received 5"),
        (lambda m: m.bits(0), "received 0"),
        (lambda m: OneDPiece(side=9, patch=4), "multiple of patch; received 9 and 4"),
    ],
)
def test_what_is_refused(model, call, message) -> None:
    with pytest.raises(ConfigError, match=message):
        call(model)


def test_training_lowers_the_error_and_repeats(model) -> None:
    recipe = Recipe(steps=6, lr=5e-3, batch=16, optimizer="adamw", weight_decay=0.0)
    assert make_job("digits", recipe=recipe, model=model).loss is token_loss
    before = Tokens().evaluate(model).metrics
    again = copy.deepcopy(model)
    for one in (model, again):
        one.learn("digits", recipe=recipe, seed=3)
    after = Tokens().evaluate(model).metrics
    assert after["mse"].value < 0.9 * before["mse"].value
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert Tokens().flops(model).dense > 0
    with pytest.raises(TaskError, match="OneDPiece; received Linear"):
        Tokens().evaluate(nn.Linear(1, 1))


def test_tokens_stand_beside_the_codecs_smallest_files() -> None:
    tiles = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, scan = codec("JPEG", tiles)[0], codec(SCAN, tiles)[0]
    assert whole["psnr"] == scan["psnr"] and 100 < whole["bytes"] - scan["bytes"] < 250
    shared = {"pictures": PHOTOS, "seed": 0, "mse": 0.1}
    rows = [
        {**shared, "arm": DROP, "level": 8, "psnr": 21.0, "bytes": 10.0},
        {**shared, "arm": WEBP, "level": "quality 0", "psnr": 20.0, "bytes": 100.0},
        {**shared, "arm": WEBP, "level": "quality 1", "psnr": 22.0, "bytes": 140.0},
    ]
    made = beside_smallest(rows, STUDY.options())
    assert made[0][f"above {WEBP}"] == pytest.approx(1.0)
    assert f"above {WEBP}" not in made[1] and f"above {SCAN}" not in made[0]


def test_the_error_must_fall_in_every_seed() -> None:
    def row(k: int, mse: float) -> dict[str, object]:
        return {"pictures": "x", "arm": DROP, "seed": 0, "level": k, "mse": mse, "psnr": 0.0, "bytes": k}

    def verdict(*errors: float) -> str:
        rows = [row(2**i, e) for i, e in enumerate(errors)]
        facts = STUDY.facts(View(STUDY, rows, STUDY.options(), {"pictures": "x"}))
        return facts[0].verdict

    assert verdict(0.3, 0.2, 0.2019) == "holds"
    assert verdict(0.3, 0.2, 0.2021) == "does not hold"
