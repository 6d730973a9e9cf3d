"""Packages that are installed with an extra, and the line for whoever lacks them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from meerkat.errors import RunError

__all__ = ["needed_extra"]


@contextmanager
def needed_extra(name: str) -> Iterator[None]:
    """Imports that need an extra.

    Raises:
        RunError: A package of it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise RunError(
            f"this needs the package {error.name}: pip install 'meerkat-fl[{name}]'"
        ) from None
