"""rasterize against its definition, pixels by hand and finite differences; threads, limits, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native
from zoo.shared.ops import rasterize as module
from zoo.shared.ops.rasterize import Rendering, rasterize, reference
from zoo.shared.ops.rasterize_reference import sh_bases


def _built() -> bool:
    try:
        _native.function("zoo_rasterize_draw", "p" * 8 + "i")
    except _native.NativeMissing:
        return False
    return True


needs_native = pytest.mark.skipif(not _built(), reason="no native library on this machine, or an older one")


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def backend(request):
    with ops.backend(request.param):
        yield request.param


def camera(width: int, height: int, focal: float | None = None) -> tuple[Tensor, Tensor, int, int]:
    """A camera at the origin that looks along +z."""
    focal = 1.2 * width if focal is None else focal
    k = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    return torch.eye(4), k, width, height


def turned(seed: int, width: int, height: int) -> tuple[Tensor, Tensor, int, int]:
    """A camera a little to one side that looks a little past the middle of the scene."""
    generator = torch.Generator().manual_seed(seed)
    axis, angle = torch.randn(3, generator=generator), 0.3
    x, y, z = (axis / axis.norm()).tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    viewmat = torch.eye(4)
    viewmat[:3, :3] = torch.matrix_exp(angle * cross)
    viewmat[:3, 3] = torch.tensor([0.2, -0.1, 0.3])
    _, k, *size = camera(width, height)
    return viewmat, k, *size


def scene(count: int, seed: int, colours: int | None = None, bases: int = 0) -> list[Tensor]:
    """Gaussians in front of the camera, at its side and behind it; some nearly clear; any quaternion."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(count, 3, generator=generator) * torch.tensor([2.5, 2.5, 4.5]) - torch.tensor(
        [1.25, 1.25, 0.4]
    )
    quats = torch.randn(count, 4, generator=generator) * 3
    scales = 10 ** (torch.rand(count, 3, generator=generator) * 1.5 - 2.3)
    opacities = torch.rand(count, generator=generator) ** 2
    shape = (count, bases, 3) if bases else (count, colours or 3)
    shade = torch.randn(shape, generator=generator) * 0.4 if bases else torch.rand(shape, generator=generator)
    return [means, quats, scales, opacities, shade]


def losses(seen: Rendering) -> Tensor:
    """A sum that weighs each pixel of each output differently."""
    generator = torch.Generator().manual_seed(1)
    total = seen.alpha.new_zeros(())
    for out in seen:
        if out is not None:
            total = (
                total + (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)).sum()
            )
    return total


def both(gaussians: list[Tensor], view: tuple, dtype: torch.dtype, backend: str, **options) -> list[Tensor]:
    """Outputs and gradients, as float64."""
    leaves = [t.to(dtype).clone().requires_grad_() for t in gaussians]
    extra = {
        name: value.to(dtype).clone().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    with ops.backend(backend):
        seen = rasterize(*leaves, view[0].to(dtype), view[1].to(dtype), *view[2:], **extra)
    wanted = leaves + [value for value in extra.values() if isinstance(value, Tensor)]
    grads = torch.autograd.grad(losses(seen), wanted, materialize_grads=True)
    return [t.detach().double() for t in (*(out for out in seen if out is not None), *grads)]


@needs_native
@given(
    st.integers(0, 120),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0, 1, 4, 9, 16, 25]),
    st.integers(1, 6),
    st.sampled_from([0, 3]),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_native_is_the_float64_definition(
    count, width, height, bases, colours, extra, antialiased, seed
) -> None:
    gaussians = scene(count, seed, colours, bases)
    options: dict = {"antialiased": antialiased, "sh_degree": math.isqrt(bases) - 1 if bases else None}
    options["background"] = torch.rand(3 if bases else colours)
    options["shift"] = torch.randn(count, 2)
    if extra:
        options["features"] = torch.randn(count, extra)
    view = turned(seed, width, height)
    expected = both(gaussians, view, torch.float64, "reference", **options)
    found = both(gaussians, view, torch.float32, "native", **options)
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape
        if one.numel():
            scale = max(1.0, float(one.abs().max()))
            assert float((one - other).abs().max()) <= 1e-4 * scale


