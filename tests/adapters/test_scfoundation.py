"""scFoundation against the original code."""

import dataclasses
import gzip
import logging
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

import cellfm_hub as cf
from cellfm_adapters.scfoundation.tokenizer import TargetDepth
from cellfm_adapters.scfoundation.weights import flatten_settings
from cellfm_hub.errors import CheckpointFormatError, CountsError, GeneCoverageError, InputError, WeightsUnavailableError
from cellfm_hub.nn import PackedBatch, performer
from cellfm_hub.registry import registry
from cellfm_hub.safe_files import read_checkpoint
from cellfm_hub.testing import check_cell_model
from cellfm_hub.weights import count_parameters
from golden_cases import DATA, LARGE, PORTABLE, Case, cases

CASES = cases("scfoundation")
BASIC = PORTABLE / "scfoundation-basic"
FULL = LARGE / "scfoundation-full19264"


def load(checkpoint: Path = BASIC / "checkpoint", **options: str) -> cf.Embedder:
    return cf.load("scfoundation", checkpoint=checkpoint, options=options, device="cpu", precision="float32")


@lru_cache(maxsize=4)
def loaded(checkpoint: Path, options: frozenset[tuple[str, str]]) -> cf.Embedder:
    return load(checkpoint, **dict(options))


def model_of(case: Case, entry: dict[str, Any]) -> cf.Embedder:
    options = {name: entry[name] for name in ("input_type", "pre_normalized", "tgthighres", "version") if name in entry}
    if entry["input_type"] == "bulk":
        del options["tgthighres"]  # "ignored for bulk"
    return loaded(case.checkpoint, frozenset(options.items()))


def read(case: Case, entry: dict[str, Any]) -> ad.AnnData:
    path = case.path / entry["input"]
    if path.suffix == ".npy":
        genes = pd.read_csv(case.checkpoint / "OS_scRNA_gene_index.19264.tsv", sep="\t")["gene_name"]
        return ad.AnnData(np.load(path), var=pd.DataFrame(index=[*genes, "total"]))
    adata = ad.read_h5ad(path)
    return adata[entry["cells"]].copy() if "cells" in entry else adata


@pytest.fixture
def adata() -> ad.AnnData:
    return ad.read_h5ad(BASIC / "input.h5ad")


@pytest.fixture
def logs() -> ad.AnnData:
    return ad.read_h5ad(BASIC / "input_lognorm.h5ad")


# The original's numbers


@pytest.mark.parametrize("case", CASES)
def test_cells(case: Case) -> None:
    """Every expected cell vector is met: modes, targets, versions, poolings, bulk."""
    entries = [entry for entry in case.facts["expected"] if entry["output_type"] == "cell"]
    assert entries
    for entry in entries:
        got = model_of(case, entry).encode(read(case, entry), pooling=entry["pool_type"])
        atol = case.facts["tolerance"]["fp32_cpu_abs"]
        np.testing.assert_allclose(got, case.array(entry["file"]), atol=atol, rtol=0, err_msg=entry["file"])


def gene_vectors(case: Case, entry: dict[str, Any], **options: Any) -> NDArray[np.float32]:
    """Vectors of the genes of which the case tells something, ``(cells, genes, d)``."""
    vectors = model_of(case, entry).encode(read(case, entry), level="gene", **options)
    assert (np.diff(vectors.offsets) == case.facts["n_genes"]).all()
    np.testing.assert_array_equal(vectors.ids, np.tile(np.arange(case.facts["n_genes"]), len(vectors)))
    values = vectors.values.reshape(len(vectors), case.facts["n_genes"], -1)
    return values[:, case.array(entry["gene_positions"])] if "gene_positions" in entry else values


