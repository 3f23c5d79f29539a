"""Procedures that work as those of the original releases do, for comparisons of speed. They are not the original code.

Written from the description of what the releases compute, step by step and in their manner: loops over cells, dense rows where they
have them, a fixed number of cells a batch, the attention and the heads they run. On the machine of ``results/cpu.json``, on the cells of
``cpu.py``, the tokenizers need less time than the original code (scGPT and UCE as of November 2026, Geneformer as copied in
jkobject/geneformer): 0.62 of it for Geneformer, 0.96 for scGPT, 0.82 for UCE. A ratio to them is therefore on the low side.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 512


# Geneformer


def geneformer(adata: Any, known: NDArray[np.int64], tokens: NDArray[np.int64], medians: NDArray[np.float64], longest: int) -> list[Any]:
    """Rank genes chunk by chunk, then cut the rows one by one, in a ``datasets`` table that is saved where that package is installed."""
    cells: list[NDArray[np.int64]] = []
    for start in range(0, adata.n_obs, CHUNK):
        chunk = np.arange(start, min(start + CHUNK, adata.n_obs))
        totals = adata[chunk].obs["n_counts"].to_numpy()[:, None]
        part = adata[chunk, :].X[:, known]
        normalised = sp.csr_matrix(part / totals * 10_000 / medians)
        cells += [_rank(normalised[i].data, tokens[normalised[i].indices]) for i in range(normalised.shape[0])]
    _save_dataset(cells, longest)
    return [cell[:longest] for cell in cells]


def _save_dataset(cells: list[NDArray[np.int64]], longest: int) -> None:
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


def geneformer_file(path: Path, dictionary: Mapping[str, tuple[int, float]], longest: int) -> list[Any]:
    """Read a file, see whether ids are to be summed (none is), find those that have a token, and tokenize.

    `dictionary`: Ensembl id -> token and median.
    """
    adata = ad.read_h5ad(path)
    ids, current = adata.var["ensembl_id"], {gene: gene for gene in dictionary}
    recognised = {gene for gene in ids if gene in dictionary}
    targets = {current.get(gene.upper()) for gene in ids} & dictionary.keys()
    assert len(recognised) == len(targets)
    adata.var["ensembl_id_collapsed"] = ids.map(current)
    known = np.where([gene in dictionary for gene in ids])[0]
    tokens = np.array([dictionary[gene][0] for gene in ids.iloc[known]])
    medians = np.array([dictionary[gene][1] for gene in ids.iloc[known]])
    return geneformer(adata, known, tokens, medians, longest)


def geneformer_vectors(
    path: Path, dictionary: Mapping[str, tuple[int, float]], longest: int, checkpoint: Path, out: Path, rows: int
) -> NDArray[np.float32]:
    """Tokenize a file; run BERT with its language-model head (SDPA), longest cells first, `rows` a batch; average the second to last layer.

    The table goes into a ``.csv``. The vectors are returned in the order of the file.
    """
    from transformers import BertForMaskedLM

    cells = geneformer_file(path, dictionary, longest)
    model = BertForMaskedLM.from_pretrained(checkpoint, output_hidden_states=True, output_attentions=False).eval()
    assert model.config._attn_implementation == "sdpa"  # what transformers takes unless it is told otherwise
    order = sorted(range(len(cells)), key=lambda i: len(cells[i]), reverse=True)
    pooled = []
    for start in range(0, len(order), rows):
        batch = [torch.from_numpy(cells[i]) for i in order[start : start + rows]]
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)
        lengths = torch.tensor([len(cell) for cell in batch])
        there = torch.arange(ids.shape[1]) < lengths[:, None]
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=there.long()).hidden_states[-2]
        pooled.append((hidden * there[:, :, None]).sum(1) / lengths[:, None])
    vectors = torch.cat(pooled).numpy()
    pd.DataFrame(vectors).to_csv(out)
    in_file_order: NDArray[np.float32] = vectors[np.argsort(order)]
    return in_file_order


def bare_argsort(counts: sp.csr_matrix, medians: NDArray[np.float64]) -> Any:
    """Rank genes of one row after the other, and nothing else."""
    values = counts.data / medians[counts.indices]
    return [np.argsort(-values[a:b]) for a, b in zip(counts.indptr[:-1], counts.indptr[1:], strict=True)]


# scGPT


def scgpt(counts: sp.csr_matrix, tokens: NDArray[np.int64], longest: int, *, cls: int, padding: int, rows: int = 64) -> Any:
    """Bin every cell at its own quantiles, ties at random; a random sample of too long cells; padded batches, in one process."""
    dense, batches = counts.toarray(), []
    for start in range(0, len(dense), rows):
        examples = []
        for row in dense[start : start + rows]:
            genes = np.nonzero(row)[0]
            ids = torch.from_numpy(np.insert(tokens[genes], 0, cls)).long()
            values = torch.from_numpy(np.insert(row[genes], 0, -2)).float()
            values[1:] = torch.from_numpy(_bins(values[1:].numpy())).float()
            examples.append((ids, values))
        width = min(longest, max(len(ids) for ids, _ in examples))
        padded = []
        for ids, values in examples:
            if len(ids) > width:
                kept = torch.cat((torch.zeros(1, dtype=torch.long), torch.randperm(len(ids) - 1)[: width - 1] + 1))
                ids, values = ids[kept], values[kept]
            padded.append((_pad(ids, width, padding), _pad(values, width, -2)))
        batches.append((torch.stack([ids for ids, _ in padded]), torch.stack([values for _, values in padded])))
    return batches


def _bins(values: NDArray[np.float32]) -> NDArray[np.int64]:
    edges = np.quantile(values, np.linspace(0, 1, 50))
    left, right = np.digitize(values, edges), np.digitize(values, edges, right=True)
    digits: NDArray[np.int64] = np.ceil(np.random.rand(len(values)) * (right - left) + left).astype(np.int64)  # noqa: NPY002
    return digits


def _pad(x: torch.Tensor, width: int, fill: float) -> torch.Tensor:
    return torch.cat((x, torch.full((width - len(x),), fill, dtype=x.dtype)))


def scgpt_file(path: Path, vocabulary: Mapping[str, int], longest: int) -> Any:
    """Read a file, keep the genes of the vocabulary, and tokenize."""
    adata = ad.read_h5ad(path)
    ids = np.array([vocabulary.get(gene, -1) for gene in adata.var_names])
    adata = adata[:, ids >= 0]
    return scgpt(adata.X, ids[ids >= 0], longest, cls=vocabulary["<cls>"], padding=vocabulary["<pad>"])


class ScGPT(nn.Module):
    """The network of the release without flash-attention: in evaluation on a CPU, torch's "fast path" of ``nn.TransformerEncoder``."""

    def __init__(self, tokens: int, *, dim: int, heads: int, ffn_dim: int, layers: int) -> None:
        super().__init__()
        self.genes, self.gene_norm = nn.Embedding(tokens, dim), nn.LayerNorm(dim)
        self.values = nn.Sequential(nn.Linear(1, dim), nn.ReLU(), nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(dim, heads, ffn_dim, batch_first=True), layers)
        self.eval()

    def forward(self, ids: Tensor, values: Tensor, there: Tensor) -> Tensor:
        """Return the last state of <cls>, the first token, of length 1."""
        x = self.gene_norm(self.genes(ids)) + self.values(values[:, :, None].clamp(max=512))
        return F.normalize(self.layers(x, src_key_padding_mask=~there)[:, 0])


def scgpt_vectors(path: Path, vocabulary: Mapping[str, int], longest: int, network: ScGPT, out: Path) -> NDArray[np.float32]:
    """Tokenize a file and run the network, 64 cells a batch in the order of the file; write vectors and annotation into an ``.h5ad``."""
    with torch.no_grad():
        batches = scgpt_file(path, vocabulary, longest)
        vectors: NDArray[np.float32] = torch.cat([network(ids, values, ids != vocabulary["<pad>"]) for ids, values in batches]).numpy()
    ad.AnnData(vectors, obs=ad.read_h5ad(path, backed="r").obs).write_h5ad(out)
    return vectors


# UCE


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
