"""Random numbers that belong to a cell: drawn from its own content and the user's seed, never from its place in a file.

The generator is SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195). Its n-th number is a plain function of the seed
and n, so that a draw can be tied to a gene instead of to the order in which genes are visited.
"""

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.kernels import compiled

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S11, _S27, _S30, _S31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)  # numba: uint64 with a signed number gives a float


@compiled
def splitmix64(state: np.uint64) -> np.uint64:
    """Return the number that SplitMix64 gives in a state: 64 random bits."""
    z = np.uint64(state) + _GAMMA
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@compiled
def advance(state: np.uint64, steps: int) -> np.uint64:
    """Return the state after so many numbers."""
    return np.uint64(state) + np.uint64(steps) * _GAMMA


@compiled
def uniform(state: np.uint64) -> float:
    """Return the number of a state as a float64 in [0, 1), a multiple of 2^-53.

    ``uniform(advance(seed, n))`` is the n-th number of a stream.
    """
    return float(splitmix64(state) >> _S11) * 2.0**-53


@compiled
def _row_seeds(tokens: NDArray[np.int64], bits: NDArray[np.uint64], offsets: NDArray[np.int64], seed: np.uint64) -> NDArray[np.uint64]:
    seeds = np.empty(len(offsets) - 1, dtype=np.uint64)
    for row in range(len(seeds)):
        content = np.uint64(0)
        for i in range(offsets[row], offsets[row + 1]):
            # A sum does not depend on the order of its terms, and counts repeated ones.
            content += splitmix64(splitmix64(np.uint64(tokens[i])) ^ bits[i])
        seeds[row] = splitmix64(content ^ splitmix64(seed))
    return seeds


def row_seeds(tokens: NDArray[np.integer], counts: NDArray[np.floating], offsets: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Give every cell a seed of its own: a hash of its (gene, count) pairs in any order, and of the user's seed.

    Parameters
    ----------
    tokens
        ``(total,)`` token id of each known gene of each cell, packed end to end.
    counts
        ``(total,)`` its raw count; the number counts, not the dtype it is stored in.
    offsets
        ``(n + 1,)`` where cells begin and end.
    seed
        The user's.

    Returns
    -------
    ``(n,)`` uint64.
    """
    bits = np.ascontiguousarray(counts, dtype=np.float64).view(np.uint64)
    return _row_seeds(np.asarray(tokens, dtype=np.int64), bits, np.asarray(offsets, dtype=np.int64), np.uint64(seed & (2**64 - 1)))
