"""Find the column of a data set that a model reads, and what its identifiers mean to the model.

Identifiers are read *as they are* first, by the rule of the family (its ``match_genes``), so that results are those of the original
release; but the version of an Ensembl id does not count (:mod:`~cellfm_hub.genes.versions`). Only where that leaves a model without most
of its genes (the data have Ensembl ids, the model knows symbols; names are of many years ago) are they *resolved*: each one that the model
does not know as it is written is replaced by the name of the same gene that it does know, a current one before a former one before an
alias. With ``gene_names="resolve"`` that is done for any data. Then

* a name that the model knows as it is written is never replaced;
* a former name, an alias, another case or a date yields to a column that names the gene rightly: both cannot mean the same gene in one
  annotation;
* ``gene_names="resolve"`` sums several columns of one gene; otherwise the family's own rule decides: Geneformer sums different identifiers
  of a gene but not the same one twice, scGPT and UCE take each column for itself, scFoundation sums;
* ambiguous names are counted and left out;
* spellings that programs make of names (copies with a number, dots for dashes, id and symbol in one, the name of a genome before) are read
  as the names that they were made of (:mod:`~cellfm_hub.genes.spellings`).

That decision looks at identifiers alone, never at counts, so that it is the same for any selection of cells. Counts decide which of several
columns is read, where they differ by more than 1 %, and whether the model knows enough of the data (:mod:`~cellfm_hub.genes.coverage`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.errors import GeneCoverageError, InputError
from cellfm_hub.genes import tables
from cellfm_hub.genes.coverage import MIN_COUNTS, MIN_GENES, OF_GENES, Coverage, Rule
from cellfm_hub.genes.identifiers import identifier_columns, in_words, main_system, systems_of
from cellfm_hub.genes.map import GeneMap
from cellfm_hub.genes.names import UNKNOWN, Found, NameBook, name_book
from cellfm_hub.genes.orthologs import as_human
from cellfm_hub.genes.spellings import respell
from cellfm_hub.genes.versions import without_versions

Match: TypeAlias = Callable[[Sequence[str]], GeneMap]
"""An adapter's ``match_genes``."""

_DOUBTFUL = ("previous", "alias", "case", "spreadsheet")
"""Readings of a name that yield to a column with a right one."""

_AS_GOOD = 0.99
"""Columns that cover at least this part of what the best one covers are equals."""

_WORTH_SAYING = 0.01
"""Part of all columns that must be resolvable for the user to be told."""


@dataclass(frozen=True)
class _Reading:
    """One way to read one column."""

    column: str
    label: str
    genes: GeneMap
    how: Mapping[str, int]
    """Columns that were read in another way than as they are written, by the way; also those that are ambiguous."""
    ids: Sequence[str]
    """The identifiers of the column."""
    kinds: NDArray[np.object_] | None = None
    """In what spelling each of them was, where they were resolved."""


