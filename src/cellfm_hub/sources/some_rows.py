"""Some rows of a matrix, as a matrix of their own: for a look at large data, and at single cells."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub.genes import CountMatrix
from cellfm_hub.sources.cells import CellData, Matrix

Span = tuple[int, int]
"""First row, and the row behind the last."""

SAMPLED_ROWS, SAMPLED_TOGETHER = 4096, 256
"""Rows over which columns are added up, and how many of them stand side by side."""


class SomeRows:
    """Rows of a matrix that are read, and then held in memory, when the first of them is asked for.

    Parameters
    ----------
    matrix
        The whole.
    spans
        Which rows, in ascending order.
    """

    format = "csr"

    def __init__(self, matrix: Matrix, spans: Sequence[Span]) -> None:
        self.whole, self._spans = matrix, spans
        self.shape = (sum(stop - start for start, stop in spans), matrix.shape[1])

    @cached_property
    def _rows(self) -> CountMatrix:
        return sp.csr_matrix(sp.vstack([self.whole.rows(start, stop) for start, stop in self._spans], format="csr"))

    def __getitem__(self, rows: slice) -> CountMatrix:
        return self._rows[rows]

    def tocsr(self) -> CountMatrix:
        """Return all of them."""
        return self._rows


def take_rows(cells: CellData, spans: Sequence[Span]) -> CellData:
    """Return data that consist of some rows. Nothing is read before it is needed."""
    matrices = {name: replace(matrix, values=SomeRows(matrix, spans)) for name, matrix in cells.matrices.items()}
    return replace(cells, obs=cells.obs.iloc[np.concatenate([np.arange(*span) for span in spans])], matrices=matrices)


def spread(n: int, *, all_up_to: int, stretches: int, length: int) -> list[Span]:
    """Choose stretches of rows that are spread evenly over all `n`; all rows if there are few enough."""
    if n <= max(all_up_to, stretches * length):
        return [(0, n)]
    starts = np.linspace(0, n - length, stretches).astype(int).tolist()
    return [(start, start + length) for start in starts]


def column_totals(cells: CellData, matrix: Matrix) -> NDArray[np.float64]:
    """Return the counts of each column of a matrix of `cells`, ``(n_vars,)``, in at most 4,096 rows spread over it.

    Of some rows of a matrix they are those of the whole matrix: what is decided by them is decided once per file. They are read once, too.
    """
    key = matrix.name, matrix.scaling is None
    if key not in cells.totals:
        cells.totals[key] = _column_totals(matrix)
    return cells.totals[key]


def _column_totals(matrix: Matrix) -> NDArray[np.float64]:
    whole: Matrix = matrix.values.whole if isinstance(matrix.values, SomeRows) else matrix
    totals = np.zeros(whole.shape[1])
    spans = spread(whole.shape[0], all_up_to=SAMPLED_ROWS, stretches=SAMPLED_ROWS // SAMPLED_TOGETHER, length=SAMPLED_TOGETHER)
    for start in (start for span in spans for start in range(*span, SAMPLED_TOGETHER)):
        block = whole.rows(start, min(start + SAMPLED_TOGETHER, whole.shape[0]))
        if matrix.scaling is not None:
            block, _, _ = matrix.scaling.recover(block)
        counted = np.where((block.data > 0) & np.isfinite(block.data), block.data, 0)  # others are refused when they are read
        totals += np.bincount(block.indices, weights=counted, minlength=len(totals))
    return totals
