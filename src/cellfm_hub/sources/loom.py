"""``.loom`` files: genes × cells, with annotation of both."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellfm_hub.errors import InputError
from cellfm_hub.sources.matrix import CellData, Matrix, reading
from cellfm_hub.sources.safe_stores import open_hdf5
from cellfm_hub.sources.temporary_rows import ENTRIES, Part, TemporaryRows

_GENE_NAMES = ("Gene", "var_names", "gene", "gene_name", "GeneName", "Accession", "gene_ids")
_CELL_NAMES = ("CellID", "obs_names", "cell_id", "barcode", "Barcode")


@contextmanager
def open_loom(path: Path, obs_columns: Sequence[str] | None) -> Iterator[CellData]:
    """Open a loom file; its main matrix is ``X``, its layers keep their names.

    Raises
    ------
    InputError
        If it has no matrix, no names, or is damaged.
    """
    with reading(path):
        file = open_hdf5(path)
    with file:
        with reading(path):
            missing = [key for key in ("matrix", "row_attrs", "col_attrs") if key not in file]
            if missing:
                msg = f"{path} has no {' and no '.join(missing)}; expected a loom file of version 2 or 3"
                raise InputError(msg)
            genes, cells = file["matrix"].shape
            var = _annotation(file["row_attrs"], genes, _GENE_NAMES, f"row_attrs of {path}")
            obs = _annotation(file["col_attrs"], cells, _CELL_NAMES, f"col_attrs of {path}")
            matrices = {"X": Matrix("X", _by_cells(file["matrix"], "X", path), var, path)}
            for layer in file.get("layers", ()):
                name = f"layers[{layer!r}]"
                if file["layers"][layer].shape != (genes, cells):
                    msg = f"{path} is damaged: {name} and the main matrix are of different sizes"
                    raise InputError(msg)
                matrices[name] = Matrix(name, _by_cells(file["layers"][layer], name, path), var, path)
        yield CellData(obs if obs_columns is None else obs[[c for c in obs_columns if c in obs]], matrices, str(path))


def _annotation(group: Any, size: int, names: Sequence[str], where: str) -> pd.DataFrame:
    columns = {key: _texts(group[key][:]) for key in group if group[key].shape == (size,)}
    index = next((name for name in names if name in columns), None)
    if index is None:
        msg = f"{where} name nothing: expected {' or '.join(map(repr, names[:2]))}, found {', '.join(map(repr, group)) or 'nothing'}"
        raise InputError(msg)
    return pd.DataFrame(columns, index=pd.Index(columns.pop(index).astype(str), name=index))


def _texts(values: Any) -> Any:
    """Turn bytes into text; leave numbers alone."""
    if values.dtype.kind not in "SO":
        return values
    return np.array([v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values.tolist()], dtype=object)


class _Transposed:
    """Cells × genes of a dense matrix that stands on disk as genes × cells."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.shape = dataset.shape[::-1]
        self.dtype = dataset.dtype

    def __getitem__(self, rows: slice) -> Any:
        return self._dataset[:, rows].T


def _by_cells(dataset: Any, name: str, path: Path) -> Any:
    """Return a view by cells, or a temporary copy where a chunk on disk holds so many cells that each would be read many times."""
    genes, cells = dataset.shape
    if dataset.chunks is None or dataset.chunks[1] * genes <= 4 * ENTRIES:
        return _Transposed(dataset)

    def entries() -> Iterator[Part]:
        step = max(1, ENTRIES // max(cells, 1))
        step = -(-step // dataset.chunks[0]) * dataset.chunks[0]
        for start in range(0, genes, step):
            block = dataset[start : start + step]
            rows, columns = np.nonzero(block)
            yield columns, rows + start, block[rows, columns]

    return TemporaryRows((cells, genes), entries, f"{name} of {path} (stored by genes)")
