"""Which client holds which examples. A seed gives the same split everywhere."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np

from meerkat.config import Federation
from meerkat.data.extreme import balanced, extreme_labels
from meerkat.errors import DataError
from meerkat.tasks import Example
from meerkat.zo.noise import permutation

__all__ = ["label_counts", "partition"]


def partition(
    examples: Sequence[Example], federation: Federation, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Indices of the examples that each client holds, in an order that the seed decides.

    Raises:
        DataError: There are fewer examples than clients need, or the kind of partition cannot be
            made from these labels.
    """
    kind, clients = federation.partition.kind, federation.clients
    if len(examples) < clients * federation.partition.min_size:
        raise DataError(
            f"federation.clients = {clients} with federation.partition.min_size = "
            f"{federation.partition.min_size}: {len(examples)} examples are too few; lower either"
        )
    labels = np.array([example.label for example in examples])
    if kind == "balanced":
        parts = balanced(labels, federation, permutation(seed, (7, 0), len(labels)), seed)
        return _ordered(parts, seed)
    extreme = _extreme(labels, federation, seed)
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate([[], *extreme]).astype(np.int64))
    if kind == "single-label":
        shared = _single_label(labels[rest], federation)
    elif kind == "natural":
        shared = _natural([examples[index].holder for index in rest], federation)
    else:
        shared = _by_flower(labels[rest], federation, seed)
    parts = [rest[part].tolist() for part in shared] + extreme
    held = sum(map(len, parts))
    if held < len(examples):
        raise DataError(
            f"federation.partition.labels_per_client = {federation.partition.labels_per_client}: "
            f"{len(examples) - held} examples have a label that would reach no client; raise it, "
            "or federation.clients"
        )
    smallest = min(map(len, parts))
    if smallest < federation.partition.min_size:
        raise DataError(
            f"federation.partition.min_size = {federation.partition.min_size}: the smallest client "
            f"of this {kind} partition has {smallest}; lower it, or change seed or the partition"
        )
    return _ordered(parts, seed)


def _ordered(parts: Sequence[Sequence[int]], seed: int) -> tuple[tuple[int, ...], ...]:
    """Each part in an order that the seed decides."""
    return tuple(
        tuple(int(part[i]) for i in permutation(seed, (3, client), len(part)))
        for client, part in enumerate(parts)
    )


def label_counts(
    examples: Sequence[Example], parts: Sequence[Sequence[int]], labels: int
) -> list[list[int]]:
    """How many examples of each label each client holds."""
    return [
        np.bincount([examples[i].label for i in part], minlength=labels).tolist() for part in parts
    ]


def _extreme(labels: np.ndarray, federation: Federation, seed: int) -> list[list[int]]:
    """The extreme clients, of a single label each."""
    share = len(labels) // federation.clients
    count = federation.partition.extreme
    order = permutation(seed, (7, 0), len(labels))
    held: Counter[int] = Counter()
    parts: list[list[int]] = []
    for label in extreme_labels(labels, federation.partition, seed):
        begin = held[label] * share
        held[label] += 1
        part = order[labels[order] == label][begin : begin + share]
        if len(part) < share:
            raise DataError(
                f"federation.partition.extreme = {count}: label {label} has too few examples for "
                f"its clients of {share} each; lower it, or raise federation.clients"
            )
        parts.append(part.tolist())
    return parts


def _others(federation: Federation) -> tuple[int, str]:
    """How many clients the kind of partition is for, and how to name them."""
    clients, extreme = federation.clients, federation.partition.extreme
    name = f"federation.clients = {clients}"
    return clients - extreme, f"{name}, {extreme} of them extreme" if extreme else name


def _single_label(labels: np.ndarray, federation: Federation) -> list[list[int]]:
    """Client k holds label k mod L alone; its clients take the label's examples in turn."""
    kinds, (clients, named) = np.unique(labels), _others(federation)
    if clients < len(kinds):
        raise DataError(
            f"{named}: a single-label partition of {len(kinds)} labels "
            "needs at least as many clients"
        )
    parts: list[list[int]] = [[] for _ in range(clients)]
    for position, label in enumerate(kinds):
        holders = range(position, clients, len(kinds))
        for turn, index in enumerate(np.flatnonzero(labels == label)):
            parts[holders[turn % len(holders)]].append(int(index))
    return parts


def _natural(holders: Sequence[str], federation: Federation) -> list[list[int]]:
    """All rows of a holder at one client: holders by size, each to the client with fewest rows."""
    clients, named = _others(federation)
    held: dict[str, list[int]] = {}
    for index, holder in enumerate(holders):
        held.setdefault(holder, []).append(index)
    if len(held) < clients:
        raise DataError(
            f"{named}: a natural partition needs at least as many holders of rows, and there are "
            f"{len(held)}; task.holder names their column, or federation.partition.column"
        )
    parts: list[list[int]] = [[] for _ in range(clients)]
    for holder in sorted(held, key=lambda holder: (-len(held[holder]), holder)):
        min(parts, key=len).extend(held[holder])
    return parts


def _by_flower(labels: np.ndarray, federation: Federation, seed: int) -> list[list[int]]:
    """Partitions of flwr-datasets over a table of (index, label)."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read on import
    # Takes a second, which a process that answers one message does not need where data are its own.
    from flwr_datasets.partitioner import (
        DirichletPartitioner,
        IidPartitioner,
        Partitioner,
        PathologicalPartitioner,
    )

    order = permutation(seed, (4, 0), len(labels))
    table = datasets.Dataset.from_dict({"index": order.tolist(), "label": labels[order].tolist()})
    chosen, (clients, named) = federation.partition, _others(federation)
    numpy_seed = seed % 2**32
    partitioner: Partitioner
    match chosen.kind:
        case "iid":
            partitioner = IidPartitioner(clients)
        case "dirichlet":
            partitioner = DirichletPartitioner(
                clients,
                partition_by="label",
                alpha=chosen.alpha,
                min_partition_size=chosen.min_size,
                seed=numpy_seed,
            )
        case _:
            partitioner = PathologicalPartitioner(
                clients,
                partition_by="label",
                num_classes_per_partition=chosen.labels_per_client,
                class_assignment_mode="deterministic",
                seed=numpy_seed,
            )
    partitioner.dataset = table
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [list(partitioner.load_partition(client)["index"]) for client in range(clients)]
    except ValueError as error:
        raise DataError(
            f"federation.partition.kind = {chosen.kind!r} cannot be made for {named}: {error}"
        ) from None
