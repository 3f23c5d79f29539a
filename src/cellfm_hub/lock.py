"""``cellfm.lock``: the hash of every file that was used, so that a later change is noticed (trust on first use).

One JSON file in the cache: model -> published path -> hash, size and where it came from. It may be copied to another machine, or kept with
a project; ``cellfm bundle`` puts the models' part of it into the archive.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cellfm_hub import safe_files
from cellfm_hub._settings import settings
from cellfm_hub.cards import PublishedPath, Sha256
from cellfm_hub.errors import CheckpointFormatError, ChecksumError

logger = logging.getLogger("cellfm_hub")


VERSION = 1
"""Of the layout of the file."""

MAX_BYTES = 2**24
"""Of the file: a hundred thousand entries."""


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

    version: int = VERSION
    models: dict[str, LockedModel] = Field(default_factory=dict)
    """Name, or ``name@revision`` where the user asked for another revision than the card's."""
    converted: dict[Sha256, LockedFile] = Field(default_factory=dict)
    """Hash of a published file -> the safetensors or JSON copy that was made of it."""


class _Version(BaseModel):
    """What can be read of a lock file of any version."""

    version: int = VERSION


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
        version = _Version.model_validate_json(content).version
        lock = Lock.model_validate_json(content) if version <= VERSION else None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        msg = f"{origin} is not a lock file of cellfm ({place}: {first['msg']}); restore it from a copy, or move it away: hashes are then"
        msg += " recorded anew, from the files as they are now"
        raise CheckpointFormatError(msg) from error
    if lock is None:
        msg = f"{origin} has version {version}, this cellfm-hub knows versions up to {VERSION}; it was written by a newer cellfm-hub,"
        msg += " install that one"
        raise CheckpointFormatError(msg)
    return lock


def read() -> Lock:
    """Read the lock file; an empty one where there is none."""
    try:
        with path().open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return Lock()
    except OSError as error:
        msg = f"{path()} cannot be read ({error.strerror}), so that no file can be compared with what was seen first; make it readable"
        raise CheckpointFormatError(msg) from error
    if len(content) > MAX_BYTES:
        msg = f"{path()} has more than {MAX_BYTES:,} bytes and is not a lock file of cellfm; restore it from a copy, or move it away"
        raise CheckpointFormatError(msg)
    return parse(content, str(path()))


def exclusive(name: str) -> AbstractContextManager[object]:
    """Let one process at a time do something with the cache."""
    from huggingface_hub.utils import WeakFileLock  # made for caches: falls back where the file system knows no locks

    folder = settings.cache_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(folder / f"{name}.lock")


def update(models: Mapping[str, LockedModel], converted: Mapping[str, LockedFile] | None = None, *, replace: bool = False) -> bool:
    """Add entries; those of the same model are merged.

    Parameters
    ----------
    models
        Name -> files that were used.
    converted
        Hash of a published file -> the copy that was made of it. A copy made anew takes the place of the old one.
    replace
        Something that knows better than the lock vouches for these files: the card, or the user's word. Only then another hash takes the
        place of a recorded one, and that is said.

    Returns
    -------
    Whether they are in the file now; a cache that cannot be written is no error.

    Raises
    ------
    ChecksumError
        If another hash is recorded for one of the files; nothing is then recorded.
    """
    try:
        before = read()
        if _merged(before, models, converted or {}, replace=replace) == before:
            return True
        with exclusive("cellfm-lock"):
            before = read()  # another process may have written meanwhile
            merged = _merged(before, models, converted or {}, replace=replace)
            _write(merged)
    except OSError:
        return False
    for name, published, old, new in _changed(before, models):
        logger.warning("%s: %s of %s was recorded with SHA-256 %s, from now on it is %s", path(), published, name, old, new)
    return True


def restore(model: str, entry: LockedModel | None) -> None:
    """Let the record of a model be what it was before; ``None``: there was none."""
    with exclusive("cellfm-lock"):
        lock = read()
        models = {name: other for name, other in lock.models.items() if name != model}
        _write(lock.model_copy(update={"models": models if entry is None else models | {model: entry}}))


def forget(model: str) -> None:
    """Drop what is recorded of a model, in all its revisions."""
    with exclusive("cellfm-lock"):
        lock = read()
        kept = {name: entry for name, entry in lock.models.items() if name != model and not name.startswith(f"{model}@")}
        _write(lock.model_copy(update={"models": kept}))


def _write(lock: Lock) -> None:
    safe_files.write_atomically(path(), (json.dumps(lock.model_dump(), indent=1, sort_keys=True) + "\n").encode())


def _changed(lock: Lock, models: Mapping[str, LockedModel]) -> list[tuple[str, str, str, str]]:
    """Return model, published path, recorded and new hash of the files that are recorded otherwise."""
    return [
        (name, published, lock.models[name].files[published].sha256, file.sha256)
        for name, model in models.items()
        for published, file in model.files.items()
        if name in lock.models and published in lock.models[name].files and lock.models[name].files[published].sha256 != file.sha256
    ]


def _merged(lock: Lock, models: Mapping[str, LockedModel], converted: Mapping[str, LockedFile], *, replace: bool) -> Lock:
    changed = _changed(lock, models)
    if changed and not replace:
        name, published, recorded, came = changed[0]
        msg = f"{published} of {name} came with SHA-256 {came}, but {path()} recorded {recorded} when it was first used."
        msg += (
            f" If the new file is the right one, 'cellfm cache --delete {name.partition('@')[0]}' forgets the old one, then bring it again"
        )
        raise ChecksumError(msg)
    out = dict(lock.models)
    for name, new in models.items():
        old = out.get(name, LockedModel())
        out[name] = LockedModel(licence=new.licence or old.licence, files={**old.files, **new.files})
    return lock.model_copy(update={"models": out, "converted": {**lock.converted, **converted}})
