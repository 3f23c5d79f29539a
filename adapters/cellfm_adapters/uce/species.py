"""Which row of the token table belongs to which gene, and where on the chromosomes the gene lies.

A gene's row is its place in the protein file of its species plus the species' offset. Nothing in the model file names the genes, so a
list that is longer, shorter or in another order would silently give every gene the protein of another: each list is checked
against the offsets, and against the vectors themselves where the protein file is read.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cellfm_hub import settings
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.errors import CheckpointFormatError, InputError, SpeciesError, WeightsUnavailableError, did_you_mean
from cellfm_hub.safe_files import read_json_object, read_pickled_dict, read_tensors, read_text

SPECIAL_NAMES = ("<pad>", "<chromosome start>", "<chromosome end>", "<cls>")
"""Rows of the token table before the genes. The second is never used."""
CHROMOSOME_END, CLS = 2, 3

PROTEIN_FILES = {
    "human": "Homo_sapiens.GRCh38",
    "mouse": "Mus_musculus.GRCm39",
    "frog": "Xenopus_tropicalis.Xenopus_tropicalis_v9.1",
    "zebrafish": "Danio_rerio.GRCz11",
    "mouse_lemur": "Microcebus_murinus.Mmur_3.0",
    "pig": "Sus_scrofa.Sscrofa11.1",
    "macaca_fascicularis": "Macaca_fascicularis.Macaca_fascicularis_6.0",
    "macaca_mulatta": "Macaca_mulatta.Mmul_10",
}
"""Species -> beginning of the name of its protein file."""


@dataclass(frozen=True)
class Chromosomes:
    """``species_chrom.csv``: where genes lie.

    Parameters
    ----------
    genes
        One row per gene: ``species``, ``gene_symbol`` in upper case, ``start``, and the ``code`` of its chromosome.
    names
        ``(c,)`` species and chromosome of each code. Codes count through all species of the file in the order of these names: part of
        the file gives other codes.
    """

    genes: pd.DataFrame
    names: NDArray[np.str_]

    @classmethod
    def read(cls, path: Path) -> "Chromosomes":
        """Read the table.

        Raises
        ------
        CheckpointFormatError
            If columns are missing or a start is not a number.
        """
        columns = {"gene_symbol": str, "chromosome": str, "start": np.int64, "species": str}
        try:
            table = pd.read_csv(path, dtype=columns, usecols=list(columns)).dropna()
        except (ValueError, OSError) as error:
            msg = f"{path} is not a table of chromosomes ({str(error).splitlines()[0]}); expected columns {', '.join(columns)}"
            raise CheckpointFormatError(msg) from error
        names, codes = np.unique((table["species"] + "_" + table["chromosome"]).to_numpy(dtype=str), return_inverse=True)
        genes = pd.DataFrame(
            {"species": table["species"], "gene_symbol": table["gene_symbol"].str.upper(), "start": table["start"], "code": codes}
        )
        # A symbol listed twice is somewhere for certain at its first place only.
        return cls(genes.drop_duplicates(["species", "gene_symbol"]), names)

    def place(self, species: str, symbols: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return code and start of each gene, given in upper case; code -1 where the table lacks it."""
        own = self.genes[self.genes["species"] == species].set_index("gene_symbol").reindex(list(symbols))
        return own["code"].fillna(-1).to_numpy(np.int32), own["start"].fillna(0).to_numpy(np.int64)


@dataclass(frozen=True)
class Species:
    """The genes of one species.

    Parameters
    ----------
    name
        As ``species=`` takes it.
    symbols
        Gene symbols as the species spells them; their order is the order of rows.
    first_row
        Row of the first of them.
    chromosomes
        ``(g,)`` code of the chromosome of each; -1 where it is not known.
    starts
        ``(g,)`` where on it the gene begins.
    """

    name: str
    symbols: Sequence[str]
    first_row: int
    chromosomes: NDArray[np.int32]
    starts: NDArray[np.int64]

    @cached_property
    def spelled(self) -> frozenset[str]:
        """Symbols as the species spells them."""
        return frozenset(self.symbols)

    @cached_property
    def places(self) -> dict[str, int]:
        """Symbol in upper case -> its place among `symbols`, the first where two differ in case only."""
        return {symbol.upper(): place for place, symbol in reversed(list(enumerate(self.symbols)))}


