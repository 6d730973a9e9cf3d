"""Commands; no logic. Each calls the function of the same name in `meerkat.api`."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from meerkat.errors import MeerkatError
from meerkat.terminal.progress_bar import Bar, quiet_libraries
from meerkat.terminal.tables import (
    figures_table,
    gradip_table,
    mask_table,
    plan_table,
    summary_table,
)

__all__ = ["app", "main"]

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


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose `MeerkatError` is one line and exit code 2."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        quiet_libraries()
        try:
            function(*args, **kwargs)
        except MeerkatError as error:
            _fail(" ".join(str(error).split()))
        except OSError as error:
            _fail(f"{error.filename or 'file'}: {error.strerror or error}")
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            _fail(
                "out of memory; lower federation.batch_size, task.max_length or "
                "runtime.tokens_per_pass. Rounds that are in the journal are kept: `meerkat resume`"
            )
        except KeyboardInterrupt:
            _fail("interrupted; a run goes on with `meerkat resume DIR`", 130)

    return app.command()(guarded)


def _is_out_of_memory(error: Exception) -> bool:
    """torch reports it as a RuntimeError, by its class on CUDA and by its text on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text


def _fail(line: str, code: int = 2) -> None:
    print(f"meerkat: {line}", file=sys.stderr)
    raise typer.Exit(code)


@_command
def calibrate(
    recipe: RecipeArgument,
    out: Annotated[Path | None, typer.Option(help="Write the mask to this file.")] = None,
    overrides: Overrides = None,
) -> None:
    """Find the mask: the parameters to which the pre-training loss is most sensitive."""
    from meerkat import api

    with Bar() as progress:
        found = api.calibrate(recipe, out, overrides or (), progress)
    for line in mask_table(found):
        console.print(line)


@_command
def compare(
    grid: Annotated[Path, typer.Argument(help="The grid, a TOML file.", metavar="GRID")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where runs and tables go; by default under comparisons/."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the grid."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; 0 goes by the cores.", min=0)] = 0,
    only_tables: Annotated[
        bool, typer.Option("--tables", help="Make no run; tables of those that are there.")
    ] = False,
) -> None:
    """Run methods on the same cases with the same budget, and put them in one table."""
    from meerkat import api

    with Bar() as progress:
        found = api.compare(grid, out, overrides or (), jobs, only_tables, progress)
    from meerkat.comparison.tables import as_terminal

    console.print(as_terminal(found.rows, found.reference))
    for path in found.written:
        console.print(f"wrote {path}")


@_command
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load model and data, and time a few passes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run will need before it is made: memory, disk, bytes, passes, time."""
    from meerkat import api

    with Bar() as progress:
        found = api.plan(recipe, overrides or (), measure, progress)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        console.print(plan_table(found.as_dict()))


@_command
def recalibrate(
    directory: DirectoryArgument,
    corpus: Annotated[
        Path | None,
        typer.Option(help="A text file that texts come from now; as the recipe says by default."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Make what is due now, and stop.")] = False,
) -> None:
    """Renew a run's subspace whenever its server, which has no model, waits for that."""
    from meerkat import api

    def say(path: Path) -> None:
        console.print(f"wrote {path}")

    with Bar() as progress:
        api.recalibrate(directory, corpus, once, say, progress)


@_command
def run(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's directory; by default under runs/.", metavar="DIR"),
    ] = None,
    overrides: Overrides = None,
    engine: Annotated[
        EngineKind | None,
        typer.Option(help="Who runs the clients: this process, or Flower's simulation."),
    ] = None,
) -> None:
    """Fine-tune as the recipe says; write journal, summary and report to a directory."""
    from meerkat import api
    from meerkat.config import load_recipe

    changes = [*(overrides or ()), *([f"runtime.engine={engine.value}"] if engine else [])]
    parsed = load_recipe(recipe, changes)
    directory = out or api.default_out(recipe, parsed)
    with Bar() as progress:
        summary = api.run(parsed, directory, progress=progress)
    console.print(summary_table(summary, directory))


@_command
def resume(
    directory: DirectoryArgument,
    recover: Annotated[
        bool,
        typer.Option("--recover", help="Keep the good part of a damaged journal and go on."),
    ] = False,
) -> None:
    """Go on with a run after any interruption."""
    from meerkat import api

    with Bar() as progress:
        summary = api.resume(directory, recover, progress)
    console.print(summary_table(summary, directory))


