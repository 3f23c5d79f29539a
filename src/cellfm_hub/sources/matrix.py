"""What every format of cells is turned into: annotated matrices that can be read by rows."""

import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub.errors import CellFMError, InputError
from cellfm_hub.genes import CountMatrix
from cellfm_hub.sources.recovery import Scaling
from cellfm_hub.sources.rounded import RoundedScaling

_DENSE_VALUES = 2**24
"""Values of a dense matrix that are in memory at a time, in its own dtype (128 MiB of float64)."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of a data set: where it stands, its values, its genes.

    Parameters
    ----------
    name
        Where it stands, as a user would write it: ``X``, ``raw.X``, ``layers['counts']``.
    values
        Anything with a ``shape`` that gives sparse or dense rows when sliced.
    var
        Annotation of its columns.
    origin
        The file it is read from, ``None`` for an object in memory.
    scaling
        How its counts were normalised, where they are recovered from normalised values.
    by_order
        Whether it holds no counts, but values whose order within a cell is that of the counts, for a model that needs no more.
    facts
        What the receipt shall say of the choice of this matrix.
    notes
        What the user shall be told of it, one line each.
    """

    name: str
    values: Any
    var: pd.DataFrame
    origin: Path | None = None
    scaling: Scaling | RoundedScaling | None = None
    by_order: bool = False
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shape: tuple[int, int] = field(init=False)
    """Cells and genes; known after the file is closed too."""

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        object.__setattr__(self, "shape", (int(rows), int(columns)))

    def rows(self, start: int, stop: int) -> CountMatrix:
        """Return rows as CSR in a dtype in which counts can be added up: at least 32 bits wide, as they stand in the data.

        Raises
        ------
        InputError
            If the file turns out to be damaged.
        """
        with reading(self.origin):
            if sp.issparse(self.values) and not self.values.dtype.isnative:  # scipy cannot even slice it
                msg = f"{self.name} of the AnnData object holds numbers in the byte order of another machine ({self.values.dtype});"
                msg += " turn them first: X.data = X.data.astype('float32')"
                raise InputError(msg)
            if sp.issparse(self.values) or hasattr(self.values, "format"):  # sparse, in memory or on disk
                pieces = [self.values[start:stop]]
            else:
                step = max(1, _DENSE_VALUES // max(self.shape[1], 1))
                step -= step % 64 if step > 64 else 0  # whole chunks, as files usually have them
                pieces = [self.values[i : min(i + step, stop)] for i in range(start, stop, step)]
            blocks = [_as_csr(self._numbers(piece)) for piece in pieces]
        block = blocks[0] if len(blocks) == 1 else sp.csr_matrix(sp.vstack(blocks, format="csr"))
        return self._checked(block, stop - start)

    def _numbers(self, piece: Any) -> Any:
        """Refuse what holds no numbers; bring others to the machine's own order of bytes."""
        if piece.dtype.kind in "OSUV":
            msg = f"{self.name} of {self.origin or 'the AnnData object'} holds values of the type {piece.dtype}; expected numbers:"
            msg += " turn them, for example with .astype('float32')"
            raise InputError(msg)
        if piece.dtype == np.longdouble and piece.dtype.itemsize > 8:
            return piece.astype(np.float64)
        return piece if piece.dtype.isnative else piece.astype(piece.dtype.newbyteorder("="))

    def _checked(self, block: CountMatrix, rows: int) -> CountMatrix:
        """Refuse rows that do not exist or point outside the matrix, as those of a damaged file may; join repeated entries."""
        outside = block.nnz and (block.indices.min() < 0 or block.indices.max() >= self.shape[1])
        if outside or block.shape != (rows, self.shape[1]):
            msg = (
                f"{self.origin or 'the AnnData object'} is damaged: {self.name} points outside its {self.shape[1]:,} genes; fetch it again"
            )
            raise InputError(msg)
        if not block.has_canonical_format:
            block = block.tocsc().tocsr()  # sorts in linear time, unlike sort_indices
            block.sum_duplicates()
        return block


@dataclass(frozen=True)
class CellData:
    """Cells, their annotation, and the matrices that might hold their counts."""

    obs: pd.DataFrame
    matrices: dict[str, Matrix]
    origin: str
    totals: dict[tuple[str, bool], NDArray[np.float64]] = field(default_factory=dict)
    """Kept by :func:`~cellfm_hub.sources.some_rows.column_totals`, for all models of a run."""

    def __len__(self) -> int:
        return len(self.obs)


@dataclass(frozen=True)
class CellBlock:
    """Some rows of a count matrix."""

    start: int
    counts: CountMatrix
    obs: pd.DataFrame


_NO_FILTER = re.compile("plugin|required filter")
"""How HDF5 says so."""


@contextmanager
def reading(path: Path | None) -> Iterator[None]:
    """Turn whatever the libraries raise on a damaged file into one line that names it."""
    try:
        yield
    except CellFMError:
        raise
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError, EOFError, zlib.error) as error:
        if path is None:  # an object in memory: a fault of ours, or of who made it
            raise
        if isinstance(error, OSError) and _NO_FILTER.search(str(error)):
            msg = (
                f"{path} is compressed by a filter that is not installed here ({_in_one_line(error)}); set HDF5_PLUGIN_PATH to where it is,"
            )
            msg += " or write the file again with compression='gzip'"
            raise InputError(msg) from error
        msg = f"{path} cannot be read, it is damaged, cut short or of another format ({_in_one_line(error)}); fetch or write it again"
        raise InputError(msg) from error


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no more is known"
    return f"{type(error).__name__}: {text[:200]}"


def _as_csr(block: Any) -> CountMatrix:
    if not sp.issparse(block):
        return sp.csr_matrix(widened(np.asarray(block)))
    csr = sp.csr_matrix(block)
    csr.data = widened(csr.data)
    return csr


def widened(values: NDArray[Any]) -> NDArray[Any]:
    """Return numbers in a dtype in which they can be added up: small integers and truth values as int32, float16 as float32."""
    kind, narrow = values.dtype.kind, values.dtype.itemsize < 4
    if kind == "f" and narrow:
        return values.astype(np.float32)
    if kind == "b" or (kind in "iu" and narrow):
        return values.astype(np.int32)
    return values
