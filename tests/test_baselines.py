"""The plain baselines and the data that ship with scanpy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cellfm_hub as cf
from cellfm_hub.demo import neighbour_scores
from cellfm_hub.sequences import reverse_complement


def test_pbmc700_holds_counts() -> None:
    """Log-normalising the recovered counts gives scanpy's values back."""
    import warnings

    import scanpy as sc

    adata = cf.datasets.pbmc700()
    assert adata.shape == (700, 765)
    assert (adata.X.data == np.rint(adata.X.data)).all()
    assert adata.X.data.min() == 1
    assert adata.obs["cell_type"].nunique() == 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = sc.datasets.pbmc68k_reduced().raw.X.toarray()
    counts = adata.X.toarray()
    # The values are log1p(k * s) with one s per cell: the same s fits every gene.
    with np.errstate(invalid="ignore"):
        scale = np.where(counts > 0, np.expm1(raw) / counts, np.nan)
    spread = np.nanmax(scale, axis=1) / np.nanmin(scale, axis=1)
    assert spread.max() < 1.01  # the file is rounded to three decimals


def test_pca_finds_cell_types() -> None:
    adata = cf.datasets.pbmc700()
    cf.embed(adata, "pca")
    first = adata.obsm["X_pca"]
    assert neighbour_scores(first, adata.obs["cell_type"].to_numpy())[0] > 0.75
    cf.embed(adata, "pca")
    np.testing.assert_array_equal(first, adata.obsm["X_pca"])


def test_pca_asks_for_what_is_possible() -> None:
    adata = cf.datasets.pbmc700()[:20].copy()
    with pytest.raises(cf.errors.InputError, match=r"n_components=50.*'n_components': 19"):
        cf.embed(adata, "pca")


def test_hvg_is_a_choice_of_columns() -> None:
    adata = cf.datasets.pbmc700()
    vectors = cf.load("hvg", options={"n_top_genes": 30}).encode(adata)
    assert vectors.shape == (700, 30)
    total = adata.X.sum(axis=1)
    logged = np.log1p(adata.X.multiply(1e4 / total).toarray())
    columns = {tuple(column.round(3)) for column in logged.T}
    assert all(tuple(column.round(3)) in columns for column in vectors.T)


@given(sequences=st.lists(st.text("ACGTN", min_size=1, max_size=40), min_size=1, max_size=6), k=st.integers(1, 3))
def test_kmer_counts(sequences: list[str], k: int) -> None:
    """Equal to counting by hand."""
    kmers = ["".join(letters) for letters in itertools.product("ACGT", repeat=k)]
    vectors = cf.load("kmer", options={"k": k}).encode(sequences)
    for sequence, vector in zip(sequences, vectors, strict=True):
        windows = [sequence[i : i + k] for i in range(len(sequence) - k + 1)]
        counts = np.array([windows.count(kmer) for kmer in kmers], dtype=float)
        if counts.sum():
            np.testing.assert_allclose(vector, counts / counts.sum(), rtol=1e-6)
        else:
            assert np.isnan(vector).all()


def test_kmer_strands() -> None:
    model = cf.load("kmer", options={"k": 3})
    sequence = "GATTACAGATTACACCCGT"
    both = model.encode([sequence], reverse_complement="mean")
    np.testing.assert_allclose(both, model.encode([reverse_complement(sequence)], reverse_complement="mean"))
    np.testing.assert_allclose(both, (model.encode([sequence]) + model.encode([reverse_complement(sequence)])) / 2)
