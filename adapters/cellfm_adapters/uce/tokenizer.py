"""The sentence of a cell: 1,024 of its genes, drawn by expression, grouped by chromosome.

Follows ``sample_cell_sentences`` of the original release (``eval_data.py``). Genes are drawn independently, with replacement, with
probabilities proportional to log(1 + count). The distinct chromosomes among them are shuffled; each is spelled as its own token, its drawn
genes in the order of their starts, repeats side by side, and an end token::

    <cls>  chromosome 7  gene gene gene  <chromosome end>  chromosome X  gene gene  <chromosome end>  …
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellfm_adapters.uce.species import CHROMOSOME_END, CLS, Species
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.kernels import compiled
from cellfm_hub.seeding import advance, row_seeds, uniform
from cellfm_hub.tokens import Tokens, offsets_from_lengths

SAMPLE_SIZE = 1024
"""Genes of a sentence."""
STREAM = 2 * SAMPLE_SIZE
"""Random numbers that belong to a sentence: one for each gene, then one for each chromosome but the last."""


@dataclass(frozen=True, kw_only=True)
class PlacedGenes(GeneMap):
    """Columns of a matrix and the genes they feed, which stand in the order of chromosome, start, row.

    Parameters
    ----------
    chromosomes
        ``(g,)`` code of the chromosome of each gene.
    """

    chromosomes: NDArray[np.int32]


def place_genes(ids: Sequence[str], species: Species, note: str | None = None) -> PlacedGenes:
    """Map the columns of a matrix, named by gene symbols in any case, to the genes of a species.

    Genes without a protein, or without a known chromosome, are left out. A symbol that stands twice stays two columns, as in the original.
    `note` is passed on to the user.
    """
    places = species.places
    known = [(column, places[symbol]) for column, symbol in enumerate(map(str.upper, ids)) if symbol in places]
    columns, genes = np.array(known, dtype=np.int64).reshape(-1, 2).T
    placed = species.chromosomes[genes] >= 0
    columns, genes = columns[placed], genes[placed]
    order = np.lexsort((genes, species.starts[genes], species.chromosomes[genes]))
    targets = np.empty(len(order), dtype=np.int64)
    targets[order] = np.arange(len(order))
    without = len(placed) - len(columns)
    return PlacedGenes(
        columns=columns,
        targets=targets,
        tokens=(species.first_row + genes[order]).astype(np.int32),
        n_columns=len(ids),
        facts={"species": species.name, "species_evidence": note or "as asked for", "genes_without_chromosome": without},
        notes=(note,) if note else (),
        chromosomes=species.chromosomes[genes[order]],
    )


@compiled
def draw_genes(
    weights: NDArray[np.float64],
    genes: NDArray[np.int32],
    offsets: NDArray[np.int64],
    cells: NDArray[np.int64],
    streams: NDArray[np.uint64],
) -> NDArray[np.int32]:
    """Draw genes with probabilities proportional to their weights.

    Parameters
    ----------
    weights, genes
        ``(total,)`` weight of each expressed gene of each cell, and which gene it is, ascending in each cell.
    offsets
        ``(n + 1,)`` where cells begin and end.
    cells, streams
        ``(s,)`` for each sentence, a cell that is not empty and the state of its random numbers.

    Returns
    -------
    ``(s, 1024)`` genes, ascending in each sentence.
    """
    drawn = np.empty((len(cells), SAMPLE_SIZE), dtype=np.int32)
    longest = 0
    for cell in cells:
        longest = max(longest, offsets[cell + 1] - offsets[cell])
    below = np.empty(longest, dtype=np.float64)
    times = np.zeros(longest, dtype=np.int64)
    for sentence in range(len(cells)):
        start = offsets[cells[sentence]]
        length = offsets[cells[sentence] + 1] - start
        total = 0.0
        for i in range(length):
            total += weights[start + i]
            below[i] = total
        for n in range(SAMPLE_SIZE):
            x = uniform(advance(streams[sentence], n)) * total
            low, high = 0, length - 1  # the first gene with x < below
            while low < high:
                middle = (low + high) // 2
                if x < below[middle]:
                    high = middle
                else:
                    low = middle + 1
            times[low] += 1
        n = 0
        for i in range(length):
            for _ in range(times[i]):
                drawn[sentence, n] = genes[start + i]
                n += 1
            times[i] = 0
    return drawn


@compiled
def streams_of(seeds: NDArray[np.uint64], samples: int) -> NDArray[np.uint64]:
    """Return where the random numbers of each sentence begin, ``(n,) -> (n * samples,)``."""
    streams = np.empty(len(seeds) * samples, dtype=np.uint64)
    for i in range(len(streams)):
        streams[i] = advance(seeds[i // samples], i % samples * STREAM)
    return streams


@compiled
def uniform_numbers(streams: NDArray[np.uint64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the number of each stream after so many others."""
    numbers = np.empty(len(streams), dtype=np.float64)
    for i in range(len(streams)):
        numbers[i] = uniform(advance(streams[i], steps[i]))
    return numbers


