"""Files that are there completely or not at all, and still there after the power failed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(descriptor: int) -> None:
    """Wait until a file is on the disk itself."""
    os.fsync(descriptor)


@contextmanager
def durably(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what is written there appears under `path` when it is complete and on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            sync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Where folders cannot be opened (Windows) they need not be."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