def choose_gene_ids(
    var: pd.DataFrame,
    match: Match,
    *,
    column: str | None,
    preferred: Sequence[str],
    model: str,
    species: str | None = None,
    resolve: bool = False,
    orthologs: bool = False,
    coverage: Rule = "checked",
    vocabulary: Callable[[], Iterable[str]] | None = None,
    totals: Callable[[], NDArray[np.float64]] | None = None,
) -> tuple[str, GeneMap]:
    """Find the column of `var` that holds identifiers the model knows; the module says by which rules.

    Parameters
    ----------
    var
        Annotation of the genes.
    match
        The adapter's ``match_genes``.
    column
        The user's choice, ``"index"`` for the names themselves; ``None``: the one that covers most counts.
    preferred
        Columns to prefer among equals.
    model
        Name for messages.
    species
        Of the data; without it, or without a table of it, identifiers are read as they are.
    resolve
        Whether to resolve identifiers although most are known as they are.
    orthologs
        Whether to read mouse genes as their human one-to-one orthologs.
    coverage
        Whether data are refused of which the model knows next to nothing.
    vocabulary
        Gives all names that the model knows, where they are at hand.
    totals
        Gives the counts of each column of the matrix, ``(n_vars,)``, or of a part of its cells.

    Returns
    -------
    How the genes were read, ``"ensembl_id"`` or ``"index (Ensembl ids read as symbols)"``, and their map.

    Raises
    ------
    InputError
        If there is no such column, a table cannot be read, or names cannot be resolved beside a column of totals.
    GeneCoverageError
        If next to no gene matches.
    """
    totals = None if totals is None else cache(totals)
    columns = identifier_columns(var, column)
    order = [*(name for name in preferred if name in columns), *(name for name in columns if name not in preferred)]
    book = name_book(species) if species else None
    plain_ids = partial(without_versions, known=partial(_known, match=match), vocabulary=vocabulary)
    as_written = [_Reading(name, name, match(plain_ids(columns[name])), {}, columns[name]) for name in order]
    written = [] if orthologs else as_written
    plain = not any(reading.genes.n_other for reading in as_written)
    if not plain and (resolve or orthologs):
        msg = f"with these options {model} takes a column for something else than a gene, so that names cannot be resolved;"
        msg += " leave out gene_names and orthologs, or that column"
        raise InputError(msg)
    resolved = [
        _resolved(name, columns[name], match, book, plain_ids, orthologs=orthologs, together=resolve or orthologs)
        for name in order
        if plain
    ]
    found = [reading for reading in resolved if reading is not None]

    best = _best(written, preferred, totals)
    better = _best(found, preferred, totals)
    if better is not None and (best is None or resolve or better.genes.n_matched > 2 * best.genes.n_matched):
        best, found = better, []
    if best is None:
        best = _Reading(order[0], order[0], match(["" for _ in columns[order[0]]]), {}, columns[order[0]])
    weights = None if totals is None else totals()
    known = Coverage.measure(best.genes, weights)
    if coverage == "checked" and not known.is_enough:
        others = [
            _resolved(name, ids, match, book, plain_ids, orthologs=orthologs, together=True) for name, ids in _others(var, columns) if plain
        ]
        fitting = [r for r in (*found, *others) if r is not None and Coverage.measure(r.genes, weights).is_enough]
        examples = {name: ids[:3] for name, ids in columns.items()}
        if unknown := _unknown(best, None):
            examples[best.column] = unknown[:3]
        raise GeneCoverageError(_too_few(known, columns, examples, fitting, model, book))
    return best.label, _described(best, next((r for r in found if r.column == best.column), None), weights)


def _best(readings: Sequence[_Reading], preferred: Sequence[str], totals: Callable[[], NDArray[np.float64]] | None) -> _Reading | None:
    """Return the reading that covers most counts; among equals the first preferred one, or else the one that matches most genes.

    ``None`` if none matches any.
    """
    readings = [reading for reading in readings if reading.genes.n_matched]
    if len(readings) < 2:
        return readings[0] if readings else None
    weights = None if totals is None else totals()
    if weights is None or not weights.any():
        weights = np.ones(readings[0].genes.n_columns)
    covered = [weights[r.genes.columns[: r.genes.n_matched]].sum() for r in readings]
    equals = [r for r, c in zip(readings, covered, strict=True) if c >= _AS_GOOD * max(covered)]
    return next((r for r in equals if r.column in preferred), max(equals, key=lambda r: r.genes.n_matched))


