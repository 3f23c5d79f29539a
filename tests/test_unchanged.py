"""Nothing in the user's object or file changes except the documented keys; on an error or an interrupt nothing at all."""

import copy
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import cellfm_hub as cf
from cellfm_hub import api
from cellfm_hub.embedder import Embedder
from cellfm_hub.genes import GeneMap
from golden_cases import PORTABLE

CASES = {
    "geneformer": "geneformer-v2-basic",
    "scgpt": "scgpt-basic",
    "scfoundation": "scfoundation-basic",
    "uce": "uce-basic",
    "pca": "geneformer-v2-basic",
}
QC = ("genes_used", "counts_used", "truncated")


def load_options(family: str) -> dict[str, Any]:
    if family == "pca":
        return {"options": {"n_components": 3}}
    options = {"options": {"nhead": 2}, "species": "human"} if family == "uce" else {}
    return options | {"checkpoint": PORTABLE / CASES[family] / "checkpoint", "device": "cpu", "precision": "float32"}


def odd(cells: ad.AnnData) -> ad.AnnData:
    """Put into an object whatever a careless tool might tidy up."""
    counts = sp.csr_matrix(cells.X)
    n, g = counts.shape
    unsorted = counts.copy()
    for row in range(n):  # entries of a row in descending order
        at = slice(unsorted.indptr[row], unsorted.indptr[row + 1])
        unsorted.indices[at], unsorted.data[at] = unsorted.indices[at][::-1].copy(), unsorted.data[at][::-1].copy()
    unsorted.has_sorted_indices = False
    with_zeros = counts.astype(np.int64)
    with_zeros.data[::7] = 0  # stored zeros
    made = ad.AnnData(sp.csr_matrix(unsorted), obs=cells.obs.copy(), var=cells.var.copy())
    made.layers["with_zeros"] = with_zeros.tocsc()
    made.layers["dense"] = np.asfortranarray(np.log1p(counts.toarray()).astype(np.float64))
    made.obs["kind"] = pd.Categorical(["b", "a"] * (n // 2) + ["b"] * (n % 2), categories=["c", "b", "a"], ordered=True)
    made.obs["flag"] = np.arange(n) % 2 == 0
    made.obs["text"] = [f"cell {i}" for i in range(n)]
    made.obs["number"] = pd.array([None, *range(n - 1)], dtype="Int32")
    made.obs.index.name, made.var.index.name = "barcode", "gene"
    made.var["chromosome"] = pd.Categorical(["1", "X"] * (g // 2) + ["1"] * (g % 2))
    made.obsm["X_old"], made.varm["loadings"] = np.ones((n, 2), np.float32), np.ones((g, 2))
    made.obsp["distances"] = sp.eye_array(n, format="csr")
    made.uns["log1p"] = {"base": None, "nested": {"array": np.arange(3), "list": ["a", "b"]}}
    made.uns["cellfm"] = {"X_old": {"model": "another"}}
    made.raw = ad.AnnData(counts.copy(), var=cells.var.copy())
    return made


def snapshot(value: Any) -> Any:
    """Return a deep copy of an object, down to dtypes, memory order and bytes, that can be compared with ``==``."""
    if isinstance(value, ad.AnnData):
        parts = {name: getattr(value, name) for name in ("X", "layers", "obs", "var", "obsm", "varm", "obsp", "varp", "uns")}
        raw = None if value.raw is None else {"X": value.raw.X, "var": value.raw.var, "varm": value.raw.varm}
        return snapshot(parts | {"raw": raw}) | {"view": value.is_view, "backed": value.isbacked}
    if sp.issparse(value):
        arrays = [getattr(value, name) for name in ("data", "indices", "indptr")]
        return (type(value).__name__, value.shape, snapshot(arrays))
    if isinstance(value, np.ndarray):
        data = value.tolist() if value.dtype == object else value.tobytes()
        return ("array", str(value.dtype), value.shape, value.flags["C_CONTIGUOUS"], data)
    if isinstance(value, pd.DataFrame):
        columns = {name: snapshot(value[name]) for name in value.columns}
        return ("frame", list(value.columns), str(value.columns.dtype), snapshot(value.index), columns)
    if isinstance(value, pd.Series | pd.Index):
        categories = (snapshot(value.cat.categories), value.cat.ordered) if hasattr(value, "cat") else None
        return (type(value).__name__, value.name, str(value.dtype), categories, [None if pd.isna(x) else x for x in value])
    if hasattr(value, "items"):
        return {key: snapshot(item) for key, item in value.items() if key is not None}  # anndata 0.13: layers[None] is X
    if isinstance(value, list | tuple):
        return [snapshot(item) for item in value]
    return copy.deepcopy(value)


@pytest.fixture
def cells(family: str) -> ad.AnnData:
    return odd(ad.read_h5ad(PORTABLE / CASES[family] / "input.h5ad"))


def differences(before: Any, after: Any, at: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [d for key in keys for d in differences(before.get(key), after.get(key), f"{at}/{key}")]
    return [] if before == after else [at]


def test_the_comparison_sees_changes() -> None:
    """A test of the test: each of these changes is seen."""
    changes = {
        "/X": lambda a: a.X.sort_indices(),
        "/layers/with_zeros": lambda a: a.layers["with_zeros"].eliminate_zeros(),
        "/layers/dense": lambda a: a.layers.__setitem__("dense", np.ascontiguousarray(a.layers["dense"])),
        "/obs": lambda a: setattr(a, "obs", a.obs.assign(kind=a.obs["kind"].cat.remove_unused_categories())),
        "/var": lambda a: setattr(a.var.index, "name", "id"),
        "/uns/log1p/nested/array": lambda a: a.uns["log1p"]["nested"]["array"].__setitem__(0, 9),
        "/raw/X": lambda a: a.raw.X.data.__setitem__(0, 9),
        "/obsm/X_old": lambda a: a.obsm["X_old"].__setitem__((0, 0), 9),
    }
    for place, change in changes.items():
        made = odd(ad.read_h5ad(PORTABLE / "geneformer-v2-basic/input.h5ad"))
        before = snapshot(made)
        assert differences(before, snapshot(made)) == []
        change(made)
        assert differences(before, snapshot(made)) == [place]


@pytest.mark.parametrize("family", CASES)
def test_encode_changes_nothing(family: str, cells: ad.AnnData) -> None:
    options = load_options(family)
    species = options.pop("species", None)
    model = cf.load(family, **options)
    before, view = snapshot(cells), cells[:8]
    model.encode(cells, species=species)
    model.encode(view, species=species)
    assert view.is_view
    assert differences(before, snapshot(cells)) == []
    if family != "pca":
        model.tokenize(cells, species=species)
        model.encode(cells, species=species, level="gene")
        cf.explain(cells, family, cell=0, species=species, checkpoint=options["checkpoint"], options=options.get("options"))
    given = {key: options.get(key) for key in ("checkpoint", "options")}
    cf.check(cells, family, species=species, **given)
    assert differences(before, snapshot(cells)) == []


@pytest.mark.parametrize("qc", [False, True])
@pytest.mark.parametrize("family", CASES)
def test_embed_adds_the_documented_keys_alone(family: str, cells: ad.AnnData, qc: bool) -> None:
    before = snapshot(cells)
    cf.embed(cells, family, qc=qc, **load_options(family))
    key = f"X_{family}"
    assert key in cells.obsm
    assert cells.uns["cellfm"][key]["n_rows"] == cells.n_obs
    added = [f"{key}_{name}" for name in QC] if qc else []
    assert [name for name in cells.obs.columns if name not in before["obs"][1]] == added
    del cells.obsm[key], cells.uns["cellfm"][key]
    cells.obs = cells.obs.drop(columns=added)
    assert differences(before, snapshot(cells)) == []


PLACES = {
    "finding the counts": (Embedder, "match_genes"),
    "matching genes": (GeneMap, "apply"),
    "tokenizing": (Embedder, "prepare_cells"),
    "computing": (Embedder, "_embed_block"),
    "writing the receipt": (Embedder, "_receipt"),
}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, cf.errors.InputError])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["geneformer"])
def test_failure_changes_nothing(
    family: str, cells: ad.AnnData, place: str, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it breaks off: an earlier result stays too."""
    cf.embed(cells, family, qc=True, **load_options(family))
    before = snapshot(cells)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure("injected")

    owner, name = PLACES[place]
    monkeypatch.setattr(owner, name, fail)
    for copied in (False, True):
        with pytest.raises(failure, match="injected"):
            cf.embed(cells, family, qc=True, copy=copied, **load_options(family))  # type: ignore[call-overload]
    assert differences(before, snapshot(cells)) == []


@pytest.mark.parametrize("family", ["geneformer"])
def test_failure_while_storing(family: str, cells: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once vectors are there, only documented keys are touched, and the embedding never stands without its receipt."""
    before = snapshot(cells)
    store = api.store

    def interrupted(adata: ad.AnnData, key: str, values: Any, **rest: Any) -> None:
        store(adata, key, values, **rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cf.embed(cells, family, **load_options(family))
    assert cells.uns["cellfm"]["X_geneformer"]["model"] == "geneformer"
    del cells.obsm["X_geneformer"], cells.uns["cellfm"]["X_geneformer"]
    assert differences(before, snapshot(cells)) == []


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("failure", [None, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["geneformer", "pca"])
def test_files_keep_their_bytes(
    family: str, tmp_path: Path, backed: bool, failure: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(PORTABLE / CASES[family] / "input.h5ad", tmp_path / "cells.h5ad"))
    before = path.read_bytes()
    options = load_options(family)
    data = ad.read_h5ad(path, backed="r") if backed else path
    if failure is None:
        cf.embed(data, family, **options)
    else:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise failure

        with monkeypatch.context() as patched:
            patched.setattr(Embedder, "prepare_cells", fail)
            with pytest.raises(failure):
                cf.embed(data, family, **options)
    cf.check(path, family, checkpoint=options.get("checkpoint"), options=options.get("options"))
    if isinstance(data, ad.AnnData):
        data.file.close()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
