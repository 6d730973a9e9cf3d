"""On what a run left: replay, evaluate, harness, export, push, report, gradip."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meerkat.api.recipes import Source, recipe_from
from meerkat.errors import RunError
from meerkat.extras import needed_extra
from meerkat.journal import replay as replay_journal
from meerkat.journal.records import Evaluated
from meerkat.progress import Progress
from meerkat.runs.best_round import Rounds, wanted_rounds
from meerkat.runs.directory import (
    journal_path,
    mask_of,
    mask_path,
    open_journal,
    recipe_of,
)
from meerkat.runs.trajectories import Gradip, read_gradip
from meerkat.zo.state import ModelState, Theta

if TYPE_CHECKING:
    from meerkat.runs.answers import Answered
    from meerkat.spaces.base import ParameterSpace

__all__ = [
    "Gradip",
    "Replayed",
    "evaluate",
    "export",
    "gradip",
    "harness",
    "push",
    "replay",
    "report",
]


@dataclass(frozen=True)
class Replayed:
    """The training state after a number of rounds."""

    rounds: int
    state: ModelState

    @property
    def theta(self) -> Theta:
        return self.state.theta

    @property
    def digest(self) -> str:
        """Of the whole state."""
        return self.state.digest


def replay(directory: str | Path, rounds: Rounds = None, audit: bool = False) -> Replayed:
    """The training state after `rounds` rounds (all by default), from the journal alone.

    Args:
        rounds: `best` is the round with the best validation score.
        audit: Check the whole journal and replay it from the start, without its checkpoints.

    Raises:
        MeerkatError: There is no such run or round, or θ is not what the run recorded.
    """
    with closing(open_journal(Path(directory), audit=audit)) as journal:
        done = wanted_rounds(journal, rounds)
        state = replay_journal(journal, done, audit)
        return Replayed(journal.rounds if done is None else done, state)


def evaluate(
    target: str | Path,
    recipe: Source | None = None,
    split: str = "test",
    examples: int | None = None,
    rounds: Rounds = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    show: int = 0,
    shown: Callable[[Answered], None] = lambda answered: None,
) -> Evaluated:
    """The metrics of a run, or of any model under a recipe's task.

    Args:
        target: A run's directory, or a model as `model.name` names one.
        recipe: The task to evaluate a model on; a run brings its own.
        split: `test` (held out, without validation examples), `validation`, or `train`.
        examples: At most so many; the recipe's number by default.
        rounds: θ after so many rounds of the run; `best` is the one with the best validation score.
        show: So many examples, the first, whose answers are given to `shown` before the evaluation.

    Raises:
        MeerkatError: The target, the recipe or the split is not usable.
    """
    with needed_extra("train"):
        from meerkat.data.clients import examples_of
        from meerkat.runs.answers import answers
        from meerkat.runs.assembly import EncodedExamples, assemble
        from meerkat.runs.evaluation import evaluate_objective
        from meerkat.spaces.linear import space_of
    directory = Path(target)
    is_run = journal_path(directory).exists()
    if split not in ("test", "validation", "train"):
        raise RunError(f"--split {split!r}: it is test, validation or train")
    if is_run and recipe is None:
        parsed = recipe_from(recipe_of(directory), overrides)
    elif recipe is not None:
        parsed = recipe_from(recipe, overrides)
    else:
        raise RunError(f"{target} is no run directory; to evaluate a model give --recipe as well")
    changes = [] if is_run else [f"model.name={json.dumps(str(target))}"]
    if is_run:
        own = recipe_of(directory)
        if "lora" in (own.mask.kind, parsed.mask.kind):  # the model has the factors of the run
            parsed = parsed.model_copy(update={"mask": own.mask, "subspace": own.subspace})
    # A run has a mask of its own, however it was found.
    mask_file = mask_path(directory) if is_run else None
    assembly = assemble(recipe_from(parsed, changes), progress, mask_file=mask_file)
    chosen = examples_of(parsed, assembly.split, split, examples)
    space: ParameterSpace | None = None
    if is_run:
        with closing(open_journal(directory)) as journal:
            done = wanted_rounds(journal, rounds)
            mask, state = mask_of(directory, journal, done), replay_journal(journal, done)
        _ = assembly.checked_mask  # the model, as it was loaded
        assembly.quantise()
        space = space_of(assembly.loaded.model, mask)
        space.write(state.theta)
    encoded = EncodedExamples(chosen, assembly.encoder)
    try:
        for answered in answers(assembly, encoded[:show]):
            shown(answered)
        return evaluate_objective(
            assembly.objective, encoded, assembly.metrics, progress=progress, write=assembly.write
        )
    finally:
        if space is not None:
            space.restore()


def harness(
    target: str | Path,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    recipe: Source | None = None,
    rounds: Rounds = None,
    overrides: Sequence[str] = (),
    batch_size: int = 8,
) -> dict[str, Any]:
    """Results of a run, or of any model, on tasks of lm-evaluation-harness, as that gives them.

    Args:
        target: A run's directory, or a model as `model.name` names one.
        tasks: Names of its tasks, or of those in `include_path`.
        include_path: A folder of task files (YAML) of one's own, whose data may be local.
        limit: At most so many examples of each task.
        recipe: How a model is loaded: its `model.dtype` and `[runtime]`.
        rounds: As `evaluate`.

    Raises:
        MeerkatError: The extra `harness` is missing, or target or a task is not usable.
    """
    with needed_extra("train"):
        from meerkat.runs.harness import harness_results, model_of, run_model
    directory, include = Path(target), None if include_path is None else Path(include_path)
    if journal_path(directory).exists():
        parsed = recipe_from(recipe_of(directory), overrides)
        with run_model(directory, rounds, parsed) as loaded:
            return harness_results(loaded, tasks, include, limit, batch_size)
    parsed_or_none = None if recipe is None else recipe_from(recipe, overrides)
    loaded = model_of(str(target), parsed_or_none)
    return harness_results(loaded, tasks, include, limit, batch_size)


def export(
    directory: str | Path,
    to: str | Path,
    delta: bool = False,
    rounds: Rounds = None,
    peft: bool = False,
    shira: bool = False,
) -> Path:
    """Write a run's model: merged, as a sparse delta for `apply_delta`, or as peft's adapter.

    All but a delta are folders with a model card, the recipe, and a list of what was written.

    Args:
        peft: Write LoRA factors, which `peft.PeftModel.from_pretrained` loads over the base model:
            those of a run with `mask.kind = "lora"`, or the exact ones of a sparse change.
        shira: Write a sparse change as peft's SHiRA adapter.
        rounds: As `evaluate`.

    Raises:
        MeerkatError: There is no such run, its base model changed, or `to` exists.
    """
    forms = {"--delta": delta, "--peft": peft, "--shira": shira}
    wanted = [name for name, given in forms.items() if given]
    if len(wanted) > 1:
        raise RunError(f"{' and '.join(wanted)} exclude each other: take one")
    with needed_extra("train"):
        from meerkat.exporting.exporting import export_run
    return export_run(Path(directory), Path(to), wanted[0] if wanted else None, rounds)


def push(folder: str | Path, repository: str, public: bool = False) -> str:
    """Upload a folder that `export` wrote to a hub, and return its address there.

    Args:
        repository: `OWNER/NAME`; it is made, as a private one, if there is none.
        public: Make a new one public.

    Raises:
        RunError: The folder is no export, or the hub refuses or cannot be reached.
    """
    with needed_extra("train"):
        from meerkat.exporting.hub import push_folder
    return push_folder(Path(folder), repository, public)


def report(directory: str | Path) -> Path:
    """Draw a run's pictures and its page, also of an unfinished run.

    Raises:
        MeerkatError: There is no such run.
    """
    with needed_extra("report"):
        from meerkat.reporting.writing import write_report
    with closing(open_journal(Path(directory))) as journal:
        return write_report(Path(directory), journal)


def gradip(
    directory: str | Path, to: str | Path | None = None, clients: Sequence[int] = ()
) -> Gradip:
    """GradIP: how each client's steps lie to the pre-training gradient (method.md section 5).

    From the journal of a run that is finished or under way, whether it stops clients early or not:
    over each client's calibration if there was one, else over all its rounds.

    Args:
        to: Write GradIP, norm and cosine of every step to this CSV file, calibrations first.
        clients: Only these clients in that file; all by default.

    Raises:
        MeerkatError: There is no such run, its mask has no gradient, or the file exists.
    """
    return read_gradip(Path(directory), None if to is None else Path(to), set(clients))