def _resolved(
    column: str,
    ids: list[str],
    match: Match,
    book: NameBook | None,
    plain_ids: Callable[..., list[str]],
    *,
    orthologs: bool,
    together: bool,
) -> _Reading | None:
    """Read one column by what its identifiers mean; ``None`` if it holds no identifiers of genes.

    Parameters
    ----------
    column, ids
        The column and its identifiers.
    match
        The adapter's ``match_genes``.
    book
        What is known of the genes of the species, if anything.
    plain_ids
        Writes Ensembl ids with or without version, as the model knows them.
    orthologs
        Whether they are mouse genes, to be read as human ones.
    together
        Whether columns of one gene are summed whatever the family does.
    """
    if len(set(ids)) < len(ids) / 20:  # a biotype, a chromosome
        return None
    target = name_book("human") if orthologs else book

    def means_gene(names: Sequence[str]) -> NDArray[np.bool_]:
        in_book = np.zeros(len(names), dtype=bool) if book is None else book.knows(names)
        return in_book if orthologs else in_book | _known(names, match)

    bare = plain_ids(ids, copies=True)
    plain, kinds = respell(bare, means_gene, None if book is None else book.species)
    kinds[(kinds == "") & (np.array(bare, dtype=object) != np.array(ids, dtype=object))] = "version"
    if orthologs:
        found = as_human(plain)
    elif book is not None:
        found = book.find(plain)
    else:
        found = Found(np.full(len(ids), UNKNOWN, dtype=np.int64), np.full(len(ids), "unknown", dtype=object))
    if not together and not (found.gene >= 0).any() and not (kinds != "").any():
        return None
    renamed, how = (["" for _ in ids], found.how) if orthologs else _keep_written(plain, found.how, match)
    if target is not None:
        open_columns = np.flatnonzero((found.gene >= 0) & (np.array(renamed, dtype=object) == ""))
        places, names = target.names_of(found.gene[open_columns])
        known = _known(names, match)
        # The first name of each gene that the model knows.
        first = np.unique(places[known], return_index=True)
        for place, name in zip(open_columns[first[0]].tolist(), names[known][first[1]].tolist(), strict=True):
            renamed[place] = name
    how = np.where(_doubtful_copies(renamed, how, match), "yields", how)
    renamed = [name if kind != "yields" else "" for name, kind in zip(renamed, how, strict=True)]
    genes = _one_place_per_gene(renamed, match) if together else match(renamed)
    if not genes.n_matched:
        return None
    counts = Counter(how[genes.columns].tolist())
    counts["ambiguous"] = int(np.count_nonzero(how == "ambiguous"))
    counts["yields"] = int(np.count_nonzero(how == "yields"))
    return _Reading(column, _label(column, ids, [renamed[i] for i in genes.columns], orthologs=orthologs), genes, counts, ids, kinds)


def _keep_written(ids: list[str], how: NDArray[np.object_], match: Match) -> tuple[list[str], NDArray[np.object_]]:
    """Return the identifiers that the model knows as they are written, the others empty."""
    known = np.zeros(len(ids), dtype=bool)
    known[match(ids).columns] = True
    return [name if k else "" for name, k in zip(ids, known, strict=True)], np.where(known, "as written", how)


def _known(names: Sequence[str] | NDArray[np.object_], match: Match) -> NDArray[np.bool_]:
    """Say which names the model knows."""
    codes, unique = pd.factorize(np.asarray(names, dtype=object))
    known = np.zeros(len(unique) + 1, dtype=bool)
    known[match([*unique.tolist(), ""]).columns] = True  # the last column may be taken for something else than a gene
    return known[codes]


def _tokens(names: list[str], match: Match) -> NDArray[np.int64]:
    """Return the token that each name stands for; -1 where the model knows none."""
    codes, unique = pd.factorize(np.array(names, dtype=object))
    spelled = match(unique.tolist())
    token = np.full(len(unique), -1, dtype=np.int64)
    token[spelled.columns] = spelled.tokens[spelled.targets]
    return token[codes]


def _doubtful_copies(names: list[str], how: NDArray[np.object_], match: Match) -> NDArray[np.bool_]:
    """Say which columns have a doubtful name of a gene that another column names rightly."""
    token, doubtful = _tokens(names, match), np.isin(how, _DOUBTFUL)
    return doubtful & np.isin(token, token[~doubtful & (token >= 0)])