class Genes:
    """The genes of all species of a checkpoint; each list is read when it is needed.

    Parameters
    ----------
    readers
        Species -> what reads its genes.
    here
        The species of which the list of genes is on this machine.
    chromosomes
        Of all species.
    first_chromosome
        Row of the first chromosome; the rows from there on are chromosomes.
    """

    def __init__(
        self, readers: Mapping[str, Callable[[], Species]], here: Sequence[str], chromosomes: Chromosomes, first_chromosome: int
    ) -> None:
        self._readers = {name: cache(reader) for name, reader in readers.items()}
        self._here = here
        self.chromosomes, self.first_chromosome = chromosomes, first_chromosome

    @property
    def species(self) -> tuple[str, ...]:
        """Names of all species that the checkpoint has."""
        return tuple(self._readers)

    def get(self, species: str) -> Species:
        """Return the genes of a species.

        Raises
        ------
        SpeciesError
            If the checkpoint does not have it.
        """
        if species not in self._readers:
            msg = f"species={species!r} is not one of {', '.join(self.species)}.{did_you_mean(species, self.species)}"
            msg += " For another one give its proteins: options={'proteins': ..., 'chromosomes': ..., 'taxon': ...}"
            raise SpeciesError(msg)
        return self._readers[species]()

    def available(self) -> list[Species]:
        """Return every species whose list of genes is here."""
        return [self.get(species) for species in self._here]

    def vocabulary(self, rows: int) -> NDArray[np.str_]:
        """Return what each row of the token table stands for, ``(rows,)``."""
        names = np.array([f"<row {row}>" for row in range(rows)], dtype=object)
        names[: len(SPECIAL_NAMES)] = SPECIAL_NAMES
        for species in self.available():
            names[species.first_row : species.first_row + len(species.symbols)] = species.symbols
        names[self.first_chromosome : self.first_chromosome + len(self.chromosomes.names)] = self.chromosomes.names
        return names.astype(str)


def published_genes(files: CheckpointFiles, table: Tensor) -> Genes:
    """Return the genes of the eight species of the published models.

    Parameters
    ----------
    files
        The checkpoint.
    table
        Its token table, ``(V, P)``.

    Raises
    ------
    CheckpointFormatError
        If the files do not belong together.
    """
    chromosomes = Chromosomes.read(files.get("species_chrom.csv"))
    offsets = _read_offsets(files)
    first_chromosome = len(table) - len(chromosomes.names)
    starts = sorted(offsets.values())
    if starts[0] != len(SPECIAL_NAMES) or first_chromosome <= starts[-1]:
        msg = f"{files.origin}: the token table has {len(table):,} rows, species_chrom.csv {len(chromosomes.names):,} chromosomes, and the"
        msg += f" genes of the species begin at rows {', '.join(map(str, starts))}; these do not fit together, use the files of one release"
        raise CheckpointFormatError(msg)
    ends = dict(pairwise([*starts, first_chromosome]))

    def read(species: str) -> Species:
        path = files.get(*_protein_files(species))
        first_row, end = offsets[species], ends[offsets[species]]
        symbols = read_symbols(path, table[first_row:end])
        if len(symbols) != end - first_row:
            msg = (
                f"{path} lists {len(symbols):,} genes of {species}, but the token table of {files.origin} has {end - first_row:,} rows for"
            )
            msg += " them: every gene would be taken for another; use the files of one release"
            raise CheckpointFormatError(msg)
        return Species(species, symbols, first_row, *chromosomes.place(species, [s.upper() for s in symbols]))

    def is_here(species: str) -> bool:
        try:
            return files.find(*_protein_files(species)) is not None
        except WeightsUnavailableError:
            return False

    names = [name for name in PROTEIN_FILES if name in offsets]
    return Genes({name: partial(read, name) for name in names}, [n for n in names if is_here(n)], chromosomes, first_chromosome)


