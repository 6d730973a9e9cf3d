"""Validation as a user sees it: the best round by name, patience, kills, refusals in one line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import merged
from commands import invoke, meerkat_process, refused, toml_of
from journals import content
from safetensors.numpy import load_file

from meerkat.journal import Journal

SCRIPTED = """
import os, signal, sys
import meerkat.runs.local_run as local_run
from meerkat.cli import app
from meerkat.journal import Journal

fatal, moment, *command = sys.argv[1:]
evaluate, append = local_run.evaluate_objective, Journal.append_evaluation


def scripted(*arguments, **options):
    found = evaluate(*arguments, **options)
    better = found.round <= 4
    found.metrics["validation_accuracy"] = 0.1 * found.round if better else 0.3
    return found


def appended(journal, found):
    if found.round == int(fatal) and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    append(journal, found)
    if found.round == int(fatal):
        os.kill(os.getpid(), signal.SIGKILL)


local_run.evaluate_objective, Journal.append_evaluation = scripted, appended
app(command)
"""
"""A command whose validation is best after 4 rounds; SIGKILL around one of its evaluations."""


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any]) -> dict[str, Any]:
    evaluation = {"examples": 12, "validation": 8, "every": 2, "patience": 2}
    return merged(tiny_recipe_data, federation={"rounds": 30}, evaluation=evaluation)


@pytest.fixture
def recipe(data: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(toml_of(data))
    return path


def scripted(fatal: int, moment: str, *command: object) -> subprocess.CompletedProcess[str]:
    arguments = [str(fatal), moment, *map(str, command)]
    return subprocess.run(
        [sys.executable, "-c", SCRIPTED, *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_run_that_is_killed_ends_by_the_same_patience(recipe: Path, tmp_path: Path) -> None:
    """Kill -9 before and after evaluations, the deciding one among them."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    done = scripted(-1, "never", "run", recipe, "--out", whole)
    assert done.returncode == 0, done.stderr
    assert "best round" in done.stdout
    assert "8 of 30; then no better" in done.stdout
    assert "Fine-tuning: 24 of 24" in done.stderr
    command: list[object] = ["run", recipe, "--out", out]
    for fatal, moment in ((2, "after"), (6, "before"), (8, "before"), (8, "after")):
        killed = scripted(fatal, moment, *command)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        command = ["resume", out]
    with closing(Journal.open(out / "journal.sqlite")) as journal:
        assert journal.rounds == 8
    assert not (out / "summary.json").exists()
    assert invoke("resume", out).exit_code == 0
    assert content(out) == content(whole)
    one, other = (json.loads((path / "summary.json").read_text()) for path in (whole, out))
    assert (one["rounds"], one["best_round"]) == (other["rounds"], other["best_round"]) == (8, 4)
    assert one["state_digest"] == other["state_digest"]

    # The best round is that of its number, for every command that takes one.
    digests = {
        name: invoke("replay", out, "--round", name, "--digest").stdout.strip()
        for name in ("4", "best", "8")
    }
    assert digests["best"] == digests["4"] != digests["8"]
    shown = [invoke("evaluate", out, "-r", name, "--json").stdout for name in ("4", "best")]
    assert shown[0] == shown[1]
    assert json.loads(shown[0])["examples"] == 12
    validation = json.loads(invoke("evaluate", out, "--split", "validation", "--json").stdout)
    assert (validation["split"], validation["examples"]) == ("validation", 8)
    for name in ("4", "best"):
        to = tmp_path / f"{name}.delta"
        assert invoke("export", out, "--to", to, "--delta", "--round", name).exit_code == 0
    thetas = [load_file(tmp_path / f"{name}.delta")["theta"] for name in ("4", "best")]
    assert thetas[0].tobytes() == thetas[1].tobytes()
    assert invoke("report", out).exit_code == 0
    assert "validation accuracy" in (out / "report.html").read_text()


def test_what_cannot_be_is_refused_in_one_line(
    data: dict[str, Any], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    few = ["--set", "evaluation.validation=9"]
    refused(
        invoke("run", recipe, "--out", out, *few),
        "evaluation.validation = 9: of 20 held-out examples evaluation.examples = 12 leaves 8",
    )
    refused(
        invoke("run", recipe, "--out", out, "--set", "task.validation_split=validation"),
        "task.validation_split = 'validation'",
        "is one file, which has one split",
    )
    never = ["--set", "evaluation.validation=0"]
    refused(invoke("run", recipe, "--out", out, *never), "evaluation.patience = 2 needs")
    assert not out.exists()
    plain = [*never, "--set", "evaluation.patience=0", "--set", "federation.rounds=1"]
    assert invoke("run", recipe, "--out", out, *plain).exit_code == 0
    for command in (["replay"], ["evaluate"], ["export", "--to", tmp_path / "to"]):
        refused(
            invoke(command[0], out, *command[1:], "--round", "best"),
            "--round best",
            "has no validation score to choose by (evaluation.validation = 0)",
        )
    refused(invoke("evaluate", out, "--split", "validation"), "--split validation")
    refused(invoke("evaluate", out, "--split", "dev"), "it is test, validation or train")
    for wrong in ("-1", "last", "1.5"):
        result = invoke("replay", out, "--round", wrong)
        assert result.exit_code == 2
        assert "neither a number of rounds nor best" in re.sub(r"[│\s]+", " ", result.stderr)


@pytest.mark.slow
def test_a_simulation_over_flower_ends_like_the_local_run(recipe: Path, tmp_path: Path) -> None:
    local, out = tmp_path / "local", tmp_path / "simulated"
    assert invoke("run", recipe, "--out", local).exit_code == 0
    process = meerkat_process("run", recipe, "--out", out, "--engine", "flower")
    printed, _ = process.communicate(timeout=480)
    assert process.returncode == 0, printed
    found, expected = (json.loads((path / "summary.json").read_text()) for path in (out, local))
    for figure in ("rounds", "best_round", "state_digest", "evaluated_examples", "fingerprint"):
        assert found[figure] == expected[figure]
    assert found["best"] == pytest.approx(expected["best"], rel=1e-6)
    assert invoke("resume", out).exit_code == 0
