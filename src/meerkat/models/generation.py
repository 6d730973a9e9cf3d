"""Answers that a model writes: greedily, several prompts at a time, keys and values kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from meerkat.data.encoding import Encoded
from meerkat.models.loading import LoadedModel

__all__ = ["generate", "writer"]

_TOGETHER = 16
"""Most prompts at a time."""


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    most: int,
    ends: frozenset[int],
    tokens_per_pass: int = 16384,
) -> list[tuple[int, ...]]:
    """The likeliest next token, again and again, at the weights as they are.

    The settings that a model brings for writing (temperature, penalties) are not used.

    Args:
        prompts: Tokens of each, at least one.
        most: Most tokens of an answer.
        ends: Tokens that end an answer, which are no part of it.
        tokens_per_pass: Most tokens, of prompts with their answers, at a time.
    """
    longest = most + max(map(len, prompts), default=0)
    together = max(1, min(_TOGETHER, tokens_per_pass // longest))
    found: list[tuple[int, ...]] = [()] * len(prompts)
    # Prompts of like length together: the shorter ones are padded.
    order = sorted(range(len(prompts)), key=lambda which: len(prompts[which]))
    for begin in range(0, len(order), together):
        chosen = order[begin : begin + together]
        written = _together(model, [prompts[which] for which in chosen], most, ends)
        for which, tokens in zip(chosen, written, strict=True):
            last = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
            found[which] = tuple(tokens[:last])
    return found


def _together(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], most: int, ends: frozenset[int]
) -> list[list[int]]:
    """What follows each prompt, with padding after its end."""
    longest, pad = max(map(len, prompts)), min(ends, default=0)
    device = next(model.parameters()).device
    gaps = [longest - len(prompt) for prompt in prompts]
    rows = [[pad] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    own, model.generation_config = model.generation_config, settings
    try:
        with torch.compiler.set_stance("force_eager"):
            written = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
            )
    finally:
        model.generation_config = own
    assert isinstance(written, torch.Tensor)
    tokens: list[list[int]] = written[:, longest:].tolist()
    return tokens


def writer(
    loaded: LoadedModel, most: int, tokens_per_pass: int, stop: Sequence[str] = ()
) -> Callable[[Sequence[Encoded]], list[str]]:
    """A function from examples to what the model writes in the place of their last answers.

    Args:
        most: Most tokens of an answer.
        tokens_per_pass: As for `generate`.
        stop: Texts before which an answer ends, besides the model's own end.
    """

    def write(examples: Sequence[Encoded]) -> list[str]:
        leads = [example.lead for example in examples]
        written = generate(loaded.model, leads, most, loaded.ends, tokens_per_pass)
        texts = [loaded.tokenizer.decode(list(t), skip_special_tokens=True) for t in written]
        return [_until(str(text).strip(), stop) for text in texts]

    return write


def _until(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some others."""
    ends = [place for end in stop if (place := text.find(end)) >= 0]
    return text[: min(ends, default=len(text))].strip()
