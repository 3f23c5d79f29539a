"""Recognise normalised values that were rounded to whole numbers, and recover the counts where that is possible.

Normalising multiplies the counts of a cell by one number, its scale. Rounded, they are whole numbers like counts, but still almost whole
multiples of the scale: with a scale of 4.17 a cell holds 4, 8, 13 and 17, and never 1, 5 or 9. Counts do not leave such gaps. Counts that
were all multiplied by a whole number (2 in every cell, 10 in every cell) do, but exactly, and are as good as counts.

With a scale below 1 nothing is left out and different counts have become equal: then only the totals, which are nearly the same in all
cells, tell where the values come from. Of rounded logarithms the totals with the logarithm undone are nearly the same.

Where all cells were brought to one known total and none was scaled down, the scale of a cell is that total divided by a whole number, the
total of its counts. Only the right one explains all values and adds up to itself, so counts come back exactly.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub.genes import CountMatrix
from cellfm_hub.kernels import compiled

Rounding = Literal["nearest", "down"]
_MIDDLE: dict[Rounding, float] = {"nearest": 0.0, "down": 0.5}
"""What lies in the middle of all numbers that are rounded to 0."""

_ENOUGH_CELLS = 20
"""Cells whose totals must agree before that means anything."""
_ENOUGH_BITS = 40.0
"""Gaps must be so improbable, by chance, to be proof: one in 2^40."""
_BITS_OF_A_CELL = 5.0
"""A cell whose values cannot show at least this much says nothing."""
_LARGEST_LOGARITHM = 20.0
_CELLS_THAT_VARY, _LEAST_SPREAD = 5, 0.02
"""Of fewer cells, or of cells that all express as many genes, nothing can be said of how totals vary."""
_MOST_INTERVALS = 512
_LARGEST_MULTIPLE = 32.0
"""Values so much larger than the smallest are not looked at for gaps."""
_TOLERANCE = 0.02
_ROUND_TOTALS = tuple(first * 10.0**power for power in range(2, 9) for first in (1, 2, 2.5, 5))
"""Totals that people normalise to."""

_FAULTS = {
    1: "its values are not whole multiples of one number",
    2: "more than one set of counts explains its values",
    3: "its counts were scaled down, so that different ones became equal",
}


@dataclass(frozen=True)
class RoundedScaling:
    """How whole numbers were made from counts.

    Parameters
    ----------
    rounding
        What became of the decimals.
    target
        The total that all cells were brought to before.
    """

    rounding: Rounding
    target: float

    def describe(self) -> str:
        """Say it in a few words, for the receipt."""
        return f"counts normalised to {self.target:.6g} per cell and rounded"

    def recover(self, values: CountMatrix) -> tuple[CountMatrix, int, str]:
        """Return counts; and the first row that holds none with the reason, or -1."""
        counts, faults = _recover_rows(values.data.astype(np.float64), values.indptr.astype(np.int64), self.target, _MIDDLE[self.rounding])
        wrong = np.flatnonzero(faults)
        recovered = sp.csr_matrix((counts, values.indices, values.indptr), shape=values.shape)
        return (recovered, int(wrong[0]), _FAULTS[int(faults[wrong[0]])]) if len(wrong) else (recovered, -1, "")


@dataclass(frozen=True)
class Rounded:
    """What speaks for rounded values."""

    says: str
    """What the matrix holds, in words."""
    certainty: Literal["proven", "likely", "possible"]
    """Never counts; counts only if the user says so; or not to be told."""
    scaling: RoundedScaling | None = None
    """How to get the counts back, where that is possible."""


def recognise_gaps(sample: CountMatrix) -> Rounded | None:
    """Find out whether whole numbers have the gaps of rounded multiples.

    Parameters
    ----------
    sample
        Rows from all over the matrix: whole numbers, none negative.
    """
    values, offsets = sample.data.astype(np.float64), sample.indptr.astype(np.int64)
    for rounding, middle in _MIDDLE.items():
        smallest, distinct, divisor, scales, width = _find_gaps(values, offsets, middle)
        # Whole multiples of a whole number are counts that were multiplied.
        telling = (smallest >= 2) & (divisor == 1) & ((distinct - 1) * np.log2(np.maximum(smallest + middle, 1)) >= _BITS_OF_A_CELL)
        fitting = telling & (width > 0)
        if fitting.sum() < max(1.0, 0.9 * telling.sum()):
            continue
        # Values that have nothing to do with a scale fit it with a chance of 1 / scale each. Summed over all scales that were tried, that
        # is the width that would be left of them by chance; as much as was left has at most this chance.
        bits = (distinct[fitting] - 1) * np.log2(scales[fitting]) + np.log2(width[fitting])
        if bits.sum() < _ENOUGH_BITS and fitting.sum() < min(_ENOUGH_CELLS, len(smallest)):
            continue
        if bits.sum() < _ENOUGH_BITS:
            said = (
                "whole numbers with some gaps, as rounded normalised values have: from so little it cannot be told whether they are counts"
            )
            return Rounded(said, "possible")
        holds = "whole numbers with regular gaps, as normalised values have that were rounded"
        cells = np.repeat(np.arange(len(smallest)), np.diff(offsets))
        inside = fitting[cells]
        counts = np.rint((values[inside] + middle) / scales[cells[inside]])
        totals = scales * np.bincount(cells[inside], counts, minlength=len(scales))
        middle_total = float(np.median(totals[fitting]))
        target = next((total for total in _ROUND_TOTALS if abs(middle_total / total - 1) < _TOLERANCE), None)
        if target is None:
            return Rounded(f"{holds}; counts cannot be recovered, for they were not normalised to one known total", "proven")
        scaling = RoundedScaling(rounding, target)
        _, row, reason = scaling.recover(sample)
        if row >= 0:
            return Rounded(f"{holds}, to {target:.6g} per cell; counts cannot be recovered in every cell: {reason}", "proven")
        return Rounded(scaling.describe(), "proven", scaling)
    return None


def recognise_totals(sample: CountMatrix) -> Rounded | None:
    """Find out whether whole numbers have the totals of rounded normalised values, or of their rounded logarithms.

    The totals of real cells vary more than the number of genes they express. Those of normalised cells hardly vary.
    """
    filled = sp.csr_matrix(sample, dtype=np.float64, copy=True)  # zeros are taken out of it in place
    filled.eliminate_zeros()
    filled = sp.csr_matrix(filled[np.diff(filled.indptr) > 0])
    cells = filled.shape[0]
    if cells == 0:
        return None
    totals, genes = np.asarray(filled.sum(axis=1)).ravel(), np.diff(filled.indptr)
    few = ": from so few cells it cannot be told whether they are counts"
    if cells < _CELLS_THAT_VARY:
        near = float(10 ** np.rint(np.log10(totals[0])))
        if near < 1000 or (np.abs(totals / near - 1) > 0.05).any():
            return None
        return Rounded(f"whole numbers with a total near {near:.6g} in every cell, as rounded normalised values have{few}", "possible")
    spread = np.log(genes).std()
    if spread < _LEAST_SPREAD:
        return None
    if 1 < filled.data.max() < _LARGEST_LOGARITHM:
        undone = filled.copy()
        undone.data = np.expm1(filled.data)
        if np.log(np.asarray(undone.sum(axis=1)).ravel()).std() < 0.8 * spread:
            said = "whole numbers that look like rounded logarithms: with the logarithm undone all cells have nearly the same total"
            return Rounded(said, "proven") if cells >= _ENOUGH_CELLS else Rounded(said + few, "possible")
    # Counts that were drawn until each cell had the same number are equal to the last one.
    drawn = np.count_nonzero(totals == totals.max()) >= max(2, 0.05 * cells)
    if drawn or totals.std() >= 0.1 * totals.mean() or np.log(totals).std() >= 0.7 * spread:
        return None
    said = f"whole numbers with nearly the same total ({totals.mean():.6g}) in every cell, as rounded normalised values have"
    if cells < _ENOUGH_CELLS:
        return Rounded(said + few, "possible")
    # Counts that were thinned to one depth may have such totals too. They vary by chance, as rounded values do not, or stay below it.
    low, high = np.quantile(totals, (0.1, 0.9))
    by_chance = 0.25 < (high - low) / 2.56 / np.sqrt(totals.mean()) < 1.5
    around = any(low <= total <= high for total in _ROUND_TOTALS)
    return Rounded(said, "likely" if around and not by_chance else "possible")


@compiled
def _find_gaps(
    values: NDArray[np.float64], offsets: NDArray[np.int64], middle: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Find the scales of which all smaller values of a row are rounded multiples, taking the smallest value for a count of 1.

    Parameters
    ----------
    values
        ``(total,)`` whole numbers, none negative.
    offsets
        ``(n + 1,)``.
    middle
        See :data:`_MIDDLE`.

    Returns
    -------
    For each row, ``(n,)``: the smallest value above 0; how many distinct ones were looked at; their greatest common divisor; a scale, 0 for
    none; and the width of all intervals of scales that are possible.
    """
    rows = len(offsets) - 1
    smallest, scales, width = np.zeros(rows), np.zeros(rows), np.zeros(rows)
    distinct, divisor = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    low, high = np.empty(_MOST_INTERVALS), np.empty(_MOST_INTERVALS)
    next_low, next_high = np.empty(_MOST_INTERVALS), np.empty(_MOST_INTERVALS)
    for row in range(rows):
        row_values = _distinct(values[offsets[row] : offsets[row + 1]])[0][::-1]
        if len(row_values) == 0:
            continue
        least = row_values[0]
        low[0], high[0] = max(least + middle - 0.5, 1.0), max(least + middle + 0.5, 1.0)
        intervals = 1
        for value in row_values:
            a, b = np.int64(value), divisor[row]
            while b > 0:
                a, b = b, a % b
            divisor[row] = a
            if value > _LARGEST_MULTIPLE * least:
                continue
            distinct[row] += 1
            from_value, to_value = value + middle - 0.5, value + middle + 0.5
            kept = 0
            for i in range(intervals):
                count = max(np.ceil(from_value / high[i]), 1.0)
                while count <= to_value / low[i] and kept < _MOST_INTERVALS:
                    next_low[kept], next_high[kept] = max(low[i], from_value / count), min(high[i], to_value / count)
                    kept += next_high[kept] > next_low[kept]
                    count += 1
            low, high, next_low, next_high = next_low, next_high, low, high
            intervals = kept
        smallest[row] = least
        for i in range(intervals):
            width[row] += high[i] - low[i]
            scales[row] = (low[i] + high[i]) / 2
    return smallest, distinct, divisor, scales, width


