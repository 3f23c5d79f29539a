"""Hashes of files are remembered, but only where a later change would show."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cellfm_hub import safe_files


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "across processes"])
def test_a_file_that_changed_just_now_is_read_again(tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another change may bear the same time: the clocks of file systems tick slowly."""
    monkeypatch.setattr(safe_files, "_LARGE", 0 if large else 2**40)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"before")
    written = path.stat().st_mtime_ns
    assert safe_files.sha256(path) == hashlib.sha256(b"before").hexdigest()
    path.write_bytes(b"after.")
    os.utime(path, ns=(written, written))
    if large:
        monkeypatch.setattr(safe_files, "_hashes", {})
    assert safe_files.sha256(path) == hashlib.sha256(b"after.").hexdigest()


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "across processes"])
def test_a_file_that_settled_is_read_once(tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_files, "_LARGE", 0 if large else 2**40)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"before")
    long_ago = time.time_ns() - 60 * 10**9
    os.utime(path, ns=(long_ago, long_ago))
    expected = safe_files.sha256(path)
    if large:
        monkeypatch.setattr(safe_files, "_hashes", {})
    reads: list[Any] = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: reads.append(arguments) or original(*arguments))
    assert safe_files.sha256(path) == expected
    assert reads == []
    assert safe_files.sha256(path, fresh=True) == expected
    assert len(reads) == 1
