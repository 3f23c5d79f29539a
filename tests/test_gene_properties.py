"""What may not change a vector: the order of genes, genes that the model does not know, genes without counts, a gene in two columns."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import cellfm_hub as cf
from cellfm_adapters.geneformer.dictionaries import _read_text
from cellfm_adapters.geneformer.tokenizer import Dictionaries, Tokenizer
from cellfm_hub.genes import GeneMap, choose_gene_ids
from golden_cases import DATA, PORTABLE, Case

FAMILIES = {
    "geneformer-v1": ("geneformer", Case(PORTABLE / "geneformer-v1-basic")),
    "geneformer-v2": ("geneformer", Case(PORTABLE / "geneformer-v2-basic")),
    "scfoundation": ("scfoundation", Case(PORTABLE / "scfoundation-basic")),
    "scgpt": ("scgpt", Case(PORTABLE / "scgpt-basic")),
    "uce": ("uce", Case(PORTABLE / "uce-basic")),
}
GENE_NAMES = ("as-is", "resolve")

family = pytest.mark.parametrize("name", sorted(FAMILIES))
reading = pytest.mark.parametrize("gene_names", GENE_NAMES)


@cache
def model_of(name: str, gene_names: str) -> cf.Embedder:
    model, case = FAMILIES[name]
    return cf.load(model, checkpoint=case.checkpoint, options={**case.options, "gene_names": gene_names}, device="cpu", precision="float32")


@cache
def counts_of(name: str) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Return twelve cells, and identifiers that the model knows, each once.

    Counts are of a wide range, so that no two genes of a cell tie in Geneformer's ranking.
    """
    model, case = model_of(name, "as-is"), FAMILIES[name][1]
    adata = ad.read_h5ad(case.path / "input.h5ad")
    adapter: Any = model.adapter
    genes = None
    for ids in [list(adata.var_names), *(adata.var[column].astype(str).tolist() for column in adata.var)]:
        unique = list(dict.fromkeys(ids))
        matched = adapter.gene_matcher("human" if name == "uce" else None, {"index": unique})(unique)
        _, first = np.unique(matched.tokens[matched.targets], return_index=True)
        known = tuple(unique[matched.columns[i]] for i in np.sort(first))
        genes = known if genes is None or len(known) > len(genes) else genes
    assert genes is not None
    assert len(genes) > 50
    random = np.random.default_rng(7)
    counts = random.integers(1, 50_000, (12, len(genes))) * (random.random((12, len(genes))) < 0.6)
    counts[:, 0] += 1
    return counts.astype(np.float32), genes


def encode(name: str, gene_names: str, counts: NDArray[np.float32], genes: list[str]) -> NDArray[np.float32]:
    data = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame({"id": genes}, index=[str(i) for i in range(len(genes))]))
    data.var.index = "row" + data.var.index
    return model_of(name, gene_names).encode(data, gene_ids="id", species="human")


@cache
def expected(name: str, gene_names: str) -> NDArray[np.float32]:
    counts, genes = counts_of(name)
    return encode(name, gene_names, counts, list(genes))


def assert_same(got: NDArray[np.float32], name: str, gene_names: str) -> None:
    np.testing.assert_allclose(got, expected(name, gene_names), atol=2e-6, rtol=0)


def tied(name: str) -> bool:
    """Whether two genes of a cell have the same rank value, which column order would decide."""
    counts, genes = counts_of(name)
    tokenizer = model_of(name, "as-is").adapter.tokenizer  # type: ignore[attr-defined]
    matched = tokenizer.match_genes(genes)
    values = matched.apply(sp.csr_matrix(counts)).toarray() / tokenizer._median_of_token[matched.tokens]
    return any(len(np.unique(row[row > 0])) < np.count_nonzero(row) for row in values)


@family
@reading
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_genes(name: str, gene_names: str, seed: int) -> None:
    """No vector depends on the order of columns; Geneformer's only where two genes of a cell tie exactly, which none does here."""
    if name.startswith("geneformer"):
        assert not tied(name)
    counts, genes = counts_of(name)
    order = np.random.default_rng(seed).permutation(len(genes))
    assert_same(encode(name, gene_names, counts[:, order], [genes[i] for i in order]), name, gene_names)