@compiled
def _distinct(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the distinct values above 0, largest first, and how often each is there."""
    distinct, times = np.empty(len(values)), np.zeros(len(values), dtype=np.int64)
    found = 0
    # Not np.sort: with the np.argsort of another kernel, compiled by another process, it can share a name in numba's cache, and then one
    # runs in place of the other.
    for value in values[np.argsort(values)[::-1]]:
        if value <= 0:
            break
        if found == 0 or value != distinct[found - 1]:
            distinct[found] = value
            found += 1
        times[found - 1] += 1
    return distinct[:found], times[:found]


@compiled
def _explains(scale: float, total: float, distinct: NDArray[np.float64], times: NDArray[np.int64], middle: float) -> bool:
    """Whether values are multiples of a scale, rounded, and the multiples add up to a total."""
    summed = 0.0
    for i in range(len(distinct)):  # the largest is the first to show that a scale is wrong
        count = np.rint((distinct[i] + middle) / scale)
        if np.abs(count * scale - distinct[i] - middle) > 0.5 + 1e-6 * distinct[i]:
            return False
        summed += count * times[i]
    return summed == total


@compiled
def _recover_rows(
    values: NDArray[np.float64], offsets: NDArray[np.int64], target: float, middle: float
) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """Find for each row the total of counts that explains its values, and the counts.

    Parameters
    ----------
    values
        ``(total,)`` whole numbers, none negative.
    offsets
        ``(n + 1,)``.
    target
        The total of the normalised values of each row.
    middle
        See :data:`_MIDDLE`.

    Returns
    -------
    ``(total,)`` counts; ``(n,)`` 0 for success or the fault.
    """
    rows = len(offsets) - 1
    counts, faults = np.zeros(len(values)), np.zeros(rows, dtype=np.int8)
    for row in range(rows):
        start, stop = offsets[row], offsets[row + 1]
        distinct, times = _distinct(values[start:stop])
        if len(distinct) == 0:
            continue
        least = distinct[-1]
        # The smallest value is a count of at least 1.
        total = max(np.ceil(target / (least + middle + 0.5) * (1 - 1e-6)), 1.0)
        found, last = 0.0, target
        while total <= last:
            # A factor that all counts have in common is lost for good.
            if (found == 0 or total % found != 0) and _explains(target / total, total, distinct, times, middle):
                if found > 0:
                    faults[row] = 2
                    break
                found = total
                # Others that explain the same values are near, unless there are so few values that one explains them by chance.
                chance = np.exp(-(len(distinct) - 1) * np.log(target / total))
                last = min(target, (1.5 if chance < 1e-6 else 20.0) * total)
            total += 1
        if found == 0:
            faults[row] = 3 if least + middle <= 1.5 else 1
        if faults[row] == 0:
            for i in range(start, stop):
                if values[i] > 0:
                    counts[i] = np.rint((values[i] + middle) * found / target)
    return counts, faults
