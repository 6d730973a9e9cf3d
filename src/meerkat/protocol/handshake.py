"""Do server and client hold the same things (method.md section 6)? Both sides ask."""

from __future__ import annotations

from meerkat.protocol.frames import Proof

__all__ = ["difference"]

_WAY_OUT = {
    "model": (
        "base model",
        "load the model that the recipe names, unchanged and with the recipe's dtype",
    ),
    "mask": ("mask", "use the run's mask: leave out the client's own, and the server sends it"),
    "noise": (
        "noise generator",
        "install the same release of meerkat-fl and a numpy with the same Philox words",
    ),
}


def difference(client: Proof, server: Proof) -> str | None:
    """The first thing in which they differ and the way out, or None.

    >>> run = Proof("ab" * 32, "cd" * 32, "ef" * 32)
    >>> difference(Proof("ab" * 32, "00" * 32, "ef" * 32), run)[:60]
    "the client's mask is 000000000000, the run's is cdcdcdcdcdcd"
    """
    for field, (name, way_out) in _WAY_OUT.items():
        theirs, ours = getattr(client, field), getattr(server, field)
        if theirs != ours:
            return f"the client's {name} is {theirs[:12]}, the run's is {ours[:12]}; {way_out}"
    return None
