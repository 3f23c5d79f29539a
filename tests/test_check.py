"""`cf.check` and ``cellfm check``: what data hold and what models would make of them, before anything is downloaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import cellfm_hub as cf
from cellfm_hub import checking, cost, downloads
from cellfm_hub.checking import CellFacts, SequenceFacts
from cellfm_hub.nn import EncoderConfig
from cellfm_hub.registry import registry
from golden_cases import PORTABLE
from test_cli import assert_fails, cellfm

GENEFORMER = PORTABLE / "geneformer-v2-basic"
NT = PORTABLE / "nt-v2-basic"
FOLDER = {"checkpoint": GENEFORMER / "checkpoint"}


@pytest.fixture
def adata() -> ad.AnnData:
    return ad.read_h5ad(GENEFORMER / "input.h5ad")


def facts(data: Any, **options: Any) -> CellFacts:
    found = cf.check(data, "geneformer", **FOLDER, **options).data  # type: ignore[arg-type]
    assert isinstance(found, CellFacts)
    return found


# Cells


def test_agrees_with_embed(adata: ad.AnnData) -> None:
    """Everything the report says of a model with its files at hand, the receipt of embed says too."""
    report = cf.check(adata, "geneformer", **FOLDER)
    (found,) = report.models
    cf.embed(adata, "geneformer", device="cpu", precision="float32", **FOLDER)
    receipt = adata.uns["cellfm"]["X_geneformer"]
    assert found.model == receipt["model"]
    assert (found.gene_ids, found.genes_known) == (receipt["gene_ids"], receipt["genes_used"])
    assert (found.truncated, found.empty) == (receipt["n_truncated"], receipt["n_empty"])
    assert found.counts_known == pytest.approx(receipt["counts_used"], abs=1e-6)
    assert found.verdict == "warn"
    assert any("3 of 13 rows" in reason for reason in found.reasons)
    assert found.files


def test_facts(adata: ad.AnnData) -> None:
    totals, expressed = np.asarray(adata.X.sum(axis=1)).ravel(), np.asarray((adata.X != 0).sum(axis=1)).ravel()
    adata.obs_names = ["same", "same", *adata.obs_names[2:]]
    found = facts(adata)
    assert (found.cells, found.genes) == adata.shape
    assert found.counts_per_cell == checking.Spread(totals.min(), np.median(totals), totals.max())
    assert found.genes_per_cell == checking.Spread(expressed.min(), np.median(expressed), expressed.max())
    assert found.empty_cells == (totals == 0).sum() > 0
    assert found.repeated_cells == 1
    assert [(m.name, m.taken) for m in found.matrices] == [("X", True)]
    columns = {column.column: column for column in found.identifiers}
    assert columns["ensembl_id"].system == "Ensembl ids"
    assert found.problem is None


def test_each_matrix_has_a_verdict(adata: ad.AnnData) -> None:
    """In the order in which they are looked at; the one that is taken is marked."""
    logs = sp.csr_matrix(adata.X).astype(np.float64)
    logs.data = np.log1p(logs.data)
    adata.layers["counts"] = adata.X.copy()
    adata.layers["scaled"] = adata.X.toarray() - 0.5
    adata.layers["spliced"] = adata.X.copy()
    adata.raw = ad.AnnData(adata.X.copy(), var=adata.var)
    adata.X = logs
    found = {matrix.name: matrix for matrix in facts(adata).matrices}
    assert [name for name, matrix in found.items() if matrix.taken] == ["layers['counts']"]
    assert found["layers['counts']"].holds == found["raw.X"].holds == "non-negative whole numbers"
    assert "negative values" in found["layers['scaled']"].holds
    assert "part of the counts" in found["layers['spliced']"].holds
    assert list(facts(adata, layer="raw").matrices) == [checking.MatrixFacts("raw.X", "non-negative whole numbers", taken=True)]


def test_no_counts(adata: ad.AnnData) -> None:
    """The report says so, each matrix with its reason, and the model refuses as embed does."""
    adata.X = adata.X.toarray() - 0.5
    report = cf.check(adata, "geneformer", **FOLDER)
    assert isinstance(report.data, CellFacts)
    assert report.data.problem is not None
    assert not any(matrix.taken for matrix in report.data.matrices)
    with pytest.raises(cf.errors.CountsError) as caught:
        cf.embed(adata, "geneformer", device="cpu", **FOLDER)
    assert report.refusals == {"geneformer": str(caught.value)}
    assert "problem" in str(report)
    assert "refuse" in str(report)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"gene_ids": "nowhere"}, "gene_ids='nowhere'"),
        ({"layer": "nowhere"}, "layer='nowhere'"),
        ({"species": "mouse"}, "species='mouse'"),
        ({"options": {"ties": "upper"}}, "'ties'"),
    ],
)
def test_wrong_options(adata: ad.AnnData, options: dict[str, Any], fragment: str) -> None:
    """Refused in the words of embed."""
    report = cf.check(adata, "geneformer", **FOLDER, **options)  # type: ignore[arg-type]
    with pytest.raises(cf.errors.InputError) as caught:
        cf.embed(adata, "geneformer", device="cpu", **FOLDER, **options)  # type: ignore[arg-type]
    assert list(report.refusals.values()) == [str(caught.value)]
    assert fragment in str(caught.value)


def test_wrong_data(tmp_path: Path) -> None:
    for data in (tmp_path / "missing.h5ad", 5, PORTABLE):
        with pytest.raises(cf.errors.InputError):
            cf.check(data)
    (tmp_path / "broken.h5ad").write_bytes(b"no HDF5")
    with pytest.raises(cf.errors.InputError, match=r"broken\.h5ad"):
        cf.check(tmp_path / "broken.h5ad")
    with pytest.raises(cf.errors.ModelNotFoundError, match="geneformer"):
        cf.check(tmp_path / "missing.h5ad", "genefomer")
    with pytest.raises(cf.errors.InputError, match="name it"):
        cf.check(GENEFORMER / "input.h5ad", checkpoint=tmp_path)


def test_nothing_to_embed() -> None:
    empty = cf.check(ad.AnnData(np.zeros((0, 3), np.float32)), "pca")
    assert "nothing to embed" in empty.refusals["pca"]
    assert "0 cells" in str(empty)


def test_baseline_too_small(adata: ad.AnnData) -> None:
    """A model without a network that would refuse."""
    report = cf.check(adata[:5], "pca", options={"n_components": 10})
    with pytest.raises(cf.errors.InputError) as caught:
        cf.embed(adata[:5].copy(), "pca", options={"n_components": 10})
    assert report.refusals == {"pca": str(caught.value)}


def test_without_files(adata: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched, even online; what the vocabulary would tell is not known, the rest is."""

    def fetched(*args: object) -> None:
        pytest.fail("check fetched a file")

    monkeypatch.setattr(downloads, "fetch_from_hub", fetched)
    monkeypatch.setattr(downloads, "fetch_from_url", fetched)
    with cf.settings.override(offline=False):
        report = cf.check(adata)
    defaults = {e.name for e in registry().checkpoints.values() if e.checkpoint.default and e.modality == "cell"}
    assert {model.model for model in report.models} == defaults
    for model in report.models:
        entry = registry().checkpoints[model.model]
        assert model.licence == entry.licence
        assert model.commercial_use == entry.checkpoint.commercial_use
        if entry.checkpoint.source is not None and not entry.is_shipped:
            assert not model.files
            assert model.genes_known is None
            assert model.truncated is None
            assert any("not known until its files are here" in reason for reason in model.reasons)
    sizes = {model.model: model.download for model in report.models}
    assert sizes["scfoundation-01b"] == 1432587886 + 228232
    assert sizes["scgpt-human"] is None  # the card does not know all sizes


