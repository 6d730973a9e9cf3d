"""Attention over a packed row: sequences are set out as a grid, attended to, and packed again.

Registered with transformers as an attention implementation, so it serves every architecture
that uses its attention interface. Right padding needs no mask: a causal mask hides what follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from meerkat.data.packing import Layout

__all__ = ["NAME", "packed_attention"]

NAME = "meerkat_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packing: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of (1, heads, T, width) → (1, T, heads, width), each sequence for itself.

    Without `packing` it is transformers' own SDPA attention.
    """
    if packing is None:
        kwargs |= {"sliding_window": sliding_window, "softcap": softcap}
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return out
    sequences, longest = packing.gather.shape
    q, k, v = (_grid(states, packing.gather) for states in (query, key, value))
    allowed = packing.allowed
    if sliding_window is not None and longest > sliding_window:
        near = packing.positions[:, :, None] - packing.positions[:, None, :] < sliding_window
        causal = q.new_ones((longest, longest), dtype=torch.bool).tril()
        allowed = (causal if allowed is None else allowed) & near[:, None]
    if softcap is not None:
        out_grid = _softcapped(q, k, v, allowed, scaling, softcap)
    else:
        out_grid = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=allowed is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    flat = out_grid.transpose(1, 2).reshape(sequences * longest, q.shape[1], v.shape[3])
    return flat.index_select(0, packing.scatter)[None], None


def _grid(states: Tensor, gather: Tensor) -> Tensor:
    """(1, heads, T, width) → (S, heads, L, width)."""
    rows = states[0].transpose(0, 1).index_select(0, gather.flatten())
    return rows.unflatten(0, gather.shape).transpose(1, 2)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Attention whose scores are squashed to ±softcap (Gemma 2), which SDPA does not know."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if allowed is None:
        allowed = q.new_ones(scores.shape[2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.float().softmax(-1).to(v.dtype) @ v


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
