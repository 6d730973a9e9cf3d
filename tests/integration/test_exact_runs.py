"""Whole runs with exact reports: replay, resume, GradIP, export, bytes, and what they are worth."""

from __future__ import annotations

import csv
import gc
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_mask, make_text_examples, merged, tiny_model
from safetensors.numpy import load_file
from typer.testing import CliRunner

import meerkat
from meerkat.cli import app
from meerkat.config import parse_recipe
from meerkat.federation.messages import ClientReport
from meerkat.federation.rounds import RoundRecord
from meerkat.federation.virtual_path import virtual_path
from meerkat.journal import Journal, replay
from meerkat.journal.records import RoundMetrics
from meerkat.models.objective import TextObjective
from meerkat.runs.directory import journal_path, mask_of
from meerkat.runs.events import RunObserver
from meerkat.spaces.masked import MaskedSpace
from meerkat.zo.axes import axis_length

K = 4
BACKWARD = {"optimizer": {"estimator": "backward"}}
MIXED = {"optimizer": {"exact_clients": [0, 2]}}
FORWARD = {"optimizer": {"estimator": "forward-mode"}}
RULES: dict[str, dict[str, Any]] = {
    "backward": BACKWARD,
    "backward, momentum": {"optimizer": {"estimator": "backward", "rule": "momentum"}},
    "backward, adam": {"optimizer": {"estimator": "backward", "rule": "adam"}},
    "mixed": MIXED,
    "mixed, adam": {"optimizer": {"exact_clients": [0, 2], "rule": "adam"}},
    "mixed, per client": merged(MIXED, noise={"directions": "per-client", "perturbations": 2}),
    "mixed, trimmed": merged(
        MIXED,
        federation={"aggregator": "trimmed-mean", "transforms": [{"kind": "clip", "bound": 1}]},
    ),
    "forward-mode": FORWARD,
}


@pytest.fixture
def data(tiny_recipe_data: dict, sentences_file: Path, tmp_path: Path) -> dict[str, Any]:
    corpus = shutil.copy(sentences_file, tmp_path / "sentences.txt")
    subspace = {"dimensions": K, "texts": 12, "corpus": str(corpus)}
    rates = {"learning_rate": 0.1, "epsilon": 0.1}
    return merged(tiny_recipe_data, subspace=subspace, optimizer=rates)


def run(data: dict[str, Any], out: Path, **sections: Any) -> dict[str, Any]:
    return meerkat.run(parse_recipe(merged(data, **sections)), out, observers=())


def opened(out: Path) -> Journal:
    return Journal.open(journal_path(out), audit=True)


def reports_of(journal: Journal) -> list[ClientReport]:
    return [report for record, _ in journal.records() for report in record.reports]


@pytest.mark.parametrize("name", RULES)
def test_the_journal_gives_the_live_state_at_every_round(
    data: dict, tmp_path: Path, name: str
) -> None:
    found = run(data, tmp_path / "a", **RULES[name])
    assert run(data, tmp_path / "b", **RULES[name])["state_digest"] == found["state_digest"]
    with closing(opened(tmp_path / "a")) as journal:
        assert replay(journal, audit=True).digest == found["state_digest"]
        digests = {replay(journal, rounds).digest for rounds in range(journal.rounds + 1)}
        assert len(digests) == journal.rounds + 1
        assert {r.along for r in reports_of(journal)} == (
            {"axes"}
            if "backward" in name
            else {"drawn"}
            if name == "forward-mode"
            else {"axes", "drawn"}
        )
    assert np.abs(meerkat.replay(tmp_path / "a").theta).min() > 0


