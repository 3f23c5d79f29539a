"""Which column of a count matrix feeds which gene of a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub.kernels import select_columns

CountMatrix: TypeAlias = sp.csr_matrix
"""Raw counts, cells × genes."""


@dataclass(frozen=True)
class GeneMap:
    """Which column of a matrix feeds which gene of a model.

    Parameters
    ----------
    columns
        ``(m,)`` columns of the matrix that are used.
    targets
        ``(m,)`` for each of them, the place of its gene in `tokens`. Columns that share a place are summed.
    tokens
        ``(g,)`` token id of each gene, in the order the model's tie-breaking wants.
    n_columns
        Columns of the matrix.
    n_other
        How many of `columns` hold something else than a gene, such as a total.
    facts
        What else the receipt shall say of the match.
    notes
        What the user shall be told of it, one line each.
    """

    columns: NDArray[np.int64]
    targets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    n_columns: int
    n_other: int = 0
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _lookup: NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lookup = np.full(self.n_columns, -1, dtype=np.int32)
        lookup[self.columns] = self.targets
        object.__setattr__(self, "_lookup", lookup)

    @property
    def n_matched(self) -> int:
        """Columns of the matrix that hold a gene the model can use."""
        return len(self.columns) - self.n_other

    @property
    def n_summed(self) -> int:
        """Columns that are added to another one of the same gene."""
        return len(self.columns) - len(np.unique(self.targets))

    def apply(self, counts: CountMatrix) -> CountMatrix:
        """Return cells × genes: columns selected, reordered and summed; stored zeros dropped; indices sorted within each row."""
        data, indices, indptr = select_columns(counts.data, counts.indices, counts.indptr, self._lookup)
        out = sp.csr_matrix((data, indices, indptr), shape=(counts.shape[0], len(self.tokens)))
        out.has_canonical_format = True  # sorted, nothing twice
        return out
