"""Commands on what a run left: replay, evaluate, export, push, report, gradip; and bench."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meerkat.cli.application import (
    BenchKind,
    DirectoryArgument,
    Overrides,
    RoundOption,
    command,
    console,
)
from meerkat.terminal.progress_bar import Bar
from meerkat.terminal.tables import answer_lines, figures_table, gradip_table

if TYPE_CHECKING:  # the help texts need no torch
    from meerkat.runs.answers import Answered

__all__ = ["bench", "evaluate", "export", "gradip", "push", "replay", "report"]


@command
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


@command
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
    show: Annotated[
        int, typer.Option(help="Print the model's answers to so many examples, too.", min=0)
    ] = 0,
    harness: Annotated[
        str | None,
        typer.Option(help="Instead: these tasks of lm-evaluation-harness.", metavar="TASK,TASK"),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="harness: a folder of task files of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="harness: at most so many examples a task.", min=1)
    ] = None,
) -> None:
    """The loss and the recipe's metrics on a split, of a run or of any model."""
    from meerkat import api

    if harness is not None:
        tasks = [name for name in harness.split(",") if name]
        results = api.harness(target, tasks, include_path, limit, recipe, rounds, overrides or ())
        _print_harness(results, as_json)
        return
    answers: list[Answered] = []
    with Bar() as progress:
        found = api.evaluate(
            target, recipe, split, examples, rounds, overrides or (), progress, show, answers.append
        )
    figures = {
        **found.metrics,
        "examples": found.examples,
        "split": split,
    }
    if as_json:
        told = {"answers": [asdict(answered) for answered in answers]} if show else {}
        print(json.dumps(figures | told, indent=2))
        return
    for answered in answers:
        for line in answer_lines(answered):
            console.print(line, markup=False, highlight=False)
    _print_figures(figures, as_json)


@command
def export(
    directory: DirectoryArgument,
    to: Annotated[Path, typer.Option(help="The folder (or, with --delta, the file) to write.")],
    delta: Annotated[
        bool,
        typer.Option("--delta", help="Only the changed parameters, for `meerkat.apply_delta`."),
    ] = False,
    rounds: RoundOption = None,
    peft: Annotated[
        bool, typer.Option("--peft", help="Only LoRA factors, as a folder for peft.")
    ] = False,
    shira: Annotated[
        bool, typer.Option("--shira", help="Only the changed parameters, as peft's SHiRA adapter.")
    ] = False,
) -> None:
    """Write the fine-tuned model, for plain transformers, or what is new of it in small."""
    from meerkat import api

    written = api.export(directory, to, delta, rounds, peft, shira)
    size = sum(path.stat().st_size for path in [written, *written.rglob("*")] if path.is_file())
    console.print(f"wrote {written} ({size / 1e6:.1f} MB)")
    if not (delta or peft or shira):
        _say_if_not_imported(written)


def _say_if_not_imported(folder: Path) -> None:
    from meerkat.exporting.ollama import MODELFILE, not_imported

    if not (folder / MODELFILE).exists():
        config = json.loads((folder / "config.json").read_text("utf-8"))
        console.print(not_imported(config["architectures"][0]))


@command
def push(
    folder: Annotated[
        Path, typer.Argument(help="A folder that `meerkat export` wrote.", metavar="FOLDER")
    ],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.", metavar="REPO")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; private by default.")
    ] = False,
) -> None:
    """Upload an exported folder to a hub; token and address as huggingface_hub has them."""
    from meerkat import api

    console.print(f"pushed to {api.push(folder, repository, public)}")


@command
def report(directory: DirectoryArgument) -> None:
    """Draw a run's pictures and its page, which opens offline; also of an unfinished run."""
    from meerkat import api

    console.print(f"wrote {api.report(directory)}")


@command
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


@command
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


def _print_harness(results: dict[str, Any], as_json: bool) -> None:
    from meerkat.runs.harness import figures_of

    if as_json:
        print(json.dumps(results, indent=2, default=str))
    else:
        console.print(figures_table(figures_of(results)))


def _print_figures(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        console.print(figures_table(figures))
