"""What the model saw of each cell: ``qc=True``, and the medians and totals that every receipt holds."""

import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import cellfm_hub as cf
from cellfm_hub.api import load_tokenizer
from golden_cases import PORTABLE
from test_cli import cellfm

CASES = {
    "geneformer-v2-basic": ("geneformer", {}),
    "scgpt-basic": ("scgpt", {"max_length": 40}),
    "scfoundation-basic": ("scfoundation", {}),
    "uce-basic": ("uce", {"nhead": 2, "samples": 2}),
}
GENEFORMER = PORTABLE / "geneformer-v2-basic"
NAMES = ("genes_used", "counts_used", "truncated")


def where(case: str) -> dict[str, Any]:
    model, options = CASES[case]
    return {"model": model, "checkpoint": PORTABLE / case / "checkpoint", "options": options}


@pytest.mark.parametrize("case", CASES)
def test_columns_and_receipt(case: str) -> None:
    """Cell by cell: as the gene map and the tokens say; and the receipt is their summary."""
    cells, given = ad.read_h5ad(PORTABLE / case / "input.h5ad"), where(case)
    species = "human" if case.startswith("uce") else None
    embedder = load_tokenizer(**given)
    tokens = embedder.tokenize(cells, species=species)
    cf.embed(cells, key_added="X_m", qc=True, species=species, device="cpu", precision="float32", **given)
    got = cells.obs[[f"X_m_{name}" for name in NAMES]].set_axis(NAMES, axis=1)
    receipt = cells.uns["cellfm"]["X_m"]

    # What each cell has on columns that feed a gene.
    counts = sp.csr_matrix(cells.X)
    explained = [cf.explain(cells, cell=row, species=species, **given) for row in range(cells.n_obs)]
    rows = np.arange(len(tokens)) if tokens.rows is None else tokens.rows
    seen = np.bincount(rows, weights=tokens.lengths, minlength=cells.n_obs) > 0
    for row, table in enumerate(explained):
        known = table[table["status"].isin(["kept", "cut"])].drop_duplicates("name")
        assert got["genes_used"].iloc[row] == (len(known) if seen[row] else 0), row
        total = counts[row].sum()
        expected = known["count"].sum() / total if seen[row] else 0.0
        assert got["counts_used"].iloc[row] == pytest.approx(expected if total else np.nan, rel=1e-6, nan_ok=True)
    cut = np.zeros(cells.n_obs, bool)
    if tokens.cut is not None:
        np.logical_or.at(cut, rows, tokens.cut > 0)
    np.testing.assert_array_equal(got["truncated"], cut)
    assert [str(dtype) for dtype in got.dtypes] == ["int32", "float32", "bool"]

    assert receipt["n_truncated"] == cut.sum()
    assert receipt["tokens_cut"] == (0 if tokens.cut is None else tokens.cut.sum())
    assert receipt["genes_used_median"] == np.median(got["genes_used"])
    assert receipt["counts_used_median"] == pytest.approx(float(np.nanmedian(got["counts_used"])), abs=1e-6)
    assert receipt["counts"] == counts.sum()
    assert receipt["n_empty"] == (~seen).sum()


def test_baseline() -> None:
    cells = ad.read_h5ad(GENEFORMER / "input.h5ad")
    cf.embed(cells, "pca", qc=True, options={"n_components": 3})
    assert cells.obs["X_pca_genes_used"].tolist() == np.asarray((cells.X != 0).sum(axis=1)).ravel().tolist()
    assert set(cells.obs["X_pca_counts_used"].dropna()) == {1.0}
    assert not cells.obs["X_pca_truncated"].any()
    assert cells.uns["cellfm"]["X_pca"]["genes_used_median"] == np.median(cells.obs["X_pca_genes_used"])


def test_logarithms_have_no_share() -> None:
    case = PORTABLE / "scfoundation-basic"
    cells = ad.read_h5ad(case / "input_lognorm.h5ad")
    options = {"pre_normalized": "T"}
    cf.embed(cells, "scfoundation", qc=True, checkpoint=case / "checkpoint", options=options, device="cpu", precision="float32")
    assert cells.obs["X_scfoundation_counts_used"].isna().all()
    assert "counts_used_median" not in cells.uns["cellfm"]["X_scfoundation"]
    assert cells.uns["cellfm"]["X_scfoundation"]["genes_used_median"] > 0


