"""Which round is best by validation, and where a run ends by its patience."""

from __future__ import annotations

from builders import make_recipe
from hypothesis import given
from hypothesis import strategies as st

from meerkat.config import Recipe
from meerkat.journal.records import Evaluated
from meerkat.runs.best_round import best_evaluation, last_round, score_of

ROUNDS = 100
accuracies = st.integers(0, 4).map(lambda hits: hits / 4)
losses = st.sampled_from([0.25, 0.5, 0.75])
scores = st.one_of(st.none(), st.tuples(accuracies, losses), losses)
runs = st.lists(scores, max_size=12)


def recipe_of(patience: int) -> Recipe:
    evaluation = {"validation": 4, "every": 5, "patience": patience}
    return make_recipe(federation={"rounds": ROUNDS}, evaluation=evaluation)


def evaluation(round: int, score: tuple[float, float] | float | None) -> Evaluated:
    """With an accuracy and a loss on validation, a loss alone, or neither."""
    metrics = {"loss": 1.0, "accuracy": 1.0 - round / ROUNDS}
    if isinstance(score, tuple):
        metrics |= {"validation_loss": score[1], "validation_accuracy": score[0]}
    elif score is not None:
        metrics["validation_loss"] = score
    return Evaluated(round, metrics, 20, 0.5)


def evaluations(found: list[tuple[float, float] | float | None]) -> list[Evaluated]:
    return [evaluation(5 * number, score) for number, score in enumerate(found)]


def best(*found: tuple[float, float] | float | None) -> int | None:
    chosen = best_evaluation(evaluations(list(found)))
    return chosen and chosen.round


def test_accuracy_then_loss_then_the_earlier_round() -> None:
    assert best() is None
    assert best(None, None) is None
    assert best((0.5, 0.7), (0.75, 0.9), (0.5, 0.1)) == 5
    assert best((0.5, 0.7), (0.75, 0.9), (0.75, 0.8)) == 10
    assert best((0.5, 0.7), (0.5, 0.7)) == 0
    assert best(None, (0.25, 0.7)) == 5
    assert best(0.5, 0.25, 0.25, 0.75) == 5


def test_the_first_metric_besides_the_loss_counts() -> None:
    order = ("validation_loss", "validation_macro_f1", "validation_accuracy")
    metrics = dict(zip(order, (0.7, 0.25, 0.75), strict=True))
    assert score_of(Evaluated(0, {"loss": 1.0, **metrics}, 20, 0.5)) == (0.25, -0.7)
    unknown = {"validation_loss": 0.7, "validation_of_my_own": 3.0}
    assert score_of(Evaluated(0, unknown, 20, 0.5)) == (3.0, -0.7)


def test_what_is_not_finite_is_no_score() -> None:
    for value in (float("nan"), float("inf")):
        assert score_of(evaluation(0, (0.5, value))) is None
        assert best((0.5, 0.5), (0.75, value)) == 0


def test_a_run_ends_after_so_many_in_a_row_that_are_no_better() -> None:
    one, two = recipe_of(1), recipe_of(2)
    rising = [(0.25, 0.5), (0.5, 0.5), (0.75, 0.5)]
    assert last_round(two, evaluations(rising)) == ROUNDS
    assert last_round(two, evaluations([*rising, (0.5, 0.5)])) == ROUNDS
    assert last_round(two, evaluations([*rising, (0.5, 0.5), (0.75, 0.5)])) == 20
    assert last_round(two, evaluations([*rising, (0.5, 0.5), (1.0, 0.5), (0.5, 0.5)])) == ROUNDS
    assert last_round(one, evaluations([*rising, (0.75, 0.25), (0.75, 0.25)])) == 20
    # What has no score says nothing.
    assert last_round(two, evaluations([(0.5, 0.5), None, None, None])) == ROUNDS


def test_without_patience_a_run_ends_after_its_rounds() -> None:
    never = make_recipe(federation={"rounds": ROUNDS}, evaluation={"validation": 4, "every": 5})
    assert last_round(never, evaluations([(0.5, 0.5)] * 9)) == ROUNDS


@given(runs, st.integers(1, 4))
def test_no_later_evaluation_changes_where_a_run_ended(
    found: list[tuple[float, float] | None], patience: int
) -> None:
    """So a run that is resumed ends where it would have ended without a break."""
    found = [score for score in found if not isinstance(score, float)]
    recipe = recipe_of(patience)
    ends = [last_round(recipe, evaluations(found[:seen])) for seen in range(len(found) + 1)]
    ended = [number for number, end in enumerate(ends) if end < ROUNDS]
    assert all(ends[number] == ends[ended[0]] for number in ended)
    assert ended == list(range(ended[0], len(ends))) if ended else True
    if ended:
        seen = evaluations(found[: ended[0]])
        assert ends[ended[0]] == seen[-1].round
        scored = [e for e in seen if score_of(e) is not None]
        chosen = best_evaluation(seen)
        assert chosen is not None
        assert [e.round for e in scored].index(chosen.round) == len(scored) - 1 - patience


@given(runs)
def test_the_best_is_the_first_of_the_largest(found: list[tuple[float, float] | None]) -> None:
    alike = [score for score in found if not isinstance(score, float)]
    chosen = best_evaluation(evaluations(alike))
    known = {e.round: score_of(e) for e in evaluations(alike) if score_of(e) is not None}
    if chosen is None:
        assert not known
    else:
        assert known[chosen.round] == max(known.values())
        assert all(known[r] < known[chosen.round] for r in known if r < chosen.round)
