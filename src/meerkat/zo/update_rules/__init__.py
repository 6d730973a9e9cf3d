"""Update rules by the name that `optimizer.rule` has: one file each, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meerkat.zo.update_rules.adam import Adam
from meerkat.zo.update_rules.base import UpdateRule
from meerkat.zo.update_rules.hiso import HiSo
from meerkat.zo.update_rules.momentum import Momentum
from meerkat.zo.update_rules.sgd import SGD

__all__ = ["UPDATE_RULES", "UpdateRule"]

UPDATE_RULES: Mapping[str, Callable[..., UpdateRule]] = {
    "adam": Adam,
    "hiso": HiSo,
    "momentum": Momentum,
    "sgd": SGD,
}
