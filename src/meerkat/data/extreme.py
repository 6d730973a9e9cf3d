"""Clients of a single label beside others: which labels, and a partition in equal parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meerkat.config import Federation
from meerkat.config.sections import Partition
from meerkat.errors import DataError

__all__ = ["balanced", "extreme_labels"]


def extreme_labels(labels: np.ndarray, chosen: Partition, seed: int) -> list[int]:
    """The label of each extreme client: the one of the recipe, or all in turn from the seed's.

    Raises:
        DataError: No example has the recipe's.
    """
    kinds = np.unique(labels).tolist()
    if chosen.extreme_label is None:
        return [kinds[(seed + turn) % len(kinds)] for turn in range(chosen.extreme)]
    if chosen.extreme and chosen.extreme_label not in kinds:
        raise DataError(
            f"federation.partition.extreme_label = {chosen.extreme_label}: the examples have the "
            f"labels {', '.join(map(str, kinds))}; take one of them"
        )
    return [chosen.extreme_label] * chosen.extreme


def balanced(
    labels: np.ndarray, federation: Federation, order: Sequence[int] | np.ndarray, seed: int
) -> list[list[int]]:
    """Equal parts: as many of each label for the first clients, one label for each extreme one.

    Args:
        order: In which examples are given out.

    Raises:
        DataError: There are too few examples of a label.
    """
    kinds = np.unique(labels).tolist()
    alone = extreme_labels(labels, federation.partition, seed)
    others = federation.clients - len(alone)
    counts = {kind: int((labels == kind).sum()) for kind in kinds}
    # Each label l feeds all others with size / L each, and its own extreme clients with size each.
    wanted = {kind: others / len(kinds) + alone.count(kind) for kind in kinds}
    most = min(counts[kind] / wanted[kind] for kind in kinds if wanted[kind])
    each = int(most) // len(kinds)
    if each * len(kinds) < max(len(kinds), federation.partition.min_size):
        raise DataError(
            f"federation.partition.kind = 'balanced': each of federation.clients = "
            f"{federation.clients} would hold {each * len(kinds)} examples; lower it, "
            "federation.partition.extreme or federation.partition.min_size"
        )
    shuffled = np.asarray(order)
    left = {kind: shuffled[labels[shuffled] == kind].tolist() for kind in kinds}

    def taken(kind: int, count: int) -> list[int]:
        found, left[kind] = left[kind][:count], left[kind][count:]
        return found

    parts = [[i for kind in kinds for i in taken(kind, each)] for _ in range(others)]
    return parts + [taken(kind, each * len(kinds)) for kind in alone]
