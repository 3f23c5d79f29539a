"""Which genes of a data set feed a model of cells, of which species they are, and what the user is told of both."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.adapter import CellAdapter, CellOptions, Options
from cellfm_hub.genes import GeneMap, SpeciesGuess, choose_gene_ids, guess_species, identifier_columns, main_system, systems_of
from cellfm_hub.genes.identifiers import are_genes, in_words, other_features
from cellfm_hub.genes.names import name_book
from cellfm_hub.genes.species import other_species_in, species_of_data
from cellfm_hub.genes.spellings import core


@dataclass(frozen=True)
class GeneMatch:
    """How the genes of a data set were read.

    Parameters
    ----------
    column
        The ``var`` column, ``"index"`` for the names, and what its identifiers were read as.
    genes
        The map of columns to genes of the model.
    species
        What the identifiers say of the species.
    facts
        For the receipt: ``gene_ids``, ``genes``, ``genes_used``, ``genes_summed``, ``genes_renamed``, ``genes_retired``,
        ``genes_ambiguous``, ``species``, ``species_evidence``, and what the family adds.
    notes
        What the user shall be told, one line each.
    """

    column: str
    genes: GeneMap
    species: SpeciesGuess
    facts: dict[str, str | int | float | bool]
    notes: tuple[str, ...]


def cell_options(options: Options) -> CellOptions:
    """Return the switches that all models of cells have, also where an adapter declares options without them."""
    return options if isinstance(options, CellOptions) else CellOptions()


def reads_orthologs(options: Options) -> bool:
    """Whether mouse genes are read as human ones."""
    return cell_options(options).orthologs == "one2one"


def match_genes(
    var: pd.DataFrame,
    adapter: CellAdapter,
    *,
    model: str,
    known_species: tuple[str, ...],
    options: Options,
    gene_ids: str | None = None,
    species: str | None = None,
    obs: pd.DataFrame | None = None,
    totals: Callable[[], NDArray[np.float64]] | None = None,
) -> GeneMatch:
    """Match the genes of a data set with those of a model.

    Parameters
    ----------
    var
        Annotation of the genes.
    adapter, options
        The loaded model and its switches.
    model
        Its name, for messages.
    known_species
        The species it knows; none if it takes any.
    gene_ids, species
        The user's choices.
    obs
        Annotation of the cells, to see whether it names another species.
    totals
        Gives the counts of each column, ``(n_vars,)``, or of a part of the cells.

    Raises
    ------
    InputError
        If there is no such column, or a gene table cannot be read.
    SpeciesError
        If the identifiers contradict the user's choice or the model's species.
    GeneCoverageError
        If next to no gene matches.
    """
    switches = cell_options(options)
    orthologs = switches.orthologs == "one2one"
    columns = identifier_columns(var, gene_ids)
    guess = guess_species(columns)
    tells = bool(adapter.species)  # the files of such a checkpoint list the symbols of each species
    found = species_of_data(guess, species, known=known_species, model=model, tells=tells, orthologs=orthologs)
    told = "human" if orthologs else species
    if tells and told is None and guess.by_ids and found in adapter.species:
        told = found
    readable: dict[str, Any] = dict(columns)
    if tells:
        readable = {name: [core(identifier) for identifier in ids] for name, ids in columns.items()}
        readable |= _symbols_of_ids(readable, guess)
    match = adapter.gene_matcher(told, readable)
    genes_only = are_genes(var)
    column, genes = choose_gene_ids(
        var,
        match,
        column=gene_ids,
        preferred=adapter.gene_columns,
        model=model,
        species=found or _only(known_species) or guess.species,
        resolve=switches.gene_names == "resolve",
        orthologs=orthologs,
        coverage=switches.coverage,
        vocabulary=None if tells else lambda: adapter.vocabulary.tolist(),
        totals=None if totals is None else lambda: np.where(genes_only, totals(), 0),
    )
    facts: dict[str, str | int | float | bool] = {
        "gene_ids": column,
        "genes": len(var),
        "genes_used": genes.n_matched,
        "genes_summed": genes.n_summed,
        "species": found or "unknown",
        "species_evidence": guess.evidence if species is None else f"as asked for; {guess.evidence}",
        **genes.facts,
    }
    if told is not None and guess.by_ids:
        facts["species_evidence"] = guess.evidence
    notes = genes.notes
    if others := other_features(var):
        facts["features_left_out"] = others
        notes = (*notes, f"features that are no genes are left out: {others}")
    if guess.species is None and guess.counts and sum(count > 0 for count in guess.counts.values()) > 1:
        notes = (*notes, f"the species of the genes is not clear, {guess.evidence}")
    if obs is not None and (other := other_species_in(obs, found or guess.species)):
        notes = (*notes, other)
    return GeneMatch(column, replace(genes, facts=facts), guess, facts, notes)


def _only(species: tuple[str, ...]) -> str | None:
    return species[0] if len(species) == 1 else None


def _symbols_of_ids(columns: dict[str, list[str]], guess: SpeciesGuess) -> dict[str, list[str]]:
    """Return each column of Ensembl ids once more as symbols, for adapters that tell the species from symbols."""
    book = name_book(guess.species) if guess.by_ids and guess.species else None
    if book is None:
        return {}
    out = {}
    for name, ids in columns.items():
        system = main_system(systems_of(ids))
        if system.startswith("Ensembl"):
            gene = book.find(ids).gene
            out[f"{name} ({in_words(system)} read as symbols)"] = np.where(gene >= 0, book.symbol[gene], "").tolist()
    return out
