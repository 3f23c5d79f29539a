"""Runs that broke off for their input and go on with another one: parts that are not of it are dropped, or nothing is written."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest

import cellfm_hub as cf
from cellfm_hub import sinks
from cellfm_hub.errors import InputError, OutputError
from cellfm_hub.jobs.finished import Finished
from cellfm_hub.jobs.job import Job
from cellfm_hub.jobs.journal import Journal, work_folder
from file_runs import CELLS, DNA, computed, everything, stop_after, vectors, write_cells, write_fasta

PART = 8


def break_off(
    monkeypatch: pytest.MonkeyPatch, data: Path, model: str | list[str], *, after: int, options: dict[str, Any], out: Path
) -> None:
    """Embed; `data` change when so many parts are there, and the run ends."""
    original, done = Job._compute, []

    def compute(self: Job, rows: Any) -> Any:
        done.append(rows)
        if len(done) > after:
            os.utime(data)
        return original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "_compute", compute)
        with pytest.raises(InputError, match=f"was changed or taken away.*{PART * after} rows are finished.*--resume"):
            cf.embed_file(data, model, out=out, part_rows=PART, **options)


def replace_cells(data: Path, rows: int) -> None:
    """Put so many cells there: the first of those before, and behind them others."""
    before = ad.read_h5ad(data)
    more = ad.read_h5ad(write_cells(data.with_name("more.h5ad"), 40, seed=5))
    more.obs_names = [f"more-{i}" for i in range(more.n_obs)]
    after = ad.concat([before, more], merge="same")[:rows].copy()
    after.write_h5ad(data)


@pytest.mark.parametrize(
    ("suffix", "rows"),
    [
        (".npy", 24),  # a part ends there
        (".npy", 21),  # the last part is a shorter one
        (".npy", 60),  # the parts that are finished, and more
        (".parquet", 13),
        (".h5ad", 24),
        (".zarr", 21),
        ("in place", 21),
    ],
)
def test_cells(tmp_path: Path, suffix: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has another number of rows than before: the result is that of a run that never saw the old one."""
    data = write_cells(tmp_path / "cells.h5ad", 48)
    out = data if suffix == "in place" else tmp_path / f"out{suffix}"
    break_off(monkeypatch, data, "scgpt", after=5, options=CELLS, out=out)
    replace_cells(data, rows)
    reference = tmp_path / "reference" / out.name
    reference.parent.mkdir()
    source = Path(shutil.copy2(data, reference)) if out == data else data
    cf.embed_file(source, "scgpt", out=reference, part_rows=PART, **CELLS)
    numbers = computed(monkeypatch)
    assert cf.embed_file(data, "scgpt", out=out, resume=True, **CELLS).rows == rows
    assert numbers == list(range(min(rows // PART, 5), -(-rows // PART)))
    assert everything(out) == everything(reference)
    assert not work_folder(out).exists()


@pytest.mark.parametrize(("suffix", "options"), [(".npy", DNA), (".parquet", DNA | {"level": "token"})], ids=["vectors", "tokens"])
@pytest.mark.parametrize("rows", [24, 13, 60])
def test_sequences(tmp_path: Path, suffix: str, options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for data whose number of rows is known at their end only."""
    data, out = write_fasta(tmp_path / "dna.fa", 48), tmp_path / f"out{suffix}"
    break_off(monkeypatch, data, "nt", after=5, options=options, out=out)
    write_fasta(data, rows)
    reference = tmp_path / "reference" / out.name
    reference.parent.mkdir()
    cf.embed_file(data, "nt", out=reference, part_rows=PART, **options)
    assert cf.embed_file(data, "nt", out=out, resume=True, **options).rows == rows
    got, expected = everything(out), everything(reference)
    assert {name: content for name, content in got.items() if "partial" not in name} == expected


@pytest.mark.slow
def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 48), tmp_path / "out.npy"
    break_off(monkeypatch, data, "scgpt", after=5, options=CELLS, out=out)
    replace_cells(data, 21)
    assert cf.embed_file(data, "scgpt", out=out, resume=True, **CELLS | {"device": "cpu,cpu"}).rows == 21
    cf.embed_file(data, "scgpt", out=tmp_path / "reference.npy", part_rows=PART, **CELLS)
    assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 48), tmp_path / "out.npy"
    break_off(monkeypatch, data, "scgpt", after=2, options=CELLS | {"shard": (1, 2)}, out=out)
    replace_cells(data, 21)
    cf.embed_file(data, "scgpt", out=out, shard=(1, 2), resume=True, **CELLS)
    cf.embed_file(data, "scgpt", out=out, shard=(2, 2), part_rows=PART, **CELLS)
    assert cf.merge(out)[0].rows == 21
    cf.embed_file(data, "scgpt", out=tmp_path / "reference.npy", part_rows=PART, **CELLS)
    assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()


def test_models_that_are_fitted_are_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their vectors are of all rows of the old input, finished or not."""
    data, out = write_cells(tmp_path / "cells.h5ad", 48), tmp_path / "out.h5ad"
    options: dict[str, Any] = CELLS | {"checkpoint": {"scgpt": CELLS["checkpoint"]}, "options": {"pca": {"n_components": 4}}}
    original = Job.fit

    def fit(self: Job) -> Any:
        yield from original(self)
        os.utime(data)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "fit", fit)
        with pytest.raises(InputError, match="was changed or taken away"):
            cf.embed_file(data, ["scgpt", "pca"], out=out, part_rows=PART, **options)
    replace_cells(data, 21)
    cf.embed_file(data, ["scgpt", "pca"], out=out, resume=True, **options)
    cf.embed_file(data, ["scgpt", "pca"], out=tmp_path / "reference.h5ad", part_rows=PART, **options)
    for key in ("X_scgpt", "X_pca"):
        np.testing.assert_allclose(vectors(out, key), vectors(tmp_path / "reference.h5ad", key), atol=2e-6, rtol=0)


def test_interrupted_while_comparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not compared before the second end is compared by the run after it."""
    data, out = write_cells(tmp_path / "cells.h5ad", 48), tmp_path / "out.npy"
    break_off(monkeypatch, data, "scgpt", after=4, options=CELLS, out=out)
    with h5py.File(data, "r+") as file:
        for row in (3, 20):  # in the first part and in the third
            file["X/data"][file["X/indptr"][row]] += 100
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(data, "scgpt", out=out, resume=True, **CELLS)
    numbers = computed(monkeypatch)
    cf.embed_file(data, "scgpt", out=out, resume=True, **CELLS)
    assert numbers == [0, 2, 4, 5]
    cf.embed_file(data, "scgpt", out=tmp_path / "reference.npy", part_rows=PART, **CELLS)
    assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()


# Nothing is written where rows do not agree


def finished(monkeypatch: pytest.MonkeyPatch, data: Path, model: str, out: Path, options: dict[str, Any]) -> Journal:
    """Compute all parts, and stop before the result is written."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sinks, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(data, model, out=out, part_rows=PART, **options)
    with Journal(work_folder(out)) as journal:
        return journal


SUFFIXES = [".npy", ".parquet", ".h5ad", ".zarr", "in place"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_too_few_or_too_many_rows(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 20)
    out = data if suffix == "in place" else tmp_path / f"out{suffix}"
    journal = finished(monkeypatch, data, "scgpt", out, CELLS)
    header, folder = journal.header, work_folder(out)
    assert header is not None
    parts = [(folder, journal.parts[number]) for number in range(3)]
    before, names = data.read_bytes(), sorted(path.name for path in tmp_path.iterdir())
    for wrong in (parts[:-1], [*parts, parts[0]]):
        with pytest.raises(InputError, match=r"(16|28) vectors of X_scgpt, the data have 20 rows; .*--overwrite"):
            sinks.write(out, Finished(header, wrong, {}), source=data, folder=folder)
    assert data.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", "in place"])
def test_rows_of_other_cells(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as in `obs`, but in another order; or more of them in `obs`."""
    data = write_cells(tmp_path / "cells.h5ad", 20)
    out = data if suffix == "in place" else tmp_path / f"out{suffix}"
    journal = finished(monkeypatch, data, "scgpt", out, CELLS)
    header, folder = journal.header, work_folder(out)
    assert header is not None
    parts = [(folder, journal.parts[number]) for number in range(3)]
    cells = ad.read_h5ad(data)
    order = np.r_[:17, 18, 17, 19]
    for wrong, says in (
        (cells[order], r"row 17 of the finished parts is 'cell-17', that row of the data is 'cell-18'"),
        (cells[:12], "row 12 of the finished parts is 'cell-12', that row of the data does not exist"),
    ):
        wrong.copy().write_h5ad(data)
        before, names = data.read_bytes(), sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(InputError, match=says):
            sinks.write(out, Finished(header, parts, {}), source=data, folder=folder)
        assert data.read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_rows_without_a_finished_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FASTA file does not say how many there are."""
    data, out = write_fasta(tmp_path / "dna.fa", 20), tmp_path / "out.npy"
    journal = finished(monkeypatch, data, "nt", out, DNA)
    with journal:
        journal.drop(journal.parts[1])
    monkeypatch.setattr("cellfm_hub.jobs.run.Run._compute", lambda *_: None)
    with pytest.raises(InputError, match="part 1 is not finished"):
        cf.embed_file(data, "nt", out=out, resume=True, **DNA)
    assert not out.exists()


def test_another_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 20), tmp_path / "out.npy"
    journal = finished(monkeypatch, data, "scgpt", out, CELLS)
    assert journal.header is not None
    parts = [(work_folder(out), replace(journal.parts[n], widths=[32 + n])) for n in range(3)]
    with pytest.raises(InputError, match="of 32 and of 33 numbers"):
        sinks.write(out, Finished(journal.header, parts, {}), source=data, folder=work_folder(out))


def test_finished_in_place_and_then_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is part of the file that it was made from: whether the rest changed, its rows tell."""
    data = write_cells(tmp_path / "cells.h5ad", 12)
    cf.embed_file(data, "scgpt", out=data, **CELLS)
    numbers = computed(monkeypatch)
    assert cf.embed_file(data, "scgpt", out=data, resume=True, **CELLS).rows == 12
    edited = ad.read_h5ad(data)
    edited.X = edited.X[::-1].copy()
    edited.write_h5ad(data)
    with pytest.raises(OutputError, match="already has obsm"):
        cf.embed_file(data, "scgpt", out=data, resume=True, **CELLS)
    assert numbers == []


@pytest.mark.parametrize("name", ["x.bed", "x.vcf"])
def test_finished_and_then_another_genome(tmp_path: Path, name: str) -> None:
    genome, data, out = tmp_path / "g.fa", tmp_path / name, tmp_path / "out.npy"
    data.write_text("chr1\t0\t30\nchr1\t40\t90\n" if name == "x.bed" else "chr1\t41\t.\tA\tC\n")
    genome.write_text(f">chr1\n{'ACGTTGCA' * 20}\n")
    cf.embed_file(data, "nt", out=out, genome=genome, **DNA)
    os.utime(genome, (1, 1))  # touched is not changed
    assert cf.embed_file(data, "nt", out=out, genome=genome, resume=True, **DNA).rows == 2
    genome.write_text(f">chr1\n{'ACGTTGCC' * 20}\n" if name == "x.bed" else f">chr1\n{'ACCTTGCA' * 20}\n")
    with pytest.raises(OutputError, match="exists; pass --overwrite"):
        cf.embed_file(data, "nt", out=out, genome=genome, resume=True, **DNA)


def test_shards_with_a_genome_that_was_touched(tmp_path: Path) -> None:
    """A copy of the genome on another machine is as good."""
    genome, data, out = tmp_path / "g.fa", tmp_path / "x.bed", tmp_path / "out.npy"
    data.write_text("chr1\t0\t30\nchr1\t40\t90\n")
    genome.write_text(f">chr1\n{'ACGTTGCA' * 20}\n")
    for i in (1, 2):
        cf.embed_file(data, "nt", out=out, genome=genome, shard=(i, 2), **DNA)
        os.utime(genome, (i, i))
    assert cf.merge(out)[0].rows == 2
