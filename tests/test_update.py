"""`--update`: rows that did not change keep their vectors."""

import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

import cellfm_hub as cf
from cellfm_hub.embedder import Embedder
from cellfm_hub.errors import InputError, OutputError
from file_runs import CELLS, DNA, loaded, receipt, vectors, write_cells, write_fasta


def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the rows that go through the network from now on."""
    original, names = Embedder._embed_block, list[str]()

    def embed(self: Embedder, block: Any, *arguments: Any) -> Any:
        names.extend(block.names)
        return original(self, block, *arguments)

    monkeypatch.setattr(Embedder, "_embed_block", embed)
    return names


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".parquet", ".npy", "in place"])
def test_only_new_rows_are_computed(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are added, removed, changed and shuffled: the result is that of a full run."""
    data = write_cells(tmp_path / "cells.h5ad", 30)
    out = data if suffix == "in place" else tmp_path / f"out{suffix}"
    cf.embed_file(data, "scgpt", out=out, part_rows=8, **CELLS)
    before, more = ad.read_h5ad(data), ad.read_h5ad(write_cells(tmp_path / "more.h5ad", 4, seed=9))
    more.obs_names = [f"new-{i}" for i in range(4)]
    after = ad.concat([before[5:], more], merge="same", uns_merge="same") if suffix != "in place" else before.copy()
    after.X.data[after.X.indptr[3]] += 50
    rng = np.random.default_rng(0)
    if suffix != "in place":
        after = after[rng.permutation(after.n_obs)].copy()
    after.write_h5ad(data)
    names = embedded(monkeypatch)
    updated = cf.embed_file(data, "scgpt", out=out, update=True, part_rows=8, **CELLS)
    assert sorted(names) == sorted(["cell-8", *more.obs_names] if suffix != "in place" else ["cell-3"])
    full = cf.embed_file(data, "scgpt", out=tmp_path / "full.npy", part_rows=8, **CELLS)
    np.testing.assert_allclose(vectors(out, "X_scgpt"), vectors(tmp_path / "full.npy", ""), atol=2e-6, rtol=0)
    of_file = {"input_fingerprint", "beside"}
    assert {k: v for k, v in updated.receipt.items() if k not in of_file} == {k: v for k, v in full.receipt.items() if k not in of_file}
    names.clear()
    cf.embed_file(data, "scgpt", out=out, update=True, part_rows=8, **CELLS)
    assert names == []


def test_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_fasta(tmp_path / "dna.fa", 20), tmp_path / "out.parquet"
    cf.embed_file(data, "nt", out=out, reverse_complement="mean", **DNA)
    data.write_text(data.read_text() + ">added\nACGTACGTAC\n>changed-name-only\n" + data.read_text().splitlines()[1] + "\n")
    names = embedded(monkeypatch)
    cf.embed_file(data, "nt", out=out, reverse_complement="mean", update=True, **DNA)
    assert names == ["added"]
    got = vectors(out, "")
    assert got.shape == (22, 8)
    np.testing.assert_array_equal(got[21], got[0])


def test_without_a_result_all_is_computed(tmp_path: Path) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 8)
    assert cf.embed_file(data, "scgpt", out=tmp_path / "out.npy", update=True, **CELLS).rows == 8


def test_refused(tmp_path: Path) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 8), tmp_path / "out.h5ad"
    cf.embed_file(data, "scgpt", out=out, **CELLS)
    shutil.copy2(out, tmp_path / "good.h5ad")
    for change, says in (
        ({"pooling": "mean"}, "pooling was 'cls', now 'mean'"),
        ({"options": {"ties": "upper"}}, "options was"),
        ({"precision": "bfloat16"}, "precision was"),
        ({"key_added": "X_other"}, "no vectors 'X_other'"),
    ):
        with pytest.raises(OutputError, match=says):
            cf.embed_file(data, "scgpt", out=out, update=True, **CELLS | change)
    with pytest.raises(InputError, match="depend on all rows"):
        cf.embed_file(data, "pca", out=out, update=True, options={"n_components": 2})
    result = ad.read_h5ad(out)
    result[::-1].copy().write_h5ad(out)
    with pytest.raises(OutputError, match="changed, or rows removed or reordered"):
        cf.embed_file(data, "scgpt", out=out, update=True, **CELLS)
    del result.uns["cellfm_rows"]
    result.write_h5ad(out)
    with pytest.raises(OutputError, match="does not say what its rows were made from"):
        cf.embed_file(data, "scgpt", out=out, update=True, **CELLS)
    assert receipt(out, "X_scgpt")["n_rows"] == 8
    with pytest.raises(InputError, match="token"):
        cf.embed_file(data, "scgpt", out=tmp_path / "x.parquet", update=True, level="gene", **CELLS)


def test_interrupted_update_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellfm_hub.jobs.job import Job

    data, out = write_cells(tmp_path / "cells.h5ad", 20), tmp_path / "out.npy"
    cf.embed_file(data, "scgpt", out=out, part_rows=4, **CELLS)
    added = ad.read_h5ad(write_cells(tmp_path / "more.h5ad", 5, seed=9))
    added.obs_names = [f"new-{i}" for i in range(5)]
    ad.concat([ad.read_h5ad(data), added], merge="same").write_h5ad(data)
    original = Job._compute

    def compute(self: Job, rows: Any) -> Any:
        if rows.wanted.number == 2:
            raise KeyboardInterrupt
        return original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "_compute", compute)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(data, "scgpt", out=out, update=True, part_rows=4, **CELLS)
    names = embedded(monkeypatch)
    cf.embed_file(data, "scgpt", out=out, update=True, resume=True, **CELLS)
    assert len(names) == 5
    np.testing.assert_allclose(np.load(out), loaded("scgpt", CELLS).encode(data), atol=2e-6, rtol=0)
