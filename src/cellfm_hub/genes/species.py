"""Which species gene identifiers are of."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cellfm_hub.errors import SpeciesError
from cellfm_hub.genes import tables
from cellfm_hub.genes.identifiers import ENSEMBL
from cellfm_hub.genes.spellings import core

if TYPE_CHECKING:
    import pandas as pd

ENSEMBL_SPECIES = {
    "ENSG": "human",
    "ENSMUSG": "mouse",
    "ENSRNOG": "rat",
    "ENSDARG": "zebrafish",
    "ENSXETG": "frog",
    "ENSMICG": "mouse_lemur",
    "ENSSSCG": "pig",
    "ENSMFAG": "macaca_fascicularis",
    "ENSMMUG": "macaca_mulatta",
    "ENSCJAG": "marmoset",
    "ENSGGOG": "gorilla",
    "ENSPTRG": "chimpanzee",
    "ENSOCUG": "rabbit",
    "ENSBTAG": "cow",
    "ENSCAFG": "dog",
    "ENSGALG": "chicken",
}
"""How Ensembl ids begin, and the species, by the name that ``species=`` takes."""


@dataclass(frozen=True)
class SpeciesGuess:
    """What identifiers say of their species.

    Parameters
    ----------
    species
        The likely one; ``None`` if they say nothing, or are of several.
    evidence
        Why, in words, one line.
    certain
        Whether it is beyond doubt: what contradicts it is an error.
    by_ids
        Whether Ensembl ids say so, in which the species is written; symbols of related species are alike.
    counts
        Identifiers that speak for each species.
    """

    species: str | None
    evidence: str
    certain: bool
    by_ids: bool
    counts: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.species or 'unknown'} ({self.evidence})"


def guess_species(ids: Sequence[str] | Mapping[str, Sequence[str]]) -> SpeciesGuess:
    """Tell the species of a data set from the identifiers of its genes.

    Ensembl ids name their species. Of symbols, those count that are current symbols of human or mouse as they are written: human symbols
    are upper case, those of mouse begin with one upper-case letter. Mouse cells under human symbols cannot be told from human cells.

    Parameters
    ----------
    ids
        Identifiers, or several columns of them by name; Ensembl ids weigh more than symbols.

    Returns
    -------
    The species with the evidence.

    Examples
    --------
    >>> guess_species(["Cd3d", "Ms4a1", "Gapdh"]).species
    'mouse'
    """
    columns = ids if isinstance(ids, Mapping) else {"index": ids}
    guesses = [_of_column(name, list(column)) for name, column in columns.items()]
    return max(guesses, key=lambda guess: (guess.certain, guess.by_ids, max(guess.counts.values(), default=0)))


def species_of_data(
    guess: SpeciesGuess, asked: str | None, *, known: Sequence[str], model: str, tells: bool, orthologs: bool
) -> str | None:
    """Settle the species of a data set.

    Parameters
    ----------
    guess
        What the identifiers say.
    asked
        The user's ``species=``.
    known
        The species of the model; none if it takes any.
    model
        Its name.
    tells
        Whether the model tells species from symbols itself.
    orthologs
        Whether mouse genes shall be read as human ones.

    Returns
    -------
    The species, ``None`` if nothing says so.

    Raises
    ------
    SpeciesError
        If the identifiers contradict the user or the model.
    """
    # Pig symbols look human: symbols speak of human and mouse only, and only where nobody else looks at them.
    names = set(ENSEMBL_SPECIES.values()) if guess.by_ids else set(tables.SHIPPED)
    speaks = guess.certain and (guess.by_ids or not tells)
    if asked is not None and speaks and asked in names and guess.species != asked:
        msg = f"species={asked!r}, but the genes are those of {guess}; pass species={guess.species!r}, or leave it out"
        raise SpeciesError(msg)
    species = asked or (guess.species if speaks else None)
    if orthologs:
        if species != "mouse" or (known and "human" not in known):
            msg = f"orthologs='one2one' reads mouse genes as human ones, but the data are of {guess} and {model} is a model of"
            msg += f" {', '.join(known) or 'any species'}; leave it out, or pass species='mouse' if these are mouse genes"
            raise SpeciesError(msg)
    elif species is not None and known and species not in known and set(known) <= names:
        msg = f"the genes are those of {guess}, but {model} is a model of {', '.join(known)}; 'cellfm models' lists others"
        if species == "mouse" and "human" in known:
            msg += ", and options={'orthologs': 'one2one'} reads mouse genes as human ones"
        raise SpeciesError(msg)
    return species


def other_species_in(obs: "pd.DataFrame", species: str | None) -> str | None:
    """Say in one line if a column of `obs` names another species than the identifiers do, for some cells at least."""
    for column in OBS_COLUMNS:
        if species in _SPELLINGS and column in obs:
            said = obs[column].astype(str).str.lower().map({spelling: name for name, all_ in _SPELLINGS.items() for spelling in all_})
            others = said[said.notna() & (said != species)]
            if len(others):
                return (
                    f"obs[{column!r}] says that {len(others):,} of {len(obs):,} cells are {others.iloc[0]}, but their genes have {species}"
                    f" identifiers and are taken for {species} genes"
                )
    return None


OBS_COLUMNS = ("species", "organism", "organism_ontology_term_id")
"""Columns of ``obs`` in which data sets name the species of each cell."""

_SPELLINGS = {
    "human": ("human", "homo sapiens", "homo_sapiens", "h. sapiens", "hs", "hsapiens", "ncbitaxon:9606"),
    "mouse": ("mouse", "mus musculus", "mus_musculus", "m. musculus", "mm", "mmusculus", "ncbitaxon:10090"),
}


def _of_column(name: str, ids: list[str]) -> SpeciesGuess:
    given = [core(identifier) for identifier in ids if identifier]
    begins = Counter(match[1] for identifier in given if identifier.startswith("ENS") and (match := ENSEMBL.fullmatch(identifier)))
    if begins.total() >= max(0.1 * len(given), 1):
        counts = {ENSEMBL_SPECIES.get(begin, begin): number for begin, number in begins.most_common()}
        return _weigh(counts, len(given), f"Ensembl ids in {name}", by_ids=True)
    counts = {species: sum(identifier in tables.symbols(species) for identifier in given) for species in tables.SHIPPED}
    counts = dict(sorted(counts.items(), key=lambda item: -item[1]))
    return _weigh(counts, len(given), f"symbols in {name}", by_ids=False)


def _weigh(counts: dict[str, int], total: int, what: str, *, by_ids: bool) -> SpeciesGuess:
    (species, most), *others = counts.items()
    second = others[0][1] if others else 0
    shown = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    evidence = f"{shown} of {total:,} {what}"
    if most == 0:
        return SpeciesGuess(None, f"none of {total:,} {what} is known", certain=False, by_ids=by_ids, counts=counts)
    if second > most / 4:
        return SpeciesGuess(None, f"mixed: {evidence}", certain=False, by_ids=by_ids, counts=counts)
    certain = most >= 10 and (by_ids or most >= 0.2 * total)
    return SpeciesGuess(species, evidence, certain=certain, by_ids=by_ids, counts=counts)
