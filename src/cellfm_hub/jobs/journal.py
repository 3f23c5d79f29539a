"""The folder in which a run keeps what is finished: parts, and the journal that says which of them count.

::

    .atlas.zarr.cellfm/      beside the result; the shard 2 of 8 of it is atlas.zarr.shard-2-of-8/
        lock                 held while a process works here
        journal.jsonl        first line: what the run is; then a line for every finished part
        part-000012.npz      rows of one part: vectors of every model, names, hashes of the contents

A part is written under another name, brought to the disk, renamed, and then noted in the journal. So a line in the journal means a whole
part; a line cut short by a crash means nothing, and its part is computed again.
"""

import json
import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from cellfm_hub.errors import OutputError, cannot_write
from cellfm_hub.jobs.durable import sync, sync_folder

NAME = "journal.jsonl"

_OURS = re.compile(
    r"lock|journal\.jsonl"
    r"|(redo\.npz|part-\d{6}\.(npz|parquet)|fitted-\d+\.npz|known-(content-|rows-)?\d+\.npy)(\.\d+\.tmp)?"
    r"|(result|replaced)(\.(h5ad|zarr|parquet|npy|ids\.txt|receipt\.json|rows\.npz|qc\.parquet))?"
)
"""Names of all that is ever put into a work folder; what else is there is somebody else's and is left alone."""


@dataclass(frozen=True)
class Part:
    """A finished part, or the vectors of a model that is fitted to all rows."""

    number: int
    """Its place among those of the run, from 0; a shard counts its own."""
    file: str
    sha256: str
    rows: int
    content: str
    """Hash of the rows it was made from."""
    tallies: list[dict[str, Any]]
    """What happened to its rows, for every model in turn."""
    widths: list[int]
    """Of the vectors of every model."""
    precisions: list[str]
    """What each model computed in."""


@dataclass
class Journal:
    """An open work folder. Use it as a context: that holds the lock."""

    folder: Path
    header: dict[str, Any] | None = None
    """What the run is; ``None`` for a folder that is new."""
    parts: dict[int, Part] = field(default_factory=dict)
    fitted: dict[int, Part] = field(default_factory=dict)
    """By the place of the model."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else was noted: ``total`` parts, once that is known; that the input is ``broken`` and may be mended; that the parts are still to
    be compared (``compare``) with the input that took its place; that a shard is ``complete``; that the result is being written
    (``writing``); which shards are ``merged`` and may go."""

    def __post_init__(self) -> None:
        self._lock = FileLock(self.folder / "lock", timeout=0)

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(exist_ok=True)
            self._refuse_foreign()
            self._lock.acquire()
        except Timeout as error:
            msg = f"{self.folder} is in use: another process writes the same result; wait for it, or choose another name with -o"
            raise OutputError(msg) from error
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if not (self.parts or self.fitted or self.facts.get("writing") or self.facts.get("complete")):
            self.remove()  # nothing to keep

    @property
    def rows(self) -> int:
        """Rows that are finished."""
        return sum(part.rows for part in self.parts.values())

    def begin(self, header: dict[str, Any], *, keep: Collection[str] = ()) -> None:
        """Start anew; of our files in the folder only those to `keep` stay."""
        for path in self._ours():
            if path.name not in ("lock", *keep):
                _remove(path)
        self.header, self.parts, self.fitted, self.facts = header, {}, {}, {}
        self._append({"run": header})
        sync_folder(self.folder)

    def add(self, part: Part) -> None:
        """Note a finished part."""
        self._append({"part": asdict(part)})
        self.parts[part.number] = part

    def add_fitted(self, part: Part) -> None:
        """Note the vectors of a model that is fitted to all rows."""
        self._append({"fitted": asdict(part)})
        self.fitted[part.number] = part

    def note(self, **facts: Any) -> None:
        """Note something else."""
        self._append({"facts": facts})
        self.facts |= facts

    def amend(self, **changes: Any) -> None:
        """Change what the run is."""
        assert self.header is not None
        self._append({"amend": changes})
        self.header |= changes

    def drop(self, part: Part) -> None:
        """Forget a part, to compute it again, or because the data end before it."""
        self._append({"drop": part.number})
        self.parts.pop(part.number, None)

    def drop_behind(self, total: int) -> None:
        """Forget the parts behind the end of data that have `total` of them."""
        for number in [number for number in self.parts if number >= total]:
            self.drop(self.parts[number])

    def drop_fitted(self, part: Part) -> None:
        """Forget the vectors of a model that is fitted to all rows, to compute them again."""
        self._append({"drop_fitted": part.number})
        self.fitted.pop(part.number, None)

    def remove(self) -> None:
        """Remove what is ours in the folder, the journal first: without it the rest means nothing; and the folder, if it is then empty."""
        with suppress(OSError):  # what cannot be removed stays, and the next run begins anew
            (self.folder / NAME).unlink(missing_ok=True)
            for path in self._ours():
                _remove(path)
            self.folder.rmdir()

    def _ours(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name)]

    def _refuse_foreign(self) -> None:
        """See that the folder is one of ours, or empty."""
        foreign = sorted(path.name for path in self.folder.iterdir() if not _OURS.fullmatch(path.name))
        if foreign and not (self.folder / NAME).exists():
            msg = f"{self.folder} is where finished rows would be kept, but is a folder of something else (with {foreign[0]!r});"
            msg += " move it away, or choose another name with -o"
            raise OutputError(msg)

    def _append(self, line: dict[str, Any]) -> None:
        with (self.folder / NAME).open("ab") as file:
            begin = file.tell()
            try:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                sync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), begin)
                raise

    def _read(self) -> None:
        path = self.folder / NAME
        if not path.exists():
            return
        content, good = path.read_bytes(), 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                self._apply(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # damaged: what follows may rest on it
                break
            good += len(line)
        if good < len(content):  # cut short by a crash: what follows must begin on a line of its own
            os.truncate(path, good)

    def _apply(self, entry: dict[str, Any]) -> None:
        (kind, value), *_ = entry.items()
        if kind == "run":
            self.header = value
        elif kind in ("part", "fitted"):
            part = Part(**value)
            if not _OURS.fullmatch(part.file):
                msg = f"{part.file!r} is no file of a work folder"
                raise ValueError(msg)
            (self.parts if kind == "part" else self.fitted)[part.number] = part
        elif kind == "amend" and self.header is not None:
            self.header |= value
        elif kind == "drop":
            self.parts.pop(value, None)
        elif kind == "drop_fitted":
            self.fitted.pop(value, None)
        else:
            self.facts |= value


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def work_folder(out: Path, shard: tuple[int, int] | None = None) -> Path:
    """Return where a run that makes `out` keeps its parts; a shard's stay there until they are merged."""
    if shard is None:
        return out.with_name(f".{out.name}.cellfm")
    return out.with_name(f"{out.name}.shard-{shard[0]}-of-{shard[1]}")
