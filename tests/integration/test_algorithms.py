"""Whole runs of each update rule, estimator, key scheme, transform and algorithm."""

from __future__ import annotations

import struct
from contextlib import closing
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
from meerkat.runs.events import RunInfo, RunObserver
from meerkat.zo.seed_pool import POOL

Sections = dict[str, Any]

CHOICES: dict[str, Sections] = {
    "sgd": {},
    "momentum": {"optimizer": {"rule": "momentum"}},
    "momentum-0.5": {"optimizer": {"rule": {"kind": "momentum", "decay": 0.5}}},
    "adam": {"optimizer": {"rule": {"kind": "adam", "beta2": 0.99}, "learning_rate": 1e-3}},
    "one-sided": {
        "optimizer": {"estimator": "one-sided"},
        "noise": {"perturbations": 3},
    },
    "one-sided-mean": {
        "optimizer": {"estimator": "one-sided-mean"},
        "noise": {"perturbations": 3},
    },
    "fedkseed": {"algorithm": "fedkseed"},
    "pool": {"noise": {"keys": {"kind": "pool", "size": 3}}},
    "clip": {"federation": {"transforms": [{"kind": "clip", "bound": 0.25}]}},
    "all": {
        "algorithm": "fedkseed",
        "optimizer": {"rule": "adam", "estimator": "one-sided-mean", "learning_rate": 1e-3},
        "noise": {"perturbations": 2, "kind": "rademacher", "keys": {"kind": "pool", "size": 5}},
        "federation": {"transforms": [{"kind": "clip", "bound": 2.0}], "clients_per_round": 2},
    },
}
ALL = pytest.mark.parametrize("sections", CHOICES.values(), ids=CHOICES.keys())


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

    def run_started(self, run: RunInfo) -> None:
        self.stream = run.journal.header.algorithm.stream

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        self.digests.append(record.state_digest)
        if self._until == record.round + 1:
            raise KeyboardInterrupt


@ALL
def test_replay_equals_the_live_state_at_every_round(
    tiny_recipe_data: dict, tmp_path: Path, sections: Sections
) -> None:
    live, out = Live(), tmp_path / "run"
    summary = meerkat.run(recipe_with(tiny_recipe_data, sections), out, observers=[live])
    assert len(set(live.digests)) == 4
    for number, digest in enumerate(live.digests, start=1):
        replayed = meerkat.replay(out, number)
        assert replayed.digest == digest
        assert np.isfinite(replayed.theta).all()
    assert summary["state_digest"] == live.digests[-1]


