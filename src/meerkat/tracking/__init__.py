"""Trackers: one file each, and a line here. A recipe names them in `tracking.to`."""

from __future__ import annotations

from collections.abc import Mapping

from meerkat.tracking.base import Tracker
from meerkat.tracking.mlflow import MlflowTracker
from meerkat.tracking.tensorboard import TensorBoardTracker
from meerkat.tracking.trackio import TrackioTracker
from meerkat.tracking.wandb import WandbTracker

__all__ = ["TRACKERS", "Tracker"]

TRACKERS: Mapping[str, type[Tracker]] = {
    "mlflow": MlflowTracker,
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}
"""By the name in `tracking.to`, which is also that of its extra."""
