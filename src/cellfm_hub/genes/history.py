"""Fetch what the shipped tables do not know: previous symbols, aliases and Entrez ids of human genes."""

from pathlib import Path

from cellfm_hub import downloads, lock, safe_files
from cellfm_hub._settings import settings
from cellfm_hub.errors import ChecksumError, InputError, WeightsUnavailableError
from cellfm_hub.genes import tables

HGNC_URL = "https://storage.googleapis.com/public-download-files/hgnc/tsv/tsv/hgnc_complete_set.txt"
"""The HGNC complete set, CC0. It is renewed every few days, so there is no fixed hash: the one of the first download is recorded."""

FILE = "hgnc_complete_set.txt"

_LOCKED = "genes"
"""Name of the entry in ``cellfm.lock``."""


def fetch_history(*, renew: bool = False) -> Path:
    """Fetch the HGNC complete set, once. Nothing else ever does: embedding never fetches gene tables.

    Parameters
    ----------
    renew
        Fetch it again although it is here, for a newer one.

    Returns
    -------
    The file, in ``settings.genes_dir`` if that is set, else in ``genes/`` of the cache. It is used from then on.

    Raises
    ------
    WeightsUnavailableError
        If it does not come; saying how to bring it by hand.
    ChecksumError
        If the file that is here is not the one that was fetched.
    InputError
        If what came is no table of genes.
    """
    target = (settings.genes_dir or settings.cache_dir / "genes") / FILE
    recorded = lock.read().models.get(_LOCKED, lock.LockedModel()).files.get(FILE)
    if target.is_file() and not renew:
        if recorded is not None and recorded.sha256 != safe_files.sha256(target):
            msg = (
                f"{target} is not the file that was fetched from {recorded.origin}; fetch it again with renew=True ('cellfm genes --renew')"
            )
            raise ChecksumError(msg)
        _check(target)
        return target
    by_hand = f"download {HGNC_URL} on a machine with internet and put it at {target}"
    if settings.offline:
        msg = f"the HGNC table of gene names is not here and offline mode is on: {by_hand}"
        raise WeightsUnavailableError(msg)
    fetched = target.with_name(f"{FILE}.new")
    try:
        downloads.fetch_from_url(HGNC_URL, fetched)
    except downloads.DownloadError as error:
        msg = f"the HGNC table of gene names cannot be fetched ({error}): {by_hand}"
        raise WeightsUnavailableError(msg) from error
    try:
        _check(fetched)
    except InputError:
        fetched.unlink()
        raise
    entry = lock.LockedFile(sha256=safe_files.sha256(fetched, fresh=True), size=fetched.stat().st_size, origin=HGNC_URL)
    if recorded is not None and recorded.sha256 != entry.sha256 and not renew:
        fetched.unlink()
        msg = f"{target} is gone, and the table that {HGNC_URL} holds now is another: SHA-256 {entry.sha256}, recorded {recorded.sha256};"
        msg += " put the old one back, or take the new one with renew=True ('cellfm genes --renew')"
        raise ChecksumError(msg)
    fetched.replace(target)
    lock.update({_LOCKED: lock.LockedModel(licence="CC0-1.0", files={FILE: entry})}, replace=renew)
    return target


def _check(path: Path) -> None:
    tables.read_table(path, tables.HGNC_COLUMNS)
