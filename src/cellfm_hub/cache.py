"""Models on this machine: register downloaded files, carry models to another machine, list and remove what is there."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellfm_hub import lock, safe_files
from cellfm_hub._settings import settings
from cellfm_hub.checkpoints import WEIGHT_SUFFIXES, CheckpointFiles, converted_folder, readable
from cellfm_hub.errors import CheckpointError, ChecksumError, InputError, OutputError, WeightsUnavailableError
from cellfm_hub.registry import Entry, registry

# Add


def add(model: str, folder: Path, *, link: bool = False) -> list[Path]:
    """Check a folder of files that were downloaded by hand, and register it.

    Names, hashes and sizes are compared with the card, and the model is loaded from the folder once, so that every tensor's shape is
    checked. Nothing is registered before all of it fits.

    Parameters
    ----------
    model
        The exact checkpoint, or a family for its default.
    folder
        Holds the published files: in the published layout, or side by side.
    link
        Refer to the files where they are (a shared folder that stays) instead of keeping them in the cache.

    Returns
    -------
    The files in the cache.

    Raises
    ------
    WeightsUnavailableError
        If files are missing.
    ChecksumError
        If a file is another than the published one.
    """
    entry = registry().find(model)
    files = CheckpointFiles(entry, Path(folder))
    assert files.folder is not None
    found = _find_all(entry, files.folder)
    target = CheckpointFiles(entry)
    before = lock.read().models.get(entry.name)
    seen = (before or lock.LockedModel()).files
    for published, path in found.items():
        _compare(entry, published, path, seen.get(published))
        _refuse_another(target.cache / published, safe_files.sha256(path), str(path))
    from cellfm_hub.api import load

    placed: list[Path] = []
    try:
        for published, path in found.items():
            place = target.cache / published
            if not place.exists():
                _put(path, place, link=link)
                placed.append(place)
        with settings.override(offline=True, convert=False):
            load(entry.name, device="cpu", precision="float32")
    except BaseException:
        for place in placed:  # our own copies, made a moment ago
            place.unlink(missing_ok=True)
        lock.restore(entry.name, before)
        raise
    for published, path in found.items():
        _record(entry, published, lock.LockedFile(sha256=safe_files.sha256(path), size=path.stat().st_size, origin=f"added from {path}"))
    return [target.cache / published for published in found]


def _refuse_another(place: Path, sha256: str, origin: str) -> None:
    """Raise if there is another file at the place already: what the user has is neither overwritten nor taken for the new one."""
    if place.is_file() and (got := safe_files.sha256(place)) != sha256:
        msg = f"{place} is here already, with SHA-256 {got}, another than {sha256} in {origin}; move it away to take the new one"
        raise ChecksumError(msg)


def _record(entry: Entry, published: str, file: lock.LockedFile) -> None:
    """Write down a file that was compared with the card, else with the lock."""
    lock.update({entry.name: lock.LockedModel(files={published: file})}, replace=entry.checkpoint.files[published].sha256 is not None)


def _find_all(entry: Entry, folder: Path) -> dict[str, Path]:
    """Find the published files in a folder; those that are in the cache already need not be there."""
    source, files = entry.checkpoint.source, entry.checkpoint.files
    if source is None or entry.is_shipped:
        why = "comes with the package" if source is not None else "has no weights"
        msg = f"{entry.name} {why}; there is nothing to add"
        raise InputError(msg)
    found: dict[str, Path] = {}
    missing: list[str] = []
    here = CheckpointFiles(entry).at_hand()
    for published, file in files.items():
        inside = published.removeprefix(f"{source.folder}/") if source.folder else published
        names = (published, inside, published.rpartition("/")[2], inside.rpartition("/")[2])
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is not None:
            found[published] = path
        elif published not in here and file.archive is None and not file.optional:
            missing.append(f"{published} ({readable(file.size)})")
    # A member of an archive that is there needs no file of its own; the archive of members that are all there is not needed either.
    needless = {
        path for path in files if (m := [n for n, f in files.items() if f.archive == path]) and all(n in found or n in here for n in m)
    }
    missing = [text for text in missing if text.rpartition(" (")[0] not in needless]
    if missing:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        where = f" They are published at {source.url}." if source.url else ""
        msg = f"{folder} lacks {', '.join(missing)} of {entry.name}; it holds {held}.{where}"
        msg += " Put them there under these names, then add it again"
        raise WeightsUnavailableError(msg)
    return found


def _compare(entry: Entry, published: str, path: Path, seen: lock.LockedFile | None) -> None:
    """Raise if a file is not the one that the card, or else the lock, knows."""
    file = entry.checkpoint.files[published]
    size, got = path.stat().st_size, safe_files.sha256(path)
    expected = file.sha256 or (seen.sha256 if seen else None)
    problem: str | None
    if expected is not None and got != expected:
        problem = f"SHA-256 {got}, expected {expected}"
    elif expected is None and file.size is not None and file.size != size:
        problem = f"{size:,} bytes, expected {file.size:,}"
    else:
        problem = f"{size:,} bytes" if expected is None and safe_files.stand_in(path) else None
    if problem is not None:
        reason = safe_files.damage(path, file.size) or "it is another version, or of another model"
        msg = f"{path} is not {published} of {entry.name}: {problem}; probably {reason}. Nothing was registered"
        raise ChecksumError(msg)


def _put(path: Path, place: Path, *, link: bool) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if link:
            place.symlink_to(path.resolve())
            return
        part = place.with_name(f".{place.name}.{os.getpid()}.part")
        try:
            shutil.copyfile(path, part)
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        msg = (
            f"{place} cannot be written ({error.strerror}); set CELLFM_CACHE to a folder of yours with {readable(path.stat().st_size)} free"
        )
        raise OutputError(msg) from error


# Bundle


def bundle(models: Sequence[str], out: Path) -> int:
    """Write models with all their files into one tar archive, for a machine without internet.

    Parameters
    ----------
    models
        Checkpoints or families; their files must be here.
    out
        The archive; it must not exist.

    Returns
    -------
    Its bytes.

    Raises
    ------
    WeightsUnavailableError
        If a file is not here.
    """
    if out.exists():
        msg = f"{out} exists; give another name or move it away"
        raise OutputError(msg)
    entries = list({(entry := registry().find(model)).name: entry for model in models}.values())
    members: dict[str, Path] = {}
    for entry in entries:
        if entry.checkpoint.source is None or entry.is_shipped:
            why = "comes with the package" if entry.is_shipped else "has no weights"
            msg = f"{entry.name} {why} and works everywhere; leave it out"
            raise InputError(msg)
        files = CheckpointFiles(entry)
        with settings.override(offline=True):
            members |= {f"models/{entry.name}/{published}": path for published, path in files.bring_all().items()}
    recorded = lock.read()
    part_of_lock = lock.Lock(
        models={
            entry.name: lock.LockedModel(
                files={path: file for path, file in recorded.models[entry.name].files.items() if f"models/{entry.name}/{path}" in members}
            )
            for entry in entries
        }
    )
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with tarfile.open(part, "w") as tar:
            content = (json.dumps(part_of_lock.model_dump(), indent=1, sort_keys=True) + "\n").encode()
            header = tarfile.TarInfo(lock.NAME)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
            for name, path in members.items():
                with path.open("rb") as file:  # contents, where the cache has links
                    header = tarfile.TarInfo(name)
                    header.size = path.stat().st_size
                    tar.addfile(header, file)
        part.replace(out)
    except OSError as error:
        msg = f"{out} cannot be written ({error.strerror}); it needs {readable(sum(path.stat().st_size for path in members.values()))}"
        raise OutputError(msg) from error
    finally:
        part.unlink(missing_ok=True)
    return out.stat().st_size


def unbundle(archive: Path) -> list[str]:
    """Unpack an archive made by :func:`bundle` into the cache. What is there already is left as it is.

    Every file is compared with the card, with the lock inside the archive and with the lock of this machine before it gets its name. The
    lock inside the archive is a claim: only what was unpacked is recorded, and nothing that contradicts what is known here.

    Returns
    -------
    The models of which files were unpacked.

    Raises
    ------
    CheckpointError
        If the archive is damaged or not one of ours.
    ChecksumError
        If a file is not what it is said to be.
    """
    if not archive.is_file():
        what = "is not a file" if archive.exists() else "does not exist"
        msg = f"{archive} {what}; expected an archive made by 'cellfm bundle'"
        raise InputError(msg)
    with safe_files.Archive(archive) as tar:
        claims = _claims(tar, archive)
        for claim in claims:
            _check_claim(claim, tar, archive)
        for claim in claims:
            if claim.member in tar.members:
                _unpack(tar, claim, archive)
        return list(dict.fromkeys(claim.entry.name for claim in claims if claim.member in tar.members))


@dataclass(frozen=True)
class _Claim:
    """What the lock inside an archive says of one file."""

    entry: Entry
    published: str
    file: lock.LockedFile

    @property
    def member(self) -> str:
        return f"models/{self.entry.name}/{self.published}"


def _claims(tar: safe_files.Archive, archive: Path) -> list[_Claim]:
    """Read the lock inside an archive; raise unless it and the cards of this machine know every file."""
    if lock.NAME not in tar.members or tar.members[lock.NAME][1] > lock.MAX_BYTES:
        msg = f"{archive} has no {lock.NAME}; expected an archive made by 'cellfm bundle'"
        raise CheckpointError(msg)
    models = lock.parse(tar.read(lock.NAME, lock.MAX_BYTES), f"{lock.NAME} in {archive}").models
    checkpoints = registry().checkpoints
    if unknown := [name for name in models if name not in checkpoints or checkpoints[name].is_shipped]:
        msg = f"{archive} holds models that no card describes here ({', '.join(sorted(unknown)[:5])}); nothing was unpacked. Install the"
        msg += " package that adds them, or make it with the same version of cellfm-hub"
        raise CheckpointError(msg)
    claims = [_Claim(checkpoints[name], path, file) for name, model in models.items() for path, file in model.files.items()]
    stray = tar.members.keys() - {claim.member for claim in claims} - {lock.NAME}
    unlisted = [claim.member for claim in claims if claim.published not in claim.entry.checkpoint.files]
    if stray or unlisted:
        msg = f"{archive} holds files that no model card lists ({', '.join(sorted([*stray, *unlisted])[:5])}); nothing was unpacked."
        msg += " Make it with the same version of cellfm-hub"
        raise CheckpointError(msg)
    if lacking := [name for name in models if not any(c.member in tar.members for c in claims if c.entry.name == name)]:
        msg = f"{archive} names {', '.join(sorted(lacking)[:5])} but holds no file of it; nothing was unpacked or recorded. Carry the whole"
        msg += " archive over, or make it again with 'cellfm bundle'"
        raise CheckpointError(msg)
    return claims


def _check_claim(claim: _Claim, tar: safe_files.Archive, archive: Path) -> None:
    """Raise if the card or the lock of this machine says otherwise, or if the archive contradicts itself."""
    published, name, claimed = claim.published, claim.entry.name, claim.file
    by_card = claim.entry.checkpoint.files[published].sha256
    seen = lock.read().models.get(name, lock.LockedModel()).files.get(published)
    expected = by_card or (seen.sha256 if seen else None)
    if expected is not None and expected != claimed.sha256:
        where = "the model card lists" if by_card else f"{lock.path()} recorded"
        msg = f"{archive} says that {published} of {name} has SHA-256 {claimed.sha256}, but {where} {expected}; nothing was unpacked."
        msg += f" Make the archive again; if its file is the right one, 'cellfm cache --delete {name}' first forgets the other"
        raise ChecksumError(msg)
    if claim.member in tar.members and tar.members[claim.member][1] != claimed.size:
        msg = (
            f"{archive}: {claim.member} has {tar.members[claim.member][1]:,} bytes, its lock says {claimed.size:,}; make the archive again"
        )
        raise ChecksumError(msg)


def _unpack(tar: safe_files.Archive, claim: _Claim, archive: Path) -> None:
    """Unpack one file and record it, or leave the same one that is here."""
    entry, published, file = claim.entry, claim.published, claim.file
    place = CheckpointFiles(entry).cache / published
    unchecked = place.with_name(f".{place.name}.unchecked")
    try:
        # Where an earlier attempt was killed, its half file is overwritten.
        with lock.exclusive(hashlib.sha256(str(place).encode()).hexdigest()[:16]):
            _refuse_another(place, file.sha256, str(archive))
            if not place.is_file():
                try:
                    tar.unpack(claim.member, unchecked)
                    if safe_files.sha256(unchecked, fresh=True) != file.sha256:
                        msg = (
                            f"{archive}: {claim.member} is not what its lock says; the archive was damaged on its way, carry it over again"
                        )
                        raise ChecksumError(msg)
                    _compare(entry, published, unchecked, None)
                    unchecked.replace(place)
                finally:
                    unchecked.unlink(missing_ok=True)
            _record(entry, published, file)
    except OSError as error:
        msg = f"{place} cannot be written ({error.strerror}); set CELLFM_CACHE to a folder of yours with {readable(file.size)} free"
        raise OutputError(msg) from error


# List and remove


@dataclass(frozen=True)
class Cached:
    """What is here of one model."""

    name: str
    files: int
    of: int
    """Files that the card lists."""
    size: int
    """Bytes on this disk, copies in other formats and rejected files included."""
    origins: tuple[str, ...]
    folders: tuple[str, ...]


def listing() -> list[Cached]:
    """List the models of which files are here."""
    recorded = lock.read().models
    out = []
    for name, entry in registry().checkpoints.items():
        if entry.checkpoint.source is None or entry.is_shipped:
            continue
        here = CheckpointFiles(entry).at_hand()
        everything = _belongings(entry, here)
        if not everything:
            continue
        seen = recorded.get(name, lock.LockedModel()).files
        origins = {_place(seen[path].origin) if path in seen else "not used yet" for path in here}
        folders = {str(path.parent) for path in everything}
        size = sum(path.stat().st_size for path in everything)
        out.append(Cached(name, len(here), len(entry.checkpoint.files), size, tuple(sorted(origins)), tuple(sorted(folders))))
    return out


def _place(origin: str) -> str:
    """Shorten the origin of a file to that of all files that came from there."""
    return origin.rpartition(" of ")[2] if " of " in origin else origin.rpartition("/")[0] or origin


def _belongings(entry: Entry, here: dict[str, Path]) -> list[Path]:
    """Return every file of a model: published ones, rejected ones, broken downloads, converted copies."""
    folder = CheckpointFiles(entry).cache
    own = {path for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else set()
    rejected = {aside for path in here.values() for aside in path.parent.glob(f"{path.name}.rejected-*")}
    return sorted({*here.values(), *own, *rejected, *_copies(entry)})


def _copies(entry: Entry) -> Iterable[Path]:
    seen = lock.read().models.get(entry.name, lock.LockedModel()).files.values()
    sources = {file.sha256 for file in seen}
    sources |= {source for source, copy in lock.read().converted.items() if copy.origin == entry.name}
    folder = converted_folder()
    return [path for source in sources for path in (folder / f"{source}.safetensors", folder / f"{source}.json") if path.is_file()]


def remove(model: str) -> list[Path]:
    """Delete the files of one model; those that another model here needs too are kept.

    Returns
    -------
    What was deleted.
    """
    entry = registry().find(model)
    if entry.is_shipped:
        msg = f"{entry.name} comes with the package, not from the cache; it goes when {entry.card.owner} is uninstalled"
        raise InputError(msg)
    kept: set[Path] = set()
    for name, other in registry().checkpoints.items():
        if name != entry.name and other.checkpoint.source is not None:
            theirs = CheckpointFiles(other).at_hand()
            if any(Path(path).suffix in WEIGHT_SUFFIXES for path in theirs):  # not just the files it shares with this one
                kept |= {path.resolve() for path in _belongings(other, theirs)}
    gone = []
    for path in _belongings(entry, CheckpointFiles(entry).at_hand()):
        if path.resolve() in kept:
            continue
        _delete(path)
        gone.append(path)
    if not gone:
        msg = f"nothing of {entry.name} is in {settings.cache_dir} or the hub's cache; 'cellfm cache' lists what is there"
        raise InputError(msg)
    lock.forget(entry.name)
    return gone


def _delete(path: Path) -> None:
    """Delete a file; in the hub's cache its contents too, unless another name there needs them."""
    if path.is_symlink() and "snapshots" in path.parts:
        blob = path.resolve()
        repository = next(parent for parent in path.parents if parent.name == "snapshots").parent
        path.unlink()
        if blob.is_relative_to(repository.resolve()) and not any(
            other.is_symlink() and other.resolve() == blob for other in repository.glob("snapshots/**/*")
        ):
            blob.unlink()
        return
    path.unlink()