def test_exact_ties_follow_column_order() -> None:
    """Geneformer ranks genes of equal value in the order of columns, as its golden cases do: there the order of genes counts."""
    case = FAMILIES["geneformer-v2"][1]
    model = model_of("geneformer-v2", "as-is")
    medians: dict[str, float] = model.adapter.tokenizer.dictionaries.medians  # type: ignore[attr-defined]
    known = set(model.adapter.tokenizer.dictionaries.tokens)  # type: ignore[attr-defined]
    by_median: dict[float, list[str]] = {}
    for gene, median in medians.items():
        if gene in known:
            by_median.setdefault(median, []).append(gene)
    pair = next((genes[:2] for genes in by_median.values() if len(genes) > 1), None)
    assert pair is not None, case.name
    rows = [
        [model.adapter.vocabulary[t] for t in model.tokenize(data, gene_ids="id").ids] for data in (two_genes(pair), two_genes(pair[::-1]))
    ]
    assert [t for t in rows[0] if not t.startswith("<")] == pair
    assert [t for t in rows[1] if not t.startswith("<")] == pair[::-1]


def two_genes(pair: list[str]) -> ad.AnnData:
    return ad.AnnData(np.array([[3.0, 3.0]], dtype=np.float32), var=pd.DataFrame({"id": pair}, index=["a", "b"]))


@family
@reading
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_further_genes(name: str, gene_names: str, data: st.DataObject) -> None:
    """Genes that the model does not know, and genes without counts, anywhere among the others."""
    counts, genes = counts_of(name)
    kept = np.random.default_rng(0).random(len(genes)) < 0.7
    shown = counts * kept
    want = encode(name, gene_names, counts[:, kept], [gene for gene, k in zip(genes, kept, strict=True) if k])
    np.testing.assert_allclose(encode(name, gene_names, shown, list(genes)), want, atol=2e-6, rtol=0)

    places = data.draw(st.lists(st.integers(0, len(genes)), min_size=1, max_size=9))
    columns, names = [*counts.T], list(genes)
    for number, place in enumerate(sorted(places, reverse=True)):
        columns.insert(place, np.full(len(counts), 1.0 + number, dtype=np.float32))
        names.insert(place, data.draw(st.sampled_from(["ERCC-", "RP11-1A1.", "unheard of "])) + str(number))
    assert_same(encode(name, gene_names, np.array(columns).T, names), name, gene_names)


def split(name: str, seed: int) -> tuple[NDArray[np.float32], list[str]]:
    """Return the cells with the counts of some genes over two columns of the same name."""
    counts, genes = counts_of(name)
    random = np.random.default_rng(seed)
    twice = random.choice(len(genes), 10, replace=False)
    part = random.binomial(counts[:, twice].astype(int), 0.5).astype(np.float32)
    rest = counts.copy()
    rest[:, twice] -= part
    return np.concatenate((rest, part), axis=1), [*genes, *(genes[i] for i in twice)]


@family
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**32 - 1))
def test_gene_in_two_columns(name: str, seed: int) -> None:
    """With ``gene_names="resolve"`` the two columns are one gene, and are said to be."""
    counts, genes = split(name, seed)
    got = encode(name, "resolve", counts, genes)
    receipt = model_of(name, "resolve").receipt
    assert receipt is not None
    assert receipt["genes_summed"] == 10
    assert_same(got, name, "resolve")


@family
def test_gene_in_two_columns_as_released(name: str) -> None:
    """By default the original release's rule holds: scFoundation sums, the others take the same name twice for two genes."""
    counts, genes = split(name, 3)
    got = encode(name, "as-is", counts, genes)
    receipt = model_of(name, "as-is").receipt
    assert receipt is not None
    if name == "scfoundation":
        assert receipt["genes_summed"] == 10
        assert_same(got, name, "as-is")
        return
    assert receipt["genes_summed"] == 0
    assert np.abs(got - expected(name, "as-is")).max() > 1e-5
    if name != "uce":  # which draws
        data = ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame({"id": genes}, index=[f"row{i}" for i in range(len(genes))]))
        tokens = model_of(name, "as-is").tokenize(data, gene_ids="id")
        assert any(len(np.unique(row)) < len(row) for row in map(tokens.row, range(12)))


