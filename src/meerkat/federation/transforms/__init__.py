"""Transforms by the name that `federation.transforms` has: one file each, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meerkat.federation.transforms.base import Place, Transform
from meerkat.federation.transforms.clip import Clip

__all__ = ["TRANSFORMS", "Place", "Transform"]

TRANSFORMS: Mapping[str, Callable[..., Transform]] = {"clip": Clip}
