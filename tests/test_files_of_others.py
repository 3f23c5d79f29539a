"""Nothing that the hub did not write itself is replaced or removed, unless the user named it and said `--overwrite`."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import cellfm_hub as cf
from cellfm_hub import sinks
from cellfm_hub.cli import app
from cellfm_hub.errors import InputError, OutputError, SequenceError
from cellfm_hub.jobs import beside
from cellfm_hub.jobs.journal import Journal, work_folder
from file_runs import CELLS, DNA, computed, everything, loaded, stop_after, write_cells, write_fasta

SIDE_FILES = [".ids.txt", ".receipt.json", ".rows.npz", ".qc.parquet"]


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "cells.h5ad", 20)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("suffix", SIDE_FILES)
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"update": True}, {"qc": True}], ids=["new", "overwrite", "update", "qc"])
def test_beside_an_array(cells: Path, tmp_path: Path, suffix: str, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before any work is done, whether the result would have such a file or not."""
    (tmp_path / f"x{suffix}").write_bytes(b'{"mine": 1}')
    before, numbers = files(tmp_path), computed(monkeypatch)
    with pytest.raises(OutputError, match=rf"x\{suffix} exists, and no receipt of x.npy names it.*-o"):
        cf.embed_file(cells, "scgpt", out=tmp_path / "x.npy", **CELLS, **flags)
    assert numbers == []
    assert files(tmp_path) == before


def test_beside_an_earlier_array(cells: Path, tmp_path: Path) -> None:
    """The receipt names what was written with it, and that goes with the array; a file that came later stays."""
    out = tmp_path / "x.npy"
    cf.embed_file(cells, "scgpt", out=out, qc=True, **CELLS)
    assert json.loads((tmp_path / "x.receipt.json").read_text())["beside"].split() == SIDE_FILES
    cf.embed_file(cells, "scgpt", out=out, overwrite=True, **CELLS)
    assert sorted(path.name for path in tmp_path.glob("x.*")) == sorted(["x.npy", *(f"x{suffix}" for suffix in SIDE_FILES[:3])])
    (tmp_path / "x.qc.parquet").write_bytes(b"mine")
    before = files(tmp_path)
    with pytest.raises(OutputError, match=r"x\.qc\.parquet exists, and no receipt"):
        cf.embed_file(cells, "scgpt", out=out, overwrite=True, **CELLS)
    assert files(tmp_path) == before


def test_beside_a_merged_array(cells: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    cf.embed_file(cells, "scgpt", out=out, shard=(1, 1), **CELLS)
    (tmp_path / "x.ids.txt").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"x\.ids\.txt exists"):
        cf.merge(out, overwrite=True)
    assert (tmp_path / "x.ids.txt").read_bytes() == b"mine"
    (tmp_path / "x.ids.txt").unlink()
    assert cf.merge(out)[0].rows == 20


