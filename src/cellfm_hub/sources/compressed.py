"""Sparse matrices on disk that are compressed by cell: only the rows that are asked for are read."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub.genes import CountMatrix
from cellfm_hub.sources.matrix import widened


class CompressedRows:
    """Cells × genes in the arrays ``data``, ``indices`` and ``indptr`` of an HDF5 or zarr group. The last is kept in memory.

    Parameters
    ----------
    group
        With the three arrays.
    shape
        Cells and genes.

    Raises
    ------
    ValueError
        If the arrays do not fit together; the caller names the file.
    """

    format = "csr"

    def __init__(self, group: Any, shape: tuple[int, int]) -> None:
        self._data, self._indices, self._indptr = group["data"], group["indices"], read_indptr(group, shape[0])
        self._width = shape[1]
        self.shape = shape
        self._kept: NDArray[np.int64] | None = None

    def keep(self, columns: NDArray[np.int64]) -> None:
        """Leave out all other columns."""
        if len(columns) < self._width:
            self._kept = columns
            self.shape = (self.shape[0], len(columns))

    def __getitem__(self, rows: slice) -> CountMatrix:
        start, stop, _ = rows.indices(self.shape[0])
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        indices = np.asarray(self._indices[first:last])
        parts = widened(np.asarray(self._data[first:last])), indices, self._indptr[start : stop + 1] - first
        block = sp.csr_matrix(parts, shape=(stop - start, self._width))
        if self._kept is None:
            return block
        if len(indices) and (indices.min() < 0 or indices.max() >= self._width):
            msg = f"an entry stands outside the {self._width:,} columns"
            raise ValueError(msg)
        return sp.csr_matrix(block[:, self._kept])


def read_indptr(group: Any, compressed: int) -> NDArray[np.int64]:
    """Return where the rows (or columns) of a compressed matrix begin and end, having looked that its parts are complete.

    Parameters
    ----------
    group
        With ``data``, ``indices`` and ``indptr``.
    compressed
        Number of rows (or columns).

    Raises
    ------
    ValueError
        If the arrays do not fit together.
    """
    data, indices, indptr = group["data"], group["indices"], np.asarray(group["indptr"][:], dtype=np.int64)
    if (
        len(indptr) != compressed + 1
        or indptr[0] != 0
        or indptr[-1] != data.shape[0]
        or data.shape != indices.shape
        or (np.diff(indptr) < 0).any()
    ):
        msg = "the parts of a sparse matrix do not fit together"
        raise ValueError(msg)
    # zarr reads what is not there as zeros.
    if data.shape[0] and any(hasattr(part, "nchunks") and part.nchunks_initialized < part.nchunks for part in (data, indices)):
        msg = "chunks of a sparse matrix are missing"
        raise ValueError(msg)
    return indptr
