"""The application that commands register with, the options that several have, and their errors."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from meerkat.errors import MeerkatError
from meerkat.terminal.progress_bar import quiet_libraries

__all__ = [
    "BenchKind",
    "DirectoryArgument",
    "EngineKind",
    "Overrides",
    "RecipeArgument",
    "RoundOption",
    "app",
    "command",
    "console",
    "main",
]

app = typer.Typer(
    help="Fine-tune a language model over clients that cannot share their data: two forward passes "
    "on a client give one number, and that number is all it sends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(highlight=False, soft_wrap=True)

RecipeArgument = Annotated[Path, typer.Argument(help="The run's recipe, a TOML file.")]
DirectoryArgument = Annotated[Path, typer.Argument(help="The directory of a run.", metavar="DIR")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a field of the recipe, such as federation.rounds=20; may be repeated.",
    ),
]


def _rounds(value: str) -> int | Literal["best"]:
    if value == "best":
        return "best"
    if not (value.isascii() and value.isdecimal()):
        raise typer.BadParameter(f"{value!r} is neither a number of rounds nor best")
    return int(value)


RoundOption = Annotated[
    Any,
    typer.Option(
        "--round",
        "-r",
        parser=_rounds,
        metavar="N|best",
        help="After so many rounds, or with the best validation score; all by default.",
    ),
]


class BenchKind(StrEnum):
    """What `meerkat bench` measures."""

    step = "step"
    server = "server"
    noise = "noise"


class EngineKind(StrEnum):
    """Who runs the clients."""

    local = "local"
    flower = "flower"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose `MeerkatError` is one line and exit code 2."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        quiet_libraries()
        try:
            function(*args, **kwargs)
        except MeerkatError as error:
            fail(" ".join(str(error).split()))
        except OSError as error:
            fail(f"{error.filename or 'file'}: {error.strerror or error}")
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            fail(
                "out of memory; lower federation.batch_size, task.max_length or "
                "runtime.tokens_per_pass. Rounds that are in the journal are kept: `meerkat resume`"
            )
        except KeyboardInterrupt:
            fail(
                "interrupted; a run goes on with `meerkat resume DIR`, a comparison as it began",
                130,
            )

    return app.command()(guarded)


def _is_out_of_memory(error: Exception) -> bool:
    """torch reports it as a RuntimeError, by its class on CUDA and by its text on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text


def fail(line: str, code: int = 2) -> None:
    print(f"meerkat: {line}", file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the `meerkat` command."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    app()
