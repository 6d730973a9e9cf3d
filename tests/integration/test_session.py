"""The client's side: real sessions in this process, their data, their mask, their answers."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_recipe, make_update, merged
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import content
from peers import (
    RemoteRun,
    evaluations,
    loaded_once,
    local_run,
    new_process,
    same_evaluations,
    slopes,
)
from typer.testing import CliRunner

import meerkat
from meerkat.cli import app
from meerkat.config import Recipe, parse_recipe
from meerkat.data import clients as data_clients
from meerkat.data.clients import held_out_shard, load_partition, write_client_folders
from meerkat.data.encoding import Encoder
from meerkat.data.sources import Split, load_folder
from meerkat.engines.mask_to_send import sent_file
from meerkat.errors import DataError, MaskError, ModelError, ProtocolError, RecipeError, RunError
from meerkat.federation.messages import ClientReport, RoundPlan
from meerkat.flower.serving import largest_client_frame
from meerkat.journal import Journal
from meerkat.node import session as node_session
from meerkat.node.config import NodeConfig
from meerkat.node.session import ClientSession
from meerkat.reporting.observer import ReportWriter
from meerkat.runs import assembly, remote_run
from meerkat.runs.events import Observers
from meerkat.runs.watching import SelectionWriter
from meerkat.spaces.mask_file import Mask, load_mask
from meerkat.tasks import Example, Task, resolve_task
from meerkat.tasks.metrics import METRICS, metric_names
from meerkat.tasks.objective import Predictions
from meerkat.transport.client_frames import (
    Evaluation,
    Failed,
    Hello,
    Need,
    Report,
    WantSpace,
    decode_up,
)
from meerkat.transport.frame import DownFrame, encode
from meerkat.transport.handshake import Proof
from meerkat.transport.server_frames import (
    EvaluateRequest,
    Goodbye,
    LogPart,
    Plan,
    Refused,
    Setup,
    Snapshot,
    SpaceFile,
    Welcome,
)
from meerkat.zo import noise
from meerkat.zo.estimators.two_point import TwoPoint
from meerkat.zo.log import Update

# What the tests are made of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(assembly, "load_model", loaded_once)
    monkeypatch.setenv("MEERKAT_CACHE", str(tmp_path / "cache"))
    yield
    new_process()


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward passes but those of the evaluation."""
    monkeypatch.setattr(TwoPoint, "estimate", slopes)


QUICK = {
    "federation": {"clients": 3, "rounds": 4},
    "network": {"deadline": 0.5, "rejoin": 0.1, "patience": 1.0},
}
WINDOWS = {"calibration_steps": 6, "first_window": 2, "later_window": 2}


def recipe_of(data: dict[str, Any], **sections: Any) -> Recipe:
    """The recipe of a quick run with fields of its sections changed."""
    if sections.get("selection", {}).get("kind") == "gradip":
        sections = sections | {"selection": WINDOWS | sections["selection"]}
    return parse_recipe(merged(merged(data, **QUICK), **sections))


@pytest.fixture
def recipe(tiny_recipe_data: dict[str, Any]) -> Recipe:
    return recipe_of(tiny_recipe_data)


