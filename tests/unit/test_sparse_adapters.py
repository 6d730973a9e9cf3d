"""Exact factors of sparse matrices: products, ranks, covers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from meerkat.exporting.sparse_adapters import SparseChange, cover, factors

MATRICES = arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.sampled_from([0, 0, 0, 1.5, -3e-5, 7e8]),
)


def change_of(matrix: np.ndarray) -> SparseChange:
    rows, columns = np.nonzero(matrix)
    shape = (matrix.shape[0], matrix.shape[1])
    return SparseChange(shape, rows, columns, matrix[rows, columns])


@given(MATRICES)
def test_the_product_of_the_factors_is_the_matrix(matrix: np.ndarray) -> None:
    b, a = factors(change_of(matrix))
    assert np.array_equal(b @ a, matrix)


@given(MATRICES)
def test_rows_and_columns_hold_every_entry_and_are_as_few_as_can_be(matrix: np.ndarray) -> None:
    rows, columns = cover(change_of(matrix))
    rest = matrix.copy()
    rest[rows], rest[:, columns] = 0, 0
    assert not rest.any()
    # The largest set of entries of which no two share a row or column, by augmenting paths.
    owner: dict[int, int] = {}

    def placed(row: int, seen: set[int]) -> bool:
        for column in np.flatnonzero(matrix[row]):
            if column not in seen:
                seen.add(column)
                if column not in owner or placed(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    largest = sum(placed(row, set()) for row in range(len(matrix)))
    assert len(rows) + len(columns) == largest


@pytest.mark.parametrize(("shape", "rank"), [((40, 3), 3), ((3, 40), 3), ((20, 20), 20)])
def test_a_full_matrix_has_its_own_rank(shape: tuple[int, int], rank: int) -> None:
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    b, a = factors(change_of(matrix))
    assert len(a) == rank
    assert np.array_equal(b @ a, matrix)
