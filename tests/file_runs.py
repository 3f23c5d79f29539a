"""What the tests of `embed_file` share: small files, and how results are compared."""

import json
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

import cellfm_hub as cf
from cellfm_hub.jobs.job import Job
from golden_cases import PORTABLE

SCGPT = PORTABLE / "scgpt-basic"
NT = PORTABLE / "nt-v2-basic"

CELLS: dict[str, Any] = {"checkpoint": str(SCGPT / "checkpoint"), "device": "cpu", "precision": "float32", "progress": False}
DNA: dict[str, Any] = {"checkpoint": str(NT / "checkpoint"), "device": "cpu", "precision": "float32", "progress": False}
"""Options of `embed_file` for the two models."""


def loaded(model: str, options: dict[str, Any]) -> cf.Embedder:
    """Load a model by options of `embed_file`."""
    return cf.load(model, **{name: value for name, value in options.items() if name != "progress"})


def write_cells(path: Path, rows: int, seed: int = 0) -> Path:
    """Write cells like those of the golden case, no two alike."""
    golden = ad.read_h5ad(SCGPT / "input.h5ad")
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(golden.X).toarray()[rng.integers(0, golden.n_obs, rows)]
    counts = rng.poisson(counts + 0.2).astype(np.float32)
    cells = ad.AnnData(sp.csr_matrix(counts), var=golden.var)
    cells.obs_names = [f"cell-{i}" for i in range(rows)]
    cells.obs["batch"] = np.arange(rows) % 3
    cells.write_h5ad(path)
    return path


def write_fasta(path: Path, rows: int, seed: int = 0) -> Path:
    """Write random sequences."""
    rng = np.random.default_rng(seed)
    sequences = ["".join(rng.choice(list("ACGT"), int(n))) for n in rng.integers(20, 90, rows)]
    path.write_text("".join(f">read-{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    return path


def stop_after(monkeypatch: pytest.MonkeyPatch, parts: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Make a run end when so many parts are computed."""
    original, done = Job._compute, []

    def compute(self: Job, rows: Any) -> Any:
        if len(done) == parts:
            raise error
        done.append(rows)
        return original(self, rows)

    monkeypatch.setattr(Job, "_compute", compute)


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the parts that are computed from now on."""
    original, numbers = Job._compute, list[int]()

    def compute(self: Job, rows: Any) -> Any:
        numbers.append(rows.wanted.number)
        return original(self, rows)

    monkeypatch.setattr(Job, "_compute", compute)
    return numbers


def vectors(out: Path, key: str) -> NDArray[np.float32]:
    """Read the vectors of a result."""
    if out.suffix == ".npy":
        return np.load(out)
    if out.suffix == ".parquet":
        import pandas as pd

        return pd.read_parquet(out).to_numpy()
    result = ad.read_h5ad(out) if out.suffix == ".h5ad" else ad.read_zarr(out)
    return np.asarray(result.obsm[key])


def receipt(out: Path, key: str) -> dict[str, Any]:
    """Read the receipt of a result."""
    if out.suffix == ".npy":
        return json.loads(out.with_suffix(".receipt.json").read_text())
    if out.suffix == ".parquet":
        import pyarrow.parquet as pq

        return json.loads(pq.read_schema(out).metadata[b"cellfm"])
    result = ad.read_h5ad(out) if out.suffix == ".h5ad" else ad.read_zarr(out)
    return dict(result.uns["cellfm"][key])


def everything(out: Path) -> Any:
    """Read all that a result holds, in a form that can be compared: the bytes of files, the values of stores."""
    if out.suffix in (".npy", ".parquet"):
        return {path.name: path.read_bytes() for path in out.parent.glob(f"{out.stem}.*") if path.is_file()}
    if out.suffix == ".h5ad":
        with h5py.File(out) as file:
            found: dict[str, Any] = {}
            file.visititems(lambda name, item: found.update({name: _content(item)}))
            return found
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def _content(item: Any) -> Any:
    attributes = {name: str(value) for name, value in item.attrs.items()}
    return attributes, None if isinstance(item, h5py.Group) else np.asarray(item[()]).tobytes() if item.dtype != object else str(item[()])
