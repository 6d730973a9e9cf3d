"""What server and client must have in common (method.md section 6); both sides compare it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Proof", "difference"]


@dataclass(frozen=True)
class Proof:
    """Fingerprints of what server and client must have in common, each a hexadecimal SHA-256."""

    model: str
    """Of the base model."""
    space: str
    """Of the parameter space; for a mask, the mask's digest."""
    noise: str
    """Of the noise generator."""


_WAY_OUT = {
    "model": (
        "base model",
        "load the model that the recipe names, unchanged and with the recipe's dtype",
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
        if theirs != ours:
            return f"the client's {name} is {theirs[:12]}, the run's is {ours[:12]}; {way_out}"
    return None