@ALL
def test_resume_after_an_interruption_gives_the_same_state(
    tiny_recipe_data: dict, tmp_path: Path, sections: Sections
) -> None:
    recipe, out = recipe_with(tiny_recipe_data, sections), tmp_path / "run"
    whole = meerkat.run(recipe, tmp_path / "whole", observers=())
    with pytest.raises(KeyboardInterrupt):
        meerkat.run(recipe, out, observers=[Live(until=1)])
    with pytest.raises(KeyboardInterrupt):
        meerkat.resume(out, observers=[Live(until=3)])
    assert meerkat.resume(out, observers=())["state_digest"] == whole["state_digest"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        {"rule": "sgd", "learning_rate": 0.05},
        {"rule": "momentum", "learning_rate": 0.01},
        {"rule": "adam", "learning_rate": 2e-3},
    ],
    ids=lambda optimizer: optimizer["rule"],
)
def test_training_lowers_the_loss(
    tiny_recipe_data: dict, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    sections = {
        "federation": {"rounds": 60, "local_steps": 1, "partition": {"kind": "iid"}},
        "optimizer": optimizer,
    }
    summary = meerkat.run(recipe_with(tiny_recipe_data, sections), tmp_path / "run", observers=())
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.02


def test_every_choice_changes_what_is_computed(tiny_recipe_data: dict, tmp_path: Path) -> None:
    """And none of them is taken for another: fingerprints and states all differ."""
    names = [name for name in CHOICES if name != "all"]
    recipes = {name: recipe_with(tiny_recipe_data, CHOICES[name]) for name in names}
    assert len({recipe.fingerprint for recipe in recipes.values()}) == len(recipes)
    digests = [
        meerkat.run(recipe, tmp_path / name, observers=())["state_digest"]
        for name, recipe in recipes.items()
    ]
    assert len(set(digests)) == len(digests)


# What differs, as the journal has it


def records_of(data: dict[str, Any], out: Path, sections: Sections) -> list[RoundRecord]:
    meerkat.run(recipe_with(data, sections), out, observers=())
    with closing(open_journal(out)) as journal:
        return [record for record, _ in journal.records()]


def test_momentum_carries_over_rounds(tiny_recipe_data: dict, tmp_path: Path) -> None:
    """θ after each round is that of heavy-ball momentum, worked out here in float64."""
    out, decay = tmp_path / "run", 0.5
    records = records_of(tiny_recipe_data, out, CHOICES["momentum-0.5"])
    with closing(open_journal(out)) as journal:
        theta, stream = journal.theta0.astype(np.float64), journal.header.algorithm.stream
    momentum = np.zeros_like(theta)
    for record in records:
        for update in record.updates:
            estimate = sum(e.coefficient * stream.z(e.key).astype(float) for e in update.entries)
            momentum = decay * momentum + estimate
            theta = theta - update.learning_rate * momentum
        found = meerkat.replay(out, record.round + 1).state
        assert found.theta == pytest.approx(theta, rel=1e-4, abs=1e-6)
        assert found.slots["momentum"] == pytest.approx(momentum, rel=1e-4, abs=1e-6)


def test_adam_keeps_its_moments_and_nothing_of_them_is_sent(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    bytes_sent = []
    for name in ("sgd", "adam"):
        out = tmp_path / name
        summary = meerkat.run(recipe_with(tiny_recipe_data, CHOICES[name]), out, observers=())
        bytes_sent.append([summary[f"bytes_{way}_per_client_round"] for way in ("up", "down")])
    assert bytes_sent[0] == bytes_sent[1]
    slots = meerkat.replay(tmp_path / "adam").state.slots
    assert set(slots) == {"first", "second", "powers"}
    updates = 4 * 2
    assert slots["powers"] == pytest.approx([0.9**updates, 0.99**updates])
    assert (slots["second"] >= 0).all()
    assert slots["first"].any()


@pytest.mark.parametrize(("name", "passes"), [("one-sided", 4), ("one-sided-mean", 3)])
def test_one_sided_estimates_send_a_scalar_a_direction(
    tiny_recipe_data: dict, tmp_path: Path, name: str, passes: int
) -> None:
    selection = {"kind": "gradip", "calibration_steps": 6}
    out = tmp_path / "run"
    records = records_of(tiny_recipe_data, out, {**CHOICES[name], "selection": selection})
    for record in records:
        for report in record.reports:
            assert report.perturbations == 3
            assert len(report.scalars) == 3 * report.steps
        for update in record.updates:
            assert [entry.key.perturbation for entry in update.entries] == [0, 1, 2]
    summary = meerkat.resume(out, observers=())
    assert summary["calibration_forward_passes"] == passes * 6 * 3


def test_a_pool_has_no_more_directions_than_its_size(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    records = records_of(tiny_recipe_data, tmp_path / "run", CHOICES["pool"])
    keys = [entry.key for record in records for u in record.updates for entry in u.entries]
    assert {key.client for key in keys} == {POOL}
    assert {key.round for key in keys} <= {0, 1, 2}
    assert len(set(keys)) < len(keys) == 4 * 2


def test_fedkseed_draws_for_each_client_from_one_pool(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    sections = {"algorithm": "fedkseed", "noise": {"keys": {"kind": "pool", "size": 2}}}
    records = records_of(tiny_recipe_data, tmp_path / "run", sections)
    for record in records:
        for step, update in enumerate(record.updates):
            keys = [entry.key for entry in update.entries]
            # Three clients, two directions: those of one key were added up.
            assert len(set(keys)) == len(keys) <= 2
            total = sum(entry.coefficient for entry in update.entries)
            mean = np.mean([report.scalars[step] for report in record.reports])
            assert total == pytest.approx(mean, rel=1e-6)
    # By default the pool has 4096.
    records = records_of(tiny_recipe_data, tmp_path / "default", CHOICES["fedkseed"])
    keys = {entry.key for r in records for u in r.updates for entry in u.entries}
    assert max(key.round for key in keys) > 100
    assert len(keys) > 20


def test_what_a_client_clips_is_what_it_reports(tiny_recipe_data: dict, tmp_path: Path) -> None:
    free = records_of(tiny_recipe_data, tmp_path / "free", {})[0]
    clipped = records_of(tiny_recipe_data, tmp_path / "clipped", CHOICES["clip"])[0]
    largest = max(abs(scalar) for report in free.reports for scalar in report.scalars)
    assert largest > 0.25
    for before, after in zip(free.reports, clipped.reports, strict=True):
        # All clients are at the same θ in the first step alone.
        assert after.scalars[0] == pytest.approx(np.clip(before.scalars[0], -0.25, 0.25))
        assert max(map(abs, after.scalars)) <= 0.25
        for scalar in after.scalars:
            assert struct.unpack("<f", struct.pack("<f", scalar)) == (scalar,)


# Choices that do not fit


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"algorithm": "fedavg"},
            r"algorithm = 'fedavg' is not known; known are fedkseed, meerkat",
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
        ({"federation": {"aggregator": "median"}}, r"federation\.aggregator = 'median' .*mean"),
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
