"""The filter of the original release: genes found in few cells, then cells with few genes.

It makes a cell's vector depend on which other cells are in the file, and is therefore off unless it is asked for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellfm_adapters.uce.tokenizer import PlacedGenes
from cellfm_hub.errors import InputError
from cellfm_hub.genes import CountMatrix

MIN_CELLS, MIN_GENES = 10, 25


@dataclass(frozen=True, kw_only=True)
class FilteredGenes(PlacedGenes):
    """Genes that pass the filter; cells that do not become empty.

    Parameters
    ----------
    passed
        ``(n_columns,)`` bool: which columns of the matrix are found in enough cells, known to the model or not.
    """

    passed: NDArray[np.bool_]

    def apply(self, counts: CountMatrix) -> CountMatrix:
        kept = super().apply(counts).multiply(enough_genes(counts, self.passed)[:, None]).tocsr()
        kept.eliminate_zeros()
        return kept


def enough_genes(counts: CountMatrix, passed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which cells express at least 25 of the genes that passed, ``(n,)``."""
    expressed = np.concatenate(([0], np.cumsum(passed[counts.indices] & (counts.data > 0))))
    enough: NDArray[np.bool_] = np.diff(expressed[counts.indptr]) >= MIN_GENES
    return enough


def filter_genes(genes: PlacedGenes, blocks: Callable[[], Iterator[CountMatrix]]) -> FilteredGenes:
    """Apply the filter to a whole data set, in two passes: count the cells of each gene, then the cells that are left.

    Raises
    ------
    InputError
        If no gene passes, as in any data set of fewer than 10 cells.
    """
    cells, found_in = 0, np.zeros(genes.n_columns, dtype=np.int64)
    for counts in blocks():
        cells += counts.shape[0]
        found_in += np.bincount(counts.indices[counts.data > 0], minlength=genes.n_columns)
    passed = found_in >= MIN_CELLS
    used = passed[genes.columns]
    if not used.any():
        msg = f"the filter keeps genes found in at least {MIN_CELLS} cells, and of these {cells:,} cells it leaves no gene;"
        msg += " leave the filter off"
        raise InputError(msg)
    kept_cells = sum(int(enough_genes(counts, passed).sum()) for counts in blocks())
    return FilteredGenes(
        columns=genes.columns[used],
        targets=genes.targets[used],
        tokens=genes.tokens,
        n_columns=genes.n_columns,
        facts={**genes.facts, "filtered_genes": int((~passed).sum()), "filtered_cells": cells - kept_cells},
        notes=(*genes.notes, f"the filter leaves out {cells - kept_cells:,} of {cells:,} cells and {int((~passed).sum()):,} genes"),
        chromosomes=genes.chromosomes,
        passed=passed,
    )