def test_only_where_there_is_obs() -> None:
    with pytest.raises(cf.errors.InputError, match="qc are for AnnData"):
        cf.embed(["ACGT"], "kmer", qc=True)  # type: ignore[call-overload]
    with pytest.raises(cf.errors.InputError, match="qc says what a model saw of each cell"):
        cf.embed_file(PORTABLE / "nt-v2-basic/sequences.fasta", "kmer", out="x.parquet", qc=True)


def test_a_view() -> None:
    cells = ad.read_h5ad(GENEFORMER / "input.h5ad")
    view = cells[3:7]
    cf.embed(view, "geneformer", qc=True, checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32")
    assert len(view.obs["X_geneformer_genes_used"]) == 4
    assert "X_geneformer_genes_used" not in cells.obs


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".parquet", ".npy", "in place"])
def test_files(tmp_path: Path, suffix: str) -> None:
    """Every format holds the columns that embed adds to the object; parts, and an interrupted run, make no difference."""
    path = Path(shutil.copy(GENEFORMER / "input.h5ad", tmp_path / "cells.h5ad"))
    cells = ad.read_h5ad(path)
    cf.embed(cells, "geneformer", qc=True, checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32")
    columns = [f"X_geneformer_{name}" for name in NAMES]
    expected = cells.obs[columns]
    out = path if suffix == "in place" else tmp_path / f"out{suffix}"
    summary = cf.embed_file(
        path, "geneformer", out=out, qc=True, part_rows=5, checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32"
    )
    if suffix == ".zarr":
        got = ad.read_zarr(out).obs
    elif suffix == ".parquet":
        got = pd.read_parquet(out)
        assert list(got.columns)[-3:] == columns
        assert got.shape == (13, 32 + 3)
    elif suffix == ".npy":
        got = pd.read_parquet(tmp_path / "out.qc.parquet")
    else:
        got = ad.read_h5ad(out).obs
        assert list(got.columns)[: len(cells.obs.columns) - 3] == list(cells.obs.columns)[:-3]
    pd.testing.assert_frame_equal(got[columns], expected, check_names=False)
    receipt = cells.uns["cellfm"]["X_geneformer"]
    for name in ("genes_used_median", "counts_used_median", "counts", "tokens_cut", "n_truncated", "n_empty"):
        assert summary.receipt[name] == receipt[name]
    # Again, without: the result no longer holds them.
    if suffix != "in place":
        where: dict[str, Any] = {"checkpoint": GENEFORMER / "checkpoint", "device": "cpu", "precision": "float32"}
        summary = cf.embed_file(path, "geneformer", out=out, overwrite=True, **where)
        assert summary.receipt["genes_used_median"] == receipt["genes_used_median"]
        assert not (tmp_path / "out.qc.parquet").exists()


def test_models_side_by_side_and_shards(tmp_path: Path) -> None:
    path, out = GENEFORMER / "input.h5ad", tmp_path / "out.h5ad"
    checkpoint: dict[str, str | Path] = {"geneformer": GENEFORMER / "checkpoint"}
    options = {"pca": {"n_components": 3}}
    cf.embed_file(path, ["geneformer", "pca"], out=out, qc=True, part_rows=4, checkpoint=checkpoint, options=options, device="cpu")
    obs = ad.read_h5ad(out).obs
    assert {f"X_{model}_{name}" for model in ("geneformer", "pca") for name in NAMES} <= set(obs.columns)
    sharded = tmp_path / "sharded.h5ad"
    for i in (1, 2):
        cf.embed_file(
            path, "geneformer", out=sharded, shard=(i, 2), qc=True, part_rows=4, checkpoint=GENEFORMER / "checkpoint", device="cpu"
        )
    cf.merge(sharded)
    columns = [f"X_geneformer_{name}" for name in NAMES]
    pd.testing.assert_frame_equal(ad.read_h5ad(sharded).obs[columns], obs[columns])


def test_command(tmp_path: Path) -> None:
    path = Path(shutil.copy(GENEFORMER / "input.h5ad", tmp_path / "cells.h5ad"))
    arguments = ("--model", "geneformer", "--checkpoint", GENEFORMER / "checkpoint", "--precision", "float32", "--qc")
    done = cellfm("embed", path, *arguments)
    assert done.returncode == 0, done.stderr
    obs = ad.read_h5ad(tmp_path / "cells.geneformer.h5ad").obs
    assert obs["X_geneformer_truncated"].sum() == 3
    assert (obs["X_geneformer_genes_used"] == 0).sum() == 2
    done = cellfm("embed", path, *arguments, "--level", "gene")
    assert done.returncode == 2
    assert "qc" in done.stderr
