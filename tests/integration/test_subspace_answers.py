"""A subspace for answers of several tokens and for free text: which scores, and what they cost."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import ARCHITECTURES, merged, tiny_model

import meerkat
from meerkat.config import parse_recipe
from meerkat.data import encoding
from meerkat.data.encoding import Encoded
from meerkat.errors import RecipeError
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective
from meerkat.runs import finding_subspace
from meerkat.runs.modalities.texts import Texts
from meerkat.spaces import alignment
from meerkat.spaces.alignment import Scheme, score_gradients
from meerkat.spaces.answers import drawn_answer
from meerkat.spaces.mask_file import Mask, load_mask
from meerkat.spaces.whitening import whitened

TEXTS = 12


@pytest.fixture
def data(tiny_recipe_data: dict, sentences_file: Path) -> dict[str, Any]:
    section = {"dimensions": 4, "texts": TEXTS, "corpus": str(sentences_file)}
    rates = {"learning_rate": 0.1, "epsilon": 0.1}
    return merged(tiny_recipe_data, subspace=section, optimizer=rates)


@pytest.fixture
def free_text(data: dict[str, Any]) -> dict[str, Any]:
    """The column of the label is the answer that is to be written."""
    return merged(data, task={"verbalizers": None, "answer": "label"})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The answers that are drawn."""
    found: list[tuple[int, ...]] = []

    def watched(*arguments: Any) -> tuple[int, ...]:
        found.append(drawn_answer(*arguments))
        return found[-1]

    monkeypatch.setattr(finding_subspace, "drawn_answer", watched)
    return found


def run(data: dict[str, Any], out: Path, **sections: Any) -> dict[str, Any]:
    return meerkat.run(parse_recipe(merged(data, **sections)), out, observers=())


def whole_mask(loaded: LoadedModel) -> Mask:
    """Every coordinate of two tensors, one of them the last of the model."""
    names = [name for name, p in loaded.model.named_parameters() if p.ndim == 2]
    chosen = (names[1], names[-1])
    parameters = dict(loaded.model.named_parameters())
    shapes = tuple(tuple(parameters[name].shape) for name in chosen)
    indices = tuple(np.arange(math.prod(shape)) for shape in shapes)
    size = sum(map(len, indices))
    return Mask(chosen, shapes, indices, size, loaded.fingerprint, "full")


