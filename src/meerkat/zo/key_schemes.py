"""Key schemes by the name that `noise.keys` has: one file each, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meerkat.zo.directions import FreshKeys, KeyScheme
from meerkat.zo.seed_pool import PoolKeys

__all__ = ["KEY_SCHEMES"]

KEY_SCHEMES: Mapping[str, Callable[..., KeyScheme]] = {"fresh": FreshKeys, "pool": PoolKeys}
