"""Recover counts from normalised values.

Normalising multiplies the counts of a cell by one number, its scale; log-normalising then takes ``log1p``. So all values of a cell, with
the logarithm undone, are whole multiples of that scale, and the counts come back exactly: this is arithmetic, not an estimate.

For each cell an interval of scales is kept that explains every value up to the rounding of the stored numbers. The smallest value is
taken for a count of 1 and bounds the scale; each larger value must then be a whole multiple, of which there may be only one, and narrows
the interval. Where that fails, the smallest is taken for a count of 2, 3, and so on.

One thing is lost for good: a factor that all counts of a cell have in common. A cell with the counts 2, 4, 4 comes back as 1, 2, 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub.genes import CountMatrix
from cellfm_hub.kernels import compiled

Kind = Literal["log1p", "normalised"]

_FLOAT32, _FLOAT64 = 2.0**-23, 2.0**-47
"""Relative rounding of numbers that were computed in float32 or in float64, whose errors are many small ones and cost nothing to allow."""
_LARGEST_LOGARITHM = 40.0
_MOST_FOR_SMALLEST = 1000
"""What the smallest count of a cell may be."""
_FIRST_ROWS = 32
_ENOUGH_BITS = 20.0
"""Cells together must be so improbable, by chance, to be whole multiples: one in 2^20."""

_FAULTS = {
    1: "its values are not whole multiples of one number",
    2: "its largest counts cannot be told apart at the precision of the values",
}


@dataclass(frozen=True)
class Scaling:
    """How a matrix was made from counts.

    Parameters
    ----------
    kind
        ``"log1p"``: log1p of counts times the scale of the cell. ``"normalised"``: counts times the scale.
    precision
        Relative rounding of its values.
    decimals
        Half of the last decimal, where all values are rounded to so many decimals; else 0.
    target
        The total that all cells were brought to; ``None`` where they have different ones, as after a selection of genes.
    scaled
        Whether they were normalised at all.
    """

    kind: Kind
    precision: float
    decimals: float = 0.0
    target: float | None = None
    scaled: bool = True

    def describe(self) -> str:
        """Say it in a few words, for the receipt."""
        if not self.scaled:
            return "log1p of counts, not normalised"
        to = "an unknown total (they differ between cells)" if self.target is None else f"{self.target:.6g} per cell"
        return f"{'log1p of counts' if self.kind == 'log1p' else 'counts'} normalised to {to}"

    def recover(self, values: CountMatrix) -> tuple[CountMatrix, int, str]:
        """Return counts; and the first row that holds none with the reason, or -1."""
        counts, faults, _, _ = self._solve(values)
        wrong = np.flatnonzero(faults)
        if len(wrong):
            return counts, int(wrong[0]), _FAULTS[int(faults[wrong[0]])]
        return counts, -1, ""

    def _solve(self, values: CountMatrix) -> tuple[CountMatrix, NDArray[np.int8], NDArray[np.float64], NDArray[np.float64]]:
        counts, faults, bits, scales = _recover_rows(
            values.data.astype(np.float64),
            values.indptr.astype(np.int64),
            self.kind == "log1p",
            self.precision,
            self.decimals,
            _MOST_FOR_SMALLEST,
        )
        return sp.csr_matrix((counts, values.indices, values.indptr), shape=values.shape), faults, bits, scales


def recognise(sample: CountMatrix) -> tuple[Scaling | None, int, str]:
    """Find out whether values are normalised counts.

    Parameters
    ----------
    sample
        Rows from all over the matrix, none negative, all finite.

    Returns
    -------
    How they were made, or ``None``; then also the row that speaks against it and the reason.
    """
    largest = float(sample.data.max(initial=0))
    if largest == 0:
        return None, -1, "it holds only zeros"
    if np.count_nonzero(sample.data) == sample.shape[0] * sample.shape[1]:
        return None, -1, "it has no zeros, as counts have; something was added to them"
    rounded = _decimals(sample.data)
    single = sample.dtype == np.float32 or bool((sample.data.astype(np.float32) == sample.data).all())
    precisions = [_FLOAT32] if single or rounded else [_FLOAT64, _FLOAT32]
    kinds: list[Kind] = ["log1p", "normalised"] if largest < _LARGEST_LOGARITHM else ["normalised"]
    row, reason = -1, ""
    for kind in kinds:
        for precision in precisions:
            scaling = Scaling(kind, precision, rounded)
            # Most matrices that are none show it at once.
            counts, faults, bits, scales = scaling._solve(sp.csr_matrix(sample[:_FIRST_ROWS]))
            if not faults.any():
                counts, faults, bits, scales = scaling._solve(sample)
            if faults.any():
                if not reason:
                    row = int(np.flatnonzero(faults)[0])
                    reason = _FAULTS[int(faults[row])]
                continue
            if bits.sum() < _ENOUGH_BITS:
                reason = reason or "too few different values to tell"
                continue
            if _rarely_one(counts):
                # Rounded values per million are multiples of one number too: of 1.
                return None, -1, "its values are multiples of one number in each cell, but hardly any cell has that number itself"
            target = _common_total(counts, scales, _loosest(scaling))
            if kind == "normalised" and target is None:
                # Halves and thirds of counts are multiples of one number too, but of another one in every cell for no good reason.
                return None, -1, "its values are multiples of one number in each cell, but the cells' totals differ"
            scaled = bool((np.abs(scales[scales > 0] - 1) > _loosest(scaling)).any())
            return Scaling(kind, precision, rounded, target, scaled), -1, ""
    if (base := _other_base(sp.csr_matrix(sample[:_FIRST_ROWS]), precisions, rounded)) is not None:
        return None, -1, f"it holds logarithms to the base {base} of normalised counts; multiply by ln({base}) to make them natural ones"
    return None, row, reason


def _decimals(values: NDArray[np.floating]) -> float:
    """Return half of the last decimal if all values are rounded to 2 to 6 decimals, else 0."""
    wide = values.astype(np.float64)
    for places in range(2, 7):
        scaled = wide * 10.0**places
        # float32 is itself uneven at this scale: beyond it nothing can be seen.
        noise = np.abs(scaled) * _FLOAT32
        if noise.max(initial=0) > 0.05:
            return 0.0
        if (np.abs(scaled - np.rint(scaled)) <= noise + 1e-9).all():
            return 0.5 * 10.0**-places
    return 0.0


def _rarely_one(counts: CountMatrix) -> bool:
    """Whether less than half of the cells that hold anything hold a 1, as nearly every real cell does."""
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    return len(np.unique(rows[counts.data == 1])) < 0.5 * len(np.unique(rows[counts.data > 0]))


def _loosest(scaling: Scaling) -> float:
    return max(1e-4, 20 * scaling.decimals)


def _common_total(counts: CountMatrix, scales: NDArray[np.float64], tolerance: float) -> float | None:
    """Return the total that all cells share after scaling, if they do."""
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel() * scales
    totals = totals[totals > 0]
    middle = float(np.median(totals))
    if len(totals) < 2 or np.abs(totals - middle).max() > tolerance * middle:
        return None
    nearest = float(np.rint(middle))
    return nearest if abs(middle - nearest) <= tolerance * middle else middle


def _other_base(sample: CountMatrix, precisions: Sequence[float], rounded: float) -> int | None:
    """Recognise logarithms to the bases that are in use besides e."""
    for base in (2, 10):
        if sample.data.max() * np.log(base) >= _LARGEST_LOGARITHM:
            continue
        natural = sp.csr_matrix((sample.data.astype(np.float64) * np.log(base), sample.indices, sample.indptr), shape=sample.shape)
        for precision in precisions:
            _, faults, bits, _ = Scaling("log1p", precision, rounded * np.log(base))._solve(natural)
            if not faults.any() and bits.sum() >= _ENOUGH_BITS:
                return base
    return None


@compiled
def _recover_rows(
    values: NDArray[np.float64],
    offsets: NDArray[np.int64],
    logarithms: bool,  # noqa: FBT001 - numba knows no keyword-only arguments
    precision: float,
    decimals: float,
    most: int,
) -> tuple[NDArray[np.float64], NDArray[np.int8], NDArray[np.float64], NDArray[np.float64]]:
    """Solve each row for whole numbers.

    Parameters
    ----------
    values
        ``(total,)`` none negative.
    offsets
        ``(n + 1,)``.
    logarithms
        Whether ``expm1`` comes first.
    precision, decimals
        As in :class:`Scaling`.
    most
        Largest number to try for the smallest value of a row.

    Returns
    -------
    ``(total,)`` whole numbers; ``(n,)`` 0 for success or the fault; ``(n,)`` improbability in bits; ``(n,)`` scale.
    """
    rows = len(offsets) - 1
    counts = np.zeros(len(values))
    faults = np.zeros(rows, dtype=np.int8)
    bits = np.zeros(rows)
    scales = np.zeros(rows)
    for row in range(rows):
        start, stop = offsets[row], offsets[row + 1]
        order = np.argsort(values[start:stop])
        low, high, found = np.empty(stop - start), np.empty(stop - start), np.empty(stop - start)
        distinct = 0
        last = 0.0
        for i in order:
            v = values[start + i]
            if v == last:
                continue
            last = v
            # The rounding of the result, and of the number whose logarithm was taken.
            slack = 2 * precision * v + decimals
            if logarithms:
                low[distinct] = np.expm1(v - slack) * (1 - precision)
                high[distinct] = np.expm1(v + slack) * (1 + precision)
            else:
                low[distinct] = v - slack
                high[distinct] = v + slack
            distinct += 1
        if distinct == 0:
            continue
        if low[0] <= 0:
            faults[row] = 2
            continue
        fault = 1
        for smallest in range(1, most + 1):
            scale_low, scale_high = low[0] / smallest, high[0] / smallest
            found[0] = smallest
            # Of passing, had the values nothing to do with counts; and of those that made the smallest more than 1.
            chance, chance_of_rest = 1.0, float(smallest)
            i = 1
            while i < distinct:
                least, greatest = low[i] / scale_high, high[i] / scale_low
                k = np.ceil(least)
                if k > greatest:
                    break
                if k + 1 <= greatest:
                    fault = 2
                    break
                found[i] = k
                chance *= min(1.0, greatest - least)
                if k % smallest != 0:
                    chance_of_rest *= min(1.0, greatest - least)
                scale_low = max(scale_low, low[i] / k)
                scale_high = min(scale_high, high[i] / k)
                i += 1
            if i == distinct:
                # Among so many tries one may fit by chance, so that a single wrong value would multiply all counts of its cell.
                fault = 0 if smallest == 1 or chance_of_rest <= 0.001 else 1
                bits[row] = -np.log2(max(chance, 1e-300))
                scales[row] = (scale_low + scale_high) / 2
                break
            if fault == 2:
                break
        faults[row] = fault
        if fault:
            continue
        k = -1
        last = 0.0
        for i in order:
            v = values[start + i]
            if v == last:
                if v != 0.0:
                    counts[start + i] = found[k]
                continue
            last = v
            k += 1
            counts[start + i] = found[k]
    return counts, faults, bits, scales
