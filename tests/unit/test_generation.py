"""Answers that a model writes, against one forward pass a token without padding or cache."""

from __future__ import annotations

import pytest
import torch
from builders import make_mask, tiny_model

from meerkat.data.encoding import Encoded
from meerkat.models.generation import generate, writer
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective
from meerkat.spaces.masked import MaskedSpace

PROMPTS = [[5, 9, 200, 31], [7], [12, 80, 81, 82, 83, 84, 85, 3, 44], [300, 2], [9, 9, 9]]


@torch.inference_mode()
def step_by_step(loaded: LoadedModel, prompt: list[int], most: int, ends: frozenset[int]) -> tuple:
    ids = list(prompt)
    for _ in range(most):
        token = int(
            loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
        )
        if token in ends:
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "gpt2"])
def test_it_is_the_likeliest_token_again_and_again(architecture: str) -> None:
    loaded = tiny_model(architecture)
    TextObjective(loaded, 10_000)  # the model attends as in a run
    free = [step_by_step(loaded, prompt, 8, frozenset()) for prompt in PROMPTS]
    assert generate(loaded.model, PROMPTS, 8, frozenset()) == free
    assert generate(loaded.model, PROMPTS, 8, frozenset(), tokens_per_pass=20) == free
    ends = frozenset({free[0][3], free[2][1]})
    assert generate(loaded.model, PROMPTS, 8, ends) == [
        step_by_step(loaded, prompt, 8, ends) for prompt in PROMPTS
    ]


def test_settings_that_a_model_brings_are_not_used_and_stay() -> None:
    loaded = tiny_model()
    plain = generate(loaded.model, PROMPTS, 6, frozenset())
    own = loaded.model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 3.0, 5.0
    own.max_new_tokens = 1
    assert generate(loaded.model, PROMPTS, 6, frozenset()) == plain
    assert loaded.model.generation_config is own


def test_it_writes_at_the_weights_of_the_space() -> None:
    loaded = tiny_model()
    space = MaskedSpace(loaded.model, make_mask(loaded, 400))
    theta = space.read()
    before = generate(loaded.model, PROMPTS, 6, frozenset())
    space.write(theta + 2.0)
    after = generate(loaded.model, PROMPTS, 6, frozenset())
    expected = [step_by_step(loaded, prompt, 6, frozenset()) for prompt in PROMPTS]
    space.restore()
    assert after == expected != before
    assert generate(loaded.model, PROMPTS, 6, frozenset()) == before


def test_a_text_ends_before_what_stops_it() -> None:
    loaded = tiny_model()
    example = Encoded(tuple(PROMPTS[0]), ((5,),), 0, reference="x")
    (whole,) = writer(loaded, 8, 1000)([example])
    middle = whole[len(whole) // 2]
    (cut,) = writer(loaded, 8, 1000, (middle,))([example])
    assert cut == whole[: whole.index(middle)].strip()
    later = Encoded((5, 9), ((200, 31, 7),), 0, spans=((0, 1), (2, 3)))
    assert list(later.lead) == PROMPTS[0]
    assert writer(loaded, 8, 1000)([later]) == [whole]
