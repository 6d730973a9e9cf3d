"""Estimators by the name that `optimizer.estimator` has: one file each, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meerkat.zo.estimators.backward import Backward
from meerkat.zo.estimators.base import Estimate, Estimator, LossesAt
from meerkat.zo.estimators.forward_mode import ForwardMode
from meerkat.zo.estimators.one_sided import OneSided, OneSidedMean
from meerkat.zo.estimators.two_point import TwoPoint

__all__ = ["ESTIMATORS", "Estimate", "Estimator", "LossesAt"]

ESTIMATORS: Mapping[str, Callable[..., Estimator]] = {
    "backward": Backward,
    "forward-mode": ForwardMode,
    "one-sided": OneSided,
    "one-sided-mean": OneSidedMean,
    "two-point": TwoPoint,
}
