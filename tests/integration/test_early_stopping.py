"""Whole runs that stop clients early: who, from when on, on which data, after any interruption."""

from __future__ import annotations

import functools
import itertools
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import merged

import meerkat
from meerkat.config import parse_recipe
from meerkat.data.batch_order import batch_indices
from meerkat.engines.base import Assignment, Outcome
from meerkat.engines.local import LocalEngine
from meerkat.errors import DivergedError, JournalError, ProtocolError, RecipeError
from meerkat.federation.client import Client
from meerkat.federation.messages import CALIBRATION, DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.federation.rounds import RoundRecord
from meerkat.federation.selection import Decision
from meerkat.journal import Journal
from meerkat.models.loading import LoadedModel, load_model
from meerkat.runs import assembly
from meerkat.runs.directory import mask_of
from meerkat.runs.driver import restore_state
from meerkat.zo.directions import PerturbationStream
from meerkat.zo.estimators import Estimate

CLIENTS, STEPS, T_CALI = 4, 4, 12
EVERYBODY = {"rho_later": 0.0, "rho_quiet": 0.0, "sigma": 1e9}
NOBODY = {"rho_quiet": 1.0}


@functools.cache
def loaded_once(section: Any, runtime: Any) -> LoadedModel:
    """A run leaves its model as it was; see test_training.py."""
    return load_model(section, runtime)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is loaded once."""
    monkeypatch.setattr(assembly, "load_model", loaded_once)


def slopes(self: Any, losses_at: Any, directions: Sequence[np.ndarray], epsilon: float) -> Estimate:
    """Coefficients without a model, which depend on θ, z and the examples."""
    weight = sum(sum(example.prompt) for example in losses_at.batch) % 101
    theta = losses_at.theta[:20]
    found = (float(theta @ z[:20]) + weight / 101 * float(z[0]) for z in directions)
    return Estimate(tuple(found), 0.7)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward passes but those of the evaluation."""
    monkeypatch.setattr("meerkat.zo.estimators.two_point.TwoPoint.estimate", slopes)


class Wire:
    """What goes over the wire in all runs of a test, where it may be changed or cut."""

    def __init__(self) -> None:
        self.calls = 0
        self.cut_at: int | None = None
        self.plans: list[dict[int, RoundPlan]] = []
        """Those that were answered."""
        self.round = 0
        """The round to come, as far as plans tell."""
        self.here: Callable[[], Collection[int]] | None = None
        self.change: Callable[[ClientReport], ClientReport | None] = lambda report: report

    @property
    def calibrations(self) -> list[dict[int, RoundPlan]]:
        return [plans for plans in self.plans if is_calibration(plans)]

    @property
    def rounds(self) -> list[dict[int, RoundPlan]]:
        return [plans for plans in self.plans if not is_calibration(plans)]

    def asked(self) -> list[dict[int, int]]:
        """Steps of each client by round."""
        return [{client: plan.steps for client, plan in plans.items()} for plans in self.rounds]

    def calibrated(self) -> Counter[int]:
        """How often each client was calibrated."""
        return Counter(client for plans in self.calibrations for client in plans)


def is_calibration(plans: Mapping[int, RoundPlan]) -> bool:
    return {plan.round for plan in plans.values()} == {CALIBRATION}


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire, run, present = Wire(), LocalEngine.run, LocalEngine.present

    def watched(self: LocalEngine, assignment: Assignment) -> Outcome:
        plans = assignment.plans
        wire.calls += 1
        if wire.calls == wire.cut_at:
            raise KeyboardInterrupt
        outcome = run(self, assignment)
        wire.plans.append(dict(plans))
        if not is_calibration(plans):
            wire.round = next(iter(plans.values())).round + 1
        changed = [wire.change(report) for report in outcome.reports]
        return replace(outcome, reports=tuple(r for r in changed if r is not None))

    def here(self: LocalEngine) -> Collection[int]:
        return present(self) if wire.here is None else wire.here()

    monkeypatch.setattr(LocalEngine, "run", watched)
    monkeypatch.setattr(LocalEngine, "present", here)
    return wire


def fading(*clients: int, but: float = 0.0) -> Callable[[ClientReport], ClientReport]:
    """Calibrations that are loud all along, and those of some clients that fade half-way.

    Args:
        but: Share of the later half that stays loud.
    """

    def change(report: ClientReport) -> ClientReport:
        if report.round != CALIBRATION and report.steps != T_CALI:
            return report
        return shaped(report, 0.01 if report.client in clients else 1.0, but)

    return change


