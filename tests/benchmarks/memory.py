"""Peak memory of `embed_file`, by the number of rows; prints JSON.

``python tests/benchmarks/memory.py [--rows 50000,200000,1000000] [--out result.json] [--folder /tmp]``

Cells: an uncompressed ``.h5ad`` of resampled rows of pbmc3k (6.9 GB for 1,000,000 cells; written in chunks, removed afterwards), through
scGPT's smallest golden checkpoint with 64 tokens per cell, into ``.zarr``. Sequences: a FASTA file of 100 random bases each, through
``kmer`` (k = 4, 256 numbers each), into ``.parquet``. Each run is a process of its own. What is counted is its largest resident memory
(``VmHWM``) minus that of the same process when the model was loaded. Needs the founders' folder (``CELLFM_SHARED``).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("CELLFM_SHARED", Path(__file__).parents[3] / "shared"))
LIMIT = 3e9
"""Bytes above the model."""

CHUNK = 10_000
BASES = 100


def make_cells(path: Path, rows: int) -> None:
    """Write resampled rows of pbmc3k as uncompressed CSR."""
    import anndata as ad
    import h5py
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    real = ad.read_h5ad(SHARED / "data/scrna/pbmc3k/pbmc3k.h5ad")
    counts = sp.csr_matrix(real.X).astype(np.float32)
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"batch": pd.Categorical(rng.choice(["a", "b"], rows))}, index=[f"cell-{i:07d}-1" for i in range(rows)])
    ad.AnnData(obs=obs, var=real.var).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [rows, counts.shape[1]]})
        data = group.create_dataset("data", (0,), np.float32, maxshape=(None,), chunks=(2**20,))
        indices = group.create_dataset("indices", (0,), np.int32, maxshape=(None,), chunks=(2**20,))
        indptr = np.zeros(rows + 1, np.int64)
        for start in range(0, rows, CHUNK):
            block = counts[rng.integers(0, counts.shape[0], min(CHUNK, rows - start))]
            end = len(data) + block.nnz
            indptr[start + 1 : start + 1 + block.shape[0]] = len(data) + block.indptr[1:]
            data.resize((end,))
            indices.resize((end,))
            data[-block.nnz :], indices[-block.nnz :] = block.data, block.indices
        group.create_dataset("indptr", data=indptr)


def make_sequences(path: Path, rows: int) -> None:
    """Write random sequences."""
    import numpy as np

    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for start in range(0, rows, CHUNK):
            letters = rng.choice(np.frombuffer(b"ACGT", np.uint8), (min(CHUNK, rows - start), BASES))
            file.writelines(f">read-{start + i}\n{row.tobytes().decode()}\n" for i, row in enumerate(letters))


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(kind: str, path: Path, out: Path) -> dict[str, Any]:
    """Embed one file in this process."""
    import cellfm_hub as cf

    cells = kind == "cells"
    model = "scgpt" if cells else "kmer"
    how: dict[str, Any] = {"device": "cpu", "precision": "float32", "options": {"max_length": 64} if cells else {"k": 4}}
    if cells:
        how["checkpoint"] = SHARED / "golden/scgpt-fullvocab/checkpoint"
    loaded = cf.load(model, **how)
    baseline = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    begin = time.perf_counter()
    summary = cf.embed_file(path, model, out=out, progress=False, **how)
    seconds = time.perf_counter() - begin
    assert loaded.embedding_dim == summary.dim
    return {
        "kind": kind,
        "rows": summary.rows,
        "dim": summary.dim,
        "input_bytes": path.stat().st_size,
        "baseline_bytes": baseline,
        "peak_above_model_bytes": status("VmHWM") - baseline,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Make each file, measure, remove it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="50000,200000,1000000")
    parser.add_argument("--kinds", default="cells,sequences")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "PATH", "OUT"), help="for the script itself")
    arguments = parser.parse_args()
    if arguments.measure:
        kind, path, out = arguments.measure
        print(json.dumps(measure(kind, Path(path), Path(out))))  # noqa: T201
        return
    runs = []
    for kind in arguments.kinds.split(","):
        for rows in map(int, arguments.rows.split(",")):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                path = Path(folder) / ("cells.h5ad" if kind == "cells" else "reads.fa")
                (make_cells if kind == "cells" else make_sequences)(path, rows)
                out = Path(folder) / ("out.zarr" if kind == "cells" else "out.parquet")
                command = [sys.executable, __file__, "--measure", kind, str(path), str(out)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(runs[-1], file=sys.stderr)  # noqa: T201
    packages = ("torch", "numpy", "h5py", "anndata", "zarr", "pyarrow", "numba")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "system": platform.platform()},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "limit_bytes": LIMIT,
        "within_limit": all(run["peak_above_model_bytes"] <= LIMIT for run in runs),
        "runs": runs,
    }
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
