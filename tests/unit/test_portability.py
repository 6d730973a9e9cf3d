"""What differs between systems: cores, GPUs, the locale's encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meerkat.benchmarks import machine
from meerkat.flower import simulation


def test_cores_where_the_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert simulation._cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert simulation._cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert simulation._cores() == 1


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("GPU-1a, GPU-2b", 2)]
)
def test_gpus_are_those_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert simulation._gpus() == count


def test_peak_memory_without_the_resource_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_STATUS", Path("/nowhere"))
    assert machine.peak_bytes() > 0
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_bytes() == 0


def test_a_recipe_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from meerkat.config import parse_recipe
from meerkat.runs.directory import claimed, recipe_of
prompt = "{text} C\\u2019\\u00e9tait \\u4e0d\\u9519"
recipe = parse_recipe({"model": {"name": "m"}, "task": {"name": "sst2", "prompt": prompt},
                       "federation": {"clients": 1, "rounds": 1}})
directory = Path(sys.argv[1])
with claimed(directory, recipe):
    assert recipe_of(directory).task.prompt == prompt
(directory / "copy").write_text("x")  # the locale is in force: this would not be UTF-8
"""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
