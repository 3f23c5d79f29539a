"""Which matrix is taken for raw counts, what is refused, and counts that are recovered from normalised values."""

import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cellfm_hub as cf
from cellfm_adapters.scgpt.tokenizer import bin_rows
from cellfm_hub.errors import CountsError, InputError
from cellfm_hub.kernels import argsort_rows_descending
from cellfm_hub.sources.cells import Matrix, count_blocks, find_counts, from_anndata
from cellfm_hub.sources.recovery import Scaling, recognise
from cellfm_hub.sources.rounded import RoundedScaling, recognise_gaps, recognise_totals
from golden_cases import PORTABLE, SHARED

GENEFORMER = PORTABLE / "geneformer-v2-basic"
SETS = sorted((SHARED / "data/scrna").glob("*/*.h5ad"))


def counts(cells: int = 60, genes: int = 80, seed: int = 0) -> sp.csr_matrix:
    """Counts of cells of different depth, as real ones are: mostly 0, then 1, and a few large."""
    rng = np.random.default_rng(seed)
    depth = rng.lognormal(0, 0.5, (cells, 1))
    return sp.csr_matrix(rng.poisson(depth * rng.gamma(0.3, 3, (1, genes))).astype(np.float32))


def adata(x: Any = None, **layers: Any) -> ad.AnnData:
    x = counts() if x is None else x
    return ad.AnnData(x, layers=layers)


def take(data: ad.AnnData, layer: str | None = None) -> tuple[Matrix, sp.csr_matrix]:
    """Return the matrix that is chosen and all its counts."""
    cells = from_anndata(data)
    matrix = find_counts(cells, layer)
    return matrix, sp.csr_matrix(sp.vstack([block.counts for block in count_blocks(cells, matrix)]))


def chosen(data: ad.AnnData, layer: str | None = None) -> str:
    return take(data, layer)[0].name


