"""Whether a subspace fits the clients' texts, and what a run does where it does not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import merged
from commands import invoke
from hypothesis import given
from hypothesis import strategies as st

import meerkat
from meerkat import api
from meerkat.api import running
from meerkat.config import Recipe, parse_recipe
from meerkat.errors import RecipeError, RunError
from meerkat.runs import fit
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.finding_mask import Fit
from meerkat.runs.finding_subspace import slopes_along
from meerkat.runs.public_texts import public_examples

SUBSPACE = {"dimensions": 16, "texts": 40}


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any], sentences_file: Path, tmp_path: Path) -> dict[str, Any]:
    corpus = shutil.copy(sentences_file, tmp_path / "sentences.txt")
    return merged(tiny_recipe_data, subspace={**SUBSPACE, "corpus": str(corpus)})


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99), st.floats(0.1, 10))
def test_effective_rank(k: int, texts: int, seed: int, scale: float) -> None:
    """Between one and the number of directions; neither scale nor a rotation changes it."""
    draw = np.random.default_rng(seed)
    slopes = draw.standard_normal((texts, k))
    rank = fit.effective_rank(slopes)
    assert 1 - 1e-9 <= rank <= min(k, texts) + 1e-9
    turn, _ = np.linalg.qr(draw.standard_normal((k, k)))
    assert fit.effective_rank(scale * slopes @ turn) == pytest.approx(rank)
    covariance = slopes.T @ slopes
    expected = np.trace(covariance) ** 2 / np.trace(covariance @ covariance)
    assert rank == pytest.approx(expected)


def test_texts_of_the_subspace_use_all_of_it(data: dict[str, Any]) -> None:
    """Those that B is made of have curvature one along every direction."""
    recipe = parse_recipe(data)
    found = assemble(recipe)
    section = recipe.subspace
    assert section is not None
    own = [found.encoder.encode(example) for example in public_examples(found, section)]
    slopes = slopes_along(found, found.found_mask.mask, section, own)
    assert fit.effective_rank(slopes) == pytest.approx(16, rel=0.02)
    assert 1 < rank_of(found) < 16


def rank_of(found: Assembly) -> float:
    measured = fit.fit_of(found)
    assert measured is not None
    return measured.rank


def test_spread_of_scores_of_the_model(data: dict[str, Any]) -> None:
    """Of two answers it is the spread of the difference; a scale of all scores is its scale."""
    found = assemble(parse_recipe(data))
    measured = fit.fit_of(found)
    assert measured is not None
    examples = [found.split.train[place] for place in range(len(found.split.train))]
    encoded = [found.encoder.encode(example) for example in examples]
    scores = found.objective.scores_of(encoded).numpy()
    assert fit.spread_of(scores) == pytest.approx(np.std(scores[:, 1] - scores[:, 0]))
    assert measured.spread == pytest.approx(fit.spread_of(scores), rel=0.5)
    four = np.random.default_rng(0).standard_normal((5000, 4))
    assert fit.spread_of(3 * four) == pytest.approx(3 * np.sqrt(2), rel=0.03)
    assert fit.spread_of(four + 9 * four[:, :1]) == pytest.approx(fit.spread_of(four))


@given(st.floats(min_value=0) | st.just(float("nan")), st.floats(0.1, 10))
def test_steps_are_of_a_bounded_length(spread: float, usual: float) -> None:
    scale = fit.scale_of(spread, usual)
    assert 0.25 <= scale <= 2.5
    assert scale * 20 == pytest.approx(round(scale * 20))
    if 0.3 < spread / usual < 2.4:
        assert scale == pytest.approx(spread / usual, abs=0.0251)
    assert fit.scale_of(spread, 0) == fit.scale_of(None, usual) == 1.0


def test_labels_take_no_part(data: dict[str, Any]) -> None:
    found = assemble(parse_recipe(data))
    rank = rank_of(found)
    for example in found.split.train:
        object.__setattr__(example, "label", 1 - example.label)
    assert rank_of(found) == rank


def test_a_run_without_a_subspace_that_does_not_fit(
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is the run of a recipe without one, and says so."""
    monkeypatch.setattr(fit, "fit_of", lambda assembly: Fit(1.4, 2.0))
    data = merged(data, federation={"rounds": 2})
    with caplog.at_level(logging.WARNING):
        found = meerkat.run(parse_recipe(data), tmp_path / "run", observers=())
    assert "make use of 1.4 directions" in caplog.text
    assert "subspace.corpus" in caplog.text
    free = {"learning_rate": "auto"}  # 0.01 was in the units of the subspace
    plain = parse_recipe(merged(data, subspace={"kind": "none"}, optimizer=free))
    expected = meerkat.run(plain, tmp_path / "plain", observers=())
    assert found["state_digest"] == expected["state_digest"]
    assert found["fingerprint"] == expected["fingerprint"] == plain.fingerprint
    assert json.loads((tmp_path / "run/recipe.json").read_text())["subspace"] is None
    assert meerkat.replay(tmp_path / "run").digest == expected["state_digest"]


