"""What Cell Ranger writes: ``.h5`` files, and folders with ``matrix.mtx``; also single ``.mtx`` files with their tables beside them."""

import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.errors import InputError
from cellfm_hub.genes.identifiers import are_genes, other_features
from cellfm_hub.sources.compressed import CompressedRows
from cellfm_hub.sources.matrix import CellData, Matrix, reading
from cellfm_hub.sources.safe_stores import open_hdf5
from cellfm_hub.sources.temporary_rows import ENTRIES, Part, TemporaryRows


@contextmanager
def open_10x_h5(path: Path, _obs_columns: Sequence[str] | None = ()) -> Iterator[CellData]:
    """Open an ``.h5`` file of Cell Ranger 2 (a group per genome) or 3 and later (group ``matrix``). It annotates no cells.

    Raises
    ------
    InputError
        If it is another file, holds several genomes in the old layout, or no genes.
    """
    with reading(path):
        file = open_hdf5(path)
    with file:
        with reading(path):
            group = _matrix_group(file, path)
            var = _features(group)
            barcodes = _texts(group["barcodes"][:])
            features, cells = (int(n) for n in group["shape"][:])
            if (cells, features) != (len(barcodes), len(var)):
                named = f"{len(barcodes):,} cells and {len(var):,} genes"
                msg = f"{path} is damaged: its matrix is {cells:,} x {features:,}, but it names {named}"
                raise InputError(msg)
            rows = CompressedRows(group, (cells, features))
        kept = _gene_features(var, path)
        rows.keep(kept)
        yield CellData(pd.DataFrame(index=pd.Index(barcodes, dtype=object)), {"X": _matrix(rows, var, kept, path)}, str(path))


def _matrix_group(file: h5py.File, path: Path) -> Any:
    if "matrix" in file and "features" in file["matrix"]:
        return file["matrix"]
    genomes = [name for name in file if isinstance(file[name], h5py.Group) and "genes" in file[name] and "barcodes" in file[name]]
    if len(genomes) == 1:
        return file[genomes[0]]
    if genomes:
        msg = (
            f"{path} holds {len(genomes)} genomes ({', '.join(genomes)}); read one with scanpy.read_10x_h5(…, genome=…) and pass the object"
        )
        raise InputError(msg)
    msg = f"{path} is not a feature-barcode matrix of Cell Ranger (it holds {', '.join(file) or 'nothing'});"
    msg += " expected filtered_feature_bc_matrix.h5 or the like; other files are read as .h5ad, .h5mu or .loom"
    raise InputError(msg)


def _features(group: Any) -> pd.DataFrame:
    if "features" not in group:  # Cell Ranger 2
        return pd.DataFrame({"gene_ids": _texts(group["genes"][:])}, index=pd.Index(_texts(group["gene_names"][:]), dtype=object))
    features = group["features"]
    columns = {"gene_ids": _texts(features["id"][:]), "feature_types": _texts(features["feature_type"][:])}
    if "genome" in features:
        columns["genome"] = _texts(features["genome"][:])
    return pd.DataFrame(columns, index=pd.Index(_texts(features["name"][:]), dtype=object))


def _texts(values: Any) -> NDArray[np.object_]:
    return np.array([v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values.tolist()], dtype=object)


def _gene_features(var: pd.DataFrame, path: Path) -> NDArray[np.int64]:
    """Return the places of the features that are genes."""
    if "feature_types" not in var:
        return np.arange(len(var))
    kept = np.flatnonzero(are_genes(var))
    if len(kept) == 0 and len(var):
        found = ", ".join(map(repr, var["feature_types"].unique()[:3].tolist()))
        msg = f"{path} holds no features of type 'Gene Expression', but {found}; models of cells need gene expression"
        raise InputError(msg)
    return kept


def _matrix(values: Any, var: pd.DataFrame, kept: NDArray[np.int64], path: Path) -> Matrix:
    """Return the matrix of the genes, and say what else the file holds."""
    others = other_features(var)
    facts = {"features_left_out": others} if others else {}
    notes = (f"features that are no genes are left out: {others}",) if others else ()
    return Matrix("X", values, var.iloc[kept], path, facts=facts, notes=notes)


@dataclass(frozen=True)
class MtxFiles:
    """A matrix in Matrix Market format and the tables that name its rows and columns."""

    matrix: Path
    barcodes: Path
    features: Path