def plain_score(loaded: LoadedModel, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Mean log-probability of an answer, by transformers alone and without packing."""
    ids = torch.tensor([[*prompt, *answer]])
    logs = loaded.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return torch.stack([logs[p, t] for p, t in zip(places, answer, strict=True)]).mean()


def plain_gradient(loaded: LoadedModel, mask: Mask, value: torch.Tensor) -> np.ndarray:
    parameters = dict(loaded.model.named_parameters())
    parts = torch.autograd.grad(value, [parameters[name] for name in mask.names])
    return torch.cat([part.flatten() for part in parts]).numpy()


EXAMPLES = [
    Encoded((1, 40, 60, 52), ((70, 71, 72), (80,), (90, 91)), 0),
    Encoded((1, 41, 61), ((70, 71, 72), (80,), (90, 91)), 0),
]


@pytest.mark.parametrize("scheme", ["difference", "sampled", "uniform", "mixed"])
def test_scores_of_answers_of_several_tokens(scheme: Scheme) -> None:
    """Answers of unlike lengths share a prompt; each gradient is that of plain transformers."""
    loaded = tiny_model()
    mask, objective = whole_mask(loaded), TextObjective(loaded, 4096)
    count = 2 if scheme == "difference" else 3
    examples = [Encoded(e.prompt, e.answers[:count], 0) for e in EXAMPLES]
    parameters = dict(loaded.model.named_parameters())
    found = score_gradients(
        lambda e: Texts().answer_scores(objective, e), parameters, examples, mask, scheme, seed=3
    )
    draw = np.random.Generator(np.random.Philox(3))
    for name in mask.names:
        parameters[name].requires_grad_(True)
    for row, example in zip(found, examples, strict=True):
        scores = torch.stack([plain_score(loaded, example.prompt, a) for a in example.answers])
        value = alignment._target(scores, scheme, draw)
        expected = plain_gradient(loaded, mask, value)
        assert np.abs(expected).max() > 1e-3
        assert np.allclose(row, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max() + 1e-6)


def test_the_score_of_a_drawn_answer() -> None:
    """√T times the gradient of the mean, T its tokens."""
    loaded = tiny_model()
    mask, objective = whole_mask(loaded), TextObjective(loaded, 4096)
    examples = [Encoded(e.prompt, (e.answers[0],), 0) for e in EXAMPLES]
    parameters = dict(loaded.model.named_parameters())
    found = score_gradients(
        lambda e: Texts().answer_scores(objective, e), parameters, examples, mask, "given"
    )
    for name in mask.names:
        parameters[name].requires_grad_(True)
    for row, example in zip(found, examples, strict=True):
        value = plain_score(loaded, example.prompt, example.answers[0]) * math.sqrt(3)
        expected = plain_gradient(loaded, mask, value)
        assert np.allclose(row, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max() + 1e-6)
    with pytest.raises(ValueError, match="the score of one answer, not of 3"):
        alignment._target(torch.zeros(3), "given", np.random.default_rng(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_is_drawn_from_the_model(architecture: str) -> None:
    """Token by token with what was read kept; the same as reading all of it anew."""
    loaded = tiny_model(architecture)
    TextObjective(loaded, 4096)  # from here on the model attends as in a run
    prompt, most = (1, 40, 60, 52, 33), 9
    again, expected = np.random.Generator(np.random.Philox(5)), []
    for _ in range(most):
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([[*prompt, *expected]])).logits[0, -1]
        shares = logits.double().softmax(0).cumsum(0).numpy()
        expected.append(int(np.searchsorted(shares, again.random() * shares[-1], side="right")))
    draw = np.random.Generator(np.random.Philox(5))
    found = drawn_answer(loaded.model, prompt, most, frozenset(), draw)
    assert found == tuple(expected)
    assert len(set(found)) > 1
    draw = np.random.Generator(np.random.Philox(5))
    end = frozenset({expected[2]})
    assert drawn_answer(loaded.model, prompt, most, end, draw) == tuple(
        expected[: expected.index(expected[2]) + 1]
    )
    draw = np.random.Generator(np.random.Philox(5))
    assert drawn_answer(loaded.model, prompt, 1, frozenset(), draw) == (expected[0],)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


class _Forgetful(torch.nn.Module):
    """A model that keeps no keys and values."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> Any:
        return self.inner(input_ids=input_ids, logits_to_keep=logits_to_keep, use_cache=False)


def test_a_model_that_keeps_nothing_reads_all_again() -> None:
    loaded, prompt = tiny_model(), (1, 40, 60)
    found = [
        drawn_answer(model, prompt, 6, frozenset(), np.random.Generator(np.random.Philox(2)))
        for model in (loaded.model, _Forgetful(loaded.model))
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 6


def test_draws_follow_the_models_own_distribution() -> None:
    loaded = tiny_model()
    prompt, draw = (1, 40, 60), np.random.Generator(np.random.Philox(0))
    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    shares = logits.double().softmax(0).numpy()
    count = 600
    drawn = [drawn_answer(loaded.model, prompt, 1, frozenset(), draw)[0] for _ in range(count)]
    seen = np.bincount(drawn, minlength=len(shares)) / count
    best = shares.argsort()[-5:]
    assert np.allclose(seen[best], shares[best], atol=5 * math.sqrt(0.25 / count))


def test_what_ends_a_text() -> None:
    loaded = tiny_model()
    own = loaded.tokenizer.eos_token_id
    loaded.model.generation_config.eos_token_id = None
    assert loaded.ends == {own}
    loaded.model.generation_config.eos_token_id = [own, 7]
    assert loaded.ends == {own, 7}


def test_a_free_text_run_is_replayed_made_again_and_found_again(
    free_text: dict[str, Any], tmp_path: Path, drawn: list[tuple[int, ...]]
) -> None:
    data = merged(free_text, runtime={"cache_dir": str(tmp_path / "cache")})
    found = run(data, tmp_path / "a")
    first = list(drawn)
    assert len(first) == TEXTS
    assert all(1 <= len(answer) <= 16 for answer in first)
    assert len(set(first)) > 1
    again = run(data, tmp_path / "b")
    assert len(drawn) == TEXTS, "it is in the cache"
    anew = run(merged(data, runtime={"cache_dir": str(tmp_path / "other")}), tmp_path / "c")
    assert drawn[TEXTS:] == first
    replayed = meerkat.replay(tmp_path / "a")
    digests = {summary["state_digest"] for summary in (found, again, anew)}
    assert digests == {replayed.digest}
    assert np.abs(replayed.theta).min() > 0
    subspace = load_mask(tmp_path / "a/mask.safetensors").subspace
    assert subspace is not None
    assert subspace.curvature[3] > 0
    assert subspace.about["score"] == "sampled"
    assert subspace.about["answers"] == "[]"


def test_answers_are_as_long_as_asked_for(
    free_text: dict[str, Any], tmp_path: Path, drawn: list[tuple[int, ...]]
) -> None:
    run(free_text, tmp_path / "a", subspace={"answer_tokens": 3, "seed": 9})
    assert {len(answer) for answer in drawn} <= {1, 2, 3}
    assert max(map(len, drawn)) == 3
    subspace = load_mask(tmp_path / "a/mask.safetensors").subspace
    assert subspace is not None
    assert json.loads(subspace.about["settings"])["answer_tokens"] == 3


@pytest.mark.parametrize("max_length", [8, 20])
def test_answers_stay_within_the_longest_example(
    free_text: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drawn: list[tuple[int, ...]],
    max_length: int,
) -> None:
    prompts: list[int] = []
    encode = encoding.Encoder.encode

    def watched(self: Any, example: Any) -> Encoded:
        found = encode(self, example)
        prompts.append(len(found.prompt))
        return found

    monkeypatch.setattr(encoding.Encoder, "encode", watched)
    meerkat.calibrate(parse_recipe(merged(free_text, task={"max_length": max_length})))
    assert len(drawn) == TEXTS
    for prompt, answer in zip(prompts, drawn, strict=False):
        assert len(answer) == 1 or prompt + len(answer) - 1 <= max_length


@pytest.mark.parametrize("score", ["difference", "uniform", "mixed"])
def test_free_text_has_no_list_of_answers(
    free_text: dict[str, Any], tmp_path: Path, score: str
) -> None:
    with pytest.raises(RecipeError, match=f"subspace.score = '{score}' goes through a list"):
        run(free_text, tmp_path / "run", subspace={"score": score})


@pytest.mark.parametrize("score", ["auto", "sampled", "uniform", "mixed"])
def test_a_run_with_answers_of_several_tokens(
    data: dict[str, Any], tmp_path: Path, score: str
) -> None:
    verbalizers = {"neg": "terrible film plot", "pos": "great"}
    changes = {"task": {"verbalizers": verbalizers}, "subspace": {"score": score}}
    found = run(data, tmp_path / "run", **changes)
    replayed = meerkat.replay(tmp_path / "run")
    assert found["state_digest"] == replayed.digest
    assert np.abs(replayed.theta).min() > 0


def test_a_later_field_leaves_fingerprints_and_masks_as_they_were(data: dict[str, Any]) -> None:
    recipe = parse_recipe(data)
    said = parse_recipe(merged(data, subspace={"renew_every": 0}))
    other = parse_recipe(merged(data, subspace={"renew_every": 2}))
    assert recipe.fingerprint == said.fingerprint != other.fingerprint
    tokens = parse_recipe(merged(data, subspace={"answer_tokens": 17}))
    assert recipe.fingerprint != tokens.fingerprint
    first, second = (meerkat.calibrate(r).mask.subspace for r in (recipe, other))
    assert first is not None
    assert second is not None
    assert "renew_every" not in json.loads(first.about["settings"])
    assert second.digest == first.digest


# Memory


def test_large_scores_are_kept_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, and nothing of it is left."""
    loaded = tiny_model()
    mask, objective = whole_mask(loaded), TextObjective(loaded, 4096)
    parameters = dict(loaded.model.named_parameters())

    def made() -> np.ndarray:
        return score_gradients(
            lambda e: Texts().answer_scores(objective, e), parameters, EXAMPLES, mask, "mixed"
        )

    in_memory = made()
    monkeypatch.setattr(alignment, "IN_MEMORY", 1000)
    in_file = made()
    assert isinstance(in_file, np.memmap)
    assert not isinstance(in_memory, np.memmap)
    assert np.array_equal(in_memory, in_file)
    one, other = whitened(in_memory, 2), whitened(in_file, 2)
    assert np.array_equal(one.rows, other.rows)
    assert np.array_equal(one.curvature, other.curvature)


@pytest.mark.parametrize("block", [2**18, 2**20])
def test_whitening_needs_a_block_beside_its_result(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    count, size, k = 32, 60_000, 4
    scores = np.random.default_rng(0).standard_normal((count, size), np.float32)
    expected = whitened(scores, k)
    monkeypatch.setattr("meerkat.spaces.whitening._BLOCK", block)
    tracemalloc.start()
    found = whitened(scores, k)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.allclose(found.rows, expected.rows, rtol=1e-4, atol=1e-7)
    assert peak < 4 * k * size + 8 * block // 4 + 64 * count**2 + 2**20
