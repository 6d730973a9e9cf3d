"""Settings of a node by its operator, and the server's recipe with these settings applied."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from pydantic_core import from_json

from meerkat.config import Recipe, Runtime, parse_recipe
from meerkat.errors import ProtocolError, RecipeError
from meerkat.models.demo_models import DEMO
from meerkat.tasks.functions import is_function
from meerkat.tasks.metrics import functions_in

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
    weights: str | None = None
    """As `runtime.weights`; quantised weights are not compiled."""
    theta: str | None = None
    """As `runtime.theta`."""
    allow_models: tuple[str, ...] = ("*",)
    """Models that a server's recipe may name, as patterns; by `--node-config` the demo's alone."""
    allow_sources: tuple[str, ...] = ("*",)
    """Data that it may name where the node has none of its own; from `--node-config` the demo's."""
    allow_functions: tuple[str, ...] = ("*",)
    """Functions (`module:function`) that it may name, and which the node then imports, as patterns;
    by `--node-config` none."""
    allow_template: bool = True
    """May it bring a chat template, which is a program in a sandbox? By `--node-config` not: the
    template is then that of the node's model."""
    most_tokens: int = 65536
    """Most tokens in one forward pass and in an example, and most examples in a batch."""
    gradients: bool = False
    """Can the node report the exact gradient of a subspace, for which it keeps activations? In a
    simulation it can."""

    @classmethod
    def of(cls, config: Mapping[str, Any], trusted: bool = False) -> NodeConfig:
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
            "weights": str,
            "theta": str,
            "allow-models": _names,
            "allow-sources": _names,
            "allow-functions": _names,
            "allow-template": _bool,
            "most-tokens": int,
            "gradients": _bool,
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
                    f"--node-config {name} = {value!r} is no {wanted[name].__name__.strip('_')}"
                ) from None
        if found.get("partition-id", -1) < 0:
            raise RecipeError(
                "--node-config lacks partition-id: the number of the client at this node, from 0"
            )
        if found.get("threads", 0) < 0:
            raise RecipeError(f"--node-config threads = {found['threads']} is less than 0")
        for name in ("weights", "theta"):
            known = get_args(Runtime.model_fields[name].annotation)
            if found.get(name, known[0]) not in known:
                raise RecipeError(
                    f"--node-config {name} = {found[name]!r} is none of {', '.join(known)}"
                )
        if found.get("most-tokens", 1) < 1:
            raise RecipeError(f"--node-config most-tokens = {found['most-tokens']} is less than 1")
        found.pop("num-partitions", None)
        # In a simulation the server's operator is the node's.
        strict: dict[str, Any] = {
            "allow-models": (DEMO,),
            "allow-sources": ("demo",),
            "allow-functions": (),
            "allow-template": False,
        }
        if trusted:
            strict = {"gradients": True}
        fields = {name.replace("-", "_"): value for name, value in (strict | found).items()}
        return cls(client=fields.pop("partition_id"), **fields)

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
        self._check_allowed(recipe)
        # Paths on the server's machine are of no use on this one.
        tokens = min(recipe.runtime.tokens_per_pass, self.most_tokens)
        threads = min(recipe.runtime.threads, os.cpu_count() or 1)
        update = {
            "cache_dir": None,
            "tokens_per_pass": tokens,
            "threads": threads,
            "prefix_cache": min(recipe.runtime.prefix_cache, Runtime().prefix_cache),
            "prefix_disk": 0,  # activations of a client's examples stay in its memory
        }
        runtime = recipe.runtime.model_copy(update=update)
        if self.device is not None:
            runtime = runtime.model_copy(update={"device": self.device})
        if self.theta is not None:
            runtime = runtime.model_copy(update={"theta": self.theta})
        if self.threads is not None:
            runtime = runtime.model_copy(update={"threads": self.threads})
        if self.weights is not None:
            own = {"weights": self.weights, "compile": runtime.compile and self.weights == "stored"}
            runtime = runtime.model_copy(update=own)
        model = recipe.model.model_copy(update={"name": self.model} if self.model else {})
        return recipe.model_copy(update={"runtime": runtime, "model": model})

    def _check_allowed(self, recipe: Recipe) -> None:
        """Does the operator let a server name this model, data, code, these sizes?

        Raises:
            RecipeError: No; the line names the setting that would.
        """
        asked = []
        if self.model is None:
            asked.append(("model.name", recipe.model.name, self.allow_models, "allow-models"))
        if self.data is None and recipe.task.source is not None:
            asked.append(("task.source", recipe.task.source, self.allow_sources, "allow-sources"))
        for field, name, patterns, setting in asked:
            climbs = ".." in Path(name).parts  # a wildcard is no way out of a folder
            if climbs or not any(fnmatchcase(name, pattern) for pattern in patterns):
                raise RecipeError(
                    f"the server's {field} = {name!r} is not allowed at this node; add it to "
                    f"--node-config {setting}, or set the node's own"
                )
        self._check_code(recipe)
        for field, size in (
            ("task.max_length", recipe.task.max_length),
            ("evaluation.max_new_tokens", recipe.evaluation.max_new_tokens),
            ("federation.batch_size", recipe.federation.batch_size),
        ):
            if size > self.most_tokens:
                raise RecipeError(
                    f"the server's {field} = {size} is more than --node-config most-tokens = "
                    f"{self.most_tokens}"
                )

    def _check_code(self, recipe: Recipe) -> None:
        """Does the operator let a server name these functions, and bring a chat template?

        Raises:
            RecipeError: No; the line names the setting that would.
        """
        named = {
            name: f"evaluation.metrics names the function {name!r}, which"
            for name in functions_in(recipe.evaluation.metrics)
        }
        objective = recipe.task.objective.kind
        if is_function(objective):
            named[objective] = f"task.objective = {objective!r}"
        for name, what in named.items():
            if not any(fnmatchcase(name, pattern) for pattern in self.allow_functions):
                raise RecipeError(
                    f"the server's {what} is not allowed at this node; look at what it does, and "
                    "add it to --node-config allow-functions"
                )
        if recipe.task.chat_template is not None and not self.allow_template:
            raise RecipeError(
                "the server's task.chat_template is not allowed at this node; set --node-config "
                "allow-template=true"
            )


def _names(text: Any) -> tuple[str, ...]:
    """A list of names or patterns, separated by commas."""
    if not isinstance(text, str):
        raise TypeError
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _bool(value: Any) -> bool:
    """A switch, which Flower passes on as it was written: true, or text."""
    if isinstance(value, bool):
        return value
    if value not in ("true", "false"):
        raise TypeError
    return bool(value == "true")


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
