"""Functions of a user's own that a recipe names as `module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from meerkat.errors import RecipeError

__all__ = ["is_function", "own_function"]


def is_function(name: str) -> bool:
    """Is it the name of a function of one's own, rather than of something that is registered?"""
    return ":" in name


def own_function(name: str, field: str) -> Callable[..., Any]:
    """Import a function, from what is installed or from the current directory.

    Args:
        name: `package.module:function`.

    Raises:
        RecipeError: There is none of this name, or its module cannot be imported.
    """
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise RecipeError(f"{field} = {name!r}: write a function as module:function")
    here = os.getcwd()
    sys.path.append(here)  # as `python -m` has it, and the command `meerkat` not
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # of any type: it is the user's code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"{field} = {name!r}: the module cannot be imported ({reason}); install it, or put it "
            "into the current directory"
        ) from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise RecipeError(f"{field} = {name!r}: the module {module} has no such function")
    return found
