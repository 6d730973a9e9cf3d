"""Gradients of each example of a batch, against one backward pass an example."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.builders import make_mask, make_text_examples, tiny_model
from torch import Tensor

from meerkat.data.encoding import Encoded
from meerkat.data.packing import PackedBatch, pack
from meerkat.models.objective import TextObjective
from meerkat.spaces.alignment import Scheme, packed_score_gradients, score_gradients
from meerkat.spaces.example_gradients import example_gradients, has_example_gradients
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.sensitivity import backward_passes


def slow(objective: TextObjective, mask: Mask, examples: list[Encoded]) -> np.ndarray:
    """∇ of the first answer's score, from the gradients of whole matrices."""
    parameters = dict(objective.model.named_parameters())
    where = dict(zip(mask.names, mask.indices, strict=True))
    chosen = {name: parameters[name] for name in mask.names}
    found: dict[str, np.ndarray] = {}
    rows: list[np.ndarray] = []

    def collect(name: str, gradient: Tensor) -> None:
        found[name] = gradient.reshape(-1)[where[name]].float().numpy()

    def advance() -> None:
        rows.append(np.concatenate([found[name] for name in mask.names]))

    def score(example: Encoded) -> Tensor:
        return objective.scores(pack([example]))[0, 0]

    backward_passes(score, chosen, examples, collect, advance)
    return np.stack(rows)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "opt"])
def test_gradients_are_those_of_each_example(architecture: str) -> None:
    loaded = tiny_model(architecture)
    objective = TextObjective(loaded, 4096)
    mask = make_mask(loaded, 300)
    assert has_example_gradients(loaded.model, mask)
    examples = make_text_examples(7)

    def target(batch: PackedBatch) -> Tensor:
        return objective.scores(batch)[:, 0]

    batches = [pack(examples[:4]), pack(examples[4:])]
    found = np.concatenate(list(example_gradients(loaded.model, mask, batches, target)))
    expected = slow(objective, mask, examples)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_hooks_are_taken_off_when_a_batch_fails() -> None:
    loaded = tiny_model("llama")

    def target(batch: PackedBatch) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(
            example_gradients(
                loaded.model, make_mask(loaded, 50), [pack(make_text_examples(2))], target
            )
        )
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_weights_that_are_not_of_one_linear_layer() -> None:
    """A norm, an embedding, and a matrix that two layers share."""
    model = tiny_model("llama").model
    layers = model.model.layers

    def mask(name: str) -> Mask:
        shape = tuple(dict(model.named_parameters(remove_duplicate=False))[name].shape)
        return Mask((name,), (shape,), (np.zeros(1, np.int64),), 1, "", "random")

    good = "model.layers.0.mlp.up_proj.weight"
    assert has_example_gradients(model, mask(good))
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert not has_example_gradients(model, mask(name))
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    assert not has_example_gradients(model, mask(good))


@pytest.mark.parametrize("scheme", ["difference", "sampled", "uniform", "mixed"])
def test_scores_of_packed_texts_are_those_of_each_text(scheme: Scheme) -> None:
    """The same draws in the same order, whatever the batches."""
    loaded = tiny_model("gemma3")
    objective = TextObjective(loaded, 4096)
    mask, examples = make_mask(loaded, 200), make_text_examples(9)
    if scheme == "difference":
        examples = [Encoded(e.prompt, e.answers[:2], 0) for e in examples]
    one_by_one = score_gradients(
        lambda example: objective.scores(pack([example]))[0],
        dict(loaded.model.named_parameters()),
        examples,
        mask,
        scheme,
        seed=5,
    )
    calls: list[None] = []
    packed = packed_score_gradients(
        objective.scores,
        loaded.model,
        [pack(examples[:2]), pack(examples[2:])],
        9,
        mask,
        scheme,
        seed=5,
        advance=lambda: calls.append(None),
    )
    assert len(calls) == 9
    limit = 1e-5 * np.abs(one_by_one).max()
    np.testing.assert_allclose(packed, one_by_one, rtol=1e-3, atol=limit)
