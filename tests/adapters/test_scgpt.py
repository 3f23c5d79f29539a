"""scGPT against the original code."""

import gzip
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

import cellfm_hub as cf
from cellfm_adapters.scgpt.adapter import ScGPTAdapter
from cellfm_adapters.scgpt.tokenizer import Tokenizer, Vocabulary, bin_rows, draw, number_copies, sample_rows
from cellfm_hub.errors import CheckpointFormatError, GeneCoverageError, InputError, WeightsUnavailableError
from cellfm_hub.kernels import argsort_rows_descending
from cellfm_hub.registry import registry
from cellfm_hub.seeding import row_seeds
from cellfm_hub.testing import check_cell_model
from cellfm_hub.tokens import Tokens, offsets_from_lengths
from cellfm_hub.weights import count_parameters
from golden_cases import DATA, LARGE, PORTABLE, Case, cases

WITH_WEIGHTS = [c for c in cases("scgpt") if "pbmc3k" not in c.id]
BASIC = Case(PORTABLE / "scgpt-basic")


def load(checkpoint: Path, **options: Any) -> cf.Embedder:
    return cf.load("scgpt", checkpoint=checkpoint, device="cpu", precision="float32", options=options)


def cells(case: Case) -> ad.AnnData:
    return ad.read_h5ad(case.path / "input.h5ad")


def rows_of(ids: NDArray[Any], values: NDArray[Any], pad: int) -> Tokens:
    """Pack what a case gives as padded rectangles."""
    real = ids != pad
    return Tokens(ids=ids[real], values=values[real], offsets=offsets_from_lengths(real.sum(axis=1)))


def expected_tokens(case: Case, model: cf.Embedder, prefix: str = "expected_") -> Tokens:
    pad = next(i for i, token in enumerate(model.adapter.vocabulary) if token == "<pad>")
    ids = case.array(f"{prefix}token_ids.npy") if "legacyties" not in prefix else case.array("expected_token_ids.npy")
    return rows_of(ids, case.array(f"{prefix}values.npy"), pad)


def legacy_tokens(model: cf.Embedder, adata: ad.AnnData, seed: int) -> Tokens:
    """Tokens with the original's own stream: one ``rand(k)`` of numpy's legacy generator per cell, in the order of cells."""
    tokenizer = model.adapter.tokenizer
    symbols = adata.var.get("feature_name", adata.var_names)
    genes = tokenizer.match_genes(symbols.tolist())
    counts = genes.apply(sp.csr_matrix(adata.X))
    values, offsets = counts.data.astype(np.float64), counts.indptr.astype(np.int64)
    lengths = np.diff(offsets)
    stream = np.random.RandomState(seed)
    draws = np.concatenate([stream.rand(k) for k in lengths])
    bins = bin_rows(values, argsort_rows_descending(values, offsets), offsets, draws)
    return tokenizer.frame(genes.tokens[counts.indices], bins, lengths, cut=np.zeros(len(lengths), np.int64))


def assert_same_tokens(got: Tokens, expected: Tokens) -> None:
    np.testing.assert_array_equal(got.offsets, expected.offsets)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.values, expected.values)


def pairs(tokens: Tokens, row: int) -> list[tuple[int, float]]:
    assert tokens.values is not None
    part = slice(tokens.offsets[row], tokens.offsets[row + 1])
    return list(zip(tokens.ids[part].tolist(), tokens.values[part].tolist(), strict=True))


def sampled_cells(case: Case) -> list[int]:
    """Cells above the case's own max_length; the portable case has them in one of its runs only."""
    return [] if case.name == BASIC.name else case.facts["determinism"]["cells_sampled"]


# Against the original


