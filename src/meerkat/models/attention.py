"""Attention over a packed row: sequences are set out as a grid, attended to, and packed again.

Registered with transformers as an attention implementation, so it serves every architecture
that uses its attention interface. Right padding needs no mask: a causal mask hides what follows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from meerkat.data.packing import Layout, PackedBatch

__all__ = ["NAME", "packed_attention", "packed_logits"]

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

    Without `packing` it is transformers' own: SDPA, or with `softcap`, which that refuses, what
    eager attention computes.
    """
    if packing is None:
        if softcap is not None:
            if attention_mask is None:
                attention_mask = _causal(module, query, key, kwargs.get("is_causal"))
            capped = _softcapped(query, key, value, attention_mask, scaling, softcap, dropout)
            return capped.transpose(1, 2).contiguous(), None
        kwargs["sliding_window"] = sliding_window
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return out
    sequences, longest = packing.gather.shape
    q, k, v = (_grid(states, packing.gather) for states in (query, key, value))
    allowed = packing.allowed
    if sliding_window is not None and longest > sliding_window:
        near = packing.positions[:, :, None] - packing.positions[:, None, :] < sliding_window
        allowed = (_tril(q, k) if allowed is None else allowed) & near[:, None]
    if softcap is not None:
        allowed = _tril(q, k) if allowed is None else allowed
        out_grid = _softcapped(q, k, v, allowed, scaling, softcap)
    else:
        out_grid = functional.scaled_dot_product_attention(
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


def _tril(query: Tensor, key: Tensor) -> Tensor:
    """Causal mask of (L, L) queries and keys."""
    return query.new_ones((query.shape[2], key.shape[2]), dtype=torch.bool).tril()


def _causal(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """The mask that transformers' SDPA means by none: no token hides from a single query."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return _tril(query, key) if causal and query.shape[2] > 1 else None


def _softcapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention whose scores are squashed to ±softcap (Gemma 2), which SDPA does not know.

    The mask is boolean, true where a query may attend, or is added to the scores.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return functional.dropout(scores.float().softmax(-1).to(v.dtype), dropout) @ v


def packed_logits(model: nn.Module, batch: PackedBatch) -> Float32[Tensor, "P rows"]:
    """Logits at the scored places of a packed batch, in one forward pass."""
    arguments: dict[str, Any] = {"packing": batch.layout, "logits_to_keep": batch.scored}
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        # Any 4D mask is passed through as it is; the layout says who attends to whom.
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch.input_ids.device),
        use_cache=False,
        **arguments,
    )
    logits: Tensor = output.logits[0]
    if logits.shape[0] != batch.scored.shape[0]:  # the model knows no `logits_to_keep`
        logits = logits[batch.scored]
    return logits.float()


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