def shaped(report: ClientReport, factor: float, but: float = 0.0) -> ClientReport:
    """A report of scalars between 0.5 and 1.5 in size, of which the later half has a factor."""
    generator = np.random.default_rng([report.client, report.round])
    count = len(report.scalars)
    scalars = generator.uniform(0.5, 1.5, count) * generator.choice([-1, 1], count)
    scalars[count - round((1 - but) * count / 2) :] *= factor
    return replace(report, scalars=tuple(scalars.astype(np.float32).tolist()))


def recipe_with(data: dict[str, Any], **sections: dict[str, Any]) -> meerkat.Recipe:
    federation = {"clients": CLIENTS, "rounds": 4, "local_steps": STEPS, "batch_size": 2}
    common = merged(
        {**data, "federation": federation},
        evaluation={"examples": 4},
        selection={"kind": "none"},
    )
    if sections.get("selection", {}).get("kind") == "gradip":
        windows = {"calibration_steps": T_CALI, "first_window": 4, "later_window": 4}
        common = merged(common, selection=windows)
    return parse_recipe(merged(common, **sections))


def run(data: dict[str, Any], directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    return meerkat.run(recipe_with(data, **sections), directory, observers=())


def resume(directory: Path, recover: bool = False) -> dict[str, Any]:
    return meerkat.resume(directory, recover=recover, observers=())


def gradip(**fields: Any) -> dict[str, Any]:
    return {"kind": "gradip", **fields}


def journal_of(directory: Path) -> closing[Journal]:
    return closing(Journal.open(directory / "journal.sqlite"))


def decisions(directory: Path) -> list[Decision]:
    with journal_of(directory) as journal:
        return journal.decisions()


def records(directory: Path) -> list[RoundRecord]:
    with journal_of(directory) as journal:
        return [record for record, _ in journal.records()]


def aggregated(record: RoundRecord) -> list[tuple[int, float]]:
    """Step and coefficient of each entry of a round's updates."""
    entries = [entry for update in record.updates for entry in update.entries]
    return [(entry.key.step, entry.coefficient) for entry in entries]


def content(directory: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that a journal holds but how long it took."""
    tables = {
        "rounds": "round, updates, digest, chain",
        "reports": "round, client, payload",
        "calibrations": "client, payload, seal",
        "decisions": "made, content, seal",
    }
    with closing(sqlite3.connect(directory / "journal.sqlite")) as connection:
        return {
            table: connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()
            for table, columns in tables.items()
        }


def execute(directory: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(directory / "journal.sqlite")) as connection, connection:
        assert connection.execute(statement, values).rowcount == 1


# Who is stopped, and from when on


@pytest.mark.slow
@pytest.mark.parametrize("federation", [{}, {"clients_per_round": 3}], ids=str)
def test_a_calibration_that_flags_nobody_leaves_no_trace(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, federation: dict[str, Any]
) -> None:
    """It is discarded: every plan of every round is that of a run without it."""
    plain = run(tiny_recipe_data, tmp_path / "none", federation=federation)
    expected, wire.plans = wire.plans, []
    assert decisions(tmp_path / "none") == []
    judged = run(
        tiny_recipe_data, tmp_path / "vp", federation=federation, selection=gradip(**NOBODY)
    )
    assert wire.calibrated() == dict.fromkeys(range(CLIENTS), 1)
    sizes = [len(plans) for plans in wire.calibrations]
    assert sizes == ([3, 1] if federation else [4])
    assert {p.steps for plans in wire.calibrations for p in plans.values()} == {T_CALI}
    assert wire.rounds == expected
    assert judged["state_digest"] == plain["state_digest"]
    (decision,) = decisions(tmp_path / "vp")
    assert decision.flagged == ()
    assert [verdict.client for verdict in decision.verdicts] == list(range(CLIENTS))


def test_flagged_clients_take_one_step_from_round_0(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    wire.change = fading(1, 3)
    summary = run(tiny_recipe_data, tmp_path / "run", selection=gradip())
    (decision,) = decisions(tmp_path / "run")
    assert decision.flagged == (1, 3)
    assert decision.round == 0
    assert wire.asked() == [{0: STEPS, 1: 1, 2: STEPS, 3: 1}] * 4
    for record in records(tmp_path / "run"):
        assert [report.steps for report in record.reports] == [STEPS, 1, STEPS, 1]
    assert summary["state_digest"] == meerkat.replay(tmp_path / "run").digest
    plain = run(tiny_recipe_data, tmp_path / "none")
    assert plain["state_digest"] != summary["state_digest"]


def test_everybody_may_be_stopped(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    run(tiny_recipe_data, tmp_path / "run", selection=gradip(**EVERYBODY))
    assert wire.asked() == [dict.fromkeys(range(CLIENTS), 1)] * 4
    assert [step for step, _ in aggregated(records(tmp_path / "run")[0])] == [0]


def test_taper_keeps_the_steps_of_the_verdict(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    """Client 2 is loud in a fourth of its later window, client 0 nowhere there."""
    halves = fading(0), fading(2, but=0.5)
    wire.change = lambda report: halves[report.client == 2](report)
    chosen = gradip(action="taper", rho_later=1.0, rho_quiet=0.5, sigma=0.1, later_window=4)
    run(tiny_recipe_data, tmp_path / "run", selection=chosen, federation={"local_steps": 8})
    (decision,) = decisions(tmp_path / "run")
    assert decision.flagged == (0, 2)
    steps = {verdict.client: verdict.steps for verdict in decision.verdicts}
    assert steps == {0: 1, 1: 8, 2: 4, 3: 8}
    assert wire.asked() == [steps] * 4


def test_a_calibration_that_is_kept_is_round_0(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    """Of every client, also where a round asks fewer of them."""
    wire.change = fading(2)
    summary = run(
        tiny_recipe_data,
        tmp_path / "run",
        selection=gradip(apply=True),
        federation={"clients_per_round": 3, "rounds": 8},
    )
    assert wire.calibrations == []
    assert wire.asked()[0] == dict.fromkeys(range(CLIENTS), T_CALI)
    (decision,) = decisions(tmp_path / "run")
    assert (decision.round, decision.flagged) == (1, (2,))
    first, *later = records(tmp_path / "run")
    assert [step for step, _ in aggregated(first)] == list(range(T_CALI))
    means = np.mean([report.scalars for report in first.reports], axis=0)
    assert [mean for _, mean in aggregated(first)] == pytest.approx(means)
    start, after = (meerkat.replay(tmp_path / "run", number) for number in (0, 1))
    assert after.digest == first.state_digest != start.digest
    assert {len(plans) for plans in wire.rounds[1:]} == {3}
    taken = dict.fromkeys(range(CLIENTS), T_CALI)
    for plans in wire.rounds[1:]:
        for client, plan in plans.items():
            assert plan.first_step == taken[client]
            assert plan.steps == (1 if client == 2 else STEPS)
            taken[client] += plan.steps
    assert any(2 in plans for plans in wire.rounds[1:])
    assert {tuple(r.client for r in record.reports) for record in later} != {(0, 1, 3)}
    assert summary["state_digest"] == meerkat.replay(tmp_path / "run").digest


def test_random_clients_follow_the_seed(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    stopped = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8), ("d", 9), ("e", 10)):
        run(
            {**tiny_recipe_data, "seed": seed},
            tmp_path / name,
            selection={"kind": "random", "count": 3},
            federation={"clients": 8, "rounds": 2},
        )
        (decision,) = decisions(tmp_path / name)
        stopped[name] = decision.flagged
        steps = {client: 1 if client in decision.flagged else STEPS for client in range(8)}
        assert wire.asked()[-2:] == [steps] * 2
    assert {len(flagged) for flagged in stopped.values()} == {3}
    assert stopped["a"] == stopped["b"]
    assert len(set(stopped.values())) >= 3
    assert wire.calibrations == []


def test_listed_clients_are_stopped(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    run(tiny_recipe_data, tmp_path / "run", selection={"kind": "list", "clients": [3, 0]})
    (decision,) = decisions(tmp_path / "run")
    assert decision.flagged == (0, 3)
    assert wire.asked() == [{0: 1, 1: STEPS, 2: STEPS, 3: 1}] * 4


def test_a_selection_that_finds_a_set_equals_a_list_of_it(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    """The calibration leaves nothing but its verdict."""
    wire.change = fading(1, 3)
    found = run(tiny_recipe_data, tmp_path / "vp", selection=gradip())
    listed = {"kind": "list", "clients": [1, 3]}
    given = run(tiny_recipe_data, tmp_path / "list", selection=listed)
    assert given["state_digest"] == found["state_digest"]


# What clients are judged by


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["gradip", "projected-gradient"])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"noise": {"directions": "per-client"}},
        {"noise": {"perturbations": 2}},
        {"noise": {"directions": "per-client", "perturbations": 2, "kind": "rademacher"}},
        {"federation": {"clients_per_round": 2, "weighting": "examples"}},
    ],
    ids=str,
)
def test_verdicts_follow_from_the_reports(
    tiny_recipe_data: dict, tmp_path: Path, signal: str, sections: dict[str, Any]
) -> None:
    """ρ of every client by the formulas of method.md section 5; and the run is replayed."""
    chosen = gradip(signal=signal, rho_later=1.0, rho_quiet=0.2, sigma=0.2)
    few = {**sections, "federation": {"rounds": 2, **sections.get("federation", {})}}
    summary = run(tiny_recipe_data, tmp_path / "run", selection=chosen, **few)
    assert summary["state_digest"] == meerkat.replay(tmp_path / "run").digest
    assert resume(tmp_path / "run")["state_digest"] == summary["state_digest"]
    with journal_of(tmp_path / "run") as journal:
        p = mask_of(tmp_path / "run", journal).gradient
        reports = list(journal.calibrations())
        (decision,) = journal.decisions()
        stream = journal.header.algorithm.stream
    assert p is not None
    assert len(reports) == len(decision.verdicts) == CLIENTS
    for report, verdict in zip(reports, decision.verdicts, strict=True):
        path = np.array([one_step(report, t, signal, p, stream) for t in range(T_CALI)])
        first, later = path[:4], path[-4:]
        assert verdict.rho_later == pytest.approx(first.mean() / later.mean(), rel=1e-9)
        assert verdict.rho_quiet == np.mean(later < 0.2)
        flagged = first.mean() / later.mean() > 1 and np.mean(later < 0.2) > 0.2
        assert verdict.flagged == flagged
        assert verdict.steps == (1 if flagged else STEPS)


def one_step(
    report: ClientReport, step: int, signal: str, p: np.ndarray, stream: PerturbationStream
) -> float:
    count = stream.perturbations
    scalars = np.array(report.scalars[step * count : (step + 1) * count])
    if signal == "projected-gradient":
        return float(np.sqrt((scalars**2).mean()))
    keys = stream.keys(report.round, step, report.client)
    drawn = [stream.z(key).astype(float) for key in keys]
    return abs(sum(g * (p.astype(float) @ z) for g, z in zip(scalars, drawn, strict=True)) / count)


def test_a_mask_without_gradient_has_no_gradip(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    chosen = {"mask": {"kind": "random"}, "selection": gradip(signal="gradip")}
    with pytest.raises(RecipeError, match=r"\Aselection\.signal = 'gradip' [^\n]*random mask.*set"):
        run(tiny_recipe_data, tmp_path / "run", **chosen)
    assert wire.plans == []
    wire.change = fading(1)
    chosen["selection"] = gradip(signal="projected-gradient")
    run(tiny_recipe_data, tmp_path / "other", **chosen)
    assert decisions(tmp_path / "other")[0].flagged == (1,)


# A directory that kept the refused recipe would refuse the corrected one.
def test_a_refused_signal_leaves_no_trace(
    tiny_recipe_data: dict, tmp_path: Path, cheap: None
) -> None:
    mask = {"kind": "random"}
    with pytest.raises(RecipeError, match="signal"):
        run(tiny_recipe_data, tmp_path / "run", mask=mask, selection=gradip(signal="gradip"))
    run(
        tiny_recipe_data,
        tmp_path / "run",
        mask=mask,
        selection=gradip(signal="projected-gradient"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_digest": b"another!"}, "client 2: it started from another state"),
        ({"round": 0}, "client 2: it is for round 0"),
        ({"client": 9}, "client 9: it was not asked"),
        ({"scalars": (1.0,), "steps": 1}, f"client 2: 1 steps .* asked were {T_CALI}"),
        ({"examples": 0}, "client 2: it has no examples"),
        ({"client": 1}, "twice"),
    ],
    ids=str,
)
def test_an_answer_to_another_calibration_is_refused(
    tiny_recipe_data: dict,
    tmp_path: Path,
    wire: Wire,
    cheap: None,
    change: dict[str, Any],
    message: str,
) -> None:
    wire.change = lambda report: replace(report, **change) if report.client == 2 else report
    with pytest.raises(ProtocolError, match=message):
        run(tiny_recipe_data, tmp_path / "run", selection=gradip())
    with journal_of(tmp_path / "run") as journal:
        assert journal.calibrated() == set()
        assert journal.decisions() == []
    wire.change = lambda report: report
    resume(tmp_path / "run")
    assert len(decisions(tmp_path / "run")) == 1


def test_divergence_in_a_calibration(tiny_recipe_data: dict, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"\Acalibration: .*lower optimizer.learning_rate"):
        run(
            tiny_recipe_data,
            tmp_path / "run",
            selection=gradip(),
            optimizer={"learning_rate": 1e30},
        )


# Clients that come late


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("fades", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_a_late_client_is_calibrated_when_it_comes(
    tiny_recipe_data: dict,
    tmp_path: Path,
    wire: Wire,
    cheap: None,
    apply: bool,
    fades: bool,
    cut: bool,
) -> None:
    """Client 2 is there from round 2 on; where the run is cut, that is when it was calibrated."""
    wire.change = fading(1, 2) if fades else fading(1)
    wire.here = lambda: range(CLIENTS) if wire.round >= 2 else (0, 1, 3)
    calibrated_before = 0 if apply else 1
    if cut:
        wire.cut_at = calibrated_before + 2 + 1 + 1
        with pytest.raises(KeyboardInterrupt):
            run(tiny_recipe_data, tmp_path / "run", selection=gradip(apply=apply))
        assert wire.calibrated()[2] == 1
        assert wire.round == 2
        resume(tmp_path / "run")
    else:
        run(tiny_recipe_data, tmp_path / "run", selection=gradip(apply=apply))
    early = [] if apply else [{0, 1, 3}]
    assert [set(plans) for plans in wire.calibrations] == [*early, {2}]
    assert [set(asked) for asked in wire.asked()] == [{0, 1, 3}] * 2 + [set(range(CLIENTS))] * 2
    first, second = decisions(tmp_path / "run")
    assert (first.round, first.flagged) == (int(apply), (1,))
    assert [verdict.client for verdict in first.verdicts] == [0, 1, 3]
    assert (second.round, second.flagged) == (2, (1, 2) if fades else (1,))
    assert [verdict.client for verdict in second.verdicts] == [0, 1, 2, 3]
    steps = {0: STEPS, 1: 1, 2: 1 if fades else STEPS, 3: STEPS}
    assert wire.asked()[2:] == [steps] * 2
    plan = wire.calibrations[-1][2]
    assert (plan.steps, plan.first_step, plan.updates) == (T_CALI, 0, ())
    assert wire.rounds[2][2].first_step == 0
    with journal_of(tmp_path / "run") as journal:
        report = next(r for r in journal.calibrations() if r.client == 2)
        start = journal.header.algorithm.init(journal.theta0).digest
        assert report.state_digest == bytes.fromhex(start)[:DIGEST_BYTES]
        assert start != meerkat.replay(tmp_path / "run", 2).digest


def test_a_client_that_does_not_answer_is_asked_again(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    shape = fading(1)
    wire.change = lambda report: None if report.client == 1 and not wire.rounds else shape(report)
    run(tiny_recipe_data, tmp_path / "run", selection=gradip())
    assert [set(plans) for plans in wire.calibrations] == [set(range(CLIENTS)), {1}]
    assert [d.round for d in decisions(tmp_path / "run")] == [0, 1]
    assert [d.flagged for d in decisions(tmp_path / "run")] == [(), (1,)]
    assert [asked[1] for asked in wire.asked()] == [STEPS, 1, 1, 1]


# Judged again

EVERY = {"rounds": 10, "local_steps": 8}
AGAIN = gradip(every=3, calibration_steps=16, first_window=6, later_window=6)


def fading_for_a_while(report: ClientReport, last: int = 5) -> ClientReport:
    """Client 1 is like the others at first, fades from round 1 on, and wakes up at last."""
    if report.client != 1 or report.round in (0, CALIBRATION):
        return shaped(report, 1.0)
    return shaped(report, 0.01 if report.round <= last else 3.0)


def fading_always(report: ClientReport) -> ClientReport:
    return shaped(report, 0.01 if report.client == 1 else 1.0)


def test_a_client_is_caught_and_released(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    """The two rounds before each third one are the window: there all clients take all steps."""
    wire.change = fading_for_a_while
    run(tiny_recipe_data, tmp_path / "run", selection=AGAIN, federation=EVERY)
    assert wire.calibrated() == dict.fromkeys(range(CLIENTS), 1)
    made = decisions(tmp_path / "run")
    assert [(d.round, d.source, d.flagged) for d in made] == [
        (0, "calibration", ()),
        (3, "rounds", (1,)),
        (6, "rounds", (1,)),
        (9, "rounds", ()),
    ]
    for decision in made:
        assert {(v.source, v.judged) for v in decision.verdicts} == {
            (decision.source, decision.round)
        }
    assert [asked[1] for asked in wire.asked()] == [8, 8, 8, 1, 8, 8, 1, 8, 8, 8]
    assert all(asked[k] == 8 for asked in wire.asked() for k in (0, 2, 3))
    for record in records(tmp_path / "run"):
        assert len(aggregated(record)) == 8
        counted = 1 if 3 <= record.round < 9 else 8
        for step, coefficient in aggregated(record):
            scalars = [
                report.scalars[step]
                for report in record.reports
                if report.client != 1 or step < counted
            ]
            assert coefficient == pytest.approx(math.fsum(scalars) / CLIENTS, rel=1e-12)


def test_judged_again_by_the_rounds_of_the_window_alone(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    """Loud in the window, whatever it does elsewhere; steps of all rounds side by side."""
    wire.change = lambda report: (
        fading_always(report) if report.round in (0, 3, 6, 9) else shaped(report, 1.0)
    )
    run(tiny_recipe_data, tmp_path / "run", selection=AGAIN, federation=EVERY)
    assert [d.flagged for d in decisions(tmp_path / "run")] == [()] * 4
    scalars = {(r.client, r.round): r.scalars for x in records(tmp_path / "run") for r in x.reports}
    for decision in decisions(tmp_path / "run")[1:]:
        for verdict in decision.verdicts:
            pair = [scalars[verdict.client, decision.round - back] for back in (2, 1)]
            path = np.abs(np.array(pair, float)).T.ravel()
            assert verdict.rho_later == pytest.approx(path[:6].mean() / path[-6:].mean())


def test_clients_that_were_seldom_sampled_keep_their_verdict(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    wire.change = fading_always
    run(
        tiny_recipe_data,
        tmp_path / "run",
        selection=AGAIN,
        federation={**EVERY, "clients_per_round": 1},
    )
    made = decisions(tmp_path / "run")
    assert [d.round for d in made] == [0, 3, 6, 9]
    assert made[0].flagged == (1,)
    for before, after in itertools.pairwise(made):
        asked = {client for plans in wire.rounds[after.round - 2 : after.round] for client in plans}
        olds = {verdict.client: verdict for verdict in before.verdicts}
        for verdict in after.verdicts:
            fresh = (verdict.source, verdict.judged) == ("rounds", after.round)
            assert fresh == (verdict.client in asked)
            assert fresh or verdict == olds[verdict.client]


def test_a_late_client_does_not_undo_what_rounds_showed(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    """Client 1 looks harmless in its calibration, is caught in round 3; client 2 comes in 4."""
    wire.change = fading_for_a_while
    wire.here = lambda: range(CLIENTS) if wire.round >= 4 else (0, 1, 3)
    run(tiny_recipe_data, tmp_path / "run", selection=AGAIN, federation={**EVERY, "rounds": 6})
    made = decisions(tmp_path / "run")
    assert [(d.round, d.source, d.flagged) for d in made] == [
        (0, "calibration", ()),
        (3, "rounds", (1,)),
        (4, "calibration", (1,)),
    ]
    before, after = ({v.client: v for v in d.verdicts} for d in made[1:])
    assert {client: after[client] for client in before} == before
    assert (after[2].source, after[2].judged) == ("calibration", 4)


# Round 6 would be the next selection, and the run ends before it.
def test_no_window_without_a_selection_after_it(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    wire.change = fading_always
    chosen = gradip(every=3, calibration_steps=8, first_window=4, later_window=4)
    run(tiny_recipe_data, tmp_path / "run", selection=chosen, federation={"rounds": 6})
    assert [d.round for d in decisions(tmp_path / "run")] == [0, 3]
    assert [asked[1] for asked in wire.asked()] == [1, STEPS, STEPS, 1, 1, 1]


# Interruptions

SELECTIONS: dict[str, dict[str, Any]] = {
    "stop": {"selection": gradip()},
    "sampled": {"selection": gradip(), "federation": {"clients_per_round": 3}},
    "apply": {"selection": gradip(apply=True)},
    "taper": {"selection": gradip(action="taper", signal="gradip"), "noise": {"perturbations": 2}},
    "random": {"selection": {"kind": "random", "count": 2}},
    "every": {
        "selection": gradip(every=2, calibration_steps=T_CALI),
        "federation": {"clients_per_round": 3, "rounds": 6},
    },
    "apply-every": {"selection": gradip(apply=True, every=2)},
    # At round 1 no round but the calibration is there to judge.
    "apply-every-round": {"selection": gradip(apply=True, every=1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTIONS)
def test_interrupted_at_any_call_and_resumed(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None, name: str
) -> None:
    """The same journal, byte for byte, and nobody is calibrated twice."""
    sections = SELECTIONS[name]
    wire.change = fading(1)
    whole = run(tiny_recipe_data, tmp_path / "whole", **sections)
    expected, calls, once = content(tmp_path / "whole"), wire.calls, wire.calibrated()
    plans = wire.plans
    assert set(once.values()) <= {1}
    for number in range(1, calls + 1):
        wire.calls, wire.cut_at, wire.plans = 0, number, []
        out = tmp_path / f"cut-{number}"
        with pytest.raises(KeyboardInterrupt):
            run(tiny_recipe_data, out, **sections)
        assert len(wire.plans) == number - 1
        assert resume(out)["state_digest"] == whole["state_digest"]
        assert wire.plans == plans
        assert content(out) == expected
        assert meerkat.replay(out).digest == whole["state_digest"]


@pytest.mark.parametrize("name", ["sampled", "every"])
@pytest.mark.parametrize("written", [False, True])
def test_interrupted_at_every_write_and_resumed(
    tiny_recipe_data: dict,
    tmp_path: Path,
    wire: Wire,
    cheap: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    written: bool,
) -> None:
    """Each process writes one thing, and is cut right after it, or in place of the next."""
    sections, out = SELECTIONS[name], tmp_path / "run"
    wire.change = fading(1)
    whole = run(tiny_recipe_data, tmp_path / "whole", **sections)
    writes: list[str] = []

    def cut(name: str) -> None:
        original = getattr(Journal, name)

        def write(self: Journal, *arguments: Any) -> None:
            if not written and writes:
                raise KeyboardInterrupt
            original(self, *arguments)
            writes.append(name)
            if written:
                raise KeyboardInterrupt

        monkeypatch.setattr(Journal, name, write)

    for method in ("append_round", "append_evaluation", "append_calibrations", "append_decision"):
        cut(method)
    seen: list[str] = []
    start = functools.partial(run, tiny_recipe_data, out, **sections)
    while True:
        try:
            start()
            break
        except KeyboardInterrupt:
            seen += writes
            writes.clear()
            start = functools.partial(resume, out)
    expected = content(tmp_path / "whole")
    assert content(out) == expected
    assert Counter(seen + writes)["append_decision"] == len(expected["decisions"])
    assert Counter(seen + writes)["append_round"] == len(expected["rounds"])
    assert meerkat.replay(out).digest == whole["state_digest"]


@pytest.mark.slow
def test_caught_and_released_with_a_cut_before_each_round(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    wire.change = fading_for_a_while
    whole = run(tiny_recipe_data, tmp_path / "whole", selection=AGAIN, federation=EVERY)
    wire.calls, out = 0, tmp_path / "cut"
    wire.cut_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(tiny_recipe_data, out, selection=AGAIN, federation=EVERY)
    for _ in range(9):
        wire.calls, wire.cut_at = 0, 2
        with pytest.raises(KeyboardInterrupt):
            resume(out)
    wire.cut_at = None
    assert resume(out)["state_digest"] == whole["state_digest"]
    assert content(out) == content(tmp_path / "whole")


# The batch order


@pytest.mark.parametrize("chosen", [{}, {"apply": True}, {"every": 6}], ids=str)
def test_stopping_early_hides_no_data(
    tiny_recipe_data: dict,
    tmp_path: Path,
    wire: Wire,
    cheap: None,
    monkeypatch: pytest.MonkeyPatch,
    chosen: dict[str, Any],
) -> None:
    """Every example comes once before any comes again, over rounds and over an interruption."""
    batches: list[tuple[int, int]] = []
    batch = Client.batch

    def watched(self: Client, step: int) -> list[Any]:
        batches.append((self.number, step))
        return batch(self, step)

    monkeypatch.setattr(Client, "batch", watched)
    sections: dict[str, dict[str, Any]] = {
        "task": {"train_examples": 24},
        "federation": {"rounds": 14, "clients": 3, "local_steps": 3},
        "selection": gradip(**chosen),
    }
    wire.change = fading_always
    wire.cut_at = 7
    with pytest.raises(KeyboardInterrupt):
        run(tiny_recipe_data, tmp_path / "run", **sections)
    resume(tmp_path / "run")
    used: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for plans in wire.rounds:
        for client, plan in plans.items():
            used[client] += range(plan.first_step, plan.first_step + plan.steps)
    calibrated = [(k, t) for plans in wire.calibrations for k in plans for t in range(T_CALI)]
    assert Counter(batches) == Counter(calibrated) + Counter(
        (client, step) for client, steps in used.items() for step in steps
    )
    with journal_of(tmp_path / "run") as journal:
        state, _ = restore_state(journal, 3, 3)
    for client, steps in used.items():
        assert steps == list(range(len(steps)))
        assert state.steps_taken[client] == len(steps)
        indices = [i for step in steps for i in batch_indices(7, client, 8, 2, step)]
        epochs = [indices[begin : begin + 8] for begin in range(0, len(indices) - 7, 8)]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len(used[1]) < len(used[0]) == len(used[2])


# Damage


def interrupted(
    data: dict[str, Any], tmp_path: Path, wire: Wire, call: int, **sections: Any
) -> str:
    """Leaves a run that was cut at this call, and a whole one; θ's digest of the whole one."""
    whole = run(data, tmp_path / "whole", **sections)
    wire.calls, wire.cut_at, wire.plans = 0, call, []
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "run", **sections)
    return str(whole["state_digest"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "again"),
    [
        ("UPDATE calibrations SET payload = zeroblob(length(payload)) WHERE client = 2", {2: 1}),
        ("UPDATE calibrations SET payload = x'00' WHERE client = 2", {2: 1}),
        ("UPDATE calibrations SET seal = zeroblob(32) WHERE client = 1", {1: 1}),
        ("UPDATE decisions SET content = zeroblob(length(content))", {}),
        ("UPDATE decisions SET content = replace(content, 'true', 'false')", {}),
        ("UPDATE decisions SET seal = zeroblob(32)", {}),
    ],
)
def test_damage_of_a_selection_is_found_and_made_good(
    tiny_recipe_data: dict,
    tmp_path: Path,
    wire: Wire,
    cheap: None,
    statement: str,
    again: dict[int, int],
) -> None:
    """Two rounds are there, which are kept; what is damaged is done again with the same outcome."""
    wire.change = fading(1)
    expected = interrupted(tiny_recipe_data, tmp_path, wire, 4, selection=gradip())
    out = tmp_path / "run"
    execute(out, statement)
    with pytest.raises(JournalError, match=r"\A[^\n]* damaged after 2 good rounds[^\n]*\Z"):
        Journal.open(out / "journal.sqlite")
    with pytest.raises(JournalError, match="--recover"):
        resume(out)
    wire.plans = []
    assert resume(out, recover=True)["state_digest"] == expected
    assert wire.calibrated() == again
    assert len(wire.rounds) == 2
    ours, theirs = content(out), content(tmp_path / "whole")
    for table in ("rounds", "reports", "calibrations"):
        assert ours[table] == theirs[table]
    assert decisions(out)[-1].flagged == (1,)
    assert (out / "journal.sqlite.damaged").exists()


def test_a_recovered_journal_lacks_what_was_damaged(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    run(tiny_recipe_data, tmp_path / "run", selection=gradip())
    path = tmp_path / "run" / "journal.sqlite"
    before = content(tmp_path / "run")
    execute(tmp_path / "run", "UPDATE calibrations SET payload = x'01' WHERE client = 3")
    execute(tmp_path / "run", "UPDATE decisions SET content = x'02'")
    with closing(Journal.recover(path)) as journal:
        assert journal.calibrated() == {0, 1, 2}
        assert journal.decisions() == []
        assert journal.rounds == 4
    after = content(tmp_path / "run")
    assert after["calibrations"] == before["calibrations"][:3]
    assert after["rounds"] == before["rounds"]


@pytest.mark.slow
def test_rounds_that_are_lost_take_their_decisions_along(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    """Round 4 is damaged: the selections of rounds 0 and 3 stay, that of round 6 is made again."""
    wire.change = functools.partial(fading_for_a_while, last=2)
    sections = {"selection": AGAIN, "federation": EVERY}
    expected = interrupted(tiny_recipe_data, tmp_path, wire, 9, **sections)
    out = tmp_path / "run"
    assert [(d.round, d.flagged) for d in decisions(out)] == [(0, ()), (3, (1,)), (6, ())]
    execute(out, "UPDATE rounds SET digest = 'x' WHERE round = 4")
    assert resume(out, recover=True)["state_digest"] == expected
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_damaged_selection_by_rounds_is_made_again(
    tiny_recipe_data: dict, tmp_path: Path, wire: Wire, cheap: None
) -> None:
    """Cut before round 5; the selection of round 3, which caught client 1, is damaged."""
    wire.change = fading_for_a_while
    sections = {"selection": AGAIN, "federation": EVERY}
    expected = interrupted(tiny_recipe_data, tmp_path, wire, 7, **sections)
    out = tmp_path / "run"
    assert [d.round for d in decisions(out)] == [0, 3]
    assert wire.round == 5
    execute(out, "UPDATE decisions SET seal = zeroblob(32) WHERE made = 2")
    assert resume(out, recover=True)["state_digest"] == expected


@pytest.mark.parametrize("tables", [True, False])
def test_a_journal_of_an_older_version(
    tiny_recipe_data: dict, tmp_path: Path, cheap: None, tables: bool
) -> None:
    """The first had no tables for calibrations and decisions."""
    out = tmp_path / "run"
    run(tiny_recipe_data, out)
    path = out / "journal.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        query = "SELECT value FROM header WHERE key = 'header'"
        header = json.loads(connection.execute(query).fetchone()[0])
        header["format"] -= 1
        change = "UPDATE header SET value = ? WHERE key = 'header'"
        connection.execute(change, (json.dumps(header),))
        if not tables:
            connection.execute("DROP TABLE calibrations")
            connection.execute("DROP TABLE decisions")
    before = path.read_bytes()
    for refused in (
        lambda: Journal.open(path),
        lambda: Journal.recover(path),
        lambda: resume(out),
        lambda: meerkat.replay(out),
    ):
        with pytest.raises(JournalError, match=r"\A[^\n]*an older version of meerkat-fl[^\n]*\Z"):
            refused()
    assert path.read_bytes() == before