@pytest.mark.parametrize("case", WITH_WEIGHTS)
def test_tokens(case: Case) -> None:
    """Ids and bins are exactly the original's, with the tie rule of the case; sampled cells hold a part of what is expressed."""
    policy = case.facts["determinism"]["tie_policy"]
    legacy = policy == "numpy-legacy"
    model = load(case.checkpoint, ties="upper")
    adata, expected = cells(case), expected_tokens(case, model)
    got = legacy_tokens(model, adata, case.facts["determinism"]["seed"]) if legacy else model.tokenize(adata)
    sampled = sampled_cells(case)
    others = np.setdiff1d(np.arange(len(got)), sampled)
    assert_same_tokens(got.take(others), expected.take(others))
    everything = got if legacy else load(case.checkpoint, ties="upper", max_length=10_000).tokenize(adata)
    for row in sampled:
        assert set(pairs(expected, row)) <= set(pairs(everything, row))
        if not legacy:
            assert got.lengths[row] == expected.lengths[row]
            assert set(pairs(got, row)) <= set(pairs(everything, row))


@pytest.mark.parametrize("case", WITH_WEIGHTS)
def test_embeddings(case: Case) -> None:
    """Every expected array is met, and every file of the case is looked at."""
    model = load(case.checkpoint, ties="upper")
    tokens = expected_tokens(case, model)
    kinds = {"cell_embedding": {}, "cls_unnormalised": {"recipe": "cls-raw"}, "mean_genes": {"recipe": "mean"}}
    looked_at = 0
    for path in sorted(case.path.glob("expected_*.npy")):
        prefix, name = re.fullmatch(r"(expected_(?:maxlen64_|legacyties_)?)(\w+)", path.stem).groups()  # type: ignore[union-attr]
        if name in ("token_ids", "values"):
            continue
        expected = case.array(path.name)
        if name in kinds:
            case.assert_close(model.encode_tokens(expected_tokens(case, model, prefix), **kinds[name]), expected, path.name)
        elif name.startswith("contextual"):
            row = int(name.removeprefix("contextual_cell"))
            case.assert_close(model.encode_tokens(tokens, level="gene").row(row), expected, path.name)
        else:
            assert name == "static_gene_embedding"
            table = model.gene_embeddings()
            case.assert_close(table.to_numpy()[case.array("static_gene_ids.npy")], expected, path.name)
            assert table.index.tolist() == model.adapter.vocabulary.tolist()
        looked_at += 1
    assert looked_at >= 6


@pytest.mark.parametrize("case", [c for c in WITH_WEIGHTS if "headdim64" not in c.id])
def test_from_counts_to_vectors(case: Case) -> None:
    """The way users go, with the ties of the case."""
    model = load(case.checkpoint, ties="upper")
    adata = cells(case)
    whole = np.setdiff1d(np.arange(adata.n_obs), sampled_cells(case))
    for name, recipe in (("cell_embedding", "default"), ("cls_unnormalised", "cls-raw"), ("mean_genes", "mean")):
        case.assert_close(model.encode(adata, recipe=recipe)[whole], case.array(f"expected_{name}.npy")[whole], name)
    case.assert_close(model.encode(adata, pooling="cls")[whole], case.array("expected_cell_embedding.npy")[whole])
    case.assert_close(model.encode(adata, pooling="mean")[whole], case.array("expected_mean_genes.npy")[whole])
    assert model.receipt is not None
    assert model.receipt["normalize"] is False
    assert model.receipt["n_truncated"] == len(sampled_cells(case))


def test_cut_to_64() -> None:
    """Cells of up to 64 tokens stay as they are; of longer ones a part is kept, binned among all genes."""
    expected = expected_tokens(BASIC, model := load(BASIC.checkpoint, ties="upper", max_length=64), "expected_maxlen64_")
    got = model.tokenize(cells(BASIC))
    whole = np.setdiff1d(np.arange(12), BASIC.facts["determinism"]["cells_sampled"])
    assert_same_tokens(got.take(whole), expected.take(whole))
    everything = expected_tokens(BASIC, model)
    for row, dropped in ((9, 146), (11, 1)):
        assert got.lengths[row] == expected.lengths[row] == 64
        assert set(pairs(got, row)) < set(pairs(everything, row)) > set(pairs(expected, row))
        assert got.cut is not None
        assert got.cut[row] == dropped


