"""Whether a model gives each sequence of a packed row the logits that it has alone.

Asked of the model itself and, where its config names an attention window, of the same weights
with a window of a few tokens: the sequences compared here would not reach beyond a real one.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from meerkat.data.encoding import Encoded
from meerkat.data.packing import pack
from meerkat.errors import ModelError
from meerkat.models import attention

__all__ = ["check_packing"]

LENGTHS = (13, 29)
"""Lengths of the sequences compared."""
SHORT = {
    "attention_chunk_size": 4,
    "attention_window_size": 4,
    "index_block_size": 4,
    "index_topk": 4,
    "index_topk_blocks": 1,
    "keep_window_size": 4,
    "local_attention": 4,
    "sliding_window": 4,
    "sliding_window_size": 4,
    "window_size": 4,
}
"""What configs call the number of tokens that a token may attend to, and a short one."""


@torch.inference_mode()
def check_packing(model: Any, name: str, device: torch.device) -> None:
    """Make the model attend with `packed_attention`, if it keeps its logits.

    Raises:
        ModelError: It does not. The model then attends as it did before.
    """
    before = model.config._attn_implementation
    windows = _windows(model.config)
    # Within the window first, so that what differs there is no matter of the window.
    within = min((max(LENGTHS), *windows.values()))
    try:
        _check_mixing(model, device)
        _check_alone(model, device, within, "gives other logits in a packed row than alone")
        if windows:
            named = ", ".join(f"{window} = {size}" for window, size in windows.items())
            short = _with_windows(model, {key: min(SHORT[key], windows[key]) for key in windows})
            lost = f"loses its attention window ({named}) in a packed row"
            _check_alone(short, device, max(LENGTHS), lost)
    except Exception as error:  # of any type: it comes from the code of the architecture
        model.set_attn_implementation(before)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model.name = {name!r} cannot be packed: {reason}; use a plain attention model"
        ) from None
    model.set_attn_implementation(attention.NAME)


def _check_mixing(model: Any, device: torch.device) -> None:
    """Change the first sequence of a row: the logits of the second must stay.

    Both rows have one shape and round alike, so this also finds a mixing far below the rounding
    of bfloat16, such as a short convolution's.

    Raises:
        ValueError: They change.
    """
    first, second = _sequences(model, max(LENGTHS))
    start = len(first)
    before = _packed(model, [first, second], device)[start:]
    after = _packed(model, [first[::-1], second], device)[start:]
    _compare(before, after, 5e-3, "mixes the sequences of a row")


def _check_alone(model: Any, device: torch.device, longest: int, fault: str) -> None:
    """Compare a packed row with its sequences alone, at all positions.

    Raises:
        ValueError: The logits differ by more than rounding explains.
    """
    sequences = _sequences(model, longest)
    alone = _alone(model, sequences, device)
    # bfloat16 rounds 0.6 % of the logits of SmolLM2 135M, and 1.6 % of those of Gemma 3 270M.
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    _compare(alone, _packed(model, sequences, device), tolerance, fault)


def _compare(
    expected: Float32[Tensor, "T V"], found: Float32[Tensor, "T V"], tolerance: float, fault: str
) -> None:
    share = float((found - expected).norm() / expected.norm())
    if not share < tolerance:
        raise ValueError(f"it {fault} (logits differ by {share:.1%})")


def _sequences(model: Any, longest: int) -> list[list[int]]:
    """Ids of ordinary words, wherever a vocabulary has them.

    With rare tokens, whose embeddings were never trained, SmolLM2 in bfloat16 turns a rounding
    into 30 % of its logits.
    """
    longest = min(longest, _limit(model.config))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [
        [(1000 * number + 41 * place) % vocabulary for place in range(min(length, longest))]
        for number, length in enumerate(LENGTHS, start=1)
    ]


def _alone(model: Any, sequences: list[list[int]], device: torch.device) -> Float32[Tensor, "T V"]:
    """Logits of each sequence alone, under transformers' own attention.

    SDPA where the model can do it, as packed attention is SDPA too: in bfloat16, eager attention
    rounds otherwise. Only eager attention knows softcapping.
    """

    def forward(implementation: str) -> Tensor:
        model.set_attn_implementation(implementation)
        rows = (torch.tensor([sequence], device=device) for sequence in sequences)
        return torch.cat([model(input_ids=row, use_cache=False).logits[0].float() for row in rows])

    try:
        return forward("sdpa")
    except (ImportError, ValueError):
        return forward("eager")


def _packed(model: Any, sequences: list[list[int]], device: torch.device) -> Float32[Tensor, "T V"]:
    """Logits of the sequences in one row, one after the other."""
    batch = pack([Encoded(tuple(sequence), ((5,), (6,)), 0) for sequence in sequences])
    everywhere = replace(batch, scored=torch.arange(batch.tokens)).to(device)
    model.set_attn_implementation(attention.NAME)
    return attention.packed_logits(model, everywhere)


def _with_windows(model: Any, windows: dict[str, int]) -> Any:
    """The same weights in a model of the same architecture, with other attention windows.

    Built anew from the config, since an architecture may keep its window anywhere.
    """
    config = deepcopy(model.config)
    config._attn_implementation = "eager"  # any architecture can be built with it
    for window, size in windows.items():
        setattr(config.get_text_config(), window, size)
    with torch.device("meta"):
        built = type(model)(config)
    for module, original in zip(built.modules(), model.modules(), strict=True):
        for key, tensor in chain(
            original.named_parameters(recurse=False), original.named_buffers(recurse=False)
        ):
            setattr(module, key, tensor)
    return built.eval()


def _windows(config: Any) -> dict[str, int]:
    """The attention windows that a config names and that a sequence may go beyond."""
    text = config.get_text_config()
    named = {window: getattr(text, window, None) for window in SHORT}
    limit = _limit(config)
    return {key: size for key, size in named.items() if isinstance(size, int) and 0 < size < limit}


def _limit(config: Any) -> int:
    """Most tokens that a sequence may have."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20)
