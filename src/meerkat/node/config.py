"""Settings of a node by its operator, and the server's recipe with these settings applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from meerkat.config import Recipe, parse_recipe
from meerkat.errors import ProtocolError, RecipeError

__all__ = ["NodeConfig"]

_LONGEST_RECIPE = 2**18
"""Characters; pydantic's errors about a recipe take some hundred times its size."""


@dataclass(frozen=True)
class NodeConfig:
    """Settings of a node, from Flower's `--node-config`."""

    client: int
    """Number of the client at this node; `partition-id`."""
    data: Path | None = None
    """Folder with the client's own examples; None takes its partition of the recipe's data set."""
    model: str | None = None
    """Hub id or path of the model on this machine; None takes the recipe's."""
    mask: Path | None = None
    """File of the mask; None has the server send it."""
    device: str | None = None
    """As `runtime.device`."""
    threads: int | None = None
    """As `runtime.threads`."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> NodeConfig:
        """The settings in a `--node-config`.

        Raises:
            RecipeError: A setting is unknown or not of its type, or partition-id is missing.
        """
        wanted: dict[str, Callable[[Any], Any]] = {
            "partition-id": int,
            "data": Path,
            "model": str,
            "mask": Path,
            "device": str,
            "threads": int,
            "num-partitions": int,
        }
        found = {}
        for name, value in config.items():
            if name not in wanted:
                raise RecipeError(
                    f"--node-config {name} is not a known setting; known are {', '.join(wanted)}"
                )
            try:
                if wanted[name] is int and isinstance(value, bool | float):
                    raise TypeError
                found[name] = wanted[name](value)
            except (TypeError, ValueError, OverflowError):
                raise RecipeError(
                    f"--node-config {name} = {value!r} is no {wanted[name].__name__}"
                ) from None
        if found.get("partition-id", -1) < 0:
            raise RecipeError(
                "--node-config lacks partition-id: the number of the client at this node, from 0"
            )
        if found.get("threads", 0) < 0:
            raise RecipeError(f"--node-config threads = {found['threads']} is less than 0")
        found.pop("num-partitions", None)
        return cls(client=found.pop("partition-id"), **found)

    def recipe(self, sent: str) -> Recipe:
        """The server's recipe with the settings of this node.

        Args:
            sent: As JSON.

        Raises:
            ProtocolError: It is too long or not JSON.
            RecipeError: It is not a valid recipe, or has no client of this number.
        """
        recipe = parse_recipe(_json(sent), origin="the server's recipe")
        if self.client >= recipe.federation.clients:
            raise RecipeError(
                f"--node-config partition-id = {self.client} is not one of federation.clients = "
                f"{recipe.federation.clients}, who are numbered from 0"
            )
        # Paths on the server's machine are of no use on this one.
        runtime = recipe.runtime.model_copy(update={"cache_dir": None})
        if self.device is not None:
            runtime = runtime.model_copy(update={"device": self.device})
        if self.threads is not None:
            runtime = runtime.model_copy(update={"threads": self.threads})
        model = recipe.model.model_copy(update={"name": self.model} if self.model else {})
        return recipe.model_copy(update={"runtime": runtime, "model": model})


def _json(text: str) -> dict[str, Any]:
    if len(text) > _LONGEST_RECIPE:
        raise ProtocolError(
            f"the server's recipe has {len(text)} characters; at most {_LONGEST_RECIPE} are read"
        )
    try:
        found = from_json(text)  # as pydantic: refuses lone surrogates and deep nesting
    except (ValueError, TypeError):
        raise ProtocolError("the server's recipe is not JSON") from None
    if not isinstance(found, dict):
        raise ProtocolError("the server's recipe is not JSON of a recipe")
    return found