def _one_place_per_gene(names: list[str], match: Match) -> GeneMap:
    """Map names so that all columns of one gene share a place."""
    token = _tokens(names, match)
    used = np.flatnonzero(token >= 0)
    # One spelling of each gene, the first, in the order of columns.
    _, first, place = np.unique(token[used], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    genes = match([names[used[i]] for i in np.sort(first)])
    target_of = np.full(len(first), -1, dtype=np.int64)
    target_of[genes.columns] = genes.targets
    return replace(genes, columns=used, targets=target_of[rank[place]], n_columns=len(names))


def _label(column: str, ids: list[str], renamed: list[str], *, orthologs: bool) -> str:
    if orthologs:
        return f"{column} (mouse genes read as human one-to-one orthologs)"
    before, after = main_system(systems_of(ids)), main_system(systems_of(renamed))
    if before == after or after in ("mixed", "missing"):
        return f"{column} (resolved)"
    return f"{column} ({in_words(before)} read as {in_words(after)})"


def _described(reading: _Reading, resolved: _Reading | None, weights: NDArray[np.float64] | None) -> GeneMap:
    """Say in the map how the genes were read, what was lost, and what resolving would have brought."""
    genes, how = reading.genes, reading.how
    lost = _unknown(reading, weights)
    weights = weights if weights is not None and weights.any() else np.ones(genes.n_columns)
    facts: dict[str, int | str | float | bool] = {
        "genes_renamed": sum(how.get(kind, 0) for kind in _DOUBTFUL),
        "genes_retired": how.get("retired", 0),
        "genes_ambiguous": how.get("ambiguous", 0),
        "genes_unknown": len(lost),
        "genes_unknown_largest": ", ".join(lost[:5]),
    }
    notes = list(genes.notes)
    if reading.label != reading.column:
        said = [f"{how[kind]:,} {word}" for kind, word in _SAID.items() if how.get(kind)]
        said += _spelled(reading, genes.columns)
        if (unknown := len(lost) - how.get("ambiguous", 0) - how.get("yields", 0)) > 0:
            said.append(f"{unknown:,} not known and left out ({', '.join(lost[:3])}, …)")
        notes.append(f"genes are from var column {reading.label}{': ' if said else ''}{', '.join(said)}")
    if genes.n_summed:
        notes.append(f"{genes.n_summed:,} columns are summed with others of the same gene")
    repeated, number = _repeated(genes)
    share = float(weights[repeated].sum() / weights.sum())
    facts |= {"genes_repeated": number, "counts_repeated": round(share, 6)}
    if number:
        names = list(dict.fromkeys(reading.ids[column] for column in repeated.tolist()))
        notes.append(
            f"{number:,} genes ({', '.join(names[:3])}, …; {share:.2%} of the counts) stand in several columns, each of which is read as a"
            " gene of its own, as in the original release; options={'gene_names': 'resolve'} sums them"
        )
    if resolved is not None:
        more = np.setdiff1d(resolved.genes.columns, genes.columns)
        facts |= {"genes_ambiguous": resolved.how.get("ambiguous", 0), "genes_resolvable": len(more)}
        spelled = _spelled(resolved, more)
        if len(more) > _WORTH_SAYING * genes.n_columns or spelled:
            share = float(weights[more].sum() / weights.sum())
            notes.append(
                f"{len(more):,} columns, with {share:.2%} of the counts, name genes of the model in a way that the original release does"
                f" not read{': ' if spelled else ''}{', '.join(spelled)}; options={{'gene_names': 'resolve'}} uses them"
            )
    return replace(genes, facts={**facts, **genes.facts}, notes=tuple(notes))


def _repeated(genes: GeneMap) -> tuple[NDArray[np.int64], int]:
    """Return the columns of genes that have several places, each with a column of its own; and how many genes these are."""
    columns, targets = genes.columns[: genes.n_matched], genes.targets[: genes.n_matched]
    token, places = np.unique(genes.tokens[np.unique(targets)], return_counts=True)
    several = token[places > 1]
    return np.sort(columns[np.isin(genes.tokens[targets], several)]), len(several)


def _spelled(reading: _Reading, columns: NDArray[np.int64]) -> list[str]:
    """Say how many columns are in which unusual spelling, with an example of each."""
    assert reading.kinds is not None
    kinds = reading.kinds[columns]
    of_kind = {kind: columns[kinds == kind] for kind in _SPELLED if (kinds == kind).any()}
    return [f"{len(of):,} {_SPELLED[kind]} ({reading.ids[int(of.min())]})" for kind, of in of_kind.items()]


_SPELLED = {
    "version": "with a version",
    "copy": "copies made unique by a number or the like",
    "dots": "with dots for dashes, as R writes them",
    "joined": "of id and symbol in one",
    "genome": "with the name of a genome before them",
}
"""Spellings of :mod:`~cellfm_hub.genes.spellings`, and of ids whose version did not count."""


def _unknown(reading: _Reading, weights: NDArray[np.float64] | None) -> list[str]:
    """Return the identifiers that feed no gene of the model, those with most counts first."""
    unused = np.ones(reading.genes.n_columns, dtype=bool)
    unused[reading.genes.columns] = False
    order = np.arange(len(unused)) if weights is None else np.argsort(-weights, kind="stable")
    return [reading.ids[column] for column in order[unused[order]].tolist() if reading.ids[column]]


_SAID = {
    "previous": "by previous symbols",
    "alias": "by aliases",
    "retired": "by retired ids",
    "case": "spelled in another case",
    "spreadsheet": "that a spreadsheet took for dates",
    "Entrez": "by Entrez ids",
    "ambiguous": "ambiguous and left out",
    "yields": "left out as doubtful",
}


def _others(var: pd.DataFrame, columns: Mapping[str, Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Return the columns of `var` that were not looked at, those of whole numbers too: they may be Entrez ids."""
    numbers = [str(name) for name, kind in zip(var.columns, var.dtypes, strict=True) if kind.kind in "iu"]
    every = identifier_columns(var) | {name: identifier_columns(var, name)[name] for name in numbers}
    return [(name, ids) for name, ids in every.items() if name not in columns]


def _too_few(
    known: Coverage,
    columns: Mapping[str, Sequence[str]],
    examples: Mapping[str, Sequence[str]],
    fitting: Sequence[_Reading],
    model: str,
    book: NameBook | None,
) -> str:
    """Say what came, what was expected, and what would match better: another column, or names by their meaning."""
    looked = "; ".join(f"{name} ({', '.join(ids)}, …)" for name, ids in examples.items())
    msg = f"{known} {'is' if known.genes < 2 else 'are'} in the vocabulary of {model}; looked at {looked}."
    if known.genes:
        msg += f" Expected {MIN_COUNTS:.0%} of the counts" + (f" and {MIN_GENES} genes." if known.of >= OF_GENES else ".")
    if fitting:
        best = max(fitting, key=lambda reading: reading.genes.n_matched)
        option = f"gene_ids={best.column!r}" if best.column not in columns else "options={'gene_names': 'resolve'}"
        return f"{msg} {option} would match {best.genes.n_matched:,}"
    msg += f" Name the var column with its identifiers as gene_ids=; 'cellfm info {model}' says which it needs"
    if known.genes:
        msg += "; options={'coverage': 'any'} takes the data as they are"
    systems = {main_system(systems_of(ids)) for ids in columns.values()}
    if "Entrez" in systems and (book is None or not book.has_entrez):
        return f"{msg}. Entrez ids are read by the HGNC table: 'cellfm genes --fetch' brings it, or CELLFM_GENES names a folder that has it"
    if systems & {"Ensembl", "Ensembl with version"} and not tables.history_files(("hgnc_*",)):
        msg += ". Retired ids are read where CELLFM_GENES names a folder of gene tables"
    return msg