@dataclass(frozen=True)
class Runs:
    """The drawn genes of one chromosome in one sentence; all ``(r,)``, by sentence, then chromosome.

    Parameters
    ----------
    sentences
        Which sentence.
    codes
        Which chromosome.
    starts, lengths
        Where its genes stand among all drawn genes, and how many they are.
    """

    sentences: NDArray[np.int64]
    codes: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def find(cls, drawn: NDArray[np.int32], genes: PlacedGenes) -> "Runs":
        """Find the chromosomes in drawn genes, ``(s, 1024)``: genes in ascending order are in the order of chromosomes."""
        codes = genes.chromosomes[drawn]
        begins = np.ones(codes.shape, dtype=bool)
        begins[:, 1:] = codes[:, 1:] != codes[:, :-1]
        starts = np.flatnonzero(begins)
        return cls(starts // SAMPLE_SIZE, codes.ravel()[starts], starts, np.diff(starts, append=codes.size))

    def shuffle(self, streams: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the runs in the order in which each sentence spells them: sorted by one random number each."""
        first = np.searchsorted(self.sentences, self.sentences)
        place = np.arange(len(first)) - first
        return np.lexsort((uniform_numbers(streams[self.sentences], SAMPLE_SIZE + place), self.sentences))

    def take(self, order: NDArray[np.int64]) -> "Runs":
        """Return runs in another order."""
        return Runs(self.sentences[order], self.codes[order], self.starts[order], self.lengths[order])


def spell(drawn: NDArray[np.int32], runs: Runs, genes: PlacedGenes, *, first_chromosome: int, max_tokens: int) -> Tokens:
    """Write sentences.

    Parameters
    ----------
    drawn
        ``(s, 1024)`` drawn genes, ascending.
    runs
        Their chromosomes in the order in which to spell them.
    genes
        Token and chromosome of each gene.
    first_chromosome
        Row of the first chromosome in the token table.
    max_tokens
        Longest sentence. Where more distinct chromosomes are drawn than always fit (255 in the published models), those that come last
        are left out.
    """
    first = np.searchsorted(runs.sentences, runs.sentences)
    fits = np.arange(len(first)) - first < (max_tokens - 1 - SAMPLE_SIZE) // 2
    spelled = runs.lengths + 2  # chromosome, genes, end
    cut = np.bincount(runs.sentences, weights=np.where(fits, 0, spelled), minlength=len(drawn))
    offsets = offsets_from_lengths(1 + np.bincount(runs.sentences, weights=np.where(fits, spelled, 0), minlength=len(drawn)))

    runs, spelled = runs.take(np.flatnonzero(fits)), spelled[fits]
    ids = np.empty(offsets[-1], dtype=np.int32)
    ids[offsets[:-1]] = CLS
    at = offsets_from_lengths(spelled)[:-1] + runs.sentences + 1  # as many <cls> stand before it
    _write_runs(ids, at, first_chromosome + runs.codes, runs.starts, runs.lengths, drawn.ravel(), genes.tokens)
    return Tokens(ids=ids, offsets=offsets, cut=cut)


@compiled
def _write_runs(
    ids: NDArray[np.int32],
    at: NDArray[np.int64],
    chromosomes: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    drawn: NDArray[np.int32],
    tokens: NDArray[np.int32],
) -> None:
    for run in range(len(at)):
        place = at[run]
        ids[place] = chromosomes[run]
        for n in range(lengths[run]):
            ids[place + 1 + n] = tokens[drawn[starts[run] + n]]
        ids[place + 1 + lengths[run]] = CHROMOSOME_END


def tokenize(counts: CountMatrix, genes: PlacedGenes, seed: int, *, samples: int, first_chromosome: int, max_tokens: int) -> Tokens:
    """Draw `samples` sentences of each cell from its own counts and the seed; a cell without genes has empty ones.

    The first sentences of a cell are the same however many are drawn.
    """
    starts = counts.indptr.astype(np.int64)
    seeds = row_seeds(genes.tokens[counts.indices], counts.data, starts, seed)
    cells = np.repeat(np.arange(counts.shape[0]), samples)
    filled = np.flatnonzero(np.diff(starts)[cells])
    streams = streams_of(seeds, samples)[filled]
    drawn = draw_genes(np.log1p(counts.data, dtype=np.float64), counts.indices, starts, cells[filled], streams)
    runs = Runs.find(drawn, genes)
    sentences = spell(drawn, runs.take(runs.shuffle(streams)), genes, first_chromosome=first_chromosome, max_tokens=max_tokens)

    lengths, cut = np.zeros(len(cells), dtype=np.int64), np.zeros(len(cells), dtype=np.int64)
    assert sentences.cut is not None
    lengths[filled], cut[filled] = sentences.lengths, sentences.cut
    return Tokens(ids=sentences.ids, offsets=offsets_from_lengths(lengths), cut=cut, rows=cells if samples > 1 else None)
