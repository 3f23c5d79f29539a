"""``cellfm.lock``: the hash of every file that was used, so that a later change is noticed (trust on first use).

One JSON file in the cache: model -> published path -> hash, size and where it came from. It may be copied to another machine, or kept with
a project; ``cellfm bundle`` puts the models' part of it into the archive.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cellfm_hub import safe_files
from cellfm_hub._settings import settings
from cellfm_hub.cards import PublishedPath, Sha256
from cellfm_hub.errors import CheckpointFormatError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LockedFile(_Strict):
    """One file as it was when it was first used."""

    sha256: Sha256
    size: int
    origin: str
    """Address, or the words of how it came."""


class LockedModel(_Strict):
    """The files of one checkpoint."""

    licence: str | None = None
    """The licence that was shown to the user."""
    files: dict[PublishedPath, LockedFile] = Field(default_factory=dict)


class Lock(_Strict):
    """The whole file."""

    version: int = 1
    models: dict[str, LockedModel] = Field(default_factory=dict)
    """Name, or ``name@revision`` where the user asked for another revision than the card's."""
    converted: dict[Sha256, LockedFile] = Field(default_factory=dict)
    """Hash of a published file -> the safetensors or JSON copy that was made of it."""


NAME = "cellfm.lock"


def path() -> Path:
    """Return where the lock file is."""
    return settings.cache_dir / NAME


def parse(content: bytes, origin: str) -> Lock:
    """Read the contents of a lock file.

    Raises
    ------
    CheckpointFormatError
        If they are none.
    """
    try:
        return Lock.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        msg = f"{origin} is not a lock file of cellfm ({place}: {first['msg']}); move it away, hashes are then recorded anew"
        raise CheckpointFormatError(msg) from error


def read() -> Lock:
    """Read the lock file; an empty one where there is none."""
    try:
        content = path().read_bytes()
    except FileNotFoundError:
        return Lock()
    return parse(content, str(path()))


def exclusive(name: str) -> AbstractContextManager[object]:
    """Let one process at a time do something with the cache."""
    from huggingface_hub.utils import WeakFileLock  # made for caches: falls back where the file system knows no locks

    folder = settings.cache_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(folder / f"{name}.lock")


def update(models: Mapping[str, LockedModel], converted: Mapping[str, LockedFile] | None = None) -> bool:
    """Add entries; those of the same model are merged, newer ones win.

    Returns
    -------
    Whether they are in the file now; a cache that cannot be written is no error.
    """
    try:
        if _merged(read(), models, converted or {}) == read():
            return True
        with exclusive("cellfm-lock"):
            merged = _merged(read(), models, converted or {})
            safe_files.write_atomically(path(), (json.dumps(merged.model_dump(), indent=1, sort_keys=True) + "\n").encode())
    except OSError:
        return False
    return True


def forget(model: str) -> None:
    """Drop what is recorded of a model."""
    with exclusive("cellfm-lock"):
        lock = read()
        kept = {name: entry for name, entry in lock.models.items() if name != model and not name.startswith(f"{model}@")}
        content = lock.model_copy(update={"models": kept}).model_dump()
        safe_files.write_atomically(path(), (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def _merged(lock: Lock, models: Mapping[str, LockedModel], converted: Mapping[str, LockedFile]) -> Lock:
    out = dict(lock.models)
    for name, new in models.items():
        old = out.get(name, LockedModel())
        out[name] = LockedModel(licence=new.licence or old.licence, files={**old.files, **new.files})
    return lock.model_copy(update={"models": out, "converted": {**lock.converted, **converted}})
