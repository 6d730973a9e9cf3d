"""Commands as a user types them: in this process, or in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from meerkat.cli import app

_PROGRESS = ("Loading", "Calibrating", "Evaluating", "Fine-tuning", "Trials")


def toml_of(data: dict[str, Any]) -> str:
    """Enough TOML for a recipe: JSON's scalars, lists and strings are TOML's."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{k} = {inline(v)}" for k, v in value.items()) + " }"
        if isinstance(value, list):
            return f"[{', '.join(map(inline, value))}]"
        return json.dumps(value)

    top = [f"{k} = {inline(v)}" for k, v in data.items() if not isinstance(v, dict)]
    for section, fields in data.items():
        if isinstance(fields, dict):
            top += [f"[{section}]", *(f"{k} = {inline(v)}" for k, v in fields.items())]
    return "\n".join(top) + "\n"


def invoke(*arguments: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def meerkat_process(*arguments: object) -> subprocess.Popen[str]:
    """The installed command, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "meerkat", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def refused(result: Result, *parts: str) -> None:
    """Exit code 2 and one line on stderr that names what was wrong."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if not line.startswith(_PROGRESS)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("meerkat: ")
    for part in parts:
        assert part in lines[0]
