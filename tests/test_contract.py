"""The contract suite over every registered family, on the portable golden checkpoints."""

from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import cellfm_hub as cf
from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.errors import InputError
from cellfm_hub.nn import PackedBatch
from cellfm_hub.registry import registry
from cellfm_hub.sources.sequences import read_fasta
from cellfm_hub.testing import check_cell_model, check_sequence_model
from golden_cases import PORTABLE, Case


def model_of(case: Case) -> str:
    """Return the model that a case is about: the longest beginning of its name that is one (``nt-v1-basic`` -> ``nt``)."""
    parts = case.name.split("-")
    return next(name for end in range(len(parts), 0, -1) if (name := "-".join(parts[:end])) in registry().names)


CASES = [pytest.param(Case(path), id=path.name) for path in sorted(PORTABLE.iterdir())]


def load(case: Case) -> cf.Embedder:
    return cf.load(model_of(case), checkpoint=case.checkpoint, device="cpu", precision="float32", options=case.options)


@pytest.mark.parametrize("case", CASES)
def test_golden_checkpoint(case: Case) -> None:
    model = load(case)
    if model.modality == "cell":
        check_cell_model(model, ad.read_h5ad(case.path / "input.h5ad"))
    else:
        check_sequence_model(model, dict(read_fasta(case.path / "sequences.fasta")))


@pytest.mark.parametrize("name", ["pca", "hvg"])
def test_cell_baseline(name: str) -> None:
    check_cell_model(cf.load(name, options={"n_top_genes": 100} | ({"n_components": 5} if name == "pca" else {})), cf.datasets.pbmc700())


def test_shipped_checkpoints() -> None:
    """Those that travel with the package, on real cells and on DNA."""
    check_cell_model(cf.load("demo-cell", device="cpu", precision="float32"), cf.datasets.pbmc700()[:40].copy())
    sequences = {str(i): s for i, s in enumerate(["ACGTTGCA" * 5, "TTTTTT", "ACGNNACGTA", "GATTACAGATTACA" * 9])}
    check_sequence_model(cf.load("demo-dna", device="cpu", precision="float32"), sequences)


def test_sequence_baseline() -> None:
    sequences = {str(i): s for i, s in enumerate(["ACGTTGCA", "TTTTTT", "ACGNNACGTA", "GATTACAGATTACA" * 9])}
    check_sequence_model(cf.load("kmer"), sequences)
    check_sequence_model(cf.load("kmer"), sequences, reverse_complement="mean")


@pytest.mark.parametrize("case", CASES)
def test_unknown_poolings_are_refused(case: Case) -> None:
    """By the option, by the adapter itself, and where a recipe of a card names one: never another pooling instead."""
    model = load(case)
    adapter = model.adapter
    assert isinstance(adapter, TokenAdapter)
    lengths = (3, 2)
    batch = PackedBatch(ids=torch.zeros(5, dtype=torch.int64), lengths=lengths)
    hidden = torch.randn(5, adapter.embedding_dim)
    for name in ("median", "Mean", "maximum", ""):
        with pytest.raises(InputError, match="pooling"):
            adapter.pool(hidden, batch, name)
    data = case.path / ("input.h5ad" if model.modality == "cell" else "sequences.fasta")
    with pytest.raises(InputError, match="pooling='median' is not possible"):
        model.encode(data, pooling="median")
    recipe = model.entry.recipes["default"].model_copy(update={"pooling": "median"})
    model.entry = replace(model.entry, card=model.entry.card.model_copy(deep=True))
    model.entry.recipes["default"] = recipe
    with pytest.raises(InputError, match="names the pooling 'median'"):
        model.encode(data)


# Nothing the model knows: NaN and counted, in every model and at every level

NOTHING = {"n": "N" * 40, "gaps": "-" * 12, "dots": "....", "codes": "RYSWKMBDHVN", "lower": "nnnnnn", "one n": "N"}
"""Sequences without a base."""
BASES = {"first": "ACGTTGCAACGTTGCA" * 3, "last": "NNNNA" + "GATTACAG" * 4 + "NN"}
SEQUENCE_MODELS = [param for param in CASES if registry().find(model_of(param.values[0])).modality == "sequence"]
CELL_MODELS = [param for param in CASES if param not in SEQUENCE_MODELS]


def embedder(case: Case | str) -> cf.Embedder:
    return cf.load(case, device="cpu", precision="float32") if isinstance(case, str) else load(case)


def check_counted(model: cf.Embedder, data: Any, empty: list[int], **options: Any) -> None:
    """Rows without anything known are NaN, the others are not, receipts count them, and on_empty="error" names the first."""
    vectors = model.encode(data, **options)
    assert np.flatnonzero(np.isnan(vectors).all(axis=1)).tolist() == empty
    assert np.isfinite(np.delete(vectors, empty, axis=0)).all()
    assert model.receipt is not None
    assert model.receipt["n_empty"] == len(empty)
    with pytest.raises(InputError):
        model.encode(data, on_empty="error", **options)