def test_a_file_that_came_while_rows_were_computed(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.npy"
    original = sinks._write_npy

    def write(*arguments: Any) -> None:
        original(*arguments)
        (tmp_path / "x.rows.npz").write_bytes(b"mine")

    with monkeypatch.context() as patch:
        patch.setattr(sinks, "_write_npy", write)
        with pytest.raises(OutputError, match=r"x\.rows\.npz exists.*--resume"):
            cf.embed_file(cells, "scgpt", out=out, **CELLS)
    assert [path.name for path in tmp_path.glob("x.*")] == ["x.rows.npz"]
    (tmp_path / "x.rows.npz").unlink()
    numbers = computed(monkeypatch)
    cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    assert numbers == []


def test_an_array_never_stands_beside_the_names_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is replaced by one of other rows, with a crash after each step: there is the old one, the new one, or no array."""

    class Crash(BaseException):
        pass

    def names(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir()}

    def write(folder: Path, content: str, suffixes: list[str]) -> None:
        for suffix in (".npy", *suffixes):
            text = json.dumps({"beside": " ".join(suffixes), "of": content}) if suffix == beside.RECEIPT else content
            (folder / f"x{suffix}").write_text(text)

    old_suffixes, new_suffixes = SIDE_FILES, SIDE_FILES[:3]
    count, fatal = 0, 0

    def counted(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal:
                raise Crash
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    seen = set()
    for fatal in range(1, 8):
        count, folder = 0, tmp_path / str(fatal)
        growing = folder / "work"
        growing.mkdir(parents=True)
        write(folder, "old", old_suffixes)
        write(growing, "new", new_suffixes)
        finished = False
        try:
            beside.appear(growing / "x.npy", folder / "x.npy", new_suffixes)
            finished = True
        except Crash:
            state = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
            array = state.get("x.npy")
            seen.add(array)
            if array is not None:
                assert all(array in content for content in state.values())
            write(growing, "new", new_suffixes)
            beside.appear(growing / "x.npy", folder / "x.npy", new_suffixes)  # what --resume does
        assert names(folder) == {"work", "x.npy", *(f"x{suffix}" for suffix in new_suffixes)}
        assert all("new" in path.read_text() for path in folder.glob("x.*"))
    assert finished
    assert seen == {"old", None}


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".h5ad", ".zarr"])
def test_a_folder_is_no_result(cells: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"x{suffix}"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(OutputError, match="is a folder, but not a result of cellfm"):
        cf.embed_file(cells, "scgpt", out=out, overwrite=True, **CELLS)
    assert files(tmp_path) == before


def test_a_store_with_data_is_no_result(cells: Path, tmp_path: Path) -> None:
    """An AnnData store of the user's stays, even one with vectors; a result is replaced."""
    out = tmp_path / "x.zarr"
    adata = ad.read_h5ad(cells)
    cf.embed(adata, "scgpt", **CELLS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Writing zarr v2 data")
        adata.write_zarr(out)
    before = files(tmp_path)
    with pytest.raises(OutputError, match="is a folder, but not a result of cellfm"):
        cf.embed_file(cells, "scgpt", out=out, overwrite=True, **CELLS)
    assert files(tmp_path) == before
    shutil.rmtree(out)
    for _ in range(2):
        cf.embed_file(cells, "scgpt", out=out, overwrite=True, **CELLS)
    shutil.rmtree(out)
    out.write_text("mine")
    with pytest.raises(OutputError, match=r"is a file, a \.zarr result is a folder"):
        cf.embed_file(cells, "scgpt", out=out, overwrite=True, **CELLS)


@pytest.mark.parametrize("shard", [None, (1, 2)])
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=["new", "overwrite", "resume"])
def test_a_folder_named_like_the_work_folder(cells: Path, tmp_path: Path, shard: tuple[int, int] | None, flags: dict[str, Any]) -> None:
    folder = work_folder(tmp_path / "x.npy", shard)
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is a folder of something else \(with 'thesis.txt'\).*move it away"):
        cf.embed_file(cells, "scgpt", out=tmp_path / "x.npy", shard=shard, **CELLS, **flags)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_merge_leaves_a_folder_named_like_a_shard(tmp_path: Path) -> None:
    folder = tmp_path / "x.npy.shard-1-of-1"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="is a folder of something else"):
        cf.merge(tmp_path / "x.npy")
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_file_that_was_put_into_the_work_folder(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends as ever, and leaves it."""
    out = tmp_path / "x.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, part_rows=8, **CELLS)
    (work_folder(out) / "notes").mkdir()
    (work_folder(out) / "notes" / "mine.txt").write_text("mine")
    cf.embed_file(cells, "scgpt", out=out, overwrite=True, part_rows=8, **CELLS)
    assert files(work_folder(out)) == {"notes/mine.txt": b"mine"}


def test_partial_results(tmp_path: Path) -> None:
    """What stands before a break is not written over a file that is there; what this run wrote before is replaced."""
    data, out, kept = write_fasta(tmp_path / "dna.fa", 24), tmp_path / "x.parquet", tmp_path / "x.partial.parquet"
    good = data.read_text()
    data.write_text(good + ">wrong\nACGT!\n")
    kept.write_text("mine")
    with pytest.raises(SequenceError, match=r"24 rows before that place are not written.*x\.partial\.parquet.*exists.*--resume"):
        cf.embed_file(data, "nt", out=out, part_rows=8, **DNA)
    assert kept.read_text() == "mine"
    kept.unlink()
    for rows in (24, 32):
        with pytest.raises(SequenceError, match=f"{rows} rows before that place stand in"):
            cf.embed_file(data, "nt", out=out, resume=True, **DNA)
        assert len(pd.read_parquet(kept)) == rows
        more = write_fasta(tmp_path / "more.fa", 8, seed=3).read_text()
        data.write_text(good + more + ">wrong\nACGT!\n")


def test_columns_of_obs(cells: Path) -> None:
    """In place: `qc` does not write over columns of the same names."""
    adata = ad.read_h5ad(cells)
    adata.obs["X_scgpt_genes_used"] = np.arange(20)
    adata.write_h5ad(cells)
    before = cells.read_bytes()
    with pytest.raises(OutputError, match=r"already has obs\['X_scgpt_genes_used'\]"):
        cf.embed_file(cells, "scgpt", out=cells, qc=True, **CELLS)
    assert cells.read_bytes() == before
    cf.embed_file(cells, "scgpt", out=cells, qc=True, overwrite=True, **CELLS)
    assert ad.read_h5ad(cells).obs["X_scgpt_genes_used"].max() > 19


def test_resumed_after_the_last_moment_with_other_options(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, killed while the file was changed: the change is brought to its end, but it is not what is asked for now."""
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda _: None)
        cf.embed_file(cells, "scgpt", out=cells, part_rows=8, **CELLS)
    assert (work_folder(cells) / "redo.npz").exists()
    with pytest.raises(OutputError, match="pooling was 'cls', now 'mean'"):
        cf.embed_file(cells, "scgpt", out=cells, resume=True, pooling="mean", **CELLS)
    assert cf.embed_file(cells, "scgpt", out=cells, resume=True, **CELLS).rows == 20
    assert not work_folder(cells).exists()
    assert everything(cells)


