"""Write results to files. A file appears under its name only when it is complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from cellfm_hub.blocks import Vectors
from cellfm_hub.errors import OutputError
from cellfm_hub.receipt import Receipt
from cellfm_hub.tokens import Ragged

SUFFIXES = (".h5ad", ".zarr", ".parquet", ".npy")


def check_output(out: Path, *, source: Path, key: str, overwrite: bool, per_token: bool = False) -> None:
    """Raise before any work is done if a result could not be written.

    Parameters
    ----------
    out
        Where the result shall go; the same as `source`: into that file.
    source
        The data.
    key
        Key in ``obsm``.
    overwrite
        Whether an existing result may be replaced.
    per_token
        Whether the result has one vector per token, which only a table can hold.

    Raises
    ------
    OutputError
        Saying why, and what to do.
    """
    if out.suffix not in SUFFIXES:
        msg = f"{out}: results are written as {', '.join(SUFFIXES)}; choose one of these suffixes"
        raise OutputError(msg)
    if per_token and out.suffix != ".parquet":
        msg = f"{out}: one vector per gene, token or base makes a table of its own; choose a name that ends in .parquet with -o"
        raise OutputError(msg)
    folder = out.parent
    if not folder.is_dir():
        msg = f"{out} cannot be written: the folder {folder} does not exist; make it, or choose another with -o"
        raise OutputError(msg)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        writable = not out.exists() or os.access(out, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        msg = f"{out} cannot be written: no permission there; choose another place with -o"
        raise OutputError(msg)
    if out.suffix == ".h5ad" and _is_legacy(source):
        msg = f"{source} was written by an AnnData before 0.7, whose files cannot take a result; choose .zarr, .parquet or .npy with -o,"
        msg += " or write it anew with anndata.read_h5ad and write_h5ad"
        raise OutputError(msg)
    if _same_file(out, source):
        if out.suffix != ".h5ad":
            msg = f"{out} is the input; only an .h5ad file can take the result in place, choose another name with -o"
            raise OutputError(msg)
        with h5py.File(out, "r") as file:
            if key in file.get("obsm", ()) and not overwrite:
                msg = f"{out} already has obsm[{key!r}]; pass --overwrite to replace it, or another name with --key-added"
                raise OutputError(msg)
    elif out.exists() and not overwrite:
        msg = f"{out} exists; pass --overwrite to replace it, or choose another name with -o"
        raise OutputError(msg)


def write(out: Path, *, source: Path, key: str, names: list[str], values: Vectors | Ragged, receipt: Receipt) -> None:
    """Write vectors and their receipt.

    One vector per token (a :class:`Ragged`) goes to ``.parquet`` only: a row per token, with the ``id`` of its input, its ``position``
    there and its ``token``. One vector per input:

    ``.h5ad``: a copy of the input (or the input itself, if it is `out`) with ``obsm[key]`` and ``uns["cellfm"][key]``; matrices are
    copied as bytes, never read. ``.zarr``: an AnnData store with ``obs``, ``obsm`` and ``uns``. ``.parquet``: one column per
    dimension, rows named, the receipt in the schema's metadata. ``.npy``: the array, beside it ``.ids.txt`` and ``.receipt.json``.

    Raises
    ------
    OutputError
        If the file cannot be written; what was there before is untouched.
    """
    try:
        if isinstance(values, Ragged):
            with _appearing_when_complete(out) as partial:
                _write_ragged(partial, names, values, receipt)
            return
        if _same_file(out, source):
            with h5py.File(out, "r+") as file:
                _add_to_h5ad(file, key, values, receipt)
            return
        with _appearing_when_complete(out) as partial:
            if out.suffix == ".h5ad":
                _write_h5ad(partial, source, key, names, values, receipt)
            elif out.suffix == ".zarr":
                _anndata(source, key, names, values, receipt).write_zarr(partial)
            elif out.suffix == ".parquet":
                _write_parquet(partial, names, values, receipt)
            else:
                with partial.open("wb") as file:
                    np.save(file, values)
                out.with_suffix(".ids.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
                out.with_suffix(".receipt.json").write_text(json.dumps(receipt, indent=1), encoding="utf-8")
    except OSError as error:
        msg = f"{out} cannot be written: {error.strerror or error}; free space or choose another place with -o"
        raise OutputError(msg) from error


def _is_legacy(source: Path) -> bool:
    if source.suffix != ".h5ad" or not h5py.is_hdf5(source):
        return False
    with h5py.File(source, "r") as file:
        return isinstance(file.get("obs"), h5py.Dataset)


def _same_file(out: Path, source: Path) -> bool:
    return out.exists() and source.exists() and out.samefile(source)


@contextmanager
def _appearing_when_complete(out: Path) -> Iterator[Path]:
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield partial
        if out.is_dir():
            shutil.rmtree(out)
        partial.replace(out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def _write_h5ad(partial: Path, source: Path, key: str, names: list[str], values: Vectors, receipt: Receipt) -> None:
    if source.suffix == ".h5ad":
        shutil.copyfile(source, partial)
        with h5py.File(partial, "r+") as file:
            _add_to_h5ad(file, key, values, receipt)
    else:
        _anndata(source, key, names, values, receipt).write_h5ad(partial)


def _add_to_h5ad(file: h5py.File, key: str, values: Vectors, receipt: Receipt) -> None:
    from anndata.io import write_elem

    for place in ("obsm", "uns", "uns/cellfm"):
        if place not in file:
            write_elem(file, place, {})
    write_elem(file, f"obsm/{key}", values)
    write_elem(file, f"uns/cellfm/{key}", receipt)


def _anndata(source: Path, key: str, names: list[str], values: Vectors, receipt: Receipt) -> Any:
    """Make an AnnData object of the result alone, with the annotation of the rows."""
    from anndata import AnnData

    from cellfm_hub.sources.cells import open_cells

    obs = pd.DataFrame(index=pd.Index(names, name="id"))
    if source.suffix in (".h5ad", ".zarr", ".h5mu", ".loom"):
        with open_cells(source, None, "the result") as cells:
            obs = cells.obs
    return AnnData(obs=obs, obsm={key: values}, uns={"cellfm": {key: receipt}})


def _write_parquet(partial: Path, names: list[str], values: Vectors, receipt: Receipt) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [str(i) for i in range(values.shape[1])]
    table = pa.Table.from_pandas(pd.DataFrame(values, index=pd.Index(names, name="id"), columns=columns))
    pq.write_table(_with_receipt(table, receipt), partial)


def _write_ragged(partial: Path, names: list[str], values: Ragged, receipt: Receipt) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = np.diff(values.offsets)
    # A base that was cut off has no token.
    tokens = np.where(values.ids < 0, "", values.vocabulary[values.ids])
    inputs = pa.DictionaryArray.from_arrays(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), pa.array(names))
    leading = {"id": inputs, "position": np.arange(len(values.ids)) - np.repeat(values.offsets[:-1], lengths), "token": tokens}
    table = pa.table(leading | {str(i): column for i, column in enumerate(values.values.T)})
    pq.write_table(_with_receipt(table, receipt), partial)


def _with_receipt(table: Any, receipt: Receipt) -> Any:
    """Put the receipt into the metadata of an arrow table, under ``cellfm``."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), b"cellfm": json.dumps(receipt).encode()})