def test_legacy_ties() -> None:
    model = load(BASIC.checkpoint)
    tokens = legacy_tokens(model, cells(BASIC), BASIC.facts["seeds"]["legacy_ties_numpy"])
    assert_same_tokens(tokens, expected_tokens(BASIC, model, "expected_legacyties_"))


@pytest.mark.parametrize("case", [c for c in cases("scgpt") if "pbmc3k" in c.id])
def test_real_cells(case: Case) -> None:
    """Blood cells with the published vocabulary, int32 counts."""
    model = load(LARGE / "scgpt-fullvocab" / "checkpoint", ties="upper", max_length=4096)
    adata = ad.read_h5ad(DATA / "scrna/pbmc3k/pbmc3k_mini.h5ad")
    upper, legacy = (np.load(case.path / f"expected_{name}.npz") for name in ("upper", "numpy_legacy_seed0"))
    ids = upper["token_ids"].astype(np.int32)
    for tokens, expected in ((model.tokenize(adata), upper), (legacy_tokens(model, adata, 0), legacy)):
        assert_same_tokens(tokens, rows_of(ids, expected["values"], pad=60694))
        case.assert_close(model.encode_tokens(tokens), expected["cell_embedding"])


# Binning


@pytest.mark.parametrize("seed", range(3))
def test_bins_are_those_of_numpy(seed: int) -> None:
    """Edges equal ``numpy.quantile`` of float32 numbers to the bit: no bin differs."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate(([1, 2, 3], rng.integers(1, 400, size=300)))
    kinds: list[Callable[[int], NDArray[Any]]] = [
        lambda n: rng.geometric(0.4, n),
        lambda n: rng.integers(1, 5000, n),
        lambda n: np.log1p(rng.geometric(0.02, n) * rng.random()),
        lambda n: rng.random(n) + 1e-6,
    ]
    parts = [kinds[i % len(kinds)](n).astype(np.float32) for i, n in enumerate(lengths)]
    values, offsets = np.concatenate(parts).astype(np.float64), offsets_from_lengths(lengths)
    draws = rng.random(len(values))
    got = bin_rows(values, argsort_rows_descending(values, offsets), offsets, draws)
    for i, part in enumerate(parts):
        row = slice(offsets[i], offsets[i + 1])
        edges = np.quantile(part, np.linspace(0, 1, 50))
        upper, lower = np.digitize(part, edges), np.digitize(part, edges, right=True)
        expected = np.ceil(draws[row] * (lower - upper) + upper)
        np.testing.assert_array_equal(got[row], np.where(upper - lower <= 1, upper, expected))


def test_edges_are_rounded_as_numpy_does() -> None:
    """Of 50 genes the edges stand at the counts but for rounding: one beside a tie is not one of the tie."""
    part = np.array([1, 4, 9, 9, *range(10, 56)], dtype=np.float32)
    assert len(part) == 50
    edges = np.quantile(part, np.linspace(0, 1, 50))
    assert 0 < 9 - edges[2] < 1e-14
    values, offsets, draws = part.astype(np.float64), np.array([0, 50]), np.full(50, 0.9)
    got = bin_rows(values, argsort_rows_descending(values, offsets), offsets, draws)
    upper, lower = np.digitize(part, edges), np.digitize(part, edges, right=True)
    np.testing.assert_array_equal(got, np.where(upper - lower <= 1, upper, np.ceil(0.9 * (lower - upper) + upper)))


def test_bins_depend_on_order_only() -> None:
    """A logarithm changes nothing."""
    counts = np.random.default_rng(1).geometric(0.3, 700).astype(np.float64)
    offsets, none = np.array([0, 300, 700]), np.zeros(700)
    plain, logged = (
        bin_rows(v, argsort_rows_descending(v, offsets), offsets, none)
        for v in (counts, np.log1p(counts).astype(np.float32).astype(np.float64))
    )
    np.testing.assert_array_equal(plain, logged)


# Ties and samples


def made_up(n_cells: int, n_genes: int, seed: int = 0, rate: float = 0.5) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    return sp.csr_matrix((rng.geometric(0.6, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < rate)).astype(np.float32))


def symbols(n: int) -> list[str]:
    return [f"GENE{i}" for i in range(n)]


def made_up_tokenizer(n_genes: int, **options: Any) -> Tokenizer:
    vocabulary = Vocabulary({symbol: i for i, symbol in enumerate(symbols(n_genes))}, "here")
    return Tokenizer(vocabulary, pad_value=-2, **{"max_length": 1200, "ties": "seeded"} | options)


def chi_square(observed: NDArray[Any], expected: float) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def test_ties_are_uniform() -> None:
    """Over many cells and seeds, a gene of a tie group takes every bin from R + 1 to L equally often, and genes differ."""
    tokenizer = made_up_tokenizer(20)
    genes = tokenizer.match_genes(symbols(20))
    # 14 genes with count 1, 6 with larger ones. Gene 19 only makes contents differ from cell to cell.
    counts = np.tile([1.0] * 14 + [2, 3, 4, 5, 6, 7], (8000, 1))
    counts[:, 19] += np.arange(8000)
    tokens = tokenizer.tokenize(sp.csr_matrix(counts), genes, seed=0)
    assert tokens.values is not None
    bins = tokens.values.reshape(8000, 21)[:, 1:15].astype(int)
    edges = np.quantile(counts[0], np.linspace(0, 1, 50))
    top = int((edges <= 1).sum())
    assert bins.min() == 1
    assert bins.max() == top == 34
    for gene in (0, 6, 13):
        assert chi_square(np.bincount(bins[:, gene], minlength=top + 1)[1:], 8000 / top) < 63.9  # 33 degrees of freedom, p = 0.001
    assert chi_square(np.bincount(bins.ravel(), minlength=top + 1)[1:], 8000 * 14 / top) < 63.9
    assert np.abs(np.corrcoef(bins.T) - np.eye(14)).max() < 0.06
    same_cell = [tokenizer.tokenize(sp.csr_matrix(counts[:1]), genes, seed=s).values[1] for s in range(2000)]  # type: ignore[index]
    assert chi_square(np.bincount(np.array(same_cell, int), minlength=top + 1)[1:], 2000 / top) < 63.9


def test_samples_are_uniform() -> None:
    """Every gene of a long cell is kept equally often; exactly max_length tokens stay; ties and sample are drawn apart."""
    tokenizer = made_up_tokenizer(40, max_length=11)
    genes = tokenizer.match_genes(symbols(40))
    counts = np.ones((6000, 40))
    counts[:, 39] += 1 + np.arange(6000)
    tokens = tokenizer.tokenize(sp.csr_matrix(counts), genes, seed=0)
    assert set(tokens.lengths.tolist()) == {11}
    assert tokens.cut is not None
    assert set(tokens.cut.tolist()) == {30}
    ids = tokens.ids.reshape(6000, 11)[:, 1:]
    assert (np.diff(ids, axis=1) > 0).all()  # without replacement
    # Each cell gives ten genes, drawn without replacement: the variance of a count is (1 - 10/40) of the binomial's.
    assert chi_square(np.bincount(ids.ravel(), minlength=40), 1500) / 0.75 < 72.1  # 39 degrees of freedom, p = 0.001
    assert tokens.values is not None
    values = tokens.values.reshape(6000, 11)[:, 1:][ids < 39]
    assert (top := int(values.max())) == 48
    assert chi_square(np.bincount(values.astype(int), minlength=top + 1)[1:], values.size / top) < 82.8  # 47 degrees, p = 0.001


def test_order_of_genes() -> None:
    """Draws belong to genes: other columns, unknown ones between, copies of a symbol in another order give the same pairs."""
    rng = np.random.default_rng(0)
    counts = made_up(30, 120, rate=0.8)
    names = symbols(110) + [f"GENE{i}" for i in range(10)]  # ten symbols twice
    tokenizer = made_up_tokenizer(110, max_length=60)
    first = tokenizer.tokenize((g := tokenizer.match_genes(names)).apply(counts), g, seed=3)
    order = rng.permutation(120)
    wider = sp.csr_matrix(sp.hstack([made_up(30, 7, seed=9), counts[:, order]]))
    g = tokenizer.match_genes([f"other{i}" for i in range(7)] + [names[i] for i in order])
    second = tokenizer.tokenize(g.apply(wider), g, seed=3)
    for row in range(30):
        assert sorted(pairs(first, row)) == sorted(pairs(second, row))
    assert first.values is not None
    assert second.values is not None
    assert not np.array_equal(first.values, tokenizer.tokenize(g.apply(wider), g, seed=4).values)


PINNED_IDS = [
    [41, 2, 3, 4, 6, 8, 13, 18, 19, 26, 27, 36, 39],
    [41, 1, 5, 6, 8, 16, 18, 22, 23, 27, 30, 31, 33],
    [41, 2, 3, 10, 15, 16, 20, 22, 23, 27, 33, 35, 37],
]
PINNED_BINS = [
    [-2, 44, 21, 33, 9, 15, 48, 2, 5, 34, 31, 28, 2],
    [-2, 4, 41, 49, 22, 49, 31, 12, 12, 46, 32, 32, 9],
    [-2, 31, 2, 46, 13, 16, 42, 27, 27, 6, 24, 38, 2],
]


def test_draws_are_pinned() -> None:
    """What three cells draw, ties and samples, so that vectors cannot change from one version to the next unnoticed.

    Where these numbers change on purpose, CHANGELOG says so under "Vectors changed".
    """
    tokenizer = made_up_tokenizer(40, max_length=13)
    genes = tokenizer.match_genes(symbols(40))
    counts = sp.csr_matrix((np.arange(120).reshape(3, 40) * 7 % 11 % 4).astype(np.float32))
    tokens = tokenizer.tokenize(counts, genes, seed=5)
    assert tokens.values is not None
    assert tokens.ids.reshape(3, 13).tolist() == PINNED_IDS
    assert tokens.values.reshape(3, 13).astype(int).tolist() == PINNED_BINS


def test_copies_draw_apart() -> None:
    """Two columns of one symbol with the same count do not share a draw."""
    tokens, offsets = np.zeros(4000, np.int32), np.arange(0, 4001, 2)
    counts = np.ones(4000)
    counts[::2] += np.arange(2000)
    order = argsort_rows_descending(counts, offsets)
    places = number_copies(tokens, order, offsets, 5)
    np.testing.assert_array_equal(places.reshape(-1, 2), np.tile([0, 5], (2000, 1)))
    seeds = row_seeds(tokens, counts, offsets, 0)
    draws = draw(seeds, places, offsets).reshape(-1, 2)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.08
    chosen = sample_rows(seeds, places, offsets, 1).reshape(-1, 2)
    assert (chosen.sum(axis=1) == 1).all()
    assert 900 < chosen[:, 0].sum() < 1100


# The hub's promises


@pytest.mark.parametrize("options", [{}, {"ties": "upper"}, {"max_length": 40}, {"max_length": 2}], ids=str)
def test_contract(options: dict[str, Any]) -> None:
    model = load(BASIC.checkpoint, **options)
    adata = cells(BASIC)
    # A cell without any known gene in the middle, and one that is empty.
    adata = ad.concat([adata[:5], adata[5:7], adata[7:]], merge="same")
    matrix = adata.X.toarray()
    known = np.isin(adata.var["feature_name"].astype(str), model.adapter.vocabulary)
    matrix[3, known], matrix[3, ~known], matrix[6] = 0, 5, 0
    adata.X = sp.csr_matrix(matrix)
    for recipe in ("default", "cls-raw", "mean"):
        check_cell_model(model, adata, recipe=recipe)
    vectors = model.encode(adata)
    np.testing.assert_array_equal(np.isnan(vectors).all(axis=1), np.isin(np.arange(12), [3, 6]))
    np.testing.assert_array_equal(np.isnan(vectors).any(axis=1), np.isin(np.arange(12), [3, 6]))
    np.testing.assert_allclose(np.linalg.norm(np.delete(vectors, [3, 6], axis=0), axis=1), 1, atol=1e-6)
    assert model.receipt is not None
    assert model.receipt["n_empty"] == 2
    assert len(str(model.receipt["weights_sha256"])) == 64
    with pytest.raises(InputError, match="holds no gene"):
        model.encode(adata, on_empty="error")


def test_order_of_genes_does_not_change_vectors() -> None:
    model = load(BASIC.checkpoint, max_length=40)
    adata = cells(BASIC)
    order = np.random.default_rng(0).permutation(adata.n_vars)
    np.testing.assert_allclose(model.encode(adata[:, order].copy()), model.encode(adata), rtol=0, atol=2e-6)
    assert np.abs(model.encode(adata, seed=1) - model.encode(adata)).max() > 1e-3


def test_gene_level() -> None:
    model = load(BASIC.checkpoint)
    vectors = model.encode(cells(BASIC), level="gene")
    assert set(vectors.names[vectors.offsets[:-1]]) == {"<cls>"}
    assert vectors.values.shape == (len(vectors.ids), 32)
    assert not np.allclose(np.linalg.norm(vectors.values, axis=1), 1)


# Checkpoints


def copied(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(BASIC.checkpoint, folder)
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path)  # noqa: TID251, the test's own file


@pytest.mark.parametrize(
    "spelling",
    [("Wqkv.weight", "in_proj_weight", "Wqkv.bias", "in_proj_bias"), ("self_attn.", "self_attn._impl.", "", "")],
    ids=["plain", "flash2"],
)
def test_other_spellings(tmp_path: Path, spelling: tuple[str, str, str, str]) -> None:
    folder = copied(tmp_path)
    old, new, old_2, new_2 = spelling
    edit_weights(folder / "best_model.pt", lambda t: {k.replace(old, new).replace(old_2, new_2): v for k, v in t.items()})
    model = load(folder, ties="upper")
    BASIC.assert_close(model.encode(cells(BASIC)), BASIC.array("expected_cell_embedding.npy"))


def test_fine_tuned_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Layers of fine-tuning are left out by name; those that act on the input are named in a warning."""
    folder = copied(tmp_path)
    extra = ["cls_decoder._decoder.0.weight", "grad_reverse_discriminator.out_layer.bias", "mvc_decoder.hidden.weight"]
    edit_weights(folder / "best_model.pt", lambda t: t | {name: torch.ones(3, 3) for name in extra})
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        BASIC.assert_close(load(folder, ties="upper").encode(cells(BASIC)), BASIC.array("expected_cell_embedding.npy"))
        assert ["stand in several columns" in message for message in caplog.messages] == [True]  # of the genes, not of the layers
        edit_weights(
            folder / "best_model.pt", lambda t: t | {"dsbn.bns.0.weight": torch.ones(32), "batch_encoder.enc_norm.bias": torch.ones(32)}
        )
        load(folder)
    assert "batch_encoder and dsbn" in caplog.text


