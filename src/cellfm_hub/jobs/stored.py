"""Results that were written before, read back from any format."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellfm_hub.blocks import Vectors
from cellfm_hub.errors import OutputError
from cellfm_hub.jobs.content import Content
from cellfm_hub.jobs.finished import SLICE, hash_vectors
from cellfm_hub.receipt import Receipt


@dataclass(frozen=True)
class Stored:
    """One model's vectors in a file."""

    path: Path
    receipt: Receipt
    rows: int
    width: int
    content: Content | None
    """What each row was made from, if the file says so."""
    sha256: str | None
    """Of the vectors as they were written, likewise."""
    vectors: Callable[[], Iterator[Vectors]]

    def intact(self) -> bool:
        """Whether the vectors are those that were written."""
        return self.sha256 == hash_vectors(self.vectors()) and self.content is not None and len(self.content) == self.rows


def read_stored(path: Path, key: str) -> Stored | None:
    """Find the vectors of a model in a file.

    Returns
    -------
    ``None`` if the file has none under that key, or was not written by the hub.

    Raises
    ------
    OutputError
        If it cannot be read.
    """
    readers = {".h5ad": _from_h5ad, ".zarr": _from_zarr, ".parquet": _from_parquet, ".npy": _from_npy}
    try:
        return readers[path.suffix](path, key)
    except (OSError, ValueError, KeyError) as error:
        msg = f"{path} cannot be read ({' '.join(str(error).split())}); pass --overwrite to replace it"
        raise OutputError(msg) from error


def _from_h5ad(path: Path, key: str) -> Stored | None:
    with h5py.File(path, "r") as file:
        found = _from_group(path, file, key)
    if found is None:
        return None

    def vectors() -> Iterator[Vectors]:
        with h5py.File(path, "r") as file:
            yield from _slices(file[f"obsm/{key}"])

    return replace(found, vectors=vectors)


def _from_zarr(path: Path, key: str) -> Stored | None:
    import zarr

    group = zarr.open_group(str(path), mode="r")
    found = _from_group(path, group, key)
    return None if found is None else replace(found, vectors=lambda: _slices(group[f"obsm/{key}"]))


def _from_group(path: Path, group: Any, key: str) -> Stored | None:
    from anndata.io import read_elem

    if f"obsm/{key}" not in group or f"uns/cellfm/{key}" not in group:
        return None
    receipt = {name: _plain(value) for name, value in read_elem(group[f"uns/cellfm/{key}"]).items()}
    rows = read_elem(group[f"uns/cellfm_rows/{key}"]) if f"uns/cellfm_rows/{key}" in group else {}
    n, width = group[f"obsm/{key}"].shape
    return Stored(path, receipt, int(n), int(width), rows.get("content"), rows.get("sha256"), lambda: iter(()))


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
    content = np.frombuffer(base64.b64decode(about["content"]), np.uint64).reshape(-1, 2) if about else None

    def vectors() -> Iterator[Vectors]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(SLICE, columns=columns):
                yield np.column_stack([column.to_numpy() for column in batch.columns])

    return Stored(path, json.loads(metadata[b"cellfm"]), rows, len(columns), content, about.get("sha256"), vectors)


def _from_npy(path: Path, _key: str) -> Stored | None:
    receipt, rows = path.with_suffix(".receipt.json"), path.with_suffix(".rows.npz")
    if not receipt.is_file():
        return None
    array = np.load(path, mmap_mode="r")
    content = sha256 = None
    if rows.is_file():
        with np.load(rows) as about:
            content, sha256 = about["content"], str(about["sha256"])
    n, width = array.shape
    return Stored(path, json.loads(receipt.read_text(encoding="utf-8")), n, width, content, sha256, lambda: _slices(array))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
