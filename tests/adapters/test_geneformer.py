"""Geneformer against the original code."""

import re
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

import cellfm_hub as cf
from golden_cases import DATA, LARGE, Case, cases

OUR_LAYER = {"-1": -2, "0": -1}
"""The original's emb_layer -> ours: its -1 is the second to last layer."""


def load(case: Case, checkpoint: Path | None = None) -> cf.Embedder:
    own = case.path / "dictionaries"
    beside = case.checkpoint / "geneformer"
    options: dict[str, Any] = {} if beside.is_dir() else {"dictionaries": own if own.is_dir() else DATA / "geneformer"}
    return cf.load("geneformer", checkpoint=checkpoint or case.checkpoint, options=options, device="cpu", precision="float32")


@pytest.mark.parametrize("case", [c for c in cases("geneformer") if "pbmc3k" not in c.id])
def test_tokens(case: Case) -> None:
    """Token ids and lengths are exactly the original's."""
    # One case has no weights: its dictionaries are those of the published V2 models.
    checkpoint = case.checkpoint if case.checkpoint.is_dir() else LARGE / "geneformer-v2-tiny" / "checkpoint"
    tokens = load(case, checkpoint).tokenize(ad.read_h5ad(case.path / "input.h5ad"))
    np.testing.assert_array_equal(tokens.lengths, case.array("expected_lengths.npy"))
    np.testing.assert_array_equal(tokens.padded(), case.array("expected_token_ids.npy")[:, : tokens.lengths.max()])


@pytest.mark.parametrize("case", [c for c in cases("geneformer-v") if "collapse" not in c.id])
def test_embeddings(case: Case) -> None:
    """Every expected array is met, and every file of the case is looked at."""
    model = load(case)
    adata = ad.read_h5ad(case.path / "input.h5ad")
    for path in sorted(case.path.glob("expected_*_layer*.npy")):
        match = re.fullmatch(r"expected_(cls|mean|contextual|gene_mean)_layer(-1|0)(?:_cell(\d+))?", path.stem)
        assert match is not None, path.name
        kind, layer, cell = match[1], OUR_LAYER[match[2]], match[3]
        expected = case.array(path.name)
        if kind in ("cls", "mean"):
            got = model.encode(adata, pooling=kind, output_layer=layer)
        else:
            vectors = model.encode(adata, level="gene", output_layer=layer)
            if kind == "contextual":
                got = vectors.row(int(cell))
            else:
                genes = case.array(f"gene_mean_token_ids_layer{match[2]}.npy")
                got = np.stack([vectors.values[vectors.ids == gene].mean(axis=0, dtype=np.float64) for gene in genes]).astype(np.float32)
        case.assert_close(got, expected, path.name)


@pytest.mark.parametrize("case", [c for c in cases("geneformer") if "pbmc3k" in c.id])
@pytest.mark.parametrize("generation", ["V1", "V2"])
def test_real_cells(case: Case, generation: str) -> None:
    """Tokens and vectors of real blood cells with old Ensembl ids."""
    expected = np.load(case.path / f"expected_{generation}.npz")
    model = load(case, LARGE / f"geneformer-{generation.lower()}-tiny" / "checkpoint")
    adata = ad.read_h5ad(DATA / "scrna/pbmc3k/pbmc3k_mini.h5ad")
    tokens = model.tokenize(adata)
    np.testing.assert_array_equal(tokens.lengths, expected["lengths"])
    np.testing.assert_array_equal(tokens.padded(), expected["token_ids"])
    for name in (n for n in expected.files if n.endswith("_layer-1")):
        case.assert_close(model.encode(adata, pooling=name.split("_")[0], output_layer=-2), expected[name], name)


@pytest.mark.parametrize("case", [c for c in cases("geneformer-v") if "basic" in c.id])
def test_filter_pass(case: Case) -> None:
    """Cells whose ``filter_pass`` is not 1 have no vector, as the original leaves them out; the others are what they are without it."""
    adata = ad.read_h5ad(case.path / "input.h5ad")
    model = load(case)
    expected = model.encode(adata)
    passed = np.arange(adata.n_obs) % 3 != 1
    for column in (passed.astype(int), passed, np.where(passed, 1, 2), np.where(passed, 1.0, np.nan)):
        adata.obs["filter_pass"] = column
        vectors = model.encode(adata)
        assert np.isnan(vectors[~passed]).all()
        np.testing.assert_allclose(vectors[passed], expected[passed], atol=2e-6, rtol=0)
    assert np.isfinite(expected[~passed]).any()