@pytest.mark.parametrize("name", ["demo.h5ad", "demo.png"])
def test_demo(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cells(tmp_path / name, 8)
    before = files(tmp_path)
    refused = CliRunner().invoke(app, ["demo"])
    assert refused.exit_code == 1
    assert f"{name} exists" in refused.output
    assert files(tmp_path) == before


def test_plot(tmp_path: Path, cells: Path) -> None:
    picture = tmp_path / "umap.png"
    picture.write_text("mine")
    refused = CliRunner().invoke(app, ["plot", str(cells), "-o", str(picture)])
    assert refused.exit_code == 1
    assert "--overwrite" in refused.output
    assert picture.read_text() == "mine"


def test_names_that_begin_like_ours(cells: Path, tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "x.npy")
    folder.mkdir()
    for name in ("part-notes.txt", "result-of-my-life", "part-000001.npz.bak", "known-genes.npy"):
        (folder / name).write_text("mine")
        with pytest.raises(OutputError, match="is a folder of something else"):
            cf.embed_file(cells, "scgpt", out=tmp_path / "x.npy", **CELLS)
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()


def test_a_link_to_nothing_is_not_replaced(cells: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    out.symlink_to(tmp_path / "not mounted" / "x.npy")
    with pytest.raises(OutputError, match=r"is a link to .* which does not exist"):
        cf.embed_file(cells, "scgpt", out=out, **CELLS)
    assert out.is_symlink()


@pytest.mark.parametrize("suffix", [".h5ad", "in place"])
def test_receipts_of_another_kind(cells: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`uns["cellfm"]` of the user's: said before anything is computed."""
    adata = ad.read_h5ad(cells)
    adata.uns["cellfm"] = "mine"
    adata.write_h5ad(cells)
    numbers = computed(monkeypatch)
    with pytest.raises(OutputError, match=r"uns\['cellfm'\] of its own"):
        cf.embed_file(cells, "scgpt", out=cells if suffix == "in place" else tmp_path / f"out{suffix}", **CELLS)
    with pytest.raises(InputError, match=r"uns\['cellfm'\] is a str"):
        cf.embed(adata, "scgpt", **CELLS)
    assert numbers == []


@pytest.mark.parametrize("line", ["[]", "5", "null", "{}", '{"part": {"a": 1}}', "[" * 100_000], ids=range(6))
def test_a_damaged_journal(cells: Path, tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before the damage counts."""
    out = tmp_path / "x.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, part_rows=4, **CELLS)
    journal = work_folder(out) / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]) + line + "\n")
    cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    np.testing.assert_allclose(np.load(out), loaded("scgpt", CELLS).encode(cells), atol=2e-6, rtol=0)


def test_a_journal_that_names_a_file_elsewhere(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are in the work folder; what stands outside of it is not even looked at."""
    out = tmp_path / "x.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, part_rows=4, **CELLS)
    folder = work_folder(out)
    (folder / "part-000001.npz").rename(tmp_path / "elsewhere.npz")
    journal = folder / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"part-000001.npz"', '"../elsewhere.npz"'))
    numbers = computed(monkeypatch)
    cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    assert numbers[0] == 1
