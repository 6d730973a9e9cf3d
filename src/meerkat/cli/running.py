"""Commands before and for a run, from calibrate to tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from meerkat.cli.application import (
    DirectoryArgument,
    EngineKind,
    Overrides,
    RecipeArgument,
    command,
    console,
)
from meerkat.terminal.progress_bar import Bar
from meerkat.terminal.tables import mask_table, plan_table, summary_table

__all__ = ["calibrate", "compare", "plan", "recalibrate", "resume", "run", "split", "tune"]


@command
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


@command
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


@command
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


@command
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


@command
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


@command
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


@command
def split(
    recipe: RecipeArgument,
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the examples of each client to a folder of its own, to try a deployment."""
    from meerkat import api

    for folder in api.split(recipe, to, overrides or ()):
        console.print(f"wrote {folder}")


@command
def tune(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the trials go; by default under tuning/.", metavar="DIR"),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="The tuned recipe; by default tuned.toml in that folder.")
    ] = None,
    tries: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="KEY=[VALUES]",
            help="What is tried, such as federation.local_steps=[1, 4]; may be repeated. By "
            "default the learning rate.",
        ),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(
            help="Example passes of all trials; those of one run of the recipe by default.", min=1
        ),
    ] = None,
    validation: Annotated[
        int,
        typer.Option(help="Examples to choose by, where the recipe keeps none.", min=1),
    ] = 256,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(help="Trials at a time; 0 goes by the cores.", min=0)] = 0,
) -> None:
    """Find the learning rate, or other fields, on validation examples; write the tuned recipe."""
    from meerkat import api

    with Bar() as progress:
        found = api.tune(
            recipe, out, to, tries or (), passes, validation, overrides or (), jobs, progress
        )
    from meerkat.comparison.tuning import as_markdown

    console.print(as_markdown(found.trials))
    for field, value in found.settings.items():
        console.print(f"{field} = {json.dumps(value)}")
    for path in (found.recipe, found.table):
        console.print(f"wrote {path}")
