"""What server and client must have in common (method.md section 6); both sides compare it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Proof", "difference", "same_probe"]

_TOLERANCE = 0.05
"""Of the distance between probe logits, by their norm; room for bfloat16 on another processor."""


@dataclass(frozen=True)
class Proof:
    """Fingerprints of what server and client must have in common, each a hexadecimal SHA-256."""

    model: str
    """Of the base model."""
    space: str
    """Of the parameter space; for a mask, the mask's digest."""
    noise: str
    """Of the noise generator."""
    configuration: str = ""
    """Digest of the model's configuration and tokenizer, with the template of conversations where
    a task has them; "" where the server does not know it."""
    probe: tuple[float, ...] = ()
    """A few logits of the base model; compared with a tolerance, and empty where not known."""


_WAY_OUT = {
    "model": (
        "base model",
        "load the model that the recipe names, unchanged and with the recipe's dtype",
    ),
    "configuration": (
        "configuration or tokenizer",
        "load the model and the tokenizer that the recipe names, with config.json and the chat "
        "template unchanged and the same release of transformers; a run over conversations needs a "
        "mask that was calibrated by its own recipe",
    ),
    "space": ("mask", "use the run's mask: leave out the client's own, and the server sends it"),
    "noise": (
        "noise generator",
        "install the same release of meerkat-fl and a numpy with the same Philox words",
    ),
}


def difference(client: Proof, server: Proof) -> str | None:
    """One line about the first field that differs, with the way out; None if all are equal.

    >>> run = Proof("ab" * 32, "cd" * 32, "ef" * 32)
    >>> difference(Proof("ab" * 32, "00" * 32, "ef" * 32), run)[:60]
    "the client's mask is 000000000000, the run's is cdcdcdcdcdcd"
    """
    for field, (name, way_out) in _WAY_OUT.items():
        theirs, ours = getattr(client, field), getattr(server, field)
        if theirs != ours and ours:
            told = theirs[:12] or "not known"
            return f"the client's {name} is {told}, the run's is {ours[:12]}; {way_out}"
    if not same_probe(client.probe, server.probe):
        return (
            "the client's model computes other logits than the run's from the same parameters; "
            "install the same release of transformers, and load the model's own code"
        )
    return None


def same_probe(theirs: Sequence[float], ours: Sequence[float]) -> bool:
    """Do two computations of a model's probe logits agree? Where one is not known, they do."""
    if not theirs or not ours:
        return True
    if len(theirs) != len(ours) or not all(map(math.isfinite, theirs)):
        return False
    return math.dist(theirs, ours) <= _TOLERANCE * math.hypot(*ours)