@pytest.mark.parametrize("case", [c for c in CASES if "modes" not in c.id])
def test_genes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gene vectors are met; so is the prediction of expression, whose head is no part of the network, from them."""
    by_kind = {entry["output_type"]: entry for entry in case.facts["expected"] if entry["output_type"] != "cell"}
    assert sorted(by_kind) == ["gene", "gene_batch", "gene_expression"]
    got = gene_vectors(case, by_kind["gene"])
    np.testing.assert_allclose(got, case.array(by_kind["gene"]["file"]), atol=5e-5, rtol=0)

    state = read_checkpoint(case.checkpoint / "models.ckpt")["gene"]["state_dict"]
    predicted = got @ state["model.to_final.weight"][0].numpy() + state["model.to_final.bias"].numpy()
    np.testing.assert_allclose(predicted, case.array(by_kind["gene_expression"]["file"]), atol=5e-5, rtol=0)

    # The original's batch mode takes the largest key feature of the whole call. We do not; but this is all the difference.
    monkeypatch.setattr(performer, "row_maximum", torch.max)
    expected = case.array(by_kind["gene_batch"]["file"])
    assert np.abs(got - expected).max() > 5e-3
    np.testing.assert_allclose(gene_vectors(case, by_kind["gene_batch"], batch_tokens=10**9), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_stages(case: Case) -> None:
    """Tokens and values of one cell are exactly the original's; every layer's state of its first and last tokens is met."""
    expected = case.array("expected_stages_cell0.npz")
    note = case.facts["other_files"]["expected_stages_cell0.npz"]
    target = note.split("tgthighres ")[1].split(" ")[0].rstrip(":,") if "tgthighres" in note else "t4"
    model = load(case.checkpoint, tgthighres=target)
    tokens = model.tokenize(ad.read_h5ad(case.path / "input.h5ad")).take([0])
    np.testing.assert_array_equal(tokens.ids, expected["gene_positions"])
    np.testing.assert_array_equal(tokens.values, expected["values"])
    batch = PackedBatch.from_tokens(tokens, torch.device("cpu"))
    network: Any = model.adapter.network  # type: ignore[attr-defined]
    last = model.adapter.layers  # type: ignore[attr-defined]
    with torch.inference_mode():
        got = {"value_embedding": network.values(batch.values), "encoder_input": network(batch, 0)}
        got |= {f"after_encoder_layer_{i}": network.encoder(got["encoder_input"], batch, i + 1) for i in range(last)}
        got["encoder_output"] = network(batch, last)
    assert set(got) == set(expected) - {"gene_positions", "values"}
    for name, hidden in got.items():
        head = len(expected[name]) - 4
        ends = np.concatenate((hidden[:head], hidden[-4:]))
        np.testing.assert_allclose(ends, expected[name], atol=3e-5, rtol=0, err_msg=name)


def test_demo_table() -> None:
    """The authors' table of ten Baron cells, genes as columns, gives the vectors of the same cells in the case."""
    if not FULL.is_dir():
        pytest.skip("needs ../shared")
    got = load(FULL / "checkpoint").encode(DATA / "scfoundation/baron_human_samp_19264_fromsaver_demo.csv")
    np.testing.assert_allclose(got, np.load(FULL / "expected_cell_ce_F_t4_all.npy"), atol=3e-5, rtol=0)


def test_demo_bulk() -> None:
    """The authors' table of ten bulk samples, gzipped, holds logarithms: both kinds of bulk take it, single cells do not."""
    path = DATA / "scfoundation/Source_exprs_resp_19264.Etoposide_demo.csv.gz"
    if not FULL.is_dir():
        pytest.skip("needs ../shared")
    for pre_normalized in "FT":
        model = load(FULL / "checkpoint", input_type="bulk", pre_normalized=pre_normalized)
        tokens = model.tokenize(path)
        assert (tokens.lengths == 15_291 + 2).all()
    with pytest.raises(CountsError, match="not whole numbers"):
        load(FULL / "checkpoint").tokenize(path)


def test_demo_with_totals() -> None:
    """The authors' perturb-seq cells hold the true total behind the genes, and S is its logarithm."""
    if not FULL.is_dir():
        pytest.skip("needs ../shared")
    table = np.load(DATA / "scfoundation/gene_batch.npy")
    genes = load(FULL / "checkpoint").adapter.vocabulary[:-2]  # type: ignore[attr-defined]
    adata = ad.AnnData(table, var=pd.DataFrame(index=[*genes, "total"]))
    model = load(FULL / "checkpoint", pre_normalized="A", tgthighres="f1")
    tokens = model.tokenize(adata)
    np.testing.assert_array_equal(tokens.values[tokens.offsets[1:] - 1], np.log10(table[:, -1].astype(np.float64)).astype(np.float32))  # type: ignore[index]
    np.testing.assert_array_equal(tokens.lengths, (table[:, :-1] > 0).sum(axis=1) + 2)