def log_normalised(x: sp.csr_matrix, target: float | None = 1e4, dtype: Any = np.float32, **options: Any) -> sp.csr_matrix:
    """What scanpy makes of counts."""
    data = ad.AnnData(sp.csr_matrix(x, dtype=dtype, copy=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some cells have zero counts")
        sc.pp.normalize_total(data, target_sum=target, **options)
    sc.pp.log1p(data)
    return data.X


def same(a: sp.csr_matrix, b: sp.csr_matrix) -> bool:
    return a.shape == b.shape and (sp.csr_matrix(a, dtype=np.float64) != sp.csr_matrix(b, dtype=np.float64)).nnz == 0


def refusal(data: ad.AnnData, layer: str | None = None) -> str:
    with pytest.raises(CountsError) as caught:
        take(data, layer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The order


def test_order() -> None:
    x, logs = counts(), log_normalised(counts())
    other = sp.csr_matrix(x * 2)
    data = adata(logs, counts=x, soup=other)
    data.raw = adata(other)
    assert chosen(data) == "layers['counts']"
    del data.layers["counts"]
    assert chosen(data) == "layers['soup']"
    data.layers["raw_counts"] = x
    assert chosen(data) == "layers['raw_counts']"  # a usual name for counts goes before others
    del data.layers["soup"], data.layers["raw_counts"]
    assert chosen(data) == "raw.X"
    data.raw = None
    data.X = x
    assert chosen(data) == "X"


def test_order_does_not_depend_on_the_order_of_layers() -> None:
    one, two = counts(), counts(seed=1)
    logs = log_normalised(one)
    assert chosen(adata(logs, b=one, a=two)) == chosen(adata(logs, a=two, b=one)) == "layers['a']"


def test_raw_with_more_genes() -> None:
    data = adata(log_normalised(counts()))
    data.raw = adata()
    data = data[:, :10].copy()
    matrix, x = take(data)
    assert matrix.name == "raw.X"
    assert x.shape == (60, 80)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array], ids=lambda kind: kind.__name__)
def test_kinds_of_matrices(kind: Any, dtype: str) -> None:
    if dtype == "float16" and kind is not np.asarray:
        pytest.skip("scipy has no sparse matrices of float16")
    x = counts().toarray()
    matrix, got = take(adata(log_normalised(counts()), counts=kind(x.astype(dtype))))
    assert matrix.name == "layers['counts']"
    assert same(got, sp.csr_matrix(x))
    assert got.dtype.itemsize >= 4  # so that genes can be added up


def test_sums_do_not_overflow() -> None:
    """Columns of one gene in a narrow dtype are added in a wide one."""
    wide = ad.read_h5ad(GENEFORMER / "input.h5ad")
    dense = np.minimum(wide.X.toarray(), 120)
    twice = [ad.AnnData(np.hstack([dense, dense]).astype(dtype)) for dtype in (np.int8, np.float64)]
    model = cf.load("geneformer", checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32")
    for data in twice:
        # The second copy of each gene in lower case: another spelling of the same gene is summed.
        ids = wide.var["ensembl_id"].astype(str).tolist()
        data.var["ensembl_id"] = ids + [name.lower() for name in ids]
    np.testing.assert_array_equal(model.tokenize(twice[0]).ids, model.tokenize(twice[1]).ids)


def test_stored_zeros_and_repeated_entries() -> None:
    x = sp.csr_matrix(counts())
    zeros = x.copy()
    zeros.data[::3] = 0
    assert same(take(adata(zeros))[1], sp.csr_matrix(zeros.toarray()))
    split = sp.csr_matrix((np.array([1.0, 2.0, 4.0]), np.array([5, 5, 1]), np.array([0, 3, *[3] * 59])), shape=x.shape)
    assert take(adata(split))[1].toarray()[0, [1, 5]].tolist() == [4, 3]
    # Halves that stand for a whole number
    split.data[:2] = 0.5
    assert take(adata(split))[1].toarray()[0, 5] == 1


def test_truth_values_are_counted_with_a_warning() -> None:
    matrix, x = take(adata(counts().toarray() > 0))
    assert x.dtype == np.int32
    assert "zeros and ones" in matrix.notes[0]


def test_layer_is_obeyed() -> None:
    x = counts()
    data = adata(x, counts=x, spliced=x, ranks=sp.csr_matrix(x > 0, dtype=np.float32))
    data.raw = data
    for layer, name in (("X", "X"), ("raw", "raw.X"), ("spliced", "layers['spliced']"), ("layers['counts']", "layers['counts']")):
        assert chosen(data, layer) == name
    matrix, _ = take(data, "ranks")
    assert matrix.name == "layers['ranks']"
    assert len(matrix.notes) == 1
    with pytest.raises(InputError, match=r"layer='nope' is not in the AnnData object; it has X, layers\['counts'\]"):
        take(data, "nope")
    data.layers["raw"] = sp.csr_matrix(x * 2)
    assert chosen(data, "raw") == "layers['raw']"


# Traps


@pytest.mark.parametrize("name", ["spliced", "unspliced", "ambiguous", "spanning", "Spliced_counts", "nascent", "mature", "U", "exon"])
def test_parts_of_counts_are_not_taken(name: str) -> None:
    x = counts()
    assert chosen(adata(x, **{name: x})) == "X"
    data = adata(log_normalised(x) * 1.1 - 0.01 * sp.csr_matrix(x > 0), **{name: x})
    assert f"layers['{name}'] is a part of the counts" in refusal(data)
    assert chosen(data, name) == f"layers['{name}']"


def test_matrix_of_velocyto() -> None:
    x = counts()
    assert chosen(adata(x, matrix=x * 2, spliced=x)) == "X"
    assert chosen(adata(log_normalised(x), matrix=x)) == "layers['matrix']"


def test_zeros_do_not_shadow_counts() -> None:
    x = counts()
    assert chosen(adata(x, counts=sp.csr_matrix(x.shape))) == "X"
    # Nor do they pass for empty cells where another matrix shows that there is more.
    data = adata(x * 0, scaled=x.toarray() - 0.5)
    assert "X holds only zeros" in refusal(data)
    assert chosen(adata(x * 0)) == "X"


@pytest.mark.parametrize("name", ["X_binned", "binary", "rank", "expression_bins", "scaled", "log1p"])
def test_names_that_say_something_else(name: str) -> None:
    x = counts()
    assert chosen(adata(x, **{name: x})) == "X"


def test_what_looks_like_something_else() -> None:
    """Odd whole numbers are taken only from the usual places, with a warning, and only for want of better ones."""
    x = counts()
    dense = x.toarray()
    ranks = sp.csr_matrix(np.where(dense > 0, np.argsort(np.argsort(dense, axis=1, kind="stable"), axis=1) + 1, 0)).astype(np.float32)
    bins = x.copy()
    bins.data = np.random.default_rng(0).integers(1, 49, x.nnz).astype(np.float32)
    bins.data[x.indptr[:-1]] = 50
    for odd, said in (
        (sp.csr_matrix(x > 0, dtype=np.float32), "zeros and ones"),
        (bins, "same maximum (50) in every cell"),
        (ranks, "as ranks do"),
    ):
        assert chosen(adata(x, odd=odd)) == "X"
        scaled = adata(dense - 0.5, odd=odd)
        assert said in refusal(scaled)
        matrix, _ = take(adata(odd))
        assert said in matrix.notes[0]
        assert "layer=" in matrix.notes[0]


def test_downsampled_counts_are_counts() -> None:
    """Equal totals to the last count are made by drawing counts, not by scaling."""
    data = adata(counts().toarray() + 1)
    sc.pp.downsample_counts(data, counts_per_cell=50, random_state=0)
    assert take(data)[0].notes == ()


def test_rivals_are_named() -> None:
    """Two matrices of whole numbers that differ: the first is taken, and the user told."""
    x = counts()
    matrix, _ = take(adata(x, corrected=sp.csr_matrix(np.maximum(x.toarray() - 1, 0))))
    assert matrix.name == "layers['corrected']"
    assert "X holds whole numbers too" in matrix.notes[0]
    assert take(adata(x, corrected=x))[0].notes == ()
    assert take(adata(x, counts=sp.csr_matrix(x * 2)))[0].notes == ()


def test_every_matrix_is_named_in_the_refusal() -> None:
    x = counts()
    data = adata(x.toarray() - 0.5, scaled=x.toarray() / 7 + 0.01, spliced=x)
    data.raw = adata(np.where(x.toarray() > 0, np.nan, 0))
    said = refusal(data)
    for part in (
        "X holds negative values",
        "layers['scaled'] holds values that are not whole",
        "raw.X holds NaN",
        "layers['spliced'] is a part",
    ):
        assert part in said


def test_dask_and_masked_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read by rows is refused in one line, and only if it is needed."""

    class Lazy(np.lib.mixins.NDArrayOperatorsMixin):
        shape, dtype = (60, 80), np.dtype("f4")

    data = adata()
    monkeypatch.setattr(ad.AnnData, "X", Lazy())
    with pytest.raises(InputError, match="Lazy; expected a numpy array or a scipy sparse matrix"):
        take(data)
    data.layers["counts"] = counts()
    assert chosen(data) == "layers['counts']"
    monkeypatch.setattr(ad.AnnData, "X", np.ma.masked_array(counts().toarray(), counts().toarray() > 3))
    with pytest.raises(InputError, match="MaskedArray"):
        take(data, "X")


def test_views() -> None:
    data = adata()
    assert same(take(data[5:20, ::2])[1], data.X[5:20, ::2])


def test_the_sample_is_spread() -> None:
    """A matrix whose first cells are empty, or whole by accident, is judged by the others."""
    x = counts(2000, 20)
    logs = log_normalised(x)
    empty = sp.csr_matrix(sp.vstack([sp.csr_matrix((1200, 20), dtype=np.float32), x[1200:]]))
    assert chosen(adata(x, counts=empty)) == "layers['counts']"
    mixed = sp.csr_matrix(sp.vstack([x[:1200], logs[1200:] * 1.1]))
    assert "not whole numbers" in refusal(adata(mixed))


# Recovery


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", [1e4, 1e6, None])
def test_recovery(target: float | None, dtype: Any) -> None:
    x = counts(200, 300)
    matrix, got = take(adata(log_normalised(x, target, dtype)))
    assert same(got, x)
    said = f"{np.median(np.asarray(x.sum(1))):.6g}" if target is None else f"{target:.6g}"
    assert matrix.facts == {"counts_recovered": f"log1p of counts normalised to {said} per cell"}
    assert len(matrix.notes) == 1
    assert "recovered from X" in matrix.notes[0]


@pytest.mark.parametrize("path", SETS, ids=[path.stem for path in SETS])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", [1e4, 1e6, None])
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_recovery_of_real_sets(path: Path, target: float | None, dtype: Any) -> None:
    x = ad.read_h5ad(path).X
    got = take(adata(log_normalised(x, target, dtype)))[1]
    # What no arithmetic can give back is a factor that all counts of a cell have in common: one cell of 10,000 of one set holds a single 2.
    factors = [np.gcd.reduce(row.astype(np.int64)) if len(row) else 1 for row in np.split(x.data, x.indptr[1:-1])]
    lost = np.maximum(factors, 1)
    assert (lost > 1).sum() == (path.parent.name == "mouse_neurons_10k")
    assert same(got, sp.diags(1 / lost) @ x)


def test_recovery_with_highly_expressed_genes_left_out() -> None:
    x = counts(200, 300)
    matrix, got = take(adata(log_normalised(x, 1e4, exclude_highly_expressed=True)))
    assert same(got, x)
    assert "unknown total" in str(matrix.facts["counts_recovered"])


def test_recovery_of_some_genes() -> None:
    """After a selection of genes totals differ; and the smallest count of a cell may be larger than 1."""
    x = counts(200, 300)
    some = np.argsort(-np.asarray(x.sum(0)).ravel())[::3][:60]
    _, got = take(adata(log_normalised(x)[:, some]))
    part = sp.csr_matrix(x[:, some])
    factors = [max(1, np.gcd.reduce(row.astype(np.int64), initial=0)) for row in np.split(part.data, part.indptr[1:-1])]
    assert same(got, sp.diags(1 / np.array(factors)) @ part)


def test_recovery_of_normalised_values() -> None:
    x = counts(200, 300)
    data = adata(x.copy())
    sc.pp.normalize_total(data, target_sum=1e4)
    matrix, got = take(data)
    assert same(got, x)
    assert matrix.facts == {"counts_recovered": "counts normalised to 10000 per cell"}


def test_recovery_from_rounded_values() -> None:
    x = counts(200, 300)
    logs = log_normalised(x, 1e3, np.float64)
    logs.data = np.round(logs.data, 4)
    assert same(take(adata(logs))[1], x)


def test_recovery_from_scanpys_blood_cells() -> None:
    data = sc.datasets.pbmc68k_reduced()
    matrix, got = take(data)
    assert matrix.name == "raw.X"
    expected = cf.datasets.pbmc700()
    assert same(got, expected.X)
    assert list(matrix.var.index) == list(expected.var_names)


def test_recovery_from_logarithms_of_counts() -> None:
    """Without any normalisation."""
    x = counts(200, 300)
    matrix, got = take(adata(sp.csr_matrix(np.log1p(x))))
    assert same(got, x)
    assert matrix.facts == {"counts_recovered": "log1p of counts, not normalised"}


def test_files_joined_from_raw_and_normalised_cells() -> None:
    x = counts(100, 60)
    both = sp.csr_matrix(sp.vstack([x[:50], log_normalised(x)[50:]]))
    assert "cannot be recovered" in refusal(adata(both))


def test_counts_go_before_recovery() -> None:
    x = counts()
    data = adata(x, logs=log_normalised(x))
    assert chosen(data) == "X"
    assert take(data)[0].facts == {}


def test_recovery_from_a_named_layer() -> None:
    x = counts()
    matrix, got = take(adata(counts(seed=1), logs=log_normalised(x)), "logs")
    assert matrix.name == "layers['logs']"
    assert same(got, x)


@st.composite
def rows_of_counts(draw: Any) -> np.ndarray:
    """Cells with any counts up to 10,000 without a common factor, as long as one of them is small."""
    x = draw(
        hnp.arrays(np.int64, (draw(st.integers(2, 12)), 8), elements=st.one_of(st.just(0), st.integers(0, 30), st.integers(0, 10_000)))
    )
    factors = np.gcd.reduce(x, axis=1)
    return x // np.maximum(factors, 1)[:, None]


@given(x=rows_of_counts(), target=st.sampled_from([1e3, 1e4, 1e6]), dtype=st.sampled_from([np.float32, np.float64]))
@settings(max_examples=200, deadline=None)
def test_recovered_or_refused(x: np.ndarray, target: float, dtype: Any) -> None:
    """Whatever the counts: they come back to the last one, or are refused."""
    logs = np.log1p((x / np.maximum(x.sum(1, keepdims=True), 1) * target).astype(dtype))
    try:
        _, got = take(adata(logs))
    except CountsError:
        return
    if (logs == np.rint(logs)).all():
        return
    np.testing.assert_array_equal(got.toarray(), x)


@pytest.mark.filterwarnings("ignore:.*faster on contiguous arrays")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "change",
    [
        *("scale", "scale without centre", "combat", "regress_out", "clipped combat", "log CPM + 0.5", "log2 CPM + 0.5"),
        *("log1p of CPM + 1", "log1p of nonzero CPM + 1", "log2 CPM + 1", "log10 CPM + 1", "CPM of fractions", "rounded CPM"),
        *("smoothed", "sqrt", "one value off"),
    ],
)
def test_refused(change: str) -> None:
    x = counts(200, 300)
    data = adata(log_normalised(x))
    data.obs["batch"] = pd.Categorical(np.where(np.arange(200) < 100, "a", "b"))
    data.obs["depth"] = np.asarray(x.sum(1)).ravel()
    cpm = x.toarray() / np.maximum(x.toarray().sum(1, keepdims=True), 1) * 1e6
    nonzero = sp.csr_matrix(cpm)
    nonzero.data = np.log1p(nonzero.data + 1)
    off = log_normalised(x)
    off.data[100] *= 1.001
    smooth = sp.csr_matrix(np.kron(np.eye(100), np.full((2, 2), 0.5)) @ data.X.toarray())
    if change == "scale":
        sc.pp.scale(data)
    elif change == "scale without centre":
        sc.pp.scale(data, zero_center=False)
    elif change in ("combat", "clipped combat"):
        sc.pp.combat(data, "batch")
        if change == "clipped combat":
            data.X = np.maximum(data.X, 0)
    elif change == "regress_out":
        sc.pp.regress_out(data, ["depth"])
    else:
        fractions = x.toarray() * np.random.default_rng(0).uniform(0.5, 1, x.shape)
        data.X = {
            "log CPM + 0.5": np.log(cpm + 0.5),
            "log2 CPM + 0.5": np.log2(cpm + 0.5),
            "log1p of CPM + 1": np.log1p(cpm + 1),
            "log1p of nonzero CPM + 1": nonzero,
            "log2 CPM + 1": np.log2(cpm + 1),
            "log10 CPM + 1": np.log10(cpm + 1),
            "CPM of fractions": np.log1p(fractions / fractions.sum(1, keepdims=True) * 1e6),
            "rounded CPM": np.log1p(np.rint(cpm)),
            "smoothed": smooth,
            "sqrt": np.sqrt(cpm),
            "one value off": off,
        }[change]
    said = refusal(data)
    if change in ("log2 CPM + 1", "log10 CPM + 1"):
        assert f"to the base {change[3:].split()[0]}" in said
    if change == "one value off":
        assert data.obs_names[np.searchsorted(off.indptr, 100, side="right") - 1] in said


def test_a_cell_that_cannot_be_recovered_is_named() -> None:
    """Behind the sample, every cell is still verified."""
    x = counts(6000, 30)
    logs = log_normalised(x)
    logs.data[logs.indptr[1000] : logs.indptr[1001]] *= np.linspace(1, 2, logs.indptr[1001] - logs.indptr[1000])
    data = adata(logs)
    said = refusal(data)
    assert "cell '1000'" in said
    assert "cannot be recovered" in said


def test_counts_that_float32_cannot_tell_apart() -> None:
    x = counts(50, 30).toarray()
    x[:, 0] = np.arange(50) + 5_000_000
    said = refusal(adata(log_normalised(sp.csr_matrix(x))))
    assert "cannot be told apart" in said
    assert same(take(adata(log_normalised(sp.csr_matrix(x), dtype=np.float64)))[1], sp.csr_matrix(x))


def test_too_little_to_tell() -> None:
    """All values of each cell equal: any counts would do."""
    x = sp.csr_matrix(counts() > 0, dtype=np.float32)
    assert "too few different values" in refusal(adata(log_normalised(x)))


def test_receipt_and_log(caplog: pytest.LogCaptureFixture) -> None:
    """The vectors are those of the counts; receipt and log say where they came from."""
    data = ad.read_h5ad(GENEFORMER / "input.h5ad")
    model = cf.load("geneformer", checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32")
    expected = model.encode(data)
    assert model.receipt is not None
    assert "counts_recovered" not in model.receipt
    sums = np.asarray(data.X.sum(1)).ravel()
    data.X = sp.csr_matrix(sp.diags(1e4 / np.maximum(sums, 1)) @ data.X)
    data.X.data = np.log1p(data.X.data)
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        np.testing.assert_array_equal(model.encode(data), expected)
    assert caplog.text.count("recovered from X, which holds log1p of counts normalised to 10000 per cell") == 1
    assert model.receipt["counts_from"] == "X"
    assert model.receipt["counts_recovered"] == "log1p of counts normalised to 10000 per cell"


def test_recovery_is_by_blocks(tmp_path: Path) -> None:
    """On disk too, in every way of storing."""
    x = counts(3000, 40)
    logs = log_normalised(x)
    for kind in (sp.csr_matrix, sp.csc_matrix, lambda m: m.toarray()):
        path = tmp_path / "cells.h5ad"
        ad.AnnData(kind(logs)).write_h5ad(path)
        backed = ad.read_h5ad(path, backed="r")
        assert same(take(backed)[1], x)
        backed.file.close()


def test_a_chance_fit_is_not_taken() -> None:
    """Two values of 1.00 and 1.50, rounded, are counts of 2 and 3 with a scale that fits one time in ten by chance: not enough."""
    values = sp.csr_matrix(np.array([[1.0, 0.0, 2.0], [1.0, 1.5, 0.0]]))
    scaling = Scaling("normalised", 2.0**-23, decimals=0.005)
    counts, row, reason = scaling.recover(values)
    assert (row, reason) == (1, "its values are not whole multiples of one number")
    np.testing.assert_array_equal(counts[[0]].toarray(), [[1, 0, 2]])
    # In full precision the same two are no chance.
    counts, row, _ = Scaling("normalised", 2.0**-47).recover(values)
    assert row == -1
    np.testing.assert_array_equal(counts.toarray(), [[1, 0, 2], [2, 3, 0]])


# Normalised values that were rounded

ROUNDED: dict[str, Any] = {
    "round": np.rint,
    "astype(int)": lambda values: values.astype(np.int64).astype(values.dtype),
    "log1p, round": lambda values: np.rint(np.log1p(values)),
}


def normalised(x: sp.csr_matrix, target: float | None, change: str) -> sp.csr_matrix:
    data = ad.AnnData(sp.csr_matrix(x, dtype=np.float32, copy=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some cells have zero counts")
        sc.pp.normalize_total(data, target_sum=target)
    data.X.data = ROUNDED[change](data.X.data)
    return data.X


def without_common_factors(x: sp.csr_matrix) -> sp.csr_matrix:
    """What no arithmetic can give back is a factor that all counts of a cell have in common."""
    factors = [max(1, np.gcd.reduce(row.astype(np.int64), initial=0)) for row in np.split(x.data, x.indptr[1:-1])]
    return sp.csr_matrix(sp.diags(1 / np.array(factors)) @ x)


def real(path: Path, cells: int = 250) -> sp.csr_matrix:
    x = ad.read_h5ad(path).X
    return sp.csr_matrix(x[:: max(1, x.shape[0] // cells)][:cells], dtype=np.float32)


@pytest.mark.parametrize("path", SETS, ids=[path.stem for path in SETS])
@pytest.mark.parametrize("change", ROUNDED)
@pytest.mark.parametrize("target", [1e4, 1e6, None])
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_rounded_values_never_pass_in_silence(path: Path, change: str, target: float | None) -> None:
    """Counts that were not scaled down come back to the last one; else the values are refused, or it is said that they look odd."""
    x = real(path)
    totals = np.asarray(x.sum(1)).ravel()
    goal = float(np.median(totals[totals > 0])) if target is None else target
    if target is None and change == "astype(int)" and ((totals > goal / 2).mean() >= 0.9 or x.max() < 50):
        pytest.skip("at most one cell in ten is scaled by more than 2, or cells hold too few different counts: nothing shows")
    data = adata(normalised(x, target, change))
    recoverable = change != "log1p, round" and totals.max() < goal / 2
    if not recoverable:
        try:
            take(data)
        except CountsError:
            assert re.search("rounded|regular gaps", refusal(data))
            return
    matrix, got = take(data)
    if "counts_recovered" in matrix.facts:
        assert same(got, without_common_factors(x))
        assert matrix.facts == {"counts_recovered": f"counts normalised to {target:.6g} per cell and rounded"}
    else:
        # Nearly all cells were scaled down, or hold a few counts each.
        assert (totals > goal / 2).mean() > 0.75
        assert "rounded normalised values have" in matrix.notes[0]
        assert matrix.facts["counts_doubt"] in matrix.notes[0]


@pytest.mark.parametrize("path", SETS, ids=[path.stem for path in SETS])
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_real_counts_are_not_refused(path: Path) -> None:
    """Counts as they are, multiplied, of few cells, added up, drawn, amplified, corrected and rounded: nothing of it is normalised."""
    rng = np.random.default_rng(0)
    x = real(path)
    totals = np.asarray(x.sum(1)).ravel()
    groups = sp.csr_matrix(rng.multinomial(1, np.full(30, 1 / 30), x.shape[0]).T)
    drawn = adata(x.copy())
    sc.pp.downsample_counts(drawn, counts_per_cell=int(np.percentile(totals, 30)) + 1, random_state=0)

    def changed(values: np.ndarray) -> sp.csr_matrix:
        return sp.csr_matrix((values.astype(np.float32), x.indices, x.indptr), shape=x.shape)

    quiet = {
        "as they are": x,
        "doubled": x * 2,
        "tenfold": x * 10,
        "pseudo-bulk": sp.csr_matrix(groups @ x),
        "drawn to one depth": drawn.X,
        "thinned": changed(rng.binomial(x.data.astype(int), 0.3)),
        "reads": changed(rng.poisson(x.data * 40)),
        "reads of uneven amplification": changed(rng.poisson(x.data * rng.gamma(2, 20, x.nnz))),
        "corrected": changed(np.rint(x.data * rng.uniform(0.5, 1, x.nnz))),
        "expected counts of isoforms": changed(np.rint(x.data * 20 + rng.normal(0, 1, x.nnz)).clip(0)),
        "without single counts": changed(np.where(x.data > 1, x.data, 0)),
    }
    for name, matrix in quiet.items():
        assert take(adata(matrix))[0].notes == (), name
    # Of few cells it may be said that nothing can be told.
    for rows in ([3], [7], [11], range(3), range(8), range(19)):
        for times in (1, 2):
            assert same(take(adata(x[list(rows)] * times))[1], x[list(rows)] * times)
    few = sp.csr_matrix(groups[:3] @ x)
    assert same(take(adata(few))[1], few)
    share = np.minimum(1, np.percentile(totals, 5) / np.maximum(totals, 1))
    thinned = changed(rng.binomial(x.data.astype(int), np.repeat(share, np.diff(x.indptr))))
    assert same(take(adata(thinned))[1], thinned)


def test_rounded_values_in_few_cells(caplog: pytest.LogCaptureFixture) -> None:
    """Gaps prove it in a single cell; where cells show none, log, receipt and check say that it cannot be told."""
    x = counts(40, 3000)
    for cells in (1, 3):
        assert same(take(adata(normalised(x[:cells], 1e6, "round")))[1], without_common_factors(sp.csr_matrix(x[:cells])))
    data = ad.read_h5ad(GENEFORMER / "input.h5ad")[:1].copy()
    rng = np.random.default_rng(0)
    data.X = sp.csr_matrix(rng.multinomial(1000, rng.dirichlet(np.full(data.n_vars, 0.3)), 1), dtype=np.float32)
    model = cf.load("geneformer", checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32")
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        model.encode(data)
    said = "a total near 1000 in every cell"
    assert said in caplog.text
    assert model.receipt is not None
    assert said in model.receipt["counts_doubt"]
    report = cf.check(data, "geneformer", checkpoint=GENEFORMER / "checkpoint")
    assert any(said in reason for reason in report.models[0].reasons)


def test_rounded_values_are_taken_behind_counts_only() -> None:
    x = counts(200, 300)
    assert chosen(adata(normalised(x, 1e6, "round"), other=x)) == "layers['other']"
    assert chosen(adata(x, other=normalised(x, 1e6, "round"))) == "X"
    # Named by the user too, and in a layer whose name says what it is.
    assert same(take(adata(counts(200, 300, seed=1), norm=normalised(x, 1e6, "round")), "norm")[1], x)
    assert "rounded logarithms" in refusal(adata(normalised(counts(200, 3000), 1e4, "log1p, round")), "X")


def test_totals_alone_need_the_users_word() -> None:
    """All cells scaled down: nothing but the even totals shows it."""
    rng = np.random.default_rng(0)
    fractions = rng.dirichlet(np.full(500, 0.05), 300) * (rng.random((300, 500)) < rng.uniform(0.3, 0.9, (300, 1)))
    data = adata(sp.csr_matrix(np.rint(fractions / fractions.sum(1, keepdims=True) * 1e4), dtype=np.float32))
    assert "nearly the same total (9996" in refusal(data)
    assert "nearly the same total" in take(data, "X")[0].notes[0]


def test_a_rounded_cell_that_cannot_be_recovered_is_named() -> None:
    """Behind the sample every cell is still verified, and every part of a file is judged alike."""
    x = counts(6000, 30)
    values = normalised(x, 1e6, "round")
    cells = from_anndata(adata(values))
    matrix = find_counts(cells, None)
    part = sp.csr_matrix(sp.vstack([block.counts for block in count_blocks(cells, matrix, rows=range(2000, 2300))]))
    assert same(part, without_common_factors(sp.csr_matrix(x[2000:2300])))
    values.data[values.indptr[1000]] += 3
    said = refusal(adata(values))
    assert "cell '1000'" in said
    assert "cannot be recovered" in said
    values.data[values.indptr[1000]] -= 2.75
    assert "not whole numbers" in refusal(adata(values))


@given(x=rows_of_counts(), target=st.sampled_from([1e4, 1e5, 1e6]), change=st.sampled_from(["round", "astype(int)"]))
@settings(max_examples=200, deadline=None)
def test_rounded_values_are_recovered_or_refused(x: np.ndarray, target: float, change: str) -> None:
    """Whatever the counts, if the smallest of each cell is small: they come back to the last one, or the row is refused."""
    assume((np.where(x > 0, x, 10_000).min(axis=1) <= 20)[x.any(axis=1)].all())
    values = sp.csr_matrix(ROUNDED[change]((x / np.maximum(x.sum(1, keepdims=True), 1) * target).astype(np.float32)))
    counts, row, _ = RoundedScaling("nearest" if change == "round" else "down", target).recover(values)
    if row < 0:
        np.testing.assert_array_equal(counts.toarray(), x)


# Models that use only the order of values within a cell

SCGPT = PORTABLE / "scgpt-basic"

MAPS: dict[str, Any] = {
    "log2 of per million": lambda x: np.log2(x / np.maximum(x.sum(1, keepdims=True), 1) * 1e6 + 1),
    "square root": lambda x: np.sqrt(x / np.maximum(x.sum(1, keepdims=True), 1)),
    "arcsinh": lambda x: np.arcsinh(x / 5 + x**2),
}


def scgpt(**options: Any) -> cf.Embedder:
    return cf.load("scgpt", checkpoint=SCGPT / "checkpoint", device="cpu", precision="float32", options=options)


def many_cells() -> ad.AnnData:
    """Cells of the golden case with counts as in real cells, in columns with names of their own."""
    source = ad.read_h5ad(SCGPT / "input.h5ad")
    return ad.AnnData(counts(40, source.n_vars), var=source.var)


@pytest.mark.parametrize("change", MAPS)
def test_order_is_enough_for_scgpt(change: str, caplog: pytest.LogCaptureFixture) -> None:
    """Vectors from values that grow with the counts are those of the counts, to the bit, and one warning says what was taken."""
    data, model = many_cells(), scgpt(ties="upper")
    expected = model.encode(data)
    assert model.receipt is not None
    assert "counts_by_order" not in model.receipt
    data.X = sp.csr_matrix(MAPS[change](data.X.toarray()), dtype=np.float32)
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        np.testing.assert_array_equal(model.encode(data), expected)
    assert caplog.text.count("X is taken, for this model uses only the order") == 1
    assert model.receipt["counts_by_order"] is True
    assert "counts_used" not in model.receipt
    # Ties that are drawn depend on the counts, and other families on more than the order.
    for other in (scgpt(), cf.load("geneformer", checkpoint=GENEFORMER / "checkpoint", device="cpu"), cf.load("pca")):
        with pytest.raises(CountsError, match="not whole numbers"):
            other.encode(data)


def test_order_is_not_enough_for_a_sample() -> None:
    data = many_cells()
    data.X = sp.csr_matrix(np.sqrt(data.X.toarray()), dtype=np.float32)
    with pytest.raises(CountsError, match="has more genes than fit"):
        scgpt(ties="upper", max_length=40).encode(data)


def test_order_that_is_not_that_of_counts() -> None:
    """Scaled by gene, corrected, or with something added."""
    plain = many_cells()
    rng = np.random.default_rng(0)
    for values in (
        plain.X.toarray() * rng.random(plain.n_vars),
        np.log1p(plain.X.toarray() + 0.5),
        plain.X.toarray() - 0.5,
    ):
        with pytest.raises(CountsError):
            scgpt(ties="upper").encode(ad.AnnData(sp.csr_matrix(values), var=plain.var))


@given(
    rows=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=120), min_size=1, max_size=5),
    change=st.sampled_from([np.log1p, np.sqrt, np.arcsinh, lambda x: np.log2(x * 37.5 + 1), lambda x: x**1.5]),
)
@settings(max_examples=300, deadline=None)
def test_bins_of_scgpt_depend_on_order_only(rows: list[list[int]], change: Any) -> None:
    """Whatever the counts of a cell, with ties=upper."""
    values, offsets = np.concatenate(rows).astype(np.float64), np.cumsum([0, *map(len, rows)])
    changed = change(values).astype(np.float32).astype(np.float64)
    draws = np.zeros(len(values))
    plain, other = (bin_rows(v, argsort_rows_descending(v, offsets), offsets, draws) for v in (values, changed))
    np.testing.assert_array_equal(plain, other)


def test_edges_of_scgpt_never_pass_a_value() -> None:
    """Why the order is enough: where an edge falls on a value, rounding may put it below that value, but never above.

    The highest bin of a value counts the edges at or below it. Other edges lie between two values, a 49th of the way or more.
    """
    last, edge = np.arange(1, 61_000)[:, None], np.arange(50)  # a vocabulary has 60,697 tokens
    places, wanted = last * np.linspace(0, 1, 50), last * edge // 49
    exact = last * edge % 49 == 0
    assert (places[exact] <= wanted[exact]).all()
    assert (wanted[exact] - places[exact] < 1e-9).all()
    inside = places[~exact] % 1
    assert ((inside > 0.02) & (inside < 0.98)).all()


# Matrices with different genes


def named(x: sp.csr_matrix, first: int = 0) -> ad.AnnData:
    """Return cells whose genes are called ``g0``, ``g1``, … from some number on."""
    names = [f"g{first + i}" for i in range(x.shape[1])]
    return ad.AnnData(x, var=pd.DataFrame(index=names), obs=pd.DataFrame(index=[f"c{i}" for i in range(x.shape[0])]))


def test_raw_with_fewer_genes() -> None:
    """Where it holds the same counts, the matrix with more genes is taken, and what the other lacks is said."""
    data = named(counts())
    data.raw = data[:, ::2].copy()
    matrix, _ = take(data)
    assert matrix.name == "X"
    assert matrix.notes == ("X is taken for raw counts: raw.X holds the same, but lacks 40 (g1, g3, g5, …) of its genes",)
    assert matrix.facts["counts_choice"] == matrix.notes[0]
    assert chosen(data, "raw") == "raw.X"


def test_layer_with_fewer_genes_than_raw() -> None:
    """The other way round: a selection of genes in a layer, all of them in raw."""
    whole = named(counts())
    data = whole[:, :30].copy()
    data.layers["counts"] = data.X.copy()
    data.X = log_normalised(data.X)
    data.raw = whole
    matrix, values = take(data)
    assert matrix.name == "raw.X"
    assert values.shape[1] == 80
    assert "layers['counts'] holds the same, but lacks 50 (g30, g31, g32, …) of its genes" in matrix.notes[0]


def test_raw_with_all_genes_is_taken_as_before() -> None:
    """Of nothing that is lost nothing is said."""
    whole = named(counts())
    data = whole[:, :30].copy()
    data.raw = whole
    matrix, _ = take(data)
    assert (matrix.name, matrix.notes, dict(matrix.facts)) == ("raw.X", (), {})


@pytest.mark.parametrize("holds", ["other counts", "no raw counts", "the same counts"])
def test_raw_with_other_genes(holds: str) -> None:
    """Where the counts differ, or are none, or no genes are gained, the usual matrix is taken, and what it lacks is said."""
    both = counts(60, 120, 3)
    data = named(both[:, 20:], first=20)
    data.raw = named(both[:, :100])
    if holds == "other counts":
        data.X = data.X * 2
    elif holds == "no raw counts":
        data.X = log_normalised(data.X)
    matrix, _ = take(data)
    assert matrix.name == "raw.X"
    assert matrix.notes == (
        f"raw.X is taken for raw counts, but lacks 20 (g100, g101, g102, …) of the genes of X, which holds {holds}; choose with layer=",
    )


def test_names_that_stand_twice_are_not_compared() -> None:
    """And names of another kind tell nothing of what is lost."""
    data = named(counts())
    data.raw = data[:, ::2].copy()
    names = data.var_names.tolist()
    data.var_names = [*names[:-1], names[0]]
    assert chosen(data) == "X"
    data.var_names = [f"ENSG{i:011d}" for i in range(80)]
    matrix, _ = take(data)
    assert (matrix.name, matrix.notes) == ("raw.X", ())


def test_embed_and_check_say_which_genes_are_lacking(caplog: pytest.LogCaptureFixture) -> None:
    data = ad.read_h5ad(GENEFORMER / "input.h5ad")
    expected = data.copy()
    data.raw = data[:, ::2].copy()
    where: dict[str, Any] = {"checkpoint": GENEFORMER / "checkpoint"}
    model = cf.load("geneformer", device="cpu", precision="float32", **where)
    np.testing.assert_array_equal(model.encode(data), model.encode(expected))
    model.encode(data)
    assert model.receipt is not None
    assert "raw.X holds the same, but lacks 94" in str(model.receipt["counts_choice"])
    assert "raw.X holds the same, but lacks 94" in caplog.text
    assert any("raw.X holds the same, but lacks 94" in reason for reason in cf.check(data, "geneformer", **where).models[0].reasons)


@pytest.mark.parametrize("look", [recognise, recognise_gaps, recognise_totals])
@pytest.mark.parametrize("cells", [1, 20, 60])
def test_a_look_changes_nothing(look: Callable[[sp.csr_matrix], Any], cells: int) -> None:
    """Stored zeros are left out of a copy: the arrays of the matrix itself are as they were."""
    sample = counts(cells)
    sample.data[::3] = 0
    before = sample.copy()
    look(sample)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(sample, name), getattr(before, name))


def test_what_a_reader_said_is_kept() -> None:
    """A matrix whose counts are recovered, or doubted, was read by somebody who had something to say."""
    for data in (adata(normalised(counts(), 1e4, "round")), adata(sp.csr_matrix((counts() > 0).astype(np.float32)))):
        cells = from_anndata(data)
        cells.matrices["X"] = replace(cells.matrices["X"], notes=("2 antibodies are left out",), facts={"features_left_out": "2"})
        matrix = find_counts(cells, None)
        assert matrix.notes[0] == "2 antibodies are left out"
        assert len(matrix.notes) == 2
        assert matrix.facts["features_left_out"] == "2"
