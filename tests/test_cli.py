"""The command line as a user runs it, in a process of its own."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

import cellfm_hub as cf
from golden_cases import DATA, LARGE, PORTABLE

GENEFORMER = PORTABLE / "geneformer-v2-basic"
NT = PORTABLE / "nt-v2-basic"


def cellfm(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "cellfm_hub.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def assert_fails(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("cellfm: error: ")
    assert done.stderr.count("\n") == 1
    for fragment in fragments:
        assert fragment in done.stderr


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return Path(shutil.copy(GENEFORMER / "input.h5ad", tmp_path / "cells.h5ad"))


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    return Path(shutil.copy(NT / "sequences.fasta", tmp_path / "dna.fa"))


EMBED_CELLS = ("--model", "geneformer", "--checkpoint", GENEFORMER / "checkpoint", "--device", "cpu", "--precision", "float32")
EMBED_DNA = ("--model", "nt", "--checkpoint", NT / "checkpoint", "--precision", "float32")


def expected_cells(cells: Path) -> np.ndarray:
    return cf.load("geneformer", checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32").encode(cells)


def test_embed_cells(cells: Path) -> None:
    """Data and model are enough; the result stands beside the data, which are untouched."""
    before = cells.read_bytes()
    done = cellfm("embed", cells, *EMBED_CELLS)
    assert done.returncode == 0, done.stderr
    assert cells.read_bytes() == before
    out = cells.with_name("cells.geneformer.h5ad")
    assert "13 cells x 32" in done.stdout
    assert str(out) in done.stdout
    assert "2 of 13 rows" in done.stderr
    result, source = ad.read_h5ad(out), ad.read_h5ad(cells)
    np.testing.assert_array_equal(result.obsm["X_geneformer"], expected_cells(cells))
    assert list(result.obs_names) == list(source.obs_names)
    assert (result.X != source.X).nnz == 0
    receipt = result.uns["cellfm"]["X_geneformer"]
    for key, value in {
        "model": "geneformer",
        "n_rows": 13,
        "n_empty": 2,
        "gene_ids": "ensembl_id",
        "pooling": "cls",
        "output_layer": 1,
    }.items():
        assert receipt[key] == value
    assert_fails(cellfm("embed", cells, *EMBED_CELLS), "exists", "--overwrite")
    assert cellfm("embed", cells, *EMBED_CELLS, "--overwrite", "--seed", 1).returncode == 0


def test_in_place(cells: Path) -> None:
    """The file gains the embedding, and its matrix is not rewritten."""
    with h5py.File(cells) as file:
        address = file["X/data"].id.get_offset() or file["X/data"].id.get_chunk_info(0).byte_offset
    done = cellfm("embed", cells, *EMBED_CELLS, "--in-place", "--key-added", "X_mine")
    assert done.returncode == 0, done.stderr
    with h5py.File(cells) as file:
        assert (file["X/data"].id.get_offset() or file["X/data"].id.get_chunk_info(0).byte_offset) == address
    result = ad.read_h5ad(cells)
    np.testing.assert_array_equal(result.obsm["X_mine"], expected_cells(cells))
    assert result.uns["cellfm"]["X_mine"]["family"] == "geneformer"
    assert_fails(cellfm("embed", cells, *EMBED_CELLS, "--in-place", "--key-added", "X_mine"), "X_mine", "--overwrite")


@pytest.mark.parametrize("suffix", [".zarr", ".parquet", ".npy"])
def test_other_outputs(cells: Path, suffix: str) -> None:
    out = cells.with_name(f"result{suffix}")
    done = cellfm("embed", cells, *EMBED_CELLS, "-o", out)
    assert done.returncode == 0, done.stderr
    expected, names = expected_cells(cells), list(ad.read_h5ad(cells).obs_names)
    if suffix == ".zarr":
        result = ad.read_zarr(out)
        got, rows, receipt = result.obsm["X_geneformer"], list(result.obs_names), result.uns["cellfm"]["X_geneformer"]
    elif suffix == ".parquet":
        import pyarrow.parquet as pq

        frame = pd.read_parquet(out)
        got, rows, receipt = frame.to_numpy(), list(frame.index), json.loads(pq.read_schema(out).metadata[b"cellfm"])
    else:
        got, rows = np.load(out), out.with_suffix(".ids.txt").read_text().splitlines()
        receipt = json.loads(out.with_suffix(".receipt.json").read_text())
    np.testing.assert_array_equal(got, expected)
    assert rows == names
    assert receipt["n_rows"] == 13
    assert not list(cells.parent.glob(".*partial"))


def test_embed_sequences(fasta: Path) -> None:
    done = cellfm("embed", fasta, *EMBED_DNA)
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(fasta.with_name("dna.nt.parquet"))
    assert frame.shape == (16, 8)
    assert frame.index[0] == "one_bp"
    done = cellfm("embed", fasta, *EMBED_DNA, "--option", "case=as-is", "-o", fasta.with_name("dna.h5ad"), "--json")
    assert json.loads(done.stdout)["receipt"]["options"] == '{"case": "as-is"}'
    assert list(ad.read_h5ad(fasta.with_name("dna.h5ad")).obs_names) == list(frame.index)


def test_one_vector_per_token(cells: Path, fasta: Path) -> None:
    """A table with a row per gene, token or base: its input, its place there, what it is."""
    done = cellfm("embed", cells, *EMBED_CELLS, "--level", "gene")
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(cells.with_name("cells.geneformer.parquet"))
    model = cf.load("geneformer", checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32")
    expected = model.encode(cells, level="gene")
    np.testing.assert_array_equal(frame.iloc[:, 3:].to_numpy(), expected.values)
    assert frame["token"].tolist() == expected.names.tolist()
    first = frame[frame["id"] == ad.read_h5ad(cells).obs_names[0]]
    assert first["position"].tolist() == list(range(len(expected.row(0))))
    done = cellfm("embed", fasta, *EMBED_DNA, "--level", "base")
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(fasta.with_name("dna.nt.parquet"))["id"].value_counts()
    assert rows["rand_251bp"] == 251
    assert_fails(cellfm("embed", cells, *EMBED_CELLS, "--level", "gene", "-o", cells.with_name("x.h5ad")), ".parquet")


def test_intervals_and_variants(tmp_path: Path) -> None:
    """BED and VCF with a genome."""
    (tmp_path / "genome.fa").write_text(">chr1\n" + "ACGTTGCAAC" * 30 + "\n")
    (tmp_path / "peaks.bed").write_text("chr1\t10\t40\tforward\t0\t+\nchr1\t10\t40\treverse\t0\t-\n")
    (tmp_path / "calls.vcf").write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\nchr1\t101\trs1\tA\tT\n")
    genome = ("--genome", tmp_path / "genome.fa")
    done = cellfm("embed", tmp_path / "peaks.bed", *EMBED_DNA, *genome)
    assert done.returncode == 0, done.stderr
    assert list(pd.read_parquet(tmp_path / "peaks.nt.parquet").index) == ["forward", "reverse"]
    done = cellfm("embed", tmp_path / "calls.vcf", *EMBED_DNA, *genome, "--level", "variant", "--window", 60)
    assert done.returncode == 0, done.stderr
    assert pd.read_parquet(tmp_path / "calls.nt.parquet").shape == (1, 8)
    assert_fails(cellfm("embed", tmp_path / "peaks.bed", *EMBED_DNA, "--overwrite"), "genome")


def test_rows_before_a_bad_place_are_kept(tmp_path: Path) -> None:
    """A file cut short: one line, and what was read before the break stands in a file of its own."""
    letters = np.random.default_rng(0).choice(list("ACGT"), (400, 300))
    records = {f"r{i}": "".join(row) for i, row in enumerate(letters)}
    text = "".join(f">{name}\n{sequence}\n" for name, sequence in records.items())
    short = tmp_path / "short.fa.gz"
    packed = gzip.compress(text.encode())
    short.write_bytes(packed[: len(packed) * 2 // 3])
    assert_fails(cellfm("embed", short, *EMBED_DNA), "not a complete gzip file", "short.nt.partial.parquet")
    kept = pd.read_parquet(tmp_path / "short.nt.partial.parquet")
    assert 100 < len(kept) < 400
    model = cf.load("nt", checkpoint=NT / "checkpoint", device="cpu", precision="float32")
    np.testing.assert_array_equal(kept.to_numpy(), model.encode([records[name] for name in kept.index]))
    assert not (tmp_path / "short.nt.parquet").exists()


def test_errors(cells: Path, tmp_path: Path) -> None:
    assert_fails(cellfm("embed", cells, "--model", "genefomer"), "'genefomer'", "'geneformer'")
    assert_fails(cellfm("embed", tmp_path / "missing.h5ad", "--model", "pca"), "missing.h5ad", "does not exist")
    assert_fails(cellfm("embed", cells, *EMBED_CELLS, "-o", tmp_path / "no" / "out.h5ad"), "folder", "does not exist")
    assert_fails(cellfm("embed", cells, *EMBED_CELLS, "-o", tmp_path / "out.csv"), ".parquet")
    assert_fails(cellfm("embed", cells, "--model", "kmer", "--option", "q=1"), "'q'", "k=4")
    assert_fails(cellfm("embed", cells, *EMBED_CELLS, "--device", "cuda:7"), "cuda:7", "cpu")
    assert_fails(cellfm("info", "genefomer"), "'geneformer'")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(cells: Path) -> None:
    cells.parent.chmod(0o500)
    try:
        assert_fails(cellfm("embed", cells, *EMBED_CELLS), "no permission", "-o")
    finally:
        cells.parent.chmod(0o700)


def test_unwritable_output() -> None:
    """A place where even root cannot write."""
    assert_fails(cellfm("embed", GENEFORMER / "input.h5ad", *EMBED_CELLS, "-o", "/proc/result.npy"), "/proc/result.npy", "-o")


def test_usage_errors(cells: Path) -> None:
    for arguments in (("embed",), ("embed", cells, "--model"), ("nonsense",), ("embed", cells, "--model", "pca", "--option", "novalue")):
        assert cellfm(*arguments).returncode == 2


def test_debug_shows_the_traceback() -> None:
    done = cellfm("info", "genefomer", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ModelNotFoundError" in done.stderr


def test_models_and_info() -> None:
    listed = json.loads(cellfm("models", "--json").stdout)
    assert {info["name"] for info in listed} == {info.name for info in cf.list_models()}
    assert all(info["modality"] == "sequence" for info in json.loads(cellfm("models", "--json", "--modality", "sequence").stdout))
    table = cellfm("models", "--commercial").stdout
    assert "geneformer-v2-316m (default)" in table
    assert "nt-" not in table
    facts = json.loads(cellfm("info", "NT", "--json").stdout)
    assert facts["commercial_use"] is False
    assert set(facts["options"]) == {"case"}
    text = cellfm("info", "geneformer").stdout
    for part in (
        "apache-2.0",
        "10.1038/s41586-023-06139-9",
        "dictionaries",
        "965ceccea81953d362081ef3843560a0e4fef88d396c28017881f1e94b1246f3",
    ):
        assert part in text


def test_env() -> None:
    facts = json.loads(cellfm("env", "--json").stdout)
    assert facts["torch_version"]
    assert facts["attention"]
    assert "cache_dir" in cellfm("env").stdout


def test_help() -> None:
    """Help needs neither torch nor anndata, and names every command."""
    done = cellfm("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("embed", "models", "info", "env", "demo", "plot"))
    assert cellfm().returncode == 2


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"], ["models"], ["info", "geneformer"], ["models", "--json"]])
def test_light_commands(arguments: list[str]) -> None:
    """Help, listing and cards load neither torch nor anndata nor any adapter."""
    probe = (
        f"import sys; sys.argv = ['cellfm', *{arguments}]\n"
        "from cellfm_hub.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "loaded = {'torch', 'anndata', 'scanpy', 'cellfm_adapters'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


REAL_CELLS = {
    "geneformer": ("geneformer-v1-tiny", ["--option", f"dictionaries={DATA / 'geneformer'}"]),
    "scgpt": ("scgpt-fullvocab", []),
    "scfoundation": ("scfoundation-full19264", []),
    "uce": ("uce-human-l3", ["--option", "nhead=4", "--species", "human"]),
}
"""Family -> its large golden case and what else the command line needs."""


@pytest.mark.skipif(not LARGE.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("file", ["pbmc3k_mini.h5ad", pytest.param("pbmc3k.h5ad", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", REAL_CELLS)
def test_real_cells(tmp_path: Path, family: str, file: str) -> None:
    """Real blood cells through a golden checkpoint: row order and barcodes intact, receipt complete, the same vectors as from Python."""
    case, more = REAL_CELLS[family]
    source, out, checkpoint = DATA / "scrna/pbmc3k" / file, tmp_path / "result.h5ad", LARGE / case / "checkpoint"
    done = cellfm("embed", source, "--model", family, "--checkpoint", checkpoint, "-o", out, "--precision", "float32", *more)
    assert done.returncode == 0, done.stderr
    result, before = ad.read_h5ad(out), ad.read_h5ad(source)
    assert list(result.obs_names) == list(before.obs_names)
    vectors, receipt = result.obsm[f"X_{family}"], result.uns["cellfm"][f"X_{family}"]
    assert len(vectors) == before.n_obs
    assert np.isfinite(vectors).all()
    assert receipt["genes"] == before.n_vars
    assert 0 < receipt["counts_used"] <= 1
    assert len(receipt["weights_sha256"]) == 64
    rows = np.random.default_rng(0).choice(before.n_obs, 5, replace=False)
    options = dict(pair.split("=") for pair in more[1:2])
    model = cf.load(family, checkpoint=checkpoint, options=options, device="cpu", precision="float32")
    alone = model.encode(before[rows].copy(), species="human")
    np.testing.assert_allclose(alone, vectors[rows], atol=2e-6, rtol=0)
