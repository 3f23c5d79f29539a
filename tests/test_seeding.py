"""Random numbers that belong to a cell."""

import numpy as np
import numpy.typing as npt

from cellfm_hub.seeding import advance, row_seeds, splitmix64, uniform


def test_splitmix64_is_the_published_generator() -> None:
    """The first numbers of the reference implementation (xoshiro.di.unimi.it/splitmix64.c) for seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [splitmix64(np.uint64(advance(np.uint64(1234567), n))) for n in range(5)] == expected


def test_uniform() -> None:
    draws = np.array([uniform(np.uint64(advance(np.uint64(3), n))) for n in range(20_000)])
    assert 0 <= draws.min() < draws.max() < 1
    observed, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert ((observed - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def seeds(rows: list[list[tuple[int, float]]], seed: int = 0, dtype: npt.DTypeLike = np.float64) -> list[int]:
    flat = [pair for row in rows for pair in row]
    offsets = np.cumsum([0, *map(len, rows)])
    return row_seeds(np.array([t for t, _ in flat], np.int32), np.array([c for _, c in flat], dtype), offsets, seed).tolist()


PINNED = [3054691870125212559, 6389961666004307139, 6791897765849424158]
"""Seeds of three cells; where they change, so do the draws of scGPT and UCE: see CHANGELOG, "Vectors changed"."""


def test_row_seeds() -> None:
    """Content and seed decide; order, place and dtype do not."""
    cell = [(3, 1.0), (7, 2.0), (7, 1.0), (9, 4.0)]
    [own] = seeds([cell])
    assert seeds([[(1, 1.0)], [], cell[::-1]])[2] == own
    assert seeds([cell], dtype=np.float32) == [own]
    assert seeds([cell], dtype=np.int32) == [own]
    assert seeds([cell, cell[:1], []], seed=1) == PINNED
    others = [cell[:-1], [*cell, cell[-1]], [(3, 2.0), (7, 1.0), (7, 1.0), (9, 4.0)], [(3, 1.0), (7, 2.0), (8, 1.0), (9, 4.0)], []]
    assert len({own, *seeds(others), *seeds([cell], seed=1), *seeds([cell], seed=-1)}) == 8