def test_real_weights() -> None:
    """Values printed by the authors; needs their weights, in the folder that CELLFM_SCFOUNDATION names."""
    folder = os.environ.get("CELLFM_SCFOUNDATION")
    if not folder or not DATA.is_dir():
        pytest.skip("needs the published weights and ../shared")
    import json

    facts = json.loads((DATA / "scfoundation/published_reference_values.json").read_text())["baron_a5_rde"]
    model = load(Path(folder), version="rde", tgthighres="a5")
    got = model.encode(DATA / "scfoundation" / facts["input"])[np.ix_(facts["rows"], facts["columns"])]
    np.testing.assert_allclose(got, facts["published"], atol=5e-3)


# The hub's promises


@pytest.mark.parametrize("pooling", ["all", "max"])
def test_contract(adata: ad.AnnData, pooling: str) -> None:
    check_cell_model(load(), adata, pooling=pooling)
    check_cell_model(load(version="rde", tgthighres="f2"), adata, pooling=pooling)


def test_contract_of_bulk(adata: ad.AnnData) -> None:
    """Bulk F looks at all samples and says so; nothing else does."""
    bulk = load(input_type="bulk")
    check_cell_model(bulk, adata)
    assert bulk.receipt is not None
    assert bulk.receipt["dataset_dependent"] is True
    assert np.abs(bulk.encode(adata)[:3] - bulk.encode(adata[:3].copy())).max() > 1e-3
    other = load()
    other.encode(adata)
    assert other.receipt is not None
    assert other.receipt["dataset_dependent"] is False


def test_genes_do_not_depend_on_company(adata: ad.AnnData) -> None:
    model = load(tgthighres="f1")
    reference = model.encode(adata, level="gene")
    assert reference.values.dtype == np.float32
    assert reference.names[:2].tolist() == ["GENEA1", "GENEA10"]
    for tokens in (1, 1000, 10**6):
        np.testing.assert_allclose(model.encode(adata, level="gene", batch_tokens=tokens).values, reference.values, atol=4e-6, rtol=0)
    alone = model.encode(adata[[5]].copy(), level="gene")
    np.testing.assert_allclose(alone.values, reference.row(5), atol=4e-6, rtol=0)
    again = model.encode_tokens(model.tokenize(adata), level="gene")
    np.testing.assert_array_equal(again.values, reference.values)
    np.testing.assert_array_equal(again.offsets, reference.offsets)
    with pytest.raises(InputError, match="leave out output_layer"):
        model.encode(adata, level="gene", output_layer=1)


def test_widths(adata: ad.AnnData) -> None:
    model = load()
    assert model.embedding_dim == 64
    assert model.encode(adata).shape == (12, 64)
    assert model.encode(adata, recipe="max").shape == (12, 16)
    assert model.encode(adata, output_layer=0).shape == (12, 64)
    genes = model.gene_embeddings()
    assert genes.shape == (240, 16)
    assert genes.index[0] == "GENEA1"
    copied = cf.embed(adata, "scfoundation", checkpoint=BASIC / "checkpoint", device="cpu", precision="float32", copy=True)
    assert copied.obsm["X_scfoundation"].shape == (12, 64)


def test_half_precision(adata: ad.AnnData) -> None:
    """bfloat16 stays near, genes included; the decoder follows when the hub changes the dtype."""
    model = load()
    half = cf.load("scfoundation", checkpoint=BASIC / "checkpoint", device="cpu", precision="bfloat16")
    for level in ("cell", "gene"):
        exact, rough = (m.encode(adata, level=level) for m in (model, half))  # type: ignore[call-overload]
        exact, rough = (np.asarray(getattr(x, "values", x)) for x in (exact, rough))
        assert np.abs(exact - rough).mean() < 0.03
    half.adapter.network.to(torch.float32)  # type: ignore[attr-defined]
    half.encode(adata, level="gene")


