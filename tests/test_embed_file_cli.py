"""The options of `cellfm embed` that concern long runs, and `cellfm merge`."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from cellfm_hub.cli import app
from cellfm_hub.jobs.job import Job
from file_runs import CELLS, SCGPT, loaded, write_cells

EMBED = ("--device", "cpu", "--precision", "float32", "--part-rows", "4")
WITH_SCGPT = ("--model", "scgpt", "--checkpoint", SCGPT / "checkpoint", *EMBED)


def cellfm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "cells.h5ad", 14)


def test_shards_and_merge(cells: Path) -> None:
    out = cells.with_name("out.npy")
    for shard in ("2/2", "1/2"):
        done = cellfm("embed", cells, *WITH_SCGPT, "-o", out, "--shard", shard)
        assert done.exit_code == 0, done.output
        assert f"cellfm merge {out}" in done.stdout
    done = cellfm("merge", out)
    assert done.exit_code == 0, done.output
    assert "14 cells x 32" in done.stdout
    np.testing.assert_allclose(np.load(out), loaded("scgpt", CELLS).encode(cells), atol=2e-6, rtol=0)
    done = cellfm("merge", out)
    assert done.exit_code == 1
    assert "there are no shards" in done.stderr
    # A task of the array that is queued again after the merge.
    done = cellfm("embed", cells, *WITH_SCGPT, "-o", out, "--shard", "2/2", "--resume")
    assert done.exit_code == 0, done.output
    assert "shard 2/2: nothing to do, all shards are merged into" in done.stdout


def test_resume(cells: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original = cells.with_name("out.npy"), Job._compute

    def compute(self: Job, rows: object) -> object:
        if rows.wanted.number == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return original(self, rows)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Job, "_compute", compute)
        done = cellfm("embed", cells, *WITH_SCGPT, "-o", out)
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "cellfm: interrupted; 8 rows are finished; the same command with --resume goes on"
    done = cellfm("embed", cells, *WITH_SCGPT, "-o", out)
    assert done.exit_code == 1
    assert "--resume" in done.stderr
    assert cellfm("embed", cells, *WITH_SCGPT, "-o", out, "--resume").exit_code == 0
    assert len(np.load(out)) == 14
    assert cellfm("embed", cells, *WITH_SCGPT, "-o", out, "--update").exit_code == 0


def test_several_models(cells: Path) -> None:
    more = ("--option", "pca.n_components=3", "--option", "scgpt.ties=upper", "--checkpoint", f"scgpt={SCGPT / 'checkpoint'}")
    done = cellfm("embed", cells, "--model", "pca", "--model", "scgpt", *EMBED, *more, "--key-added", "scgpt=X_mine", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [entry["key"] for entry in told] == ["X_pca", "X_mine"]
    result = ad.read_h5ad(cells.with_name("cells.pca+scgpt.h5ad"))
    assert result.obsm["X_pca"].shape == (14, 3)
    assert json.loads(result.uns["cellfm"]["X_mine"]["options"])["ties"] == "upper"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "pca", "--model", "hvg", "--option", "n_components=3"), "pca.n_components=3"),
        (("--model", "pca", "--model", "hvg", "--checkpoint", "folder"), "pca="),
        (("--model", "pca", "--shard", "0/4"), "i from 1 to n"),
        (("--model", "pca", "--shard", "5/4"), "i from 1 to n"),
        (("--model", "pca", "--shard", "a"), "i/n"),
    ],
    ids=["option", "checkpoint", "shard-0", "shard-5", "shard-a"],
)
def test_usage(cells: Path, arguments: tuple[str, ...], says: str) -> None:
    done = cellfm("embed", cells, *arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.replace("│", " ").split())
