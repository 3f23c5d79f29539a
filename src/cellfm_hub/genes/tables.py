"""The tables of genes: those that ship with the package, and the richer ones that a user may have in a folder.

What is read from a folder, by the name of the file (tab-separated text, gzipped or not, several values of a field separated by ``|``):

=============================================== =====================================================================================
``<species>_gencode_*``                         ``ensembl_id``, ``symbol``: current genes; they add to the shipped ones and overrule them
``hgnc_*``                                      HGNC complete set: ``symbol``, ``prev_symbol``, ``alias_symbol``, ``entrez_id``,
                                                ``ensembl_gene_id``
``human_ensembl_ids_not_in_*``                  retired ids: ``ensembl_id``, ``symbol``, ``entrez``
``mouse_symbol_aliases*``                       ``alias``, ``approved_symbol``
``mouse_human_orthologs*``                      ``mouse_ensembl_id``, ``mouse_symbol``, ``human_ensembl_id``, ``human_symbol``, ``type``
=============================================== =====================================================================================
"""

import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub._settings import settings
from cellfm_hub.errors import InputError

TABLES = Path(__file__).with_name("data")
"""Where the shipped tables are."""

SHIPPED = {"human": "ENSG", "mouse": "ENSMUSG"}
"""Species with a shipped table, and how their Ensembl ids begin."""

HGNC_COLUMNS = ("symbol", "prev_symbol", "alias_symbol", "entrez_id", "ensembl_gene_id")

HISTORY_FILES = {
    "human": ("human_gencode_*", "hgnc_*", "human_ensembl_ids_not_in_*"),
    "mouse": ("mouse_gencode_*", "mouse_symbol_aliases*", "mouse_human_orthologs*"),
}
"""Files that tell more about the genes of a species."""


@lru_cache(maxsize=4)
def shipped(species: str) -> tuple[list[str], list[str]]:
    """Return the current Ensembl ids of a species, ascending, and the symbol of each, empty where it has none of its own."""
    with np.load(TABLES / f"{species}.npz", allow_pickle=False) as table:
        numbers = np.cumsum(table["steps"].astype(np.int64)).tolist()
        symbols = table["symbols"].tobytes().decode().split("\n")
    return [f"{SHIPPED[species]}{number:011d}" for number in numbers], symbols


@lru_cache(maxsize=4)
def symbols(species: str) -> frozenset[str]:
    """Return the current symbols of a species."""
    return frozenset(shipped(species)[1]) - {""}


def release(species: str) -> str:
    """Name the release that the shipped table of a species is of."""
    provenance = json.loads((TABLES / "provenance.json").read_text(encoding="utf-8"))
    return str(provenance["tables"][f"{species}.npz"]["release"])


class Version(NamedTuple):
    """A file as it is now; part of the key of what is kept in memory."""

    path: Path
    size: int
    modified: int


def history_folders() -> list[Path]:
    """Return where tables of the user are looked for: ``settings.genes_dir``, then where ``cellfm genes`` puts what it fetches."""
    return [*([settings.genes_dir] if settings.genes_dir else []), settings.cache_dir / "genes"]


def history_files(patterns: Sequence[str]) -> tuple[Version, ...]:
    """Return the newest file (by name) of each pattern, of the first folder that has one; patterns without a file are left out."""
    found = []
    for pattern in patterns:
        for folder in history_folders():
            paths = sorted(p for p in folder.glob(pattern) if p.name.endswith((".tsv.gz", ".tsv", ".txt", ".txt.gz")))
            if paths:
                status = paths[-1].stat()
                found.append(Version(paths[-1], status.st_size, status.st_mtime_ns))
                break
    return tuple(found)


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns of a table as text; missing entries are empty strings.

    Raises
    ------
    InputError
        If the file is damaged, or is another table.
    """
    try:
        table = pd.read_csv(path, sep="\t", usecols=list(columns), dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problem = str(error).strip().partition("\n")[0]
        msg = f"{path} cannot be read as a gene table ({problem}); expected tab-separated text with columns {', '.join(columns)},"
        msg += " gzipped if its name says so: replace it, or name another folder as CELLFM_GENES"
        raise InputError(msg) from error
    return table


def split_field(values: pd.Series, separator: str = "|") -> tuple[NDArray[np.int64], NDArray[np.object_]]:
    """Return row and value of every value of a field that holds several."""
    filled = values[values != ""]
    parts = [text.split(separator) for text in filled]
    rows = np.repeat(filled.index.to_numpy(np.int64), [len(row) for row in parts])
    flat = [part for row in parts for part in row]
    return rows, np.array(flat, dtype=object)
