"""A run's events as transformers' callbacks know them: `TrainerCallback`, state and control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from meerkat.federation.rounds import RoundRecord
from meerkat.federation.schedule import Schedule
from meerkat.federation.selection import Decision
from meerkat.journal.records import Evaluated, Renewal, RoundMetrics
from meerkat.runs.events import RunInfo, RunObserver
from meerkat.trainer.arguments import TrainingArguments

__all__ = ["CallbackObserver", "best_of", "named"]


def named(metrics: dict[str, float], prefix: str = "eval") -> dict[str, float]:
    """Metrics as transformers names them.

    >>> named({"loss": 0.5, "eval_mine": 1.0})
    {'eval_loss': 0.5, 'eval_mine': 1.0}
    """
    return {
        name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
        for name, value in metrics.items()
    }


def best_of(args: TrainingArguments, evaluations: Sequence[Evaluated]) -> tuple[int, float] | None:
    """The step with the best evaluation, the first of equals, and its value; None without one."""
    if args.metric_for_best_model is None:
        return None
    (key,) = named({args.metric_for_best_model: 0.0})
    found = [(each.round, named(each.metrics).get(key, math.nan)) for each in evaluations]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    sign = 1 if args.greater_is_better else -1
    return max(finite, key=lambda pair: sign * pair[1], default=None)


class CallbackObserver(RunObserver):
    """Tells callbacks what a run does, and whether one of them wants it to stop.

    An error in a callback ends the training, as in transformers. Steps that were done before a
    resume are in the state, and nobody is told of them again.

    Args:
        inner: Is told each event first.
        context: What callbacks get by name besides `args`, `state` and `control`: the model.
        examples: Training examples, which epochs are counted by.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback],
        args: TrainingArguments,
        inner: RunObserver,
        context: dict[str, Any],
        examples: int,
    ):
        self._callbacks, self._args, self._inner = callbacks, args, inner
        self._context, self._examples = context, examples
        self.state, self.control = TrainerState(log_history=[]), TrainerControl()
        self.losses: list[float] = []
        """Of all steps so far, in this process and before a resume."""
        self._logged = 0
        self._evaluations: list[Evaluated] = []

    def stops(self, rounds: int) -> bool:
        """Does a callback want the training to stop?"""
        return bool(self.control.should_training_stop)

    def run_started(self, run: RunInfo) -> None:
        self._inner.run_started(run)
        recipe = run.journal.header.parsed
        self._schedule = Schedule.of(recipe)
        self._batch = min(recipe.federation.batch_size, self._examples)
        state = self.state
        state.max_steps = recipe.federation.rounds
        state.num_train_epochs = math.ceil(state.max_steps * self._batch / self._examples)
        state.logging_steps = self._args.logging_steps
        state.eval_steps = recipe.evaluation.every
        state.train_batch_size = self._batch
        self._at(run.journal.rounds)
        self.losses = [metrics.loss for _, metrics in run.journal.records()]
        self._logged = len(self.losses)
        self._evaluations = run.journal.evaluations()
        self._keep_best()
        self._call("on_train_begin")

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        self._inner.round_closed(record, metrics)
        self._at(record.round + 1)
        self.losses.append(metrics.loss)
        self._call("on_step_end")
        due = self.state.global_step % self._args.logging_steps == 0
        if due or self.control.should_log:
            self.control.should_log = False
            self._log(record.round)

    def evaluated(self, found: Evaluated) -> None:
        self._inner.evaluated(found)
        self._evaluations.append(found)
        metrics = {
            **named(found.metrics),
            "eval_runtime": round(found.seconds, 4),
            "eval_samples_per_second": round(found.examples / max(found.seconds, 1e-9), 3),
        }
        self._say(metrics)
        self._call("on_evaluate", metrics=metrics)
        self._keep_best()  # after the callbacks, which compare with the best before

    def clients_stopped(self, decision: Decision) -> None:
        self._inner.clients_stopped(decision)

    def subspace_renewed(self, renewal: Renewal) -> None:
        self._inner.subspace_renewed(renewal)

    def run_ended(self, summary: dict[str, Any]) -> None:
        self._inner.run_ended(summary)
        if len(self.losses) > self._logged:
            self._log(len(self.losses) - 1)
        self._call("on_train_end")

    def _at(self, step: int) -> None:
        self.state.global_step = step
        self.state.epoch = step * self._batch / self._examples

    def _log(self, round: int) -> None:
        since, self._logged = self.losses[self._logged :], len(self.losses)
        rate = self._schedule.learning_rate(round)
        self._say({"loss": sum(since) / len(since), "learning_rate": rate})

    def _say(self, logs: dict[str, float]) -> None:
        logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._call("on_log", logs=logs)

    def _keep_best(self) -> None:
        best = best_of(self._args, self._evaluations)
        if best is not None:
            self.state.best_global_step, self.state.best_metric = best

    def _call(self, event: str, **more: Any) -> None:
        for callback in self._callbacks:
            answer = getattr(callback, event)(
                self._args, self.state, self.control, **self._context, **more
            )
            self.control = self.control if answer is None else answer
