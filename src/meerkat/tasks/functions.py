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
    """Is it the name of a function of one's own, rather than of something that is registered?

    >>> is_function("mine.losses:focal"), is_function("macro_f1")
    (True, False)
    """
    return ":" in name


def own_function(name: str, field: str) -> Callable[..., Any]:
    """Import a function: from what is installed, a folder of `PYTHONPATH` or the current directory.

    Importing it runs its module.

    Args:
        name: `package.module:function`.

    Raises:
        RecipeError: There is none of this name, or its module cannot be imported.

    >>> own_function("math:hypot", "task.objective")(3, 4)
    5.0
    """
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *function.split("."))):
        raise RecipeError(f"{field} = {name!r}: write a function as module:function")
    here = os.getcwd()
    sys.path.append(here)  # as `python -m` has it, and the command `meerkat` not
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # of any type: it is the user's code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"{field} = {name!r}: module {module!r} cannot be imported: {reason}; install it, or "
            "put its folder on PYTHONPATH"
        ) from error
    finally:
        sys.path.remove(here)
    for part in function.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RecipeError(f"{field} = {name!r}: module {module!r} has no function {function!r}")
    return found