@needs_native
def test_where_light_runs_out() -> None:
    """Hundreds of Gaussians over every pixel: the native kernel stops at a millionth of the light."""
    gaussians = scene(2000, 3)
    gaussians[2] = gaussians[2] * 3
    gaussians[3] = gaussians[3].sqrt()
    view = camera(61, 45)
    expected = both(gaussians, view, torch.float64, "reference")
    found = both(gaussians, view, torch.float32, "native")
    assert float((expected[2] > 1 - 1e-7).double().mean()) > 0.5
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max()) <= 1e-4 * max(1.0, float(one.abs().max()))


def one(opacity: float, depth: float = 2.0, scale: float = 0.1, colour: float = 1.0) -> list[Tensor]:
    """A round Gaussian before the camera, its centre at the middle of the image."""
    return [
        torch.tensor([[0.0, 0.0, depth]]),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.full((1, 3), scale),
        torch.tensor([opacity]),
        torch.tensor([[colour]]),
    ]


def test_one_gaussian_by_hand(backend: str) -> None:
    # focal 20, depth 2, scale 0.1: one pixel of deviation, variance 1 + 0.3.
    seen = rasterize(*one(0.5), *camera(8, 8, 20.0), background=torch.tensor([0.25]))
    square = 0.5**2 + 0.5**2  # the middle lies between four pixels
    alpha = 0.5 * math.exp(-square / 2 / 1.3)
    torch.testing.assert_close(seen.alpha[3, 4], torch.tensor(alpha))
    torch.testing.assert_close(seen.depth[3, 4], torch.tensor(2 * alpha))
    torch.testing.assert_close(seen.colour[3, 4, 0], torch.tensor(alpha + (1 - alpha) * 0.25))
    # 255 * 0.5 * exp(-d / 2.6) >= 1 up to d = 12.6; pixel (0, 4) has d = 3.5^2 + 0.5^2 = 12.5, (0, 5) 14.5
    assert seen.alpha[0, 4] > 1 / 255 - 1e-6 and seen.alpha[0, 5] == 0


def test_nearer_hides_farther_and_alpha_is_cut(backend: str) -> None:
    near, far = one(1.0, 1.0, 0.5, 1.0), one(1.0, 3.0, 0.5, 10.0)
    for pair in ((near, far), (far, near)):
        seen = rasterize(*(torch.cat(rows) for rows in zip(*pair, strict=True)), *camera(7, 7, 500.0))
        torch.testing.assert_close(seen.colour[3, 3, 0], torch.tensor(0.999 + 0.001 * 0.999 * 10))


def test_no_gradient_passes_where_alpha_is_cut(backend: str) -> None:
    for opacity in (1.0, 0.9):
        leaves = [each.requires_grad_() for each in one(opacity, 1.0, 0.5)]
        seen = rasterize(*leaves, *camera(7, 7, 500.0))
        grads = torch.autograd.grad(seen.alpha[3, 2], (leaves[0], leaves[2], leaves[3]))
        assert all(bool(each.any()) == (opacity < 0.999) for each in grads)


def test_of_two_at_one_depth_the_first_is_nearer(backend: str) -> None:
    first, second = one(0.9, 2.0, 0.5, 1.0), one(0.9, 2.0, 0.5, 0.0)
    seen = rasterize(*(torch.cat(rows) for rows in zip(first, second, strict=True)), *camera(3, 3, 300.0))
    torch.testing.assert_close(seen.colour[1, 1, 0], torch.tensor(0.9))


@needs_native
def test_depths_that_only_doubles_tell_apart() -> None:
    """Depths are doubles: of two that are one float the nearer one, which comes second here, is in front."""
    near, far = one(0.9, 2.0, 0.5, 1.0), one(0.9, 2.0, 0.5, 0.0)
    near[0][0, 0], far[0][0, 0] = -0.25, 0.25
    viewmat, k, *size = camera(3, 3, 300.0)
    angle = torch.tensor(2e-7)  # turns the camera so that the left one is nearer by less than a float can say
    viewmat[2, 0], viewmat[0, 2] = angle, -angle
    rows = [torch.cat(pair) for pair in zip(far, near, strict=True)]
    depths = rows[0].double() @ viewmat[2, :3].double()
    assert depths[1] < depths[0] and depths[1].float() == depths[0].float()
    with ops.backend("native"):
        seen = rasterize(*rows, viewmat, k, *size)
    assert float(seen.colour[1, 1, 0]) > 0.5


