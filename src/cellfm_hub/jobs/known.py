"""Vectors of an earlier result, found by what the rows hold: ``--update``."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.blocks import Vectors
from cellfm_hub.errors import OutputError
from cellfm_hub.jobs.content import Content
from cellfm_hub.jobs.durable import durably
from cellfm_hub.jobs.stored import Stored


class Known:
    """Vectors of an earlier result. They stay on disk; in memory are 24 bytes per row.

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
        self._order = np.lexsort((content[:, 1], content[:, 0]))
        self._sorted = _as_records(content[self._order])

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
        out[known] = self._vectors[self._order[at[known]]]
        return out


def keep(folder: Path, place: int, stored: Stored) -> None:
    """Copy vectors of an earlier result, whatever its format, to where :class:`Known` reads them.

    Raises
    ------
    OutputError
        If the result does not say what its rows were made from, or was changed since.
    """
    if stored.content is None:
        msg = f"{stored.path} does not say what its rows were made from, so that new ones cannot be told;"
        msg += " leave out --update, and pass --overwrite to compute it again"
        raise OutputError(msg)
    if not stored.intact():
        msg = f"the vectors in {stored.path} are not those that were written there: they were changed, or rows removed or reordered;"
        msg += " leave out --update, and pass --overwrite to compute it again"
        raise OutputError(msg)
    with durably(folder / f"known-{place}.npy") as temporary, temporary.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (stored.rows, stored.width)}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in stored.vectors():
            file.write(np.ascontiguousarray(piece, dtype="<f4").data)
    with durably(folder / f"known-content-{place}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, stored.content)


def _as_records(content: Content) -> NDArray[np.void]:
    """View pairs as single sortable values."""
    return np.ascontiguousarray(content).view([("a", np.uint64), ("b", np.uint64)]).reshape(-1)