def test_species_without_files() -> None:
    """The card is enough to refuse a mouse in a human model, and not in one that knows mice."""
    genes = [f"ENSMUSG{i:011d}" for i in range(51951, 52051)]
    mouse = ad.AnnData(
        sp.random_array((30, 100), density=0.5, rng=0, format="csr").ceil().astype(np.float32), var=pd.DataFrame(index=genes)
    )
    mouse.X.data = np.arange(len(mouse.X.data), dtype=np.float32) % 7 + 1
    report = cf.check(mouse, ["geneformer", "uce"])
    assert isinstance(report.data, CellFacts)
    assert report.data.species == "mouse"
    assert list(report.refusals) == ["geneformer-v2-316m"]
    assert "mouse" in report.refusals["geneformer-v2-316m"]


def test_incomplete_folder(tmp_path: Path, adata: ad.AnnData) -> None:
    folder = Path(shutil.copytree(GENEFORMER / "checkpoint", tmp_path / "folder"))
    (folder / "model.safetensors").unlink()
    report = cf.check(adata, "geneformer", checkpoint=folder)
    assert "model.safetensors" in report.refusals["geneformer-v2-316m"]


def test_licence_that_is_not_wanted(adata: ad.AnnData) -> None:
    with cf.settings.override(commercial=True):
        report = cf.check(adata, ["scfoundation", "geneformer"])
    assert list(report.refusals) == ["scfoundation-01b"]
    assert "commercial" in report.refusals["scfoundation-01b"]


