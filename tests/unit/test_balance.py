"""Where a subspace starts: no answer is preferred on average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float32, Float64
from tests.support.builders import merged

from meerkat.config import parse_recipe
from meerkat.runs.assembly import Assembly, assemble
from meerkat.spaces.balance import balanced_start
from meerkat.spaces.linear import space_of


def centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(axis=0)


def test_a_linear_model_is_balanced_by_the_shortest_way() -> None:
    draw = np.random.default_rng(0)
    jacobian, gaps = centred(draw.normal(size=(4, 20))), centred(draw.normal(size=4))

    def preferences(w: Float32[np.ndarray, " k"]) -> Float64[np.ndarray, " A"]:
        return gaps + jacobian @ w

    w = balanced_start(jacobian, preferences)
    assert w.dtype == np.float32
    np.testing.assert_allclose(preferences(w), 0, atol=1e-5)
    # The shortest of all solutions lies in the span of the rows.
    span = np.linalg.svd(jacobian)[2][:3]
    np.testing.assert_allclose(span.T @ (span @ w), w, atol=1e-5)


def test_a_step_that_makes_it_worse_is_not_taken() -> None:
    jacobian = np.array([[1.0], [-1.0]])
    start = balanced_start(jacobian, lambda w: np.array([1.0, -1.0]) * (1 + abs(float(w[0]))))
    assert start.tolist() == [0.0]


def test_a_bent_model_is_balanced_by_several_steps() -> None:
    jacobian = np.array([[0.5], [-0.5]])
    calls: list[float] = []

    def preferences(w: Float32[np.ndarray, " k"]) -> Float64[np.ndarray, " A"]:
        calls.append(float(w[0]))
        return np.array([1.0, -1.0]) * (1 + 0.7 * float(w[0]) + 0.05 * float(w[0]) ** 2) / 2

    w = balanced_start(jacobian, preferences)
    assert len(calls) == 4
    assert np.abs(preferences(w)).max() < 0.1 * np.abs(preferences(np.zeros(1, np.float32))).max()


def balance_of(assembly: Assembly, texts: int) -> tuple[float, float]:
    """The largest preference over the texts before training, at θ_0 and where it starts."""
    from meerkat.runs.public_texts import public_examples

    section = assembly.recipe.subspace
    assert section is not None
    encoder, objective = assembly.encoder, assembly.objective
    encoded = [encoder.encode(e) for e in public_examples(assembly, section)[:texts]]
    space = space_of(assembly.loaded.model, assembly.found_mask.mask)
    found = []
    for w in (np.zeros(space.size, np.float32), space.read()):
        space.write(w)
        scores = [objective.scores(batch).double().numpy() for batch in objective.packs(encoded)]
        found.append(float(np.abs(centred(np.concatenate(scores).mean(axis=0))).max()))
    space.restore()
    return found[0], found[1]


@pytest.mark.parametrize("verbalizers", [("terrible", "great"), ("good film", "awful film plot")])
def test_a_run_starts_balanced(
    tiny_recipe_data: dict, sentences_file: str, verbalizers: tuple[str, str]
) -> None:
    section = {"dimensions": 6, "texts": 20, "corpus": str(sentences_file)}
    answers = dict(zip(("neg", "pos"), verbalizers, strict=True))
    data = merged(tiny_recipe_data, subspace=section, task={"verbalizers": answers})
    assembly = assemble(parse_recipe(data))
    before, after = balance_of(assembly, 20)
    assert before > 0.02
    assert after < 0.2 * before
    mask = assembly.found_mask.mask
    assert mask.subspace is not None
    np.testing.assert_array_equal(mask.start, mask.subspace.start)
    assert np.abs(mask.subspace.start).max() > 0

    loaded = merged(data, subspace={"start": "loaded"})
    unbalanced = assemble(parse_recipe(loaded)).found_mask.mask.subspace
    assert unbalanced is not None
    assert not unbalanced.start.any()
    np.testing.assert_array_equal(unbalanced.directions, mask.subspace.directions)
    assert unbalanced.digest != mask.subspace.digest


@pytest.mark.parametrize(("start", "moves"), [("auto", False), ("balanced", True)])
def test_more_than_two_answers_are_balanced_if_asked_for(
    tiny_recipe_data: dict, sentences_file: str, tmp_path: Path, start: str, moves: bool
) -> None:
    """Each answer's slope is from passes of its own."""
    rows = [f"the film {i} is a story,{('neg', 'pos', 'mid')[i % 3]}" for i in range(60)]
    source = tmp_path / "kinds.csv"
    source.write_text("\n".join(["text,label", *rows]) + "\n")
    task = {"source": str(source), "verbalizers": {"mid": "plot"}}
    section = {"dimensions": 6, "texts": 20, "corpus": str(sentences_file), "start": start}
    assembly = assemble(parse_recipe(merged(tiny_recipe_data, subspace=section, task=task)))
    before, after = balance_of(assembly, 20)
    assert before > 0.02
    assert after < 0.2 * before if moves else after == before
