"""`cf.explain` and ``cellfm explain``: the tokens of one cell, as the model sees them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import cellfm_hub as cf
from cellfm_hub.api import load_tokenizer
from cellfm_hub.explaining import explain_cell
from cellfm_hub.sources.cells import Matrix
from golden_cases import PORTABLE
from test_cli import assert_fails, cellfm

CASES = {
    "geneformer-v2-basic": ("geneformer", {}),
    "geneformer-v1-basic": ("geneformer", {}),
    "scgpt-basic": ("scgpt", {"max_length": 40}),
    "scfoundation-basic": ("scfoundation", {}),
    "uce-basic": ("uce", {"nhead": 2}),
}
GENEFORMER = PORTABLE / "geneformer-v2-basic"


def where(case: str) -> dict[str, Any]:
    model, options = CASES[case]
    return {"model": model, "checkpoint": PORTABLE / case / "checkpoint", "options": options}


def species(case: str) -> str | None:
    return "human" if case.startswith("uce") else None


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_tokenize(case: str) -> None:
    """Token by token, for every cell; and every count is in exactly one place."""
    path, given = PORTABLE / case / "input.h5ad", where(case)
    cells = ad.read_h5ad(path)
    tokens = cf.load(device="cpu", precision="float32", **given).tokenize(path, species=species(case))
    embedder = load_tokenizer(**given)
    counts = sp.csr_matrix(cells.X)
    for row, name in enumerate(cells.obs_names):
        explained = explain_cell(path, embedder, cell=name, species=species(case))
        table = explained.table
        seen = table[table["position"].notna()]
        assert seen["position"].tolist() == list(range(len(seen)))
        np.testing.assert_array_equal(seen["token_id"].to_numpy(np.int32), tokens.row(row))
        assert seen["token"].tolist() == embedder.adapter.vocabulary[tokens.row(row)].tolist()  # type: ignore[attr-defined]
        if tokens.values is not None:
            np.testing.assert_array_equal(seen["value"].to_numpy(np.float32), tokens.values[tokens.offsets[row] : tokens.offsets[row + 1]])
        assert set(seen["status"]) <= {"kept", "special"}
        assert set(table.loc[table["position"].isna(), "status"]) <= {"cut", "unknown"}
        # Every expressed gene stands in the table, with its count.
        once = table[table["count"].notna()]
        if case.startswith("uce"):  # drawn repeatedly
            once = once.drop_duplicates("name")
        assert once["count"].sum() == counts[row].sum() == sum(explained.counts.values())
        assert sum(name.count("+") + 1 for name in once["name"]) == np.count_nonzero(counts[row].toarray())
        cut = 0 if tokens.cut is None else int(tokens.cut[row])
        if not case.startswith("uce"):  # there cut counts what was drawn and did not fit
            assert explained.genes.get("cut", 0) == cut


def test_statuses() -> None:
    """One hand-made cell: known, unknown, cut, summed."""
    source = ad.read_h5ad(GENEFORMER / "input.h5ad")
    known = load_tokenizer("geneformer", checkpoint=GENEFORMER / "checkpoint").adapter.vocabulary[4:]  # type: ignore[attr-defined]
    max_genes = 256 - 2
    genes = [*known[: max_genes + 3], "ENSG99999999999", known[5]]
    counts = np.zeros((2, len(genes)), np.float32)
    counts[1, :] = 1
    counts[1, -1] = 4
    counts[0, 0] = 7
    cells = ad.AnnData(counts, var={"ensembl_id": genes})
    cells.obs_names, cells.var_names = ["first", "second"], [f"name {i}" for i in range(len(genes))]
    assert source.n_vars
    model = load_tokenizer("geneformer", checkpoint=GENEFORMER / "checkpoint")
    longest = model.adapter.max_tokens  # type: ignore[attr-defined]
    table = cf.explain(cells, "geneformer", cell="second", checkpoint=GENEFORMER / "checkpoint")
    unknown = table[table["status"] == "unknown"]
    assert unknown["gene"].tolist() == ["ENSG99999999999"]
    assert unknown["name"].tolist() == [f"name {len(genes) - 2}"]
    assert table["status"].value_counts()["special"] == 2
    tokens = model.tokenize(cells)
    assert table["status"].value_counts()["kept"] == min(longest, tokens.lengths[1]) - 2
    assert (table["status"] == "cut").sum() == tokens.cut[1]  # type: ignore[index]
    twice = table[table["gene"].str.contains(known[5], regex=False)]
    assert twice["count"].sum() == 5
    first = cf.explain(cells, "geneformer", cell=0, checkpoint=GENEFORMER / "checkpoint")
    assert first.loc[first["status"] == "kept", ["gene", "name", "count"]].to_numpy().tolist() == [[known[0], "name 0", 7.0]]


def test_drawn_genes_repeat() -> None:
    """UCE draws with replacement: a gene stands as often as it was drawn, with the same count each time; draws are told apart."""
    given = where("uce-basic")
    given["options"] = {"nhead": 2, "samples": 2}
    path = PORTABLE / "uce-basic/input.h5ad"
    table = cf.explain(path, given.pop("model"), cell=0, species="human", **given)
    kept = table[table["status"] == "kept"]
    assert kept.groupby("token")["count"].nunique().max() == 1
    assert kept["token"].value_counts().max() > 1
    assert kept["draw"].unique().tolist() == [0, 1]
    special = table.loc[table["status"] == "special", "token"].tolist()
    assert special.count("<cls>") == 2
    assert (table.loc[table["draw"] == 1, "position"].iloc[0]) == 0


def test_only_one_row_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the samples in which the counts are found, and by which the genes are judged."""
    n = 12_000
    source = ad.read_h5ad(GENEFORMER / "input.h5ad")
    cells = ad.AnnData(sp.csr_matrix(sp.vstack([source.X] * (n // source.n_obs + 1)))[:n], var=source.var)
    read: list[tuple[int, int]] = []
    rows = Matrix.rows

    def spy(self: Matrix, start: int, stop: int) -> Any:
        read.append((start, stop))
        return rows(self, start, stop)

    monkeypatch.setattr(Matrix, "rows", spy)
    table = cf.explain(cells, "geneformer", cell=4321, checkpoint=GENEFORMER / "checkpoint")
    assert read[-1] == (4321, 4322)
    assert sum(stop - start for start, stop in read) < 5200
    expected = cf.explain(cells[[4321]].copy(), "geneformer", cell=0, checkpoint=GENEFORMER / "checkpoint")
    assert table.equals(expected)


def test_seed() -> None:
    """Models that sample: as tokenize with the same seed."""
    path, given = PORTABLE / "scgpt-basic/input.h5ad", where("scgpt-basic")
    embedder = cf.load(device="cpu", precision="float32", **given)
    model = given.pop("model")
    row = int(np.argmax(embedder.tokenize(path).cut))  # type: ignore[arg-type]
    for seed in (0, 5):
        table = cf.explain(path, model, cell=row, seed=seed, **given)
        ids = table["token_id"].dropna().to_numpy(np.int32)
        np.testing.assert_array_equal(ids, embedder.tokenize(path, seed=seed).row(row))


def test_errors() -> None:
    path, checkpoint = GENEFORMER / "input.h5ad", GENEFORMER / "checkpoint"
    cells = ad.read_h5ad(path)
    name = cells.obs_names[3]
    with pytest.raises(cf.errors.InputError, match=f"Did you mean {re.escape(repr(name))}"):
        cf.explain(path, "geneformer", cell=f"{name}x", checkpoint=checkpoint)
    with pytest.raises(cf.errors.InputError, match="13 cells"):
        cf.explain(path, "geneformer", cell=13, checkpoint=checkpoint)
    cells.obs_names = [name] * 2 + list(cells.obs_names[2:])
    with pytest.raises(cf.errors.InputError, match=r"3 cells .*rows 0, 1, 3.*cell=0"):
        cf.explain(cells, "geneformer", cell=name, checkpoint=checkpoint)
    with pytest.raises(cf.errors.InputError, match="model without tokens"):
        cf.explain(path, "pca", cell=0)
    with pytest.raises(cf.errors.InputError, match="model of sequences"):
        cf.explain(["ACGT"], "nt", cell=0, checkpoint=PORTABLE / "nt-v2-basic/checkpoint")


# The command line


def test_command(tmp_path: Path) -> None:
    path = Path(shutil.copy(GENEFORMER / "input.h5ad", tmp_path / "cells.h5ad"))
    name = ad.read_h5ad(path).obs_names[0]
    arguments = ("explain", path, "--model", "geneformer", "--checkpoint", GENEFORMER / "checkpoint", "--cell")
    done = cellfm(*arguments, name)
    assert done.returncode == 0, done.stderr
    table = cf.explain(path, "geneformer", cell=name, checkpoint=GENEFORMER / "checkpoint")
    seen = table["position"].notna().sum()
    assert f"{name} as geneformer sees it: {seen:,} tokens" in done.stdout
    lines = done.stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("position"))
    assert len(lines) - header - 1 == len(table)
    first = table[table["status"] == "kept"].iloc[0]
    assert first["gene"] in lines[header + 2]
    done = cellfm(*arguments, name, "--json")
    facts = json.loads(done.stdout)
    assert facts["n_tokens"] == seen
    assert [row["token_id"] for row in facts["tokens"]] == [
        None if v is None else int(v) for v in table["token_id"].replace({np.nan: None})
    ]
    assert_fails(cellfm(*arguments, "nobody"), "'nobody'")
    assert cellfm("explain", path, "--model", "geneformer").returncode == 2
    empty = ad.read_h5ad(path).obs_names[7]
    assert "its vector is NaN" in cellfm(*arguments, empty).stdout
