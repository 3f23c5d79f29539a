"""Cells: an AnnData object, an ``.h5ad`` file or a ``.csv`` table, read as blocks of raw counts."""

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub.errors import CountsError, InputError
from cellfm_hub.genes import CountMatrix

if TYPE_CHECKING:
    from anndata import AnnData

_CSV_ROWS = 256
"""Rows of a text table that are dense at a time."""

BLOCK_ROWS = 4096
"""Cells that are read, tokenized and sorted together."""

MatrixValues = Literal["counts", "abundances", "log values"]
"""What a model reads: whole numbers; any numbers from 0 up, as bulk data are; logarithms of normalised counts."""

LOOKS_FOR_COUNTS_IN = ("layers['counts']", "X", "raw.X")
"""Order in which raw counts are looked for."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of a data set: where it stands, its values (sliceable by rows), its genes."""

    name: str
    values: Any
    var: pd.DataFrame

    def rows(self, start: int, stop: int) -> CountMatrix:
        """Return rows as CSR."""
        block = self.values[start:stop]
        return sp.csr_matrix(block if sp.issparse(block) else np.asarray(block))

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        rows, columns = self.values.shape
        return int(rows), int(columns)


@dataclass(frozen=True)
class CellData:
    """Cells, their annotation, and the matrices that might hold their counts."""

    obs: pd.DataFrame
    matrices: dict[str, Matrix]
    origin: str

    def __len__(self) -> int:
        return len(self.obs)


@dataclass(frozen=True)
class CellBlock:
    """Some rows of a count matrix."""

    start: int
    counts: CountMatrix
    obs: pd.DataFrame


def _row_sliceable(values: Any) -> Any:
    """Column-compressed matrices are turned once; everything else slices by row as it is."""
    if sp.issparse(values):
        return values.tocsr()
    if getattr(values, "format", None) == "csc":  # on disk
        return values.to_memory().tocsr()
    return values


def from_anndata(adata: "AnnData", obs_columns: Sequence[str] = ()) -> CellData:
    """Wrap an AnnData object, in memory or backed. Nothing is copied but column-compressed matrices when they are read."""
    matrices = {}
    if adata.X is not None:
        matrices["X"] = Matrix("X", adata.X, adata.var)
    for name, values in adata.layers.items():
        matrices[f"layers[{name!r}]"] = Matrix(f"layers[{name!r}]", values, adata.var)
    if adata.raw is not None:
        matrices["raw.X"] = Matrix("raw.X", adata.raw.X, adata.raw.var)
    obs = adata.obs[[c for c in obs_columns if c in adata.obs]]
    return CellData(obs, matrices, "the AnnData object")


def from_h5ad(file: h5py.File, path: Path, obs_columns: Sequence[str] = ()) -> CellData:
    """Describe an open ``.h5ad`` file; matrices stay on disk until rows are asked for."""
    from anndata.io import read_elem, sparse_dataset

    def matrix(name: str, place: str, var: pd.DataFrame) -> Matrix:
        element = file[place]
        return Matrix(name, sparse_dataset(element) if isinstance(element, h5py.Group) else element, var)

    missing = [key for key in ("obs", "var") if key not in file]
    if missing:
        msg = f"{path} is an HDF5 file without {' and '.join(missing)}; expected an .h5ad file as written by AnnData"
        raise InputError(msg)
    obs, var = read_elem(file["obs"]), read_elem(file["var"])
    matrices = {}
    if "X" in file and file["X"].attrs.get("encoding-type") != "null":
        matrices["X"] = matrix("X", "X", var)
    for name in file.get("layers", ()):
        matrices[f"layers[{name!r}]"] = matrix(f"layers[{name!r}]", f"layers/{name}", var)
    if "raw" in file and "X" in file["raw"]:
        matrices["raw.X"] = matrix("raw.X", "raw/X", read_elem(file["raw/var"]))
    return CellData(obs[[c for c in obs_columns if c in obs]], matrices, str(path))


