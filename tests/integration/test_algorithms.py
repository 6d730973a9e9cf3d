"""Whole runs of each update rule, estimator, key scheme, transform and algorithm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import merged

import meerkat
from meerkat.config import Recipe, parse_recipe
from meerkat.errors import RecipeError
from meerkat.federation.rounds import RoundRecord
from meerkat.journal.records import RoundMetrics
from meerkat.runs.directory import open_journal
from meerkat.runs.events import RunObserver
from meerkat.zo.seed_pool import POOL

Sections = dict[str, Any]
BOUND = 0.25
"""Of the clip; a float32."""

CHOICES: dict[str, Sections] = {
    "sgd": {},
    "momentum": {"optimizer": {"rule": "momentum"}},
    "momentum-0.5": {"optimizer": {"rule": {"kind": "momentum", "decay": 0.5}}},
    "adam": {"optimizer": {"rule": {"kind": "adam", "beta2": 0.99}, "learning_rate": 1e-3}},
    "hiso": {"optimizer": {"rule": {"kind": "hiso", "smoothing": 0.9}, "learning_rate": 1e-3}},
    "one-sided": {
        "optimizer": {"estimator": "one-sided"},
        "noise": {"perturbations": 3},
    },
    "one-sided-mean": {
        "optimizer": {"estimator": "one-sided-mean"},
        "noise": {"perturbations": 3},
    },
    "fedkseed": {"algorithm": "fedkseed"},
    "feddyn": {"algorithm": {"kind": "feddyn", "alpha": 0.5}},
    "feddyn-sampled": {"algorithm": "feddyn", "federation": {"clients_per_round": 2}},
    "pool": {"noise": {"keys": {"kind": "pool", "size": 3}}},
    "clip": {"federation": {"transforms": [{"kind": "clip", "bound": BOUND}]}},
    "all": {
        "algorithm": "fedkseed",
        "optimizer": {"rule": "adam", "estimator": "one-sided-mean", "learning_rate": 1e-3},
        "noise": {"perturbations": 2, "kind": "rademacher", "keys": {"kind": "pool", "size": 5}},
        "federation": {"transforms": [{"kind": "clip", "bound": 2.0}], "clients_per_round": 2},
    },
}
ALL = pytest.mark.parametrize("name", CHOICES)


def recipe_with(data: dict[str, Any], sections: Sections) -> Recipe:
    return parse_recipe(merged(data, **sections))


class Live(RunObserver):
    """Keeps the digest of each round's state, as it was in the running server.

    Args:
        until: Interrupt the run once so many rounds are closed, as Ctrl-C does.
    """

    def __init__(self, until: int | None = None) -> None:
        self.digests: list[str] = []
        self._until = until

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        self.digests.append(record.state_digest)
        if self._until == record.round + 1:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Whole:
    """A run without an interruption."""

    directory: Path
    summary: dict[str, Any]
    digests: tuple[str, ...]
    """Of the live state after each round."""

    def records(self) -> list[RoundRecord]:
        with closing(open_journal(self.directory)) as journal:
            return [record for record, _ in journal.records()]


@pytest.fixture(scope="module")
def whole(
    tiny_recipe_data: dict, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Whole]:
    """The run of a choice, which is made once."""

    @cache
    def made(name: str) -> Whole:
        live, out = Live(), tmp_path_factory.mktemp("whole") / name
        recipe = recipe_with(tiny_recipe_data, CHOICES[name])
        summary = meerkat.run(recipe, out, observers=[live])
        return Whole(out, summary, tuple(live.digests))

    return made


@ALL
def test_replay_equals_the_live_state_at_every_round(
    whole: Callable[[str], Whole], name: str
) -> None:
    run = whole(name)
    assert len(set(run.digests)) == 4
    for number, digest in enumerate(run.digests, start=1):
        replayed = meerkat.replay(run.directory, number)
        assert replayed.digest == digest
        assert np.isfinite(replayed.theta).all()
    assert run.summary["state_digest"] == run.digests[-1]


@ALL
def test_resume_after_an_interruption_gives_the_same_state(
    tiny_recipe_data: dict, whole: Callable[[str], Whole], tmp_path: Path, name: str
) -> None:
    recipe, out = recipe_with(tiny_recipe_data, CHOICES[name]), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        meerkat.run(recipe, out, observers=[Live(until=1)])
    with pytest.raises(KeyboardInterrupt):
        meerkat.resume(out, observers=[Live(until=3)])
    summary = meerkat.resume(out, observers=())
    assert summary["state_digest"] == whole(name).summary["state_digest"]


def test_every_choice_changes_what_is_computed(whole: Callable[[str], Whole]) -> None:
    """None of them is taken for another: fingerprints and states all differ."""
    runs = [whole(name) for name in CHOICES]
    for figure in ("fingerprint", "state_digest"):
        assert len({run.summary[figure] for run in runs}) == len(CHOICES)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"rule": "momentum", "learning_rate": 0.01},
        {"rule": "adam", "learning_rate": 2e-3},
    ],
    ids=lambda optimizer: optimizer["rule"],
)
def test_training_lowers_the_loss(  # SGD's is in test_training.py
    tiny_recipe_data: dict, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    sections = {
        "federation": {"rounds": 60, "local_steps": 1, "partition": {"kind": "iid"}},
        "optimizer": optimizer,
    }
    summary = meerkat.run(recipe_with(tiny_recipe_data, sections), tmp_path / "run", observers=())
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.02


# What differs, as the journal has it


def test_momentum_carries_over_rounds(whole: Callable[[str], Whole]) -> None:
    """θ after each round is that of heavy-ball momentum, worked out here in float64."""
    run, decay = whole("momentum-0.5"), 0.5
    with closing(open_journal(run.directory)) as journal:
        theta, stream = journal.theta0.astype(np.float64), journal.header.algorithm.stream
    momentum = np.zeros_like(theta)
    for record in run.records():
        for update in record.updates:
            estimate = sum(e.coefficient * stream.z(e.key).astype(float) for e in update.entries)
            momentum = decay * momentum + estimate
            theta = theta - update.learning_rate * momentum
        found = meerkat.replay(run.directory, record.round + 1).state
        assert found.theta == pytest.approx(theta, rel=1e-4, abs=1e-5)
        assert found.slots["momentum"] == pytest.approx(momentum, rel=1e-4, abs=1e-5)


def test_adam_keeps_its_moments_and_nothing_of_them_is_sent(
    whole: Callable[[str], Whole],
) -> None:
    sgd, adam = whole("sgd"), whole("adam")
    for way in ("up", "down"):
        figure = f"bytes_{way}_per_client_round"
        assert sgd.summary[figure] == adam.summary[figure]
    slots = meerkat.replay(adam.directory).state.slots
    assert set(slots) == {"first", "second", "powers"}
    updates = 4 * 2
    assert slots["powers"] == pytest.approx([0.9**updates, 0.99**updates])
    assert (slots["second"] >= 0).all()
    assert slots["first"].any()


@pytest.mark.parametrize("name", ["one-sided", "one-sided-mean"])
def test_one_sided_estimates_send_a_scalar_a_direction(
    whole: Callable[[str], Whole], name: str
) -> None:
    for record in whole(name).records():
        for report in record.reports:
            assert report.perturbations == 3
            assert len(report.scalars) == 3 * report.steps
        for update in record.updates:
            assert [entry.key.perturbation for entry in update.entries] == [0, 1, 2]


@pytest.mark.parametrize(("name", "passes"), [("one-sided", 4), ("one-sided-mean", 3)])
def test_forward_passes_of_a_calibration_are_those_of_the_estimator(
    tiny_recipe_data: dict, tmp_path: Path, name: str, passes: int
) -> None:
    selection = {"kind": "gradip", "calibration_steps": 6}
    recipe = recipe_with(tiny_recipe_data, {**CHOICES[name], "selection": selection})
    summary = meerkat.run(recipe, tmp_path / "run", observers=())
    assert summary["calibration_forward_passes"] == passes * 6 * 3


def test_a_pool_has_no_more_directions_than_its_size(whole: Callable[[str], Whole]) -> None:
    records = whole("pool").records()
    keys = [entry.key for record in records for u in record.updates for entry in u.entries]
    assert {key.client for key in keys} == {POOL}
    assert {key.round for key in keys} <= {0, 1, 2}
    assert len(set(keys)) < len(keys) == 4 * 2


def test_fedkseed_draws_for_each_client_from_one_pool(
    tiny_recipe_data: dict, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    sections = {"algorithm": "fedkseed", "noise": {"keys": {"kind": "pool", "size": 2}}}
    recipe, out = recipe_with(tiny_recipe_data, sections), tmp_path / "run"
    summary = meerkat.run(recipe, out, observers=())
    for record in Whole(out, summary, ()).records():
        for step, update in enumerate(record.updates):
            keys = [entry.key for entry in update.entries]
            # Three clients, two directions: those of one key were added up.
            assert len(set(keys)) == len(keys) <= 2
            total = sum(entry.coefficient for entry in update.entries)
            mean = np.mean([report.scalars[step] for report in record.reports])
            assert total == pytest.approx(mean, rel=1e-6)
    # By default the pool has 4096.
    records = whole("fedkseed").records()
    keys = {entry.key for r in records for u in r.updates for entry in u.entries}
    assert max(key.round for key in keys) > 100
    assert len(keys) > 20


def test_what_a_client_clips_is_what_it_reports(whole: Callable[[str], Whole]) -> None:
    free, clipped = whole("sgd").records()[0], whole("clip").records()[0]
    largest = max(abs(scalar) for report in free.reports for scalar in report.scalars)
    assert largest > 2 * BOUND
    for before, after in zip(free.reports, clipped.reports, strict=True):
        # All clients are at the same θ in the first step alone.
        clip = np.clip(before.scalars[0], -BOUND, BOUND)
        assert after.scalars[0] == pytest.approx(clip, rel=1e-3)
        assert max(map(abs, after.scalars)) <= BOUND


# Choices that do not fit


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"algorithm": "fedavg"},
            r"algorithm = 'fedavg' is not known; known are feddyn, fedkseed, meerkat",
        ),
        (
            {"algorithm": {"kind": "feddyn", "alpha": 0.0}},
            r"'feddyn': alpha = 0\.0 is not pos",
        ),
        (
            {"algorithm": "feddyn", "optimizer": {"rule": "adam"}},
            r"algorithm = 'feddyn' goes with optimizer\.rule = 'sgd' alone",
        ),
        (
            {"algorithm": "feddyn", "subspace": {"renew_every": 5}},
            r"algorithm = 'feddyn' goes with subspace\.renew_every = 0 alone",
        ),
        (
            {"algorithm": "feddyn", "optimizer": {"estimator": "forward-mode"}},
            r"algorithm = 'feddyn' needs losses .* 'forward-mode' takes derivatives",
        ),
        (
            {"algorithm": "feddyn", "runtime": {"engine": "flower"}},
            r"algorithm = 'feddyn' has clients that carry .* where runtime\.engine = 'local'",
        ),
        (
            {"optimizer": {"rule": "hiso", "estimator": "backward"}, "subspace": {}},
            r"optimizer\.rule = 'hiso' moves along directions of its own, and an exact report",
        ),
        (
            {"optimizer": {"rule": "hiso"}, "selection": {"kind": "gradip", "signal": "gradip"}},
            r"optimizer\.rule = 'hiso' moves .* set selection\.signal = 'projected-gradient'",
        ),
        ({"optimizer": {"rule": "adamw"}}, r"optimizer\.rule = 'adamw' is not known; .*momentum"),
        (
            {"optimizer": {"rule": {"kind": "momentum", "decay": 1.5}}},
            r"optimizer\.rule = 'momentum': decay = 1\.5 is not in \[0, 1\)",
        ),
        (
            {"optimizer": {"rule": {"kind": "momentum", "nesterov": True}}},
            r"optimizer\.rule = 'momentum': nesterov is not one of its options; known are decay",
        ),
        (
            {"optimizer": {"estimator": "one-sided-mean"}},
            r"optimizer\.estimator = 'one-sided-mean' needs at least 2 directions, .*raise it",
        ),
        ({"noise": {"keys": {"kind": "pool", "size": 0}}}, r"noise\.keys = 'pool': size = 0"),
        ({"federation": {"transforms": ["clip"]}}, r"federation\.transforms = 'clip': .*bound"),
        ({"federation": {"aggregator": "krum"}}, r"federation\.aggregator = 'krum' .*mean"),
    ],
    ids=str,
)
def test_choices_that_do_not_fit_are_named_before_anything_is_loaded(
    tiny_recipe_data: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: Sections,
    message: str,
) -> None:
    def loaded(*arguments: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("meerkat.runs.assembly.load_model", loaded)
    with pytest.raises(RecipeError, match=message) as caught:
        meerkat.run(recipe_with(tiny_recipe_data, sections), tmp_path / "run", observers=())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