@pytest.fixture(scope="session")
def mask_file(tiny_recipe_data: dict[str, Any], tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    meerkat.calibrate(recipe_of(tiny_recipe_data), out=path)
    return path


@pytest.fixture
def mask(mask_file: Path) -> Mask:
    return remote_run.load_server_mask(mask_file)


# A remote run is the local run


@pytest.mark.parametrize("own", [False, True], ids=["partition", "folders"])
def test_a_remote_run_is_the_local_run(
    recipe: Recipe, mask: Mask, tmp_path: Path, own: bool
) -> None:
    """With real forward passes: the same bits from the recipe's data and from own folders."""
    local = local_run(recipe, tmp_path / "local")
    nodes = None
    if own:
        folders = write_client_folders(recipe, tmp_path / "folders")
        nodes = [NodeConfig(number, data=folder) for number, folder in enumerate(folders)]
    remote = RemoteRun(recipe, tmp_path / "remote", mask, nodes)
    summary = remote.run()
    assert content(remote.out) == content(tmp_path / "local")
    same_evaluations(remote.out, tmp_path / "local")
    assert summary["state_digest"] == local["state_digest"]
    assert summary["evaluated_examples"] == 20
    assert remote.peers.closed == "the run is complete"
    assert all(" is here " in line for line in remote.lines)
    assert remote.peers.said.count("client 1 takes part") == 1


MOMENTUM = {"rule": {"kind": "momentum", "decay": 0.9}}
ADAM = {"rule": "adam"}
GRADIP = {"kind": "gradip", "rho_later": 1.0, "rho_quiet": 0.0, "sigma": 1e9}
RUNS: dict[str, dict[str, Any]] = {
    "T=1": {"federation": {"local_steps": 1}, "evaluation": {"every": 1}},
    "T=5": {"federation": {"local_steps": 5}},
    "sampled by examples": {
        "federation": {"clients_per_round": 2, "weighting": "examples", "rounds": 6}
    },
    "per client": {"noise": {"directions": "per-client", "perturbations": 2}},
    "rademacher": {"noise": {"kind": "rademacher"}},
    "momentum": {"optimizer": MOMENTUM, "evaluation": {"every": 2}},
    "adam": {"optimizer": ADAM, "noise": {"perturbations": 2}, "evaluation": {"every": 2}},
    "adam, gradip": {"optimizer": ADAM, "selection": {**GRADIP, "apply": True}},
    "fedkseed": {"algorithm": "fedkseed"},
    "gradip": {"selection": GRADIP},
    "apply, every": {
        "selection": {"kind": "gradip", "apply": True, "signal": "gradip", "every": 2},
        "federation": {"rounds": 6},
    },
    "random": {"selection": {"kind": "random", "count": 1}},
}


@pytest.mark.parametrize(
    ("name", "anew"),
    [
        *((name, "stay") for name in RUNS),
        *(
            pytest.param(name, anew, marks=pytest.mark.slow)
            for name in ("T=1", "apply, every", "momentum", "adam", "adam, gradip")
            for anew in ("anew", "remember")
        ),
    ],
)
def test_sessions_give_the_local_bits(
    tiny_recipe_data: dict[str, Any],
    mask: Mask,
    tmp_path: Path,
    cheap: None,
    name: str,
    anew: str,
) -> None:
    """In one process, in a new one for each message, or in such a one that keeps its state."""
    recipe = recipe_of(tiny_recipe_data, **RUNS[name])
    local = local_run(recipe, tmp_path / "local")
    remote = RemoteRun(recipe, tmp_path / "remote", mask)
    remote.anew, remote.remember = anew != "stay", anew == "remember"
    summary = remote.run()
    assert content(remote.out) == content(tmp_path / "local")
    same_evaluations(remote.out, tmp_path / "local")
    assert summary["state_digest"] == local["state_digest"]
    assert (remote.peers.count(Need) > 0) == (anew == "anew")
    assert all(" is here " in line for line in remote.lines)


def test_sessions_in_a_subspace_give_the_local_bits(
    tiny_recipe_data: dict[str, Any],
    mask: Mask,
    sentences_file: Path,
    tmp_path: Path,
    cheap: None,
) -> None:
    """Clients get it with the mask; a server whose mask has none is told so."""
    subspace = {"dimensions": 4, "texts": 12, "corpus": str(sentences_file)}
    recipe = recipe_of(tiny_recipe_data, subspace=subspace)
    local = local_run(recipe, tmp_path / "local")
    with pytest.raises(MaskError, match="holds no subspace"):
        RemoteRun(recipe, tmp_path / "without", mask).run()
    made = remote_run.load_server_mask(tmp_path / "local/mask.safetensors")
    remote = RemoteRun(recipe, tmp_path / "remote", made)
    assert remote.run()["state_digest"] == local["state_digest"]
    assert content(remote.out) == content(tmp_path / "local")
    same_evaluations(remote.out, tmp_path / "local")


def in_subspace(kind: str, corpus: Path, dimensions: int = 4) -> dict[str, Any]:
    """Sections of a recipe in a subspace, with rates of its units."""
    section = {"kind": kind, "dimensions": dimensions, "texts": 12, "corpus": str(corpus)}
    return {"subspace": section, "optimizer": {"learning_rate": 0.1, "epsilon": 0.1}}


@pytest.mark.parametrize("kind", ["aligned", "random"])
@pytest.mark.parametrize("by", ["log", "snapshot"])
def test_a_client_that_joins_a_subspace_late_gets_w(
    tiny_recipe_data: dict[str, Any],
    sentences_file: Path,
    tmp_path: Path,
    cheap: None,
    kind: str,
    by: str,
) -> None:
    """It starts anew within a round, by the log or by w, whichever is smaller."""
    at = 1 if by == "log" else 2
    sections = in_subspace(kind, sentences_file, 11 if by == "log" else 4)
    changes = {"federation": {"local_steps": 1}} if by == "log" else {}
    recipe = recipe_of(tiny_recipe_data, **sections, **changes)
    local = local_run(recipe, tmp_path / "local")
    made = remote_run.load_server_mask(tmp_path / "local/mask.safetensors")
    remote = RemoteRun(recipe, tmp_path / "remote", made)
    done: list[int] = []

    def restart(peer: int, frame: DownFrame) -> bool:
        if peer != 11 or not isinstance(frame, Plan) or frame.plan.round != at or done:
            return False
        done.append(frame.plan.log_start)
        remote.peers.reconnect(peer)
        return True

    remote.before = restart
    summary = remote.run()
    assert done
    assert content(remote.out) == content(tmp_path / "local")
    same_evaluations(remote.out, tmp_path / "local")
    assert summary["state_digest"] == local["state_digest"]
    snapshots = [f for p, f in remote.peers.sent if p == 11 and isinstance(f, Snapshot)]
    state = meerkat.replay(remote.out, at).state
    assert (state.to_bytes() in {found.state for found in snapshots}) == (by == "snapshot")
    assert state.theta.shape == (made.dimensions,)


@pytest.mark.parametrize("kind", ["aligned", "random"])
@pytest.mark.parametrize("anew", [False, True], ids=["clients stay", "clients start anew"])
def test_early_stopping_in_a_subspace_survives_interruptions(
    tiny_recipe_data: dict[str, Any],
    sentences_file: Path,
    tmp_path: Path,
    anew: bool,
    kind: str,
) -> None:
    """With real forward passes: calibrations, verdicts and rounds are those of one process."""
    everybody = {"kind": "gradip", "rho_later": 0.0, "rho_quiet": 0.0, "sigma": 1e9}
    recipe = recipe_of(tiny_recipe_data, **in_subspace(kind, sentences_file), selection=everybody)
    local = local_run(recipe, tmp_path / "local")
    made = remote_run.load_server_mask(tmp_path / "local/mask.safetensors")
    assert made.direction_gradient is not None
    assert made.direction_gradient.shape == (4,)
    remote, failures = RemoteRun(recipe, tmp_path / "remote", made), 0
    remote.cut_in = 13
    while True:
        with suppress(RunError):
            summary = remote.run()
            break
        failures += 1
        if anew:
            new_process()
    assert failures >= 3
    assert content(remote.out) == content(tmp_path / "local")
    assert content(remote.out)["calibrations"]
    same_evaluations(remote.out, tmp_path / "local")
    assert summary["state_digest"] == local["state_digest"]
    assert summary["stopped_early"] == local["stopped_early"] == [0, 1, 2]
    assert summary["subspace"] == local["subspace"]
    assert meerkat.gradip(remote.out).paths == meerkat.gradip(tmp_path / "local").paths


EXACT_RUNS: dict[str, dict[str, Any]] = {
    "backward": {"optimizer": {"estimator": "backward"}},
    "backward, adam": {"optimizer": {"estimator": "backward", "rule": "adam"}},
    "mixed": {"optimizer": {"exact_clients": [0, 2]}},
    "mixed, per client": {
        "optimizer": {"exact_clients": [1]},
        "noise": {"directions": "per-client", "perturbations": 2},
        "federation": {"weighting": "examples"},
    },
    "forward-mode": {"optimizer": {"estimator": "forward-mode"}},
    "mixed, gradip": {
        "optimizer": {"exact_clients": [0, 2]},
        "selection": {"kind": "gradip", "apply": True, "signal": "gradip", "every": 2},
    },
}


@pytest.mark.parametrize("anew", ["stay", "anew", "remember"])
@pytest.mark.parametrize("name", EXACT_RUNS)
def test_exact_reports_of_sessions_give_the_local_bits(
    tiny_recipe_data: dict[str, Any], sentences_file: Path, tmp_path: Path, name: str, anew: str
) -> None:
    """With real forward and backward passes, in one process or in a new one for each message."""
    subspace = {"dimensions": 4, "texts": 12, "corpus": str(sentences_file)}
    recipe = recipe_of(tiny_recipe_data, **merged(EXACT_RUNS[name], subspace=subspace))
    local = local_run(recipe, tmp_path / "local")
    made = remote_run.load_server_mask(tmp_path / "local/mask.safetensors")
    nodes = [NodeConfig(number, gradients=True) for number in range(3)]
    remote = RemoteRun(recipe, tmp_path / "remote", made, nodes)
    remote.anew, remote.remember = anew != "stay", anew == "remember"
    assert remote.run()["state_digest"] == local["state_digest"]
    assert content(remote.out) == content(tmp_path / "local")
    same_evaluations(remote.out, tmp_path / "local")


@pytest.mark.parametrize("by", ["log", "snapshot"])
def test_a_late_client_gets_what_exact_reports_gave(
    tiny_recipe_data: dict[str, Any], sentences_file: Path, tmp_path: Path, by: str
) -> None:
    """It starts anew within round 2: two updates along axes are as small as the state of Adam."""
    subspace = {"dimensions": 4, "texts": 12, "corpus": str(sentences_file)}
    chosen = {"estimator": "backward"} if by == "log" else {"exact_clients": [0]}
    optimizer = {"rule": "adam", **chosen}
    federation = {"local_steps": 1}
    recipe = recipe_of(
        tiny_recipe_data, subspace=subspace, optimizer=optimizer, federation=federation
    )
    local = local_run(recipe, tmp_path / "local")
    made = remote_run.load_server_mask(tmp_path / "local/mask.safetensors")
    nodes = [NodeConfig(number, gradients=True) for number in range(3)]
    remote = RemoteRun(recipe, tmp_path / "remote", made, nodes)
    done: list[int] = []

    def restart(peer: int, frame: DownFrame) -> bool:
        if peer != 11 or not isinstance(frame, Plan) or frame.plan.round != 2 or done:
            return False
        done.append(peer)
        remote.peers.reconnect(peer)
        return True

    remote.before = restart
    assert remote.run()["state_digest"] == local["state_digest"]
    assert done
    assert content(remote.out) == content(tmp_path / "local")
    plans = [f.plan for p, f in remote.peers.sent if p == 11 and isinstance(f, Plan)]
    again = next(plan for plan in reversed(plans) if plan.round == 2)
    lacking = [len(update.axes) for update in again.updates]
    assert (again.log_start, lacking) == ((0, [4, 4]) if by == "log" else (2, []))
    snapshots = [f for p, f in remote.peers.sent if p == 11 and isinstance(f, Snapshot)]
    assert bool(snapshots) == (by == "snapshot")


@pytest.mark.parametrize("anew", [False, True], ids=["clients stay", "clients start anew"])
@pytest.mark.parametrize("name", ["backward, adam", "mixed, gradip"])
def test_interruptions_of_exact_runs_leave_no_trace(
    tiny_recipe_data: dict[str, Any], sentences_file: Path, tmp_path: Path, name: str, anew: bool
) -> None:
    subspace = {"dimensions": 4, "texts": 12, "corpus": str(sentences_file)}
    recipe = recipe_of(tiny_recipe_data, **merged(EXACT_RUNS[name], subspace=subspace))
    local = local_run(recipe, tmp_path / "local")
    made = remote_run.load_server_mask(tmp_path / "local/mask.safetensors")
    nodes = [NodeConfig(number, gradients=True) for number in range(3)]
    remote, failures = RemoteRun(recipe, tmp_path / "remote", made, nodes), 0
    remote.cut_in = 13
    while True:
        with suppress(RunError):
            summary = remote.run()
            break
        failures += 1
        if anew:
            new_process()
    assert failures >= 1
    assert content(remote.out) == content(tmp_path / "local")
    assert summary["state_digest"] == local["state_digest"]


def test_clients_that_are_able_report_the_exact_gradient(
    tiny_recipe_data: dict[str, Any], sentences_file: Path, tmp_path: Path
) -> None:
    """What a hello says is what a plan asks for; in this process every client is able."""
    subspace = {"dimensions": 4, "texts": 12, "corpus": str(sentences_file)}
    named = recipe_of(tiny_recipe_data, subspace=subspace, optimizer={"exact_clients": [1]})
    able = recipe_of(tiny_recipe_data, subspace=subspace, optimizer={"exact_clients": "able"})
    local_run(named, tmp_path / "local")
    made = remote_run.load_server_mask(tmp_path / "local/mask.safetensors")
    nodes = [NodeConfig(number, gradients=number == 1) for number in range(3)]
    remote = RemoteRun(able, tmp_path / "remote", made, nodes)
    remote.run()
    assert content(remote.out) == content(tmp_path / "local")
    kinds = {(p, frame.plan.along) for p, frame in remote.peers.sent if isinstance(frame, Plan)}
    assert kinds == {(10, "drawn"), (11, "axes"), (12, "drawn")}
    nobody = RemoteRun(able, tmp_path / "nobody", made)
    nobody.run()
    plain = recipe_of(tiny_recipe_data, subspace=subspace)
    local_run(plain, tmp_path / "plain")
    assert content(nobody.out) == content(tmp_path / "plain")


@pytest.mark.parametrize("optimizer", [{"estimator": "backward"}, {"exact_clients": [1]}])
def test_a_client_that_is_not_able_is_told_the_way_out(
    tiny_recipe_data: dict[str, Any],
    sentences_file: Path,
    tmp_path: Path,
    optimizer: dict[str, Any],
) -> None:
    subspace = {"dimensions": 4, "texts": 12, "corpus": str(sentences_file)}
    recipe = recipe_of(tiny_recipe_data, subspace=subspace, optimizer=optimizer)
    made_path = tmp_path / "mask.safetensors"
    meerkat.calibrate(recipe, out=made_path)
    made = remote_run.load_server_mask(made_path)
    nodes = [NodeConfig(number, gradients=number != 1) for number in range(3)]
    remote = RemoteRun(recipe, tmp_path / "remote", made, nodes)
    remote.run()
    line = next(line for line in remote.lines if "client 1" in line and "refused" in line)
    assert "is to report the exact gradient, and its node does not allow that" in line
    assert "--node-config gradients = true" in line
    with closing(Journal.open(remote.out / "journal.sqlite")) as journal:
        taken = {report.client for record, _ in journal.records() for report in record.reports}
    assert taken == {0, 2}


def test_a_node_gives_no_gradient_that_its_operator_does_not_allow(
    tiny_recipe_data: dict[str, Any], sentences_file: Path, tmp_path: Path
) -> None:
    """Whatever the server asks for."""
    subspace = {"dimensions": 4, "texts": 12, "corpus": str(sentences_file)}
    recipe = recipe_of(tiny_recipe_data, subspace=subspace)
    meerkat.calibrate(recipe, out=tmp_path / "mask.safetensors")
    made = remote_run.load_server_mask(tmp_path / "mask.safetensors")
    proof = Proof(made.model, made.fingerprint, noise.fingerprint(), made.configuration, made.probe)
    node = NodeConfig(0, mask=tmp_path / "mask.safetensors")
    session = ClientSession(node)
    session.begin(Setup(recipe.to_json(), proof, "session", False))
    for along, kind in (("axes", Failed), ("drawn", Report)):
        plan = RoundPlan(0, 1, 0.1, 0, 0, along=along)  # type: ignore[arg-type]
        (answer,) = session.answer(encode(Plan(plan)))
        assert isinstance(decode_up(answer), kind)


@pytest.mark.parametrize("by", ["log", "snapshot"])
@pytest.mark.parametrize("rule", [MOMENTUM, ADAM], ids=["momentum", "adam"])
def test_a_client_that_joins_late_gets_the_state_of_the_rule(
    tiny_recipe_data: dict[str, Any],
    mask: Mask,
    mask_file: Path,
    tmp_path: Path,
    cheap: None,
    rule: dict[str, Any],
    by: str,
) -> None:
    """It starts anew within round 2, by the log or by a snapshot: θ and slots are as in place."""
    changes: dict[str, Any] = {"optimizer": rule}
    if by == "snapshot":  # two rounds of log entries are larger than θ and slots
        per_round = mask.size * 12 // 24 // 2 + 1
        changes |= {
            "noise": {"perturbations": 200},
            "federation": {"local_steps": 1 + per_round // 200},
        }
    recipe = recipe_of(tiny_recipe_data, **changes)
    local = local_run(recipe, tmp_path / "local")
    remote = RemoteRun(recipe, tmp_path / "remote", mask)
    done: list[int] = []

    def restart(peer: int, frame: DownFrame) -> bool:
        if peer != 11 or not isinstance(frame, Plan) or frame.plan.round != 2 or done:
            return False
        done.append(frame.plan.log_start)
        remote.peers.reconnect(peer)
        return True

    remote.before = restart
    summary = remote.run()
    assert done
    assert content(remote.out) == content(tmp_path / "local")
    same_evaluations(remote.out, tmp_path / "local")
    assert summary["state_digest"] == local["state_digest"]
    local_steps = recipe.federation.local_steps
    snapshots = [f for p, f in remote.peers.sent if p == 11 and isinstance(f, Snapshot)]
    starts = [f.plan for p, f in remote.peers.sent if p == 11 and isinstance(f, Plan)]
    again = next(plan for plan in reversed(starts) if plan.round == 2)
    if by == "log":
        assert not snapshots
        assert (again.log_start, len(again.updates)) == (0, 2 * local_steps)
    else:
        # One for the plan that was lost, and one for the session that begins anew.
        before = [found for found in snapshots if found.position == 2 * local_steps]
        assert len(before) == 2
        assert (again.log_start, again.updates) == (2 * local_steps, ())
        state = meerkat.replay(remote.out, 2).state
        assert {found.state for found in before} == {state.to_bytes()}
        assert len(before[0].state) > 4 * mask.size, "the slots travel"


@pytest.mark.parametrize("rule", [{}, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("anew", [False, True], ids=["clients stay", "clients start anew"])
def test_interruptions_leave_no_trace(
    tiny_recipe_data: dict[str, Any],
    mask: Mask,
    tmp_path: Path,
    cheap: None,
    anew: bool,
    rule: dict[str, Any],
) -> None:
    recipe = recipe_of(tiny_recipe_data, selection={"kind": "gradip"}, optimizer=rule)
    local = local_run(recipe, tmp_path / "local")
    remote, failures = RemoteRun(recipe, tmp_path / "remote", mask), 0
    remote.cut_in = 13
    while True:
        with suppress(RunError):
            summary = remote.run()
            break
        failures += 1
        if anew:
            new_process()
    assert failures >= 3
    assert content(remote.out) == content(tmp_path / "local")
    same_evaluations(remote.out, tmp_path / "local")
    assert summary["state_digest"] == local["state_digest"]


@pytest.mark.slow
def test_commands_work_on_a_remote_run(
    tiny_recipe_data: dict[str, Any], mask: Mask, tmp_path: Path, cheap: None
) -> None:
    some = {"kind": "gradip", "signal": "gradip", "rho_later": 0.0, "rho_quiet": 0.0, "sigma": 1e9}
    recipe = recipe_of(tiny_recipe_data, selection=some)
    meerkat.run(recipe, out=tmp_path / "local")
    remote = RemoteRun(recipe, tmp_path / "remote", mask)
    remote.observer = Observers([SelectionWriter(), ReportWriter()])
    summary = remote.run()
    assert (remote.out / "report.html").stat().st_size > 10_000
    for command in (["report"], ["gradip"], ["replay"]):
        done = CliRunner().invoke(app, [*command, str(remote.out)])
        assert done.exit_code == 0, done.output
    assert (remote.out / "report.html").stat().st_size > 10_000
    assert meerkat.replay(remote.out).digest == summary["state_digest"]
    assert meerkat.replay(remote.out, 2).digest == meerkat.replay(tmp_path / "local", 2).digest
    assert meerkat.gradip(remote.out).paths == meerkat.gradip(tmp_path / "local").paths
    meerkat.export(remote.out, tmp_path / "merged")
    meerkat.export(tmp_path / "local", tmp_path / "as local")
    name = "model.safetensors"
    merged_bytes = (tmp_path / "merged" / name).read_bytes()
    assert merged_bytes == (tmp_path / "as local" / name).read_bytes()
    meerkat.export(remote.out, tmp_path / "delta", delta=True)
    chosen = json.loads((remote.out / "selection.json").read_text())
    assert chosen["flagged"]
    assert not any("labels" in client for client in chosen["clients"])
    local = json.loads((tmp_path / "local" / "selection.json").read_text())
    assert chosen["flagged"] == local["flagged"]
    strict = json.loads((remote.out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert strict == summary
    found = meerkat.evaluate(remote.out)
    loaded_once.cache_clear()  # it leaves θ in its model
    assert found.metrics["accuracy"] == summary["after"]["accuracy"]


def with_verbalizers(data: dict[str, Any], verbalizers: dict[str, str]) -> dict[str, Any]:
    """In place of those that the recipe has."""
    data = copy.deepcopy(data)
    data["task"]["verbalizers"] = verbalizers
    return data


CLASS_METRICS = ["accuracy", "macro_f1", "balanced_accuracy"]


@pytest.mark.parametrize("kind", ["three classes", "free text"])
def test_three_classes_and_free_text(
    tiny_recipe_data: dict[str, Any], mask: Mask, tmp_path: Path, cheap: None, kind: str
) -> None:
    """Sums over the clients are the evaluation of all held-out examples."""
    path = tmp_path / "topics.csv"
    names = ("World", "Sports", "Business")
    rows = [f"film {i} is a {names[i * i % 3]} story,{names[i % 3]}" for i in range(90)]
    path.write_text("\n".join(["text,topic", *rows]) + "\n")
    task: dict[str, Any] = {"source": str(path), "label": "topic"}
    evaluation: dict[str, Any] = {"examples": 8, "every": 2}
    if kind == "free text":
        task |= {"verbalizers": None, "answer": "topic"}
    else:
        verbalizers = dict(zip(names, ("great", "terrible", "bad"), strict=True))
        tiny_recipe_data = with_verbalizers(tiny_recipe_data, verbalizers)
        evaluation["metrics"] = CLASS_METRICS
    recipe = recipe_of(tiny_recipe_data, task=task, evaluation=evaluation)
    local_run(recipe, tmp_path / "local")
    remote = RemoteRun(recipe, tmp_path / "remote", mask)
    remote.run()
    assert all(" is here " in line for line in remote.lines), remote.lines
    assert content(remote.out) == content(tmp_path / "local")
    found = evaluations(remote.out)
    expected = ["loss"] if kind == "free text" else ["loss", *CLASS_METRICS]
    assert all(list(e.metrics) == expected for e in found)
    same_evaluations(remote.out, tmp_path / "local")
    assert {e.examples for e in found} == {8}


@pytest.mark.parametrize("classes", [129, 300])
def test_many_classes(
    tiny_recipe_data: dict[str, Any],
    mask: Mask,
    tmp_path: Path,
    cheap: None,
    classes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sums of each class go over the wire, in a frame no larger than a stream takes."""
    # The tiny tokenizer has not as many words that differ from their first token on.
    monkeypatch.setattr(Encoder, "_answer", lambda self, answer: (10 + int(answer.split()[1]),))
    path = tmp_path / "many.csv"
    names = [f"class {number}" for number in range(classes)]
    rows = [f"film {i} is a {i * i % 7} story,{names[i * i % classes]}" for i in range(2 * classes)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    words = [f"answer {number}" for number in range(classes)]
    recipe = recipe_of(
        with_verbalizers(tiny_recipe_data, dict(zip(names, words, strict=True))),
        task={"source": str(path), "label": "label"},
        federation={"rounds": 1},
        evaluation={"examples": 9, "metrics": CLASS_METRICS},
    )
    local = local_run(recipe, tmp_path / "local")
    remote = RemoteRun(recipe, tmp_path / "remote", mask)
    summary = remote.run()
    assert summary["state_digest"] == local["state_digest"]
    same_evaluations(remote.out, tmp_path / "local")
    assert list(summary["after"]) == ["loss", *CLASS_METRICS]
    answers = [a for _, a in remote.peers.answers if isinstance(a, Evaluation)]
    assert len(answers) == 2 * 3
    assert {len(a.sums["macro_f1"]) for a in answers} == {3 * classes}
    frames = [encode(answer) for _, answer in remote.peers.answers]
    assert max(map(len, frames)) > 2 * 3 * 8 * classes
    assert max(map(len, frames)) <= largest_client_frame(recipe)


@pytest.mark.parametrize("classes", [1, 2, 300, 20_000])
@pytest.mark.parametrize("steps", [1, 1000, 65_535])
def test_the_largest_frame_follows_from_the_recipe(classes: int, steps: int) -> None:
    """A stream that takes no larger one takes every report and every evaluation."""
    words = None if classes == 1 else {f"c{n}": f"answer {n}" for n in range(classes)}
    kind = {"answer": "said"} if words is None else {"verbalizers": words}
    recipe = make_recipe(
        task={"name": "custom", "source": "a.csv", "prompt": "{text}", **kind},
        federation={"local_steps": steps},
        noise={"perturbations": 3},
        evaluation={"metrics": CLASS_METRICS if words else []},
    )
    report = ClientReport(1, 2, 3, steps, 3, bytes(8), (0.5,) * (3 * steps))
    labels = np.arange(classes) if words else np.zeros(classes, np.int64)
    found = Predictions(np.ones(classes), labels, labels, classes)
    names = metric_names(recipe.evaluation.metrics, words is not None)
    sums = {name: tuple(METRICS[name].sums(found).tolist()) for name in names}
    frames = [encode(Report(report)), encode(Evaluation(2**32 - 1, classes, sums))]
    assert max(map(len, frames)) <= largest_client_frame(recipe) <= max(map(len, frames)) + 2**17


# What a session answers


def proof_of(mask: Mask) -> Proof:
    return Proof(mask.model, mask.digest, noise.fingerprint(), mask.configuration, mask.probe)


def setup_of(recipe: Recipe, mask: Mask, /, **changes: str) -> Setup:
    return Setup(recipe.to_json(), replace(proof_of(mask), **changes), "session", False)


class Talk:
    """A conversation with one session."""

    def __init__(self, setup: Setup, node: NodeConfig | None = None):
        self.said: list[str] = []
        self.client = ClientSession(node or NodeConfig(0), self.said.append)
        self.first = decode_up(self.client.begin(setup))

    def __call__(self, frame: DownFrame) -> Any:
        answers = [decode_up(data) for data in self.client.answer(encode(frame))]
        assert len(answers) < 2
        return answers[0] if answers else None

    @property
    def worker(self) -> Any:
        assert self.client._runtime is not None
        return self.client._runtime.worker


@pytest.fixture
def talk(recipe: Recipe, mask: Mask, mask_file: Path, cheap: None) -> Talk:
    return Talk(setup_of(recipe, mask), NodeConfig(0, mask=mask_file))


def updates(count: int, start: int = 0) -> tuple[Update, ...]:
    return tuple(make_update(0.5, n + 0.25, round=n) for n in range(start, start + count))


def plan(start: int = 0, log: tuple[Update, ...] = ()) -> Plan:
    return Plan(RoundPlan(1, 2, 0.5, 0, start, log))


def test_a_hello_says_who_and_what(recipe: Recipe, mask: Mask, talk: Talk) -> None:
    _, parts = load_partition(recipe, resolve_task(recipe.task))
    assert talk.first == Hello(0, len(parts[0]), 7, 0, proof_of(mask))
    talk(plan(0, updates(3)))
    again = decode_up(talk.client.begin(setup_of(recipe, mask)))
    assert again.position == 3


def test_what_a_plan_lacks_is_asked_for(talk: Talk) -> None:
    assert talk(plan(2)) == Need(0)
    assert talk(LogPart(1, updates(1, 1))) is None, "not its place in the log"
    assert talk.worker.position == 0
    assert talk(LogPart(0, updates(2))) is None
    assert isinstance(talk(plan(2)), Report)
    assert talk(EvaluateRequest(1, 3)) == Need(2)
    assert talk(LogPart(1, updates(2, 1))) is None, "the first one is known"
    assert isinstance(talk(EvaluateRequest(1, 3)), Evaluation)
    state = talk.worker.state
    assert talk(Snapshot(3, state.to_bytes())) is None
    assert talk(EvaluateRequest(1, 2)) == Need(3)
    assert talk.worker.state.digest == state.digest


def test_a_report_names_the_state_that_it_started_from(talk: Talk) -> None:
    first = talk(plan(0, updates(2))).report
    state = talk.worker.state
    assert first.state_digest == bytes.fromhex(state.digest)[:8]
    assert talk(plan(0, updates(2))).report == first, "asked again"
    assert talk(plan(1, updates(1, 1))).report == first
    assert talk(Snapshot(2, state.to_bytes())) is None
    assert talk(plan(2)).report == first
    other = replace(state, theta=state.theta + 1)
    assert talk(Snapshot(2, other.to_bytes())) is None, "a snapshot is taken as it is"
    assert talk(plan(2)).report.state_digest == bytes.fromhex(other.digest)[:8]
    assert talk.client.answered == 5


def test_a_snapshot_that_is_no_state_is_refused(talk: Talk) -> None:
    with pytest.raises(ProtocolError, match=r"snapshot: a state of 12 bytes, not \d+"):
        talk(Snapshot(1, bytes(12)))
    data = bytearray(talk.worker.state.to_bytes())
    data[4:8] = np.float32(np.nan).tobytes()
    with pytest.raises(ProtocolError, match="snapshot: a state with a value that is not finite"):
        talk(Snapshot(1, bytes(data)))
    assert talk.worker.position == 0


@pytest.mark.parametrize("rule", [MOMENTUM, ADAM], ids=["momentum", "adam"])
def test_a_snapshot_has_the_slots_of_the_rule(
    tiny_recipe_data: dict[str, Any],
    mask: Mask,
    mask_file: Path,
    cheap: None,
    rule: dict[str, Any],
) -> None:
    recipe = recipe_of(tiny_recipe_data, optimizer=rule)
    talk = Talk(setup_of(recipe, mask), NodeConfig(0, mask=mask_file))
    with pytest.raises(ProtocolError, match=r"snapshot: a state of \d+ bytes, not \d+"):
        talk(Snapshot(1, bytes(4 * mask.size)))  # θ alone
    report = talk(plan(0, updates(3))).report
    state = talk.worker.state
    assert state.slots
    new_process()
    again = Talk(setup_of(recipe, mask), NodeConfig(0, mask=mask_file))
    assert again(Snapshot(3, state.to_bytes())) is None
    assert again(plan(3)).report == report
    assert again(plan(3, updates(1, 3))).report == talk(plan(3, updates(1, 3))).report


def test_an_error_is_sent_once_and_the_client_goes_on(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the server waits for an answer."""

    def broken(*_: Any) -> None:
        raise RuntimeError("secret path /home/me")

    state = talk.worker.initial.to_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(node_session, "evaluation_sums", broken)
        patch.setattr(TwoPoint, "estimate", broken)
        patch.setattr("meerkat.federation.client.Worker.synchronise", broken)
        assert talk(Snapshot(1, state)) is None
        assert talk(plan()) == Failed("RuntimeError")
        assert talk(EvaluateRequest(0, 0)) == Failed("RuntimeError")
    assert isinstance(talk(plan()), Report)


def test_a_loss_that_is_not_finite_is_an_error(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes such a number for a broken frame."""
    for loss in (math.nan, math.inf):
        found = {"loss": np.array([loss]), "accuracy": np.array([1.0])}
        monkeypatch.setattr(node_session, "evaluation_sums", lambda *_, found=found: found)
        answer = talk(EvaluateRequest(0, 0))
        assert isinstance(answer, Failed)
        assert "not finite" in answer.reason


def test_the_sums_of_the_run_s_metrics_are_sent(talk: Talk) -> None:
    found = talk(EvaluateRequest(4, 0))
    assert (found.round, found.examples) == (4, 7)
    assert {name: len(sums) for name, sums in found.sums.items()} == {
        "loss": 1,
        "accuracy": 1,
        "macro_f1": 6,
    }
    for name, sums in found.sums.items():
        assert METRICS[name].is_possible(np.array(sums), 7, 2)


def test_frames_out_of_place(recipe: Recipe, mask: Mask, talk: Talk) -> None:
    with pytest.raises(ProtocolError, match="a second setup"):
        talk(setup_of(recipe, mask))
    with pytest.raises(ProtocolError, match="kind 65 has no place"):
        list(talk.client.answer(encode(talk.first)))
    fresh = ClientSession(NodeConfig(0), talk.said.append)
    for frame, line in ((plan(), "plan before the setup"), (SpaceFile(b""), "before the setup")):
        with pytest.raises(ProtocolError, match=line):
            list(fresh.answer(encode(frame)))
    assert fresh.remembered() is None
    for frame in (Welcome(), Refused("too late"), Goodbye("that was all")):
        assert talk(frame) is None
    assert talk.said[-2:] == [
        "client 0 is refused: too late",
        "client 0: the server ends the session: that was all",
    ]


def test_another_version_of_the_server_is_refused(talk: Talk) -> None:
    for version, line in ((1, "version 1 of the protocol, an older one"), (9, "a newer one")):
        frame = encode(plan())
        with pytest.raises(ProtocolError, match=line):
            list(talk.client.answer(frame[:1] + bytes([version]) + frame[2:]))


@pytest.mark.parametrize("rule", [{}, ADAM], ids=["sgd", "adam"])
def test_a_new_process_goes_on_from_what_was_remembered(
    tiny_recipe_data: dict[str, Any], mask: Mask, mask_file: Path, cheap: None, rule: Any
) -> None:
    setup = setup_of(recipe_of(tiny_recipe_data, optimizer=rule), mask)
    talk = Talk(setup, NodeConfig(0, mask=mask_file))
    assert talk.client.remembered() is None, "nothing was done yet"
    report = talk(plan(0, updates(3)))
    kept = talk.client.remembered()
    new_process()
    again = Talk(setup, NodeConfig(0, mask=mask_file))
    again.client.recall(kept)
    assert again(plan(3)) == report
    again(plan(3, updates(1, 3)))
    again.client.recall(kept)
    assert again.worker.position == 4, "what is older is not taken over"
    again.client.recall(encode(Welcome()))


# The handshake


@pytest.mark.parametrize("field", ["model", "space", "noise"])
def test_a_client_that_does_not_fit_says_so_and_does_nothing(
    recipe: Recipe, mask: Mask, mask_file: Path, field: str
) -> None:
    setup = setup_of(recipe, mask, **{field: "00" * 32})
    talk = Talk(setup, NodeConfig(0, mask=mask_file))
    assert isinstance(talk.first, Hello), "the server learns what this client holds"
    (line,) = talk.said
    name = {"model": "base model", "space": "mask", "noise": "noise generator"}[field]
    assert line.startswith(f"client 0 does not fit this run: the client's {name} is ")
    assert "the run's is 000000000000; " in line
    for frame in (plan(), EvaluateRequest(0, 0)):
        answer = talk(frame)
        assert isinstance(answer, Failed)
        assert answer.reason in line
    assert not talk.client._runtime.is_working


def test_a_number_or_recipe_that_does_not_fit(recipe: Recipe, mask: Mask) -> None:
    with pytest.raises(RecipeError, match=r"partition-id = 3 is not one of federation.clients = 3"):
        Talk(setup_of(recipe, mask), NodeConfig(3))
    for text, line in (
        ("{", "not JSON"),
        ("[]", "not JSON of a recipe"),
        ("[" * 100_000, "not JSON"),
        ("{}", "server's recipe"),
        (json.dumps({**json.loads(recipe.to_json()), "surprise": 1}), "surprise"),
    ):
        with pytest.raises((ProtocolError, RecipeError), match=line):
            ClientSession(NodeConfig(0)).begin(replace(setup_of(recipe, mask), recipe=text))


def test_a_node_without_examples_is_refused_on_both_sides(
    recipe: Recipe, mask: Mask, tmp_path: Path
) -> None:
    folders = write_client_folders(recipe, tmp_path / "folders")
    (folders[1] / "train.csv").write_text("text,label\n")
    nodes = [NodeConfig(number, data=folder) for number, folder in enumerate(folders)]
    remote = RemoteRun(recipe, tmp_path / "hosted", mask, nodes)
    remote.run()
    line = "client 1 has no examples; put some into its data folder"
    assert f"client 1 (peer 11) is refused: {line}" in remote.lines
    assert f"client 1 is refused: {line}" in remote.peers.said
    assert {client for _, client, _ in content(remote.out)["reports"]} == {0, 2}


def test_a_node_without_held_out_examples_is_not_asked_for_them(
    recipe: Recipe, mask: Mask, tmp_path: Path, cheap: None
) -> None:
    folders = write_client_folders(recipe, tmp_path / "folders")
    (folders[1] / "test.csv").unlink()
    (folders[2] / "test.csv").write_text("text,label\n")
    nodes = [NodeConfig(number, data=folder) for number, folder in enumerate(folders)]
    remote = RemoteRun(recipe, tmp_path / "hosted", mask, nodes)
    assert remote.run()["evaluated_examples"] == 7
    asked = [peer for peer, frame in remote.peers.sent if isinstance(frame, EvaluateRequest)]
    assert asked == [10, 10]


def test_the_models_place_and_the_threads_are_the_nodes(
    recipe: Recipe, mask: Mask, mask_file: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tiny_folder)
    changed = parse_recipe(json.loads(recipe.to_json()), ['model.name="/not/here"'])
    node = NodeConfig(1, model=str(elsewhere), mask=mask_file, device="cpu", threads=1)
    found = node.recipe(changed.to_json())
    assert (found.model.name, found.runtime.device) == (str(elsewhere), "cpu")
    assert (found.runtime.threads, found.runtime.cache_dir) == (1, None)
    assert Talk(setup_of(changed, mask), node).first.proof == proof_of(mask)
    with pytest.raises(ModelError, match="/not/here"):
        Talk(setup_of(changed, mask), NodeConfig(1, mask=mask_file))
    with pytest.raises(ModelError, match="nowhere"):
        Talk(setup_of(recipe, mask), NodeConfig(1, mask=mask_file, device="nowhere"))


# The mask


def test_the_mask_is_sent_once_and_kept(recipe: Recipe, mask: Mask, tmp_path: Path) -> None:
    setup = setup_of(recipe, mask)
    talk = Talk(setup)
    assert talk.first == WantSpace(mask.fingerprint)
    content = sent_file(mask)
    assert talk(SpaceFile(content)) == Talk(setup).first
    (kept,) = (tmp_path / "cache" / "masks").iterdir()
    assert kept.read_bytes() == content
    bare = load_mask(kept)
    assert (bare.gradient, bare.initial, bare.concentration) == (None, None, None)
    assert bare.digest == mask.digest


@pytest.mark.parametrize("damage", [b"", b"garbage", "other"])
def test_a_mask_that_is_damaged_or_another_is_refused(
    recipe: Recipe, mask: Mask, tmp_path: Path, damage: Any
) -> None:
    content = damage
    if damage == "other":
        other = replace(mask, indices=tuple(np.unique(i // 2) for i in mask.indices))
        content = sent_file(other)
    talk = Talk(setup_of(recipe, mask))
    answer = talk(SpaceFile(content))
    assert isinstance(answer, Failed)
    assert ("the server sent mask" in answer.reason) == (damage == "other")
    assert not list((tmp_path / "cache" / "masks").iterdir())
    assert Talk(setup_of(recipe, mask)).first == WantSpace(mask.fingerprint)


def test_a_kept_mask_that_was_damaged_is_asked_for_again(
    recipe: Recipe, mask: Mask, tmp_path: Path
) -> None:
    setup, content = setup_of(recipe, mask), sent_file(mask)
    Talk(setup)(SpaceFile(content))
    (kept,) = (tmp_path / "cache" / "masks").iterdir()
    kept.write_bytes(content[:-20])
    new_process()
    talk = Talk(setup)
    assert talk.first == WantSpace(mask.fingerprint)
    assert isinstance(talk(SpaceFile(content)), Hello)
    assert kept.read_bytes() == content


def test_a_mask_of_the_operator_is_never_written(
    recipe: Recipe, mask: Mask, mask_file: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.write_bytes(mask_file.read_bytes())
    talk = Talk(setup_of(recipe, mask), NodeConfig(0, mask=own))
    with pytest.raises(ProtocolError, match="mask"):
        talk(SpaceFile(sent_file(mask)))
    assert own.read_bytes() == mask_file.read_bytes()
    assert list(tmp_path.glob("*.part")) == []
    with pytest.raises(MaskError, match="no such file"):
        Talk(setup_of(recipe, mask), NodeConfig(0, mask=tmp_path / "none"))


def test_only_who_lacks_the_mask_gets_it(
    recipe: Recipe, mask: Mask, mask_file: Path, tmp_path: Path, cheap: None
) -> None:
    nodes = [NodeConfig(0), NodeConfig(1, mask=mask_file), NodeConfig(2)]
    remote = RemoteRun(recipe, tmp_path / "hosted", mask, nodes)
    remote.run()
    sent = [peer for peer, frame in remote.peers.sent if isinstance(frame, SpaceFile)]
    assert sent == [10, 12]
    new_process()
    again = RemoteRun(recipe, tmp_path / "again", mask, nodes)
    again.run()
    assert again.peers.count(SpaceFile) == 0
    assert content(again.out) == content(remote.out)


# The settings of a node


def test_settings_of_a_node() -> None:
    config = {
        "partition-id": 2,
        "num-partitions": 5,
        "data": "some/folder",
        "model": "m",
        "mask": "f",
        "device": "cpu",
        "threads": "3",
    }
    given = NodeConfig(2, Path("some/folder"), "m", Path("f"), "cpu", 3)
    assert NodeConfig.of(config, trusted=True) == replace(given, gradients=True)
    # Unless its operator says otherwise, a node loads only what is shipped.
    code = {"allow_functions": (), "allow_template": False}
    shipped = {"allow_models": ("demo:gemma-3-270m",), "allow_sources": ("demo",), **code}
    assert NodeConfig.of(config) == replace(given, **shipped)
    assert NodeConfig.of({"partition-id": "7"}) == NodeConfig(7, **shipped)
    lists = {"allow-models": "org/*, /models/a ,", "allow-sources": "", "most-tokens": "512"}
    models = ("org/*", "/models/a")
    allowed = NodeConfig(7, allow_models=models, allow_sources=(), most_tokens=512, **code)
    assert NodeConfig.of({"partition-id": 7, **lists}) == allowed


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({}, "lacks partition-id"),
        ({"num-partitions": 3}, "lacks partition-id"),
        ({"partition-id": -1}, "partition-id"),
        ({"partition-id": "one"}, "partition-id = 'one' is no int"),
        ({"partition-id": 1.5}, "partition-id = 1.5 is no int"),
        ({"partition-id": True}, "partition-id = True is no int"),
        ({"partition-id": None}, "partition-id = None is no int"),
        ({"partition-id": 0, "threads": "many"}, "threads = 'many' is no int"),
        ({"partition-id": 0, "threads": -2}, "threads"),
        ({"partition-id": 0, "data": 5}, "data = 5 is no "),
        ({"partition-id": 0, "partition": 5}, "partition is not a known setting; known are part"),
    ],
    ids=str,
)
def test_settings_of_a_node_that_are_none(config: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError, match=line) as caught:
        NodeConfig.of(config)
    assert str(caught.value).startswith("--node-config ")
    assert "\n" not in str(caught.value)


# Folders of clients' own data

TEXT = st.text(
    st.one_of(
        st.sampled_from(" \t\n\r\x0b\x0c\x00\x1a\"',;\\#\ufeff\u2028NA0"),
        st.characters(codec="utf-8"),
    ),
    min_size=1,
    max_size=12,
).filter(lambda text: bool(text.strip()))
CLASSES = Task("custom", "", "{text} and {other}", ("a", "b", "c"), ("no", "yes", "may be, 'so'"))
ANSWERS = Task("custom", "", "{text} and {text} and {other}", answer="said")


def written(task: Task, examples: list[Example], folder: Path, name: str = "train") -> None:
    folder.mkdir(exist_ok=True)
    data_clients._write(task, examples, folder / f"{name}.csv")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_text_comes_back_from_a_folder(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    task = data.draw(st.sampled_from([CLASSES, ANSWERS]))
    drawn = data.draw(
        st.lists(
            st.tuples(TEXT, TEXT, TEXT, st.integers(0, 2)),
            min_size=1,
            max_size=4,
            unique_by=lambda row: (row[0].strip().casefold(), row[1].strip().casefold()),
        )
    )
    examples = [
        Example({"text": text, "other": other}, answer=answer)
        if task.answer
        else Example({"text": text, "other": other}, label=label)
        for text, other, answer, label in drawn
    ]
    folder = tmp_path_factory.mktemp("folder")
    written(task, examples, folder)
    assert load_folder(task, folder) == Split(tuple(examples), ())


def test_folders_hold_what_clients_hold(recipe: Recipe, tmp_path: Path) -> None:
    task = resolve_task(recipe.task)
    split, parts = load_partition(recipe, task)
    folders = write_client_folders(recipe, tmp_path / "folders")
    assert [folder.name for folder in folders] == ["client-0", "client-1", "client-2"]
    shown = set()
    for client, folder in enumerate(folders):
        own = load_folder(task, folder)
        assert own.train == tuple(split.train[index] for index in parts[client])
        assert own.test == held_out_shard(recipe, split, client)
        shown |= {example.fields["text"] for example in own.test}
    assert shown == {example.fields["text"] for example in split.test[:20]}
    with pytest.raises(RunError, match="not an empty folder"):
        write_client_folders(recipe, tmp_path / "folders")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="not an empty folder"):
        write_client_folders(recipe, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert len(write_client_folders(recipe, tmp_path / "empty")) == 3


def test_a_client_without_held_out_examples_has_no_file_of_them(
    tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_recipe_data, evaluation={"examples": 2})
    folders = write_client_folders(recipe, tmp_path / "folders")
    assert [(folder / "test.csv").exists() for folder in folders] == [True, True, False]


@pytest.mark.parametrize("missing", ["folder", "train", "two", "two tests"])
def test_a_folder_needs_one_file_of_each(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "data"
    examples = [Example({"text": "a", "other": "b"})]
    if missing != "folder":
        written(CLASSES, examples, folder, "test")
    if missing in ("two", "two tests"):
        written(CLASSES, examples, folder)
        name = "train.jsonl" if missing == "two" else "test.tsv"
        (folder / name).write_text("")
    with pytest.raises(DataError, match=r"it needs one file train .and may have one file test."):
        load_folder(CLASSES, folder)


def test_a_row_that_does_not_fit_is_named(tmp_path: Path) -> None:
    for rows, line in (
        ([["text", "label"], ["a", "no"]], "train row 1: no column 'other'"),
        ([["text", "other", "label"], ["a", "b", "no"], ["c", "d", "so"]], "row 2: label 'so'"),
        ([["text", "other", "label"], ["a", "  ", "no"]], "row 1: column 'other' is empty"),
    ):
        with (tmp_path / "train.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        with pytest.raises(DataError, match=line) as caught:
            load_folder(CLASSES, tmp_path)
        assert str(tmp_path / "train.csv") in str(caught.value)
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        load_folder(CLASSES, tmp_path)


def test_no_text_is_in_both_files(tmp_path: Path) -> None:
    one, two, three = (Example({"text": text, "other": "x"}, 1) for text in ("A b", "c", "d"))
    shouted = replace(one, fields={"text": " a B", "other": "X "})
    written(CLASSES, [one, two, two, three], tmp_path)
    written(CLASSES, [shouted, three], tmp_path, "test")
    assert load_folder(CLASSES, tmp_path) == Split((two,), (shouted, three))


def test_other_kinds_of_files(tmp_path: Path) -> None:
    rows = [{"text": "a\n b", "other": 5, "label": "yes"}, {"text": "c", "other": 1, "label": "no"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.tsv").write_text("text\tother\tlabel\nd, e\tNA\tno\n")
    found = load_folder(CLASSES, tmp_path)
    assert [(e.fields, e.label) for e in found.train] == [
        ({"text": "a\n b", "other": 5}, 1),
        ({"text": "c", "other": 1}, 0),
    ]
    assert [(e.fields, e.label) for e in found.test] == [({"text": "d, e", "other": "NA"}, 0)]
