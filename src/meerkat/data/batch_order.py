"""Batch order: which of its examples a client uses in each of its steps.

A client goes through its examples in a new order each epoch. Its place is the number of steps
that it has taken since the run began, which follows from the journal. No other state is kept, so
a client that is stopped early, or comes back later, goes on where it was.
"""

from __future__ import annotations

from meerkat.zo.noise import permutation

__all__ = ["batch_indices"]


def batch_indices(seed: int, client: int, held: int, batch_size: int, step: int) -> tuple[int, ...]:
    """Indices, below `held`, of the examples of a client's step number `step` (from 0).

    A batch runs on into the next epoch's order, so each example is used once an epoch. A client
    that holds fewer examples than a batch uses all of them.

    >>> sorted(batch_indices(0, 3, 10, 5, 0) + batch_indices(0, 3, 10, 5, 1)) == list(range(10))
    True
    """
    size = min(batch_size, held)
    start = step * size
    indices: list[int] = []
    while len(indices) < size:
        epoch, offset = divmod(start + len(indices), held)
        order = permutation(seed, (5 + (epoch << 8), client), held)
        indices += order[offset : offset + size - len(indices)].tolist()
    return tuple(indices)
