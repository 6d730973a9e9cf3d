"""First-order methods as upper bounds, on the same data, batches and evaluation as a run."""

from __future__ import annotations

from meerkat.comparison.first_order import run_first_order
from meerkat.comparison.results import FirstOrder, FirstOrderResult, Point

__all__ = ["FirstOrder", "FirstOrderResult", "Point", "run_first_order"]
