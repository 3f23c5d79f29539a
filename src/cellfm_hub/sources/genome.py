"""Places in a genome: intervals (BED) and variants (VCF), cut out of an indexed FASTA file."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from cellfm_hub.errors import InputError, SequenceError, did_you_mean
from cellfm_hub.sequences import reverse_complement
from cellfm_hub.sources.fasta_index import read_index
from cellfm_hub.sources.text import read_lines

WINDOW = 512
"""Bases around a variant, where nothing else is asked for."""

_BASES = re.compile("[ACGTNacgtn]+")
_PLACE = re.compile("[0-9]{1,18}")
"""A position; no genome is longer."""


class Genome:
    """A FASTA file from which stretches are read without reading the rest.

    See :mod:`cellfm_hub.sources.fasta_index`.

    Parameters
    ----------
    path
        The FASTA file, not gzipped.

    Raises
    ------
    InputError
        If it cannot be indexed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            msg = f"genome={str(path)!r} is not a file; give the FASTA file of the assembly that the positions refer to"
            raise InputError(msg)
        self._file = path.open("rb")
        try:
            head = self._file.read(2)
            if head == b"\x1f\x8b":
                msg = f"genome={str(path)!r} is gzipped, which cannot be read from the middle; unpack it with gunzip"
                raise InputError(msg)
            if not head.startswith(b">"):
                msg = f"genome={str(path)!r} does not start with '>'; give the FASTA file of the assembly that the positions refer to"
                raise InputError(msg)
            self._index = read_index(path, self._file)
        except BaseException:
            self._file.close()
            raise
        self.lengths = {name: record.bases for name, record in self._index.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def fetch(self, chromosome: str, start: int, end: int, where: str) -> str:
        """Return the bases from `start` (0-based) up to `end`, in the case of the file.

        Raises
        ------
        SequenceError
            Beginning with `where`, if the genome has no such place, or was changed since it was opened.
        """
        if chromosome not in self.lengths:
            msg = f"{where}: {self._unknown(chromosome)}"
            raise SequenceError(msg)
        if not 0 <= start <= end <= self.lengths[chromosome]:
            msg = f"{where}: {chromosome}:{start:,}-{end:,} is not inside {chromosome!r}, which has {self.lengths[chromosome]:,} bases in"
            msg += f" {self.path.name}; check that it is the assembly the positions refer to, and clip the interval"
            raise SequenceError(msg)
        if start == end:
            return ""
        bases = self._index[chromosome].read(self._file, start, end)
        if bases is None:
            msg = f"{where}: {chromosome}:{start:,}-{end:,} of {self.path} is not {end - start:,} letters in lines of equal length;"
            msg += " the file was changed while it was read, or is damaged: run again, or write it anew"
            raise SequenceError(msg)
        return bases

    def _unknown(self, chromosome: str) -> str:
        bare = chromosome.removeprefix("chr")
        mitochondrial = ("chrM", "MT", "M", "chrMT") if bare in {"M", "MT"} else ()
        other = next((name for name in (f"chr{bare}", bare, *mitochondrial) if name in self.lengths), None)
        msg = f"{self.path.name} has no sequence {chromosome!r}"
        if other is not None:
            return f"{msg}, but {other!r}; name the chromosomes alike in both files (for example with sed)"
        held = ", ".join(list(self.lengths)[:5]) + (" …" if len(self.lengths) > 5 else "")
        return f"{msg}.{did_you_mean(chromosome, self.lengths)} It holds {held}; use the genome that the positions refer to"


def read_bed(path: Path, genome: Genome) -> Iterator[tuple[str, str]]:
    """Cut the intervals of a BED file out of a genome, those on the ``-`` strand as reverse complement.

    Returns
    -------
    ``(name, sequence)``. The name is the fourth column; without one it is ``chromosome:start-end``, and the strand in brackets if given.

    Raises
    ------
    SequenceError
        With the line, if it is not BED or has no place in the genome.
    """
    for number, line in _bed_lines(path):
        where = f"{path} line {number}"
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) < 3 or not _PLACE.fullmatch(fields[1].strip()) or not _PLACE.fullmatch(fields[2].strip()):
            msg = f"{where}: {line[:60]!r} is not BED; expected chromosome, start and end, and optionally name, score and strand"
            raise SequenceError(msg)
        chromosome, start, end = fields[0], int(fields[1]), int(fields[2])
        strand = fields[5].strip() if len(fields) > 5 else ""
        if strand not in {"", "+", "-", "."}:
            msg = f"{where}: strand {strand!r}; expected +, - or . in the sixth column"
            raise SequenceError(msg)
        name = fields[3].strip() if len(fields) > 3 else ""
        if name in {"", "."}:
            name = f"{chromosome}:{start}-{end}" + (f"({strand})" if strand in {"+", "-"} else "")
        sequence = genome.fetch(chromosome, start, end, where)
        yield name, reverse_complement(sequence) if strand == "-" else sequence


