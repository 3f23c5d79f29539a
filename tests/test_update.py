"""`--update`: rows that did not change keep their vectors."""

import errno
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

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
    del result.obsm["cellfm_rows_X_scgpt"]
    result.write_h5ad(out)
    with pytest.raises(OutputError, match="does not say what its rows were made from") as caught:
        cf.embed_file(data, "scgpt", out=out, update=True, **CELLS)
    assert "free space" not in str(caught.value)
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


# Results that the user worked on


def assert_updated(data: Path, out: Path, names: list[str], expected: list[str]) -> None:
    """Update a result: just the expected rows are computed, and the result is that of a full run."""
    names.clear()
    cf.embed_file(data, "scgpt", out=out, update=True, **CELLS)
    assert sorted(names) == sorted(expected)
    np.testing.assert_allclose(vectors(out, "X_scgpt"), loaded("scgpt", CELLS).encode(data), atol=2e-6, rtol=0)
    names.clear()


def read(out: Path) -> ad.AnnData:
    return ad.read_h5ad(out) if out.suffix == ".h5ad" else ad.read_zarr(out)


def write(adata: ad.AnnData, out: Path) -> None:
    if out.suffix == ".h5ad":
        adata.write_h5ad(out)
    else:
        shutil.rmtree(out, ignore_errors=True)
        adata.write_zarr(out)


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning", "ignore:zarr v3 autosharding:UserWarning")
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_rows_that_were_taken_out_or_shuffled(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs to a row follows it: only rows that are not there are computed."""
    data, out = write_cells(tmp_path / "cells.h5ad", 12), tmp_path / f"out{suffix}"
    cf.embed_file(data, "scgpt", out=out, **CELLS)
    names, whole = embedded(monkeypatch), read(out)
    assert "cellfm_rows" not in whole.uns
    mask = np.arange(12) % 3 > 0
    write(whole[mask], out)
    assert_updated(data, out, names, [f"cell-{i}" for i in range(0, 12, 3)])
    write(whole[np.random.default_rng(0).permutation(12)], out)
    assert_updated(data, out, names, [])
    for join in ("inner", "outer"):  # the receipt of the first; where one part has no such rows, they are filled with NaN
        bare = ad.AnnData(whole[8:].X, obs=whole.obs[8:], var=whole.var)
        write(ad.concat([whole[:2], whole[4:8], *([bare] if join == "outer" else [])], join=join, uns_merge="first"), out)
        assert_updated(data, out, names, [f"cell-{i}" for i in (2, 3, *range(8, 12))])


@pytest.mark.parametrize("suffix", [".h5ad", ".npy", ".parquet"])
def test_vectors_that_were_changed_are_not_trusted(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 8), tmp_path / f"out{suffix}"
    cf.embed_file(data, "scgpt", out=out, **CELLS)
    if suffix == ".h5ad":
        with h5py.File(out, "r+") as file:
            file["obsm/X_scgpt"][3, 0] += 1
            file["obsm/X_scgpt"][6] = 0
    elif suffix == ".npy":
        array = np.load(out)
        array[3, 0] += 1
        array[6] = 0
        np.save(out, array)
    else:
        table = pq.read_table(out)
        columns = [pa.array(np.where(np.isin(np.arange(8), (3, 6)), 0, column.to_numpy())) for column in table.columns[:-1]]
        schema = table.schema
        pq.write_table(pa.table([*(c.cast(f.type) for c, f in zip(columns, schema, strict=False)), table.columns[-1]], schema=schema), out)
    assert_updated(data, out, embedded(monkeypatch), ["cell-3", "cell-6"])
    assert "2 of 8 vectors" in caplog.text


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_rows_that_were_taken_out_of_arrays_and_tables(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 8), tmp_path / f"out{suffix}"
    cf.embed_file(data, "scgpt", out=out, **CELLS)
    rows = np.array([5, 1, 2])
    if suffix == ".npy":
        np.save(out, np.load(out)[rows])
    else:
        pq.write_table(pq.read_table(out).take(rows), out)
    assert_updated(data, out, embedded(monkeypatch), [f"cell-{i}" for i in (0, 3, 4, 6, 7)])


def test_results_of_earlier_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they kept in `uns` is said to be of no use, and goes when the file is written."""
    data = write_cells(tmp_path / "cells.h5ad", 6)
    cf.embed_file(data, "scgpt", out=data, **CELLS)
    old = ad.read_h5ad(data)
    del old.obsm["cellfm_rows_X_scgpt"]
    about = {"content": np.zeros((6, 2), np.uint64), "sha256": "0"}
    old.uns["cellfm_rows"] = {"X_scgpt": about, "X_other": about}
    old[:4].write_h5ad(data)
    with pytest.raises(OutputError, match="does not say what its rows were made from"):
        cf.embed_file(data, "scgpt", out=data, update=True, **CELLS)
    cf.embed_file(data, "scgpt", out=data, overwrite=True, **CELLS)
    assert list(ad.read_h5ad(data).uns["cellfm_rows"]) == ["X_other"]
    assert_updated(data, data, embedded(monkeypatch), [])


def test_an_embedding_of_another_kind(tmp_path: Path) -> None:
    """A table under the key, or a vector per row that became one number."""
    data, out = write_cells(tmp_path / "cells.h5ad", 6), tmp_path / "out.h5ad"
    cf.embed_file(data, "scgpt", out=out, **CELLS)
    result = ad.read_h5ad(out)
    result.obsm["X_scgpt"] = pd.DataFrame(result.obsm["X_scgpt"], index=result.obs_names).add_prefix("d")
    result.write_h5ad(out)
    with pytest.raises(OutputError, match="no vectors 'X_scgpt'"):
        cf.embed_file(data, "scgpt", out=out, update=True, **CELLS)


@pytest.mark.parametrize(
    ("error", "says", "not_says"),
    [
        (TypeError("cannot write this column"), "cannot be written as .zarr (cannot write this column)", "free space"),
        (ValueError("could not broadcast"), "cannot be written as .zarr (could not broadcast)", "free space"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free space there", "as .zarr"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied; choose another place", "free space"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_cannot_be_written(tmp_path: Path, error: Exception, says: str, not_says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AnnData's own refusals are told from those of the disk, and a full disk from one that may not be written."""
    data, out = write_cells(tmp_path / "cells.h5ad", 6), tmp_path / "out.zarr"

    def write_zarr(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ad.AnnData, "write_zarr", write_zarr)
    with pytest.raises(OutputError) as caught:
        cf.embed_file(data, "scgpt", out=out, **CELLS)
    assert says in str(caught.value)
    assert not_says not in str(caught.value)


def test_rows_of_another_model_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two results put together, the second made with other weights: its rows are computed again."""
    data, out = write_cells(tmp_path / "cells.h5ad", 12), tmp_path / "out.h5ad"
    other = tmp_path / "checkpoint"
    shutil.copytree(CELLS["checkpoint"], other)
    weights = torch.load(other / "best_model.pt", weights_only=True)  # noqa: TID251, written by a test
    torch.save({name: 1.1 * tensor for name, tensor in weights.items()}, other / "best_model.pt")
    of_both = []
    for checkpoint in (CELLS["checkpoint"], other):
        cf.embed_file(data, "scgpt", out=out, overwrite=True, **CELLS | {"checkpoint": checkpoint})
        of_both.append(ad.read_h5ad(out))
    ad.concat([of_both[0][:6], of_both[1][6:]], merge="first", uns_merge="first").write_h5ad(out)
    names = embedded(monkeypatch)
    assert_updated(data, out, names, [f"cell-{i}" for i in range(6, 12)])
