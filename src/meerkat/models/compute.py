"""In which type a model computes, which need not be the one that its weights are stored in.

A bfloat16 is a float32, so a model whose weights are widened has the same weights, and what moves
in it is still rounded to the stored type: a run has the same model, masks and states, and its
forward passes differ by their rounding, as they do from processor to processor.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

__all__ = ["computes_in_float32", "widen"]


def computes_in_float32(
    choice: Literal["auto", "stored", "float32"], dtype: torch.dtype, device: torch.device
) -> bool:
    """Is a model of this type to compute in float32 (`runtime.compute`)?"""
    if choice != "auto" or dtype != torch.bfloat16 or device.type != "cpu":
        return choice == "float32"
    found = torch.cpu.get_capabilities()
    return found.get("architecture") == "x86_64" and not found.get("avx512_f", True)


def widen(model: nn.Module) -> None:
    """Make a model compute in float32, with the weights that it has, in place.

    Each parameter gets an attribute `stored_dtype`, the type that `spaces.masked` rounds to.
    """
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()
    for name, parameter in model.named_parameters():
        parameter.stored_dtype = kinds[name]  # type: ignore[attr-defined]