def versioned(genes: Sequence[str], seed: int, part: float) -> list[str]:
    """Return identifiers of which a part, if they are Ensembl ids, has a version."""
    random = np.random.default_rng(seed)
    chosen = random.random(len(genes)) < part
    return [f"{g}.{random.integers(1, 30)}" if c and g.startswith("ENS") else g for g, c in zip(genes, chosen, strict=True)]


@family
@reading
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), part=st.sampled_from([0.02, 0.5, 1.0]))
def test_versions_of_ensembl_ids(name: str, gene_names: str, seed: int, part: float) -> None:
    """With or without version, in any mixture, the tokens are the same."""
    counts, genes = counts_of(name)
    assert_same(encode(name, gene_names, counts, versioned(genes, seed, part)), name, gene_names)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("gene_names", GENE_NAMES)
@pytest.mark.parametrize("corpus", ["gc30M", "gc104M"])
def test_versions_and_published_dictionaries(corpus: str, gene_names: str) -> None:
    """pbmc3k with versions feeds the same genes as without; the shipped table of genes lacks 882 of those that V1 knows."""
    folder = DATA / "geneformer" / corpus
    aliases = folder / "aliases.tsv"
    tokens: Dictionaries = _read_text(folder / "tokens.tsv", aliases if aliases.is_file() else None)
    var = ad.read_h5ad(DATA / "scrna/pbmc3k/pbmc3k.h5ad", backed="r").var
    ids = var["ensembl_id"].tolist()
    found = {}
    for what, written in {"bare": ids, "all": versioned(ids, 0, 1), "some": versioned(ids, 1, 0.3)}.items():
        frame = pd.DataFrame({"ensembl_id": written}, index=[f"row{i}" for i in range(len(ids))])
        found[what] = choose_gene_ids(
            frame,
            Tokenizer(tokens, 2048).match_genes,
            column=None,
            preferred=("ensembl_id",),
            model="m",
            species="human",
            resolve=gene_names == "resolve",
        )[1]
    assert found["bare"].n_matched > 18_000
    for what in ("all", "some"):
        np.testing.assert_array_equal(found[what].columns, found["bare"].columns)
        np.testing.assert_array_equal(found[what].tokens[found[what].targets], found["bare"].tokens[found["bare"].targets])


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(0, 6), st.integers(1, 12)),
    dtype=st.sampled_from([np.float32, np.float64, np.int32, np.int64]),
)
def test_columns_are_chosen_moved_and_summed(seed: int, shape: tuple[int, int], dtype: type) -> None:
    """`GeneMap.apply` is a matrix product for entries in any order, repeated ones and stored zeros; rows come out sorted, without zeros."""
    rng = np.random.default_rng(seed)
    cells, columns = shape
    indptr = np.concatenate(([0], np.cumsum(rng.integers(0, 2 * columns, cells))))
    entries = rng.integers(0, 4, indptr[-1]).astype(dtype), rng.integers(0, columns, indptr[-1], dtype=np.int32), indptr
    counts = sp.csr_matrix(entries, shape=(cells, columns))
    used = rng.permutation(columns)[: rng.integers(0, columns + 1)]
    genes = int(rng.integers(1, columns + 1))
    chosen = GeneMap(used, rng.integers(0, genes, len(used)), np.arange(genes, dtype=np.int32), columns)
    moves = np.zeros((columns, genes))
    moves[chosen.columns, chosen.targets] = 1

    got = chosen.apply(counts)

    assert got.dtype == dtype
    np.testing.assert_array_equal(got.toarray(), counts.toarray() @ moves)
    assert (got.data != 0).all()
    assert all((np.diff(got.indices[a:b]) > 0).all() for a, b in zip(got.indptr[:-1], got.indptr[1:], strict=True))
