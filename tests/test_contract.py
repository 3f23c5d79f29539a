"""The contract suite over every registered family, on the portable golden checkpoints."""

from dataclasses import replace

import anndata as ad
import pytest
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