def test_large_data_are_sampled(monkeypatch: pytest.MonkeyPatch, adata: ad.AnnData) -> None:
    """Stretches from the first to the last row; facts and models see the same rows."""
    monkeypatch.setattr(checking, "ALL_CELLS_UP_TO", 4)
    monkeypatch.setattr(checking, "STRETCHES", 3)
    monkeypatch.setattr(checking, "STRETCH", 2)
    report = cf.check(adata, "geneformer", **FOLDER)
    rows = [0, 1, 5, 6, 11, 12]
    assert isinstance(report.data, CellFacts)
    assert (report.data.cells, report.data.looked_at) == (13, 6)
    totals = np.asarray(adata.X.sum(axis=1)).ravel()[rows]
    assert report.data.counts_per_cell == checking.Spread(totals.min(), np.median(totals), totals.max())
    alone = cf.check(adata[rows].copy(), "geneformer", **FOLDER).models[0]
    assert (report.models[0].truncated, report.models[0].empty) == (alone.truncated, alone.empty)
    assert "of 6 cells, spread over all" in str(report)


def test_verdict_does_not_depend_on_logging(adata: ad.AnnData, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    shown = cf.check(adata, "geneformer", **FOLDER).models[0]
    caplog.set_level(logging.CRITICAL, "cellfm_hub")
    assert cf.check(adata, "geneformer", **FOLDER).models[0].reasons == shown.reasons
    assert not caplog.records
    assert logging.getLogger("cellfm_hub").level == logging.CRITICAL


# Cost


def test_flops() -> None:
    """As torch counts them, for a gated and a plain encoder."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from cellfm_hub.nn import Encoder, PackedBatch
    from cellfm_hub.tokens import Tokens

    for gated in (False, True):
        config = EncoderConfig(dim=32, heads=4, layers=3, ffn_dim=48, norm="post", norm_eps=1e-5, activation="gelu", gated=gated)
        batch = PackedBatch.from_tokens(Tokens.from_lists([range(50), range(20)]), torch.device("cpu"))
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            Encoder(config)(torch.zeros(70, 32), batch, 2)
        assert cost.encoder_flops(config, np.array([50.0, 20.0]), 2) == counter.get_total_flops()


def test_cost_scales(adata: ad.AnnData) -> None:
    """Twice the cells take twice the time; a device without measurements has none; numbers say what they were made from."""
    lengths, entry = np.array([800.0, 1000.0]), registry().find("scgpt")
    once, twice = (cost.estimate(entry, None, lengths, torch.device("cpu"), torch.float32, stand_for=n) for n in (100, 200))
    assert once.seconds is not None
    assert twice.seconds == pytest.approx(2 * once.seconds)
    assert "scgpt-human" in once.basis
    assert "GFLOP" in once.basis
    unmeasured = cost.estimate(entry, None, lengths, torch.device("cpu"), torch.bfloat16, stand_for=1)
    assert unmeasured.seconds is None
    assert unmeasured.memory is not None
    assert "not measured" in unmeasured.basis


def test_measured_table() -> None:
    """Memory estimated for each network is near the peak that was measured beside its speed."""
    table = json.loads(cost.MEASURED.read_text())["networks"]["cpu float32"]
    assert {registry().find(family).family for family in table} >= {"geneformer", "scgpt", "scfoundation", "uce", "dnabert2"}
    for name, row in table.items():
        assert 0.3 < row["efficiency"] < 1.1
        if name.startswith("uce"):
            continue  # measured without most of its token table
        estimated = cost.estimate(registry().find(name), None, np.array([1024.0]), torch.device("cpu"), torch.float32, stand_for=1)
        assert estimated.memory == pytest.approx(row["peak_memory"], rel=0.35), name


# Sequences


def test_sequences(tmp_path: Path) -> None:
    fasta = tmp_path / "dna.fa"
    fasta.write_text(">a\nACGTacgtNN\n>b\nUUUU\n>a\n\n>c\nACGRYACG\n")
    report = cf.check(fasta, "nt", checkpoint=NT / "checkpoint")
    found = report.data
    assert isinstance(found, SequenceFacts)
    assert (found.sequences, found.bases, found.empty, found.repeated_names) == (4, 22, 1, 1)
    assert (found.lower_case, found.uracil, found.ambiguous) == (4, 4, 4)
    assert found.length == checking.Spread(0, 6, 10)
    assert report.models[0].verdict == "warn"
    assert (report.models[0].truncated, report.models[0].empty) == (0, 1)
    defaults = {e.name for e in registry().checkpoints.values() if e.checkpoint.default and e.modality == "sequence"}
    assert {model.model for model in cf.check(fasta).models} == defaults


def test_sequences_agree_with_embed() -> None:
    sequences = {"short": "ACGT" * 10, "long": "ACGTTGCA" * 4000}
    where = {"checkpoint": NT / "checkpoint"}
    report = cf.check(sequences, "nt", **where)
    with pytest.raises(cf.errors.SequenceError) as caught:
        cf.embed(sequences, "nt", **where)
    assert report.refusals == {"nucleotide-transformer": str(caught.value)}
    assert report.models[0].truncated == 1
    cut = cf.check(sequences, "nt", long="truncate", **where).models[0]
    assert (cut.verdict, cut.truncated) == ("warn", 1)
    assert cf.check(sequences, "nt", long="tile", **where).models[0].verdict == "ok"


def test_bad_sequences(tmp_path: Path) -> None:
    report = cf.check(["ACGT", "MKVLAAG!", "TTT"], "kmer")
    assert "'!'" in report.refusals["kmer"] or "position" in report.refusals["kmer"]
    assert isinstance(report.data, SequenceFacts)
    assert report.data.sequences == 3
    (tmp_path / "no.fa").write_text("no FASTA")
    with pytest.raises(cf.errors.SequenceError):
        cf.check(tmp_path / "no.fa")


def test_wrong_modality(adata: ad.AnnData) -> None:
    assert "model of sequences" in cf.check(adata, "nt").refusals["nt-v2-250m-multi-species"]
    assert "model of cells" in cf.check(["ACGT"], "geneformer").refusals["geneformer-v2-316m"]


# The command line


def test_command(tmp_path: Path) -> None:
    cells = Path(shutil.copy(GENEFORMER / "input.h5ad", tmp_path / "cells.h5ad"))
    done = cellfm("check", cells)
    assert done.returncode == 0, done.stderr
    assert "13 cells" in done.stdout
    assert "geneformer-v2-316m" in done.stdout
    assert done.stdout.count("\n") < 40
    named = ("--model", "geneformer", "--checkpoint", GENEFORMER / "checkpoint")
    done = cellfm("check", cells, *named, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads(json.dumps(cf.check(cells, "geneformer", **FOLDER).to_dict())) | {"models": report["models"]}
    assert report["models"][0]["genes_known"] == cf.check(cells, "geneformer", **FOLDER).models[0].genes_known
    assert list(tmp_path.iterdir()) == [cells]
    assert_fails(cellfm("check", tmp_path / "missing.h5ad"), "missing.h5ad")
    assert_fails(cellfm("check", cells, "--model", "genefomer"), "'geneformer'")
    assert cellfm("check").returncode == 2


def test_command_refuses(tmp_path: Path) -> None:
    """Exit code 1 and one line, behind the report; only a named model counts."""
    adata = ad.read_h5ad(GENEFORMER / "input.h5ad")
    adata.X = adata.X.toarray() - 0.5
    adata.write_h5ad(tmp_path / "scaled.h5ad")
    done = cellfm("check", tmp_path / "scaled.h5ad")
    assert done.returncode == 0
    done = cellfm("check", tmp_path / "scaled.h5ad", "--model", "geneformer", "--model", "scgpt")
    assert done.returncode == 1
    assert "refuse" in done.stdout
    assert done.stderr.startswith("cellfm: error: geneformer-v2-316m would refuse")
    assert done.stderr.count("\n") == 1
    assert "2 of 2 models" in done.stderr
    done = cellfm("check", tmp_path / "scaled.h5ad", "--model", "geneformer", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["models"][0]["verdict"] == "refuse"


def test_command_on_sequences() -> None:
    done = cellfm("check", NT / "sequences.fasta", "-m", "nt", "--checkpoint", NT / "checkpoint")
    assert done.returncode == 0, done.stderr
    assert "16 sequences" in done.stdout