@pytest.mark.parametrize("case", [*SEQUENCE_MODELS, "demo-dna", "kmer"])
def test_sequences_without_a_base(case: Case | str) -> None:
    model = embedder(case)
    data = {"first": BASES["first"], **NOTHING, "last": BASES["last"]}
    empty = list(range(1, 1 + len(NOTHING)))
    check_counted(model, data, empty)
    check_counted(model, data, empty, reverse_complement="mean")
    np.testing.assert_array_equal(model.encode(BASES), model.encode(data)[[0, -1]])
    if not isinstance(model.adapter, TokenAdapter):
        return
    check_counted(model, data, empty, long="tile")
    for pooling in model.adapter.poolings:
        check_counted(model, data, empty, pooling=pooling)
    assert (model.tokenize(data).lengths[empty] == 0).all()
    tokens = model.encode(data, level="token")
    assert (np.diff(tokens.offsets)[empty] == 0).all()
    assert np.isfinite(tokens.values).all()
    bases = model.encode(data, level="base")
    for row, (name, sequence) in enumerate(data.items()):
        assert np.isnan(bases.row(row)).all() == (name in NOTHING)
        assert len(bases.row(row)) == len(sequence)
    with pytest.raises(InputError, match="'n' is empty or holds no A, C, G or T"):
        model.encode(data, level="token", on_empty="error")


@pytest.mark.parametrize("case", [*CELL_MODELS, "demo-cell"])
def test_cells_without_a_known_gene(case: Case | str) -> None:
    """A cell without counts, and one whose only counts are of a gene that the model does not know."""
    model = embedder(case)
    source = cf.datasets.pbmc700()[:40] if isinstance(case, str) else ad.read_h5ad(case.path / "input.h5ad")
    whole = np.flatnonzero(np.isfinite(model.encode(source)).all(axis=1))[:6]
    x = np.zeros((len(whole) + 2, source.n_vars + 1), dtype=np.float32)
    x[1:-1, :-1] = source[whole].X.toarray()
    x[-1, -1] = 7
    var = pd.concat([source.var, pd.DataFrame(index=["no such gene"])])
    for column in var.columns:
        var[column] = var[column].astype(object).fillna("no such gene")
    obs = pd.concat([source.obs.iloc[whole[:1]], source.obs.iloc[whole], source.obs.iloc[whole[-1:]]])
    obs.index = [f"cell {i}" for i in range(len(x))]
    data = ad.AnnData(sp.csr_matrix(x), obs=obs, var=var)
    empty = [0, len(x) - 1]
    check_counted(model, data, empty)
    assert isinstance(model.adapter, TokenAdapter)
    for pooling in model.adapter.poolings:
        check_counted(model, data, empty, pooling=pooling)
    genes = model.encode(data, level="gene")
    assert (np.diff(genes.offsets)[empty] == 0).all()
    assert np.isfinite(genes.values).all()


@pytest.mark.parametrize("name", ["pca", "hvg"])
def test_empty_cells_of_baselines(name: str) -> None:
    cells = cf.datasets.pbmc700()[:80].copy()
    cells.X = sp.csr_matrix(cells.X.toarray() * (~np.isin(np.arange(80), (3, 70)))[:, None])
    model = cf.load(name, options={"n_top_genes": 100} | ({"n_components": 5} if name == "pca" else {}))
    check_counted(model, cells, [3, 70])


def test_every_model_was_asked() -> None:
    """A new adapter, baseline or not, is among those above."""
    asked = {registry().find(model_of(param.values[0])).adapter_path for param in CASES}
    asked |= {registry().find(name).adapter_path for name in ("demo-dna", "demo-cell", "kmer", "pca", "hvg")}
    assert {entry.adapter_path for entry in registry().checkpoints.values() if entry.card.owner == "cellfm-hub"} == asked


def test_every_adapter_has_a_case() -> None:
    """An adapter with weights proves its numbers in this repository."""
    with_cases = {registry().find(model_of(param.values[0])).adapter_path for param in CASES}
    with_weights = {entry.adapter_path for entry in registry().checkpoints.values() if entry.checkpoint.source is not None}
    assert with_weights == with_cases


@pytest.mark.parametrize("name", sorted(registry().checkpoints))
def test_options_are_documented(name: str) -> None:
    """The card lists exactly the switches that the adapter takes."""
    entry = registry().checkpoints[name]
    assert set(entry.options) == set(entry.adapter_class().options.model_fields)