def is_csv(path: Path) -> bool:
    """Whether the name of a file says comma-separated values, plain or gzipped."""
    return path.name.endswith((".csv", ".csv.gz"))


def from_csv(path: Path) -> CellData:
    """Read a table with a row per cell, its name first, and a column per gene. In memory it is sparse, whatever the size of the text.

    Raises
    ------
    InputError
        If it is not such a table.
    """
    # The header by itself: pandas would rename the second of two equal genes, which would then be no gene at all.
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file:
            genes = next(csv.reader(file), [])[1:]
        names, blocks = [], []
        with pd.read_csv(path, header=None, skiprows=1, index_col=0, dtype={0: str}, chunksize=_CSV_ROWS, encoding="utf-8-sig") as chunks:
            for chunk in chunks:
                if chunk.shape[1] != len(genes):
                    msg = f"{path} has {len(genes):,} genes in its header and {chunk.shape[1]:,} values in its rows;"
                    msg += " expected a first column with the names of cells, then one column per gene, and a header of the same form"
                    raise InputError(msg)
                text = [genes[i] for i, kind in enumerate(chunk.dtypes) if kind.kind not in "iufb"]
                if text:
                    msg = f"{path} holds text in {len(text):,} columns (first: {text[0]!r}); expected numbers in all columns but the first"
                    raise InputError(msg)
                names += chunk.index.tolist()
                blocks.append(sp.csr_matrix(chunk.to_numpy(dtype=np.float64)))
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        UnicodeDecodeError,
        csv.Error,
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
    ) as error:
        msg = f"{path} cannot be read as a table of comma-separated values ({str(error).strip()});"
        msg += " expected a row per cell and a column per gene, or an .h5ad file"
        raise InputError(msg) from error
    matrix = sp.csr_matrix(sp.vstack(blocks, format="csr"))
    return CellData(pd.DataFrame(index=pd.Index(names)), {"X": Matrix("X", matrix, pd.DataFrame(index=pd.Index(genes)))}, str(path))


def find_counts(data: CellData, layer: str | None, values: MatrixValues = "counts") -> Matrix:
    """Return the matrix that holds raw counts, or what else a model reads.

    Parameters
    ----------
    data
        The cells.
    layer
        The user's choice: a layer, or ``"X"`` or ``"raw"``. ``None``: the first of :data:`LOOKS_FOR_COUNTS_IN` that holds counts in its
        first rows.
    values
        What it must hold.

    Raises
    ------
    InputError
        If there is nothing in the data, or no such layer.
    CountsError
        If no matrix holds counts, saying what each holds.
    """
    if layer is not None:
        name = {"X": "X", "raw": "raw.X", "raw.X": "raw.X"}.get(layer, f"layers[{layer!r}]")
        if name not in data.matrices:
            msg = f"layer={layer!r} is not in {data.origin}; it has {', '.join(data.matrices) or 'no matrix'}"
            raise InputError(msg)
        candidates = [data.matrices[name]]
    else:
        candidates = [data.matrices[name] for name in LOOKS_FOR_COUNTS_IN if name in data.matrices]
    if len(data) == 0 or not candidates or max(m.shape[1] for m in candidates) == 0:
        shape = f"{len(data)} cells and {max((m.shape[1] for m in candidates), default=0)} genes"
        msg = f"{data.origin} has {shape}: there is nothing to embed, pass data with at least one cell and one gene"
        raise InputError(msg)
    problems = []
    for matrix in candidates:
        sliceable = Matrix(matrix.name, _row_sliceable(matrix.values), matrix.var)
        sample = CellBlock(0, sliceable.rows(0, min(len(data), 1024)), data.obs.iloc[:1024])
        problem = _unfit(sample, sliceable, values) or _not_logarithms(sample, sliceable, values)
        if problem is None:
            return sliceable
        problems.append(problem)
    msg = f"no {_WANTED[values][0]} in {data.origin}: {'; '.join(problems)}. {_WANTED[values][1]}:"
    msg += " name the layer that holds them with layer=, or go back to the unprocessed matrix"
    raise CountsError(msg)


