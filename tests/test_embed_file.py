"""`embed_file`: every format, in parts, for one model and several, in bounded memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest

import cellfm_hub as cf
from cellfm_hub.blocks import cut_by_tokens, select_inputs
from cellfm_hub.errors import InputError, OutputError
from cellfm_hub.jobs import job, parts
from cellfm_hub.jobs.content import token_content
from cellfm_hub.reading import Task, open_input
from cellfm_hub.sources.cells import find_counts
from cellfm_hub.sources.matrix import Matrix
from cellfm_hub.sources.some_rows import column_totals
from file_runs import CELLS, DNA, everything, loaded, receipt, vectors, write_cells, write_fasta


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".parquet", ".npy", "in place"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    """In parts or in one, a result holds the vectors of `encode`, and the input is as it was."""
    data = write_cells(tmp_path / "cells.h5ad", 30)
    expected, before = loaded("scgpt", CELLS).encode(data), data.read_bytes()
    out = data if suffix == "in place" else tmp_path / f"out{suffix}"
    summary = cf.embed_file(data, "scgpt", out=out, part_rows=7, **CELLS)
    assert (summary.out, summary.key, summary.rows, summary.dim) == (out, "X_scgpt", 30, 32)
    np.testing.assert_allclose(vectors(out, "X_scgpt"), expected, atol=2e-6, rtol=0)
    assert receipt(out, "X_scgpt") == summary.receipt
    of_whole = loaded("scgpt", CELLS).run(data).receipt
    assert {name: summary.receipt[name] for name in of_whole} == pytest.approx(of_whole)
    assert data.read_bytes() == before or suffix == "in place"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    with pytest.raises(OutputError, match="--overwrite"):
        cf.embed_file(data, "scgpt", out=out, **CELLS)
    one = cf.embed_file(data, "scgpt", out=out, overwrite=True, **CELLS)
    np.testing.assert_array_equal(vectors(out, "X_scgpt"), expected)
    assert one.receipt.keys() == summary.receipt.keys()


def test_written_as_anndata_writes(tmp_path: Path) -> None:
    """Arrays that are written in slices are marked like those that AnnData writes at once."""
    data = write_cells(tmp_path / "cells.h5ad", 10)
    cf.embed_file(data, "scgpt", out=tmp_path / "out.h5ad", **CELLS)
    theirs = ad.read_h5ad(tmp_path / "out.h5ad")
    theirs.write_h5ad(tmp_path / "theirs.h5ad")
    with h5py.File(tmp_path / "out.h5ad") as ours, h5py.File(tmp_path / "theirs.h5ad") as other:
        assert dict(ours["obsm/X_scgpt"].attrs) == dict(other["obsm/X_scgpt"].attrs)
        assert ours["obsm/X_scgpt"].dtype == other["obsm/X_scgpt"].dtype
        assert ours["obsm/X_scgpt"].chunks is not None


@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".h5ad"])
def test_sequences(tmp_path: Path, suffix: str) -> None:
    data, out = write_fasta(tmp_path / "dna.fa", 30), tmp_path / f"out{suffix}"
    for model, options in (("nt", DNA), ("kmer", {"options": {"k": 2}, "progress": False})):
        summary = cf.embed_file(data, model, out=out, part_rows=7, overwrite=True, **options)
        expected = loaded(model, options).encode(data)
        np.testing.assert_allclose(vectors(out, f"X_{model}"), expected, atol=2e-6, rtol=0)
        assert summary.rows == 30
    assert summary.receipt["bases"] == sum(len(line) for line in data.read_text().splitlines()[1::2])


@pytest.mark.parametrize("level", ["token", "base"])
def test_one_vector_per_token(tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of tokens are computed and written in pieces that do not depend on how many sequences a part has."""
    import pandas as pd
    import pyarrow.parquet as pq

    data, out = write_fasta(tmp_path / "dna.fa", 30), tmp_path / "out.parquet"
    most = 150
    monkeypatch.setattr(job, "TOKEN_BYTES", most * 4 * 8)
    sizes, original = [], parts.token_table
    monkeypatch.setattr(parts, "token_table", lambda names, values: sizes.append(len(values.values)) or original(names, values))
    summary = cf.embed_file(data, "nt", out=out, level=level, part_rows=12, **DNA)
    expected = loaded("nt", DNA).encode(data, level=level)
    frame = pd.read_parquet(out)
    np.testing.assert_allclose(frame.iloc[:, 3:].to_numpy(), expected.values, atol=2e-6, rtol=0)
    assert frame["token"].tolist() == expected.names.tolist()
    assert frame["position"].tolist() == [i for row in range(30) for i in range(len(expected.row(row)))]
    assert frame["id"].tolist() == [f"read-{row}" for row in range(30) for _ in range(len(expected.row(row)))]
    assert summary.rows == 30
    assert max(sizes) <= most
    assert len(sizes) > 4
    assert pq.ParquetFile(out).num_row_groups == len(sizes)


@pytest.mark.parametrize("reverse", [None, "mean"])
def test_pieces_of_a_block(tmp_path: Path, reverse: Any) -> None:
    """Inputs taken out of a block, with their windows and strands, have the vectors and the content that they have in it."""
    data = write_fasta(tmp_path / "dna.fa", 12)
    model = loaded("nt", DNA)
    request = model.request(long="tile", reverse_complement=reverse)
    model.adapter.max_tokens = 6  # several windows for each
    with open_input(data, [Task(model, request)]) as source:
        ((prepared,),) = list(source.blocks())
    block, expected = prepared.block, model.finish(prepared, request)
    index = np.array([7, 2, 11])
    chosen = select_inputs(block, index)
    assert chosen.names == [f"read-{i}" for i in index]
    np.testing.assert_allclose(model._embed_block(chosen, request), expected[index], atol=2e-6)
    np.testing.assert_array_equal(token_content(chosen), token_content(block)[index])
    assert len(np.unique(token_content(block), axis=0)) == 12
    pieces = list(cut_by_tokens(block, 40))
    assert len(pieces) > 3
    assert [name for piece in pieces for name in piece.names] == block.names
    joined = np.concatenate([model._embed_block(piece, request) for piece in pieces])
    np.testing.assert_allclose(joined, expected, atol=2e-6)


