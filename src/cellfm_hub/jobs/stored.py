"""Results that were written before, read back from any format."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.blocks import Vectors
from cellfm_hub.errors import InputError, OutputError
from cellfm_hub.jobs.content import RowFacts
from cellfm_hub.jobs.finished import SLICE
from cellfm_hub.receipt import Receipt
from cellfm_hub.sources.safe_stores import open_hdf5, open_zarr


@dataclass(frozen=True)
class Stored:
    """One model's vectors in a file."""

    path: Path
    receipt: Receipt
    rows: int
    width: int
    facts: RowFacts | None
    """What vectors were made from, if the file says so: of those that were written there, whatever became of the rows since."""
    vectors: Callable[[], Iterator[Vectors]]


def facts_key(key: str) -> str:
    """Return the key in ``obsm`` under which stands what the rows of an embedding were made from.

    There AnnData takes it along when rows are chosen, shuffled or put together. It is no embedding: its name does not begin with ``X_``.
    """
    return f"cellfm_rows_{key}"


def pack(facts: RowFacts) -> NDArray[np.uint32]:
    """Return facts as ``(n, 6)`` uint32, which also a float64 holds exactly: AnnData makes it one where it fills in missing rows."""
    return np.ascontiguousarray(facts, dtype="<u8").view("<u4")


def unpack(packed: NDArray[Any]) -> RowFacts | None:
    """Take back what :func:`pack` gave, without rows that were filled in; ``None`` if it is something else."""
    if packed.ndim != 2 or packed.shape[1] != 6 or packed.dtype.kind not in "uf":
        return None
    known = packed[np.isfinite(packed).all(axis=1)]
    return np.ascontiguousarray(known, dtype="<u4").view("<u8").astype(np.uint64)


def read_stored(path: Path, key: str) -> Stored | None:
    """Find the vectors of a model in a file.

    Returns
    -------
    ``None`` if the file has none under that key, or was not written by the hub.

    Raises
    ------
    OutputError
        If it cannot be read.
    InputError
        If it is refused, see :mod:`cellfm_hub.sources.safe_stores`.
    """
    readers = {".h5ad": _from_h5ad, ".zarr": _from_zarr, ".parquet": _from_parquet, ".npy": _from_npy}
    try:
        return readers[path.suffix](path, key)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        msg = f"{path} cannot be read ({' '.join(str(error).split())}); pass --overwrite to replace it"
        raise OutputError(msg) from error


def _from_h5ad(path: Path, key: str) -> Stored | None:
    with open_hdf5(path) as file:
        found = _from_group(path, file, key)
    if found is None:
        return None

    def vectors() -> Iterator[Vectors]:
        with open_hdf5(path) as file:
            yield from _slices(file[f"obsm/{key}"])

    return replace(found, vectors=vectors)


def _from_zarr(path: Path, key: str) -> Stored | None:
    group = open_zarr(path)
    found = _from_group(path, group, key)
    return None if found is None else replace(found, vectors=lambda: _slices(group[f"obsm/{key}"]))


def _from_group(path: Path, group: Any, key: str) -> Stored | None:
    from anndata.io import read_elem

    if f"obsm/{key}" not in group or f"uns/cellfm/{key}" not in group:
        return None
    receipt = {name: _plain(value) for name, value in read_elem(group[f"uns/cellfm/{key}"]).items()}
    shape: tuple[int, ...] = getattr(group[f"obsm/{key}"], "shape", ())
    if len(shape) != 2:  # a table or a sparse matrix, which is not the hub's
        return None
    packed = group.get(f"obsm/{facts_key(key)}")
    facts = unpack(packed[:]) if hasattr(packed, "shape") else None
    return Stored(path, receipt, int(shape[0]), int(shape[1]), facts, lambda: iter(()))


def _slices(array: Any) -> Iterator[Vectors]:
    for start in range(0, array.shape[0], SLICE):
        yield array[start : start + SLICE]


def _from_parquet(path: Path, _key: str) -> Stored | None:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        metadata, rows = file.schema_arrow.metadata or {}, file.metadata.num_rows
        columns = [name for name in file.schema_arrow.names if name.isdecimal()]  # the dimensions
    if b"cellfm" not in metadata:
        return None
    about = json.loads(metadata.get(b"cellfm_rows", b"{}"))
    facts = unpack(np.frombuffer(base64.b64decode(about["facts"]), "<u4").reshape(-1, 6)) if "facts" in about else None

    def vectors() -> Iterator[Vectors]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(SLICE, columns=columns):
                yield np.column_stack([column.to_numpy() for column in batch.columns])

    return Stored(path, json.loads(metadata[b"cellfm"]), rows, len(columns), facts, vectors)


def _from_npy(path: Path, _key: str) -> Stored | None:
    receipt, rows = path.with_suffix(".receipt.json"), path.with_suffix(".rows.npz")
    if not receipt.is_file():
        return None
    array = np.load(path, mmap_mode="r")
    facts = None
    if rows.is_file():
        with np.load(rows) as about:
            facts = unpack(about["facts"]) if "facts" in about else None
    n, width = array.shape
    return Stored(path, json.loads(receipt.read_text(encoding="utf-8")), n, width, facts, lambda: _slices(array))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
