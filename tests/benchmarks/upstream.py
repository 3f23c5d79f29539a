"""The tokenizing procedures of the original releases, for comparisons of speed.

Written from the description of what they compute, step by step and in their manner: loops over cells, dense rows where they have them.
"""

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

CHUNK = 512


def geneformer(
    counts: sp.csr_matrix, columns: NDArray[np.int64], tokens: NDArray[np.int64], medians: NDArray[np.float64], longest: int
) -> Any:
    """Rank genes chunk by chunk, then cut the rows of a ``datasets`` table one by one, where that package is installed."""
    totals = np.asarray(counts.sum(axis=1))
    cells: list[NDArray[np.int64]] = []
    for start in range(0, counts.shape[0], CHUNK):
        part = counts[start : start + CHUNK][:, columns]
        normalised = sp.csr_matrix(sp.csr_matrix(part / totals[start : start + CHUNK] * 10_000) / medians)
        for i in range(normalised.shape[0]):
            row = normalised[i]
            cells.append(tokens[row.indices][np.argsort(-row.data)])
    try:
        from datasets import Dataset, disable_progress_bars
    except ImportError:
        return [cell[:longest] for cell in cells]
    disable_progress_bars()

    def cut(example: dict[str, Any]) -> dict[str, Any]:
        example["input_ids"] = example["input_ids"][:longest]
        example["length"] = len(example["input_ids"])
        return example

    return Dataset.from_dict({"input_ids": cells}).map(cut, load_from_cache_file=False, keep_in_memory=True)


def bare_argsort(counts: sp.csr_matrix, columns: NDArray[np.int64], medians: NDArray[np.float64]) -> Any:
    """Rank genes of one row after the other, and nothing else."""
    values = counts.data / medians[counts.indices]
    return [np.argsort(-values[a:b]) for a, b in zip(counts.indptr[:-1], counts.indptr[1:], strict=True)]


def scgpt(counts: sp.csr_matrix, tokens: NDArray[np.int64], longest: int) -> Any:
    """Bin every cell at its own quantiles, ties at random; a random sample of too long cells."""
    rng, dense, cells = np.random.default_rng(0), counts.toarray(), []
    for row in dense:
        genes = np.flatnonzero(row)
        values = row[genes]
        edges = np.quantile(values, np.linspace(0, 1, 50))
        left, right = np.digitize(values, edges), np.digitize(values, edges, right=True)
        bins = np.ceil(rng.random(len(values)) * (right - left) + left).astype(np.int64)
        ids = tokens[genes]
        if len(ids) >= longest:
            kept = rng.permutation(len(ids))[: longest - 1]
            ids, bins = ids[kept], bins[kept]
        cells.append((np.insert(ids, 0, 0), np.insert(bins, 0, -2)))
    return cells


def uce(counts: sp.csr_matrix, chromosomes: NDArray[np.int32], starts: NDArray[np.int64]) -> Any:
    """Draw 1,024 genes of each cell and write them out chromosome by chromosome."""
    rng, genes, sentences = np.random.RandomState(0), np.arange(counts.shape[1]), []
    for i in range(counts.shape[0]):
        weights = np.log1p(counts[i].toarray().ravel())
        weights = weights / weights.sum()
        weights = weights / sum(weights)  # Python's own, one by one: the release normalises a second time
        chosen = rng.choice(genes, size=1024, p=weights, replace=True)
        of_chosen = chromosomes[chosen]
        order = np.argsort(of_chosen)
        chosen, of_chosen = chosen[order], of_chosen[order]
        distinct = np.unique(of_chosen)
        rng.shuffle(distinct)
        sentence, n = np.zeros(1536, dtype=np.int64), 1
        for chromosome in distinct:
            sentence[n] = chromosome + 143_574
            here = chosen[np.where(of_chosen == chromosome)[0]]
            here = here[np.argsort(starts[here])]
            sentence[n + 1 : n + 1 + len(here)] = here
            n += len(here) + 2
            sentence[n - 1] = 2
        sentences.append(sentence[:n])
    return sentences
