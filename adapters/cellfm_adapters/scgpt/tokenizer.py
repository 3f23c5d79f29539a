"""A cell is the list of its genes, each with its expression as one of 50 bins that are cut anew in every cell.

Follows ``embed_data`` and ``DataCollator`` of the original release (``scgpt/tasks/cell_emb.py``, ``scgpt/data_collator.py``), with the
random numbers drawn from the cell's own content instead of from the process's generators.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.kernels import argsort_rows_descending, compiled, longest_row
from cellfm_hub.seeding import advance, row_seeds, uniform
from cellfm_hub.tokens import Tokens, offsets_from_lengths

Ties = Literal["seeded", "upper"]

SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")
"""Appended to a vocabulary that lacks them, in this order, as the original does."""

_QUANTILES = np.linspace(0, 1, 50)
"""51 "bins" of the original: 50 edges, bins 1 to 50."""

TOGETHER = 256
"""Cells that are worked on together: what is made on the way stays in the processor's cache."""

_SAMPLES = 2**40
"""Where in a cell's stream of random numbers those of the sample stand, behind those of the ties."""


class Vocabulary:
    """The tokens of a checkpoint: gene symbols, as CELLxGENE writes them, and three special ones.

    Parameters
    ----------
    tokens
        The contents of ``vocab.json``: token -> id, in any order.
    origin
        For messages.
    """

    def __init__(self, tokens: Mapping[str, int], origin: str) -> None:
        self.ids = dict(tokens)
        if any(type(i) is not int for i in self.ids.values()) or sorted(self.ids.values()) != list(range(len(self.ids))):
            msg = f"vocab.json of {origin} does not number its {len(self.ids):,} entries 0, 1, 2, …; use the file of the release"
            raise CheckpointFormatError(msg)
        for token in SPECIAL_TOKENS:
            self.ids.setdefault(token, len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens."""
        return tuple(self.ids[token] for token in SPECIAL_TOKENS)

    def as_array(self) -> NDArray[np.str_]:
        """Return the token of each id, ``(V,)``."""
        return np.array(sorted(self.ids, key=self.ids.__getitem__))


class Tokenizer:
    """Turns counts into genes with bins.

    Parameters
    ----------
    vocabulary
        Of the checkpoint.
    pad_value
        The value at ``<cls>``.
    max_length
        Longest row, ``<cls>`` included.
    ties
        Where several edges fall on one count, its genes may take any of the bins between them. ``"seeded"``: each gene draws one, as in
        training; ``"upper"``: all take the highest.
    """

    def __init__(self, vocabulary: Vocabulary, pad_value: float, max_length: int, ties: Ties) -> None:
        self.vocabulary = vocabulary
        self.pad_value, self.max_length, self.ties = pad_value, max_length, ties

    def match_genes(self, ids: Sequence[str]) -> GeneMap:
        """Map symbols to tokens, exactly as written. Columns of the same symbol stay apart, each with its own token."""
        known = self.vocabulary.ids
        columns = np.array([i for i, symbol in enumerate(ids) if symbol in known and symbol not in SPECIAL_TOKENS], dtype=np.int64)
        tokens = np.array([known[ids[i]] for i in columns], dtype=np.int32)
        return GeneMap(columns, np.arange(len(columns)), tokens, len(ids))

    def tokenize(self, counts: CountMatrix, genes: GeneMap, seed: int) -> Tokens:
        """Bin the counts of each cell, then keep a random sample of its genes if it has too many, and put ``<cls>`` in front."""
        cells = range(0, max(counts.shape[0], 1), TOGETHER)
        copies = len(np.unique(genes.tokens)) < len(genes.tokens)
        return Tokens.concatenate([self._tokenize(counts[start : start + TOGETHER], genes, seed, copies=copies) for start in cells])

    def _tokenize(self, counts: CountMatrix, genes: GeneMap, seed: int, *, copies: bool) -> Tokens:
        tokens = genes.tokens[counts.indices]
        offsets = counts.indptr.astype(np.int64)
        expressed = np.diff(offsets)
        numbers = counts.data.astype(np.float32).astype(np.float64)  # the original bins float32 numbers
        order = argsort_rows_descending(numbers, offsets)

        seeds = row_seeds(tokens, counts.data, offsets, seed)
        places = tokens.astype(np.int64)
        if copies:
            places = number_copies(tokens, order, offsets, len(self.vocabulary))
        draws = draw(seeds, places, offsets) if self.ties == "seeded" else np.zeros(len(tokens))
        bins = bin_rows(numbers, order, offsets, draws)

        limit = self.max_length - 1  # <cls> counts
        cut = np.maximum(expressed - limit, 0)
        chosen = sample_rows(seeds, places, offsets, limit) if cut.any() else None
        return self.frame(tokens, bins, expressed, cut=cut, chosen=chosen)

    def frame(
        self,
        tokens: NDArray[np.int32],
        bins: NDArray[np.float32],
        lengths: NDArray[np.int64],
        *,
        cut: NDArray[np.int64],
        chosen: NDArray[np.bool_] | None = None,
    ) -> Tokens:
        """Put ``<cls>`` in front of every cell that has genes; `chosen` says which entries stay where `cut` are left out."""
        framed = offsets_from_lengths(lengths - cut + (lengths > 0))
        ids, values = np.empty(framed[-1] + 1, dtype=np.int32), np.empty(framed[-1] + 1, dtype=np.float32)
        ids[0], values[0] = self.vocabulary.ids["<cls>"], self.pad_value
        frame_rows(tokens, bins, np.ones(len(tokens), np.bool_) if chosen is None else chosen, offsets_from_lengths(lengths), ids, values)
        return Tokens(ids=ids[:-1], values=values[:-1], offsets=framed, cut=cut)


@compiled
def bin_rows(
    values: NDArray[np.float64], order: NDArray[np.int64], offsets: NDArray[np.int64], draws: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Cut each row of positive numbers at its own 50 quantiles, as ``numpy.quantile`` computes them from float32, to the bit.

    With L edges at or below a value and R of them below it, its bin is L, or where R + 1 < L any of R + 1 … L.

    Parameters
    ----------
    values
        ``(total,)``, exact in float32.
    order
        ``(total,)`` indices into `values`: each row sorted, largest first.
    offsets
        ``(n + 1,)``.
    draws
        ``(total,)`` in [0, 1): 0 gives bin L.

    Returns
    -------
    ``(total,)`` whole numbers from 1 to 50.
    """
    bins = np.empty(len(values), dtype=np.float32)
    edges = np.empty(len(_QUANTILES))
    for row in range(len(offsets) - 1):
        start, stop = offsets[row], offsets[row + 1]
        last = stop - start - 1
        if last < 0:
            continue
        for k in range(len(edges)):
            position = last * _QUANTILES[k]
            below = int(position)
            share = position - below
            a = values[order[stop - 1 - below]]
            b = values[order[max(start, stop - 2 - below)]]
            step = np.float64(np.float32(b) - np.float32(a))
            # From the nearer side, as numpy does: where the position is a whole number but for rounding (50 or 99 genes), the other sum
            # can reach b itself, and the edge would count as one of the ties.
            edges[k] = a + step * share if share < 0.5 else b - step * (1 - share)
        up_to = len(edges)  # L: edges that do not exceed the value
        i = start
        while i < stop:
            value = values[order[i]]
            while up_to > 0 and edges[up_to - 1] > value:
                up_to -= 1
            under = up_to  # R: edges below the value
            while under > 0 and edges[under - 1] >= value:
                under -= 1
            while i < stop and values[order[i]] == value:
                bins[order[i]] = up_to - int(draws[order[i]] * (up_to - under))
                i += 1
    return bins


@compiled
def number_copies(tokens: NDArray[np.int32], order: NDArray[np.int64], offsets: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Give every gene of a cell a number of its own: its token id, plus `size` for each larger copy of the same gene in the cell."""
    numbers = np.empty(len(tokens), dtype=np.int64)
    copies = np.zeros(size, dtype=np.int64)
    for row in range(len(offsets) - 1):
        for i in order[offsets[row] : offsets[row + 1]]:
            numbers[i] = tokens[i] + size * copies[tokens[i]]
            copies[tokens[i]] += 1
        copies[tokens[offsets[row] : offsets[row + 1]]] = 0
    return numbers


@compiled
def draw(seeds: NDArray[np.uint64], places: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give every entry the number in [0, 1) that stands at its place in the stream of its cell."""
    draws = np.empty(len(places))
    for row in range(len(seeds)):
        for i in range(offsets[row], offsets[row + 1]):
            draws[i] = uniform(advance(seeds[row], places[i]))
    return draws


@compiled
def sample_rows(seeds: NDArray[np.uint64], places: NDArray[np.int64], offsets: NDArray[np.int64], limit: int) -> NDArray[np.bool_]:
    """Choose `limit` entries of each longer row, uniformly and without replacement: those that draw the largest numbers.

    Of entries that draw the same number the first goes first. Nothing is sorted: a histogram tells from which number on entries are
    chosen, but for the few that share its bar.
    """
    chosen = np.ones(len(places), dtype=np.bool_)
    bars = np.empty(2048, dtype=np.int64)
    draws = np.empty(longest_row(offsets))
    for row in range(len(seeds)):
        start, length = offsets[row], offsets[row + 1] - offsets[row]
        if length <= limit:
            continue
        bars[:] = 0
        for i in range(length):
            draws[i] = uniform(advance(seeds[row], places[start + i] + _SAMPLES))
            bars[int(draws[i] * 2048)] += 1
        missing, bar = limit, 2047
        while bars[bar] <= missing:
            missing -= bars[bar]
            bar -= 1
        for i in range(length):
            chosen[start + i] = int(draws[i] * 2048) > bar
        for _ in range(missing):
            largest = -1
            for i in range(length):
                if int(draws[i] * 2048) == bar and not chosen[start + i] and (largest < 0 or draws[i] > draws[largest]):
                    largest = i
            chosen[start + largest] = True
    return chosen


@compiled
def frame_rows(
    tokens: NDArray[np.int32],
    bins: NDArray[np.float32],
    chosen: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    ids: NDArray[np.int32],
    values: NDArray[np.float32],
) -> None:
    """Write the chosen entries of each row that has any behind the first token, which `ids` and `values` begin with, a copy for each row.

    There must be room for one more.
    """
    cls, pad, place = ids[0], values[0], 0
    for row in range(len(offsets) - 1):
        start, stop = offsets[row], offsets[row + 1]
        if start < stop:
            ids[place], values[place] = cls, pad
            place += 1
        for i in range(start, stop):
            ids[place], values[place] = tokens[i], bins[i]  # without a branch, which half the time would go the other way
            place += chosen[i]
