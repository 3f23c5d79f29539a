"""From the columns of a count matrix to the genes a model knows."""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub._settings import settings
from cellfm_hub.errors import GeneCoverageError, InputError

CountMatrix: TypeAlias = sp.csr_matrix
"""Raw counts, cells × genes."""


@dataclass(frozen=True)
class GeneMap:
    """Which column of a matrix feeds which gene of a model.

    Parameters
    ----------
    columns
        ``(m,)`` columns of the matrix that are used.
    targets
        ``(m,)`` for each of them, the place of its gene in `tokens`. Columns that share a place are summed.
    tokens
        ``(g,)`` token id of each gene, in the order the model's tie-breaking wants.
    n_columns
        Columns of the matrix.
    n_other
        How many of `columns` hold something else than a gene, such as a total.
    facts
        What else the receipt shall say of the match.
    notes
        What the user shall be told of it, one line each.
    """

    columns: NDArray[np.int64]
    targets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    n_columns: int
    n_other: int = 0
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _lookup: NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lookup = np.full(self.n_columns, -1, dtype=np.int32)
        lookup[self.columns] = self.targets
        object.__setattr__(self, "_lookup", lookup)

    @property
    def n_matched(self) -> int:
        """Columns of the matrix that hold a gene the model can use."""
        return len(self.columns) - self.n_other

    @property
    def n_summed(self) -> int:
        """Columns that are added to another one of the same gene."""
        return len(self.columns) - len(np.unique(self.targets))

    def apply(self, counts: CountMatrix) -> CountMatrix:
        """Return cells × genes: columns selected, reordered and summed; stored zeros dropped; indices sorted within each row."""
        target = self._lookup[counts.indices]
        keep = (target >= 0) & (counts.data != 0)
        indptr = np.concatenate(([0], np.cumsum(keep)))[counts.indptr]
        out = sp.csr_matrix((counts.data[keep], target[keep], indptr), shape=(counts.shape[0], len(self.tokens)))
        if not out.has_sorted_indices:
            out = out.tocsc().tocsr()  # sorts in linear time, unlike sort_indices
        out.sum_duplicates()
        return out


def choose_gene_ids(
    var: pd.DataFrame,
    match: Callable[[Sequence[str]], GeneMap],
    *,
    column: str | None,
    preferred: Sequence[str],
    model: str,
    symbols_of: Sequence[str] = (),
) -> tuple[str, GeneMap]:
    """Find the column of `var` that holds identifiers the model knows.

    Where none does, the model knows symbols and a column holds Ensembl ids, these are read as symbols by the tables in
    ``settings.genes_dir``, if there are any.

    Parameters
    ----------
    var
        Annotation of the genes.
    match
        The adapter's ``match_genes``.
    column
        The user's choice, ``"index"`` for the names themselves; ``None``: the one that matches most genes.
    preferred
        Columns to prefer among equals.
    model
        Name for messages.
    symbols_of
        The species of the model, if its identifiers are symbols.

    Returns
    -------
    The name of the column (``"index"`` for ``var_names``) and its map.

    Raises
    ------
    InputError
        If there is no such column.
    GeneCoverageError
        If no gene matches.
    """
    candidates = identifier_columns(var, column)
    maps = {name: match(ids) for name, ids in candidates.items()}
    order = [*(name for name in preferred if name in maps), *maps]
    best = max(order, key=lambda name: maps[name].n_matched)
    if maps[best].n_matched == 0 and symbols_of:
        for name, ids in candidates.items():
            symbols = _ensembl_as_symbols(ids, symbols_of)
            if symbols is not None and (read := match(symbols)).n_matched:
                return f"{name} (Ensembl ids read as symbols)", read
    if maps[best].n_matched == 0:
        looked = "; ".join(f"{name} ({', '.join(ids[:3])}, …)" for name, ids in candidates.items())
        msg = f"none of the {len(var):,} genes is in the vocabulary of {model}; looked at {looked}."
        matches = {name: match(ids).n_matched for name, ids in identifier_columns(var).items() if name not in candidates}
        if any(matches.values()):
            fitting = max(matches, key=lambda name: matches[name])
            msg += f" gene_ids={fitting!r} would match {matches[fitting]:,}"
        else:
            msg += f" Name the var column with its identifiers as gene_ids=; 'cellfm info {model}' says which it needs"
            if symbols_of and settings.genes_dir is None:
                msg += ". Ensembl ids are read as symbols where CELLFM_GENES names a folder of gene tables"
        raise GeneCoverageError(msg)
    return best, maps[best]


def identifier_columns(var: pd.DataFrame, column: str | None = None) -> dict[str, list[str]]:
    """Return the index and every text column of `var`, or the one that the user chose; missing entries become empty strings.

    Raises
    ------
    InputError
        If there is no such column.
    """

    def texts(values: "pd.Index | pd.Series") -> list[str]:
        return [value if isinstance(value, str) else "" for value in values.tolist()]

    columns = {"index": texts(var.index)}
    for name in var.columns:
        values = var[name]
        if isinstance(values.dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(values.dtype) or values.dtype == object:
            columns[str(name)] = texts(values)
    if column is None:
        return columns
    if column not in columns:
        msg = f"gene_ids={column!r} is not a text column of var; it has {', '.join(map(repr, columns))}"
        raise InputError(msg)
    return {column: columns[column]}


_ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(?:\.\d+)?$")


def _ensembl_as_symbols(ids: Sequence[str], species: Sequence[str]) -> list[str] | None:
    """Replace Ensembl ids, with or without version, by symbols; ``None`` if they are not Ensembl ids or no tables were named."""
    found = [_ENSEMBL.match(gene) for gene in ids]
    if settings.genes_dir is None or sum(match is not None for match in found) < len(ids) / 2:
        return None
    symbols = _symbol_table(settings.genes_dir, tuple(species))
    return [symbols.get(match[1], "") if match else "" for match in found]


@lru_cache(maxsize=4)
def _symbol_table(folder: Path, species: tuple[str, ...]) -> dict[str, str]:
    """Read Ensembl id -> symbol for some species. Ids without a symbol of their own are left out."""
    paths = [path for name in species for path in sorted(folder.glob(f"{name}_gencode_*.tsv.gz"))]
    if not paths:
        msg = f"{folder} holds no gene table for {' or '.join(species)}; CELLFM_GENES (settings.genes_dir) shall name a folder with"
        msg += f" {species[0]}_gencode_*.tsv.gz, or be unset"
        raise InputError(msg)
    table: dict[str, str] = {}
    for path in paths:
        try:
            rows = pd.read_csv(path, sep="\t", usecols=["ensembl_id", "symbol"], dtype=str).dropna()
        except (OSError, EOFError, ValueError, zlib.error) as error:
            msg = f"{path} cannot be read as a gene table ({error}); expected gzipped text with columns ensembl_id and symbol"
            raise InputError(msg) from error
        table |= dict(zip(rows["ensembl_id"], rows["symbol"], strict=True))
    return table