def column_totals(matrix: Matrix, rows: int = 1024) -> NDArray[np.float64]:
    """Return the sum of each column over the first rows, ``(n_vars,)``."""
    block = matrix.rows(0, min(rows, matrix.shape[0]))
    return np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()


def count_blocks(data: CellData, matrix: Matrix, block_rows: int = BLOCK_ROWS, *, values: MatrixValues = "counts") -> Iterator[CellBlock]:
    """Read the count matrix block by block, checking every value.

    Raises
    ------
    CountsError
        At the first value that is not a count (or what else the model reads), naming cell and gene.
    """
    for start in range(0, len(data), block_rows):
        stop = min(start + block_rows, len(data))
        block = CellBlock(start, matrix.rows(start, stop), data.obs.iloc[start:stop])
        if problem := _unfit(block, matrix, values):
            msg = f"no {_WANTED[values][0]} in {data.origin}: {problem}. Name the layer that holds {_WANTED[values][0]} with layer="
            raise CountsError(msg)
        yield block


_WANTED: dict[MatrixValues, tuple[str, str]] = {
    "counts": ("raw counts", "Models need whole-number counts per gene, not normalised values"),
    "abundances": ("abundances", "These options need numbers from 0 up"),
    "log values": ("log-normalised values", "These options need logarithms of normalised counts"),
}
"""What a matrix shall hold, and what to say where none does."""


def _not_logarithms(block: CellBlock, matrix: Matrix, values: MatrixValues) -> str | None:
    """Recognise counts where logarithms are expected."""
    data = block.counts.data
    if values == "log values" and data.any() and (data == np.rint(data)).all():
        return f"{matrix.name} holds only whole numbers, which look like raw counts"
    return None


def _unfit(block: CellBlock, matrix: Matrix, values: MatrixValues) -> str | None:
    """Say what is wrong with a block of would-be counts, or ``None``."""
    data = block.counts.data
    if data.dtype.kind in "ub":
        return None
    if data.dtype.kind not in "if":
        return f"{matrix.name} holds {data.dtype} values"
    faults = {"NaN or infinite values": ~np.isfinite(data), "negative values": data < 0}
    if values == "counts":
        faults["values that are not whole numbers"] = data != np.rint(data)
    for what, wrong in faults.items():
        if wrong.any():
            at = int(np.argmax(wrong))
            row = int(np.searchsorted(block.counts.indptr, at, side="right")) - 1
            cell, gene = block.obs.index[row], matrix.var.index[block.counts.indices[at]]
            return f"{matrix.name} holds {what} ({data[at]:.6g} in cell {cell!r}, gene {gene!r})"
    return None


@contextmanager
def open_cells(data: Any, obs_columns: tuple[str, ...], model: str) -> Iterator[CellData]:
    """Open whatever the user gave as cells."""
    if isinstance(data, str | Path):
        path = Path(data)
        if not path.is_file():
            msg = f"{path} does not exist; pass the path of an .h5ad or .csv file"
            raise InputError(msg)
        if is_csv(path):
            yield from_csv(path)
            return
        if path.suffix != ".h5ad" or not h5py.is_hdf5(path):
            msg = f"{path} is neither an .h5ad nor a .csv file; read it with scanpy and pass the AnnData object, or save it as .h5ad"
            raise InputError(msg)
        with h5py.File(path, "r") as file:
            yield from_h5ad(file, path, obs_columns)
    elif all(hasattr(data, name) for name in ("obs", "var", "layers")):
        yield from_anndata(data, obs_columns)
    else:
        msg = f"{model} is a model of cells; it takes an AnnData object or the path of an .h5ad file, received {type(data).__name__}"
        raise InputError(msg)
