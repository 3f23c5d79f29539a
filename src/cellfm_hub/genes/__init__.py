"""Gene identifiers: which system and species they are of, what they mean today, and which genes of a model they feed.

::

    resolve(ids, to="ensembl")     any identifiers -> current Ensembl ids or symbols, with the reason for each
    guess_species(ids)             the species, with the evidence
    systems_of(ids)                the system of each identifier; main_system: of a column
    choose_gene_ids(var, match)    the column of a matrix that a model reads, and its GeneMap
    fetch_history()                previous symbols, aliases and Entrez ids of human genes, fetched once

The package ships current human and mouse genes (``data/``, made by :mod:`~cellfm_hub.genes.make_tables`).
"""

from cellfm_hub.genes.choose import choose_gene_ids
from cellfm_hub.genes.history import fetch_history
from cellfm_hub.genes.identifiers import identifier_columns, main_system, systems_of
from cellfm_hub.genes.map import CountMatrix, GeneMap
from cellfm_hub.genes.resolver import Resolution, resolve
from cellfm_hub.genes.species import SpeciesGuess, guess_species

__all__ = [
    "CountMatrix",
    "GeneMap",
    "Resolution",
    "SpeciesGuess",
    "choose_gene_ids",
    "fetch_history",
    "guess_species",
    "identifier_columns",
    "main_system",
    "resolve",
    "systems_of",
]
