"""Cells, whatever form they come in, read as blocks of raw counts.

An AnnData object or a path goes in; :func:`open_cells` gives :class:`CellData`, :func:`find_counts` chooses the matrix, and
:func:`count_blocks` reads it. The formats are in modules of their own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import h5py

from cellfm_hub.errors import InputError
from cellfm_hub.sources.anndata_store import from_anndata, open_h5ad, open_h5mu, open_zarr
from cellfm_hub.sources.counts import BLOCK_ROWS, MatrixValues, count_blocks, find_counts
from cellfm_hub.sources.loom import open_loom
from cellfm_hub.sources.matrix import CellBlock, CellData, Matrix
from cellfm_hub.sources.tables import is_table, open_table
from cellfm_hub.sources.tenx import find_mtx, open_10x_h5, open_mtx

__all__ = [
    "BLOCK_ROWS",
    "FORMATS",
    "CellBlock",
    "CellData",
    "Matrix",
    "MatrixValues",
    "count_blocks",
    "find_counts",
    "from_anndata",
    "open_cells",
]

FORMATS = "an .h5ad, .h5mu, .loom or 10x .h5 file, a .zarr store, a folder with matrix.mtx, or a .csv, .tsv or .txt table"
"""What can be opened, for messages."""

_Opener = Callable[[Path, Sequence[str] | None], AbstractContextManager[CellData]]

_HDF5: dict[str, _Opener] = {".h5ad": open_h5ad, ".h5mu": open_h5mu, ".loom": open_loom, ".h5": open_10x_h5}


@contextmanager
def open_cells(data: Any, obs_columns: tuple[str, ...] | None, model: str) -> Iterator[CellData]:
    """Open whatever the user gave as cells.

    Parameters
    ----------
    data
        An AnnData object, or a path.
    obs_columns
        Columns of ``obs`` to keep, ``None`` for all.
    model
        Name for messages.

    Raises
    ------
    InputError
        If it is not there, of no known format, or damaged.
    """
    if isinstance(data, str | Path):
        with _open_path(Path(data), obs_columns) as cells:
            yield cells
    elif all(hasattr(data, name) for name in ("obs", "var", "layers")):
        yield from_anndata(data, obs_columns)
    else:
        msg = f"{model} is a model of cells; it takes an AnnData object or the path of {FORMATS}, received {type(data).__name__}"
        raise InputError(msg)


def _open_path(path: Path, obs_columns: tuple[str, ...] | None) -> AbstractContextManager[CellData]:
    if not path.exists():
        msg = f"{path} does not exist; pass the path of {FORMATS}"
        raise InputError(msg)
    if path.is_dir() and any((path / name).is_file() for name in (".zgroup", "zarr.json", ".zattrs")):
        return open_zarr(path, obs_columns)
    if path.is_dir() or path.name.endswith((".mtx", ".mtx.gz")):
        return open_mtx(find_mtx(path))
    if is_table(path):
        return open_table(path)
    opener = _HDF5.get(path.suffix)
    if opener is None:
        msg = f"{path} is none of the formats that can be read; pass {FORMATS}, or read it yourself and pass the AnnData object"
        raise InputError(msg)
    if not h5py.is_hdf5(path):
        msg = f"{path} is not the {path.suffix} file that its name says (not HDF5, or cut short); fetch or write it again"
        raise InputError(msg)
    return opener(path, obs_columns)
