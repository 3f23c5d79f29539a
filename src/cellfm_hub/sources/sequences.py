"""Sequences: lists, mappings, Series, FASTA and FASTQ files, places in a genome; read as blocks of names and bases."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from cellfm_hub.errors import InputError, SequenceError, UsageError
from cellfm_hub.sequences import NUCLEOTIDES
from cellfm_hub.sources.genome import WINDOW, Genome, count_bed, count_vcf, read_bed, read_vcf
from cellfm_hub.sources.text import read_lines

BLOCK_SEQUENCES = 4096
BLOCK_BASES = 16_000_000
"""A block ends after this many sequences or bases."""

BED_SUFFIXES = (".bed", ".narrowpeak", ".broadpeak")
VCF_SUFFIXES = (".vcf",)


SOURCES = "a list of str, a dict or Series of str, or the path of a FASTA, FASTQ, BED or VCF file"
"""What can be read, for messages."""

_NONE = "there are no sequences in the input; pass at least one"


@dataclass(frozen=True)
class SequenceBlock:
    """Some sequences and what they are called."""

    names: list[str]
    sequences: list[str]
    alternatives: list[str] | None = None
    """Variants only: the windows with the other allele; `sequences` then holds those of the reference."""

    @property
    def alleles(self) -> list[list[str]]:
        """The sequences; of variants those of the reference, then those of the other allele."""
        return [self.sequences] if self.alternatives is None else [self.sequences, self.alternatives]

    def rows(self, start: int, stop: int) -> "SequenceBlock":
        """Return some of them."""
        return SequenceBlock(self.names[start:stop], *(sequences[start:stop] for sequences in self.alleles))

    def alleles_as_rows(self) -> "SequenceBlock":
        """Return reference and alternative windows in turn, as sequences of their own."""
        assert self.alternatives is not None
        names = [f"{name}/{allele}" for name in self.names for allele in ("ref", "alt")]
        return SequenceBlock(names, list(chain.from_iterable(zip(self.sequences, self.alternatives, strict=True))))


def sequence_blocks(
    data: Any, *, genome: str | Path | None = None, window: int = WINDOW, may_be_empty: bool = True
) -> Iterator[SequenceBlock]:
    """Read sequences block by block.

    Parameters
    ----------
    data
        A list of strings (named ``"0"``, ``"1"``, …), a mapping or Series (named by its keys), or the path of a FASTA, FASTQ, BED or VCF
        file, plain or gzipped. Names may repeat.
    genome
        BED and VCF only: the FASTA file that holds the places.
    window
        VCF only: bases of the reference window.
    may_be_empty
        Whether a sequence may have no bases.

    Raises
    ------
    InputError
        If `data` is none of these, or `genome` is missing or superfluous.
    SequenceError
        If there is no sequence, one is empty that must not be, or a file is damaged.
    """
    empty = True
    with _records(data, genome, window) as records:
        failure: InputError | None = None
        while failure is None:
            block, failure = _take(records)
            if not block:
                break
            empty = False
            columns = [list(column) for column in zip(*block, strict=True)]
            if not may_be_empty:
                check_not_empty(columns[0], columns[1])
            yield SequenceBlock(*columns)
        if failure is not None:  # after what was read before it
            raise failure
    if empty:
        raise SequenceError(_NONE)


def count_rows(path: Path, *, variants: bool) -> int:
    """Count the sequences of a file by reading it once, without a genome.

    Parameters
    ----------
    path
        FASTA, FASTQ, BED or VCF.
    variants
        Whether the two alleles of a VCF file make one row, their difference; otherwise they make two.

    Raises
    ------
    InputError
        If it cannot be read.
    SequenceError
        If there is no sequence.
    """
    places = places_of(path)
    if places == "VCF":
        rows = count_vcf(path) * (1 if variants else 2)
    else:
        rows = count_bed(path) if places == "BED" else sum(1 for _ in read_fasta(path))
    if not rows:
        raise SequenceError(_NONE)
    return rows


def check_not_empty(names: Sequence[str], sequences: Sequence[str]) -> None:
    """Raise a SequenceError if one has no bases."""
    empty = next((name for name, sequence in zip(names, sequences, strict=True) if not sequence), None)
    if empty is not None:
        msg = f"sequence {empty!r} is empty; remove it, or pass on_empty='nan' for a row of NaN"
        raise SequenceError(msg)


Record = tuple[str, ...]
"""Name and sequence; of a variant name, reference and alternative window."""


def _take(records: Iterator[Record]) -> tuple[list[Record], InputError | None]:
    """Read records up to the end of a block, or to the first that cannot be read."""
    block: list[Record] = []
    bases = 0
    try:
        for record in islice(records, BLOCK_SEQUENCES):
            block.append(record)
            bases += sum(map(len, record[1:]))
            if bases >= BLOCK_BASES:
                break
    except InputError as error:
        return block, error
    return block, None


@contextmanager
def _records(data: Any, genome: str | Path | None, window: int) -> Iterator[Iterator[Record]]:
    check_places(data, genome, window)
    path = Path(data) if isinstance(data, str | Path) else None
    if path is None:
        yield _from_memory(data)
    elif genome is None:
        if isinstance(data, str) and not _exists(path) and (not path.suffix or set(data.upper()) <= set(NUCLEOTIDES)):
            msg = f"a single string ({data[:20]!r}…) is neither a list of sequences nor the path of a FASTA file;"
            msg += f" write [{data[:8]!r}…] for one"
            raise InputError(msg)
        yield read_fasta(path)
    else:
        with Genome(Path(genome)) as opened:
            yield read_vcf(path, opened, window) if places_of(path) == "VCF" else read_bed(path, opened)


def places_of(data: Any) -> Literal["BED", "VCF"] | None:
    """Say which kind of places in a genome a file holds, by its name; ``None`` where it holds sequences."""
    name = Path(data).name.lower().removesuffix(".gz") if isinstance(data, str | Path) else ""
    return "BED" if name.endswith(BED_SUFFIXES) else "VCF" if name.endswith(VCF_SUFFIXES) else None


def check_places(data: Any, genome: str | Path | None, window: int) -> None:
    """Raise unless `genome` and `window` go with the data: a genome with places, a window with variants."""
    places = places_of(data)
    if places is not None and genome is None:
        msg = f"{data} holds positions, not sequences; pass the FASTA file of the genome as well: genome='hg38.fa'"
        raise InputError(msg)
    if genome is not None and places is None:
        msg = f"genome={str(genome)!r} goes with a BED or VCF file; leave it out for other sequences"
        raise UsageError(msg)
    if window != WINDOW and places != "VCF":
        msg = f"window={window} is that around a variant and goes with a VCF file; leave it out for other sequences"
        raise UsageError(msg)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a sequence is too long for the name of a file
        return False


def _from_memory(data: Any) -> Iterator[tuple[str, str]]:
    if isinstance(data, pd.Series):
        return _checked(zip(data.index.astype(str), data, strict=True))
    if isinstance(data, Mapping):
        return _checked((str(name), sequence) for name, sequence in data.items())
    if isinstance(data, Iterable) and not isinstance(data, bytes | pd.DataFrame) and not hasattr(data, "obs"):
        return _checked((str(i), sequence) for i, sequence in enumerate(data))
    msg = f"a sequence model takes {SOURCES}; received {type(data).__name__}"
    raise InputError(msg)


def _checked(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    for name, sequence in records:
        if not isinstance(sequence, str):
            msg = f"sequence {name!r} is a {type(sequence).__name__}; expected str"
            raise SequenceError(msg)
        yield name, str(sequence)


def read_fasta(path: Path) -> Iterator[tuple[str, str]]:
    """Read ``(name, sequence)`` from a FASTA or FASTQ file, plain or gzipped; which one it is shows in its first letter.

    Names end at the first white space; a record without one is named by its number, from 0. A record without bases is an empty sequence.

    Raises
    ------
    SequenceError
        If the file is damaged or neither of the two.
    """
    lines = read_lines(path)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return iter(())
    if not first.startswith((">", "@")):
        msg = f"{path} begins with {first[:20]!r}; expected a FASTA file ('>') or a FASTQ file ('@')"
        raise SequenceError(msg)
    return (_fasta if first.startswith(">") else _fastq)(chain([first], lines), path)


def _name(header: str, number: int) -> str:
    return (header[1:].split() or [str(number)])[0]


def _fasta(lines: Iterable[str], _path: Path) -> Iterator[tuple[str, str]]:
    number, name, parts = 0, "", list[str]()
    for line in lines:
        if line.startswith(">"):
            if number:
                yield name, "".join(parts)
            name, parts = _name(line, number), []
            number += 1
        else:
            parts.append(line.strip())
    yield name, "".join(parts)


def _fastq(lines: Iterator[str], path: Path) -> Iterator[tuple[str, str]]:
    number = 0
    for header in lines:
        if not header.strip():
            continue
        name = _name(header, number)
        number += 1
        parts, qualities, complete = list[str](), 0, False
        for line in lines:
            if line.startswith("+"):
                complete = True
                break
            parts.append(line.strip())
        sequence = "".join(parts)
        # A quality line may begin with any letter, '@' and '+' among them: only its length tells where it ends.
        while complete and qualities < len(sequence):
            line = next(lines, "")
            qualities += len(line.strip())
            complete = bool(line)
        if not header.startswith("@") or not complete or qualities != len(sequence):
            msg = f"{path}: record {name!r} is not FASTQ: {len(sequence)} bases, {qualities} qualities; expected '@name', bases, '+' and as"
            msg += " many qualities. The file may be cut short"
            raise SequenceError(msg)
        yield name, sequence
