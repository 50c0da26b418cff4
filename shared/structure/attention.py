"""Multi-head attention whose heads together may be narrower than the stream they read and write."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GroupError


class HeadPrunedAttention(nn.Module):
    """Takes the place of an `nn.MultiheadAttention` of which heads were cut; same parameters, same call.

    torch's own module insists on num_heads * head_dim = embed_dim. in_proj_weight is [3 * heads * head_dim,
    embed_dim], out_proj maps heads * head_dim to embed_dim. The attention weights it returns are averages
    over the heads left.

    Args:
        module: the module whose (already sliced) parameters are taken over.

    Raises:
        GroupError: the module has separate key or value widths, or bias_k.
    """

    # Read by nn.TransformerEncoderLayer, which takes its fused path (for full width only) if this is True.
    _qkv_same_embed_dim = False
    in_proj_bias: Tensor | None

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise GroupError("heads of an attention with kdim, vdim, bias_kv or zero_attn cannot be cut.")
        self.embed_dim = module.embed_dim
        self.head_dim = module.head_dim
        self.num_heads = module.in_proj_weight.shape[0] // (3 * self.head_dim)
        self.dropout, self.batch_first = module.dropout, module.batch_first
        self.in_proj_weight = module.in_proj_weight
        self.register_parameter("in_proj_bias", module.in_proj_bias)
        self.out_proj = nn.Linear(1, 1, bias=False, device="meta")
        self.out_proj.weight = module.out_proj.weight
        self.out_proj.register_parameter("bias", module.out_proj.bias)
        self.out_proj.out_features, self.out_proj.in_features = module.out_proj.weight.shape
        self.training = module.training

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """Both masks as one additive [batch or 1, 1, queries, keys] tensor; True of a bool mask means: not
        allowed.
        """
        total = None
        for mask, shape in (
            (attn_mask, (1, 1, *(attn_mask.shape if attn_mask is not None else ()))),
            (padding, None),
        ):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
            mask = mask.view(shape) if shape is not None else mask[:, None, None, :]
            total = mask.to(like.dtype) if total is None else total + mask
        return total

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward; a mask with its own heads (3-D) is refused, since heads are
        gone.
        """
        if attn_mask is not None and attn_mask.ndim != 2:
            raise GroupError(
                f"attn_mask has {attn_mask.ndim} dimensions; after cutting heads only [queries, keys] fits."
            )
        batched = query.ndim == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        attention = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            attention = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            attention = F.dropout(attention, dropout) if dropout else attention
            out = attention @ v
            attention = attention.mean(1) if average_attn_weights else attention
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if attention is None else attention.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), attention
