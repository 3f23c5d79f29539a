"""Vectors of an earlier result, found by what the rows hold: ``--update``."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.blocks import Vectors
from cellfm_hub.errors import OutputError
from cellfm_hub.jobs.content import Content, RowFacts, made_by, vector_hashes
from cellfm_hub.jobs.durable import durably
from cellfm_hub.jobs.stored import Stored
from cellfm_hub.receipt import Receipt

logger = logging.getLogger("cellfm_hub")


class Known:
    """Vectors of an earlier result. They stay on disk; in memory are 32 bytes per row.

    Parameters
    ----------
    folder
        Where :func:`keep` put them.
    place
        Of the model in the run.
    """

    def __init__(self, folder: Path, place: int) -> None:
        self._vectors = np.load(folder / f"known-{place}.npy", mmap_mode="r")
        content = np.load(folder / f"known-content-{place}.npy")
        order = np.lexsort((content[:, 1], content[:, 0]))
        self._sorted = _as_records(content[order])
        self._rows = np.load(folder / f"known-rows-{place}.npy")[order]

    def complete(self, content: Content, compute: Callable[[NDArray[np.int64]], Vectors]) -> Vectors:
        """Return the vectors of some rows: the known ones, and those that `compute` gives for the places of the others."""
        wanted = _as_records(content)
        at = np.searchsorted(self._sorted, wanted)
        there = np.minimum(at, max(len(self._sorted) - 1, 0))
        known = (at < len(self._sorted)) & (self._sorted[there] == wanted) if len(self._sorted) else np.zeros(len(wanted), bool)
        new = np.flatnonzero(~known)
        computed = compute(new) if len(new) else np.empty((0, self._vectors.shape[1]), np.float32)
        out = np.empty((len(content), computed.shape[1]), dtype=np.float32)
        out[new] = computed
        out[known] = self._vectors[self._rows[at[known]]]
        return out


def keep(folder: Path, place: int, stored: Stored, receipt: Receipt) -> None:
    """Copy vectors of an earlier result, whatever its format, to where :class:`Known` reads them.

    A vector is known by its hash, wherever it stands now: rows may have been taken out, shuffled or put together since. One that was
    changed, or that another model made than the one of this `receipt`, is not used.

    Raises
    ------
    OutputError
        If the result does not say what its rows were made from.
    """
    if stored.facts is None:
        msg = f"{stored.path} does not say what its rows were made from, so that new ones cannot be told;"
        msg += " leave out --update, and pass --overwrite to compute it again"
        raise OutputError(msg)
    hashes = []
    with durably(folder / f"known-{place}.npy") as temporary, temporary.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (stored.rows, stored.width)}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in stored.vectors():
            file.write(np.ascontiguousarray(piece, dtype="<f4").data)
            hashes.append(vector_hashes(piece))
    there = np.concatenate([*hashes, np.empty(0, np.uint64)])
    if changed := int(np.count_nonzero(~np.isin(there, stored.facts[:, 2]))):
        logger.warning(
            "%d of %d vectors in %s are not those that were written there; they are computed again", changed, len(there), stored.path
        )
    content, rows = _found(stored.facts, there)
    content = made_by(content, receipt)
    for name, array in (("content", content), ("rows", rows)):
        with durably(folder / f"known-{name}-{place}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array)


def _found(facts: RowFacts, hashes: NDArray[np.uint64]) -> tuple[Content, NDArray[np.int64]]:
    """Look for the vectors that facts tell of: return what those were made from that are there, and the rows in which they stand."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    at = np.searchsorted(ordered, facts[:, 2])
    there = np.isin(facts[:, 2], ordered)
    return facts[there, :2], order[at[there]]


def _as_records(content: Content) -> NDArray[np.void]:
    """View pairs as single sortable values."""
    return np.ascontiguousarray(content).view([("a", np.uint64), ("b", np.uint64)]).reshape(-1)
