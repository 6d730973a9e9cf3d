"""A server is installed alone: no torch, no transformers, no pictures, and it works."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = ("torch", "transformers", "datasets", "altair", "vl_convert", "pandas")
PROGRAM = """
import importlib.util, pathlib, pkgutil, sys
import numpy as np
absent = sys.argv[2:]
assert not [name for name in absent if importlib.util.find_spec(name)], "something is installed"

import meerkat, meerkat.flower.server_app, meerkat.runs.remote_run, meerkat.transport.stream
from meerkat.config import parse_recipe
from meerkat.federation.messages import DIGEST_BYTES, ClientReport
from meerkat.federation.rounds import close_round, plan_round
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import initial_state
from meerkat.journal import Journal
from meerkat.journal.records import RoundMetrics, header_of
from meerkat.spaces.mask_file import Mask
from meerkat.zo.log import Log

recipe = parse_recipe({"model": {"name": "m"}, "task": {"name": "sst2"},
                       "federation": {"clients": 2, "rounds": 3}})
theta = np.linspace(-1, 1, 50, dtype=np.float32)
mask = Mask(("w",), ((100,),), (np.arange(50),), 100, "ab" * 32, "random", initial=theta)
header = header_of(recipe, mask, ("a", "b"), [], "")
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
journal = Journal.create(folder / "journal.sqlite", header, theta)
algorithm, schedule, log = header.algorithm, Schedule.of(recipe), Log()
state = initial_state(algorithm.init(theta), 2, 1)
for _ in range(3):
    plans, mark = plan_round(schedule, state, log), bytes.fromhex(state.model.digest)[:DIGEST_BYTES]
    reports = [ClientReport(state.round, k, 9, 1, 1, mark, (0.5 * k - 1,)) for k in plans]
    state, record = close_round(schedule, state, algorithm, plans, reports, log)
    log.append(record.updates)
    journal.append_round(record, RoundMetrics(float("nan"), 0, 0, 0.0))
journal.close()
print(state.model.digest)
"""


@pytest.mark.slow
def test_a_server_is_installed_without_torch(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
        )

    constraints = ROOT / "constraints.txt"
    install = ("-m", "pip", "install", "-q", "--constraint", constraints, f"{ROOT}[server]")
    installed = run(*install)
    assert installed.returncode == 0, installed.stderr[-2000:]

    worked = run("-c", PROGRAM, tmp_path / "run", *ABSENT)
    assert worked.returncode == 0, worked.stderr
    replayed = run("-m", "meerkat", "replay", tmp_path / "run", "--digest")
    assert replayed.stdout.split() == worked.stdout.split()

    # What it cannot do says which extra it needs.
    for arguments, extra in (
        (("report", tmp_path / "run"), "report"),
        (("run", ROOT / "recipes" / "demo.toml", "--out", tmp_path / "other"), "train"),
    ):
        refused = run("-m", "meerkat", *arguments)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert f"pip install 'meerkat-fl[{extra}]'" in refused.stderr
