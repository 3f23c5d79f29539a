"""Tell whether a file is still the one that a run began with."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cellfm_hub.errors import InputError

WHOLE = 64 * 2**20
"""Files up to this size are hashed whole; of larger ones as much is hashed, in stretches spread evenly from the first byte to the last."""

STRETCH = 2**20


@dataclass(frozen=True)
class Fingerprint:
    """What is compared. A folder (a zarr store) counts as all its files."""

    size: int
    sha256: str
    """Of the whole, or of a sample; and of the names and sizes of the files of a folder."""
    mtime_ns: int
    """Last change. Not part of the identity: a copy is as good. But a large file that was touched is looked at more closely."""

    @property
    def whole(self) -> bool:
        """Whether every byte was hashed."""
        return self.size <= WHOLE

    def same_content(self, other: "Fingerprint") -> bool:
        """Whether size and hash agree."""
        return (self.size, self.sha256) == (other.size, other.sha256)


def fingerprint(path: Path) -> Fingerprint:
    """Read at most 64 MiB of a file or folder.

    Raises
    ------
    InputError
        If it is not there or cannot be read.
    """
    try:
        size, mtime = stamp(path)
        found = hashlib.sha256()
        position, wanted = 0, list(_stretches(size))
        for file in _files(path):
            length = file.stat().st_size
            found.update(f"{file.relative_to(path)}\0{length}\0".encode())
            with file.open("rb") as opened:
                while wanted and wanted[0][0] < position + length:
                    start, stop = wanted.pop(0)
                    opened.seek(start - position)
                    found.update(opened.read(min(stop, position + length) - start))
                    if stop > position + length:
                        wanted.insert(0, (position + length, stop))
            position += length
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror or error}; give the path of a file with cells or sequences"
        raise InputError(msg) from error
    return Fingerprint(size, found.hexdigest(), mtime)


def stamp(path: Path) -> tuple[int, int]:
    """Return size and time of the last change, without reading."""
    states = [file.stat() for file in _files(path)]
    return sum(state.st_size for state in states), max((state.st_mtime_ns for state in states), default=0)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def _stretches(size: int) -> Iterator[tuple[int, int]]:
    if size <= WHOLE:
        yield 0, size
        return
    count = WHOLE // STRETCH
    for i in range(count):
        start = (size - STRETCH) * i // (count - 1)
        yield start, start + STRETCH
