"""Find the files of a checkpoint: in a folder, in a cache, or where they are published, and see that they are the right ones."""

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from cellfm_hub import downloads, lock, safe_files
from cellfm_hub._settings import settings
from cellfm_hub.downloads import DownloadError, Place
from cellfm_hub.errors import CheckpointError, ChecksumError, WeightsUnavailableError
from cellfm_hub.registry import Entry

logger = logging.getLogger("cellfm_hub")


def readable(size: int | None) -> str:
    """Write a size as people do."""
    if size is None:
        return "size not known"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


@dataclass
class CheckpointFiles:
    """The files of one checkpoint, by their published names.

    A name is meant below the folder of the weights (``config.json``) or else below the root of the published repository
    (``geneformer/token_dictionary_gc104M.pkl``).

    Parameters
    ----------
    entry
        The checkpoint.
    folder
        A folder in the published layout; nothing is looked for elsewhere, unless the adapter says so. ``None``: the cache, then the hub.
    revision
        Commit to use instead of the card's; the card's hashes then no longer apply.
    """

    entry: Entry
    folder: Path | None = None
    revision: str | None = None
    used: dict[str, Path] = field(default_factory=dict)
    """Every file that was opened, for the receipt."""

    def __post_init__(self) -> None:
        if self.revision is not None and self.entry.is_shipped:
            msg = f"revision={self.revision!r}: {self.entry.name} comes with the package, which has one version of it; leave revision out"
            raise CheckpointError(msg)
        if self.folder is not None:
            self.folder = Path(self.folder).expanduser()
            if not self.folder.is_dir():
                kind = "a file" if self.folder.is_file() else "missing"
                msg = f"checkpoint={str(self.folder)!r} is {kind}; expected a folder that holds the files of {self.entry.name} as published"
                raise WeightsUnavailableError(msg)

    def check_use(self) -> None:
        """Raise a :class:`CheckpointError` where ``settings.commercial`` is on and the licence is not known to allow that."""
        allowed = self.entry.checkpoint.commercial_use
        if settings.commercial and self.entry.checkpoint.source is not None and not allowed:
            why = "do not allow commercial use" if allowed is False else "are not known to allow commercial use"
            msg = f"the weights of {self.entry.name} are licensed {self.entry.licence} and {why}, which settings.commercial"
            msg += " (--commercial-ok) asks for; 'cellfm models --commercial' lists those that do, or ask the authors for a licence"
            raise CheckpointError(msg)

    @property
    def lock_name(self) -> str:
        """Name of the model in ``cellfm.lock``."""
        is_pinned = self.revision in (None, self.entry.checkpoint.revision)
        return self.entry.name if is_pinned else f"{self.entry.name}@{self.revision}"

    @property
    def origin(self) -> str:
        """Where the weights come from, in words."""
        source = self.entry.checkpoint.source
        if self.folder is not None or source is None:
            return str(self.folder or self.entry.name)
        if source.package is not None:
            return f"{self.entry.name} in the package {source.package}"
        revision = self.revision or self.entry.checkpoint.revision
        return f"{source.hub or source.url or self.entry.name}" + (f"@{revision}" if revision else "")

    @property
    def cache(self) -> Path:
        """Folder for files that a user brings by hand."""
        return settings.cache_dir / "models" / self.entry.name

    def find(self, *names: str) -> Path | None:
        """Return the first of the named files that the checkpoint has, or ``None``."""
        for name in names:
            path = self._in_folder(name) if self.folder is not None else self._published(name)
            if path is not None:
                self.used[name] = path
                return path
        return None

    def bring_all(self, *, again: bool = False) -> dict[str, Path]:
        """Bring every file that the card lists, and check it.

        Parameters
        ----------
        again
            Read every file again for its hash, whatever is remembered.
        """
        self.check_use()
        brought: dict[str, Path] = {}
        for published, file in self.entry.checkpoint.files.items():
            try:
                brought[published] = self._bring(published, again=again)
            except WeightsUnavailableError as error:
                if not file.optional:
                    raise
                logger.warning("%s: %s is left out, the model works without it (%s)", self.entry.name, published, str(error)[:200])
        return brought

    def at_hand(self) -> dict[str, Path]:
        """Return the published files that are on this machine, not checked."""
        found = {published: self._at_hand(published) for published in self.entry.checkpoint.files}
        return {published: path for published, path in found.items() if path is not None}

    def get(self, *names: str) -> Path:
        """Return the first of the named files.

        Raises
        ------
        WeightsUnavailableError
            Naming the file, and the ways to bring it.
        """
        path = self.find(*names)
        if path is None:
            held = sorted(p.name for p in self.folder.iterdir()) if self.folder else sorted(self.entry.checkpoint.files)
            msg = f"{self.origin} has no {' or '.join(names)}; it holds {', '.join(held[:8]) or 'nothing'}. A checkpoint of"
            msg += f" {self.entry.family} needs this file beside the others, under its published name"
            raise WeightsUnavailableError(msg)
        return path

    def get_cached(self, name: str) -> Path:
        """Return a file from the cache or the hub, even where a local folder is used for the weights."""
        path = self._published(name)
        if path is None:
            self._unavailable(name, "the card does not list it")
        self.used[name] = path
        return path

    def weights_sha256(self, weights: Path) -> str:
        """Return the hash of the weights as published; for a sharded file, that of the lines ``hash  name`` of its shards."""
        if weights.parent == converted_folder():
            return weights.stem
        if not weights.name.endswith(".index.json"):
            return safe_files.sha256(weights)
        shards = safe_files.shard_names(weights)
        lines = "".join(f"{safe_files.sha256(weights.parent / shard)}  {shard}\n" for shard in shards)
        return hashlib.sha256(lines.encode()).hexdigest()

    def _in_folder(self, name: str) -> Path | None:
        assert self.folder is not None
        source = self.entry.checkpoint.source
        # A copy of the whole repository, the folder of the weights, or (repository-level names only) that folder inside a copy.
        places = [self.folder / (source.folder if source else ""), self.folder]
        if "/" in name:
            places.append(self.folder.parent)
        return next((place / name for place in places if (place / name).is_file()), None)

    def _published(self, name: str) -> Path | None:
        checkpoint = self.entry.checkpoint
        source = checkpoint.source
        assert source is not None
        inside = f"{source.folder}/{name}" if source.folder else name
        published = next((path for path in (inside, name) if path in checkpoint.files), None)
        if published is None:
            return None
        path = self._bring(published)
        if name.endswith(".index.json"):
            for shard in safe_files.shard_names(path):
                self._published(shard)
        return self._converted(path) or path

    def _converted(self, path: Path) -> Path | None:
        """Return the copy of a published file that is quicker or simpler to read, if one was made, see :mod:`cellfm_hub.convert`."""
        folder = converted_folder()
        if path.suffix == ".safetensors" or not folder.is_dir():
            return None
        source = self.weights_sha256(path)
        known = lock.read().converted.get(source)
        for copy in (folder / f"{source}.safetensors", folder / f"{source}.json"):
            if known is not None and copy.is_file():
                if safe_files.sha256(copy) == known.sha256:
                    return copy
                logger.warning("%s has changed since it was made and is not used; 'cellfm convert %s' makes it anew", copy, self.entry.name)
        return None

    def _bring(self, published: str, *, again: bool = False) -> Path:
        if self.entry.is_shipped:
            return self._shipped(published, again=again)
        path = self._at_hand(published)
        if path is not None:
            self._show_licence()
            return self._verified(path, published, again=again)
        if (archive := self.entry.checkpoint.files[published].archive) is not None:
            safe_files.extract(self._bring(archive), published, self.cache / published)
            return self._verified(self.cache / published, published, origin=f"{archive} of {self.origin}")
        return self._fetch(published)

    def _shipped(self, published: str, *, again: bool = False) -> Path:
        """Return a file that is installed with a package, the file of the card and no other."""
        source = self.entry.checkpoint.source
        assert source is not None
        assert source.package is not None
        path = _installed(source.package, published)
        expected = self.entry.checkpoint.files[published].sha256
        got = safe_files.sha256(path, fresh=again) if path is not None else "missing"
        if path is None or got != expected:
            msg = f"{published} of {self.entry.name}, which the package {source.package} ships, is {got}, expected SHA-256 {expected};"
            msg += f" the installation is damaged, reinstall {self.entry.card.owner}"
            raise ChecksumError(msg)
        return path

    def _fetch(self, published: str) -> Path:
        """Try one place after the other."""
        source, checkpoint = self.entry.checkpoint.source, self.entry.checkpoint
        assert source is not None
        places = downloads.places(checkpoint, published, self.revision)
        if not places and source.hub is not None:
            self._unavailable(published, "the card knows no revision to pin; pass revision='<commit>' once you have seen it on the hub")
        if not places:
            self._unavailable(published, f"it is published at {source.url}, a place that gives files to people but not to programs")
        if settings.offline:
            self._unavailable(published, "offline mode is on")
        self._show_licence()
        reasons: list[str] = []
        rejected: ChecksumError | None = None
        for place in places:
            try:
                path = self._fetch_from(place, published)
                return self._verified(path, published, origin=str(place))
            except DownloadError as error:
                reasons.append(str(error) if len(places) == 1 else f"{place.hub or place.path}: {error}")
            except ChecksumError as error:
                rejected = error
                reasons.append(str(error))
            if place is not places[-1]:
                logger.warning("%s: %s; trying the next place", self.entry.name, reasons[-1])
        if rejected is None:
            self._unavailable(published, "; ".join(reasons))
        raise rejected

    def _fetch_from(self, place: Place, published: str) -> Path:
        if place.hub is not None:
            return downloads.fetch_from_hub(place)
        target = self.cache / published
        try:
            with lock.exclusive(hashlib.sha256(str(target).encode()).hexdigest()[:16]):
                if not target.is_file():  # another process may have brought it meanwhile
                    downloads.fetch_from_url(place.path, target)
        except OSError as error:
            msg = f"{settings.cache_dir} cannot be written ({error.strerror}); set CELLFM_CACHE to a folder of yours"
            raise DownloadError(msg) from error
        return target

    def _at_hand(self, published: str) -> Path | None:
        """Return a file that was brought before, without touching the network."""
        if (source := self.entry.checkpoint.source) is not None and source.package is not None:
            return _installed(source.package, published)
        by_hand = self.cache / published
        if by_hand.is_file() and (self.lock_name == self.entry.name or self._is_elsewhere(published)):
            return by_hand
        places = downloads.places(self.entry.checkpoint, published, self.revision)
        return next((path for path in map(downloads.in_hub_cache, places) if path is not None), None)

    def _show_licence(self) -> None:
        """Say once per machine under which licence the weights are."""
        licence, name = self.entry.licence, self.lock_name
        if name in _licences_shown or (name in (models := lock.read().models) and models[name].licence == licence):
            return
        _licences_shown.add(name)
        allowed = self.entry.checkpoint.commercial_use
        use = "commercial use is allowed" if allowed else "not for commercial use" if allowed is False else "commercial use: not known"
        link = self.entry.card.license_link
        logger.warning("%s: the weights are licensed %s (%s)%s", self.entry.name, licence, use, f", see {link}" if link else "")
        lock.update({name: lock.LockedModel(licence=licence)})

    def _verified(self, path: Path, published: str, *, origin: str | None = None, again: bool = False) -> Path:
        """Compare a file with the card, else with what was seen first; write down what was seen.

        Raises
        ------
        ChecksumError
            If it is another; the file is then kept under another name.
        """
        file = self.entry.checkpoint.files[published]
        by_card = self.lock_name == self.entry.name or self._is_elsewhere(published)
        size, got = path.stat().st_size, safe_files.sha256(path, fresh=again)
        seen = lock.read().models.get(self.lock_name, lock.LockedModel()).files.get(published)
        expected = file.sha256 if by_card else None
        if expected is None and seen is not None:
            expected = seen.sha256
        expected_size = (file.size if by_card else None) or (seen.size if seen else None)
        problem = None
        if expected is not None and got != expected:
            problem = f"SHA-256 {got}, expected {expected}"
            if expected != file.sha256:
                problem += f" as {lock.path()} recorded when it was first used"
        elif expected is None and expected_size is not None and size != expected_size:
            problem = f"{size:,} bytes, expected {expected_size:,}"
        elif expected is None and safe_files.stand_in(path) is not None:
            problem = f"{size:,} bytes"
        if problem is not None:
            reason = safe_files.damage(path, expected_size) or "it was changed or damaged, or is another version"
            aside = downloads.set_aside(path, got)
            kept = f"it is now {aside}" if aside else "it was left where it is, move it away"
            msg = f"{path} is not the published file of {self.entry.name}: {problem}; probably {reason}. Nothing was deleted, {kept};"
            msg += f" fetch it again with 'cellfm pull {self.entry.name}'"
            raise ChecksumError(msg)
        if seen is None or seen.sha256 != got or origin is not None:
            known = origin or (seen.origin if seen else self._origin_of(path, published))
            entry = lock.LockedFile(sha256=got, size=size, origin=known)
            lock.update({self.lock_name: lock.LockedModel(files={published: entry})}, replace=by_card and file.sha256 == got)
        return path

    def _is_elsewhere(self, published: str) -> bool:
        """Say whether a file is not in the hub repository, so that a revision of the user's says nothing about it."""
        file = self.entry.checkpoint.files[published]
        return file.url is not None or file.archive is not None

    def _origin_of(self, path: Path, published: str) -> str:
        """Say where a file came from that was here before it was first used."""
        places = downloads.places(self.entry.checkpoint, published, self.revision)
        return next((str(place) for place in places if downloads.in_hub_cache(place) == path), "put into the cache by hand")

    def _unavailable(self, published: str, reason: str) -> NoReturn:
        name, files, source = self.entry.name, self.entry.checkpoint.files, self.entry.checkpoint.source
        here = self.at_hand()
        missing = [published, *(path for path in files if path not in here and path != published)]
        listed = ", ".join(f"{path} ({readable(files[path].size if path in files else None)})" for path in missing)
        by_hand = f"download by hand from {source.url} and " if source is not None and source.url else ""
        msg = (
            f"{published} of {name} ({self.origin}) is not on this machine: {reason}. Missing: {listed}. Bring them in one of three ways:"
            f" with internet 'cellfm pull {name}'; from a machine that has them 'cellfm bundle {name} -o models.tar', here 'cellfm unbundle"
            f" models.tar'; or {by_hand}'cellfm add {name} FOLDER', which looks for these names (the first belongs at"
            f" {self.cache / published}); checkpoint='FOLDER' uses a folder without registering it"
        )
        raise WeightsUnavailableError(msg)


def _installed(package: str, published: str) -> Path | None:
    """Return a file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    places = (Path(place) / published for place in (spec.submodule_search_locations or [])) if spec else ()
    return next((path for path in places if path.is_file()), None)


_licences_shown: set[str] = set()
"""In this process, for caches that cannot be written."""


def converted_folder() -> Path:
    """Return where copies in safe formats are kept, named by the hash of what they were made from."""
    return settings.cache_dir / "converted"


WEIGHT_FILES: Sequence[str] = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names under which Hugging Face checkpoints keep their weights, the safest first."""

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".torch"})
"""What the name of a file of tensors ends in."""