# Columns


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_columns(adata: ad.AnnData) -> None:
    """Genes are found by name: more columns, fewer, another order, twice the same; a vector never moves."""
    model = load()
    expected = model.encode(adata)
    rng = np.random.default_rng(0)

    shuffled = adata[:, rng.permutation(adata.n_vars)].copy()
    np.testing.assert_allclose(model.encode(shuffled), expected, atol=2e-6, rtol=0)

    genes = list(model.gene_embeddings().index)
    missing = [gene for gene in genes if gene not in set(adata.var_names)]
    zeros = ad.AnnData(sp.csr_matrix((adata.n_obs, len(missing)), dtype=np.float32), obs=adata.obs, var=pd.DataFrame(index=missing))
    wide = ad.concat((zeros, adata), axis=1, merge="same")
    assert wide.n_vars > len(genes)
    np.testing.assert_allclose(model.encode(wide), expected, atol=2e-6, rtol=0)
    exactly = wide[:, sorted(genes, reverse=True)].copy()  # as many columns as the list, in another order
    np.testing.assert_allclose(model.encode(exactly), expected, atol=2e-6, rtol=0)

    half = adata.X.copy()
    half.data = np.floor(half.data / 2)
    twice = ad.AnnData(sp.hstack((half, adata.X - half), format="csr"), obs=adata.obs, var=pd.DataFrame(index=[*adata.var_names] * 2))
    np.testing.assert_allclose(model.encode(twice), expected, atol=2e-6, rtol=0)
    assert model.receipt is not None
    assert model.receipt["genes_summed"] == len(set(adata.var_names) & set(genes))

    elsewhere = adata.copy()
    elsewhere.var["gene_name"] = elsewhere.var_names
    elsewhere.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    np.testing.assert_array_equal(model.encode(elsewhere), expected)
    assert model.receipt["gene_ids"] == "gene_name"
    del elsewhere.var["gene_name"]
    with pytest.raises(GeneCoverageError, match="none of the 188 genes"):
        model.encode(elsewhere)


def test_column_of_totals(logs: ad.AnnData) -> None:
    """Mode A takes the last column for totals, whatever else there is; a gene there is an error."""
    counts = ad.read_h5ad(BASIC / "input.h5ad")[logs.obs_names]
    known = np.isin(logs.var_names, load().gene_embeddings().index)
    totals = np.asarray(counts[:, known].X.sum(axis=1))
    table = ad.AnnData(sp.hstack((logs.X, totals), format="csr"), obs=logs.obs, var=pd.DataFrame(index=[*logs.var_names, "n_counts"]))
    model = load(pre_normalized="A")
    tokens, of_counts = model.tokenize(table), load().tokenize(counts.copy())
    np.testing.assert_array_equal(tokens.ids, of_counts.ids)
    ends = tokens.offsets[1:] - 1
    np.testing.assert_array_equal(tokens.values[ends], of_counts.values[ends])  # type: ignore[index]
    model.encode(table)
    assert model.receipt is not None
    assert model.receipt["genes_used"] == known.sum()
    assert "counts_used" not in model.receipt
    with pytest.raises(InputError, match="last column for the cells' raw totals, but it is the gene"):
        model.encode(table[:, [*np.flatnonzero(~known), *np.flatnonzero(known)]].copy())
    with pytest.raises(GeneCoverageError):
        model.encode(table[:, [*np.flatnonzero(~known), table.n_vars - 1]].copy())


# Values


def test_cells_without_a_vector(adata: ad.AnnData) -> None:
    """No count, only unknown genes, a single count: NaN, counted, and the neighbours are as they were."""
    model = load()
    expected = model.encode(adata)
    changed = adata.copy()
    x = changed.X.tolil()
    x[1], x[4], x[7] = 0, 0, 0
    x[4, changed.var_names.get_loc("NOTINLIST3")] = 5
    x[7, changed.var_names.get_loc("GENEA57")] = 1
    changed.X = x.tocsr()
    for pooling in ("all", "max"):
        got = model.encode(changed, pooling=pooling)
        assert np.isnan(got[[1, 4, 7]]).all()
        assert np.isfinite(np.delete(got, [1, 4, 7], axis=0)).all()
    np.testing.assert_allclose(
        np.delete(model.encode(changed), [1, 4, 7], axis=0), np.delete(expected, [1, 4, 7], axis=0), atol=2e-6, rtol=0
    )
    assert model.receipt is not None
    assert model.receipt["n_empty"] == 3
    assert np.diff(model.encode(changed, level="gene").offsets).tolist() == [0 if i in (1, 4, 7) else 240 for i in range(12)]
    with pytest.raises(InputError, match="cell01"):
        model.encode(changed, on_empty="error")
    # A target depth that is not above 0 would make the vector of a gene that of the depth.
    low = load(tgthighres="f0.1").tokenize(adata)
    totals = np.asarray(adata[:, np.isin(adata.var_names, model.gene_embeddings().index)].X.sum(axis=1)).ravel()
    np.testing.assert_array_equal(low.lengths == 0, totals <= 10)
    assert (totals <= 10).any()


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_kind_of_values(adata: ad.AnnData, logs: ad.AnnData) -> None:
    """Logarithms where counts are wanted and the reverse are refused, in one line."""
    corrected = logs.copy()
    corrected.X = corrected.X.multiply(1 + np.arange(logs.n_vars) / logs.n_vars).tocsr()
    with pytest.raises(CountsError, match="not whole numbers"):
        load().encode(corrected)
    for options in ({"pre_normalized": "T"}, {"pre_normalized": "A"}, {"pre_normalized": "T", "input_type": "bulk"}):
        with pytest.raises(CountsError, match="only whole numbers, which look like raw counts"):
            load(**options).encode(adata)
    negative = logs.copy()
    negative.X = negative.X - 1.0 * (negative.X > 0)
    negative.X.data[0] = -1
    with pytest.raises(CountsError, match="negative values"):
        load(pre_normalized="T").encode(negative)
    both = logs.copy()
    both.layers["counts"] = adata[logs.obs_names].X
    np.testing.assert_array_equal(load(pre_normalized="T").encode(both), load(pre_normalized="T").encode(logs))
    twice = logs[:, [0, *range(logs.n_vars)]].copy()
    with pytest.raises(InputError, match="logarithms cannot be added"):
        load(pre_normalized="T").encode(twice)