# Several models


def test_several_models_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three models, two of them fitted to all cells: one file, every row read once beyond the looks for counts and for genes."""
    data, out = write_cells(tmp_path / "cells.h5ad", 40), tmp_path / "out.h5ad"
    reads, original = np.zeros(40, int), Matrix.rows

    def rows(self: Matrix, start: int, stop: int) -> Any:
        reads[start:stop] += 1
        return original(self, start, stop)

    monkeypatch.setattr(Matrix, "rows", rows)
    monkeypatch.setattr("cellfm_hub.reading.find_counts", unread(reads, find_counts))
    monkeypatch.setattr("cellfm_hub.embedder.column_totals", unread(reads, column_totals))
    names = ["scgpt", "pca", "hvg"]
    options = {"pca": {"n_components": 3}, "hvg": {"n_top_genes": 20}}
    several = cf.embed_file(
        data, names, out=out, part_rows=9, checkpoint={"scgpt": CELLS["checkpoint"]}, options=options, device="cpu", precision="float32"
    )
    assert reads.tolist() == [1] * 40
    assert [summary.key for summary in several] == ["X_scgpt", "X_pca", "X_hvg"]
    result = ad.read_h5ad(out)
    for name in names:
        own = CELLS if name == "scgpt" else {"options": options[name]}
        alone = loaded(name, own).run(data)
        np.testing.assert_allclose(result.obsm[f"X_{name}"], alone.values, atol=2e-6, rtol=0)
        saved = result.uns["cellfm"][f"X_{name}"]
        assert {key: saved[key] for key in alone.receipt} == pytest.approx(alone.receipt)


def unread(reads: Any, look: Callable[..., Any]) -> Any:
    """Return a function whose own look at the data is not counted."""

    def looking(*arguments: Any, **options: Any) -> Any:
        before = reads.copy()
        found = look(*arguments, **options)
        reads[:] = before
        return found

    return looking


def test_resume_with_a_fitted_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one model are kept; the one that is fitted to all rows reads them again."""
    data, out = write_cells(tmp_path / "cells.h5ad", 40), tmp_path / "out.zarr"
    how: dict[str, Any] = {"part_rows": 9, "checkpoint": {"scgpt": CELLS["checkpoint"]}, "options": {"pca": {"n_components": 3}}}
    how |= {"device": "cpu", "precision": "float32"}
    cf.embed_file(data, ["scgpt", "pca"], out=tmp_path / "reference.zarr", **how)
    original = job.Job._compute

    def compute(self: job.Job, rows: Any) -> Any:
        if rows.wanted.number == 3:
            raise KeyboardInterrupt
        return original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "_compute", compute)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(data, ["scgpt", "pca"], out=out, **how)
    cf.embed_file(data, ["scgpt", "pca"], out=out, resume=True, **how)
    assert everything(out) == everything(tmp_path / "reference.zarr")


@pytest.mark.parametrize(
    ("models", "options", "says"),
    [
        (["pca", "scgpt"], {"checkpoint": "folder"}, "by model"),
        (["pca", "scgpt"], {"options": {"n_components": 3}}, "'n_components' is none of pca, scgpt"),
        (["pca", "kmer"], {}, "cells and of sequences"),
        (["pca", "pca"], {}, "each once"),
        (["pca", "hvg"], {"key_added": {"pca": "X", "hvg": "X"}}, "one key"),
        ([], {}, "at least one"),
        ("pca", {"part_rows": 0}, "part_rows=0"),
        ("pca", {"shard": (0, 3)}, "from 1"),
        ("pca", {"shard": (1, 3), "update": True}, "leave out one"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_refused(tmp_path: Path, models: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        cf.embed_file(write_cells(tmp_path / "cells.h5ad", 5), models, out=tmp_path / "out.h5ad", **options)


def test_several_models_need_a_store(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.h5ad or \.zarr"):
        cf.embed_file(write_cells(tmp_path / "cells.h5ad", 5), ["pca", "hvg"], out=tmp_path / "out.npy")


def test_nothing_is_left_of_a_run_that_never_began(tmp_path: Path) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 5)
    with pytest.raises(InputError):
        cf.embed_file(data, "scgpt", out=tmp_path / "out.npy", pooling="none", **CELLS)
    with pytest.raises(InputError, match="does not exist"):
        cf.embed_file(tmp_path / "missing.h5ad", "scgpt", out=tmp_path / "out.npy", **CELLS)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["cells.h5ad"]


def test_tokens_are_not_needed_by_all(tmp_path: Path) -> None:
    """A fitted model alone."""
    data, out = write_cells(tmp_path / "cells.h5ad", 30), tmp_path / "out.parquet"
    summary = cf.embed_file(data, "pca", out=out, options={"n_components": 4}, progress=False)
    assert (summary.rows, summary.dim) == (30, 4)
    np.testing.assert_array_equal(vectors(out, ""), loaded("pca", {"options": {"n_components": 4}}).encode(data))
    assert isinstance(summary.receipt["counts_from"], str)
