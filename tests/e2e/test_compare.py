"""`meerkat compare` as a user calls it: killed in the middle, and called again."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from builders import merged
from commands import invoke, meerkat_process, refused

GRID = """
recipe = "base.json"
methods = ["meerkat", "momentum"]
passes = 256
seeds = [1, 2]
[search]
validation = 8
rates = { meerkat = [1e-3, 1e-2] }
[method.momentum]
title = "momentum"
settings = { "optimizer.rule" = "momentum" }
rates = [1e-3]
"""


@pytest.fixture
def grid(tiny_recipe_data: dict, tmp_path: Path) -> Path:
    sections = {"federation": {"batch_size": 16}, "evaluation": {"examples": 12}}
    (tmp_path / "base.json").write_text(json.dumps(merged(tiny_recipe_data, **sections)))
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


@pytest.mark.slow
def test_killed_and_called_again_no_finished_cell_is_made_twice(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = meerkat_process("compare", grid, "--out", out, "--jobs", 2)
    deadline = time.monotonic() + 120
    while len(list(out.glob("cells/**/summary.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(3)  # its workers end with it, in the midst of a cell
    done = {path: path.stat().st_mtime_ns for path in out.glob("cells/**/summary.json")}
    assert 2 <= len(done) < 6
    said = invoke("compare", grid, "--out", out, "--jobs", 2)
    assert said.exit_code == 0, said.output
    assert "Meerkat" in said.stdout
    assert "momentum" in said.stdout
    assert f"wrote {out / 'table.md'}" in said.stdout
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(out.glob("cells/**/summary.json"))) == 2 + 2 + 2
    table = (out / "table.md").read_text()
    again = invoke("compare", grid, "--out", out, "--tables")
    assert again.exit_code == 0
    assert (out / "table.md").read_text() == table


@pytest.mark.slow
def test_a_worker_that_is_killed_is_said(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["compare", grid, "--out", out, "--jobs", 1]
    command += ["--set", 'methods=["meerkat"]', "--set", "seeds=[1]"]
    process = meerkat_process(*command)
    deadline = time.monotonic() + 120
    workers: list[int] = []
    while not workers:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
        if list(out.glob("cells/**/journal.sqlite")):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            found = [int(child) for child in children.split()]
            named = {child: Path(f"/proc/{child}/cmdline").read_text() for child in found}
            workers = [child for child, name in named.items() if "spawn_main" in name]
    os.kill(workers[0], signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 2
    assert "its process was killed" in said
    assert "Traceback" not in said
    assert invoke(*command).exit_code == 0


def test_what_is_wrong_is_one_line(grid: Path, tmp_path: Path) -> None:
    refused(invoke("compare", tmp_path / "none.toml"), "grid", "no such file")
    refused(invoke("compare", grid, "--set", "methods=['lion']"), "reference")
    refused(invoke("compare", grid, "--set", "passes=1"), "passes = 1 is less than a round takes")
    refused(invoke("compare", grid, "--out", tmp_path / "out", "--tables"), "leave out --tables")