def test_values_made_by_the_caller() -> None:
    """The two values that mean "masked" and "padding" have vectors of their own; a row without depth tokens has no "all"."""
    model = load()
    with torch.inference_mode():
        values = model.adapter.network.values(torch.tensor([102.0, 103.0, 1.0]))  # type: ignore[attr-defined]
    state = read_checkpoint(BASIC / "checkpoint/models.ckpt")["cell"]["state_dict"]
    torch.testing.assert_close(values[:2], torch.cat((state["model.token_emb.emb_mask.weight"], state["model.token_emb.emb_pad.weight"])))
    tokens = cf.Tokens(ids=[3, 4, 240, 241, 3], offsets=[0, 4, 5], values=[1, 102, 4, 3, 1])
    got = model.encode_tokens(tokens)
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1, :32]).all()
    assert np.isfinite(got[1, 32:]).all()
    with pytest.raises(InputError, match="tokens without values"):
        model.encode_tokens(cf.Tokens(ids=[3, 240, 241], offsets=[0, 3]))


# Tables of text


def test_table(adata: ad.AnnData, tmp_path: Path) -> None:
    model = load()
    expected = model.encode(adata)
    frame = adata.to_df()
    for name, table in (("whole.csv", frame.astype(int)), ("decimal.csv.gz", frame)):
        table.to_csv(tmp_path / name)
        np.testing.assert_allclose(model.encode(tmp_path / name), expected, atol=2e-6, rtol=0)
    result = model.run(tmp_path / "whole.csv")
    assert result.names == list(adata.obs_names)
    # Two columns of one gene are summed, not renamed.
    twice = pd.concat((frame // 2, frame - frame // 2), axis=1)
    twice.to_csv(tmp_path / "twice.csv")
    np.testing.assert_allclose(model.encode(tmp_path / "twice.csv"), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no columns|No columns|nothing to embed|cannot be read"),
        (",GENEA1,GENEA10\n", "nothing to embed|cannot be read"),
        (",GENEA1,GENEA10\nc1,1\n", "2 genes in its header and 1 values"),
        (",GENEA1,GENEA10\nc1,1,x\n", "text in 1 columns .first: 'GENEA10'"),
        (",GENEA1,GENEA10\nc1,1,2\nc2,1,2,3\n", "cannot be read as a table"),
        (",GENEA1,GENEA10\nc1,1,\n", "NaN"),
        (",c1,c2\nGENEA1,1,0\nGENEA10,3,2\n", "none of the 2 genes"),
    ],
)
def test_bad_table(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load().encode(tmp_path / "table.csv")
    assert "\n" not in str(caught.value)


def test_cut_table(adata: ad.AnnData, tmp_path: Path) -> None:
    whole = gzip.compress(adata.to_df().to_csv().encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as a table"):
        load().encode(tmp_path / "cut.csv.gz")


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_type": "all"}, "'pool_type' is not one; allowed, with their defaults: input_type=singlecell .singlecell . bulk"),
        ({"pre_normalized": "yes"}, "pre_normalized='yes' is refused"),
        ({"version": "rce"}, "version='rce' is refused .*version=ce .ce . rde"),
        ({"input_type": "bulk", "pre_normalized": "A"}, "bulk samples are 'F' or 'T'"),
        ({"tgthighres": "4"}, "expected t, f or a and a number: t4"),
        ({"tgthighres": "a-1"}, "expected t, f or a and a number"),
        ({"tgthighres": "t0"}, "t0 is a depth of nothing"),
    ],
)
def test_bad_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(**options)


def test_targets() -> None:
    totals = np.array([100.0, 10.0])
    assert TargetDepth.parse("t4.5").of(totals).tolist() == [4.5, 4.5]
    assert TargetDepth.parse("f10").of(totals).tolist() == [3, 2]
    assert TargetDepth.parse("a1.5").of(totals).tolist() == [3.5, 2.5]


def test_pooling_is_one_of_two(adata: ad.AnnData) -> None:
    with pytest.raises(InputError, match="use 'all', 'max'"):
        load().encode(adata, pooling="cls")


# Checkpoint


def test_published_size() -> None:
    """The whole published network is as large as the published one, and so are its parts."""
    checkpoint = registry().find("scfoundation").checkpoint
    with torch.device("meta"):
        network, layout = registry().find("scfoundation").adapter_class().published(checkpoint.config)  # type: ignore[attr-defined]
    assert count_parameters(layout) == checkpoint.parameters == 119_252_285
    used = sum(parameter.numel() for parameter in network.parameters())
    assert used == 119_252_285 - 513  # without the head that predicts expression
    assert sum(buffer.numel() for buffer in network.buffers()) == 102_144  # 102,145 with the counter of training
    for prefix, size in {"token_emb.": 88_636, "pos_emb.": 14_797_056, "encoder.": 85_056_000, "decoder.": 18_915_328}.items():
        assert count_parameters({k: v for k, v in layout.items() if k.startswith(prefix)}) == size
    config = checkpoint.config
    assert checkpoint.layers == config["encoder_depth"]
    assert checkpoint.embedding_dim == 4 * config["encoder_hidden_dim"]  # type: ignore[operator]
    assert checkpoint.max_tokens == config["seq_len"]
    assert checkpoint.commercial_use is False
    assert "non-commercial" in registry().find("scfoundation").info().licence


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASIC / "checkpoint", tmp_path / "own"))


