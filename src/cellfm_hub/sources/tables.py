"""Tables of text, ``.csv``, ``.tsv`` or ``.txt``, plain or gzipped: a row per cell, its name first, and a column per gene."""

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from cellfm_hub.errors import InputError
from cellfm_hub.sources.matrix import CellData, Matrix
from cellfm_hub.sources.temporary_rows import Part, TemporaryRows

_ROWS = 256
"""Rows that are dense at a time."""

_SUFFIXES = (".csv", ".tsv", ".txt")

_GENE = re.compile(
    r"ENS[A-Z]*G\d{11}(\.\d+)?|(MT-|RP[LS]\d+[AXYL]?$|HLA-|ACTB$|ACTG1$|GAPDH$|B2M$|MALAT1$|EEF1A1$|TMSB4X$|FTL$|FTH1$|VIM$|CD[348][A-Z]?$)",
    re.IGNORECASE,
)
"""Names that only genes have: Ensembl ids, and symbols found in nearly every data set."""


def is_table(path: Path) -> bool:
    """Whether the name of a file says a table of text, plain or gzipped."""
    return path.name.removesuffix(".gz").endswith(_SUFFIXES)


@contextmanager
def open_table(path: Path) -> Iterator[CellData]:
    """Read a table. Its numbers go to a temporary file, whatever the size of the text.

    Raises
    ------
    InputError
        If it is not such a table, or looks transposed.
    """
    separator, heading, genes = _header(path)
    names: list[str] = []

    def entries() -> Iterator[Part]:
        first = 0
        for chunk in _chunks(path, separator, genes):
            rows, columns = np.nonzero(chunk)
            yield rows + first, columns, chunk[rows, columns]
            first += len(chunk)

    with _one_line(path):
        for chunk in pd.read_csv(
            path,
            sep=separator,
            header=None,
            skiprows=1,
            usecols=[0],
            dtype=str,
            chunksize=_ROWS,
            encoding="utf-8-sig",
            keep_default_na=False,
        ):
            names += chunk[0].tolist()
    _refuse_transposed(path, names, genes)
    _refuse_nameless(path, names, heading)
    matrix = TemporaryRows((len(names), len(genes)), entries, f"the table {path}")
    var = pd.DataFrame(index=pd.Index(genes, dtype=object))
    yield CellData(pd.DataFrame(index=pd.Index(names, dtype=object)), {"X": Matrix("X", matrix, var, path)}, str(path))


def _header(path: Path) -> tuple[str, str, list[str]]:
    """Return what separates the columns, what stands above the names of cells, and the names of the genes.

    pandas would rename the second of two equal genes, which would then be no gene at all.
    """
    with _one_line(path), gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file:
        lines = [file.readline(), file.readline()]
        expected = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
        separator = next((s for s in (expected, "\t", ",", ";", " ") if s in lines[0]), expected)
        first, second = ([*csv.reader([line], delimiter=separator)] or [[]] for line in lines)
        # R writes no name for the column of names.
        shift = 0 if len(second[0]) == len(first[0]) + 1 else 1
        return separator, first[0][0] if shift and first[0] else "", first[0][shift:]


def _chunks(path: Path, separator: str, genes: list[str]) -> Iterator[np.ndarray]:
    """Give the numbers of the table, some rows at a time."""
    with (
        _one_line(path),
        pd.read_csv(
            path, sep=separator, header=None, skiprows=1, index_col=0, dtype={0: str}, chunksize=_ROWS, encoding="utf-8-sig"
        ) as chunks,
    ):
        for chunk in chunks:
            if chunk.shape[1] != len(genes):
                msg = f"{path} has {len(genes):,} genes in its header and {chunk.shape[1]:,} values in its rows;"
                msg += " expected a first column with the names of cells, then one column per gene, and a header of the same form"
                raise InputError(msg)
            text = [genes[i] for i, kind in enumerate(chunk.dtypes) if kind.kind not in "iufb"]
            if text:
                msg = f"{path} holds text in {len(text):,} columns (first: {text[0]!r}); expected numbers in all columns but the first"
                raise InputError(msg)
            yield chunk.to_numpy(dtype=np.float64)


def _refuse_transposed(path: Path, names: Sequence[str], genes: Sequence[str]) -> None:
    """Refuse genes in rows: in the first column stand names that only genes have, and in the header none.

    Raises
    ------
    InputError
        With the names that were recognised.
    """
    in_rows = [name for name in names if _GENE.match(name)]
    if len(in_rows) >= min(2, len(names)) > 0 and not any(_GENE.match(name) for name in genes):
        msg = f"{path} looks transposed: its first column names genes ({', '.join(in_rows[:3])}, …), its header {', '.join(genes[:2])}, …;"
        msg += " expected a row per cell and a column per gene, write it anew with pandas.read_csv(…, index_col=0).T.to_csv(…)"
        raise InputError(msg)


def _refuse_nameless(path: Path, names: Sequence[str], heading: str) -> None:
    """Refuse a first column of counts, which would be lost as the names of cells.

    Raises
    ------
    InputError
        If it has a heading, and holds numbers of which some stand twice.
    """
    if heading and len(set(names)) < len(names) and all(name.replace(".", "", 1).isdecimal() for name in names):
        msg = f"{path} seems to have no column with the names of cells: its first one, {heading!r}, holds numbers that repeat"
        msg += f" ({', '.join(names[:3])}, …); expected the names first, as pandas.DataFrame.to_csv writes them with index=True"
        raise InputError(msg)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn what a table that is none raises into one line."""
    try:
        yield
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        UnicodeDecodeError,
        csv.Error,
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
    ) as error:
        msg = f"{path} cannot be read as a table of numbers ({' '.join(str(error).split())});"
        msg += " expected a row per cell and a column per gene, separated by commas or tabs, or an .h5ad file"
        raise InputError(msg) from error
