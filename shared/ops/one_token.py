"""What stands between the products of a decoder layer, for one token: norm, rotation, attention.

    n = normalise(x, norm, epsilon)
    q, k = rotate(q, k, cosine, sine)
    a = attend(q, keys, values, scale)

torch's operations wake all threads for a token's attention, which is microseconds of work: where another
program holds a core, that takes milliseconds. These wake a thread when there is something for it to do. The
references, in plain PyTorch, are the definition; sums are in fp32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import _native
from .dispatch import runs_natively
from .layout import VALUE_TYPES

__all__ = ["attend", "normalise", "rotate"]


def normalise(x: Float[Tensor, " d"], scale: Float[Tensor, " d"], epsilon: float) -> Float[Tensor, " d"]:
    """scale * x / sqrt(mean(x^2) + epsilon), in the dtype of x.

    Raises:
        OpError: shapes that do not fit, or another dtype than fp32, bf16 or fp16.
    """
    check_token(x)
    if x.shape != scale.shape or x.device != scale.device:
        raise OpError(
            f"x must be [{scale.numel()}] on {scale.device}, received {tuple(x.shape)} on {x.device}"
        )
    if not runs_natively(x):
        return reference_norm(x.float(), scale.float(), epsilon).to(x.dtype)
    wide, factors, out = _native.plain(x), _native.plain(scale), torch.empty(x.shape)
    _native.function("zoo_token_norm", "pppid")(
        wide.data_ptr(), factors.data_ptr(), out.data_ptr(), x.numel(), epsilon
    )
    return out.to(x.dtype)


def rotate(
    q: Float[Tensor, " qs"],
    k: Float[Tensor, " ks"],
    cosine: Float[Tensor, " head"],
    sine: Float[Tensor, " head"],
) -> tuple[Float[Tensor, " qs"], Float[Tensor, " ks"]]:
    """Queries and keys of one token turned by its position: in each head, the pair (i, i + head / 2).

    Raises:
        OpError: shapes that do not fit, or another dtype than fp32, bf16 or fp16.
    """
    check_token(q)
    head = cosine.numel()
    sizes = [q.numel(), k.numel()]
    if cosine.shape != sine.shape or not head or head % 2 or any(size % head for size in sizes):
        raise OpError(
            f"cosine {tuple(cosine.shape)} and sine {tuple(sine.shape)} must have one even length that "
            f"divides the {sizes[0]} queries and {sizes[1]} keys"
        )
    if not runs_natively(q):
        turned = (reference_rotation(each.float(), cosine.float(), sine.float()) for each in (q, k))
        one, other = (each.to(q.dtype) for each in turned)
        return one, other
    out = torch.empty(sum(sizes))
    parts = [_native.plain(each) for each in (q, k, cosine, sine)]
    places = [each.data_ptr() for each in parts]
    _native.function("zoo_token_rotate", "pppppiii")(*places, out.data_ptr(), *sizes, head)
    one, other = out.to(q.dtype).split(sizes)
    return one, other


def attend(
    q: Float[Tensor, " qs"],
    keys: Float[Tensor, "kv_heads count head"],
    values: Float[Tensor, "kv_heads count head"],
    scale: float,
) -> Float[Tensor, " qs"]:
    """softmax(scale * q K^T) V by heads, of which those of q share the cache's in turn; in the dtype of q.

    Raises:
        OpError: shapes that do not fit, or another dtype than fp32, bf16 or fp16.
    """
    check_token(q)
    check_cache(keys, values)
    kv_heads, count, head = keys.shape
    if not keys[:, :1].numel() or q.numel() % (kv_heads * head):
        raise OpError(f"q [{q.numel()}] does not divide into heads of keys {tuple(keys.shape)}")
    if not runs_natively(q):
        return reference_attention(q.float(), keys.float(), values.float(), scale).to(q.dtype)
    keys, values = (each if each.stride(2) == 1 else each.contiguous() for each in (keys, values))
    wide, out = _native.plain(q), torch.empty(q.shape)
    _native.function("zoo_token_attend", "pppipiiiiiiiidi")(
        wide.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        VALUE_TYPES.index(keys.dtype),
        out.data_ptr(),
        q.numel() // head,
        kv_heads,
        head,
        count,
        *keys.stride()[:2],
        *values.stride()[:2],
        scale,
        _native.threads(),
    )
    return out.to(q.dtype)


def check_token(x: Tensor) -> None:
    """Raise OpError if x is no vector of a dtype that these take."""
    if x.dtype not in VALUE_TYPES or x.dim() != 1:
        raise OpError(f"a token must be a vector of fp32, bf16 or fp16, not {x.dtype} {tuple(x.shape)}")


def check_cache(keys: Tensor, values: Tensor) -> None:
    """Raise OpError if keys and values are not of one shape and a dtype that these take."""
    if keys.dim() != 3 or keys.shape != values.shape:
        raise OpError(
            "keys and values must be [kv_heads, count, head], both the same, received "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if keys.dtype != values.dtype or keys.dtype not in VALUE_TYPES:
        raise OpError(f"keys and values must be both fp32, bf16 or fp16, not {keys.dtype} and {values.dtype}")


def reference_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """The definition of `normalise`."""
    return scale * (x * torch.rsqrt(x.square().mean() + epsilon))


def reference_rotation(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The definition of `rotate`, for queries or keys."""
    one, other = x.view(-1, 2, len(cosine) // 2).unbind(1)
    turned = torch.cat([-other, one], 1)
    return (torch.cat([one, other], 1) * cosine + turned * sine).flatten()


def reference_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The definition of `attend`."""
    groups = q.view(keys.shape[0], -1, keys.shape[2])
    shares = (scale * groups @ keys.transpose(1, 2)).softmax(-1)
    return (shares @ values).flatten()