def _protein_files(species: str) -> tuple[str, str]:
    """Return the names of a species' list of genes: the small form that :func:`read_symbols` makes, and the published one."""
    stem = f"protein_embeddings/{PROTEIN_FILES[species]}"
    return f"{stem}.symbols.txt", f"{stem}.gene_symbol_to_embedding_ESM2.pt"


def _read_offsets(files: CheckpointFiles) -> dict[str, int]:
    path = files.get("species_offsets.pkl", "species_offsets.json")
    offsets: Mapping[str, object] = read_json_object(path) if path.suffix == ".json" else read_pickled_dict(path)
    wrong = next((f"{name}: {row!r}" for name, row in offsets.items() if name not in PROTEIN_FILES or not isinstance(row, int)), None)
    if wrong is not None or not offsets:
        msg = f"{path} holds {wrong or 'nothing'}; expected the first row of each of {', '.join(PROTEIN_FILES)}"
        raise CheckpointFormatError(msg)
    return {name: row for name, row in offsets.items() if isinstance(row, int)}


def read_symbols(path: Path, rows: Tensor) -> list[str]:
    """Return the gene symbols of a protein file in the order of its rows.

    The published file holds 0.4 GB of vectors, of which only the order of the symbols is needed. They are kept as a text file, one per
    line, in the cache; a copy of it named ``….symbols.txt`` beside the model replaces the published file.

    Parameters
    ----------
    path
        The protein file (``….gene_symbol_to_embedding_ESM2.pt``), or the list made of it.
    rows
        The rows of the token table that belong to the species, ``(g, P)``, to compare vectors with.

    Raises
    ------
    CheckpointFormatError
        If the vectors are not those of the rows.
    """
    if path.suffix == ".txt":
        return _read_lines(path)
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    cached = settings.cache_dir / "uce" / f"{path.name.removesuffix('.gene_symbol_to_embedding_ESM2.pt')}.{key}.symbols.txt"
    if cached.is_file():
        return _read_lines(cached)
    proteins = read_tensors(path)  # mapped: the vectors stay on disk
    symbols = list(proteins)
    _check_vectors(path, list(proteins.values()), rows)
    cached.parent.mkdir(parents=True, exist_ok=True)
    unfinished = cached.with_suffix(f".{os.getpid()}.partial")
    unfinished.write_text("".join(f"{symbol}\n" for symbol in symbols), encoding="utf-8")
    unfinished.replace(cached)
    return symbols


def _read_lines(path: Path) -> list[str]:
    return read_text(path).removesuffix("\n").split("\n")


def _check_vectors(path: Path, vectors: Sequence[Tensor], rows: Tensor) -> None:
    """Compare some vectors of a protein file with the rows at the same places."""
    for place in np.linspace(0, min(len(vectors), len(rows)) - 1, 32).astype(int):
        vector, row = vectors[place].float(), rows[place].float()
        if vector.shape != row.shape or F.cosine_similarity(vector, row, dim=0) < 0.99:
            msg = f"{path}: the vector of gene {place} is not the one in row {place} of its species in the token table, so that genes"
            msg += " would be taken for others; use the protein file of the release"
            raise CheckpointFormatError(msg)


