"""Backward passes that keep what is between decoder blocks, and compute each block again.

Memory is that of one block's activations and of one hidden state a block, instead of all
activations; a backward pass takes one forward pass more. It is torch's reentrant checkpoint: a
block first runs without a graph, then with one when the backward pass comes to it, so hooks that
read inputs and gradients of its layers see each once, and hold no block but the current one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Forward passes that begin in here keep no activations within these decoder blocks.

    Passes without a graph are as they are.
    """
    for block in blocks:
        block.forward = partial(_run, block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _run(
    block: nn.Module, forward: Callable[..., Any], hidden: Tensor, *arguments: Any, **others: Any
) -> Any:
    moves = hidden.requires_grad or any(p.requires_grad for p in block.parameters())
    if not (torch.is_grad_enabled() and moves):
        return forward(hidden, *arguments, **others)
    if not hidden.requires_grad:
        # Only what a checkpoint is given decides whether it has a gradient, and that is this.
        hidden = hidden.detach().requires_grad_()
    return checkpoint(
        lambda given: forward(given, *arguments, **others),
        hidden,
        use_reentrant=True,
        preserve_rng_state=False,
    )
