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
    from_key, to_key = np.empty(longest, dtype=np.uint32), np.empty(longest, dtype=np.uint32)
    from_index, to_index = np.empty(longest, dtype=np.int32), np.empty(longest, dtype=np.int32)
    buckets = np.empty((3, 2048), dtype=np.int32)
    rounded = np.empty(1, dtype=np.float32)
    bits = rounded.view(np.uint32)
    for row in range(len(offsets) - 1):
        start, length = offsets[row], offsets[row + 1] - offsets[row]
        buckets[:] = 0
        for i in range(length):
            rounded[0] = values[start + i]
            # The bit pattern of a positive float32 grows with its value; inverted, ascending order is descending.
            key = ~bits[0]
            from_key[i], from_index[i] = key, i
            buckets[0, key & 2047] += 1
            buckets[1, (key >> 11) & 2047] += 1
            buckets[2, (key >> 22) & 2047] += 1
        for digit in range(3):
            shift, total = 11 * digit, 0
            for b in range(2048):
                count = buckets[digit, b]
                buckets[digit, b] = total
                total += count
            for i in range(length):
                key = from_key[i]
                b = (key >> shift) & 2047
                place = buckets[digit, b]
                buckets[digit, b] = place + 1
                to_key[place], to_index[place] = key, from_index[i]
            from_key, to_key = to_key, from_key
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


@compiled
def take_nested(
    table: NDArray[np.int32],
    index: NDArray[np.int32],
    order: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    out: NDArray[np.int32],
    places: NDArray[np.int64],
) -> None:
    """Write ``table[index[order[start : start + length]]]`` of each row to `out`, at the row's place.

    Parameters
    ----------
    table, index, order
        Looked up one in the other.
    starts, lengths, places
        ``(n,)`` int64: the range of `order` that makes each row, and where in `out` the row begins.
    """
    for row in range(len(starts)):
        for i in range(lengths[row]):
            out[places[row] + i] = table[index[order[starts[row] + i]]]
