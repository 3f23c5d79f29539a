"""What a model saw of each cell: ``qc=True``."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.genes import CountMatrix
from cellfm_hub.tokens import Tokens

COLUMNS = ("genes_used", "counts_used", "truncated")
"""Of each cell: how many of its expressed genes the model knows, their share of its counts, whether only a part of them fitted. A cell of
which the model gets nothing has 0, 0 and ``False``."""


def row_sums(counts: CountMatrix) -> NDArray[np.float64]:
    """Add up each row, exactly for whole numbers: ``(n,)`` float64."""
    before = np.concatenate(([0.0], np.cumsum(counts.data, dtype=np.float64)))
    return np.diff(before[counts.indptr])


def cut_inputs(tokens: Tokens, inputs: int) -> NDArray[np.bool_]:
    """Say of each input whether tokens of it were left out, ``(inputs,)``."""
    cut = np.zeros(inputs, dtype=np.bool_)
    if tokens.cut is not None:
        rows = np.flatnonzero(tokens.cut)
        cut[rows if tokens.rows is None else tokens.rows[rows]] = True
    return cut


@dataclass
class CellQuality:
    """The columns of ``qc=True``, gathered block by block: nine bytes per cell."""

    parts: dict[str, list[NDArray[Any]]] = field(default_factory=lambda: {name: [] for name in COLUMNS})

    def add(
        self, genes_used: NDArray[np.float64], totals: NDArray[np.float64] | None, used: NDArray[np.float64], truncated: NDArray[np.bool_]
    ) -> None:
        """Add a block of cells.

        Parameters
        ----------
        genes_used
            ``(n,)`` expressed genes that the model knows.
        totals, used
            ``(n,)`` all counts of each cell, and those on such genes; `totals` is ``None`` where the values are not counts.
        truncated
            ``(n,)`` whether only a part of the genes fitted.
        """
        share = np.full(len(genes_used), np.nan)
        if totals is not None:
            np.divide(used, totals, out=share, where=totals > 0)
        for name, values in zip(COLUMNS, (genes_used.astype(np.int32), share.astype(np.float32), truncated), strict=True):
            self.parts[name].append(values)

    def extend(self, other: "CellQuality") -> None:
        """Add the blocks of another one behind the own."""
        for name, parts in other.parts.items():
            self.parts[name] += parts

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the three columns, ``(n,)`` int32, float32 (NaN for a cell without counts) and bool; empty if there are no cells."""
        return {name: np.concatenate(parts) for name, parts in self.parts.items() if parts}

    def medians(self) -> dict[str, float]:
        """Return the medians over all cells, for the receipt."""
        found = {f"{name}_median": values[np.isfinite(values)] for name, values in self.columns().items() if name != "truncated"}
        return {name: round(float(np.median(values)), 6) for name, values in found.items() if len(values)}