@_command
def split(
    recipe: RecipeArgument,
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the examples of each client to a folder of its own, to try a deployment."""
    from meerkat import api

    for folder in api.split(recipe, to, overrides or ()):
        console.print(f"wrote {folder}")


@_command
def replay(
    directory: DirectoryArgument,
    rounds: RoundOption = None,
    digest: Annotated[bool, typer.Option("--digest", help="Print the digest alone.")] = False,
    audit: Annotated[
        bool,
        typer.Option("--audit", help="Check every record, and use no checkpoint."),
    ] = False,
    to: Annotated[
        Path | None, typer.Option(help="Write θ to this file, as a safetensors file.")
    ] = None,
) -> None:
    """Rebuild the parameters after any round from the journal alone, without model or data."""
    from safetensors.numpy import save_file

    from meerkat import api

    found = api.replay(directory, rounds, audit)
    if to is not None:
        save_file({"theta": found.theta}, to, {"digest": found.digest})
    if digest:
        print(found.digest)
        return
    console.print(f"after round  {found.rounds}")
    console.print(f"parameters   {len(found.theta):,}")
    console.print(f"digest       {found.digest}")


@_command
def evaluate(
    target: Annotated[
        str, typer.Argument(help="The directory of a run, or a model.", metavar="DIR|MODEL")
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="The recipe whose task a model is evaluated on.")
    ] = None,
    split: Annotated[str, typer.Option(help="test (held out), validation, or train.")] = "test",
    examples: Annotated[
        int | None, typer.Option(help="How many examples; as the recipe says by default.", min=1)
    ] = None,
    rounds: RoundOption = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The loss and the recipe's metrics on a split, of a run or of any model."""
    from meerkat import api

    with Bar() as progress:
        found = api.evaluate(target, recipe, split, examples, rounds, overrides or (), progress)
    figures = {
        **found.metrics,
        "examples": found.examples,
        "split": split,
    }
    _print_figures(figures, as_json)


@_command
def export(
    directory: DirectoryArgument,
    to: Annotated[Path, typer.Option(help="The folder (or, with --delta, the file) to write.")],
    delta: Annotated[
        bool,
        typer.Option("--delta", help="Only the changed parameters, for `meerkat.apply_delta`."),
    ] = False,
    rounds: RoundOption = None,
    peft: Annotated[
        bool,
        typer.Option("--peft", help="Only the factors of a LoRA run, as a folder for peft."),
    ] = False,
) -> None:
    """Write the fine-tuned model, for plain transformers, or what is new of it in small."""
    from meerkat import api

    written = api.export(directory, to, delta, rounds, peft)
    size = sum(path.stat().st_size for path in [written, *written.rglob("*")] if path.is_file())
    console.print(f"wrote {written} ({size / 1e6:.1f} MB)")


@_command
def report(directory: DirectoryArgument) -> None:
    """Draw a run's pictures and its page, which opens offline; also of an unfinished run."""
    from meerkat import api

    console.print(f"wrote {api.report(directory)}")


@_command
def gradip(
    directory: DirectoryArgument,
    to: Annotated[
        Path | None,
        typer.Option(help="Write GradIP, norm and cosine of every step to this CSV file."),
    ] = None,
    clients: Annotated[
        list[int] | None,
        typer.Option("--client", help="Only this client in that file; may be repeated.", min=0),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How each client's steps lie to the pre-training gradient, from the journal alone."""
    from meerkat import api

    found = api.gradip(directory, to, clients or ())
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        for line in gradip_table(found):
            console.print(line)
    if to is not None:
        print(f"wrote {to}", file=sys.stderr)


@_command
def bench(
    kind: Annotated[BenchKind, typer.Argument(help="What to measure.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="step: with a compiled forward pass.")
    ] = False,
    model: Annotated[str, typer.Option(help="step: the model.")] = "demo:gemma-3-270m",
    first_block: Annotated[
        int, typer.Option(min=0, help="step: the first decoder block that may move.")
    ] = 0,
) -> None:
    """Measure a step, the server, or the noise on this machine; ratios are within one run."""
    from meerkat.benchmarks import bench as measure

    options: dict[str, Any] = {}
    if kind is BenchKind.step:
        options = {"compile": compiled, "model": model, "first_block": first_block}
    _print_figures(measure(kind.value, **options), as_json)


def _print_figures(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        console.print(figures_table(figures))


def main() -> None:
    """Entry point of the `meerkat` command."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    app()
