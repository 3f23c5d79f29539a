"""Matrices that cannot be read by cells, because they are stored by genes or as text: copied once into a temporary file that can.

The copy is made part by part, so that memory stays bounded whatever the size: each part of the entries is sorted by cell and appended to
the file; reading some cells takes their stretch of every part.
"""

import logging
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub.errors import InputError
from cellfm_hub.genes import CountMatrix
from cellfm_hub.sources.compressed import read_indptr
from cellfm_hub.sources.matrix import widened

logger = logging.getLogger("cellfm_hub")

ENTRIES = 2**22
"""Entries of a part: 64 MB while they are sorted, about as much again for the sorting."""

Part = tuple[NDArray[np.integer], NDArray[np.integer], NDArray[Any]]
"""Cells, genes and values of some entries, in any order."""


@dataclass(frozen=True)
class _Run:
    """Where a part stands in the file."""

    first: int
    rows: int
    indptr: int
    indices: int
    data: int
    dtype: np.dtype[Any]


class TemporaryRows:
    """A matrix of cells × genes, copied into a temporary file when its first rows are asked for.

    Parameters
    ----------
    shape
        Cells and genes.
    entries
        Starts a pass over all entries, part by part.
    source
        What is copied, for the log.
    """

    def __init__(self, shape: tuple[int, int], entries: Callable[[], Iterator[Part]], source: str) -> None:
        self.shape = shape
        self.format = "csr"
        self._entries, self._source = entries, source
        self._runs: list[_Run] = []
        self._file: IO[bytes] | None = None

    def __getitem__(self, rows: slice) -> CountMatrix:
        start, stop, _ = rows.indices(self.shape[0])
        if self._file is None:
            self._copy()
        pieces = [self._read(run, start, stop) for run in self._runs if run.first < stop and start < run.first + run.rows]
        shape = (stop - start, self.shape[1])
        if not pieces:
            return sp.csr_matrix(shape, dtype=np.float32)
        cells, genes, values = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        # Through COO: entries that stand twice are added up.
        return sp.csr_matrix(sp.coo_matrix((values, (cells - start, genes)), shape=shape))

    def _copy(self) -> None:
        logger.info("%s cannot be read by cells; it is copied once into a temporary file in %s", self._source, tempfile.gettempdir())
        file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        try:
            for cells, genes, values in self._entries():
                if len(values):
                    self._append(file, cells, genes, values)
        except BaseException:
            file.close()
            self._runs.clear()
            raise
        weakref.finalize(self, file.close)
        self._file = file

    def _append(self, file: IO[bytes], cells: NDArray[np.integer], genes: NDArray[np.integer], values: NDArray[Any]) -> None:
        first, last = int(cells.min()), int(cells.max())
        if first < 0 or last >= self.shape[0] or int(genes.min()) < 0 or int(genes.max()) >= self.shape[1]:
            msg = (
                f"{self._source} is damaged: it has entries outside its {self.shape[0]:,} cells and {self.shape[1]:,} genes; fetch it again"
            )
            raise InputError(msg)
        if values.dtype.kind not in "iufb":
            msg = f"{self._source} holds {values.dtype} values; expected numbers"
            raise InputError(msg)
        values = widened(values)
        order = np.argsort(cells, kind="stable")
        indptr = np.zeros(last - first + 2, dtype=np.int64)
        np.cumsum(np.bincount(cells - first), out=indptr[1:])

        def write(array: NDArray[Any]) -> int:
            place = file.seek(0, 2)
            file.write(np.ascontiguousarray(array).data)
            return place

        try:
            places = write(indptr), write(genes[order].astype(np.int32)), write(values[order])
            file.flush()
        except OSError as error:
            msg = f"no room for the temporary copy of {self._source} in {tempfile.gettempdir()} ({error.strerror or error});"
            msg += " free space there, or name another place in the environment variable TMPDIR"
            raise InputError(msg) from error
        self._runs.append(_Run(first, last - first + 1, *places, values.dtype))

    def _read(self, run: _Run, start: int, stop: int) -> Part:
        start, stop = max(start, run.first), min(stop, run.first + run.rows)
        indptr = self._array(run.indptr, start - run.first, stop - run.first + 1, np.dtype(np.int64))
        lowest, highest = int(indptr[0]), int(indptr[-1])
        cells = np.repeat(np.arange(start, stop), np.diff(indptr))
        genes = self._array(run.indices, lowest, highest, np.dtype(np.int32))
        return cells, genes, self._array(run.data, lowest, highest, run.dtype)

    def _array(self, place: int, start: int, stop: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        assert self._file is not None
        self._file.seek(place + start * dtype.itemsize)
        return np.frombuffer(self._file.read((stop - start) * dtype.itemsize), dtype=dtype)


def by_genes(group: Any, shape: tuple[int, int], path: Path, name: str) -> TemporaryRows:
    """Read a column-compressed matrix of an HDF5 file or a zarr store by cells.

    Parameters
    ----------
    group
        With ``data``, ``indices`` and ``indptr``.
    shape
        Cells and genes.
    path, name
        For messages.
    """
    indptr = read_indptr(group, shape[1])

    def entries() -> Iterator[Part]:
        data, indices = group["data"], group["indices"]
        for start in range(0, int(data.shape[0]), ENTRIES):
            stop = min(start + ENTRIES, int(data.shape[0]))
            genes = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
            yield np.asarray(indices[start:stop]), genes, np.asarray(data[start:stop])

    return TemporaryRows(shape, entries, f"{name} of {path} (stored by genes)")
