"""Gaussian splatting on a CPU: an image of Gaussians, and the gradients of everything that a Gaussian has.

    seen = rasterize(means, quats, scales, opacities, sh, viewmat, K, 800, 800, sh_degree=3)
    loss = (seen.colour - photo).abs().mean()

Gaussians are rows that a mask keeps or drops; the work goes with the rows that are kept and seen. The
definition is `rasterize_reference.py`; the native kernels tile the image, and gsplat serves a CUDA device
(gsplat leaves out the Gaussian that would leave less than 1e-4 of the light, and what lies behind it).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import dispatch, rasterize_native
from .rasterize_checks import check_arguments, check_options, check_values, refusal, split_channels, too_many
from .rasterize_native import Camera, Scene
from .rasterize_reference import boxes, draw, project, sh_colours

MOST_PAIRS = 2**31 - 1
_SCENE = (
    "Tensor means, Tensor quats, Tensor scales, Tensor opacities, Tensor? sh, Tensor values, Tensor? shift, "
    "Tensor viewmat, Tensor intrinsics"
)
_RULES = "float near, float far, float eps2d, bool antialiased"
_OF_SCENE = len(Scene._fields)
_TENSORS = _OF_SCENE + 2  # those of a scene, and the camera's two matrices; then come width, height and rules


def _scene_and_camera(inputs: Sequence[Any]) -> tuple[Scene, Camera]:
    """The inputs of `zoo::rasterize`, in the order of `_SCENE`, width, height and `_RULES`."""
    return Scene(*inputs[:_OF_SCENE]), Camera(*inputs[_OF_SCENE:])


class Rendering(NamedTuple):
    """What a camera sees. Colours, depth and features are weighed sums: divide by alpha for means.

    Attributes:
        colour: [height, width, D], over the background if there is one.
        depth: [height, width], sum of weight times distance along the camera's axis (gsplat's "D").
        alpha: [height, width], the sum of the weights.
        features: [height, width, F], or None.
    """

    colour: Tensor
    depth: Tensor
    alpha: Tensor
    features: Tensor | None


def rasterize(
    means: Float[Tensor, "n 3"],
    quats: Float[Tensor, "n 4"],
    scales: Float[Tensor, "n 3"],
    opacities: Float[Tensor, " n"],
    colours: Float[Tensor, "n ..."],
    viewmat: Float[Tensor, "4 4"],
    intrinsics: Float[Tensor, "3 3"],
    width: int,
    height: int,
    *,
    sh_degree: int | None = None,
    features: Float[Tensor, "n f"] | None = None,
    shift: Float[Tensor, "n 2"] | None = None,
    background: Float[Tensor, " d"] | None = None,
    near: float = 0.01,
    far: float = 1e10,
    eps2d: float = 0.3,
    antialiased: bool = False,
) -> Rendering:
    """Draw Gaussians as a pinhole camera sees them, with gsplat's conventions and defaults.

    Args:
        means: centres in the world.
        quats: rotations as (w, x, y, z), of any length but zero.
        scales: standard deviations (not their logarithms).
        opacities: 0 to 1 (not logits); a row below 1/255 is skipped.
        colours: [n, D], or harmonics [n, bases, 3] of which `sh_degree` says how many are used.
        viewmat: world to camera, OpenCV axes (x right, y down, z forward): a rotation and a translation.
        intrinsics: K, in pixels; the centre of the first pixel is at (0.5, 0.5).
        width, height: of the image.
        sh_degree: 0 to 4, of harmonics; None for plain colours.
        features: more values per Gaussian, blended like colours.
        shift: pixels added to the projected centres; its gradient is that of the projected centres, which
            densification looks at.
        background: colour where light is left.
        near, far: depths outside of which a Gaussian is skipped.
        eps2d: square pixels added to both variances.
        antialiased: lower opacities by what `eps2d` adds to the area (Mip-Splatting).

    Raises:
        OpError: shapes, dtypes or devices that do not fit; values that are not finite; a quaternion of length
            zero; a camera that mirrors, scales or has no focal length; depths or a blur below zero; 2^31
            pairs of Gaussians and tiles (or pixels, in the reference) or more.
    """
    check_arguments(means, quats, scales, opacities, viewmat, intrinsics, width, height)
    check_options(near, far, eps2d)
    sh, values = split_channels(means, colours, sh_degree, features)
    for name, extra, last in (("shift", shift, 2), ("background", background, None)):
        wanted = (len(means), last) if last else ((3 if sh is not None else colours.shape[1]),)
        if extra is not None and (tuple(extra.shape) != wanted or extra.dtype != means.dtype):
            raise OpError(
                f"{name} must be {wanted} of {means.dtype}. Received: {tuple(extra.shape)}, {extra.dtype}."
            )
    if means.dtype in (torch.float16, torch.bfloat16):
        raise OpError(f"positions in {means.dtype} are too coarse to project: pass float32 tensors")
    scene = Scene(means, quats, scales, opacities, sh, values, shift)
    camera = Camera(viewmat, intrinsics, width, height, near, far, eps2d, antialiased)
    dispatch.refuse_transforms("rasterize")
    dispatch.refuse_tangents(*scene, viewmat, intrinsics)
    backend = _plan(means, viewmat, intrinsics, width * height).backend
    drawn = 3 if sh is not None else colours.shape[1]
    if backend == "native":
        seen = _native_rendering(scene, camera, drawn)
    elif backend == "vendor":
        from .rasterize_gsplat import rasterize_gsplat

        seen = _rendering(rasterize_gsplat(scene, camera), drawn)
    else:
        seen = _rendering(_reference(scene, camera), drawn)
    colour, depth, alpha, blended = seen
    if background is not None:
        colour = colour + (1 - alpha)[..., None] * background
    return Rendering(colour, depth, alpha, None if features is None else blended)


def reference(*args: Any, **kwargs: Any) -> Rendering:
    """The definition of `rasterize`, which takes the same arguments."""
    with dispatch.backend("reference"):
        return rasterize(*args, **kwargs)


@dispatch.in_own_precision
def _reference(scene: Scene, camera: Camera) -> Tensor:
    means, quats, scales, opacities, sh, values, shift = scene
    viewmat, intrinsics, width, height, *rules = camera
    named = scene._asdict()
    check_values({"colours" if name == "sh" else name: tensor for name, tensor in named.items()})
    near, far, eps2d = rules[:3]
    flat = project(
        *(means, quats, scales, opacities, viewmat, intrinsics, width, height),
        near=near,
        far=far,
        eps2d=eps2d,
        antialiased=bool(rules[3]),
    )
    if shift is not None:
        flat = flat._replace(means=flat.means + shift)
    pairs = int(boxes(flat, width, height)[1].double().prod(-1).sum())
    if pairs > MOST_PAIRS:
        raise too_many(pairs, "pixels", len(means), width, height, MOST_PAIRS)
    colours = [] if sh is None else [sh_colours(sh, means, viewmat)]
    return draw(flat, torch.cat([*colours, values, flat.depths[:, None]], 1), width, height)


def _plan(means: Tensor, viewmat: Tensor, intrinsics: Tensor, pixels: int) -> dispatch.Plan:
    """The native kernels know neither float64 nor gradients for the camera."""
    moving = torch.is_grad_enabled() and (viewmat.requires_grad or intrinsics.requires_grad)
    offered = ["native"] if means.device.type == "cpu" and means.dtype is torch.float32 and not moving else []
    if means.device.type == "cuda" and means.dtype is torch.float32:
        offered = ["vendor"]
    kind = str(means.dtype).removeprefix("torch.")
    return dispatch.choose(
        "rasterize", means.device, (*offered, "reference"), kind, (float(len(means) + 1), float(pixels))
    )


def _explain(means: Tensor, *args: Any, **kwargs: Any) -> dispatch.Plan:
    viewmat, intrinsics, width, height = args[4:8]
    return _plan(means, viewmat, intrinsics, width * height)


def _rendering(image: Tensor, drawn: int) -> Rendering:
    """An image [channels + depth + alpha, height, width], of which the first `drawn` channels are colours."""
    colour, features = image[:drawn].permute(1, 2, 0), image[drawn:-2].permute(1, 2, 0)
    return Rendering(colour, image[-2], image[-1], features)


def _native_rendering(scene: Scene, camera: Camera, drawn: int) -> Rendering:
    """What is seen, past torch's dispatcher where that adds nothing: it takes longer than a small image."""
    tensors = [None if tensor is None else tensor.resolve_neg() for tensor in (*scene, *camera[:2])]
    inputs: Any = (*tensors, *camera[2:])
    if dispatch.direct(*inputs[:_TENSORS]):
        return _rendering(_forward(*inputs)[0], drawn)
    if dispatch.eager():
        return Rendering(*_Eager.apply(drawn, *inputs))
    return _rendering(_rasterize(*inputs)[0], drawn)


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    """The image [channels + depth + alpha, height, width] of a scene and a camera, and what the way back
    needs."""
    scene, camera = _scene_and_camera(inputs)
    return _draw(scene, camera, camera.packed())


