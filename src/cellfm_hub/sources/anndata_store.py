"""AnnData as an object in memory, an ``.h5ad`` file, a ``.zarr`` store, or the modality ``rna`` of an ``.h5mu`` file."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellfm_hub.errors import InputError
from cellfm_hub.sources import safe_stores
from cellfm_hub.sources.compressed import CompressedRows
from cellfm_hub.sources.matrix import CellData, Matrix, reading
from cellfm_hub.sources.temporary_rows import by_genes

if TYPE_CHECKING:
    from anndata import AnnData

RNA = "rna"
"""Modality of an ``.h5mu`` file that holds gene expression."""


def from_anndata(adata: "AnnData", obs_columns: Sequence[str] | None = (), path: Path | None = None) -> CellData:
    """Wrap an AnnData object, in memory or backed by the file at `path`. Only matrices compressed by column are copied, when they are read.

    `obs_columns` says which columns of ``obs`` to keep, ``None`` all.
    """
    origin = "the AnnData object" if path is None else str(path)
    if path is None and getattr(adata, "isbacked", False):
        path = Path(adata.filename)
        safe_stores.open_hdf5(path).close()
    found = [("X", adata.X, adata.var)]
    # From anndata 0.13 on, layers[None] is X once more.
    found += [(f"layers[{name!r}]", values, adata.var) for name, values in adata.layers.items() if name is not None]
    if adata.raw is not None:
        found.append(("raw.X", adata.raw.X, adata.raw.var))
    matrices = {name: Matrix(name, _by_rows(values, name, path), var, path) for name, values, var in found if values is not None}
    return CellData(_columns(adata.obs, obs_columns), matrices, origin)


def _by_rows(values: Any, name: str, path: Path | None) -> Any:
    """Return a matrix of an AnnData object in a form that gives rows when it is sliced."""
    if sp.issparse(values):
        return values if values.format == "csr" else _Converted(values)
    if getattr(values, "format", None) == "csc":  # on disk
        with reading(path):
            return by_genes(values.group, values.shape, path or Path("the AnnData object"), name)
    masked = isinstance(values, np.ma.MaskedArray)
    if not masked and (isinstance(values, np.ndarray | h5py.Dataset) or hasattr(values, "format") or _is_zarr(values)):
        return values
    return _Unreadable(values, name)


class _Unreadable:
    """A matrix of another kind, such as a dask array: refused when it is needed."""

    format = "other"

    def __init__(self, values: Any, name: str) -> None:
        self.shape = values.shape
        self._kind, self._name = f"{type(values).__module__.partition('.')[0]} {type(values).__name__}", name

    def __getitem__(self, rows: slice) -> Any:
        msg = f"{self._name} of the AnnData object is a {self._kind}; expected a numpy array or a scipy sparse matrix:"
        msg += " bring it into memory first, for example with adata.to_memory()"
        raise InputError(msg)


class _Converted:
    """A matrix in memory that is not compressed by row: turned when its first rows are asked for."""

    format = "csr"

    def __init__(self, values: Any) -> None:
        self.shape = values.shape
        self._values = values

    def __getitem__(self, rows: slice) -> Any:
        if self._values.format != "csr":
            self._values = self._values.tocsr()
        return self._values[rows]


def _is_zarr(values: Any) -> bool:
    return type(values).__module__.startswith("zarr.")


def _columns(obs: pd.DataFrame, names: Sequence[str] | None) -> pd.DataFrame:
    return obs if names is None else obs[[name for name in names if name in obs]]


@contextmanager
def open_h5ad(path: Path, obs_columns: Sequence[str] | None) -> Iterator[CellData]:
    """Open an ``.h5ad`` file; matrices stay on disk until rows are asked for."""
    with reading(path):
        file = safe_stores.open_hdf5(path)
    with file:
        if isinstance(file.get("obs"), h5py.Dataset):
            with _open_legacy(path, obs_columns) as data:
                yield data
        else:
            yield _from_group(file, path, obs_columns)


@contextmanager
def _open_legacy(path: Path, obs_columns: Sequence[str] | None) -> Iterator[CellData]:
    """Open a file written before AnnData 0.7."""
    import anndata

    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = anndata.read_h5ad(path, backed="r")
        data = from_anndata(adata, obs_columns, path)
    try:
        yield data
    finally:
        adata.file.close()


@contextmanager
def open_h5mu(path: Path, obs_columns: Sequence[str] | None) -> Iterator[CellData]:
    """Open the modality ``rna`` of an ``.h5mu`` file, as written by MuData.

    Raises
    ------
    InputError
        If there is none, naming those that are.
    """
    with reading(path):
        file = safe_stores.open_hdf5(path)
    with file:
        modalities = list(file.get("mod", ()))
        if RNA not in modalities:
            msg = f"{path} has no modality {RNA!r} (it has {', '.join(map(repr, modalities)) or 'none'});"
            msg += " read it with mudata and pass the AnnData object that holds the gene expression"
            raise InputError(msg)
        yield _from_group(file["mod"][RNA], path, obs_columns)


@contextmanager
def open_zarr(path: Path, obs_columns: Sequence[str] | None) -> Iterator[CellData]:
    """Open a ``.zarr`` store, of either format of zarr, as written by AnnData."""
    with reading(path):
        group = safe_stores.open_zarr(path)
    yield _from_group(group, path, obs_columns)


def _from_group(group: Any, path: Path, obs_columns: Sequence[str] | None) -> CellData:
    """Describe an AnnData object that stands in a group of an HDF5 file or zarr store."""
    from anndata.io import read_elem

    with reading(path):
        missing = [key for key in ("obs", "var") if key not in group]
        if missing:
            msg = f"{path} has no {' and no '.join(missing)}; expected a file as written by AnnData"
            raise InputError(msg)
        obs, var = read_elem(group["obs"]), read_elem(group["var"])
        found = [("X", "X", var)] if "X" in group and group["X"].attrs.get("encoding-type") != "null" else []
        found += [(f"layers[{name!r}]", f"layers/{name}", var) for name in group.get("layers", ())]
        if hasattr(group.get("raw"), "keys") and "X" in group["raw"]:  # what is absent may stand there as nothing
            found.append(("raw.X", "raw/X", read_elem(group["raw/var"])))
        matrices = {name: _stored_matrix(name, group[place], genes, path) for name, place, genes in found}
        for matrix in matrices.values():
            if matrix.shape != (len(obs), len(matrix.var)):
                size = f"{matrix.shape[0]:,} x {matrix.shape[1]:,}"
                msg = f"{path} is damaged: {matrix.name} is {size}, but the file names {len(obs):,} cells and {len(matrix.var):,} genes"
                raise InputError(msg)
    return CellData(_columns(obs, obs_columns), matrices, str(path))


def _stored_matrix(name: str, element: Any, var: pd.DataFrame, path: Path) -> Matrix:
    if not hasattr(element, "keys"):
        return Matrix(name, element, var, path)
    kind = element.attrs.get("encoding-type")
    if kind not in ("csr_matrix", "csc_matrix"):
        msg = f"{name} of {path} is a {kind or 'group'}; expected a dense or a sparse matrix"
        raise InputError(msg)
    rows, columns = (int(n) for n in element.attrs["shape"])
    values = CompressedRows(element, (rows, columns)) if kind == "csr_matrix" else by_genes(element, (rows, columns), path, name)
    return Matrix(name, values, var, path)
