"""Checks that every adapter must pass, for tests inside and outside this repository.

A third-party package runs them on its own model: see ``tests/plugin_example``.
"""

import copy
import json
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import scipy.sparse as sp
from anndata.io import read_elem, write_elem

from cellfm_hub.blocks import Vectors
from cellfm_hub.embedder import Embedder
from cellfm_hub.tokens import Tokens

if TYPE_CHECKING:
    from anndata import AnnData

ATOL = 2e-6
"""Largest change of a float32 vector that other rows of a batch may cause, relative to vectors of ordinary size (about 1)."""


def _assert_same(got: Vectors, expected: Vectors, what: str) -> None:
    scale = max(1.0, float(np.nanmax(np.abs(expected), initial=0.0)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL * scale, err_msg=what)


def check_cell_model(model: Embedder, adata: "AnnData", **options: Any) -> None:
    """Check a model of cells on a small data set (float32, CPU).

    A vector must not depend on the other cells, on their order, on the batcher, or on how the matrix is stored; the input must come back
    untouched; the receipt must be writable.

    Parameters
    ----------
    model
        Loaded with ``device="cpu", precision="float32"``.
    adata
        A few cells in memory.
    options
        Passed to ``encode``.

    Raises
    ------
    AssertionError
        Naming the promise that is broken.
    """
    before = _snapshot(adata)
    reference = model.encode(adata, **options)
    assert _snapshot(adata) == before, "encode changed its input"
    assert reference.shape == (adata.n_obs, reference.shape[1])
    assert reference.dtype == np.float32
    _check_receipt(model)

    dense = adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)
    for name, matrix in (("dense", dense), ("CSR", sp.csr_matrix(dense)), ("CSC", sp.csc_matrix(dense)), ("int32", dense.astype(np.int32))):
        other = adata.copy()
        other.X = matrix
        _assert_same(model.encode(other, **options), reference, f"{name} matrix gives other vectors")
    if model.receipt is not None and model.receipt["dataset_dependent"]:
        return

    rng = np.random.default_rng(0)
    for tokens in (1, 64, 100_000):
        _assert_same(model.encode(adata, batch_tokens=tokens, **options), reference, f"batch_tokens={tokens} changes vectors")
    order = rng.permutation(adata.n_obs)
    _assert_same(model.encode(adata[order].copy(), **options), reference[order], "the order of cells changes vectors")
    for row in rng.choice(adata.n_obs, size=min(4, adata.n_obs), replace=False):
        _assert_same(model.encode(adata[[row]].copy(), **options), reference[[row]], f"cell {row} alone has another vector")
    _check_tokens(model, model.tokenize(adata), reference, **options)


def check_sequence_model(model: Embedder, sequences: dict[str, str], **options: Any) -> None:
    """Check a model of sequences (float32, CPU); see :func:`check_cell_model`."""
    names = list(sequences)
    reference = model.encode(sequences, **options)
    assert reference.shape == (len(sequences), reference.shape[1])
    assert reference.dtype == np.float32
    _check_receipt(model)
    _assert_same(model.encode(list(sequences.values()), **options), reference, "a list gives other vectors than a dict")
    rng = np.random.default_rng(0)
    for tokens in (1, 64, 100_000):
        _assert_same(model.encode(sequences, batch_tokens=tokens, **options), reference, f"batch_tokens={tokens} changes vectors")
    order = rng.permutation(len(names))
    shuffled = {names[i]: sequences[names[i]] for i in order}
    _assert_same(model.encode(shuffled, **options), reference[order], "the order of sequences changes vectors")
    for row in rng.choice(len(names), size=min(4, len(names)), replace=False):
        alone = model.encode([sequences[names[row]]], **options)
        _assert_same(alone, reference[[row]], f"sequence {names[row]!r} alone has another vector")
    if hasattr(model.adapter, "network"):
        tokenizing = {name: value for name, value in options.items() if name in {"long", "overlap"}}
        _check_tokens(model, model.tokenize(sequences, **tokenizing), reference, **options)


def _check_tokens(model: Embedder, tokens: Tokens, reference: Vectors, **options: Any) -> None:
    passed_on = {name: value for name, value in options.items() if name in {"recipe", "pooling", "output_layer"}}
    _assert_same(model.encode_tokens(tokens, **passed_on), reference, "encode_tokens(tokenize(data)) differs from encode(data)")


def _check_receipt(model: Embedder) -> None:
    receipt = model.receipt
    assert receipt is not None
    assert all(isinstance(value, str | int | float | bool) for value in receipt.values()), f"receipt is not flat: {receipt}"
    json.dumps(receipt)
    with h5py.File("receipt.h5", "w", driver="core", backing_store=False) as file:
        write_elem(file, "receipt", receipt)
        assert set(read_elem(file["receipt"])) == set(receipt)


def _snapshot(adata: "AnnData") -> tuple[Any, ...]:
    """Return everything that must not change, in a comparable form."""
    layers = {name: m for name, m in adata.layers.items() if name is not None}  # anndata 0.13: layers[None] is X
    matrices = {name: m for name, m in [("X", adata.X), *layers.items()] if m is not None}
    values = {name: (m.toarray() if sp.issparse(m) else np.asarray(m)).tobytes() for name, m in matrices.items()}
    return values, adata.obs.to_json(), adata.var.to_json(), sorted(adata.obsm), copy.deepcopy(sorted(adata.uns)), sorted(layers)
