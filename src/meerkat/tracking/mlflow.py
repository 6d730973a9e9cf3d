"""MLflow: where MLFLOW_TRACKING_URI says, or a database of the run's own, DIR/mlflow.db."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from meerkat.tracking.base import Tracked, Tracker, Value

__all__ = ["MlflowTracker"]

_PARAMETERS = 100
"""Most parameters of one request (MLflow's REST API)."""


class MlflowTracker(Tracker):
    """A run in the experiment `tracking.project`; summary figures are tags."""

    @staticmethod
    def require() -> None:
        # Without the last two mlflow-skinny has no database.
        import alembic  # noqa: F401
        import mlflow  # noqa: F401
        import sqlalchemy  # noqa: F401

    def start(self, run: Tracked, known: str | None) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        own = f"sqlite:///{(run.directory / 'mlflow.db').resolve()}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or own)
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return known
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project)
        self._id = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        settings = [Param(name, str(value)) for name, value in run.settings.items()]
        for start in range(0, len(settings), _PARAMETERS):
            self._client.log_batch(self._id, params=settings[start : start + _PARAMETERS])
        return self._id

    def last_step(self, group: str) -> int:
        names = [n for n in self._client.get_run(self._id).data.metrics if n.startswith(group)]
        history = (self._client.get_metric_history(self._id, name) for name in names)
        return max((metric.step for metrics in history for metric in metrics), default=-1)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, summary: Mapping[str, Value]) -> None:
        for name, value in summary.items():
            self._client.set_tag(self._id, f"summary.{name}", str(value))
        self._client.set_terminated(self._id, "FINISHED")

    def leave(self) -> None:
        self._client.set_terminated(self._id, "KILLED")
