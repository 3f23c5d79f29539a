"""Files of finished parts: vectors, names and hashes of some consecutive rows."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cellfm_hub.blocks import Vectors
from cellfm_hub.errors import CellFMError, cannot_write
from cellfm_hub.jobs.content import Content
from cellfm_hub.jobs.durable import durably
from cellfm_hub.qc import COLUMNS, CellQuality
from cellfm_hub.tokens import Ragged


def sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        with durably(path) as temporary:
            yield temporary
    except CellFMError:  # of a computation while it is written: some are OSErrors too
        raise
    except OSError as error:
        raise cannot_write(path.parent, error) from error


def write_vectors(
    path: Path,
    names: Sequence[str],
    vectors: Sequence[Vectors | None],
    contents: Sequence[Content | None],
    cells: Sequence[CellQuality],
) -> str:
    """Write one vector per row, of one model or several.

    Parameters
    ----------
    path
        Ends in ``.npz``.
    names
        Of the rows.
    vectors, contents
        ``(n, d)`` and ``(n, 2)`` of every model in turn; ``None`` where a model has none.
    cells
        What every model saw of each cell.

    Returns
    -------
    SHA-256 of the file.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    arrays: dict[str, Any] = {"names": np.frombuffer(json.dumps(list(names)).encode(), np.uint8)}
    arrays |= {f"vectors_{i}": array for i, array in enumerate(vectors) if array is not None}
    arrays |= {f"content_{i}": array for i, array in enumerate(contents) if array is not None}
    arrays |= {f"{name}_{i}": column for i, of_model in enumerate(cells) for name, column in of_model.columns().items()}
    with _writing(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        return sha256(temporary)


def read_names(path: Path) -> list[str]:
    """Return what the rows are called."""
    with np.load(path) as content:
        names: list[str] = json.loads(content["names"].tobytes())
    return names


def read_vectors(path: Path, model: int) -> Vectors:
    """Return the vectors of a model, by its place."""
    with np.load(path) as content:
        vectors: Vectors = content[f"vectors_{model}"]
    return vectors


def read_content(path: Path, model: int) -> Content | None:
    """Return the hashes of the rows as a model sees them."""
    with np.load(path) as content:
        found: Content | None = content.get(f"content_{model}")
    return found


def read_cells(path: Path, model: int) -> CellQuality:
    """Return what a model saw of each cell."""
    if path.suffix != ".npz":  # one vector per token
        return CellQuality()
    with np.load(path) as content:
        return CellQuality({name: [content[f"{name}_{model}"]] if f"{name}_{model}" in content else [] for name in COLUMNS})


class TokenTable:
    """A table with one row per token that is written piece by piece."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._path, self._parquet = path, pq
        self._writer: Any = None

    def add(self, names: Sequence[str], values: Ragged) -> None:
        """Write the tokens of some rows."""
        table = token_table(names, values)
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Write what closes the file."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def token_part(path: Path) -> Iterator[TokenTable]:
    """Write a part with one vector per token; it appears when it is complete.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    with _writing(path) as temporary:
        table = TokenTable(temporary)
        try:
            yield table
        finally:
            table.close()


def token_table(names: Sequence[str], values: Ragged) -> Any:
    """Return a row per token: the ``id`` of its input, its ``position`` there, what it is, and its vector."""
    import pyarrow as pa

    lengths = np.diff(values.offsets)
    # A base that was cut off has no token.
    tokens = np.where(values.ids < 0, "", values.vocabulary[values.ids])
    inputs = pa.DictionaryArray.from_arrays(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), pa.array(names, pa.string()))
    leading = {"id": inputs, "position": np.arange(len(values.ids)) - np.repeat(values.offsets[:-1], lengths), "token": tokens}
    return pa.table(leading | {str(i): column for i, column in enumerate(values.values.T)})


def read_tokens(path: Path) -> Iterator[Any]:
    """Read such a part as arrow tables, piece by piece."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)