@pytest.mark.parametrize("case", ["none", "behind", "beside", "clear", "beyond"])
def test_nothing_to_see_is_an_empty_image(backend: str, case: str) -> None:
    gaussians = scene(0, 0) if case == "none" else one(0.003 if case == "clear" else 0.5)
    far = 1.0 if case == "beyond" else 1e10
    gaussians[0] = gaussians[0] + torch.tensor([9.0 * (case == "beside"), 0, -4.0 * (case == "behind")])
    leaves = [t.requires_grad_() for t in gaussians]
    seen = rasterize(*leaves, *camera(9, 5), far=far)
    assert seen.colour.shape[:2] == (5, 9) and not seen.colour.any() and not seen.alpha.any()
    grads = torch.autograd.grad(losses(seen), leaves, materialize_grads=True)
    assert not any(grad.any() for grad in grads)


def test_harmonics_are_orthonormal() -> None:
    """Over a fine grid of the sphere, the mean product of two is 1 / (4 pi) if they are the same, else 0."""
    cosine = torch.linspace(-1, 1, 401, dtype=torch.float64)
    cosine = (cosine[1:] + cosine[:-1]) / 2
    angle = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
    sine = (1 - cosine**2).sqrt()[:, None]
    directions = torch.stack([sine * angle.cos(), sine * angle.sin(), cosine[:, None].expand(-1, 64)], -1)
    bases = sh_bases(directions.reshape(-1, 3), 25)
    gram = 4 * math.pi * bases.T @ bases / len(bases)
    torch.testing.assert_close(gram, torch.eye(25, dtype=torch.float64), atol=2e-4, rtol=0)


def test_definition_by_finite_differences() -> None:
    """For everything that a Gaussian has, and for the camera."""
    gaussians = [t.double() for t in scene(6, 12, bases=4)]
    gaussians[0][:, 2] = gaussians[0][:, 2].abs() + 1
    gaussians[2] = gaussians[2] * 3
    gaussians[3] = gaussians[3] * 0.5 + 0.3
    viewmat, k, width, height = turned(2, 7, 6)
    shift, features = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        *rows, shift, features, translation, focal = values
        view = torch.cat(
            [torch.cat([viewmat[:3, :3].double(), translation[:, None]], 1), viewmat[3:].double()]
        )
        lens = k.double() * torch.stack([focal, focal, torch.ones_like(focal)])[:, None]
        lens = torch.where(torch.eye(3, dtype=torch.bool), lens, k.double())
        out = rasterize(
            *rows, view, lens, width, height, sh_degree=1, features=features, shift=shift, antialiased=True
        )
        return tuple(t for t in out if t is not None)

    inputs = [*gaussians, shift, features, viewmat[:3, 3].double(), torch.ones((), dtype=torch.float64)]
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs], eps=1e-7, atol=1e-4, rtol=1e-3)