def find_mtx(path: Path) -> MtxFiles:
    """Find the three files in a folder, or beside a ``.mtx`` file. Their names may have a common beginning, as in GEO.

    Raises
    ------
    InputError
        Saying what is missing.
    """
    folder, matrix = (path, None) if path.is_dir() else (path.parent, path)
    if matrix is None:
        found = sorted(p for p in folder.iterdir() if p.name.endswith(("matrix.mtx", "matrix.mtx.gz")))
        if len(found) != 1:
            deeper = next((p.parent for p in sorted(folder.glob("*/*matrix.mtx*")) + sorted(folder.glob("*/*/*matrix.mtx*"))), None)
            what = f"{len(found)} files matrix.mtx ({', '.join(p.name for p in found)}), name one" if found else "no matrix.mtx"
            msg = f"{folder} is a folder with {what}; expected a .zarr store, or matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv)"
            raise InputError(msg + (f"; did you mean {deeper}?" if deeper is not None and not found else ""))
        (matrix,) = found
    beginning = matrix.name.removesuffix(".gz").removesuffix(".mtx").removesuffix("matrix")

    def table(*names: str) -> Path:
        for name in names:
            for candidate in (folder / f"{beginning}{name}.tsv.gz", folder / f"{beginning}{name}.tsv"):
                if candidate.is_file():
                    return candidate
        wanted = " or ".join(f"{beginning}{name}.tsv" for name in names)
        msg = f"{folder} has no {wanted} (nor the same with .gz) beside {matrix.name}; a matrix without names cannot be used"
        raise InputError(msg)

    return MtxFiles(matrix, table("barcodes", "cells"), table("features", "genes"))


@contextmanager
def open_mtx(files: MtxFiles) -> Iterator[CellData]:
    """Open a matrix in Matrix Market format, as Cell Ranger writes it: features × cells."""
    path = files.matrix
    with reading(files.barcodes):
        barcodes = _read_table(files.barcodes)[0]
    with reading(files.features):
        table = _read_table(files.features)
        names = table[min(1, table.shape[1] - 1)]
        var = pd.DataFrame({"gene_ids": table[0].to_numpy(dtype=object)}, index=pd.Index(names.to_numpy(dtype=object)))
        if table.shape[1] > 2:
            var["feature_types"] = table[2].to_numpy(dtype=object)
    with reading(path):
        rows, columns, _ = _mtx_size(path)
    if (rows, columns) != (len(var), len(barcodes)):
        msg = f"{path} is {rows:,} x {columns:,}, but {files.features.name} names {len(var):,} genes and {files.barcodes.name}"
        msg += f" {len(barcodes):,} cells; expected a row per gene and a column per cell, take the three files of one sample"
        raise InputError(msg)
    kept = _gene_features(var, files.features)
    place = np.full(len(var), -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))

    def entries() -> Iterator[Part]:
        for genes, cells, values in _mtx_entries(path):
            known = place[genes] >= 0
            yield cells[known], place[genes[known]], values[known]

    matrix = TemporaryRows((columns, len(kept)), entries, f"the text of {path}")
    obs = pd.DataFrame(index=pd.Index(barcodes.to_numpy(dtype=object)))
    yield CellData(obs, {"X": _matrix(matrix, var, kept, path)}, str(path))


def _read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="ascii") if path.suffix == ".gz" else path.open(encoding="ascii")


def _mtx_size(path: Path) -> tuple[int, int, int]:
    """Return rows, columns and entries as the head of the file has them."""
    with _open_text(path) as file:
        return _read_head(file)


def _read_head(file: IO[str]) -> tuple[int, int, int]:
    kind = file.readline().lower().split()
    if kind[:3] != ["%%matrixmarket", "matrix", "coordinate"] or kind[3:] not in (["integer", "general"], ["real", "general"]):
        msg = f"its first line is {' '.join(kind)[:80]!r}, expected '%%MatrixMarket matrix coordinate integer general'"
        raise ValueError(msg)
    line = "%"
    while line.startswith("%"):
        line = file.readline()
    rows, columns, entries = (int(word) for word in line.split())
    return rows, columns, entries


def _mtx_entries(path: Path) -> Iterator[Part]:
    """Give row, column and value of all entries, counted from 0.

    Raises
    ------
    ValueError
        If there are fewer or more than the head says.
    """
    with _open_text(path) as file:
        rows, columns, expected = _read_head(file)
        if expected == 0:
            return
        seen = 0
        names = ["row", "column", "value"]
        kinds = {"row": np.int64, "column": np.int64, "value": np.float64}
        with pd.read_csv(file, sep=r"\s+", header=None, names=names, dtype=kinds, chunksize=ENTRIES, engine="c") as chunks:
            for chunk in chunks:
                seen += len(chunk)
                row, column = chunk["row"].to_numpy() - 1, chunk["column"].to_numpy() - 1
                if row.min() < 0 or row.max() >= rows or column.min() < 0 or column.max() >= columns:
                    msg = "an entry points outside the matrix"
                    raise ValueError(msg)
                yield row, column, chunk["value"].to_numpy()
    if seen != expected:
        msg = f"it has {seen:,} entries, {expected:,} were announced"
        raise ValueError(msg)