def new_species(proteins: Path, chromosomes: Path, taxon: int, special: Tensor) -> tuple[Genes, Tensor]:
    """Make genes and token table of a species that the model was not trained on, as the notebook of the original release does.

    Parameters
    ----------
    proteins
        File of ESM2 vectors, gene symbol -> ``(P,)``, as the original release makes them.
    chromosomes
        Table in the form of ``species_chrom.csv`` with this one species.
    taxon
        NCBI taxonomy id; the vectors of the chromosomes are drawn from it.
    special
        The first four rows of the model's own token table.

    Raises
    ------
    InputError
        If a file does not exist.
    CheckpointFormatError
        If a file is of another form.
    """
    for option, path in (("proteins", proteins), ("chromosomes", chromosomes)):
        if not path.is_file():
            msg = f"options: {option}={str(path)!r} is not a file; pass the path of one"
            raise InputError(msg)
    table = Chromosomes.read(chromosomes)
    names = table.genes["species"].unique().tolist()
    if len(names) != 1:
        msg = f"{chromosomes} is a table of {len(names)} species ({', '.join(map(str, names[:5]))}); expected one, the new species"
        raise CheckpointFormatError(msg)
    vectors = read_tensors(proteins)
    width = special.shape[1]
    wrong = next((symbol for symbol, vector in vectors.items() if vector.shape != (width,)), None)
    if wrong is not None or not vectors:
        came = "no gene" if wrong is None else f"a vector of shape {tuple(vectors[wrong].shape)} for {wrong}"
        msg = f"{proteins} holds {came}; expected ({width},) for each gene, the last layer of ESM2 with 15 billion parameters (48 layers)"
        raise CheckpointFormatError(msg)
    generator = torch.Generator().manual_seed(taxon)
    drawn = torch.normal(0.0, 1.0, (len(table.names), width), generator=generator)
    rows = torch.cat((special.float(), torch.stack(list(vectors.values())).float(), drawn))
    symbols = list(vectors)
    species = Species(names[0], symbols, len(special), *table.place(names[0], [s.upper() for s in symbols]))
    return Genes({names[0]: lambda: species}, names, table, len(special) + len(symbols)), rows


@dataclass(frozen=True)
class Fit:
    """How well the names of genes fit a species."""

    species: Species
    known: int
    """Names that it has, in any case."""
    spelled: int
    """Those of them that are spelled as the species spells them."""

    def __str__(self) -> str:
        return f"{self.species.name} ({self.known:,} known, {self.spelled:,} of them as spelled)"


def fits(columns: Mapping[str, Sequence[str]], candidates: Sequence[Species]) -> list[Fit]:
    """Compare each species with the column that fits it best; best species first."""
    names = [set(ids) for ids in columns.values()]
    folded = [{name.upper() for name in column} for column in names]
    found = []
    for species in candidates:
        counts = [(len(upper & species.places.keys()), len(own & species.spelled)) for own, upper in zip(names, folded, strict=True)]
        found.append(Fit(species, *max(counts)))
    return sorted(found, key=lambda fit: (-fit.known, -fit.spelled))


def tell_species(columns: Mapping[str, Sequence[str]], genes: Genes) -> tuple[Species, str]:
    """Tell the species from the names of its genes.

    The one that knows most names; among those within 1 % of it, the one that spells most names as they are. Symbols of human and mouse
    differ in case, those of human and macaque hardly at all: what remains undecided is refused.

    Returns
    -------
    The species, and the evidence in words.

    Raises
    ------
    SpeciesError
        If two species fit equally well.
    """
    ranked = fits(columns, genes.available())
    if not ranked:
        genes.get(genes.species[0])  # says which file is missing
    near = [fit for fit in ranked if fit.known >= 0.99 * ranked[0].known]
    near.sort(key=lambda fit: -fit.spelled)
    rivals = [fit for fit in near if fit.spelled >= 0.99 * near[0].spelled]
    if len(rivals) > 1 and near[0].known:
        msg = f"the names of the genes fit {' and '.join(map(str, rivals[:3]))} equally well;"
        msg += f" pass species={rivals[0].species.name!r} or another"
        raise SpeciesError(msg)
    best = near[0]
    others = [fit for fit in ranked if fit is not best]
    return best.species, f"species told from the names of the genes: {best}" + (f", next {others[0]}" if others else "")


def check_species(species: Species, columns: Mapping[str, Sequence[str]], genes: Genes) -> str | None:
    """Return what speaks against the species that the user named, if anything does.

    Raises
    ------
    SpeciesError
        If another species knows more than twice as many of the genes.
    """
    ranked = fits(columns, genes.available())
    own = next(fit for fit in ranked if fit.species.name == species.name)
    if own.known < 0.5 * ranked[0].known:
        msg = f"species={species.name!r}, but the genes are those of another: {ranked[0]}, {own};"
        msg += f" pass species={ranked[0].species.name!r}, or leave it out"
        raise SpeciesError(msg)
    other = max(ranked, key=lambda fit: fit.spelled)
    return f"species is {own}, as asked for, but genes are spelled as in {other}" if other.spelled > own.spelled else None
