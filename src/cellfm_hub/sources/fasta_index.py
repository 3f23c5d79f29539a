"""Where the sequences of a FASTA file begin, and how long its lines are: the ``.fai`` of samtools.

An index is used only if it describes the file that is read. Times of change do not tell: a file may be replaced by an older one.
"""

import logging
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cellfm_hub._settings import settings
from cellfm_hub.errors import InputError
from cellfm_hub.safe_files import write_atomically

logger = logging.getLogger("cellfm_hub")

_LONGEST_HEADER = 2**24
"""Bytes between two sequences."""


@dataclass(frozen=True)
class Record:
    """One sequence."""

    bases: int
    offset: int
    """Of its first base, in bytes."""
    line_bases: int
    line_bytes: int
    """The same with the end of the line."""

    @property
    def end(self) -> int:
        """Where the byte behind its last base is."""
        return self._place(self.bases - 1) + 1 if self.bases else self.offset

    def _place(self, base: int) -> int:
        lines, rest = divmod(base, self.line_bases)
        return self.offset + lines * self.line_bytes + rest

    def read(self, file: IO[bytes], start: int, end: int) -> str | None:
        """Return the bases from `start` up to `end`, ``None`` if the lines that hold them are not as the index says."""
        first, stop = start - start % self.line_bases, min(end + -end % self.line_bases, self.bases)
        begin = self._place(first)
        line_end = self.line_bytes - self.line_bases if stop < self.bases else 0
        file.seek(begin)
        found = file.read(self._place(stop - 1) + 1 + line_end - begin)
        line_ends = b"".join(found[i :: self.line_bytes] for i in range(self.line_bases, self.line_bytes))
        bases = found.translate(None, b"\r\n")
        if len(bases) != stop - first or line_ends.strip(b"\r\n") or len(bases.translate(None, b"> \t")) != len(bases):
            return None
        return bases[start - first : end - first].decode("latin-1")


Index = dict[str, Record]
"""By name, in the order of the file."""


def read_index(path: Path, file: IO[bytes]) -> Index:
    """Return the index of a FASTA file: the ``.fai`` beside it, or the one made earlier, or a new one.

    A new one is kept beside the file or, where there is one already or nothing can be written, in the cache.

    Parameters
    ----------
    path
        The file.
    file
        The same, open for reading.

    Raises
    ------
    InputError
        If it cannot be indexed.
    """
    beside = path.with_name(f"{path.name}.fai")
    cached = settings.cache_dir / "genomes" / f"{path.name}.{zlib.crc32(str(path.resolve()).encode()):08x}.fai"
    for place in (beside, cached):
        if place.is_file():
            try:
                index = _parse(place.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if _describes(index, file):
                return index
    try:
        text = _build(path)
        index = _parse(text)
        if not _describes(index, file):
            msg = "a last line is longer than those before it, or the file was changed meanwhile"
            raise ValueError(msg)
    except (ValueError, OSError) as error:
        msg = f"genome={str(path)!r} cannot be indexed ({' '.join(str(error).split()) or type(error).__name__});"
        msg += " expected a FASTA file with lines of equal length and each name once"
        raise InputError(msg) from error
    place = beside if not beside.exists() and os.access(path.parent, os.W_OK) else cached
    if beside.exists():
        logger.warning("%s is not the index of %s as it is now; one that is was made: %s", beside, path.name, cached)
    try:
        write_atomically(place, text.encode())
    except OSError as error:
        logger.warning("the index %s cannot be kept (%s), and will be made again the next time", place, error.strerror)
    return index


def _parse(text: str) -> Index:
    """Read a ``.fai``.

    Raises
    ------
    ValueError
        If it is none, or a name stands twice.
    """
    index: Index = {}
    for line in text.splitlines():
        name, *numbers = line.split("\t")
        bases, offset, line_bases, line_bytes = map(int, numbers)
        record = Record(bases, offset, line_bases, line_bytes)
        if name in index:
            msg = f"the name {name!r} stands twice"
            raise ValueError(msg)
        if bases < 0 or offset < 0 or line_bytes < line_bases or line_bases <= 0 < bases:
            msg = f"{line!r} is not a line of an index"
            raise ValueError(msg)
        index[name] = record
    return index


def _describes(index: Index, file: IO[bytes]) -> bool:
    """Say whether a file has these sequences and no others, each under its name, of this length, with lines of this length.

    Only what stands between the sequences is read, and the first and the last line of each.
    """
    size, end = file.seek(0, os.SEEK_END), 0
    for name, record in sorted(index.items(), key=lambda item: item[1].offset):
        if not 0 < record.offset - end <= _LONGEST_HEADER or record.end > size:
            return False
        file.seek(end)
        header = file.read(record.offset - end).lstrip(b"\r\n")
        at_the_end = record.offset == size  # a name without bases, perhaps without the end of its line
        if not header.startswith(b">") or header[1:].split()[:1] != [name.encode()]:
            return False
        if header.find(b"\n") != len(header) - 1 and not (at_the_end and b"\n" not in header):
            return False
        if record.bases and any(record.read(file, base, base + 1) is None for base in {0, record.bases - 1}):
            return False
        end = record.end
    file.seek(end)
    return size - end <= _LONGEST_HEADER and not file.read().strip()


def _build(path: Path) -> str:
    """Read a whole FASTA file and return its ``.fai``.

    Raises
    ------
    ValueError, OSError
        If it cannot be indexed.
    """
    import pyfaidx  # a sequence from memory needs no index

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "fai"
        try:
            pyfaidx.Faidx(str(path), indexname=str(place)).close()
        except (pyfaidx.FastaIndexingError, pyfaidx.IndexNotFoundError, RuntimeError) as error:  # the last for several blank lines
            raise ValueError(str(error)) from error
        return place.read_text(encoding="utf-8")