def test_clone_of_the_original(own: Path, adata: ad.AnnData) -> None:
    """The original keeps the weights in a folder of their own."""
    (own / "models").mkdir()
    (own / "models.ckpt").rename(own / "models/models.ckpt")
    np.testing.assert_array_equal(load(own).encode(adata), load().encode(adata))


class Configuration(dict[str, Any]):
    """A class of some library, pickled as items or as state."""

    as_items = True

    def __reduce__(self) -> Any:
        return (Configuration, (), None, None, iter(self.items())) if self.as_items else (Configuration, (), {"content": dict(self)})

    def __new__(cls, *_: Any) -> "Configuration":
        if cls.refused:
            pytest.fail("code of the file was run")
        return super().__new__(cls)

    refused = False


@pytest.mark.parametrize("as_items", [True, False])
def test_settings_of_a_library(own: Path, adata: ad.AnnData, monkeypatch: pytest.MonkeyPatch, *, as_items: bool) -> None:
    """Settings in objects of a configuration library are read where they are items, else the card's serve; no code of it is run."""
    content = dict(read_checkpoint(BASIC / "checkpoint/models.ckpt"))
    settings = content["cell"]["config"]["model_config"]["mae_autobin"]
    monkeypatch.setattr(Configuration, "as_items", as_items)
    torch.save({name: {**part, "config": Configuration(part["config"])} for name, part in content.items()}, own / "models.ckpt")
    entry = registry().find("scfoundation")
    if not as_items:
        flat = {name: value for name, value in flatten_settings(settings).items() if name in entry.checkpoint.config}
        entry = dataclasses.replace(entry, checkpoint=entry.checkpoint.model_copy(update={"config": flat}))
    monkeypatch.setattr(type(registry()), "find", lambda _self, _name: entry)
    monkeypatch.setattr(Configuration, "refused", True)
    np.testing.assert_array_equal(load(own).encode(adata), load().encode(adata))


