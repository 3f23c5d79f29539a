"""Write results to files, a piece at a time. A file appears under its name only when it is complete."""

import base64
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.errors import CheckpointFormatError, InputError, OutputError, cannot_write
from cellfm_hub.jobs import beside
from cellfm_hub.jobs.durable import sync, sync_folder
from cellfm_hub.jobs.in_place import changing, hdf5_file
from cellfm_hub.jobs.stored import facts_key, pack
from cellfm_hub.sources.matrix import reading
from cellfm_hub.sources.safe_stores import open_hdf5
from cellfm_hub.text_files import read_json_object

if TYPE_CHECKING:
    from cellfm_hub.jobs.finished import Finished

SUFFIXES = (".h5ad", ".zarr", ".parquet", ".npy")

CHUNK_BYTES = 2**20
"""Vectors in ``.h5ad`` and ``.zarr`` are stored in chunks of about this size."""

MOST_CONTENT_IN_PARQUET = 1_000_000
"""Tables with more rows do not say what the rows were made from: 24 bytes per row would make the end of the file, read as a whole by every
reader, too long."""


def check_suffix(out: Path) -> None:
    """Raise an OutputError if a name is none of a result."""
    if out.suffix not in SUFFIXES:
        msg = f"{out}: results are written as {', '.join(SUFFIXES)}; choose one of these suffixes"
        raise OutputError(msg)


def check_output(
    out: Path, *, source: Path, keys: Sequence[str], overwrite: bool, per_token: bool = False, columns: Sequence[str] = ()
) -> None:
    """Raise before any work is done if a result could not be written.

    Parameters
    ----------
    out
        Where the result shall go; the same as `source`: into that file.
    source
        The data.
    keys
        Keys in ``obsm``.
    overwrite
        Whether an existing result may be replaced.
    per_token
        Whether the result has one vector per token, which only a table can hold.
    columns
        Columns that are added to ``obs``.

    Raises
    ------
    OutputError
        Saying why, and what to do.
    InputError
        If `out` or `source` is an HDF5 file that cannot be read, or is refused.
    """
    check_suffix(out)
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
    if out.suffix == ".h5ad":
        _check_receipts(source)
    if len(keys) > 1 and out.suffix not in (".h5ad", ".zarr"):
        msg = f"{out}: the vectors of several models go into one .h5ad or .zarr; choose such a name with -o, or one model at a time"
        raise OutputError(msg)
    if same_file(out, source):
        if out.suffix != ".h5ad":
            msg = f"{out} is the input; only an .h5ad file can take the result in place, choose another name with -o"
            raise OutputError(msg)
        with reading(out), open_hdf5(out) as file:
            there = [f"obsm[{key!r}]" for key in keys if key in file.get("obsm", ())]
            there += [f"obs[{column!r}]" for column in columns if column in file.get("obs", ())]
            if there and not overwrite:
                msg = f"{out} already has {there[0]}; pass --overwrite to replace it, or another name with --key-added"
                raise OutputError(msg)
    elif out.is_symlink() and not out.exists():
        msg = f"{out} is a link to {out.readlink()}, which does not exist; make that, remove the link, or choose another name with -o"
        raise OutputError(msg)
    elif out.exists() and not overwrite:
        msg = f"{out} exists; pass --overwrite to replace it, or choose another name with -o"
        raise OutputError(msg)
    elif _inside(out, source) or _inside(source, out):
        where = f"lies inside the input {source}" if _inside(out, source) else f"holds the input {source}"
        msg = f"{out} {where}; a result and its data must not change each other, choose another place with -o"
        raise OutputError(msg)
    elif out.is_dir() and not _is_result(out):
        msg = f"{out} is a folder, but not a result of cellfm, and is not replaced; move it away, or choose another name with -o"
        raise OutputError(msg)
    elif out.suffix == ".zarr" and out.exists() and not out.is_dir():
        msg = f"{out} is a file, a .zarr result is a folder; move it away, or choose another name with -o"
        raise OutputError(msg)
    if out.suffix == ".npy":
        beside.refuse_foreign(out)


