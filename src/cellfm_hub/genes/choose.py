"""Find the column of a data set that a model reads."""

import re
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

from cellfm_hub._settings import settings
from cellfm_hub.errors import GeneCoverageError, InputError
from cellfm_hub.genes.identifiers import identifier_columns
from cellfm_hub.genes.map import GeneMap


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