def _draw(scene: Scene, camera: Camera, view: rasterize_native.View) -> rasterize_native.Drawn:
    status, row, drawn = rasterize_native.forward(scene, camera, view, MOST_PAIRS)
    if status == rasterize_native.TOO_MANY:
        raise too_many(row, "tiles", len(scene.means), camera.width, camera.height, MOST_PAIRS)
    if status != rasterize_native.DONE:
        raise refusal(status, row)
    return drawn


_rasterize = torch.library.custom_op(
    "zoo::rasterize",
    _forward,
    mutates_args=(),
    schema=f"({_SCENE}, int width, int height, {_RULES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_rasterize.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    (means, *_, sh, values, _), (_, _, width, height, *_) = _scene_and_camera(inputs)
    channels = values.shape[1] + (0 if sh is None else 3) + 1
    count, tiles = means.shape[0], rasterize_native.tile_count(width, height)
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        means.new_empty(channels + 1, height, width),
        means.new_empty(count, rasterize_native.record_floats(channels)),
        means.new_empty(count, dtype=torch.int32),
        means.new_empty(tiles + 1, dtype=torch.int64),
        means.new_empty(pairs, 2, dtype=torch.int32),
    )


def _gradients(
    grad: Tensor, image: Tensor, records: Tensor, tiles: Tensor, pointer: Tensor, entries: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """Gradients for means, quats, scales, opacities, sh, values and shift (empty where there is none)."""
    channels, height, width = image.shape
    scene, camera = _scene_and_camera((*rest[:_TENSORS], width, height, *rest[_TENSORS:]))
    drawn, flow = (image, records, tiles, pointer, entries), grad.resolve_neg().permute(1, 2, 0)
    found = rasterize_native.backward(scene, camera, camera.packed(), drawn, [(flow, channels)])
    return tuple(grad.new_empty(0) if one is None else one for one in found)


_rasterize_backward = torch.library.custom_op(
    "zoo::rasterize_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor image, Tensor records, Tensor tiles, Tensor pointer, Tensor entries, "
    f"{_SCENE}, {_RULES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_rasterize_backward.register_fake
def _(grad: Tensor, image: Tensor, records: Tensor, tiles: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    given = rest[2:9]
    return tuple(records.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in given)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:_TENSORS], inputs[_TENSORS + 2 :]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, *tensors)


def _wanted(needed: Sequence[bool], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients where they are asked for; none for the camera and the options."""
    return *(g if need else None for g, need in zip(grads, needed, strict=False)), *(None,) * 8


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _wanted(ctx.needs_input_grad, _rasterize_backward(grad, *ctx.saved_tensors, *ctx.options))


class _Eager(torch.autograd.Function):
    """`zoo::rasterize` for eager calls on plain tensors."""

    @staticmethod
    def forward(ctx: Any, colours: int, *inputs: Any) -> tuple[Tensor, ...]:
        scene, camera = _scene_and_camera(inputs)
        view = camera.packed()
        drawn = _draw(scene, camera, view)
        seen = _rendering(drawn[0], colours)
        ctx.set_materialize_grads(False)
        ctx.view, ctx.rules, ctx.channels = view, camera[2:], colours
        ctx.save_for_backward(*drawn, *inputs[:_TENSORS])
        return seen.colour, seen.depth, seen.alpha, cast(Tensor, seen.features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        scene, camera = _scene_and_camera((*saved[5:], *ctx.rules))
        colour, depth, alpha, features = (None if grad is None else grad.resolve_neg() for grad in grads)
        more = len(saved[0]) - ctx.channels - 2
        flows = [(colour, ctx.channels), (features, more), (depth, 1), (alpha, 1)]
        found = rasterize_native.backward(scene, camera, ctx.view, saved[:5], flows)
        return None, *_wanted(ctx.needs_input_grad[1:], found)


_rasterize.register_autograd(_backward, setup_context=_save)


def _examples() -> Iterator[dispatch.Example]:
    """Few Gaussians, all in front of the camera."""
    lens = torch.tensor([[12.0, 0, 6], [0, 12, 5], [0, 0, 1]])
    for count, sh_degree in ((5, None), (3, 1), (0, None)):
        means = torch.rand(count, 3) * 2 - torch.tensor([1.0, 1.0, -0.5])
        shape = (means, torch.randn(count, 4), 0.05 + 0.2 * torch.rand(count, 3))
        colours = torch.rand((count, 3) if sh_degree is None else (count, 4, 3))
        run = functools.partial(_pixels, shape, (torch.eye(4), lens, 12, 10), sh_degree)
        yield dispatch.Example(run, (colours, 0.2 + 0.6 * torch.rand(count)))


def _pixels(
    shape: tuple[Tensor, ...],
    view: tuple[Any, ...],
    sh_degree: int | None,
    colours: Tensor,
    opacities: Tensor,
) -> Tensor:
    means, quats, scales = shape
    viewmat, intrinsics, width, height = view
    seen = rasterize(
        means, quats, scales, opacities, colours, viewmat, intrinsics, width, height, sh_degree=sh_degree
    )
    return torch.cat([seen.colour, seen.depth[..., None], seen.alpha[..., None]], -1)


dispatch.register("rasterize", plan=_explain, examples=_examples)