def _inside(path: Path, folder: Path) -> bool:
    return folder.is_dir() and path.resolve().is_relative_to(folder.resolve())


def write(out: Path, result: "Finished", *, source: Path, folder: Path) -> None:
    """Write finished vectors and their receipts. Of the vectors only a piece is in memory at a time.

    One vector per token goes to ``.parquet`` only: a row per token, with the ``id`` of its input, its ``position`` there and its
    ``token``. One vector per input:

    ``.h5ad``: a copy of the input (or the input itself, if it is `out`) with ``obsm[key]`` and ``uns["cellfm"][key]``; matrices are
    copied as bytes, never read. ``.zarr``: an AnnData store with ``obs``, ``obsm`` and ``uns``. ``.parquet``: one column per
    dimension, rows named, the receipt in the schema's metadata. ``.npy``: the array, beside it ``.ids.txt`` and ``.receipt.json``.

    What the models saw of each cell, where that was asked for, goes to ``obs``, named by the key; into ``.parquet`` behind the dimensions;
    beside an ``.npy`` into ``.qc.parquet``.

    What each row was made from (see :mod:`cellfm_hub.jobs.content`) is kept in ``obsm["cellfm_rows_" + key]``, so that it stays beside its
    row whatever is done to the rows; in the metadata of a table; or in ``.rows.npz``. It is for ``update`` alone.

    Parameters
    ----------
    out
        Where the result shall go.
    result
        The finished parts.
    source
        The data.
    folder
        On the same disk as `out`: where it grows.

    Raises
    ------
    OutputError
        If the file cannot be written; what was there before is untouched.
    InputError
        If the parts are not the rows of the data; likewise.
    """
    result.check()
    try:
        if same_file(out, source):
            with changing(out, folder / "redo.npz") as file:
                _add_to_h5ad(file, result)
            return
        growing = folder / f"result{out.suffix}"
        _remove(growing)
        if out.suffix == ".h5ad":
            if source.suffix == ".h5ad":
                shutil.copyfile(source, growing)
            else:
                _annotation(source, result).write_h5ad(growing)
            with hdf5_file(growing) as file:
                _add_to_h5ad(file, result)
        elif out.suffix == ".zarr":
            _write_zarr(growing, source, result)
        elif out.suffix == ".parquet":
            _write_parquet(growing, result)
        else:
            _write_npy(growing, result)
        _sync(growing)
        if out.suffix == ".npy":
            beside.appear(growing, out, result.beside())
        else:
            _replace(growing, out)
        sync_folder(out.parent)
    except OSError as error:
        raise cannot_write(out, error) from error
    except InputError:  # a ValueError too, with its own story to tell
        raise
    except (TypeError, ValueError, LookupError, RuntimeError, NotImplementedError) as error:  # of AnnData, HDF5 or numpy: not the disk
        msg = f"{out} cannot be written as {out.suffix} ({' '.join(str(error).split())}); choose another format with -o, or mend {source}"
        raise OutputError(msg) from error


def _is_legacy(source: Path) -> bool:
    if source.suffix != ".h5ad" or not h5py.is_hdf5(source):
        return False
    with open_hdf5(source) as file:
        return isinstance(file.get("obs"), h5py.Dataset)


def _check_receipts(source: Path) -> None:
    """See that the receipts can stand beside what the data hold already."""
    if source.suffix != ".h5ad" or not h5py.is_hdf5(source):
        return
    with reading(source), open_hdf5(source) as file:
        if isinstance(file.get("uns/cellfm"), h5py.Dataset):
            msg = f"{source} has uns['cellfm'] of its own, which is no dict of receipts; rename that,"
            msg += " or choose .zarr, .parquet or .npy with -o"
            raise OutputError(msg)


