"""How many sentences UCE's tokenizer draws per CPU second.

The list of genes that the model knows is not at hand: in its place stand the protein-coding symbols of GENCODE v49 with their chromosomes
and starts (about as many). Two inputs: the 2,700 cells of pbmc3k resampled to 20,000, and cells like those of the founders' measurement of
the original code (15,000 matched genes, about 4,000 expressed; 240 cells per CPU second).

Run from the top of a checkout: ``python tests/benchmarks/tokenizers_uce.py``.
"""

import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellfm_adapters.uce.species import Species
from cellfm_adapters.uce.tokenizer import PlacedGenes, place_genes, tokenize

SHARED = Path(os.environ.get("CELLFM_SHARED", Path(__file__).parents[3] / "shared"))
RESULTS = Path(__file__).parent / "results" / "tokenizers-uce.json"
BLOCK = 4096
PASSES = 3
"""The quickest counts: other work on the machine can only add time."""


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def human() -> Species:
    """Make a list of genes of the size of the published one."""
    genes = pd.read_csv(SHARED / "data/genes/human_gencode_v49.tsv.gz", sep="\t", dtype={"chromosome": str})
    genes = genes[genes["biotype"] == "protein_coding"].drop_duplicates("symbol").dropna(subset=["symbol", "start"])
    codes = np.unique(genes["chromosome"].to_numpy(dtype=str), return_inverse=True)[1]
    return Species("human", genes["symbol"].tolist(), 13_466, codes.astype(np.int32), genes["start"].to_numpy(np.int64))


def measure(counts: sp.csr_matrix, names: list[str], species: Species) -> dict[str, float]:
    """Time everything that happens to a block between reading and the network, on one core."""
    genes = place_genes(names, species)
    tokenize(genes.apply(counts[:8]), genes, 0, samples=1, first_chromosome=143_574, max_tokens=1536)  # compile
    passes = [_one_pass(counts, genes) for _ in range(PASSES)]
    matching, drawing, tokens = min(passes, key=lambda times: times[0] + times[1])
    cells = counts.shape[0]
    return {
        "cells": cells,
        "genes_matched": genes.n_matched,
        "expressed_per_cell": round(genes.apply(counts[:BLOCK]).nnz / min(cells, BLOCK)),
        "tokens_per_cell": round(tokens / cells),
        "cells_per_cpu_second": round(cells / (matching + drawing)),
        "cells_per_cpu_second_tokenize_alone": round(cells / drawing),
    }


def _one_pass(counts: sp.csr_matrix, genes: PlacedGenes) -> tuple[float, float, int]:
    """Return CPU seconds for matching and for drawing, and how many tokens came out."""
    matching, drawing, tokens = 0.0, 0.0, 0
    for start in range(0, counts.shape[0], BLOCK):
        block = counts[start : start + BLOCK]
        begin = time.process_time()
        known = genes.apply(block)
        middle = time.process_time()
        drawn = tokenize(known, genes, 0, samples=1, first_chromosome=143_574, max_tokens=1536)
        matching, drawing = matching + middle - begin, drawing + time.process_time() - middle
        tokens += len(drawn.ids)
    return matching, drawing, tokens


def main() -> None:
    """Measure, print, write."""
    rng = np.random.default_rng(0)
    species = human()
    pbmc = ad.read_h5ad(SHARED / "data/scrna/pbmc3k/pbmc3k.h5ad")
    resampled = sp.csr_matrix(pbmc.X)[rng.integers(0, pbmc.n_obs, 20_000)]
    rich = sp.random(4096, 15_000, density=4_000 / 15_000, format="csr", random_state=0, dtype=np.float32)
    rich.data = rng.geometric(0.3, rich.nnz).astype(np.float32)
    columns = rng.permutation(len(species.symbols))[:15_000]
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pbmc3k": measure(resampled, pbmc.var_names.tolist(), species),
        "rich": measure(rich, [species.symbols[c] for c in columns], species),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))  # noqa: T201, a script for people


if __name__ == "__main__":
    main()
