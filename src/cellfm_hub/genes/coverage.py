"""Whether a model knows enough of the genes of a data set: files in which next to nothing matches are refused.

A few names match almost any vocabulary by accident, as ``G10`` is an alias of a gene. What such cells get are vectors, but of nothing.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.genes.map import GeneMap

Rule = Literal["checked", "any"]
"""Whether data are refused of which a model knows next to nothing."""

MIN_COUNTS = 0.01
"""Share of all counts that must be on genes the model knows."""

MIN_GENES, OF_GENES = 5, 20
"""Genes that it must know of data with so many; a smaller panel may be of one."""


@dataclass(frozen=True)
class Coverage:
    """What a model knows of the genes of a data set.

    Parameters
    ----------
    genes
        Genes of the data that it knows, each once.
    of
        Columns of the matrix, but those that hold something else than a gene.
    counts
        Share of all counts that are on them; ``None`` where there are no counts to tell.
    """

    genes: int
    of: int
    counts: float | None

    @classmethod
    def measure(cls, genes: GeneMap, totals: NDArray[np.float64] | None) -> "Coverage":
        """Measure it by the counts of each column, ``(n_vars,)``, of all cells or some."""
        used, other = genes.columns[: genes.n_matched], genes.columns[genes.n_matched :]
        known = len(np.unique(genes.tokens[genes.targets[: genes.n_matched]]))
        everything = 0.0 if totals is None else float(totals.sum() - totals[other].sum())
        share = None if totals is None or everything <= 0 else float(totals[used].sum()) / everything
        return cls(known, genes.n_columns - genes.n_other, share)

    @property
    def is_enough(self) -> bool:
        """Whether the data can be embedded."""
        enough_counts = self.counts is None or self.counts >= MIN_COUNTS
        return self.genes > 0 and enough_counts and (self.genes >= MIN_GENES or self.of < OF_GENES)

    def __str__(self) -> str:
        genes = f"none of the {self.of:,} genes" if self.genes == 0 else f"only {self.genes:,} of the {self.of:,} genes"
        return genes if self.genes == 0 or self.counts is None else f"{genes} ({self.counts:.2%} of all counts)"
