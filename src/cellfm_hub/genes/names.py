"""All names of the genes of a species, current and former, and which gene each of them means."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.genes import tables
from cellfm_hub.genes.identifiers import ENSEMBL, system_of
from cellfm_hub.tokens import flat_indices


class Kind(IntEnum):
    """What a name is to its gene; of two genes, the one to which it is the lower means it."""

    APPROVED = 0
    """A current Ensembl id, or the symbol that HGNC approved."""
    GENCODE = 1
    """The symbol that GENCODE gives."""
    FORMER = 2
    """A previous symbol, or a retired Ensembl id."""
    ALIAS = 3


AMBIGUOUS, UNKNOWN = -1, -2
"""Instead of a gene: several genes have the name with equal right; none has it."""

_RENAMED = {
    **{f"MARCH{n}": f"MARCHF{n}" for n in range(1, 12)},
    **{f"MARC{n}": f"MTARC{n}" for n in (1, 2)},
    **{f"SEPT{n}": f"SEPTIN{n}" for n in (*range(1, 13), 14)},
    "SEP15": "SELENOF",
    "DEC1": "DELEC1",
}
"""Former human symbol -> current one: the genes that HGNC renamed because spreadsheets take them for dates."""

_RENAMED_MOUSE = {
    old.capitalize(): new.capitalize() for old, new in _RENAMED.items() if old.startswith(("MARCH", "SEPT")) or old in ("SEP15",)
} | {f"Marc{n}": f"Mtarc{n}" for n in (1, 2)}

_DATE = re.compile(
    r"(?:(\d{1,2})-(Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)|(Mar|Sep|Dec|Feb|Apr|Oct|Nov)-(\d{1,2}))", re.IGNORECASE
)
_MONTHS = {"mar": ("MARCH", "MARC", "MAR"), "sep": ("SEPT", "SEP"), "dec": ("DEC",), "feb": ("FEB",), "apr": ("APR",), "oct": ("OCT",)}
"""What a spreadsheet showed as a day of the month may have been."""


@dataclass(frozen=True)
class Found:
    """What names mean.

    Parameters
    ----------
    gene
        ``(n,)`` the gene in a :class:`NameBook`, :data:`AMBIGUOUS` or :data:`UNKNOWN`.
    how
        ``(n,)`` ``"current"``, ``"previous"``, ``"alias"``, ``"retired"``, ``"Entrez"``, ``"case"`` (written in other case),
        ``"spreadsheet"`` (a date), ``"ambiguous"`` or ``"unknown"``.
    """

    gene: NDArray[np.int64]
    how: NDArray[np.object_]


class NameBook:
    """The genes of a species and their names.

    Parameters
    ----------
    species
        ``"human"`` or ``"mouse"``.
    files
        Tables of the user.

    Attributes
    ----------
    ensembl, symbol
        ``(g,)`` current Ensembl id and symbol of each gene, empty where there is none.
    sources
        What the names are from.
    """

    species: str
    ensembl: NDArray[np.object_]
    symbol: NDArray[np.object_]
    sources: tuple[str, ...]

    def __init__(self, species: str, files: Sequence[tables.Version] = ()) -> None:
        self.species = species
        self._names: list[NDArray[np.object_]] = []
        self._genes: list[NDArray[np.int64]] = []
        self._kinds: list[NDArray[np.int8]] = []
        self._entrez: dict[str, int] = {}
        paths = {version.path.name: version.path for version in files}
        self.sources = (f"{tables.release(species)} (shipped)", *paths)

        def of(begin: str) -> pd.DataFrame | None:
            columns = {
                f"{species}_gencode": ("ensembl_id", "symbol"),
                "hgnc": tables.HGNC_COLUMNS,
                "human_ensembl_ids_not_in": ("ensembl_id", "symbol", "entrez"),
                "mouse_symbol_aliases": ("alias", "approved_symbol"),
                "mouse_human_orthologs": ("mouse_ensembl_id", "mouse_entrez"),
            }[begin]
            path = next((path for name, path in paths.items() if name.startswith(begin)), None)
            return None if path is None else tables.read_table(path, columns)

        self._add_gencode(of(f"{species}_gencode"))
        if species == "human":
            if (hgnc := of("hgnc")) is not None:
                self._add_hgnc(hgnc)
            self._add_pairs(_RENAMED, Kind.FORMER)
            self._index()
            if (retired := of("human_ensembl_ids_not_in")) is not None:
                self._add_retired(retired)
                self._index()
        else:
            self._add_pairs(_RENAMED_MOUSE, Kind.FORMER)
            if (aliases := of("mouse_symbol_aliases")) is not None:
                self._add_pairs(dict(zip(aliases["alias"], aliases["approved_symbol"], strict=True)), Kind.ALIAS)
            self._index()
            if (orthologs := of("mouse_human_orthologs")) is not None:
                self._set_entrez(orthologs["mouse_entrez"], self.find(orthologs["mouse_ensembl_id"].tolist()).gene)

    # Reading

    def find(self, names: Sequence[str]) -> Found:
        """Say which gene each name means.

        The version of an Ensembl id is ignored; the ``.1`` of a clone name is part of it. A name that is written in another case is taken
        for a current symbol where that is unambiguous. A date (``2-Sep``, ``Mar-03``) is taken for the symbol that a spreadsheet made it
        of, where that is unambiguous.
        """
        plain = _plain(names)
        at = _places(self._index_of_names, plain)
        gene = np.where(at >= 0, self._meaning[at], UNKNOWN)
        kind = self._kind[at]
        is_id = np.array([name.startswith("ENS") and ENSEMBL.fullmatch(name) is not None for name in plain], dtype=bool)
        how = np.full(len(plain), "unknown", dtype=object)
        how[gene >= 0] = np.array(["current", "current", "previous", "alias"], dtype=object)[kind[gene >= 0]]
        how[(gene >= 0) & is_id & (kind == Kind.FORMER)] = "retired"
        how[gene == AMBIGUOUS] = "ambiguous"
        for i in np.flatnonzero((gene == UNKNOWN) & ~is_id):
            gene[i], how[i] = self._find_oddly_written(plain[i])
        return Found(gene, how)

    def _find_oddly_written(self, name: str) -> tuple[int, str]:
        if system_of(name) == "Entrez":
            return (self._entrez[name], "Entrez") if name in self._entrez else (UNKNOWN, "unknown")
        if (match := _DATE.fullmatch(name)) is not None:
            gene = self._best(_undated(match))
            return gene, {AMBIGUOUS: "ambiguous", UNKNOWN: "unknown"}.get(gene, "spreadsheet")
        gene = self._folded.get(name.upper(), UNKNOWN)
        if any(name in tables.symbols(species) for species in tables.SHIPPED if species != self.species):
            return UNKNOWN, "unknown"  # a gene of another species, not this one in another case
        return (gene, "case") if gene >= 0 else (UNKNOWN, "unknown")

    def _best(self, names: Sequence[str]) -> int:
        """Return the gene that some spellings mean together, by the precedence of names."""
        at = _places(self._index_of_names, names)
        if self.species == "mouse":
            at = np.concatenate((at, _places(self._index_of_names, [name.capitalize() for name in names])))
        at = at[at >= 0]
        if not len(at):
            return UNKNOWN
        # Symbols that are current today no spreadsheet had to mangle to: DEC1 and DELEC1 are one gene, FEB1 is none.
        level = np.where(self._kind[at] <= Kind.GENCODE, 0, self._kind[at])
        genes = np.unique(self._meaning[at[level == level.min()]])
        return int(genes[0]) if len(genes) == 1 else AMBIGUOUS

    def candidates(self, name: str) -> tuple[str, ...]:
        """Return the genes that an ambiguous name may mean, by symbol or else Ensembl id."""
        match = _DATE.fullmatch(name)
        spellings = [name] if match is None else [s for old in _undated(match) for s in (old, old.capitalize())]
        codes = _places(self._index_of_names, spellings)
        mask = np.isin(self._entry_code, codes[codes >= 0])
        kinds, genes = self._entry_kind[mask], self._entry_gene[mask]
        if not len(genes):
            return ()
        best = np.unique(genes[kinds == kinds.min()])
        symbols = self.symbol[best]
        unique = len(set(symbols)) == len(symbols)
        return tuple(
            str(symbol) if symbol and unique else str(gene_id) for symbol, gene_id in zip(symbols, self.ensembl[best], strict=True)
        )

    def names_of(self, genes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.object_]]:
        """Return every name of some genes, best first: the places in `genes`, and the names.

        A former symbol or an alias is a name of the gene only where it means no other.
        """
        starts = np.searchsorted(self._by_gene_gene, genes, side="left")
        lengths = np.searchsorted(self._by_gene_gene, genes, side="right") - starts
        return np.repeat(np.arange(len(genes)), lengths), self._by_gene_name[flat_indices(starts, lengths)]

    def knows(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Say which names are one of a gene, or of several, as they are written; the version of an Ensembl id does not count."""
        out: NDArray[np.bool_] = _places(self._index_of_names, _plain(names)) >= 0
        return out

    @property
    def n_names(self) -> int:
        """How many names are known, Ensembl ids included."""
        return len(self._index_of_names)

    @property
    def has_entrez(self) -> bool:
        """Whether Entrez ids are known."""
        return len(self._entrez) > 0

    def is_current_symbol(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Say which names are current symbols as they are written."""
        at = _places(self._index_of_names, names)
        out: NDArray[np.bool_] = (at >= 0) & (self._kind[at] <= Kind.GENCODE) & ~self._is_id[at]
        return out

    @cached_property
    def _folded(self) -> dict[str, int]:
        """Current symbol in upper case -> its gene, :data:`AMBIGUOUS` where two differ in case only."""
        current = np.flatnonzero((self._kind <= Kind.GENCODE) & ~self._is_id)
        folded: dict[str, int] = {}
        for name, gene in zip(self._index_of_names[current].tolist(), self._meaning[current].tolist(), strict=True):
            key = name.upper()
            folded[key] = gene if folded.get(key, gene) == gene else AMBIGUOUS
        return folded

    # Building

    def _add(self, names: NDArray[np.object_], genes: NDArray[np.int64], kind: Kind) -> None:
        kept = (genes >= 0) & (names != "")
        self._names.append(names[kept])
        self._genes.append(genes[kept])
        self._kinds.append(np.full(int(kept.sum()), kind, dtype=np.int8))

    def _add_gencode(self, newer: pd.DataFrame | None) -> None:
        ids, symbols = tables.shipped(self.species)
        own_ids, own_symbols = _objects(ids), _objects(symbols)
        if newer is None:
            self.ensembl, self.symbol = own_ids, own_symbols
            genes = np.arange(len(own_ids), dtype=np.int64)
            self._add(own_symbols, genes, Kind.GENCODE)
        else:
            newer = newer.drop_duplicates("ensembl_id", keep="last")
            newer_ids = _objects(newer["ensembl_id"])
            newer_symbols = _objects(newer["symbol"].where(newer["symbol"] != newer["ensembl_id"], ""))
            place = _places(pd.Index(newer_ids), own_ids)
            further = place < 0
            self.ensembl = np.concatenate((newer_ids, own_ids[further]))
            genes = place.copy()
            genes[further] = len(newer_ids) + np.arange(int(further.sum()))
            # What the newer table says otherwise was the symbol once.
            differs = (~further & (newer_symbols[place] != own_symbols)) | np.isin(own_symbols.astype(str), newer_symbols.astype(str))
            same = ~further & (newer_symbols[place] == own_symbols)
            self.symbol = np.concatenate((newer_symbols, own_symbols[further]))
            self._add(newer_symbols, np.arange(len(newer_ids), dtype=np.int64), Kind.GENCODE)
            self._add(own_symbols[~differs], genes[~differs], Kind.GENCODE)
            former = differs & ~same
            self._add(own_symbols[former], genes[former], Kind.FORMER)
        everything = np.arange(len(self.ensembl), dtype=np.int64)
        self._add(self.ensembl, everything, Kind.APPROVED)
        shared = pd.Series(self.symbol).duplicated(keep=False).to_numpy() & (self.symbol != "")
        self._add(self.symbol[shared] + "_" + self.ensembl[shared], everything[shared], Kind.GENCODE)  # CELLxGENE's way

    def _add_hgnc(self, hgnc: pd.DataFrame) -> None:
        hgnc = hgnc.reset_index(drop=True)
        ids, symbols = _objects(hgnc["ensembl_gene_id"]), _objects(hgnc["symbol"])
        genes = _places(pd.Index(self.ensembl), ids)
        new = (genes < 0) | (ids == "")
        genes[new] = len(self.ensembl) + np.arange(int(new.sum()))
        self.ensembl = np.concatenate((self.ensembl, ids[new]))
        self.symbol = np.concatenate((self.symbol, symbols[new]))
        self.symbol[genes] = symbols
        self._add(ids[new], genes[new], Kind.APPROVED)
        self._add(symbols, genes, Kind.APPROVED)
        for column, kind in (("prev_symbol", Kind.FORMER), ("alias_symbol", Kind.ALIAS)):
            rows, names = tables.split_field(hgnc[column])
            self._add(names, genes[rows], kind)
        self._set_entrez(hgnc["entrez_id"], genes)

    def _set_entrez(self, entrez: pd.Series, genes: NDArray[np.int64]) -> None:
        known = (entrez != "").to_numpy() & (genes >= 0)
        self._entrez = dict(zip(entrez[known][::-1], genes[known][::-1].tolist(), strict=True))  # the first of a repeated one

    def _add_pairs(self, pairs: dict[str, str], kind: Kind) -> None:
        """Add names of the genes that have some current symbols."""
        names = np.concatenate(self._names)
        current = np.concatenate(self._kinds) <= Kind.GENCODE
        genes = pd.Series(np.concatenate(self._genes)[current], index=names[current])
        genes = genes[~genes.index.duplicated(keep=False) | genes.index.isin(self.symbol[genes.to_numpy()])]
        genes = genes[~genes.index.duplicated()]
        at = _places(genes.index, list(pairs.values()))
        self._add(_objects(list(pairs)), np.where(at >= 0, genes.to_numpy()[at], -1), kind)

    def _add_retired(self, retired: pd.DataFrame) -> None:
        """Retired ids lead to the gene of the same Entrez id, or else to the one that their symbol means."""
        ids = _objects(retired["ensembl_id"])
        gene = self.find(retired["symbol"].tolist()).gene
        by_entrez = np.array([self._entrez.get(entrez, UNKNOWN) for entrez in retired["entrez"]], dtype=np.int64)
        gene = np.where(by_entrez >= 0, by_entrez, gene)
        known = _places(self._index_of_names, ids) >= 0
        self._add(ids[~known], gene[~known], Kind.FORMER)

    def _index(self) -> None:
        """Sort out which gene each name means."""
        names, genes, kinds = np.concatenate(self._names), np.concatenate(self._genes), np.concatenate(self._kinds)
        codes, unique = pd.factorize(names)
        order = np.lexsort((genes, kinds, codes))
        codes, genes, kinds = codes[order], genes[order], kinds[order]
        first = np.flatnonzero(np.diff(codes, prepend=-1))
        self._entry_code, self._entry_gene, self._entry_kind = codes, genes, kinds
        self._index_of_names = pd.Index(unique)
        self._kind, self._meaning = kinds[first], genes[first].copy()
        equal = (kinds == self._kind[codes]) & (genes != self._meaning[codes])
        self._meaning[np.unique(codes[equal])] = AMBIGUOUS
        self._is_id = np.array([name.startswith("ENS") and ENSEMBL.fullmatch(name) is not None for name in unique], dtype=bool)
        # The other way round: a symbol is one of its gene even where others share it, a former name only where it is unambiguous.
        own = (kinds <= Kind.GENCODE) | (self._meaning[codes] == genes)
        by_gene = np.lexsort((kinds[own], genes[own]))
        self._by_gene_gene = genes[own][by_gene]
        self._by_gene_name = np.asarray(unique, dtype=object)[codes[own][by_gene]]


def _objects(values: Iterable[str]) -> NDArray[np.object_]:
    return np.array(list(values), dtype=object)


def _places(index: pd.Index, names: Iterable[str]) -> NDArray[np.int64]:
    """Return where names stand in an index; -1 for those that do not."""
    return index.get_indexer(pd.Index(_objects(names))).astype(np.int64)


def _plain(names: Sequence[str]) -> NDArray[np.object_]:
    """Strip the versions of Ensembl ids."""
    return _objects([match[1] + match[2] if name.startswith("ENS") and (match := ENSEMBL.fullmatch(name)) else name for name in names])


def _undated(match: "re.Match[str]") -> list[str]:
    day, month = match[1] or match[4], (match[2] or match[3]).lower()
    return [f"{word}{int(day)}" for word in _MONTHS.get(month, ())]


@lru_cache(maxsize=4)
def _book(species: str, files: tuple[tables.Version, ...]) -> NameBook:
    return NameBook(species, files)


def name_book(species: str) -> NameBook | None:
    """Return what is known of the genes of a species; ``None`` for one without a table."""
    if species not in tables.SHIPPED:
        return None
    return _book(species, tables.history_files(tables.HISTORY_FILES[species]))