@needs_native
@pytest.mark.parametrize("extra", [0, 5])
def test_any_number_of_threads_gives_the_same_bits(extra: int) -> None:
    gaussians, view = scene(3000, 5, bases=9), turned(5, 90, 70)
    options: dict = {"features": torch.randn(3000, extra)} if extra else {}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(both(gaussians, view, torch.float32, "native", sh_degree=2, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@needs_native
def test_the_dispatched_op_is_the_direct_call() -> None:
    """zoo::rasterize as tracing sees it, against the short cut of eager calls."""
    gaussians, view = scene(200, 6), camera(33, 20)
    expected = both(gaussians, view, torch.float32, "native")
    leaves = [t.clone().requires_grad_() for t in gaussians]
    image = torch.ops.zoo.rasterize(*leaves[:4], None, leaves[4], None, *view, 0.01, 1e10, 0.3, False)[0]
    seen = Rendering(image[:3].permute(1, 2, 0), image[3], image[4], None)
    grads = torch.autograd.grad(losses(seen), leaves)
    for one, other in zip(expected, (*seen[:3], *grads), strict=True):
        assert torch.equal(one, other.double())
    inputs = (*gaussians[:4], None, gaussians[4], None, *view, 0.01, 1e10, 0.3, False)
    torch.library.opcheck(torch.ops.zoo.rasterize, inputs, test_utils=("test_schema", "test_faketensor"))


def test_gradients_of_the_camera_come_from_the_definition() -> None:
    gaussians, (viewmat, k, *size) = scene(20, 7), camera(9, 9)
    viewmat.requires_grad_()
    assert ops.explain("rasterize", *gaussians, viewmat, k, *size).backend == "reference"
    (grad,) = torch.autograd.grad(rasterize(*gaussians, viewmat, k, *size).colour.sum(), viewmat)
    assert grad[:3].abs().sum() > 0


def refused(match: str, gaussians: list[Tensor], view: tuple, **options) -> None:
    with pytest.raises(OpError, match=match):
        rasterize(*gaussians, *view, **options)


def test_bad_gaussians_are_refused(backend: str) -> None:
    for row, name in enumerate(("means", "quats", "scales", "opacities", "colours")):
        broken = scene(5, 1)
        broken[row][3] = float("nan") if name != "scales" else float("inf")
        refused("Gaussian 3: .*NaN or infinite", broken, camera(4, 4))
    broken = scene(5, 1)
    broken[1][2] = 0
    refused("Gaussian 2: its quaternion has length zero", broken, camera(4, 4))


@pytest.mark.traced
def test_bad_arguments_are_refused() -> None:
    good, view = scene(5, 1), camera(4, 4)
    refused("quats must be", [good[0], good[1][:4], *good[2:]], view)
    refused("scales must be torch.float32", [*good[:2], good[2].double(), *good[3:]], view)
    refused("colours must be", [*good[:4], good[4][:, 0]], view)
    refused("sh_degree 2 needs", [*good[:4], torch.zeros(5, 4, 3)], view, sh_degree=2)
    refused("features must be", good, view, features=torch.zeros(4, 2))
    refused("shift must be", good, view, shift=torch.zeros(5, 3))
    refused("background must be", good, view, background=torch.zeros(4))
    refused("fewer than 2.31", good, (*view[:2], 0, 4))
    refused("too coarse", [t.half() for t in good], tuple(v.half() for v in view[:2]) + view[2:])


def test_bad_cameras_are_refused() -> None:
    good, (viewmat, k, *size) = scene(5, 1), camera(4, 4)
    refused("mirrors", good, (viewmat * torch.tensor([1.0, -1, 1, 1])[:, None], k, *size))
    refused("must be a rotation", good, (viewmat * torch.tensor([2.0, 2, 2, 1])[:, None], k, *size))
    refused("must be a rotation", good, (viewmat + torch.full((4, 4), float("nan")), k, *size))
    refused("positive focal lengths", good, (viewmat, k * torch.tensor([0.0, 1, 1])[:, None], *size))
    refused(
        "positive focal lengths",
        good,
        (viewmat, k + torch.tensor([[0, 1.0, 0], [0, 0, 0], [0, 0, 0]]), *size),
    )


def test_too_many_pairs_are_refused_before_memory_is_asked_for(backend: str, monkeypatch) -> None:
    # The whole image under each of 40 Gaussians: 40 * 1024^2 pixels, 40 * 128^2 tiles.
    wide = [torch.cat([t] * 40) for t in one(0.9, 1.0, 50.0)]
    limit = 40 * (1024**2 if backend == "reference" else 128**2) - 1
    monkeypatch.setattr(module, "MOST_PAIRS", limit)
    with torch.no_grad():
        refused(f"make {limit + 1} pairs with (pixels|tiles), the most is .*strips", wide, camera(1024, 1024))


def test_two_to_the_31_pairs_are_refused(backend: str) -> None:
    """As many tiles or pixels under Gaussians as a list cannot have, without asking for their memory."""
    side, count = (1024, 2**11) if backend == "reference" else (8192, 2**11)
    wide = [torch.cat([t] * count) for t in one(0.9, 1.0, 50.0)]
    with torch.no_grad():
        refused(f"make {2**31} pairs with .*strips .*, at a lower resolution", wide, camera(side, side))


@needs_native
def test_huge_and_needle_thin_gaussians() -> None:
    """Contours far larger than the image, and thinner than a pixel at every angle."""
    generator = torch.Generator().manual_seed(8)
    gaussians = scene(60, 8)
    gaussians[0][:, 2] = gaussians[0][:, 2].abs() + 0.5
    gaussians[2] = torch.tensor([[30.0, 1e-5, 1e-5]]) * torch.rand(60, 1, generator=generator)
    gaussians[3][:] = 0.6
    expected = both(gaussians, camera(50, 40), torch.float64, "reference")
    found = both(gaussians, camera(50, 40), torch.float32, "native")
    for a, b in zip(expected, found, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(a.abs().max()))


def test_reference_has_the_same_signature(backend: str) -> None:
    gaussians, view = scene(30, 9), camera(12, 12)
    torch.testing.assert_close(reference(*gaussians, *view).colour, rasterize(*gaussians, *view).colour)
