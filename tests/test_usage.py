"""Options that contradict each other, or of which one would have no effect: one line and exit code 2, before anything is fetched."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cellfm_hub as cf
from cellfm_hub.cli import app
from cellfm_hub.errors import InputError, OutputError, UsageError
from file_runs import CELLS, write_cells, write_fasta


def cellfm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_usage(done: Result, *fragments: str) -> None:
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "cells.h5ad", 8)


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    return write_fasta(tmp_path / "dna.fa", 4)


def test_in_place_with_another_output(cells: Path) -> None:
    before, other = cells.read_bytes(), cells.with_name("other.h5ad")
    assert_usage(cellfm("embed", cells, "-m", "pca", "--in-place", "-o", other), "--in-place", str(other))
    assert cells.read_bytes() == before
    assert not other.exists()
    done = cellfm("embed", cells, "-m", "pca", "--option", "n_components=2", "--in-place", "-o", cells)
    assert done.exit_code == 0, done.output  # says the same twice


@pytest.mark.parametrize("spelling", ["same", "dots", "symbolic link", "hard link"])
def test_output_that_is_the_input(cells: Path, spelling: str) -> None:
    out = {"same": cells, "dots": cells.parent / "cache" / ".." / cells.name}.get(spelling, cells.with_name("link.h5ad"))
    (cells.parent / "cache").mkdir(exist_ok=True)
    if spelling == "symbolic link":
        out.symlink_to(cells.name)
    elif spelling == "hard link":
        os.link(cells, out)
    before = cells.read_bytes()
    for more in ((), ("--overwrite",), ("--resume",), ("--shard", "1/2")):
        assert_usage(cellfm("embed", cells, "-m", "pca", "-o", out, *more), "is the input itself", "--in-place")
    assert cells.read_bytes() == before
    done = cellfm("embed", cells, "-m", "pca", "--option", "n_components=2", "-o", out, "--in-place")
    assert done.exit_code == 0, done.output
    # Python has one argument for both, and says so.
    assert cf.embed_file(cells, "pca", out=out, options={"n_components": 2}, overwrite=True).rows == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--resume", "--overwrite"), "leave out one of resume and overwrite"),
        (("--update", "--shard", "1/2"), "leave out one of update and shard"),
        (("--update", "--level", "gene"), "leave out update"),
        (("--qc", "--level", "gene"), "qc"),
        (("--pooling", "mean", "--level", "gene"), "not pooled"),
        (("--long", "tile"), "long: not an option"),
        (("--genome", "hg38.fa"), "genome: not an option"),
        (("--window", "64"), "window: not an option"),
        (("--reverse-complement", "mean"), "reverse_complement: not an option"),
        (("--checkpoint", "folder", "--revision", "main"), "leave out one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_cells(cells: Path, arguments: Sequence[str], says: str) -> None:
    """The published weights are not here: that is not even looked at."""
    assert_usage(cellfm("embed", cells, "-m", "scgpt", *arguments), says)
    assert sorted(path.name for path in cells.parent.iterdir() if path.name != "cache") == ["cells.h5ad"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--overlap", "10"), "long='tile'"),
        (("--overlap", "10", "--long", "truncate"), "long='tile'"),
        (("--window", "64"), "VCF"),
        (("--genome", "hg38.fa"), "BED or VCF"),
        (("--qc",), "qc"),
        (("--layer", "counts"), "layer: not an option"),
        (("--gene-ids", "index"), "gene_ids: not an option"),
        (("--species", "human"), "species: not an option"),
        (("--reverse-complement", "mean", "--level", "token"), "other strand"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_sequences(fasta: Path, arguments: Sequence[str], says: str) -> None:
    assert_usage(cellfm("embed", fasta, "-m", "nt", *arguments), says)
    assert sorted(path.name for path in fasta.parent.iterdir() if path.name != "cache") == ["dna.fa"]


def test_a_window_is_that_of_variants(tmp_path: Path) -> None:
    bed = tmp_path / "peaks.bed"
    bed.write_text("chr1\t1\t9\n")
    assert_usage(cellfm("embed", bed, "-m", "kmer", "--genome", "hg38.fa", "--window", "64"), "VCF")


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "scgpt", "--checkpoint", "a", "--checkpoint", "b"),
        ("-m", "scgpt", "--revision", "a", "--revision", "b"),
        ("-m", "pca", "--key-added", "a", "--key-added", "pca=b"),
        ("-m", "pca", "--option", "n_components=3", "--option", "n_components=4"),
        ("-m", "pca", "-m", "hvg", "--option", "pca.n_components=3", "--option", "pca.n_components=4"),
    ],
    ids=lambda value: value[-2],
)
def test_given_twice(cells: Path, arguments: Sequence[str]) -> None:
    """The second would silently replace the first."""
    done = cellfm("embed", cells, *arguments)
    assert done.exit_code == 2
    assert "given twice" in " ".join(done.stderr.replace("│", " ").split())


def test_other_commands(cells: Path, fasta: Path) -> None:
    assert_usage(cellfm("check", cells, "--long", "tile"), "long")
    assert_usage(cellfm("check", cells, "-m", "pca", "--window", "7"), "window")
    assert_usage(cellfm("check", fasta, "--layer", "counts"), "layer")
    assert_usage(cellfm("check", fasta, "-m", "kmer", "--window", "7"), "VCF")
    assert_usage(cellfm("check", fasta, "--genome", "hg38.fa"), "BED or VCF")
    assert_usage(cellfm("explain", cells, "-m", "scgpt", "--cell", "x", "--checkpoint", "a", "--revision", "b"), "leave out one")
    assert_usage(cellfm("pull", "geneformer", "nt", "--revision", "abc"), "one after the other")
    assert_usage(cellfm("cache", "--delete", "geneformer", "--json"), "--json")
    done = cellfm("pull", "pca", "--revision", "abc")
    assert done.exit_code == 1
    assert "no weights" in done.stderr


def test_python(cells: Path) -> None:
    """The same is an InputError there."""
    assert issubclass(UsageError, InputError)
    with pytest.raises(UsageError, match="resume and overwrite"):
        cf.embed_file(cells, "pca", out=cells.with_name("out.npy"), resume=True, overwrite=True)
    with pytest.raises(UsageError, match="tile"):
        cf.embed(["ACGT"], "nt", overlap=3)
    with pytest.raises(UsageError, match="VCF"):
        cf.load("kmer").encode(["ACGT"], window=64)
    with pytest.raises(UsageError, match="checkpoint"):
        cf.load("scgpt", checkpoint="folder", revision="abc")
    with pytest.raises(InputError, match="no '/'"):
        cf.embed_file(cells, "pca", out=cells.with_name("out.h5ad"), key_added="a/b")


def test_data_and_result_inside_each_other(tmp_path: Path) -> None:
    """A result inside the folder that is read, and a store that would be replaced together with the data in it."""
    store, inner = tmp_path / "outs.zarr", tmp_path / "outs.zarr" / "cells.h5ad"
    store.mkdir()
    write_cells(inner, 8)
    for out in (store, store / ".." / "outs.zarr"):
        with pytest.raises(OutputError, match="holds the input"):
            cf.embed_file(inner, "pca", out=out, overwrite=True, options={"n_components": 2})
    assert inner.exists()
    with pytest.raises(OutputError, match="inside the input"):
        cf.embed_file(store, "pca", out=store / "x.h5ad", **{k: v for k, v in CELLS.items() if k != "checkpoint"})


@pytest.mark.parametrize("key", [".", "..", "a/b", "a\0b", "a\nb"])
def test_keys_that_no_file_can_hold(tmp_path: Path, key: str) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 4)
    with pytest.raises(InputError, match="key_added="):
        cf.embed_file(data, "scgpt", out=tmp_path / "out.h5ad", key_added=key, **CELLS)


@pytest.mark.parametrize("out", ["", ".", "/", "x.csv"])
def test_names_that_are_no_result(tmp_path: Path, out: str) -> None:
    with pytest.raises(OutputError, match="results are written as"):
        cf.embed_file(write_cells(tmp_path / "cells.h5ad", 4), "scgpt", out=out, **CELLS)
