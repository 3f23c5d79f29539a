"""Bring one published file to this machine: from the Hugging Face hub, or from a plain server."""

import errno
import functools
import os
import shutil
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote, urlsplit

from cellfm_hub._settings import settings
from cellfm_hub.cards import Checkpoint

if TYPE_CHECKING:
    import requests

ATTEMPTS = 3
"""How often a broken connection is taken up again without any progress."""
TIMEOUT = (10.0, 60.0)
"""Seconds to wait for a connection, and for the next bytes."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DownloadError(Exception):
    """A place does not give the file; the message says why, in a few words."""


@dataclass(frozen=True)
class Place:
    """Where one file can be fetched."""

    path: str
    """On the hub the path in the repository, else the whole address."""
    hub: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path} of {self.hub}@{self.revision}" if self.hub else self.path


def places(checkpoint: Checkpoint, published: str, revision: str | None) -> list[Place]:
    """List where a file can be fetched, in the order in which to try.

    Parameters
    ----------
    checkpoint
        Its entry in the card.
    published
        The file.
    revision
        The user's choice; then only the repository itself has it.
    """
    source, file = checkpoint.source, checkpoint.files[published]
    if source is None or file.archive is not None:
        return []
    if file.url is not None:
        found = [Place(file.url)]
    else:
        pinned = revision or file.revision or checkpoint.revision
        found = [Place(published, source.hub, pinned)] if source.hub and pinned else []
    if revision is not None:
        return found
    for mirror in source.mirrors:
        there = mirror.names.get(published) if mirror.names else published
        if there is None:
            continue
        if mirror.hub is not None:
            found.append(Place(there, mirror.hub, mirror.revision))
        elif mirror.url is not None:
            found.append(Place(f"{mirror.url.rstrip('/')}/{quote(there)}"))
    return found


def in_hub_cache(place: Place) -> Path | None:
    """Return the file if it is in the hub's cache, without touching the network."""
    if place.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(place.hub, place.path, revision=place.revision)
    return Path(cached) if isinstance(cached, str) else None


def fetch_from_hub(place: Place) -> Path:
    """Download into the hub's own cache.

    Raises
    ------
    DownloadError
        If the file does not come.
    """
    assert place.hub is not None
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # Asked first, because the hub's client would retry for half a minute.
    if (problem := _unreachable(constants.ENDPOINT)) is not None:
        msg = f"{constants.ENDPOINT} cannot be reached ({problem}), there is no internet connection"
        raise DownloadError(msg)
    silenced = settings.progress is False and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        return Path(hf_hub_download(place.hub, place.path, revision=place.revision))
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, GatedRepoError):
            msg = f"{place.hub} is gated: accept its terms at {constants.ENDPOINT}/{place.hub}, then set HF_TOKEN"
        elif isinstance(cause, RepositoryNotFoundError):
            msg = f"{place.hub} does not exist or is private (HTTP {status}); for a private one set HF_TOKEN"
        elif isinstance(cause, RevisionNotFoundError):
            msg = f"{place.hub} has no revision {place.revision} (HTTP {status})"
        elif isinstance(cause, EntryNotFoundError) and status is not None:
            msg = f"{place.hub} has no such file at {place.revision} (HTTP {status})"
        elif status is not None:
            msg = f"{constants.ENDPOINT} answers HTTP {status}"
        elif isinstance(error, OSError) and (text := _disk_problem(error, Path(constants.HF_HUB_CACHE))):
            msg = text
        else:
            msg = f"the connection broke ({_first_line(error)})"
        raise DownloadError(msg) from error
    finally:
        if silenced:
            enable_progress_bars()