def test_damaged_checkpoints(own: Path) -> None:
    genes = own / "OS_scRNA_gene_index.19264.tsv"
    lines = genes.read_text().splitlines()
    genes.write_text("\n".join(lines[:-1]))
    with pytest.raises(CheckpointFormatError, match="names 239 genes, the weights are for 240"):
        load(own)
    genes.write_text("\n".join([lines[0], *sorted(lines[1:], reverse=True)]))
    with pytest.raises(CheckpointFormatError, match="not the published gene list"):
        load(own)
    genes.write_text("\n".join([*lines[:2], f"{lines[1].split()[0]}\t1", *lines[3:]]))
    with pytest.raises(CheckpointFormatError, match="twice"):
        load(own)
    genes.unlink()
    with pytest.raises(WeightsUnavailableError, match="OS_scRNA_gene_index"):
        load(own)

    path = own / "models.ckpt"
    content = read_checkpoint(BASIC / "checkpoint/models.ckpt")
    torch.save({"cell": content["cell"]}, path)
    genes.write_text("\n".join(lines))
    assert load(own).embedding_dim == 64
    with pytest.raises(CheckpointFormatError, match=r"no sub-model 'rde' .*it holds cell"):
        load(own, version="rde")
    del content["cell"]["state_dict"]["model.encoder.norm.bias"]
    torch.save(content, path)
    with pytest.raises(CheckpointFormatError, match=r"missing: encoder\.norm\.bias"):
        load(own)
    torch.save([1], path)
    with pytest.raises(CheckpointFormatError, match="holds a list"):
        load(own)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointFormatError, match="cannot be read"):
        load(own)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        yield caplog


def test_licence_before_a_download(monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture) -> None:
    """The licence is named before the file is asked for; the gene list comes from where the authors keep it, checked."""
    from cellfm_hub import downloads
    from cellfm_hub.checkpoints import CheckpointFiles

    said_before: list[str] = []

    def hub(place: downloads.Place) -> Path:
        said_before.append(warnings.text)
        raise downloads.DownloadError("not there")

    monkeypatch.setattr(downloads, "fetch_from_hub", hub)
    with cf.settings.override(offline=False), pytest.raises(WeightsUnavailableError, match="not there"):
        cf.load("scfoundation", device="cpu")
    assert "not for commercial use" in said_before[0]
    assert "MODEL_LICENSE" in said_before[0]

    files = CheckpointFiles(registry().find("scfoundation"))
    name = "OS_scRNA_gene_index.19264.tsv"
    with pytest.raises(WeightsUnavailableError, match="offline mode is on"):
        files.get(name)

    def server(content: bytes) -> None:
        def url(address: str, target: Path) -> None:
            assert address.startswith("https://raw.githubusercontent.com/biomap-research/scFoundation/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

        monkeypatch.setattr(downloads, "fetch_from_url", url)

    server(b"another file")
    with cf.settings.override(offline=False), pytest.raises(cf.errors.ChecksumError):
        files.get(name)
    assert not (files.cache / name).exists()
    if DATA.is_dir():
        server((DATA / "scfoundation" / name).read_bytes())
        with cf.settings.override(offline=False):
            assert files.get(name) == files.cache / name


# The Performer


def test_performer_against_its_definition() -> None:
    """Linear attention is what its definition says, one row at a time, in float64."""
    rng = np.random.default_rng(0)
    lengths, heads, width, features = (5, 5, 9), 2, 6, performer.random_features(6)
    assert performer.random_features(64) == 266
    q, k, v = rng.normal(size=(3, sum(lengths), heads, width))
    directions = rng.normal(size=(features, width))
    c = width**-0.25
    expected = np.empty_like(q)
    for start, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
        rows = slice(start, start + length)
        largest = max((c * directions @ k[t, h]).max() for t in range(start, start + length) for h in range(heads))
        for h in range(heads):
            keys = np.stack([np.exp(c * directions @ x - c**2 / 2 * x @ x - largest) + 1e-4 for x in k[rows, h]])
            for t in range(start, start + length):
                x = q[t, h]
                query = np.exp(c * directions @ x - c**2 / 2 * x @ x - (c * directions @ x).max()) + 1e-4
                weights = keys @ query
                expected[t, h] = weights @ v[rows, h] / weights.sum()
    batch = PackedBatch(ids=torch.zeros(sum(lengths), dtype=torch.int64), lengths=lengths)
    got = performer.linear_attend(*(torch.from_numpy(x).float() for x in (q, k, v, directions)), batch)
    np.testing.assert_allclose(got, expected, atol=5e-6, rtol=0)
