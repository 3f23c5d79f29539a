"""A vector depends on its own row and on nothing else."""

from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cellfm_hub as cf
from cellfm_hub.engine.plan import MAX_ROWS, plan_batches
from golden_cases import PORTABLE

GENEFORMER = PORTABLE / "geneformer-v2-basic"
NT = PORTABLE / "nt-v2-basic"


@cache
def geneformer() -> cf.Embedder:
    return cf.load("geneformer", checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32")


@cache
def nucleotide_transformer() -> cf.Embedder:
    return cf.load("nt", checkpoint=NT / "checkpoint", device="cpu", precision="float32")


@cache
def cells() -> ad.AnnData:
    return ad.read_h5ad(GENEFORMER / "input.h5ad")


@cache
def cell_vectors() -> np.ndarray:
    return geneformer().encode(cells())


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.integers(0, 12), min_size=1, max_size=20), batch_tokens=st.integers(1, 2000))
def test_any_batch_of_cells(rows: list[int], batch_tokens: int) -> None:
    """Any selection of cells, repeated or not, in any order, under any token budget."""
    chosen = ad.AnnData(cells().X[rows], var=cells().var)
    got = geneformer().encode(chosen, batch_tokens=batch_tokens)
    np.testing.assert_allclose(got, cell_vectors()[rows], atol=2e-6, rtol=0)


DNA = st.text("ACGTN", min_size=1, max_size=60)


@settings(deadline=None, max_examples=30)
@given(sequences=st.lists(DNA, min_size=1, max_size=12), batch_tokens=st.integers(1, 300))
def test_any_batch_of_sequences(sequences: list[str], batch_tokens: int) -> None:
    model = nucleotide_transformer()
    got = model.encode(sequences, batch_tokens=batch_tokens)
    alone = np.concatenate([model.encode([sequence]) for sequence in sequences])
    np.testing.assert_allclose(got, alone, atol=2e-6, rtol=0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_genes_in_any_order_and_company(seed: int) -> None:
    """Shuffled columns, foreign genes and empty genes change no vector, where no two genes of a cell tie."""
    rng = np.random.default_rng(seed)
    adata, tokenizer = cells(), geneformer().adapter.tokenizer  # type: ignore[attr-defined]
    medians = tokenizer.dictionaries.medians
    genes = [gene for gene in adata.var["ensembl_id"] if gene in tokenizer.dictionaries.tokens]
    genes = list({medians[gene]: gene for gene in genes}.values())  # one gene of each median
    counts = rng.integers(0, 50, (6, len(genes)))
    plain = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), var={"ensembl_id": genes})
    values = counts / np.array([medians[gene] for gene in genes])
    assume(all(len(np.unique(row[row > 0])) == (row > 0).sum() for row in values))

    company = [
        "FOREIGN1",
        "FOREIGN2",
        next(gene for gene in tokenizer.dictionaries.tokens if gene.startswith("ENSG") and gene not in genes),
    ]
    added = np.array([[3, 5, 0]] * 6)  # two foreign genes, and a known one that no cell expresses
    order = rng.permutation(len(genes) + 3)
    mixed = np.hstack([counts, added])[:, order]
    more = ad.AnnData(sp.csr_matrix(mixed.astype(np.float32)), var={"ensembl_id": [(genes + company)[i] for i in order]})
    model = geneformer()
    np.testing.assert_array_equal(model.tokenize(plain).ids, model.tokenize(more).ids)
    np.testing.assert_array_equal(model.encode(plain), model.encode(more))


@pytest.mark.parametrize("kind", ["dense", "csr", "csc"])
def test_files_equal_memory(kind: str, tmp_path: Path) -> None:
    """A file, a backed object and an object in memory give the same vectors, however the matrix is stored."""
    adata = cells().copy()
    adata.X = {"dense": lambda x: x.toarray(), "csr": sp.csr_matrix, "csc": sp.csc_matrix}[kind](adata.X)
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    model = geneformer()
    np.testing.assert_array_equal(model.encode(path), cell_vectors())
    np.testing.assert_array_equal(model.encode(str(path)), cell_vectors())
    backed = ad.read_h5ad(path, backed="r")
    np.testing.assert_array_equal(model.encode(backed), cell_vectors())
    backed.file.close()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of cells read at a time changes no vector."""
    from cellfm_hub.sources import cells as source

    monkeypatch.setattr(source.count_blocks, "__defaults__", (3,))
    np.testing.assert_allclose(geneformer().encode(cells()), cell_vectors(), atol=2e-6, rtol=0)


@given(lengths=hnp.arrays(np.int64, st.integers(0, 200), elements=st.integers(0, 500)), batch_tokens=st.integers(1, 2000))
def test_plan(lengths: np.ndarray, batch_tokens: int) -> None:
    """Every row with tokens is in exactly one batch; none is over the budget unless it is a single row; longest first."""
    batches = plan_batches(lengths, batch_tokens)
    rows = np.concatenate(batches) if batches else np.empty(0, np.int64)
    assert sorted(rows.tolist()) == np.flatnonzero(lengths).tolist()
    for batch in batches:
        assert len(batch) == 1 or lengths[batch].sum() <= batch_tokens
        assert 1 <= len(batch) <= MAX_ROWS
    assert (np.diff(lengths[rows]) <= 0).all()


NEAR_AND_FAR = st.one_of(
    st.sampled_from([0.5, 1 / 3, 2 / 3, 1.0, 1 + 1e-12, 7.0]),
    st.sampled_from([1e-300, 2e-300, 1e-40, 3e38, 4e38, 1e300]),  # too small or too large for float32
    st.floats(1, 1 + 1e-4),
)


@settings(deadline=None)  # the first call compiles
@given(rows=st.lists(hnp.arrays(np.float64, st.integers(0, 40), elements=NEAR_AND_FAR)))
def test_ranks(rows: list[np.ndarray]) -> None:
    """The radix sort is a stable descending argsort in float64."""
    from cellfm_hub.kernels import argsort_rows_descending
    from cellfm_hub.tokens import offsets_from_lengths

    offsets = offsets_from_lengths([len(row) for row in rows])
    values = np.concatenate(rows) if rows else np.empty(0)
    expected = [start + np.argsort(-row, kind="stable") for start, row in zip(offsets[:-1], rows, strict=True)]
    got = argsort_rows_descending(values, offsets)
    np.testing.assert_array_equal(got, np.concatenate(expected) if expected else np.empty(0, np.int64))