def fetch_from_url(url: str, target: Path) -> None:
    """Download to a path; what came of a broken download is kept beside it and continued, in this call or a later one.

    Raises
    ------
    DownloadError
        If the file does not come.
    """
    import pooch
    import requests

    part = target.with_name(f"{target.name}.part")
    stamp = target.with_name(f"{target.name}.part.etag")
    failures = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            # Without the server's mark of the version, two halves might be of two versions.
            mark = stamp.read_text() if stamp.is_file() and part.is_file() else None
            before = part.stat().st_size if mark else 0
            headers = {"Accept-Encoding": "identity", "User-Agent": "cellfm-hub"}
            if mark and before:
                headers |= {"Range": f"bytes={before}-", "If-Range": mark}
            with part.open("ab") as file:
                get = pooch.HTTPDownloader(
                    progressbar=_show_progress(),
                    chunk_size=2**17,
                    timeout=TIMEOUT,
                    headers=headers,
                    hooks={"response": functools.partial(_begin, file, before, stamp)},
                )
                try:
                    get(url, file, None)
                except requests.HTTPError as error:
                    if error.response is None or error.response.status_code != 416:
                        raise
                    stamp.unlink(missing_ok=True)  # what is here does not fit what is there: from the beginning
                except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                    file.flush()
                    failures = 0 if part.stat().st_size > before else failures + 1
                    if failures >= ATTEMPTS or (failures and _unreachable(url) is not None):
                        raise
                    continue
                else:
                    break
        part.replace(target)
        stamp.unlink(missing_ok=True)
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else "error"
        kind = error.response.headers.get("content-type", "") if error.response is not None else ""
        page = ", with a web page: open the address in a browser to see it" if "html" in kind else ""
        msg = f"{urlsplit(url).hostname} answers HTTP {status}{page}"
        raise DownloadError(msg) from error
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
        if (problem := _unreachable(url)) is not None:
            msg = f"{urlsplit(url).hostname} cannot be reached ({problem}), there is no internet connection"
        elif isinstance(error, requests.Timeout) or "timed out" in str(error):
            msg = f"{urlsplit(url).hostname} sent nothing for {TIMEOUT[1]:.0f} s; what came is kept, try again to continue"
        else:
            msg = f"the connection to {urlsplit(url).hostname} keeps breaking; what came is kept, try again to continue"
        raise DownloadError(msg) from error
    except OSError as error:
        msg = _disk_problem(error, target) or _first_line(error)
        raise DownloadError(msg) from error
    finally:
        if part.is_file() and part.stat().st_size == 0:
            part.unlink()
            stamp.unlink(missing_ok=True)


def _begin(file: IO[bytes], before: int, stamp: Path, response: "requests.Response", **_: object) -> None:
    """Look at the head of an answer before its body is written behind what is already there."""
    if response.is_redirect or response.status_code >= 400:
        return
    if response.status_code not in (200, 206):
        # A server that wants to see a browser answers 202 and nothing.
        msg = f"the server answers HTTP {response.status_code} instead of the file"
        raise DownloadError(msg)
    if response.status_code == 200:
        file.seek(0)
        file.truncate()
        before = 0
    elif not response.headers.get("content-range", "").startswith(f"bytes {before}-"):
        msg = f"the server answers with the wrong part of the file ({response.headers.get('content-range')})"
        raise DownloadError(msg)
    mark = response.headers.get("etag", "")
    mark = response.headers.get("last-modified", "") if not mark or mark.startswith("W/") else mark
    stamp.write_text(mark)
    length = int(response.headers.get("content-length", 0))
    free = shutil.disk_usage(stamp.parent).free
    if length > free:
        raise OSError(errno.ENOSPC, f"{length:,} bytes are to come, {free:,} are free", str(stamp.parent))


def _show_progress() -> bool:
    if settings.progress is not None:
        return settings.progress
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _disk_problem(error: OSError, target: Path) -> str | None:
    if error.errno in _FULL:
        hint = "free some, or set CELLFM_CACHE (for hub files HF_HOME) to a larger disk"
        detail = f" ({error.strerror})" if error.strerror else ""
        return f"no space is left for it under {target.parent}{detail}; {hint}. What came is kept where it can be continued"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT):
        hint = "set CELLFM_CACHE (for hub files HF_HOME) to a folder of yours"
        return f"{error.filename or target.parent} cannot be written ({os.strerror(error.errno)}); {hint}"
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _unreachable(url: str) -> str | None:
    """Say why a server does not answer at all, through a proxy if one is set; ``None`` if it does."""
    parts = urlsplit(url)
    try:
        urllib.request.urlopen(urllib.request.Request(f"{parts.scheme}://{parts.netloc}/", method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        return str(getattr(reason, "strerror", None) or reason) or type(error).__name__
    return None


def set_aside(path: Path, sha256: str) -> Path | None:
    """Rename a bad file, so that the good one can be fetched; nothing is deleted.

    Returns
    -------
    Its new place; ``None`` where it had to stay: others need it, or the folder cannot be written.
    """
    aside = path.with_name(f"{path.name}.rejected-{sha256[:8]}")
    try:
        if path.is_symlink() and "snapshots" in path.parts:
            # In the hub's cache a name is a link to contents that other names may share.
            blob = Path(os.path.normpath(path.parent / path.readlink()))
            repository = next(parent for parent in path.parents if parent.name == "snapshots").parent
            names = [other for other in repository.glob("snapshots/**/*") if other.is_symlink() and other.resolve() == path.resolve()]
            if names != [path]:
                return None
            blob.rename(aside)
            path.unlink()
        else:
            path.rename(aside)
    except OSError:
        return None
    return aside
