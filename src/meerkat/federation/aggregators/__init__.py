"""Aggregators by the name that `federation.aggregator` has: one file each, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meerkat.federation.aggregators.base import Aggregator
from meerkat.federation.aggregators.mean import Mean
from meerkat.federation.aggregators.median import Median
from meerkat.federation.aggregators.trimmed_mean import TrimmedMean

__all__ = ["AGGREGATORS", "Aggregator"]

AGGREGATORS: Mapping[str, Callable[..., Aggregator]] = {
    "mean": Mean,
    "median": Median,
    "trimmed-mean": TrimmedMean,
}
