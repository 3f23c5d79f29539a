"""Compiled inner loops that numpy has no word for. They release the GIL."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile with numba, keeping the result on disk where a place for it is writable."""
    try:
        return numba.njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # a read-only installation without a home folder
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]


@compiled
def argsort_rows_descending(values: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort each row of packed positive numbers, largest first; equal numbers keep their order.

    Three 11-bit radix passes over the float32 form, then one insertion pass over the float64 values: rounding to float32 is monotone,
    so only numbers that collide in float32 can still be out of order.

    Parameters
    ----------
    values
        ``(total,)`` float64, none negative.
    offsets
        ``(n + 1,)`` int64.

    Returns
    -------
    ``(total,)`` int64, indices into `values`, row by row.
    """
    order = np.empty(len(values), dtype=np.int64)
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    keys = np.empty(longest, dtype=np.uint32)
    from_index = np.empty(longest, dtype=np.int64)
    to_index = np.empty(longest, dtype=np.int64)
    buckets = np.empty(2048, dtype=np.int64)
    # The bit pattern of a positive float32 grows with its value; inverted, ascending order is descending.
    all_keys = ~values.astype(np.float32).view(np.uint32)
    for row in range(len(offsets) - 1):
        start, length = offsets[row], offsets[row + 1] - offsets[row]
        keys[:length] = all_keys[start : start + length]
        for i in range(length):
            from_index[i] = i
        for shift in (0, 11, 22):
            buckets[:] = 0
            for i in range(length):
                buckets[(keys[i] >> shift) & 2047] += 1
            total = 0
            for b in range(2048):
                count = buckets[b]
                buckets[b] = total
                total += count
            for i in range(length):
                index = from_index[i]
                b = (keys[index] >> shift) & 2047
                to_index[buckets[b]] = index
                buckets[b] += 1
            from_index, to_index = to_index, from_index
        for i in range(1, length):
            index = from_index[i]
            value = values[start + index]
            j = i - 1
            while j >= 0 and values[start + from_index[j]] < value:
                from_index[j + 1] = from_index[j]
                j -= 1
            from_index[j + 1] = index
        for i in range(length):
            order[start + i] = start + from_index[i]
    return order
