"""Tokenizers that work as those of the original releases do, for comparisons of speed. They are not the original code.

Written from the description of what the releases compute, step by step and in their manner: loops over cells, dense rows where they
have them. On the machine of ``results/cpu.json``, on the cells of ``cpu.py``, they need less time than the original code (scGPT and UCE
as of November 2026, Geneformer as copied in jkobject/geneformer): 0.62 of it for Geneformer, 0.96 for scGPT, 0.82 for UCE. A ratio to
them is therefore on the low side.
"""

import tempfile
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

CHUNK = 512


def geneformer(adata: Any, tokens: NDArray[np.int64], medians: NDArray[np.float64], longest: int) -> None:
    """Rank genes chunk by chunk, then cut the rows of a ``datasets`` table one by one and save it, where that package is installed."""
    cells: list[NDArray[np.int64]] = []
    known = np.arange(adata.n_vars)
    for start in range(0, adata.n_obs, CHUNK):
        chunk = np.arange(start, min(start + CHUNK, adata.n_obs))
        totals = adata[chunk].obs["n_counts"].to_numpy()[:, None]
        part = adata[chunk, :].X[:, known]
        normalised = sp.csr_matrix(part / totals * 10_000 / medians)
        cells += [_rank(normalised[i].data, tokens[normalised[i].indices]) for i in range(normalised.shape[0])]
    try:
        from datasets import Dataset, disable_progress_bars
    except ImportError:
        return
    disable_progress_bars()

    def cut(example: dict[str, Any]) -> dict[str, Any]:
        example["input_ids"] = example["input_ids"][:longest]
        example["length"] = len(example["input_ids"])
        return example

    with tempfile.TemporaryDirectory() as folder:
        Dataset.from_dict({"input_ids": cells}).map(cut, load_from_cache_file=False).save_to_disk(folder)


def _rank(values: NDArray[np.float64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    return tokens[np.argsort(-values)]


def bare_argsort(counts: sp.csr_matrix, medians: NDArray[np.float64]) -> Any:
    """Rank genes of one row after the other, and nothing else."""
    values = counts.data / medians[counts.indices]
    return [np.argsort(-values[a:b]) for a, b in zip(counts.indptr[:-1], counts.indptr[1:], strict=True)]


def scgpt(counts: sp.csr_matrix, tokens: NDArray[np.int64], longest: int, rows: int = 64) -> Any:
    """Bin every cell at its own quantiles, ties at random; a random sample of too long cells; padded batches, in one process."""
    dense, batches = counts.toarray(), []
    for start in range(0, len(dense), rows):
        examples = []
        for row in dense[start : start + rows]:
            genes = np.nonzero(row)[0]
            ids = torch.from_numpy(np.insert(tokens[genes], 0, 0)).long()
            values = torch.from_numpy(np.insert(row[genes], 0, -2)).float()
            values[1:] = torch.from_numpy(_bins(values[1:].numpy())).float()
            examples.append((ids, values))
        width = min(longest, max(len(ids) for ids, _ in examples))
        padded = []
        for ids, values in examples:
            if len(ids) > width:
                kept = torch.cat((torch.zeros(1, dtype=torch.long), torch.randperm(len(ids) - 1)[: width - 1] + 1))
                ids, values = ids[kept], values[kept]
            padded.append((_pad(ids, width, 0), _pad(values, width, -2)))
        batches.append((torch.stack([ids for ids, _ in padded]), torch.stack([values for _, values in padded])))
    return batches


def _bins(values: NDArray[np.float32]) -> NDArray[np.int64]:
    edges = np.quantile(values, np.linspace(0, 1, 50))
    left, right = np.digitize(values, edges), np.digitize(values, edges, right=True)
    digits: NDArray[np.int64] = np.ceil(np.random.rand(len(values)) * (right - left) + left).astype(np.int64)  # noqa: NPY002
    return digits


def _pad(x: torch.Tensor, width: int, fill: float) -> torch.Tensor:
    return torch.cat((x, torch.full((width - len(x),), fill, dtype=x.dtype)))


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