def test_vocabulary_without_special_tokens(tmp_path: Path) -> None:
    """They are appended, as the original does; a table without room for them is refused."""
    folder = copied(tmp_path)
    edit_json(folder / "vocab.json", lambda v: [v.pop(t) for t in ("<pad>", "<cls>", "<eoc>")])  # type: ignore[arg-type, func-returns-value]
    BASIC.assert_close(load(folder, ties="upper").encode(cells(BASIC)), BASIC.array("expected_cell_embedding.npy"))
    edit_weights(folder / "best_model.pt", lambda t: t | {"encoder.embedding.weight": t["encoder.embedding.weight"][:300]})
    with pytest.raises(CheckpointFormatError, match=r"vocab.json .* 303 tokens .*, best_model.pt has 300"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("embsize", 64, "misshapen"),
        ("embsize", "32", "embsize='32'"),
        ("d_hid", 64, "misshapen: transformer_encoder.layers.0.linear1"),
        ("nlayers", 3, "missing: transformer_encoder.layers.2"),
        ("nlayers", 1, "not known: transformer_encoder.layers.1"),
        ("nlayers", 0, "nlayers=0"),
        ("nheads", 3, "nheads=3 does not divide"),
        ("nheads", None, "nheads=None"),
        ("pad_value", "-2", "pad_value='-2'"),
    ],
)
def test_args_that_contradict_the_weights(tmp_path: Path, key: str, value: Any, says: str) -> None:
    folder = copied(tmp_path)
    edit_json(folder / "args.json", lambda args: args.update({key: value}))
    with pytest.raises(CheckpointFormatError, match=re.escape(says)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "value_encoder.norm.bias"}, "missing: value_encoder.norm.bias"),
        (lambda t: t | {"encoder.enc_norm.weight": torch.ones(31)}, "encoder.enc_norm.weight is (31,), expected (32,)"),
        (lambda t: t | {"surprise.weight": torch.ones(2)}, "not known: surprise.weight"),
        (lambda t: t | {"transformer_encoder.layers.0.self_attn.in_proj_bias": torch.ones(96)}, "under two names"),
        (lambda t: t | {"encoder.embedding.weight": torch.ones(290, 32)}, "best_model.pt has 290"),
        (lambda t: t | {"numbers": [1, 2]}, "not a plain mapping"),
    ],
)
def test_bad_weights(tmp_path: Path, change: Any, says: str) -> None:
    folder = copied(tmp_path)
    edit_weights(folder / "best_model.pt", change)
    with pytest.raises(CheckpointFormatError, match=re.escape(says)):
        load(folder)