def read_vcf(path: Path, genome: Genome, window: int) -> Iterator[tuple[str, str, str]]:
    """Cut a window around each alternative allele of a VCF file out of a genome.

    The reference window has `window` bases with REF in its middle (fewer at the end of a chromosome); in the other REF is replaced by
    ALT. Case is that of the genome.

    Returns
    -------
    ``(name, reference, alternative)``. The name is the ID, with ``:ALT`` behind it where a line has several; without an ID it is
    ``chromosome:position:REF>ALT``.

    Raises
    ------
    SequenceError
        With the line, if it is not VCF, REF is not what the genome has, or ALT is not a sequence of bases.
    """
    for number, line in _vcf_lines(path):
        where = f"{path} line {number}"
        fields = line.split("\t", 5)
        if len(fields) < 5 or not _PLACE.fullmatch(fields[1]) or not _BASES.fullmatch(fields[3]):
            msg = f"{where}: {line[:60]!r} is not VCF; expected CHROM, POS, ID, REF and ALT, separated by tabs"
            raise SequenceError(msg)
        chromosome, position, identifier, reference = fields[0], int(fields[1]), fields[2], fields[3]
        alternatives = fields[4].strip().split(",")
        if (wrong := next((allele for allele in alternatives if not _BASES.fullmatch(allele)), None)) is not None:
            msg = f"{where}: ALT {wrong[:30]!r} is not a sequence of bases; keep those that are, with: bcftools view -v snps,indels,mnps"
            raise SequenceError(msg)
        if len(reference) > window:
            msg = f"{where}: REF has {len(reference):,} bases, window={window:,} is shorter; pass a larger window"
            raise SequenceError(msg)
        begin = position - 1
        found = genome.fetch(chromosome, begin, begin + len(reference), where)
        if found.upper() != reference.upper():
            msg = f"{where}: REF is {reference[:30]!r} at {chromosome}:{position:,}, {genome.path.name} has {found[:30]!r};"
            msg += " use the assembly that the variants were called on"
            raise SequenceError(msg)
        start = begin - (window - len(reference)) // 2
        before = genome.fetch(chromosome, max(start, 0), begin, where)
        after = genome.fetch(chromosome, begin + len(reference), min(start + window, genome.lengths[chromosome]), where)
        for alternative in alternatives:
            name = f"{chromosome}:{position}:{reference}>{alternative}"
            if identifier not in {"", "."}:
                name = identifier if len(alternatives) == 1 else f"{identifier}:{alternative}"
            # In a soft-masked stretch the other allele is lower case too: what differs shall be the base, not the case.
            allele = alternative.lower() if found.islower() else alternative
            yield name, f"{before}{found}{after}", f"{before}{allele}{after}"


def count_bed(path: Path) -> int:
    """Return how many intervals :func:`read_bed` finds, without the genome."""
    return sum(1 for _ in _bed_lines(path))


def count_vcf(path: Path) -> int:
    """Return how many alternative alleles :func:`read_vcf` finds, without the genome."""
    return sum("".join(line.split("\t", 5)[4:5]).count(",") + 1 for _, line in _vcf_lines(path))


def _bed_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Give the lines that hold an interval, with their numbers from 1."""
    return ((n, line) for n, line in enumerate(read_lines(path), 1) if line.strip() and not line.startswith(("#", "track ", "browser ")))


def _vcf_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Give the lines that hold a variant, with their numbers from 1."""
    return ((n, line) for n, line in enumerate(read_lines(path), 1) if line.strip() and not line.startswith("#"))
