"""What a first-order run is and what it found, as values and as a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from meerkat.errors import RecipeError, RunError

__all__ = [
    "PASSES",
    "FirstOrder",
    "FirstOrderResult",
    "Point",
    "read_result",
    "result_path",
    "write_result",
]

PASSES = 3
"""Forward passes that a gradient of one example counts as: forward, and a backward pass of two."""
_CHOICES = {
    "method": ("central", "fedavg", "fedavgm", "scaffold"),
    "place": ("all", "masked"),
    "optimizer": ("adam", "sgd"),
}


@dataclass(frozen=True)
class FirstOrder:
    """A first-order method; what else there is to say of a run, its recipe says.

    Raises:
        RecipeError: A value is not known or out of range, or two do not go together.
    """

    method: Literal["central", "fedavg", "fedavgm", "scaffold"]
    """See `rules`."""
    place: Literal["all", "masked"] = "all"
    """What moves: all parameters of the model, or those of the recipe's mask."""
    optimizer: Literal["adam", "sgd"] = "sgd"
    """Of a client, fresh in each round; of `central`, one over the whole run. SCAFFOLD's control
    variates are differences of SGD steps, so it takes `sgd` alone."""
    momentum: float = 0.9
    """β of `fedavgm`, from 0 to below 1."""

    def __post_init__(self) -> None:
        for field, known in _CHOICES.items():
            value = getattr(self, field)
            if value not in known:
                raise RecipeError(f"{field} = {value!r} is not known; known are {', '.join(known)}")
        if self.method == "scaffold" and self.optimizer != "sgd":
            raise RecipeError(
                f"optimizer = {self.optimizer!r} does not go with method = 'scaffold', whose "
                "control variates are differences of SGD steps; take 'sgd', or another method"
            )
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum = {self.momentum!r} is not from 0 to below 1; lower it")

    @property
    def vectors_sent(self) -> int:
        """Vectors of n values that a client sends in a round, and as many are sent to it.

        Two of SCAFFOLD: θ and c, and their changes. None of `central`, where data are sent instead.
        """
        return {"central": 0, "fedavg": 1, "fedavgm": 1, "scaffold": 2}[self.method]

    def vectors_kept(self, clients: int) -> int:
        """Most vectors of n values in memory at once, the model not counted (see `rules`).

        θ_0 to restore the model, θ_r, θ_{r+1} or its change, θ_k or a mean gradient, a gradient,
        and what a method keeps beside these. With a mask n is small, and indices and gradients in
        float64 are not counted.

        Args:
            clients: K; each has a control variate in SCAFFOLD.
        """
        own = {"central": 0, "fedavg": 0, "fedavgm": 1, "scaffold": 3 + clients}[self.method]
        return 5 + own + (2 if self.optimizer == "adam" else 0)


@dataclass(frozen=True)
class Point:
    """An evaluation, and what training had cost until then."""

    round: int
    """Rounds done."""
    metrics: dict[str, float]
    """By name, the loss first, on the recipe's held-out examples."""
    training_loss: float | None
    """Mean over the local steps since the last evaluation, each at the θ before the step."""
    example_passes: int
    """Forward passes of one example by all clients so far; a backward pass counts as two."""
    seconds: float
    """Of training so far, on this machine; evaluations and loading are not in it."""


@dataclass(frozen=True)
class FirstOrderResult:
    """What a first-order run found. The content of `first_order.json`."""

    method: FirstOrder
    fingerprint: str
    """Of the recipe as it was given."""
    size: int
    """n, values that move."""
    bytes_up: int
    """Of a client in a round: float32 values, without what a transport puts around them."""
    bytes_down: int
    """To a client in a round."""
    finished: bool
    """Are all rounds done? Otherwise this is as far as a run came."""
    points: tuple[Point, ...] = ()
    """By round."""


def result_path(directory: Path) -> Path:
    return directory / "first_order.json"


def write_result(result: FirstOrderResult, directory: Path) -> None:
    """Write a result, whole or not at all."""
    path = result_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(asdict(result), indent=2) + "\n", "utf-8")
    scratch.replace(path)


def read_result(directory: Path) -> FirstOrderResult | None:
    """The result of a directory, finished or not; None where there is none.

    Raises:
        RunError: The file cannot be read.
    """
    path = result_path(directory)
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        points = tuple(Point(**point) for point in found.pop("points"))
        method = FirstOrder(**found.pop("method"))
        return FirstOrderResult(method=method, points=points, **found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
        raise RunError(f"{path} cannot be read ({error!r}); remove it to run again") from None