def test_bad_files(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    edit_json(folder / "vocab.json", lambda v: v.update({"GENEA8": 7}))
    with pytest.raises(CheckpointFormatError, match="does not number its 303 entries"):
        load(folder)
    (folder / "vocab.json").write_text("[]")
    with pytest.raises(CheckpointFormatError, match="expected an object"):
        load(folder)
    edit_json(folder / "args.json", lambda args: args.pop("nheads"))
    shutil.copy(BASIC.checkpoint / "vocab.json", folder / "vocab.json")
    with pytest.raises(CheckpointFormatError, match="lacks nheads"):
        load(folder)
    shutil.copy(BASIC.checkpoint / "args.json", folder / "args.json")
    (folder / "best_model.pt").write_bytes((BASIC.checkpoint / "best_model.pt").read_bytes()[:5000])
    with pytest.raises(CheckpointFormatError, match="cannot be read"):
        load(folder)
    (folder / "best_model.pt").unlink()
    with pytest.raises(WeightsUnavailableError, match=r"no best_model\.pt"):
        load(folder)


def test_not_downloadable() -> None:
    """Google Drive folders are not fetched: the error names the folder, the files and how to bring them."""
    with pytest.raises(WeightsUnavailableError) as caught:
        cf.load("scgpt-brain")
    for part in ("args.json of scgpt-brain", "https://drive.google.com/drive/folders/", "not to programs", "best_model.pt", "cellfm add"):
        assert part in str(caught.value)


# Input and options


def test_ensembl_ids() -> None:
    """Where symbols are needed, the error says which column has them."""
    model = load(BASIC.checkpoint)
    adata = cells(BASIC)
    adata.var.index = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    assert model.encode(adata).shape == (12, 32)
    with pytest.raises(GeneCoverageError, match=r"looked at index \(ENSG.*gene_ids='feature_name' would match 243"):
        model.encode(adata, gene_ids="index")
    with pytest.raises(GeneCoverageError, match="none of the 256 genes"):
        model.encode(ad.AnnData(adata.X, var=adata.var[[]]))


def test_ensembl_ids_with_a_table(tmp_path: Path) -> None:
    """Where a table of genes is at hand, Ensembl ids are read as symbols, with or without version, and the receipt says so."""
    model, adata = load(BASIC.checkpoint), cells(BASIC)
    symbols = adata.var["feature_name"].tolist()
    rows = [f"ENSG{i:011d}\t1\t{symbol}\n" for i, symbol in enumerate(symbols)]
    with gzip.open(tmp_path / "human_gencode_test.tsv.gz", "wt") as file:
        file.write("ensembl_id\tversion\tsymbol\n" + "".join(rows))
    expected = model.encode(adata, gene_ids="feature_name")
    other = ad.AnnData(adata.X, obs=adata.obs)
    other.var_names = [f"ENSG{i:011d}" + (".3" if i % 2 else "") for i in range(adata.n_vars)]
    with pytest.raises(GeneCoverageError, match="CELLFM_GENES"):
        model.encode(other)
    with cf.settings.override(genes_dir=tmp_path):
        np.testing.assert_allclose(model.encode(other), expected, atol=2e-6, rtol=0)
    assert model.receipt is not None
    assert model.receipt["gene_ids"] == "index (Ensembl ids read as symbols)"


@pytest.mark.parametrize(
    "content",
    [None, b"not gzip", gzip.compress(b"gene\tname\n"), gzip.compress(b"ensembl_id\tsymbol\n" * 99)[:-12]],
    ids=["no table", "not gzip", "wrong columns", "cut off"],
)
def test_no_usable_table(tmp_path: Path, content: bytes | None) -> None:
    """A folder without tables, and tables that are damaged or something else, are named in one line."""
    if content is not None:
        (tmp_path / "human_gencode_test.tsv.gz").write_bytes(content)
    adata = cells(BASIC)
    other = ad.AnnData(adata.X, obs=adata.obs)
    other.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    with (
        cf.settings.override(genes_dir=tmp_path),
        pytest.raises(cf.errors.InputError, match=r"gene table.*ensembl_id|CELLFM_GENES") as caught,
    ):
        load(BASIC.checkpoint).encode(other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ties": "lower"}, "ties='lower' is refused"),
        ({"max_length": 1}, "max_length=1 is refused"),
        ({"tie": "upper"}, "'tie' is not one"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        load(BASIC.checkpoint, **options)
    assert "ties=seeded (seeded | upper), max_length=1200" in str(caught.value)


# The card


def test_card() -> None:
    """Eight checkpoints under the names users know, each with the network of the published file."""
    found = {name: entry for name, entry in registry().checkpoints.items() if entry.family == "scgpt"}
    assert len(found) == 8
    assert registry().find("scgpt").name == registry().find("scGPT_human").name == "scgpt-human"
    assert registry().find("scGPT_CP").name == "scgpt-cp"
    for entry in found.values():
        with torch.device("meta"):
            network, keys = ScGPTAdapter.published(dict(entry.checkpoint.config))
        assert count_parameters(keys) == entry.checkpoint.parameters == 51_330_049
        used = sum(np.prod(key.shape) for key in keys.values() if key.to is not None)
        assert sum(p.numel() for p in network.parameters()) == used
        assert set(entry.checkpoint.files) == {"args.json", "vocab.json", "best_model.pt"}
