"""Resolve gene identifiers of any kind to current Ensembl ids or symbols."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.errors import InputError, SpeciesError
from cellfm_hub.genes import tables
from cellfm_hub.genes.identifiers import systems_of
from cellfm_hub.genes.names import name_book
from cellfm_hub.genes.species import SpeciesGuess, guess_species
from cellfm_hub.genes.spellings import respell

Target = Literal["ensembl", "symbol"]


@dataclass(frozen=True)
class Resolution:
    """What identifiers were resolved to.

    Parameters
    ----------
    ids
        ``(n,)`` as given.
    system
        ``(n,)`` ``"Ensembl"``, ``"Ensembl with version"``, ``"Entrez"``, ``"name"`` or ``"missing"``, by spelling alone.
    target
        ``(n,)`` the current identifier; empty where there is none.
    how
        ``(n,)`` by what right: ``"current"``, ``"previous"`` symbol, ``"alias"``, ``"retired"`` Ensembl id, ``"Entrez"`` id, ``"case"``
        (a current symbol in another case), ``"spreadsheet"`` (a date, as ``2-Sep``); or not, because it is ``"ambiguous"`` or
        ``"unknown"``.
    ambiguous
        Each ambiguous name and the genes that it may mean.
    species
        The guess, or what was asked for.
    sources
        Which tables were used.
    """

    ids: NDArray[np.object_]
    system: NDArray[np.object_]
    target: NDArray[np.object_]
    how: NDArray[np.object_]
    ambiguous: dict[str, tuple[str, ...]]
    species: SpeciesGuess
    sources: tuple[str, ...]

    @property
    def n_resolved(self) -> int:
        """Identifiers that have a target."""
        return int(np.count_nonzero(self.target != ""))

    def counts(self) -> dict[str, int]:
        """Return how many identifiers were resolved in which way, and how many were not, most frequent first."""
        return dict(Counter(self.how.tolist()).most_common())

    def to_frame(self) -> pd.DataFrame:
        """Return one row per identifier: ``id``, ``system``, ``target``, ``how``."""
        return pd.DataFrame({"id": self.ids, "system": self.system, "target": self.target, "how": self.how})


def resolve(ids: Sequence[str], *, to: Target = "ensembl", species: str | None = None) -> Resolution:
    """Resolve gene identifiers, of one system or mixed, to current Ensembl ids or symbols.

    A name means the gene of which it is the current Ensembl id or symbol; else the one of which it is a previous symbol or retired id;
    else the one of which it is an alias. Where several genes have it with equal right it is ambiguous, and is not guessed. After that come
    spelling in another case (only where no gene of the other species is spelled so: mouse genes are not human genes in title case) and
    the dates that spreadsheets make of symbols. Spellings that programs make of names (``HLA-A-1`` beside ``HLA-A``, ``HLA.A``,
    ``ENSG…_CD3D``, ``GRCh38_CD3D``) mean what they were made of, where they mean nothing as they are written. The version of an Ensembl id
    is ignored; the ``.1`` of a clone name is part of it.

    The tables in the package know current genes (GENCODE). Previous symbols, aliases, retired and Entrez ids need the tables of
    ``settings.genes_dir`` (``CELLFM_GENES``), or those that :func:`cellfm_hub.genes.fetch_history` brings.

    Parameters
    ----------
    ids
        Identifiers; an empty string is a missing one.
    to
        ``"ensembl"``, without version, or ``"symbol"``.
    species
        ``"human"`` or ``"mouse"``; ``None``: guessed from the identifiers, human if they say nothing.

    Returns
    -------
    :class:`Resolution`.

    Raises
    ------
    InputError
        If `to` is something else, or a table cannot be read.
    SpeciesError
        If there is no table of the species.

    Examples
    --------
    >>> resolve(["CD3D", "ENSG00000156738.18", "2-Sep"], to="symbol").target.tolist()
    ['CD3D', 'MS4A1', 'SEPTIN2']
    """
    if to not in ("ensembl", "symbol"):
        msg = f"to={to!r} is not known; use 'ensembl' or 'symbol'"
        raise InputError(msg)
    names = [identifier if isinstance(identifier, str) else "" for identifier in ids]
    asked = species and SpeciesGuess(species, "as asked for", certain=True, by_ids=False, counts={})
    guess = asked or guess_species(names)
    book = name_book(guess.species or "human")
    if book is None:
        msg = f"there is no table of the genes of {guess}; expected species={' or '.join(map(repr, tables.SHIPPED))}"
        raise SpeciesError(msg)
    plain, _ = respell(names, book.knows, book.species)
    found = book.find(plain)
    targets = book.ensembl if to == "ensembl" else book.symbol
    target = np.full(len(names), "", dtype=object)
    target[found.gene >= 0] = targets[found.gene[found.gene >= 0]]
    ambiguous = {name: book.candidates(name) for name in sorted({plain[i] for i in np.flatnonzero(found.how == "ambiguous")})}
    return Resolution(np.array(names, dtype=object), systems_of(names), target, found.how, ambiguous, guess, book.sources)
