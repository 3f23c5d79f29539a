"""Cut rows into batches: a pure function of their lengths."""

import numpy as np
from numpy.typing import NDArray

MAX_ROWS = 4096
"""Rows of one batch, however short: bounds the memory of pooling."""


def plan_batches(lengths: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Cut rows into batches of at most `batch_tokens` tokens, longest rows first.

    Rows of similar length meet in a batch; the longest come first so that running out of memory shows at once. A row longer than the
    budget is a batch of its own; empty rows are in none.

    Returns
    -------
    Row indices of each batch.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[: np.count_nonzero(lengths)]
    batches, begin = [], 0
    ends = np.cumsum(lengths[order])
    while begin < len(order):
        used = ends[begin - 1] if begin else 0
        end = int(np.searchsorted(ends, used + batch_tokens, side="right"))
        end = min(max(end, begin + 1), begin + MAX_ROWS)
        batches.append(order[begin:end])
        begin = end
    return batches
