"""`Trainer`: one client that holds all data, with the methods of transformers' Trainer.

It is a recipe with `federation.clients = 1` whose model and data were handed over: the run in
`output_dir` is made by the loop that `meerkat run` has, bit for bit, and the commands of a run
(replay, evaluate, export, report, resume) take the folder.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from transformers import (
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import PredictionOutput, TrainOutput

from meerkat import api
from meerkat.config import load_recipe
from meerkat.data.encoders import encoder_of
from meerkat.data.sources import rows_as_examples
from meerkat.errors import DataError, ModelError, RecipeError, RunError
from meerkat.journal import replay
from meerkat.models.loading import LoadedModel, load_model, loaded_of
from meerkat.models.objective import TextObjective
from meerkat.progress import Progress
from meerkat.runs.assembly import Assembly, EncodedExamples, writer_of
from meerkat.runs.directory import holds_run, mask_of, open_journal
from meerkat.runs.evaluation import evaluate_objective
from meerkat.runs.events import Observers
from meerkat.runs.given import Given
from meerkat.runs.local_run import resume_run, start_run
from meerkat.runs.watching import ProgressObserver, SelectionWriter
from meerkat.spaces.base import ParameterSpace
from meerkat.spaces.linear import space_of
from meerkat.tasks import Task, resolve_task
from meerkat.tasks.metrics import metrics_of
from meerkat.terminal.progress_bar import Bar
from meerkat.trainer.arguments import TrainingArguments
from meerkat.trainer.callbacks import CallbackObserver, named
from meerkat.trainer.checks import as_floats, best_step, check_same
from meerkat.trainer.made_recipe import DATA, name_of, recipe_for
from meerkat.trainer.predictions import Reduce, predictions_of
from meerkat.trainer.rows import as_rows, columns_of, longest, write_rows

__all__ = ["Trainer"]

_ASKED, _MODEL = "trainer.json", "model"
_PUBLIC = {"train": "train_dataset", "test": "eval_dataset"}


class Trainer:
    """Fine-tunes a causal LM by forward passes alone.

    Args:
        model: A causal LM in memory, in float32 or bfloat16, or a name as `model.name` has it. One
            in memory computes in its own type; its parameters are frozen and it is in evaluation
            mode from here on, since no step needs a gradient or dropout.
        args: What is done; see `TrainingArguments`.
        train_dataset: Rows: a `datasets.Dataset`, or a list of mappings. Either `input_ids` and
            `labels`, -100 where nothing is scored, or texts that `task` describes.
        eval_dataset: Rows to evaluate on; without any a tenth of the training rows is held out.
        processing_class: The tokenizer; that of the model's name by default.
        compute_metrics: Is given `EvalPrediction` at each evaluation; see `predictions_of`.
        callbacks: Objects of transformers' `TrainerCallback`, or classes.
        preprocess_logits_for_metrics: For free text: (logits, labels) → what of them is kept; the
            likeliest token of each place by default.
        task: Of texts: fields of `[task]`, such as `{"prompt": "{text} It was", "verbalizers":
            ["terrible", "great"]}`.

    Raises:
        MeerkatError: An argument, a row or the model is not usable.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: TrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        preprocess_logits_for_metrics: Reduce | None = None,
        task: Mapping[str, Any] | None = None,
    ):
        if not isinstance(args, TrainingArguments):
            raise RecipeError(
                f"args is a {type(args).__module__}.{type(args).__name__}: take "
                "meerkat.TrainingArguments, which has the same names for what means something here"
            )
        if train_dataset is None and eval_dataset is None:
            raise DataError("give train_dataset, or eval_dataset to evaluate on")
        self.args, self.state = args, TrainerState(log_history=[])
        self._given, self._tokenizer = model, processing_class
        self._compute, self._reduce = compute_metrics, preprocess_logits_for_metrics
        self._callbacks: list[TrainerCallback] = []
        for callback in callbacks or ():
            self.add_callback(callback)
        sets = {"train": train_dataset, "test": eval_dataset}
        self._rows = {
            name: as_rows(some, _PUBLIC[name]) for name, some in sets.items() if some is not None
        }
        self.recipe = recipe_for(args, model, self._rows, task)
        """What `meerkat run` would be given for the same run."""
        self._about = resolve_task(self.recipe.task)
        self._rows = {
            name: columns_of(some, self._about, _PUBLIC[name]) for name, some in self._rows.items()
        }
        if self._about.is_tokens:
            most = longest({_PUBLIC[name]: some for name, some in self._rows.items()})
            if "task.max_length" not in args.settings:
                fits = self.recipe.task.model_copy(update={"max_length": max(8, most)})
                self.recipe = self.recipe.model_copy(update={"task": fits})
        self._space: ParameterSpace | None = None
        self._rounds: int | None = None

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Tell this one, too, what happens."""
        self._callbacks.append(callback() if isinstance(callback, type) else callback)

    @property
    def model(self) -> PreTrainedModel:
        """The model: as it was loaded before training, at the trained weights after it."""
        return self._loaded.model

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train to the last step, or until a callback stops it.

        Args:
            resume_from_checkpoint: Go on with the run in `output_dir` after any interruption.

        Raises:
            MeerkatError: What was wrong; steps that are in the journal stay there.
        """
        directory, resume = self.args.directory, self._resumes(resume_from_checkpoint)
        self.restore()
        context = {
            "model": self.model,
            "processing_class": self._loaded.tokenizer,
            "optimizer": None,
            "lr_scheduler": None,
            "train_dataloader": None,
            "eval_dataloader": None,
        }
        with self._progress() as progress:
            inner = Observers([ProgressObserver(progress), SelectionWriter()])
            examples = len(self._rows["train"])
            watching = CallbackObserver(self._callbacks, self.args, inner, context, examples)
            given = Given(self._loaded, watching.stops, self._measured)
            if resume:
                summary = resume_run(directory, watching, progress, given=given)
            else:
                write_rows(self._rows, directory / DATA)
                (directory / _ASKED).write_text(self.recipe.to_json(), "utf-8")
                summary = start_run(self.recipe, directory, watching, progress, given)
        self.state = watching.state
        self._place()
        losses = watching.losses
        loss = sum(losses) / len(losses) if losses else math.nan
        metrics = {"train_runtime": summary["seconds"], "train_loss": loss}
        return TrainOutput(self.state.global_step, loss, metrics)

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics at the weights as they are; each row counts, repeated ones, too.

        Raises:
            DataError: There are no rows to evaluate on.
        """
        if eval_dataset is None and "test" not in self._rows:
            raise DataError(
                "eval_dataset is missing, so there are no rows to evaluate on; give some, or take "
                f"meerkat.evaluate({str(self.args.output_dir)!r}) for those that the run held out"
            )
        given = self._rows["test"] if eval_dataset is None else eval_dataset
        metrics = self._metrics(self._encoded(as_rows(given, "eval_dataset")), metric_key_prefix)
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        return metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """Predictions, labels and metrics of rows, in their order; see `predictions_of`.

        Raises:
            DataError: A row is not usable.
        """
        encoded = self._encoded(as_rows(test_dataset, "test_dataset"))
        found = predictions_of(self._objective, encoded, self._reduce)
        metrics = self._metrics(encoded, metric_key_prefix, found)
        return PredictionOutput(found.predictions, found.label_ids, metrics)

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Write model and tokenizer as they are, for plain transformers; by default to
        `output_dir/model`.

        Raises:
            RunError: The folder exists and is not empty.
        """
        to = self.args.directory / _MODEL if output_dir is None else Path(output_dir)
        if self._space is not None and isinstance(self._given, str):
            # In the type that the weights are stored in, whatever they are computed in.
            return api.export(self.args.directory, to, rounds=self._rounds)
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise RunError(f"{to} exists and is not an empty folder; choose another output_dir")
        self.model.save_pretrained(to)
        self._loaded.tokenizer.save_pretrained(to)
        return to

    def restore(self) -> None:
        """Put back the very bits that the model had before training."""
        if self._space is not None:
            self._space.restore()
            self._space = self._rounds = None

    # What it is made of

    @cached_property
    def _loaded(self) -> LoadedModel:
        if isinstance(self._given, str):
            loaded = load_model(self.recipe.model, self.recipe.runtime)
            own = self._tokenizer
            return loaded if own is None else dataclasses.replace(loaded, tokenizer=own)
        return loaded_of(self._given, self._tokenizer_of(self._given), self.recipe.model.name)

    @cached_property
    def _objective(self) -> TextObjective:
        return TextObjective(self._loaded, self.recipe.runtime.tokens_per_pass)

    def _tokenizer_of(self, model: PreTrainedModel) -> PreTrainedTokenizerBase:
        if self._tokenizer is not None:
            return self._tokenizer
        name = name_of(model)
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"processing_class is missing, and {name!r} has no tokenizer: {reason}"
            ) from None

    def _progress(self) -> AbstractContextManager[Progress]:
        return nullcontext(Progress()) if self.args.disable_tqdm else Bar()

    def _encoded(self, rows: datasets.Dataset) -> EncodedExamples:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / DATA
            write_rows({"test": columns_of(rows, self._about, "the data set")}, folder)
            task: Task = dataclasses.replace(self._about, source=str(folder))
            examples = rows_as_examples(task, "test")
        loaded, section = self._loaded, self.recipe.task
        encoder = encoder_of(self._about, loaded.tokenizer, section.max_length, loaded.window)
        return EncodedExamples(examples, encoder)

    def _metrics(
        self, encoded: EncodedExamples, prefix: str, known: EvalPrediction | None = None
    ) -> dict[str, float]:
        about, wanted = self._about, self.recipe.evaluation.metrics
        chosen = metrics_of(wanted, about.has_classes, about.has_pairs)
        write = writer_of(self.recipe, about, self._loaded)
        with self._progress() as progress:
            found = evaluate_objective(
                self._objective, encoded, chosen, progress=progress, write=write
            )
        metrics = dict(found.metrics)
        if self._compute is not None:
            known = known or predictions_of(self._objective, encoded, self._reduce)
            metrics |= as_floats(self._compute(known))
        metrics |= {"runtime": found.seconds}
        return named(metrics, prefix)

    def _measured(self, assembly: Assembly) -> dict[str, float]:
        if self._compute is None:
            return {}
        objective = assembly.objective
        assert isinstance(objective, TextObjective), "a Trainer's rows are texts or tokens"
        found = predictions_of(objective, assembly.test, self._reduce)
        return as_floats(self._compute(found))

    def _place(self) -> None:
        """Write θ of the last step, or of the best evaluation, into the model."""
        directory = self.args.directory
        with closing(open_journal(directory)) as journal:
            rounds: int | None = None
            if self.args.load_best_model_at_end:
                rounds = best_step(self.args, journal.evaluations())
            state, mask = replay(journal, rounds), mask_of(directory, journal, rounds)
        self._space, self._rounds = space_of(self.model, mask), rounds
        self._space.write(state.theta)

    def _resumes(self, asked: bool | str | Path | None) -> bool:
        """Is a run gone on with?

        Raises:
            RunError: There is none, or another one, or one although a new one is to begin.
        """
        directory, begun = self.args.directory, holds_run(self.args.directory)
        if "train" not in self._rows:
            raise DataError("train_dataset is missing: there is nothing to train on")
        if isinstance(asked, str | Path) and Path(asked) != directory:
            raise RunError(
                f"resume_from_checkpoint = {str(asked)!r}: every step of the run is in output_dir "
                f"= {str(directory)!r}; give True"
            )
        if not asked:
            if begun:
                raise RunError(
                    f"output_dir = {str(directory)!r} holds a run; choose another, or go on with "
                    "train(resume_from_checkpoint=True)"
                )
            return False
        if not begun or not (directory / _ASKED).exists():
            raise RunError(
                f"resume_from_checkpoint: {str(directory)!r} holds no run of a Trainer; leave "
                "it out"
            )
        check_same(load_recipe(directory / _ASKED), self.recipe)
        return True
