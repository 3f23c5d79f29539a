"""Compiled inner loops that numpy has no word for. They release the GIL."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])

_1, _10, _32, _42, _1023 = np.uint64(1), np.uint64(10), np.uint64(32), np.uint64(42), np.uint64(1023)  # numba: uint64 with int gives float


def compiled(function: F) -> F:
    """Compile with numba, keeping the result on disk where a place for it is writable."""
    try:
        return numba.njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # a read-only installation without a home folder
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]


@compiled
def sort_row(values: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Sort a row of positive numbers, largest first; equal numbers keep their order.

    Radix passes over a whole number of 20 bits that falls as the float32 form rises, then one insertion pass over the float64 values:
    rounding is monotone, so only numbers that share the 20 bits can still be out of order.

    Parameters
    ----------
    values
        ``(length,)`` float64, none negative.

    Returns
    -------
    ``(length,)`` uint64; the lower 32 bits are indices into `values`.
    """
    length = np.uint64(len(values))  # numba: an index without a sign needs no look at whether it counts from the end
    rounded = values.astype(np.float32)
    bits = rounded.view(np.uint32)  # of a positive float32, and they grow with its value
    smallest, largest = np.uint32(0xFFFFFFFF), np.uint32(0)
    for i in range(length):
        smallest, largest = min(smallest, bits[i]), max(largest, bits[i])
    shift = np.uint32(0)
    while (largest - smallest) >> shift >= 1 << 20:
        shift += np.uint32(1)
    entries, passed = np.empty(length, dtype=np.uint64), np.empty(length, dtype=np.uint64)
    low, high = np.zeros(1024, dtype=np.int32), np.zeros(1024, dtype=np.int32)
    for i in range(length):
        key = np.uint64((largest - bits[i]) >> shift)
        entries[i] = key << _32 | i
        low[key & _1023] += np.int32(1)
        high[key >> _10] += np.int32(1)
    low_total, high_total = np.int32(0), np.int32(0)
    for b in range(np.uint64(1024)):
        low_count, high_count = low[b], high[b]
        low[b], high[b] = low_total, high_total
        low_total, high_total = low_total + low_count, high_total + high_count
    for i in range(length):
        entry = entries[i]
        digit = entry >> _32 & _1023
        passed[np.uint64(low[digit])] = entry
        low[digit] += np.int32(1)
    for i in range(length):
        entry = passed[i]
        digit = entry >> _42
        entries[np.uint64(high[digit])] = entry
        high[digit] += np.int32(1)
    for i in range(np.uint64(1), length):
        entry, j = entries[i], np.uint64(i)
        if entry >> _32 == entries[i - _1] >> _32:
            value = values[np.uint32(entry)]
            while j > 0 and values[np.uint32(entries[j - _1])] < value:
                entries[j] = entries[j - _1]
                j -= _1
            entries[j] = entry
    return entries


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
    for row in range(len(offsets) - 1):
        start, stop = np.uint64(offsets[row]), np.uint64(offsets[row + 1])
        entries = sort_row(values[start:stop])
        for i in range(stop - start):
            order[start + i] = start + np.uint32(entries[i])
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
    room = len(indices) + 1  # one more: an entry is written before it is known whether it stays
    out_data, out_indices = np.empty(room, dtype=data.dtype), np.empty(room, dtype=np.int32)
    out_indptr = np.zeros(len(indptr), dtype=np.int64)
    written = np.uint64(0)
    for row in range(len(indptr) - 1):
        begin = written
        for i in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
            place = targets[np.uint32(indices[i])]
            out_data[written], out_indices[written] = data[i], place
            written += np.uint64((place >= 0) & (data[i] != 0))  # no branch: which genes a model knows follows no pattern
        falls = 0
        for i in range(begin + _1, written):
            falls += out_indices[i] <= out_indices[i - _1]
        if falls > 0:
            written = begin + sum_repeated(out_indices[begin:written], out_data[begin:written])
        out_indptr[row + 1] = written
    return out_data[:written], out_indices[:written], out_indptr


@compiled
def sum_repeated(places: NDArray[np.int32], values: NDArray[Any]) -> Any:
    """Sort a row by place, below 2^22, and sum the values that share one; return how many remain, at the front of both arrays."""
    length = np.uint64(len(places))
    places_from, values_from = places, values
    places_to, values_to = np.empty_like(places), np.empty_like(values)
    for digit in range(2):  # two passes: back where they began
        shift, total = 11 * digit, 0
        buckets = np.zeros(2048, dtype=np.int64)
        for i in range(length):
            buckets[(places_from[i] >> shift) & 2047] += 1
        for b in range(2048):
            count = buckets[b]
            buckets[b] = total
            total += count
        for i in range(length):
            b = (places_from[i] >> shift) & 2047
            places_to[buckets[b]], values_to[buckets[b]] = places_from[i], values_from[i]
            buckets[b] += 1
        places_from, places_to = places_to, places_from
        values_from, values_to = values_to, values_from
    kept = np.uint64(0)
    for i in range(length):
        if kept > 0 and places[i] == places[kept - _1]:
            values[kept - _1] += values[i]
        else:
            places[kept], values[kept] = places[i], values[i]
            kept += _1
    return kept
