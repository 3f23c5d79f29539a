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
def sort_row(values: NDArray[np.float64], keys: NDArray[np.uint32], index: NDArray[np.int32], buckets: NDArray[np.int32]) -> Any:
    """Sort a row of positive numbers, largest first; equal numbers keep their order.

    Three 11-bit radix passes over the float32 form, then one insertion pass over the float64 values: rounding to float32 is monotone,
    so only numbers that collide in float32 can still be out of order.

    Parameters
    ----------
    values
        ``(length,)`` float64, none negative.
    keys, index
        Room to work in, ``(2, length or more)``.
    buckets
        The same, ``(3, 2048)``.

    Returns
    -------
    ``(length,)`` int32, indices into `values`; a part of `index`.
    """
    length = len(values)
    rounded = np.empty(1, dtype=np.float32)
    bits = rounded.view(np.uint32)
    buckets[:] = 0
    for i in range(length):
        rounded[0] = values[i]
        # The bit pattern of a positive float32 grows with its value; inverted, ascending order is descending.
        key = ~bits[0]
        keys[0, i], index[0, i] = key, i
        buckets[0, key & 2047] += 1
        buckets[1, (key >> 11) & 2047] += 1
        buckets[2, (key >> 22) & 2047] += 1
    now = 0
    for digit in range(3):
        shift, total = 11 * digit, 0
        if length > 0 and buckets[digit, (keys[0, 0] >> shift) & 2047] == length:
            continue  # all alike in these bits, as small whole numbers are in the lowest
        for b in range(2048):
            count = buckets[digit, b]
            buckets[digit, b] = total
            total += count
        for i in range(length):
            key = keys[now, i]
            b = (key >> shift) & 2047
            place = buckets[digit, b]
            buckets[digit, b] = place + 1
            keys[1 - now, place], index[1 - now, place] = key, index[now, i]
        now = 1 - now
    order = index[now, :length]
    for i in range(1, length):
        entry = order[i]
        value = values[entry]
        j = i - 1
        while j >= 0 and values[order[j]] < value:
            order[j + 1] = order[j]
            j -= 1
        order[j + 1] = entry
    return order


@compiled
def longest_row(offsets: NDArray[np.int64]) -> int:
    """Return the length of the longest row."""
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    return longest


@compiled
def argsort_rows_descending(values: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort each row of packed positive numbers, largest first; equal numbers keep their order.

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
    longest = longest_row(offsets)
    keys, index = np.empty((2, longest), dtype=np.uint32), np.empty((2, longest), dtype=np.int32)
    buckets = np.empty((3, 2048), dtype=np.int32)
    for row in range(len(offsets) - 1):
        start, stop = offsets[row], offsets[row + 1]
        of_row = sort_row(values[start:stop], keys, index, buckets)
        for i in range(stop - start):
            order[start + i] = start + of_row[i]
    return order


@compiled
def select_columns(
    data: NDArray[Any], indices: NDArray[np.int32], indptr: NDArray[np.int64], targets: NDArray[np.int32]
) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int64]]:
    """Take columns of a CSR matrix to other places; entries that meet at a place are summed, stored zeros left out.

    Parameters
    ----------
    data, indices, indptr
        The matrix.
    targets
        ``(columns,)`` new place of each column, below 2^22; -1 leaves it out.

    Returns
    -------
    ``data``, ``indices`` and ``indptr`` of the new matrix, ascending in each row.
    """
    kept = 0
    for i in range(len(indices)):
        kept += targets[indices[i]] >= 0 and data[i] != 0
    out_data, out_indices = np.empty(kept, dtype=data.dtype), np.empty(kept, dtype=np.int32)
    out_indptr = np.zeros(len(indptr), dtype=np.int64)
    longest = longest_row(indptr)
    places, values = np.empty((2, longest), dtype=np.int32), np.empty((2, longest), dtype=data.dtype)
    buckets = np.empty(2048, dtype=np.int64)
    written = 0
    for row in range(len(indptr) - 1):
        length, ascends, last = 0, True, -1
        for i in range(indptr[row], indptr[row + 1]):
            place = targets[indices[i]]
            if place >= 0 and data[i] != 0:
                ascends = ascends and place > last
                last = place
                places[0, length], values[0, length] = place, data[i]
                length += 1
        if not ascends:
            for digit in range(2):  # two passes: back where they began
                shift, total = 11 * digit, 0
                buckets[:] = 0
                for i in range(length):
                    buckets[(places[digit, i] >> shift) & 2047] += 1
                for b in range(2048):
                    count = buckets[b]
                    buckets[b] = total
                    total += count
                for i in range(length):
                    b = (places[digit, i] >> shift) & 2047
                    places[1 - digit, buckets[b]], values[1 - digit, buckets[b]] = places[digit, i], values[digit, i]
                    buckets[b] += 1
        for i in range(length):
            if i > 0 and places[0, i] == places[0, i - 1]:
                out_data[written - 1] += values[0, i]
            else:
                out_data[written], out_indices[written] = values[0, i], places[0, i]
                written += 1
        out_indptr[row + 1] = written
    return out_data[:written], out_indices[:written], out_indptr
