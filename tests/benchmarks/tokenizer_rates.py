"""How many cells a second each family's tokenizer takes on one core.

Data: pbmc3k, its 2,700 cells drawn with replacement to 20,000 (seeded). Counted is CPU time from a block of raw counts, as it comes from a
file, to tokens: columns matched, reordered and summed, then ranked, binned, normalised or sampled. Vocabularies are the published ones; the
weights, which are not looked at, are those of golden cases.

Run from the top of a checkout with the founders' folder beside it: ``python tests/benchmarks/tokenizer_rates.py``. Writes
``results/tokenizers.json``. UCE has a script of its own, ``tokenizers_uce.py``, because its published list of genes is not at hand.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import anndata as ad
import numba
import numpy as np
import scipy.sparse as sp

import cellfm_hub as cf
from cellfm_hub.adapter import CellAdapter
from cellfm_hub.genes import choose_gene_ids
from cellfm_hub.sources.cells import count_blocks, find_counts, from_anndata

SHARED = Path(os.environ.get("CELLFM_SHARED", Path(__file__).parents[3] / "shared"))
RESULTS = Path(__file__).parent / "results" / "tokenizers.json"

MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "geneformer": ("geneformer-v1-tiny", {"dictionaries": SHARED / "data/geneformer"}, 20_000),
    "scgpt": ("scgpt-fullvocab", {}, 15_000),
    "scfoundation": ("scfoundation-full19264", {}, 5_000),
}
"""Family -> golden case, options, cells per CPU second wanted."""


def measure(model: str, adata: ad.AnnData, rounds: int) -> dict[str, Any]:
    """Tokenize everything a few times; report the median."""
    case, options, wanted = MODELS[model]
    embedder = cf.load(model, checkpoint=SHARED / "golden" / case / "checkpoint", options=options, device="cpu", precision="float32")
    adapter = embedder.adapter
    assert isinstance(adapter, CellAdapter)
    data = from_anndata(adata)
    matrix = find_counts(data, None)
    column, genes = choose_gene_ids(matrix.var, adapter.match_genes, column=None, preferred=adapter.gene_columns, model=model)
    blocks = list(count_blocks(data, matrix))
    seconds = []
    for _ in range(rounds + 1):
        start = time.process_time()
        tokens = sum(len(adapter.tokenize(genes.apply(block.counts), genes, block.obs, 0).ids) for block in blocks)
        seconds.append(time.process_time() - start)
    return {
        "gene_ids": column,
        "genes_used": genes.n_matched,
        "tokens_per_cell": round(tokens / adata.n_obs),
        "cells_per_cpu_second": round(adata.n_obs / float(np.median(seconds[1:]))),  # the first round compiles
        "wanted": wanted,
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    source = ad.read_h5ad(SHARED / "data/scrna/pbmc3k/pbmc3k.h5ad")
    drawn = np.random.default_rng(0).integers(source.n_obs, size=given.cells)
    adata = ad.AnnData(sp.csr_matrix(source.X)[drawn], var=source.var)
    result = {
        "data": f"pbmc3k drawn with replacement to {given.cells:,} cells, {adata.n_vars:,} columns",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "numba": numba.__version__},
        "models": {model: measure(model, adata, given.rounds) for model in MODELS},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))  # noqa: T201 - a script


if __name__ == "__main__":
    main()