def _is_result(folder: Path) -> bool:
    """Whether a folder is a store with vectors and nothing else, as :func:`write` makes it: not one with data of the user's.

    Told from its names and descriptions: whatever became of the arrays, nothing in it is decoded.
    """
    with_data = [name for name in ("X", "raw") if (folder / name).exists() and _attributes(folder / name).get("encoding-type") != "null"]
    layers = [path for path in (folder / "layers").glob("*") if path.is_dir()]
    return (folder / "uns" / "cellfm").is_dir() and not with_data and not layers


def _attributes(element: Path) -> dict[str, Any]:
    """Return the attributes of an element of a zarr store, of either format; none if they cannot be read."""
    for file, place in ((element / "zarr.json", "attributes"), (element / ".zattrs", None)):
        if file.is_file():
            try:
                content = read_json_object(file)
            except CheckpointFormatError:
                return {}
            found = content if place is None else content.get(place)
            return found if isinstance(found, dict) else {}
    return {}


def same_file(out: Path, source: Path) -> bool:
    """Whether the result goes into the input itself."""
    return out.exists() and source.exists() and out.samefile(source)


# AnnData's formats


def _add_to_h5ad(file: h5py.File, result: "Finished") -> None:
    from anndata.io import read_elem, write_elem

    obs = file["obs"]
    result.check_names(pd.Index(read_elem(obs[obs.attrs["_index"]])))
    for parent, name in (("/", "obsm"), ("/", "uns"), ("uns", "cellfm")):
        if name not in file[parent]:
            write_elem(file[parent], name, {})
    receipts, obsm = file["uns/cellfm"], file["obsm"]
    for place, model in enumerate(result.models):
        for key, pieces, width, dtype in _arrays_of(result, place):
            # Under another name first: HDF5 would put the new array into the room of the old one, and a crash could leave neither.
            chunks = (min(_chunk_rows(width), result.rows), width)
            _fill(obsm.create_dataset(f".{key}", (result.rows, width), dtype, chunks=chunks, track_times=False), pieces)
        for key in (model.key, facts_key(model.key)):
            if key in obsm:
                del obsm[key]
            if f".{key}" in obsm:
                obsm.move(f".{key}", key)
        if model.key in receipts:
            del receipts[model.key]
        write_elem(receipts, model.key, model.receipt)
        _drop_stale_rows(file, model.key)
    columns = result.qc_columns()
    for name, column in columns.items():
        write_elem(obs, name, column)
    if columns:
        order = list(dict.fromkeys([*obs.attrs["column-order"], *columns]))
        obs.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())


def _write_zarr(growing: Path, source: Path, result: "Finished") -> None:
    import zarr

    annotation = _annotation(source, result)
    annotation.uns["cellfm"] = {model.key: model.receipt for model in result.models}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Writing zarr v2 data")  # whichever format AnnData writes, readers know both
        annotation.write_zarr(growing)
    # The summary of all metadata that AnnData wrote must not be used while arrays are added, and is then written again.
    obsm: Any = zarr.open_group(growing, mode="r+", use_consolidated=False)["obsm"]
    for place in range(len(result.models)):
        for key, pieces, width, dtype in _arrays_of(result, place):
            chunks = (min(_chunk_rows(width), result.rows), width)
            _fill(obsm.create_array(key, shape=(result.rows, width), chunks=chunks, dtype=dtype), pieces)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")  # of zarr's format 3: a plan of theirs
        zarr.consolidate_metadata(growing)


def _arrays_of(result: "Finished", place: int) -> Iterator[tuple[str, Iterable[NDArray[Any]], int, str]]:
    """Give the arrays of a model for ``obsm``: key, content in pieces, width and type."""
    model = result.models[place]
    yield model.key, result.vectors(place), model.width, "float32"
    if (facts := result.row_facts(place)) is not None:
        yield facts_key(model.key), map(pack, facts), 6, "uint32"


def _drop_stale_rows(file: h5py.File, key: str) -> None:
    """Remove what versions before 0.1 wrote about the rows of a key: in ``uns``, where it does not follow them."""
    of_rows = file.get("uns/cellfm_rows", {})
    if key in of_rows:
        del of_rows[key]
        if not of_rows:
            del file["uns/cellfm_rows"]