def test_flowers_simulation_asks_as_well(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "fit_of", lambda assembly: Fit(1.4, 2.0))
    given: list[Recipe] = []

    def simulate(recipe: Recipe, *others: Any, **named: Any) -> dict[str, Any]:
        given.append(recipe)
        return {}

    monkeypatch.setattr(running, "_simulate", simulate)
    recipe = parse_recipe(merged(data, runtime={"engine": "flower"}))
    meerkat.run(recipe, tmp_path / "run", observers=())
    assert given == [fit.without_subspace(recipe)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.json").write_text(recipe.to_json())
    with pytest.raises(RunError, match="run"):
        meerkat.run(recipe, tmp_path / "run", observers=())


def test_the_step_of_a_subspace_goes_with_it(data: dict[str, Any]) -> None:
    """What a recipe leaves out means the same with and without; what it gives stays, but for what
    has the units of the subspace."""
    bare = merged(data)
    del bare["federation"]["batch_size"], bare["optimizer"]
    recipe = parse_recipe(bare)
    assert (recipe.federation.batch_size, recipe.noise.perturbations) == (4, 7)
    plain = parse_recipe(merged(bare, subspace={"kind": "none"}))
    assert fit.without_subspace(recipe) == plain
    units = {"learning_rate": 0.3, "epsilon": 0.1, "schedule": "cosine"}
    assert fit.without_subspace(parse_recipe(merged(bare, optimizer=units))) == plain
    given = parse_recipe(merged(data, noise={"perturbations": 3}, federation={"batch_size": 5}))
    kept = fit.without_subspace(given)
    assert (kept.federation.batch_size, kept.noise.perturbations) == (5, 3)


@pytest.mark.parametrize("optimizer", [{"estimator": "backward"}, {"exact_clients": [0]}])
def test_exact_reports_need_the_subspace(
    data: dict[str, Any],
    tmp_path: Path,
    optimizer: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it does not fit there is no such run; nothing is left of it."""
    monkeypatch.setattr(fit, "fit_of", lambda assembly: Fit(1.4, 2.0))
    recipe = parse_recipe(merged(data, optimizer=optimizer))
    with pytest.raises(RecipeError, match=r"least_rank\).*subspace.corpus.*needs a subspace"):
        meerkat.run(recipe, tmp_path / "run", observers=())
    assert not (tmp_path / "run/recipe.json").exists()


@pytest.mark.parametrize(
    ("changes", "rank", "spread", "fits"),
    [
        ({}, 2.1, 1.75, True),  # an eighth of 16 is asked for
        ({}, 1.9, 1.75, False),
        ({"usual_spread": 0.9}, 2.1, 0.9, True),
        ({}, 2.1, 2.5, False),
        ({"least_rank": 1.5}, 1.6, 1.75, True),
        ({"least_rank": 1.5}, 1.4, 1.75, False),
        ({"least_rank": 0}, 1.0, 1.75, True),
        ({"least_rank": 0, "usual_spread": 0}, 1.0, 0.1, True),
        ({"dimensions": 8}, 1.0, 0.1, True),  # too few to tell
        ({"kind": "random"}, 1.0, 0.1, True),
    ],
)
def test_what_is_asked_for(
    data: dict[str, Any],
    changes: dict[str, Any],
    rank: float,
    spread: float,
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "effective_rank", lambda slopes: rank)
    monkeypatch.setattr(fit, "spread_of", lambda scores: spread)
    recipe = parse_recipe(merged(data, subspace=changes))
    assert (fit.fitted(assemble(recipe)).recipe == recipe) == fits


@pytest.mark.parametrize(("spread", "scale"), [(0.87, 0.5), (3.5, 2.0), (9.9, 2.5)])
def test_steps_go_with_the_spread_of_scores(
    spread: float,
    scale: float,
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rate and ε go with the spread, are written down, and are said; what was given stays."""
    monkeypatch.setattr(fit, "fit_of", lambda assembly: Fit(9.0, spread))
    recipe = parse_recipe(merged(data, federation={"rounds": 2}, optimizer={"epsilon": "auto"}))
    assert recipe.optimizer.learning_rate == 0.01  # given
    found = fit.fitted(assemble(recipe)).recipe
    assert found.epsilon == pytest.approx(scale * recipe.epsilon)
    assert found.learning_rate == 0.01
    free = merged(data, federation={"rounds": 2})
    free["optimizer"] = {}
    recipe = parse_recipe(free)
    found = fit.fitted(assemble(recipe)).recipe
    assert found.learning_rate == pytest.approx(scale * recipe.learning_rate)
    assert found.subspace == recipe.subspace
    with caplog.at_level(logging.WARNING):
        summary = meerkat.run(recipe, tmp_path / "run", observers=())
    assert "subspace.usual_spread = 1.75" in caplog.text
    assert summary["fingerprint"] == found.fingerprint != recipe.fingerprint
    written = json.loads((tmp_path / "run/recipe.json").read_text())
    assert written["optimizer"]["learning_rate"] == found.learning_rate
    given = meerkat.run(found, tmp_path / "given", observers=())
    assert given["state_digest"] == summary["state_digest"]


def test_a_mask_file_is_taken_as_it_is(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meerkat.calibrate(parse_recipe(data), tmp_path / "mask.safetensors")

    def refuse(*arguments: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(fit, "slopes_along", refuse)
    path = tmp_path / "mask.safetensors"
    recipe = parse_recipe(merged(data, mask={"file": str(path)}))
    assert fit.fitted(assemble(recipe)).recipe == recipe
    recipe = parse_recipe(data)
    assert fit.fitted(assemble(recipe, mask_file=path)).recipe == recipe


class _KilledError(BaseException):
    """A run that ends before it has begun."""


def test_a_run_that_was_killed_before_it_began_asks_again(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(assembly: Assembly) -> Fit:
        raise _KilledError

    recipe = parse_recipe(merged(data, federation={"rounds": 2}))
    monkeypatch.setattr(fit, "fit_of", kill)
    with pytest.raises(_KilledError):
        meerkat.run(recipe, tmp_path / "run", observers=())
    monkeypatch.setattr(fit, "fit_of", lambda assembly: Fit(1.0, 2.0))
    found = meerkat.resume(tmp_path / "run", observers=())
    assert found["fingerprint"] == fit.without_subspace(recipe).fingerprint
    again = meerkat.resume(tmp_path / "run", observers=())
    assert again["state_digest"] == found["state_digest"]


def test_it_is_no_part_of_what_a_run_is(data: dict[str, Any]) -> None:
    def made(least: float) -> Recipe:
        return parse_recipe(merged(data, subspace={"least_rank": least}))

    assert made(3.0).fingerprint == parse_recipe(data).fingerprint
    assert parse_recipe(merged(data, subspace={"usual_spread": 1.75})) == parse_recipe(data)
    masks = [assemble(made(least)).found_mask for least in (3.0, 0.0)]
    assert masks[0].path == masks[1].path
    assert masks[0].mask.fingerprint == masks[1].mask.fingerprint


def test_calibrate_says_how_much_is_used(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(parse_recipe(data).to_json())
    done = invoke("calibrate", path)
    assert done.exit_code == 0, done.output
    assert "the clients' texts make use of" in done.output
    assert "a run is made without them" in " ".join(done.output.split())
    recipe = parse_recipe(merged(data, subspace={"least_rank": 0}))
    path.write_text(recipe.to_json())
    done = invoke("calibrate", path)
    measured = api.calibrate(path).fit
    assert measured is not None
    assert measured.epsilon is not None
    assert f"epsilon = {measured.epsilon:.3g} go with that" in " ".join(done.output.split())
    scaled = fit.fitted(assemble(recipe)).recipe
    assert (measured.learning_rate, measured.epsilon) == (scaled.learning_rate, scaled.epsilon)
