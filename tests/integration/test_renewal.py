"""A subspace that is made again in mid-run, in one process, over sessions, and by a calibrator."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import merged
from journals import content
from peers import RemoteRun, loaded_once, local_run, new_process, same_evaluations, slopes
from typer.testing import CliRunner

import meerkat
from meerkat.cli import app
from meerkat.config import parse_recipe
from meerkat.errors import JournalError, MaskError, RecipeError, RunError
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal, origin, replay
from meerkat.journal.records import Renewal, RoundMetrics
from meerkat.node.config import NodeConfig
from meerkat.runs import assembly, driver, remote_run
from meerkat.runs.directory import mask_of
from meerkat.runs.events import RunObserver
from meerkat.runs.renewal import is_due
from meerkat.spaces.mask_file import Mask, load_mask, save_mask
from meerkat.transport.frame import DownFrame
from meerkat.transport.server_frames import Plan, Setup, SpaceFile
from meerkat.zo.estimators.two_point import TwoPoint

ROUNDS, EVERY = 6, 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One model for a test; no forward passes but those of the evaluation."""
    loaded_once.cache_clear()  # sessions that a test left behind may have moved its weights
    monkeypatch.setattr(assembly, "load_model", loaded_once)
    monkeypatch.setattr(TwoPoint, "estimate", slopes)
    monkeypatch.setenv("MEERKAT_CACHE", str(tmp_path / "cache"))
    new_process()
    yield
    new_process()


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any], sentences_file: Path) -> dict[str, Any]:
    section = {"dimensions": 4, "texts": 12, "corpus": str(sentences_file), "renew_every": EVERY}
    return merged(
        tiny_recipe_data,
        federation={"clients": 3, "rounds": ROUNDS},
        subspace=section,
        optimizer={"learning_rate": 0.1, "epsilon": 0.1},
        evaluation={"every": EVERY},
        network={"deadline": 0.5, "rejoin": 0.1, "patience": 1.0},
    )


@pytest.fixture
def out(data: dict[str, Any], tmp_path: Path) -> Path:
    """The run in one process."""
    local_run(parse_recipe(data), tmp_path / "local")
    return tmp_path / "local"


def open_journal(directory: Path) -> Any:
    return closing(Journal.open(directory / "journal.sqlite"))


def masks(directory: Path) -> list[Mask]:
    """That of the start, and those of the renewals."""
    renewed = sorted(directory.glob("mask-*.safetensors"))
    return [load_mask(path) for path in (directory / "mask.safetensors", *renewed)]


def remote_of(data: dict[str, Any], local: Path, out: Path) -> RemoteRun:
    """The same run over sessions; a calibrator has the masks of the run in one process."""
    made = remote_run.load_server_mask(local / "mask.safetensors")
    remote = RemoteRun(parse_recipe(data), out, made)

    def copied(path: Path, mask: Mask, weights: Any) -> None:
        shutil.copy(local / path.name, path)

    remote.make_mask = copied
    return remote


# One process


def test_each_subspace_goes_on_where_the_former_has_led_to(out: Path) -> None:
    first, *renewed = masks(out)
    assert first.subspace is not None
    assert first.subspace.base is None
    with open_journal(out) as journal:
        assert [renewal.round for renewal in journal.renewals()] == [2, 4]
        assert [renewal.space for renewal in journal.renewals()] == [
            mask.fingerprint for mask in renewed
        ]
        former = first
        for mask, round in zip(renewed, (2, 4), strict=True):
            assert mask.subspace is not None
            assert mask.subspace.base is not None
            assert mask.digest == first.digest
            assert mask.fingerprint != former.fingerprint
            reached = former.weights(replay(journal, round).theta)
            assert np.array_equal(mask.subspace.base, reached)
            assert np.array_equal(mask.weights(np.zeros(4, np.float32)), reached)
            assert not np.array_equal(mask.subspace.directions, former.subspace.directions)  # type: ignore[union-attr]
            former = mask


