"""Take files out of tar and zip archives that somebody else made. An archive is looked through before anything of it is unpacked."""

import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any

from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.stand_ins import refuse_stand_ins

MAX_RATIO = 100
"""How many times its size an archive may unpack to; weights shrink by a half at most, text to a tenth."""
_SMALL = 2**20
"""Bytes; of a smaller archive the ratio says nothing."""
_MAX_HEADER = 2**20
"""Bytes of a tar header that is stored like a file, such as a long name; it is read whole."""


def _inside(name: str) -> str:
    """Return the name of an archive's member without leading ``./``, or refuse it.

    Raises
    ------
    CheckpointFormatError
        If it would leave the folder it is unpacked into.
    """
    plain = name.replace("\\", "/").removeprefix("./")
    if plain.startswith("/") or re.match(r"[A-Za-z]:", plain) or ".." in plain.split("/"):
        msg = f"its member {name[:100]!r} would be written outside its own folder"
        raise CheckpointFormatError(msg)
    return plain.rstrip("/")


def archive_members(path: Path) -> dict[str, int]:
    """List the files of a tar or zip archive, name -> bytes.

    Raises
    ------
    CheckpointFormatError
        If the archive is damaged, or a member is absolute, climbs out of its folder, is neither file nor folder, or unpacks to far more
        than the archive holds.
    """
    with Archive(path) as archive:
        return {name: size for name, (_, size) in archive.members.items()}


def extract(path: Path, wanted: str, target: Path) -> None:
    """Unpack one file of an archive: the member of that path or, where there is just one, of that base name.

    Raises
    ------
    CheckpointFormatError
        If it is not there, or the archive is refused; see :func:`archive_members`.
    """
    with Archive(path) as archive:
        base = wanted.rpartition("/")[2]
        found = [name for name in archive.members if name == wanted] or [
            name for name in archive.members if name.rpartition("/")[2] == base
        ]
        if len(found) != 1:
            held = ", ".join(list(archive.members)[:8])
            msg = f"{path} holds {len(found)} files called {base}, expected one; it has {held or 'nothing'}"
            raise CheckpointFormatError(msg)
        archive.copy(found[0], target)


class _TarHeader(tarfile.TarInfo):
    """Refuses headers that would be read into memory whole and are larger than any name."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        in_memory = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.type in in_memory and self.size > _MAX_HEADER:
            msg = f"a header has {self.size:,} bytes"
            raise tarfile.ReadError(msg)
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]  # its documentation names it for overriding


class Archive:
    """A tar or zip archive that was looked through before anything is unpacked."""

    def __init__(self, path: Path) -> None:
        refuse_stand_ins(path)
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> "Archive":
        self.members: dict[str, tuple[Any, int]] = {}
        self._file: tarfile.TarFile | zipfile.ZipFile
        try:
            with self._readable("it"):
                if zipfile.is_zipfile(self._path):
                    self._file = self._stack.enter_context(zipfile.ZipFile(self._path))
                else:
                    self._file = self._stack.enter_context(tarfile.open(self._path, tarinfo=_TarHeader))
                self._look_through()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _look_through(self) -> None:
        limit, total = MAX_RATIO * max(self._path.stat().st_size, _SMALL), 0
        for name, member, size, kind in self._listed():
            try:
                plain = _inside(name)
                problem = None
                if kind == "special":
                    problem = "is a link or a device"
                elif kind == "sparse":
                    problem = "is stored with holes, so that a few bytes can unpack to any size"
                elif kind == "file" and plain in self.members:
                    problem = "stands twice"
                elif (total := total + size) > limit:  # before the next header is looked for behind it
                    problem = f"brings what it unpacks to to {total:,} bytes, more than {MAX_RATIO} times its own size"
                if problem is not None:
                    msg = f"its member {name[:100]!r} {problem}"
                    raise CheckpointFormatError(msg)
            except CheckpointFormatError as error:
                msg = f"{self._path} is refused, nothing was unpacked: {error}. Get the archive from its source again"
                raise CheckpointFormatError(msg) from None
            if kind == "file":
                self.members[plain] = (member, size)

    def _listed(self) -> Iterator[tuple[str, Any, int, str]]:
        """List name, member, bytes and kind (file, folder, special, sparse) of what is in the archive."""
        if isinstance(self._file, zipfile.ZipFile):
            for i in self._file.infolist():
                kind = "folder" if i.is_dir() else "special" if stat.S_ISLNK(i.external_attr >> 16) else "file"
                yield i.filename, i, i.file_size, kind
            return
        for m in self._file:
            kind = "folder" if m.isdir() else "special" if not m.isfile() else "sparse" if m.issparse() else "file"
            yield m.name, m, m.size, kind

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        """Turn whatever a damaged archive makes the libraries raise into one line."""
        try:
            yield
        except (
            tarfile.TarError,
            zipfile.BadZipFile,
            EOFError,
            zlib.error,
            lzma.LZMAError,
            OSError,
            NotImplementedError,
            RuntimeError,
            ValueError,
        ) as error:
            # A zip member may be encrypted or packed in a way that Python does not know. Errors of the disk have a number.
            if isinstance(error, CheckpointFormatError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            msg = f"{self._path}: {what} cannot be read as a tar or zip archive ({reason}); it may be cut short, fetch it again"
            raise CheckpointFormatError(msg) from error

    def read(self, name: str, limit: int) -> bytes:
        """Return the contents of a small file."""
        with self._readable(name), closing(self._open(name)) as source:
            return source.read(limit)

    def copy(self, name: str, target: Path) -> None:
        """Write one file, under its own name when it is whole."""
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            self.unpack(name, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def unpack(self, name: str, target: Path) -> None:
        """Write one file to a place that nobody takes for the file before it is whole."""
        target.parent.mkdir(parents=True, exist_ok=True)
        size = self.members[name][1]
        with self._readable(name), closing(self._open(name)) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        if target.stat().st_size != size:
            msg = f"{self._path}: {name} is cut short, {target.stat().st_size:,} of {size:,} bytes; fetch the archive again"
            raise CheckpointFormatError(msg)

    def _open(self, name: str) -> IO[bytes]:
        member = self.members[name][0]
        opened = self._file.open(member) if isinstance(self._file, zipfile.ZipFile) else self._file.extractfile(member)
        assert opened is not None  # a regular file
        return opened