class _Stop(RunObserver):
    """Interrupts a run as Ctrl-C does, after so many rounds."""

    def __init__(self, after: int):
        self._after = after

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if record.round + 1 == self._after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["backward, adam", "mixed", "mixed, per client"])
def test_a_run_goes_on_where_it_was_interrupted(data: dict, tmp_path: Path, name: str) -> None:
    sections = merged(RULES[name], federation={"clients_per_round": 2, "rounds": 6})
    whole = run(data, tmp_path / "whole", **sections)
    for after in (1, 3):
        out = tmp_path / f"run{after}"
        with pytest.raises(KeyboardInterrupt):
            meerkat.run(parse_recipe(merged(data, **sections)), out, observers=[_Stop(after)])
        assert meerkat.resume(out, observers=())["state_digest"] == whole["state_digest"]
        with closing(opened(out)) as one, closing(opened(tmp_path / "whole")) as other:
            assert [record for record, _ in one.records()] == [r for r, _ in other.records()]


def test_bytes_are_what_is_encoded(data: dict, tmp_path: Path) -> None:
    """Two steps a round: a head of 24 bytes, and four for each number."""
    sizes = {
        name: run(data, tmp_path / str(n), **RULES[name])["bytes_up_per_client_round"]
        for n, name in enumerate(("backward", "mixed", "forward-mode"))
    }
    exact, drawn = 24 + 4 * K * 2, 24 + 4 * 2
    assert sizes == {
        "backward": exact,
        "mixed": (2 * exact + drawn) / 3,
        "forward-mode": drawn,
    }
    with closing(opened(tmp_path / "0")) as journal:
        down = [metrics.bytes_down for _, metrics in journal.records()]
    assert down == [3 * 24] + [3 * (24 + 2 * (24 + 8 * (K - 1)))] * 3


@pytest.mark.parametrize("name", ["backward", "mixed"])
def test_virtual_paths_start_and_end_where_the_round_does(
    data: dict, tmp_path: Path, name: str
) -> None:
    """With SGD the mean of the paths' ends, each counted by its weight, is the next state."""
    run(data, tmp_path / "run", **merged(RULES[name], federation={"clip_factor": 0.0}))
    r = 1 / K  # directions of a subspace are orthogonal by default
    with closing(opened(tmp_path / "run")) as journal:
        algorithm = journal.header.algorithm
        for record, _ in journal.records():
            state, total, ends = replay(journal, record.round), 0.0, np.zeros(K)
            for report in record.reports:
                *_, end = virtual_path(state, record.updates[0].learning_rate, report, algorithm)
                weight = 1.0 if report.along == "axes" else r
                ends += weight * end.theta.astype(np.float64)
                total += weight
            after = replay(journal, record.round + 1).theta
            np.testing.assert_allclose(after, ends / total, rtol=1e-4, atol=1e-6)


def test_gradip_reads_exact_and_drawn_paths(data: dict, tmp_path: Path) -> None:
    selection = {"kind": "gradip", "calibration_steps": 6, "signal": "gradip"}
    found = run(data, tmp_path / "run", **merged(MIXED, selection=selection))
    table = tmp_path / "gradip.csv"
    paths = meerkat.gradip(tmp_path / "run", to=table).paths
    assert [(path.client, path.steps) for path in paths] == [(0, 6), (1, 6), (2, 6)]
    with table.open() as file:
        rows = {(row["client"], row["round"], row["step"]): row for row in csv.DictReader(file)}
    with closing(opened(tmp_path / "run")) as journal:
        p = mask_of(tmp_path / "run", journal).direction_gradient
        assert p is not None
        scale = float(axis_length(K))
        for report in [*journal.calibrations(), *reports_of(journal)]:
            if report.along == "drawn":
                continue
            number = report.round if report.round < 2**32 - 1 else "calibration"
            for step in range(report.steps):
                g = np.array(report.scalars[step * K : (step + 1) * K]) / K * scale
                row = rows[str(report.client), str(number), str(step)]
                assert float(row["gradip"]) == pytest.approx(g @ p.astype(float), rel=1e-9)
                assert float(row["norm"]) == pytest.approx(np.linalg.norm(g), rel=1e-9)
        assert {r.along for r in journal.calibrations()} == {"axes", "drawn"}
    # A backward pass has one forward pass, a two-point estimate two.
    assert found["calibration_forward_passes"] == 6 * (1 + 2 + 1)