def test_replay_and_export_follow_at_every_round(out: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    with open_journal(out) as journal:
        replay(journal, audit=True)
        assert [origin(journal, round)[0] for round in range(ROUNDS + 1)] == [0, 0, 0, 2, 2, 4, 4]
        for round in range(ROUNDS + 1):
            mask, state = mask_of(out, journal, round), replay(journal, round)
            to = tmp_path / f"delta-{round}"
            meerkat.export(out, to, delta=True, rounds=round)
            assert np.array_equal(load_file(to)["theta"], mask.weights(state.theta))


def test_an_evaluation_is_that_of_the_run(out: Path) -> None:
    with open_journal(out) as journal:
        recorded = {found.round: found.metrics for found in journal.evaluations()}
    assert sorted(recorded) == [0, 2, 4, 6]
    for round, metrics in recorded.items():
        assert meerkat.evaluate(out, rounds=round).metrics == metrics


def test_gradip_takes_the_directions_of_each_subspace(out: Path, tmp_path: Path) -> None:
    found = meerkat.gradip(out, tmp_path / "paths.csv")
    assert not found.calibration
    assert [path.steps for path in found.paths] == [ROUNDS * 2] * 3
    rows = (tmp_path / "paths.csv").read_text().splitlines()[1:]
    with open_journal(out) as journal:
        header, reports = journal.header, {}
        for record, _ in journal.records():
            reports.update({(r.client, record.round): r for r in record.reports})
        for row in rows:
            client, round, step, gradip, *_ = row.split(",")
            p = mask_of(out, journal, int(round) + 1).direction_gradient
            assert p is not None
            (key,) = header.algorithm.stream.keys(int(round), int(step), int(client))
            z = header.algorithm.stream.z(key).astype(np.float64)
            scalar = reports[int(client), int(round)].scalars[int(step)]
            assert float(gradip) == pytest.approx(scalar * float(p.astype(np.float64) @ z))


class _StopAfter(RunObserver):
    """Interrupts a run as Ctrl-C does."""

    def __init__(self, round: int):
        self.round = round

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if record.round == self.round:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("checkpoints", [1, 500], ids=["checkpoints", "none"])
def test_an_interruption_leaves_no_trace(
    data: dict[str, Any],
    out: Path,
    tmp_path: Path,
    after: int,
    checkpoints: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "CHECKPOINT_EVERY", checkpoints)
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        meerkat.run(parse_recipe(data), directory, observers=[_StopAfter(after)])
    meerkat.resume(directory, observers=())
    assert content(directory) == content(out)
    assert [mask.fingerprint for mask in masks(directory)] == [m.fingerprint for m in masks(out)]


def test_a_kill_between_the_mask_and_the_journal_leaves_no_trace(
    data: dict[str, Any], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is there, and is used; one of other weights, or damaged, is made again."""
    append = Journal.append_renewal

    def killed(journal: Journal, renewal: Renewal) -> None:
        monkeypatch.setattr(Journal, "append_renewal", append)
        raise KeyboardInterrupt

    for number, spoil in enumerate(("", "damaged", "of other weights")):
        directory = tmp_path / f"run{number}"
        monkeypatch.setattr(Journal, "append_renewal", killed)
        with pytest.raises(KeyboardInterrupt):
            meerkat.run(parse_recipe(data), directory, observers=())
        made = directory / "mask-000002.safetensors"
        if spoil == "damaged":
            made.write_bytes(made.read_bytes()[:-9])
        elif spoil:
            shutil.copy(out / "mask-000004.safetensors", made)
        meerkat.resume(directory, observers=())
        assert content(directory) == content(out)


def test_what_is_damaged_or_lost_is_named(out: Path) -> None:
    path = out / "mask-000004.safetensors"
    shutil.copy(out / "mask-000002.safetensors", path)
    with pytest.raises(JournalError, match=r"mask-000004.*not the mask of this run"):
        meerkat.evaluate(out)
    meerkat.evaluate(out, rounds=4)
    path.unlink()
    with pytest.raises(MaskError, match=r"mask-000004.*no such file"):
        meerkat.export(out, out / "delta", delta=True)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE rounds SET digest = 'x' WHERE round = 5",
        "UPDATE renewals SET content = x'01' WHERE round = 4",
        "UPDATE renewals SET seal = zeroblob(32) WHERE round = 2",
    ],
)
def test_recovery_keeps_what_follows_from_good_renewals(out: Path, damage: str) -> None:
    """The run goes on before what is damaged, in the subspace of then."""
    expected = content(out)
    with closing(sqlite3.connect(out / "journal.sqlite", isolation_level=None)) as file:
        assert file.execute(damage).rowcount == 1
    with pytest.raises(JournalError, match="damaged"):
        meerkat.resume(out, observers=())
    meerkat.resume(out, recover=True, observers=())
    assert content(out) == expected


def test_the_summary_and_the_report_know(data: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("altair")
    summary = meerkat.run(parse_recipe(data), tmp_path / "run")
    assert summary["subspace_renewals"] == [2, 4]
    assert "since the renewal before round 4" in (tmp_path / "run/report.html").read_text()


class _Watcher(RunObserver):
    def __init__(self) -> None:
        self.renewed: list[tuple[int, int]] = []

    def subspace_renewed(self, renewal: Renewal) -> None:
        self.renewed.append((renewal.round, renewal.position))


def test_observers_are_told(data: dict[str, Any], tmp_path: Path) -> None:
    watcher = _Watcher()
    meerkat.run(parse_recipe(data), tmp_path / "run", observers=[watcher])
    assert watcher.renewed == [(2, 4), (4, 8)]  # two local steps a round


def test_when_it_is_due(data: dict[str, Any]) -> None:
    recipe = parse_recipe(data)
    assert [round for round in range(9) if is_due(recipe, round)] == [2, 4]
    never = parse_recipe(merged(data, subspace={"renew_every": 0}))
    assert not any(is_due(never, round) for round in range(9))
    assert recipe.fingerprint != never.fingerprint


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"subspace": {"kind": "random"}}, "needs a subspace that follows the model"),
        ({"selection": {"kind": "gradip", "signal": "gradip"}}, "signal = 'projected-gradient'"),
    ],
)
def test_what_cannot_be_renewed_is_refused(
    data: dict[str, Any], changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(RecipeError, match=line):
        parse_recipe(merged(data, **changes))


# Over sessions


@pytest.mark.parametrize("anew", ["stay", "anew", "remember"])
def test_sessions_give_the_local_bits(
    data: dict[str, Any], out: Path, tmp_path: Path, anew: str
) -> None:
    remote = remote_of(data, out, tmp_path / "remote")
    remote.anew, remote.remember = anew != "stay", anew == "remember"
    remote.run()
    assert content(remote.out) == content(out)
    same_evaluations(remote.out, out)
    assert remote.peers.count(SpaceFile) == 3 * 3  # each subspace once to each client


def test_early_stopping_by_the_projected_gradient(data: dict[str, Any], tmp_path: Path) -> None:
    selection = {
        "kind": "gradip",
        "signal": "projected-gradient",
        "calibration_steps": 6,
        "first_window": 2,
        "later_window": 2,
    }
    data = merged(data, selection=selection)
    local_run(parse_recipe(data), tmp_path / "local")
    remote = remote_of(data, tmp_path / "local", tmp_path / "remote")
    remote.run()
    assert content(remote.out) == content(tmp_path / "local")
    assert content(remote.out)["calibrations"]


@pytest.mark.parametrize("at", [2, 3, 4, 5])
def test_a_client_that_joins_after_a_renewal(
    data: dict[str, Any], out: Path, tmp_path: Path, at: int
) -> None:
    """It gets the subspace of now, and what was updated in it."""
    remote = remote_of(data, out, tmp_path / "remote")
    done: list[int] = []

    def restart(peer: int, frame: DownFrame) -> bool:
        if peer != 11 or not isinstance(frame, Plan) or frame.plan.round != at or done:
            return False
        done.append(at)
        remote.peers.reconnect(peer)
        return True

    remote.before = restart
    remote.run()
    assert done
    assert content(remote.out) == content(out)
    same_evaluations(remote.out, out)


def test_a_client_set_up_before_a_renewal_is_set_up_again(
    data: dict[str, Any], out: Path, tmp_path: Path
) -> None:
    """It was invited before, and says hello after."""
    remote = remote_of(data, out, tmp_path / "remote")
    done: list[Setup] = []

    def restart(peer: int, frame: DownFrame) -> bool:
        if peer == 11 and isinstance(frame, Plan) and frame.plan.round == 2 and not done:
            done.append(remote.peers.setup)
            remote.peers.setup = former
            new_process()
            remote.peers.sessions[peer] = remote.peers._session(NodeConfig(1))
            remote.peers._put(peer, remote.peers.sessions[peer].begin(former))
            remote.peers.setup = done[0]
            return True
        return False

    remote.before = restart
    connect = remote._connect

    def connected(setup: Setup) -> Any:
        nonlocal former
        former = setup
        return connect(setup)

    former: Any = None
    remote._connect = connected  # type: ignore[method-assign]
    remote.run()
    assert done
    assert done[0].position > 0
    assert content(remote.out) == content(out)


@pytest.mark.parametrize("anew", [False, True], ids=["clients stay", "clients start anew"])
def test_interruptions_of_the_server_leave_no_trace(
    data: dict[str, Any], out: Path, tmp_path: Path, anew: bool
) -> None:
    remote, failures = remote_of(data, out, tmp_path / "remote"), 0
    remote.cut_in = 17
    while True:
        try:
            remote.run()
            break
        except RunError:
            failures += 1
        if anew:
            new_process()
    assert failures >= 3
    assert content(remote.out) == content(out)


# By a calibrator


def test_a_calibrator_beside_the_server(data: dict[str, Any], out: Path, tmp_path: Path) -> None:
    """`meerkat recalibrate` watches the directory; the server takes what it makes."""
    made = remote_run.load_server_mask(out / "mask.safetensors")
    slow = merged(data, network={"patience": 60.0})
    remote = RemoteRun(parse_recipe(slow), tmp_path / "remote", made)
    model = loaded_once.__wrapped__  # of its own: sessions move the weights of theirs
    failed: list[BaseException] = []

    def calibrate() -> None:
        from meerkat.runs import recalibrating

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(recalibrating, "_LOOK_EVERY", 0.05)
                patch.setattr(recalibrating, "assemble", assembled)
                wait_for(remote.out / "recipe.json")
                meerkat.recalibrate(remote.out, made=written.append)
        except BaseException as error:
            failed.append(error)

    recipe = parse_recipe(slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "load_model", model)
        own = assembly.assemble(recipe, mask_file=out / "mask.safetensors")

    def assembled(*_: Any, **__: Any) -> Any:
        return own

    written: list[Path] = []
    thread = threading.Thread(target=calibrate)
    thread.start()
    remote.run()
    thread.join(60)
    assert not failed
    assert [path.name for path in written] == ["mask-000002.safetensors", "mask-000004.safetensors"]
    assert content(remote.out) == content(out)
    assert any("waiting for mask-000002.safetensors" in line for line in remote.lines)


def wait_for(path: Path) -> None:
    import time

    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_server_without_a_calibrator_says_so_and_goes_on_later(
    data: dict[str, Any], out: Path, tmp_path: Path
) -> None:
    remote = remote_of(data, out, tmp_path / "remote")
    copied, remote.make_mask = remote.make_mask, None
    quick = merged(data, network={"patience": 0.3})
    remote.recipe = parse_recipe(quick)
    with pytest.raises(RunError, match=r"mask-000002.*was not made.*meerkat recalibrate"):
        remote.run()
    assert len(content(remote.out)["rounds"]) == 2
    new_process()
    again = remote_of(data, out, tmp_path / "remote")
    again.make_mask = copied
    again.run()
    assert content(remote.out) == content(out)


def test_the_command_makes_what_is_due(
    data: dict[str, Any], out: Path, sentences_file: Path, tmp_path: Path
) -> None:
    """Once, from texts of now; a run that waits for nothing gets nothing."""
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        meerkat.run(parse_recipe(data), directory, observers=[_StopAfter(1)])
    corpus = tmp_path / "now.txt"
    lines = sentences_file.read_text().splitlines()
    corpus.write_text("\n".join(reversed(lines[len(lines) // 2 :])))
    command = ["recalibrate", str(directory), "--once", "--corpus", str(corpus)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "mask-000002.safetensors" in done.output
    found = load_mask(directory / "mask-000002.safetensors").subspace
    usual = load_mask(out / "mask-000002.safetensors").subspace
    assert found is not None
    assert usual is not None
    assert np.array_equal(found.base, usual.base)  # type: ignore[arg-type]
    assert found.about["texts"] != usual.about["texts"]
    meerkat.resume(directory, observers=())
    assert content(directory) != content(out)
    assert CliRunner().invoke(app, ["recalibrate", str(directory), "--once"]).output == ""


def test_a_run_that_is_never_renewed_is_named(data: dict[str, Any], tmp_path: Path) -> None:
    local_run(parse_recipe(merged(data, subspace={"renew_every": 0})), tmp_path / "run")
    with pytest.raises(RunError, match=r"start one with subspace\.renew_every"):
        meerkat.recalibrate(tmp_path / "run")


def test_a_base_is_part_of_the_file_and_of_its_fingerprint(out: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    mask = masks(out)[1]
    assert mask.subspace is not None
    without = replace(mask, subspace=replace(mask.subspace, base=None))
    assert without.fingerprint != mask.fingerprint
    base = np.full(mask.size, np.nan, np.float32)
    spoiled = replace(mask, subspace=replace(mask.subspace, base=base))
    save_mask(spoiled, tmp_path / "spoiled.safetensors")
    with pytest.raises(MaskError, match="base that is not finite"):
        load_mask(tmp_path / "spoiled.safetensors")
