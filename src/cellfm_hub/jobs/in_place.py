"""Change an HDF5 file so that being killed at any moment costs nothing.

HDF5 itself overwrites parts of its index while it writes, and a program killed then leaves a file that nobody can open. Here the bytes of
the file as it was are left alone: what HDF5 appends goes behind its end, where no reader looks; the few pages of index that it wants to
change are held back. When all is on disk, these pages go into a redo log, and only then into the file.

A crash before the log is complete leaves the old file, with some unused bytes behind its end (see :func:`drop_leftovers`); a crash after
it is mended by :func:`redo`. Between the first and the last of these pages, some microseconds, the file cannot be read until
:func:`redo` has run; there is no other such window.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellfm_hub.errors import OutputError
from cellfm_hub.jobs.durable import durably, sync

PAGE = 4096


class _HeldBack(io.RawIOBase):
    """A file of which the first `end` bytes are not touched: writes behind them pass, those into them stay in memory, page by page.

    A write that fails, as on a full disk, is kept in `error`, and those after it are dropped: HDF5 never lets go of a file that it could
    not write, and crashes when the program ends.
    """

    def __init__(self, descriptor: int, end: int) -> None:
        self._descriptor, self.end = descriptor, end
        self.size = os.fstat(descriptor).st_size
        self.pages: dict[int, bytearray] = {}
        self.error: BaseException | None = None
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start, stop = self._at, min(self._at + len(view), max(self.size, self._at))
        found = os.pread(self._descriptor, stop - start, start)
        view[: stop - start] = found.ljust(stop - start, b"\0")
        for page in range(start // PAGE, -(-min(stop, self.end) // PAGE)):
            if page in self.pages:
                begin, content = page * PAGE, self.pages[page]
                low, high = max(start, begin), min(stop, begin + len(content))
                view[low - start : high - start] = content[low - begin : high - begin]
        self._at = stop
        return stop - start

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        start, stop = self._at, self._at + len(view)
        for page in range(start // PAGE, -(-min(stop, self.end) // PAGE)):
            begin = page * PAGE
            if page not in self.pages:
                self.pages[page] = bytearray(self.old_page(page))
            content = self.pages[page]
            low, high = max(start, begin), min(stop, begin + len(content))
            content[low - begin : high - begin] = view[low - start : high - start]
        done = max(start, self.end)
        try:
            while done < stop and self.error is None:
                done += os.pwrite(self._descriptor, view[done - start :], done)
        except BaseException as error:  # noqa: BLE001  # an interrupt too: HDF5 is not to see it
            self.error = error
        self._at, self.size = stop, max(self.size, stop)
        return len(view)

    def old_page(self, page: int) -> bytes:
        """Return a page as it stands in the file: shorter at its end."""
        return os.pread(self._descriptor, min(PAGE, self.end - page * PAGE), page * PAGE)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        try:
            if self.size >= self.end and self.error is None:
                os.ftruncate(self._descriptor, self.size)
        except OSError as error:
            self.error = error
        return self.size

    def flush(self) -> None:
        """Do nothing: nothing is buffered here."""


@contextmanager
def hdf5_file(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file, a new one or one of our own, for writing; if that fails, an OSError comes at the end."""
    with path.open("r+b" if path.exists() else "w+b") as raw:
        through = _HeldBack(raw.fileno(), 0)
        with h5py.File(through, "r+" if through.size else "w") as file:
            yield file
        if through.error is not None:
            raise through.error


@contextmanager
def changing(path: Path, log: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for a change that happens completely or not at all.

    Parameters
    ----------
    path
        The file.
    log
        Where the redo log shall be; it stays there, so that whoever finds it can tell that the change was made.

    Raises
    ------
    OutputError
        If another program has the file open.
    OSError
        If it cannot be written; it is then as it was before.
    """
    with path.open("r+b") as raw:
        _lock(raw.fileno(), path)
        before = os.fstat(raw.fileno())
        held_back = _HeldBack(raw.fileno(), before.st_size)
        try:
            with h5py.File(held_back, "r+") as file:
                yield file
            if held_back.error is not None:
                raise held_back.error
            sync(raw.fileno())
            numbers = sorted(held_back.pages)
            old = [np.frombuffer(held_back.old_page(page), np.uint8) for page in numbers]
            new = [np.frombuffer(bytes(held_back.pages[page]), np.uint8) for page in numbers]
            with durably(log) as temporary, temporary.open("wb") as out:
                lengths = np.array([len(page) for page in old], np.int64)
                np.savez(out, pages=numbers, lengths=lengths, old=_joined(old), new=_joined(new), size=held_back.size)
        except BaseException:
            os.ftruncate(raw.fileno(), before.st_size)
            os.utime(raw.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
            raise
        _apply(raw.fileno(), log)


def redo(path: Path, log: Path) -> None:
    """Bring a change to its end that was interrupted. Doing it again changes nothing.

    Raises
    ------
    OutputError
        If the file was changed by somebody else since.
    """
    with path.open("r+b") as raw:
        _lock(raw.fileno(), path)
        with np.load(log) as content:
            offsets = np.concatenate(([0], np.cumsum(content["lengths"])))
            old, new = content["old"].tobytes(), content["new"].tobytes()
            for page, start, stop in zip(content["pages"], offsets[:-1], offsets[1:], strict=True):
                if os.pread(raw.fileno(), stop - start, int(page) * PAGE) not in (old[start:stop], new[start:stop]):
                    msg = f"{path} was changed since a run that wrote into it was interrupted; remove {log.parent} to keep it as it is"
                    raise OutputError(msg)
        _apply(raw.fileno(), log)


def drop_leftovers(path: Path, *, size: int, mtime_ns: int) -> None:
    """Cut off what an interrupted change appended, if the file otherwise is as it was: `size` bytes long, last changed at `mtime_ns`."""
    if path.stat().st_size > size and _end_of_file(path) == size:
        os.truncate(path, size)
        os.utime(path, ns=(mtime_ns, mtime_ns))


def _apply(descriptor: int, log: Path) -> None:
    with np.load(log) as content:
        offsets = np.concatenate(([0], np.cumsum(content["lengths"])))
        new = content["new"].tobytes()
        for page, start, stop in zip(content["pages"], offsets[:-1], offsets[1:], strict=True):
            os.pwrite(descriptor, new[start:stop], int(page) * PAGE)
        os.ftruncate(descriptor, int(content["size"]))
    sync(descriptor)


def _joined(pages: list[Any]) -> Any:
    return np.concatenate(pages) if pages else np.zeros(0, np.uint8)


def _lock(descriptor: int, path: Path) -> None:
    """Take the lock that HDF5 itself takes, which is not taken for a file that it does not open itself."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        msg = f"{path} cannot be written: another program has it open; close it there, or choose another file with -o"
        raise OutputError(msg) from error
    except OSError:  # a file system without locks
        return


def _end_of_file(path: Path) -> int | None:
    """Return the end of an HDF5 file as its first block states it; the file itself may be longer."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:8] != b"\x89HDF\r\n\x1a\n" or len(head) < 64:
        return None
    at = {0: 40, 1: 44, 2: 28, 3: 28}.get(head[8])  # by the version of the format
    return None if at is None else int.from_bytes(head[at : at + 8], "little")