def test_a_run_with_exact_reports_is_exported(data: dict, tmp_path: Path) -> None:
    run(data, tmp_path / "run", **BACKWARD)
    meerkat.export(tmp_path / "run", tmp_path / "delta.safetensors", delta=True)
    with closing(opened(tmp_path / "run")) as journal:
        mask = mask_of(tmp_path / "run", journal)
    expected = mask.weights(meerkat.replay(tmp_path / "run").theta)
    assert np.array_equal(load_file(tmp_path / "delta.safetensors")["theta"], expected)
    assert not np.array_equal(expected, mask.initial)


def test_a_report_is_written_for_a_mixed_run(data: dict, tmp_path: Path) -> None:
    selection = {"kind": "gradip", "calibration_steps": 6}
    meerkat.run(parse_recipe(merged(data, **MIXED, selection=selection)), tmp_path / "run")
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    for command in (["report"], ["gradip"], ["replay", "--audit"]):
        done = CliRunner().invoke(app, [command[0], str(tmp_path / "run"), *command[1:]])
        assert done.exit_code == 0, done.output


def test_the_exact_gradient_learns_more_than_a_direction(data: dict, tmp_path: Path) -> None:
    """At its own rate: one step of each is worth less with the noise of one direction."""
    federation = {"rounds": 12, "local_steps": 1}
    losses = {}
    for n, (name, rate) in enumerate((("backward", 0.5), ("forward-mode", 0.1))):
        sections = merged(RULES[name], federation=federation, optimizer={"learning_rate": rate})
        found = run(data, tmp_path / str(n), **sections)
        losses[name] = found["before"]["loss"] - found["after"]["loss"]
    assert losses["backward"] > max(losses["forward-mode"], 0)


KILLED = """
import os, signal, sys
import meerkat
from meerkat.config import load_recipe
from meerkat.runs.events import RunObserver


class Killer(RunObserver):
    def round_closed(self, record, metrics):
        if record.round == 1:
            os.kill(os.getpid(), signal.SIGKILL)


meerkat.run(load_recipe(sys.argv[1]), sys.argv[2], observers=[Killer()])
"""


@pytest.mark.slow
def test_a_mixed_run_that_was_killed_has_the_same_result(data: dict, tmp_path: Path) -> None:
    mixed = merged(data, **RULES["mixed, adam"])
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(mixed))
    whole = run(mixed, tmp_path / "whole")
    done = subprocess.run([sys.executable, "-c", KILLED, recipe, tmp_path / "run"])
    assert done.returncode == -signal.SIGKILL
    with closing(opened(tmp_path / "run")) as journal:
        assert journal.rounds == 2
    again = meerkat.resume(tmp_path / "run", observers=())
    assert again["state_digest"] == whole["state_digest"]


def test_activations_are_freed_part_by_part() -> None:
    """A batch in many parts keeps the tensors of one: the memory that backward takes is bounded."""

    def peak(tokens: int) -> int:
        kept, largest = 0, 0
        loaded = tiny_model("llama")
        space = MaskedSpace(loaded.model, make_mask(loaded, 100))
        objective = TextObjective(loaded, tokens)

        def pack(tensor: torch.Tensor) -> _Kept:
            nonlocal kept, largest
            kept += tensor.nbytes
            largest = max(largest, kept)
            return _Kept(tensor, freed)

        def freed(size: int) -> None:
            nonlocal kept
            kept -= size

        examples = make_text_examples(40)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            space.gradient(objective.losses_with_graph(examples), 40)
        gc.collect()
        assert kept == 0
        return largest

    assert peak(60) < peak(10_000) / 3


class _Kept:
    """A tensor that autograd keeps for a backward pass; it tells when it is freed."""

    def __init__(self, tensor: torch.Tensor, freed: Callable[[int], None]):
        self.tensor, self._freed = tensor, freed

    def __del__(self) -> None:
        self._freed(self.tensor.nbytes)
