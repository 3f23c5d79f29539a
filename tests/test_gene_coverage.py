"""Files of which a model knows next to no gene are refused, once per file and everywhere alike."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import cellfm_hub as cf
from cellfm_hub.errors import GeneCoverageError
from cellfm_hub.genes import GeneMap, choose_gene_ids
from cellfm_hub.genes.coverage import Coverage
from cellfm_hub.sources import some_rows
from cellfm_hub.sources.cells import Matrix, from_anndata
from cellfm_hub.sources.some_rows import column_totals, take_rows
from golden_cases import DATA, PORTABLE

CHECKPOINTS = {
    "geneformer": PORTABLE / "geneformer-v2-basic" / "checkpoint",
    "scfoundation": PORTABLE / "scfoundation-basic" / "checkpoint",
    "scgpt": PORTABLE / "scgpt-basic" / "checkpoint",
    "uce": PORTABLE / "uce-basic" / "checkpoint",
}


def options_of(model: str, **switches: Any) -> dict[str, Any]:
    return {"checkpoint": CHECKPOINTS[model], "options": switches | ({"nhead": 2} if model == "uce" else {})}


def names_known_to(model: str, number: int) -> list[str]:
    loaded = cf.load(model, device="cpu", precision="float32", **options_of(model))
    case = CHECKPOINTS[model].parent
    var = ad.read_h5ad(case / "input.h5ad").var
    adapter: Any = loaded.adapter
    for names in (var.index.tolist(), *(var[column].astype(str).tolist() for column in var)):
        unique = list(dict.fromkeys(names))
        matched = adapter.gene_matcher("human" if model == "uce" else None, {"index": unique})(unique)
        if matched.n_matched >= number:
            return [unique[column] for column in matched.columns[:number]]
    pytest.fail(f"{model} knows no {number} genes of its golden case")


def nearly_unknown(model: str, known: int = 6, cells: int = 24) -> ad.AnnData:
    """Return cells with 765 genes called ``g0``, ``g1``, …, but for a few that the model knows, with half a percent of the counts."""
    random = np.random.default_rng(0)
    counts = random.poisson(1.0, (cells, 765)).astype(np.float32)
    counts[:, :known] = 0
    counts[: int(0.005 * counts.sum() / known) + 1, :known] = 1
    names = [*names_known_to(model, known), *(f"g{i}" for i in range(765 - known))]
    return ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=names), obs=pd.DataFrame(index=[f"c{i}" for i in range(cells)]))


@pytest.mark.parametrize("model", CHECKPOINTS)
def test_refused_before_anything_is_computed(model: str, tmp_path: Path) -> None:
    """In memory, from a file, in every shard, by check and by explain: in the same words; nothing is left behind."""
    adata, where = nearly_unknown(model), options_of(model)
    species = {"species": "human"} if model == "uce" else {}
    data, out = tmp_path / "cells.h5ad", tmp_path / "out.npy"
    adata.write_h5ad(data)
    loaded = cf.load(model, device="cpu", precision="float32", **where)
    runs: list[Callable[[], Any]] = [
        lambda: loaded.encode(adata, **species),
        lambda: loaded.tokenize(data, **species),
        lambda: cf.embed(adata.copy(), model, device="cpu", **where, **species),
        lambda: cf.embed_file(data, model, out=out, device="cpu", **where, **species),
        lambda: cf.embed_file(data, model, out=out, device="cpu", shard=(1, 3), **where, **species),
        lambda: cf.embed_file(data, model, out=out, device="cpu", shard=(3, 3), **where, **species),
        lambda: cf.explain(data, model, cell=0, **where, **species),
    ]
    said = []
    for run in runs:
        with pytest.raises(
            GeneCoverageError, match=r"^only 6 of the 765 genes \(0\.\d\d% of all counts\) are in .*'coverage': 'any'"
        ) as error:
            run()
        said.append(str(error.value).replace(loaded.name, "MODEL"))
    assert len(set(said)) == 1
    assert re.search(r"\(g\d+, g\d+, g\d+, …\)", said[0])
    assert "\n" not in said[0]
    assert list(cf.check(data, model, **where, **species).refusals.values()) == [str(error.value)]
    assert [path for path in tmp_path.iterdir() if path.name != "cache"] == [data]


@pytest.mark.parametrize("model", CHECKPOINTS)
def test_taken_where_the_user_says_so(model: str, tmp_path: Path) -> None:
    """With ``coverage="any"`` the few genes make vectors, in memory and in a file alike; with no gene at all there are none."""
    adata, where = nearly_unknown(model), options_of(model, coverage="any")
    species = {"species": "human"} if model == "uce" else {}
    loaded = cf.load(model, device="cpu", precision="float32", **where)
    vectors = loaded.encode(adata, **species)
    filled = np.isfinite(vectors).all(axis=1)
    assert filled.any()
    assert filled.sum() < len(filled)
    assert loaded.receipt is not None
    assert loaded.receipt["genes_used"] == 6
    adata.write_h5ad(tmp_path / "cells.h5ad")
    cf.embed_file(tmp_path / "cells.h5ad", model, out=tmp_path / "out.npy", device="cpu", precision="float32", **where, **species)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), vectors, atol=2e-6, rtol=0)
    assert np.isnan(loaded.encode(adata[:, 6:].copy(), **species)).all()


def test_workers_decide_alike(tmp_path: Path) -> None:
    nearly_unknown("scgpt").write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(GeneCoverageError, match="only 6 of the 765 genes"):
        cf.embed_file(
            tmp_path / "cells.h5ad", "scgpt", out=tmp_path / "out.npy", part_rows=8, **options_of("scgpt") | {"device": "cpu,cpu"}
        )


def test_a_shard_without_known_genes_is_computed(tmp_path: Path) -> None:
    """What is decided for the file holds for each shard: cells in which nothing is known are empty cells, not a reason to refuse."""
    adata = nearly_unknown("scgpt", known=40)
    counts = adata.X.toarray()
    counts[:12, :40] = 9
    counts[12:, :40] = 0
    adata.X = sp.csr_matrix(counts)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for part in (1, 2):
        cf.embed_file(tmp_path / "cells.h5ad", "scgpt", out=tmp_path / "out.npy", shard=(part, 2), device="cpu", **options_of("scgpt"))
    cf.merge(tmp_path / "out.npy")
    assert np.isnan(np.load(tmp_path / "out.npy")).all(axis=1).tolist() == [False] * 12 + [True] * 12


def test_baselines_take_any_genes() -> None:
    assert cf.load("pca", options={"n_components": 3}).encode(nearly_unknown("scgpt")).shape == (24, 3)


def test_a_column_that_matches_is_named() -> None:
    adata = nearly_unknown("scgpt")
    known = names_known_to("scgpt", 100)
    adata.var["symbol"] = [f"{name}" for name in known] + [f"x{i}" for i in range(665)]
    model = cf.load("scgpt", device="cpu", **options_of("scgpt"))
    with pytest.raises(
        GeneCoverageError, match=r"looked at index \(.*, …\)\. Expected 1% of the counts and 5 genes\. gene_ids='symbol' would match 100$"
    ):
        model.encode(adata, gene_ids="index")


# The rule


def matching(*known: str) -> Callable[[Any], GeneMap]:
    def match(ids: Any) -> GeneMap:
        columns = np.array([i for i, name in enumerate(ids) if name in known], dtype=np.int64)
        tokens = np.array([known.index(ids[i]) for i in columns], dtype=np.int32)
        return GeneMap(columns, np.arange(len(columns)), tokens, len(ids))

    return match


@pytest.mark.parametrize(
    ("columns", "known", "totals", "enough"),
    [
        (765, 12, [0.005] * 12, False),
        (765, 12, [1.0] * 12, True),
        (20, 4, [10.0] * 4, False),
        (20, 5, [10.0] * 5, True),
        (19, 1, [10.0], True),  # a panel
        (1, 1, [3.0], True),
        (500, 300, [0.0] * 300, False),  # all counts on genes that are not known
    ],
)
def test_rule(columns: int, known: int, totals: list[float], enough: bool) -> None:
    names = [f"k{i}" for i in range(known)] + [f"x{i}" for i in range(columns - known)]
    weights = np.array([*totals, *np.ones(columns - known)])
    var = pd.DataFrame(index=names)
    choose: dict[str, Any] = {"column": None, "preferred": (), "model": "m", "totals": lambda: weights}
    match = matching(*names[:known])
    assert Coverage.measure(match(names), weights).is_enough == enough
    if enough:
        assert choose_gene_ids(var, match, **choose)[1].n_matched == known
    else:
        with pytest.raises(GeneCoverageError):
            choose_gene_ids(var, match, **choose)
    assert choose_gene_ids(var, match, coverage="any", **choose)[1].n_matched == known


def test_cells_without_counts_say_nothing() -> None:
    """Where the rows that are looked at are all empty the genes alone decide."""
    names = [f"k{i}" for i in range(30)]
    assert Coverage.measure(matching(*names[:10])(names), np.zeros(30)).is_enough
    assert not Coverage.measure(matching(*names[:3])(names), np.zeros(30)).is_enough


def test_one_gene_in_many_columns_is_one() -> None:
    names = ["k0"] * 10 + [f"x{i}" for i in range(20)]
    assert not Coverage.measure(matching("k0")(names), np.ones(30)).is_enough


def test_rows_from_all_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many rows, from the first to the last, and of a part of the file the same ones; never more than some at a time."""
    monkeypatch.setattr(some_rows, "SAMPLED_ROWS", 12)
    monkeypatch.setattr(some_rows, "SAMPLED_TOGETHER", 4)
    adata = ad.AnnData(sp.csr_matrix(np.eye(50, dtype=np.float32)))
    cells = from_anndata(adata)
    read: list[int] = []
    rows = Matrix.rows

    def counted(self: Matrix, start: int, stop: int) -> Any:
        read.append(stop - start)
        return rows(self, start, stop)

    monkeypatch.setattr(Matrix, "rows", counted)
    totals = column_totals(cells, cells.matrices["X"])
    assert np.flatnonzero(totals).tolist() == [0, 1, 2, 3, 23, 24, 25, 26, 46, 47, 48, 49]
    assert max(read) == 4
    some = take_rows(from_anndata(adata), [(5, 9)])
    np.testing.assert_array_equal(column_totals(some, some.matrices["X"]), totals)
    few = from_anndata(adata[:11].copy())
    assert column_totals(few, few.matrices["X"]).sum() == 11


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", sorted(path.stem for path in (DATA / "scrna").rglob("*.h5ad")) if DATA.is_dir() else [])
def test_no_real_data_are_refused(name: str) -> None:
    """Every shared set, human ones by the whole vocabularies of Geneformer and scGPT."""
    from cellfm_adapters.geneformer.dictionaries import _read_text
    from cellfm_adapters.geneformer.tokenizer import Tokenizer

    (path,) = (DATA / "scrna").rglob(f"{name}.h5ad")
    if "mouse" in str(path):
        pytest.skip("a model of human")
    folder = DATA / "geneformer" / "gc104M"
    match = Tokenizer(_read_text(folder / "tokens.tsv", folder / "aliases.tsv"), 4096).match_genes
    adata = ad.read_h5ad(path)
    cells = from_anndata(adata)
    totals = partial(column_totals, cells, cells.matrices["X"])
    _, genes = choose_gene_ids(adata.var, match, column=None, preferred=("ensembl_id",), model="m", species="human", totals=totals)
    assert genes.n_matched > 100