def _fill(array: Any, pieces: Iterable[NDArray[Any]]) -> None:
    """Write rows into an array on disk, marked as AnnData marks them."""
    array.attrs["encoding-type"], array.attrs["encoding-version"] = "array", "0.2.0"
    start = 0
    for piece in pieces:
        array[start : start + len(piece)] = piece
        start += len(piece)


def _chunk_rows(width: int) -> int:
    return max(CHUNK_BYTES // (4 * width), 1)


def _annotation(source: Path, result: "Finished") -> Any:
    """Make an AnnData object without vectors, with the annotation of the rows."""
    from anndata import AnnData

    from cellfm_hub.sources.cells import open_cells

    if source.suffix in (".h5ad", ".zarr", ".h5mu", ".loom"):
        with open_cells(source, None, "the result") as cells:
            result.check_names(cells.obs.index)
            return AnnData(obs=cells.obs.assign(**result.qc_columns()))
    names = pd.Index([name for names in result.names() for name in names], name="id")
    return AnnData(obs=pd.DataFrame(result.qc_columns(), index=names))


def _packed_facts(result: "Finished") -> NDArray[np.uint32] | None:
    """Return what the rows of the only model were made from: 24 bytes per row."""
    facts = result.row_facts(0)
    return None if facts is None else np.concatenate([pack(some) for some in facts])


# Tables and arrays


def _write_parquet(growing: Path, result: "Finished") -> None:
    import pyarrow.parquet as pq

    metadata = {b"cellfm": json.dumps(result.models[0].receipt).encode()}
    if not result.per_token and result.rows <= MOST_CONTENT_IN_PARQUET and (facts := _packed_facts(result)) is not None:
        metadata[b"cellfm_rows"] = json.dumps({"facts": base64.b64encode(facts.tobytes()).decode()}).encode()
    writer = None
    with growing.open("wb") as file:
        for table in result.tables() if result.per_token else _vector_tables(result):
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema.with_metadata({**(table.schema.metadata or {}), **metadata}))
            writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
        if writer is not None:
            writer.close()


def _vector_tables(result: "Finished") -> Iterator[Any]:
    import pyarrow as pa

    columns = [str(i) for i in range(result.models[0].width)]
    start, qc = 0, result.qc_columns()
    for names, vectors in zip(result.names(), result.vectors(0), strict=True):
        frame = pd.DataFrame(vectors, index=pd.Index(names, name="id"), columns=columns)
        yield pa.Table.from_pandas(frame.assign(**{name: column[start : start + len(names)] for name, column in qc.items()}))
        start += len(names)


def _write_npy(growing: Path, result: "Finished") -> None:
    model = result.models[0]
    with growing.with_suffix(beside.IDS).open("w", encoding="utf-8") as file:
        for names in result.names():
            file.writelines(f"{name}\n" for name in names)
    growing.with_suffix(beside.RECEIPT).write_text(json.dumps(model.receipt, indent=1), encoding="utf-8")
    facts = _packed_facts(result)
    if facts is not None:
        with growing.with_suffix(beside.ROWS).open("wb") as binary:
            np.savez(binary, facts=facts)
    if columns := result.qc_columns():
        index = pd.Index([name for names in result.names() for name in names], name="id")
        pd.DataFrame(columns, index=index).to_parquet(growing.with_suffix(beside.QC))
    with growing.open("wb") as binary:
        header = {"descr": "<f4", "fortran_order": False, "shape": (result.rows, model.width)}
        np.lib.format.write_array_header_1_0(binary, header)
        for piece in result.vectors(0):
            binary.write(np.ascontiguousarray(piece, dtype="<f4").data)
    for suffix in result.beside():
        _sync(growing.with_suffix(suffix))


# Names and disks


def _sync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb+") as opened:
                sync(opened.fileno())


def _replace(growing: Path, out: Path) -> None:
    if out.is_dir():  # a folder cannot be replaced in one step
        aside = growing.with_name("replaced")
        _remove(aside)
        out.rename(aside)
    growing.replace(out)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
