"""A sparse change of weights as an adapter that plain peft loads: exact LoRA factors, or SHiRA.

A matrix S with entries in few rows and columns is a product of thin matrices: with the columns C
that hold some of its entries and the rows R that hold the others, S = S[:, C] E_C + E_R S[R, :],
where the E are rows and columns of the identity. The fewest rows and columns that hold all
entries are a minimum vertex cover (König's theorem: as many as a maximum matching has edges), so
no product whose entries are those of S or one has a smaller rank. No entry is rounded.

SHiRA (Bhardwaj et al., arXiv 2406.13175) adds listed entries to a matrix. In peft each matrix has
r (in + out) of them; unused ones are zeros.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64
from torch import nn

from meerkat.errors import RunError
from meerkat.extras import needed_extra
from meerkat.models.adapters import write_adapter
from meerkat.models.loading import LoadedModel
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.masked import MaskedSpace
from meerkat.zo.state import Theta

__all__ = ["SparseChange", "changes_of", "cover", "factors", "save_lora", "save_shira"]

_LARGEST_SHARE = 0.5
"""Values of LoRA factors, by those of the matrices that they change: with more there is no use."""


@dataclass(frozen=True)
class SparseChange:
    """What a run added to a matrix."""

    shape: tuple[int, int]
    rows: Int64[np.ndarray, " m"]
    columns: Int64[np.ndarray, " m"]
    values: Float32[np.ndarray, " m"]
    """None is zero."""


def changes_of(loaded: LoadedModel, mask: Mask, theta: Theta) -> dict[str, SparseChange]:
    """What θ changes in a model, by the name of the layer; as cast to the weights' type.

    Raises:
        RunError: It changes something that is not the weight of a linear layer.
    """
    modules = dict(loaded.model.named_modules())
    for name in mask.names:
        if type(modules.get(name.removesuffix(".weight"))) is not nn.Linear:
            raise RunError(
                f"this run moved {name}, which is not the weight of a linear layer, and adapters "
                "change these alone; take --delta for a small file, or export the merged model"
            )
    space = MaskedSpace(loaded.model, mask)
    before = space.read()
    space.write(theta)
    moved = space.read() - before
    space.restore()
    ends = np.cumsum([len(indices) for indices in mask.indices])[:-1]
    found = {}
    for name, shape, indices, values in zip(
        mask.names, mask.shapes, mask.indices, np.split(moved, ends), strict=True
    ):
        there = values != 0
        rows, columns = np.divmod(indices[there], shape[1])
        if there.any():
            change = SparseChange((shape[0], shape[1]), rows, columns, values[there])
            found[name.removesuffix(".weight")] = change
    if not found:
        raise RunError("this run changed no weight, so an adapter of it would be empty")
    return found


def save_lora(changes: Mapping[str, SparseChange], base: str, folder: Path) -> None:
    """Write changes as LoRA factors of the smallest ranks that hold them exactly.

    A matrix has a rank of its own (`rank_pattern`), and every scale α/r is one.

    Args:
        base: What the card calls the base model.

    Raises:
        RunError: They would be about as large as the matrices, or a package is not installed.
    """
    with needed_extra("lora"):
        from peft import LoraConfig
    made = {layer: factors(change) for layer, change in changes.items()}
    _check_share(changes, sum(a.size + b.size for b, a in made.values()))
    ranks = {layer: len(a) for layer, (_, a) in made.items()}
    largest = max(ranks.values())
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        task_type="CAUSAL_LM",
    )
    tensors = {}
    for layer, (b, a) in made.items():
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = a, b
    write_adapter(config, tensors, base, folder)


def save_shira(changes: Mapping[str, SparseChange], base: str, folder: Path) -> None:
    """Write changes as peft's SHiRA adapter: the entries themselves.

    Args:
        base: As `save_lora`.

    Raises:
        RunError: A matrix has too many entries, or peft is not installed.
    """
    with needed_extra("lora"):
        from peft import ShiraConfig
    rank = max(-(-len(c.values) // sum(c.shape)) for c in changes.values())
    tensors: dict[str, np.ndarray] = {}
    for layer, change in changes.items():
        slots, used = rank * sum(change.shape), len(change.values)
        if slots > change.shape[0] * change.shape[1]:
            raise RunError(
                f"--shira: peft gives each matrix {rank} entries for each row and column, which "
                f"is more than {layer} ({change.shape[0]} × {change.shape[1]}) has; take --delta"
            )
        values, places = np.zeros(slots, np.float32), np.zeros((2, slots), np.int32)
        values[:used], places[:, :used] = change.values, (change.rows, change.columns)
        tensors[f"{layer}.shira_weight"], tensors[f"{layer}.shira_indices"] = values, places
    config = ShiraConfig(r=rank, target_modules=list(changes), task_type="CAUSAL_LM")
    write_adapter(config, tensors, base, folder)


def factors(
    change: SparseChange,
) -> tuple[Float32[np.ndarray, "out r"], Float32[np.ndarray, "r in"]]:
    """B and A of the smallest rank whose product is a change, entry by entry.

    Raises:
        RunError: scipy is not installed.
    """
    rows, columns = cover(change)
    rank = len(rows) + len(columns)
    b, a = (
        np.zeros((change.shape[0], rank), np.float32),
        np.zeros((rank, change.shape[1]), np.float32),
    )
    b[rows, np.arange(len(rows))] = 1
    a[len(rows) + np.arange(len(columns)), columns] = 1
    in_row = np.isin(change.rows, rows)
    row, column = change.rows, change.columns
    a[np.searchsorted(rows, row[in_row]), column[in_row]] = change.values[in_row]
    there = ~in_row
    place = len(rows) + np.searchsorted(columns, column[there])
    b[row[there], place] = change.values[there]
    return b, a


def cover(change: SparseChange) -> tuple[Int64[np.ndarray, " r"], Int64[np.ndarray, " c"]]:
    """The fewest rows and columns, ascending, that hold all entries of a change.

    Raises:
        RunError: scipy is not installed.
    """
    with needed_extra("lora"):
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import maximum_bipartite_matching
    ones = np.ones(len(change.values), np.int8)
    graph = csr_matrix((ones, (change.rows, change.columns)), shape=change.shape)
    column_of = maximum_bipartite_matching(graph, perm_type="column")
    row_of = np.full(change.shape[1], -1)
    matched = np.flatnonzero(column_of >= 0)
    row_of[column_of[matched]] = matched
    # König: what alternating paths from unmatched rows reach. The cover is the rows that they do
    # not reach, and the columns that they do.
    reached_row, reached_column = column_of < 0, np.zeros(change.shape[1], bool)
    waiting = deque(np.flatnonzero(reached_row))
    while waiting:
        row = waiting.popleft()
        near = graph.indices[graph.indptr[row] : graph.indptr[row + 1]]
        new = near[~reached_column[near]]
        reached_column[new] = True
        for other in row_of[new]:  # each is matched, or the matching were not a largest one
            if not reached_row[other]:
                reached_row[other] = True
                waiting.append(other)
    return np.flatnonzero(~reached_row), np.flatnonzero(reached_column)


def _check_share(changes: Mapping[str, SparseChange], values: int) -> None:
    total = sum(change.shape[0] * change.shape[1] for change in changes.values())
    if values > _LARGEST_SHARE * total:
        raise RunError(
            "--peft: this mask is spread over so many rows and columns that exact LoRA "
            f"factors would have {values / total:.0%} of the values of the matrices; take --shira, "
            "or --delta"
        )
