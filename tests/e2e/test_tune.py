"""`meerkat tune` as a user calls it: killed in the middle, called again; what it refuses."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import merged
from commands import invoke, meerkat_process, refused, toml_of

from meerkat.config import load_recipe
from meerkat.journal import Journal

RATES = "optimizer.learning_rate=[0.001, 0.01, 0.03, 1e6]"
PASSES = 6000


@pytest.fixture
def recipe(tiny_recipe_data: dict[str, Any], tmp_path: Path) -> Path:
    data = merged(
        tiny_recipe_data, federation={"rounds": 60, "local_steps": 1}, evaluation={"examples": 12}
    )
    path = tmp_path / "tiny.toml"
    path.write_text(toml_of(data))
    return path


def rounds_of(out: Path) -> dict[str, int]:
    found = {}
    for path in sorted(out.glob("trials/*/journal.sqlite")):
        with closing(Journal.open(path)) as journal:
            found[path.parent.name[:2]] = journal.rounds
    return found


@pytest.mark.slow
def test_killed_and_called_again_no_rung_is_made_twice(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["tune", recipe, "--out", out, "--jobs", 2, "--passes", PASSES, "--try", RATES]
    command += ["--validation", 8, "--set", "seed=3"]
    process = meerkat_process(*command)
    deadline = time.monotonic() + 900  # a busy machine
    while len(list(out.glob("trials/*/summary.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(2)  # its worker ends with it, in the midst of a trial
    done = {path: path.stat().st_mtime_ns for path in sorted(out.glob("trials/*/summary.json"))}
    said = invoke(*command)
    assert said.exit_code == 0, said.output
    made = rounds_of(out)
    for path, written in done.items():  # a rung that was done is not made again
        untouched = path.stat().st_mtime_ns == written
        assert untouched or made[path.parent.name[:2]] == max(made.values())

    table = (out / "trials.md").read_text()
    assert table in said.stdout
    rows = [line for line in table.splitlines() if line.startswith("| optimizer")]
    assert len(rows) == 4
    assert sum("| chosen |" in row for row in rows) == 1
    assert "above that of its start" in rows[3] or "diverged" in rows[3]
    # Of four trials at most two go on, each to the end of its second rung.
    rounds = sorted(made.values())
    assert rounds[0] < rounds[3]
    assert rounds[1] < rounds[3]
    assert rounds[2] in (rounds[0], rounds[3])
    paid = [int(row.split("|")[-3].replace(",", "")) for row in rows]
    assert sum(paid) <= PASSES

    tuned = load_recipe(out / "tuned.toml")
    assert tuned.seed == 3
    assert tuned.learning_rate in (0.001, 0.01, 0.03)
    # Nothing but what was tried and set is changed, and it runs.
    asked = load_recipe(recipe, ["seed=3", f"optimizer.learning_rate={tuned.learning_rate}"])
    assert tuned == asked
    short = ["--set", "federation.rounds=1", "--out", tmp_path / "run"]
    assert invoke("run", out / "tuned.toml", *short).exit_code == 0


def test_what_cannot_be_tuned_is_refused_in_one_line(
    recipe: Path, tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "out"]
    for options, parts in (
        (["--passes", 100], ("--passes 100", "raise it")),
        (["--try", "seed"], ("--try 'seed'", "section.field=[value, value]")),
        (["--try", "federation.local_steps=[1]"], ("one trial alone",)),
        (["--try", "federation.local_steps=[1, 0]"], ("federation.local_steps = 0",)),
        (["--set", "subspace.dimensions=4"], ("follows from [subspace]", "--try")),
        (["--passes", 9000, "--to", recipe, "--validation", 8], ("is the recipe itself",)),
    ):
        refused(invoke("tune", recipe, *out, *options), *parts)
    bad = ["--try", "optimizer.learning_rate=[1e6, 1e7]", "--passes", 2000, "--validation", 8]
    refused(invoke("tune", recipe, *out, *bad, "--jobs", 2), "no trial got better", "--try")
