"""Recognise what is often found in place of a published file: nothing, a Git LFS pointer, a web page, half of it."""

import re
import zipfile
from pathlib import Path

from cellfm_hub.errors import CheckpointFormatError

_LFS_POINTER = b"version https://git-lfs"


def head(path: Path) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(512)


def stand_in(path: Path) -> str | None:
    """Recognise what is often found in place of the real file.

    Returns
    -------
    What it is instead, in words, or ``None``.
    """
    begin = head(path)
    if not begin:
        return "it is empty"
    if begin.startswith(_LFS_POINTER):
        return f"it is a Git LFS pointer of {path.stat().st_size} bytes, not the file itself; fetch it with 'git lfs pull' or download it"
    start = begin.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<!doctype", b"<head")):
        with path.open("rb") as file:
            found = re.search(rb"<title[^>]*>([^<]{1,80})", file.read(20_000), re.IGNORECASE)
        title = f" ({found[1].decode(errors='replace').strip()!r})" if found else ""
        return f"it is a web page{title}, as servers send for an error, a login or a licence, not the file itself"
    if start.startswith((b'{"error', b"<?xml")) and path.stat().st_size < 10_000:
        return "it is a server's error message, not the file itself"
    return None


def damage(path: Path, size: int | None = None) -> str | None:
    """Say what is wrong with a file that is not what it should be, as far as one can see.

    Parameters
    ----------
    path
        The file.
    size
        Bytes that it should have, if known.
    """
    if (instead := stand_in(path)) is not None:
        return instead
    got = path.stat().st_size
    if size is not None and got < size:
        return f"it is cut short: {got:,} of {size:,} bytes, the download broke off"
    if head(path).startswith(b"PK") and not zipfile.is_zipfile(path):
        return "it is a truncated archive: its end is missing"
    return None


def refuse_stand_ins(path: Path) -> None:
    """Raise a :class:`CheckpointFormatError` if something else stands in the file's place."""
    if (instead := stand_in(path)) is not None:
        msg = f"{path} cannot be used: {instead}. Move it away and download it again"
        raise CheckpointFormatError(msg)
