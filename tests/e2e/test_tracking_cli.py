"""`[tracking]` on the command line: a run that is killed at any moment, and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import merged
from commands import invoke, toml_of

KILLED = """
import os, signal, sys
from meerkat.cli import app
from meerkat.journal import Journal

append = Journal.append_round


def appended(journal, record, metrics):
    append(journal, record, metrics)
    if record.round == 2:
        os.kill(os.getpid(), signal.SIGKILL)


Journal.append_round = appended
app(sys.argv[1:])
"""
"""A command whose process is killed once the third round is in the journal, and told to nobody."""


@pytest.mark.slow
def test_event_files_of_a_run_that_was_killed(
    tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    tracking = {"to": ["tensorboard"]}
    recipe.write_text(toml_of(merged(tiny_recipe_data, tracking=tracking)))
    command = [sys.executable, "-c", KILLED, "run", str(recipe), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = invoke("resume", out)
    assert resumed.exit_code == 0, resumed.output
    found = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in found.Scalars("eval/loss")] == [0, 4]
    assert len(found.Scalars("summary/rounds")) == 1
    assert invoke("resume", out).exit_code == 0  # complete: nothing is told again
    again = EventAccumulator(str(out / "tensorboard")).Reload()
    assert len(again.Scalars("summary/rounds")) == 1
