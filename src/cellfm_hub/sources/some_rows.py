"""Some rows of a matrix, as a matrix of their own: for a look at large data, and at single cells."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from cellfm_hub.genes import CountMatrix
from cellfm_hub.sources.cells import CellData, Matrix

Span = tuple[int, int]
"""First row, and the row behind the last."""


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
        self._matrix, self._spans = matrix, spans
        self.shape = (sum(stop - start for start, stop in spans), matrix.shape[1])

    @cached_property
    def _rows(self) -> CountMatrix:
        return sp.csr_matrix(sp.vstack([self._matrix.rows(start, stop) for start, stop in self._spans], format="csr"))

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
