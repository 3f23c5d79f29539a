"""SIGKILL at random moments: nothing is lost, nothing is computed twice, the result is that of an uninterrupted run, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import pytest

import cellfm_hub as cf
from cellfm_hub import sinks
from cellfm_hub.jobs.journal import Journal, work_folder
from file_runs import CELLS, DNA, computed, everything, write_cells, write_fasta

INTERRUPTED = Path(__file__).parent / "interrupted.py"
PART_ROWS = 8


def kill_and_resume(model: str, data: Path, out: Path, options: dict[str, Any], *, kills: int, seed: int, shards: int = 0) -> None:
    """Do as `interrupted.py` says, and compare."""
    options = options | {"part_rows": PART_ROWS}
    todo = {"data": str(data), "model": model, "out": str(out), "options": options, "seed": seed, "kills": kills, "shards": shards}
    environment = os.environ | {"CELLFM_CACHE": str(out.with_name("cache")), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, INTERRUPTED, json.dumps(todo)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got, expected = everything(out), everything(out.parent / "reference" / out.name)
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name] != expected[name]] == []
    assert not work_folder(out).exists()
    assert list(out.parent.glob("*.shard-*")) == []
    seen: dict[str, int] = json.loads(done.stdout)
    assert seen["kills"] == kills
    assert seen["computed_again"] == 0


def cells(tmp_path: Path, suffix: str) -> tuple[Path, Path]:
    data = write_cells(tmp_path / "cells.h5ad", 40)
    return data, data if suffix == "in place" else tmp_path / f"out{suffix}"


def more_cells(tmp_path: Path, suffix: str) -> tuple[Path, Path]:
    """A result, and data with other rows than it was made from."""
    data, out = cells(tmp_path, suffix)
    cf.embed_file(data, "scgpt", out=out, part_rows=PART_ROWS, **CELLS)
    added = ad.read_h5ad(write_cells(tmp_path / "more.h5ad", 9, seed=9))
    added.obs_names = [f"new-{i}" for i in range(9)]
    ad.concat([ad.read_h5ad(data)[6:], added], merge="same").write_h5ad(data)
    return data, out


FORMATS = [".npy", ".parquet", ".h5ad", ".zarr"]


@pytest.mark.parametrize("suffix", [".npy", "in place"])
def test_cells(tmp_path: Path, suffix: str) -> None:
    kill_and_resume("scgpt", *cells(tmp_path, suffix), CELLS, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [*FORMATS, "in place"])
def test_cells_often(tmp_path: Path, suffix: str) -> None:
    kill_and_resume("scgpt", *cells(tmp_path, suffix), CELLS, kills=20, seed=1)


def test_sequences(tmp_path: Path) -> None:
    kill_and_resume("nt", write_fasta(tmp_path / "dna.fa", 40), tmp_path / "out.parquet", DNA, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_sequences_often(tmp_path: Path, suffix: str) -> None:
    kill_and_resume("nt", write_fasta(tmp_path / "dna.fa", 40), tmp_path / f"out{suffix}", DNA, kills=20, seed=1)


@pytest.mark.slow
def test_tokens_often(tmp_path: Path) -> None:
    kill_and_resume("nt", write_fasta(tmp_path / "dna.fa", 40), tmp_path / "out.parquet", DNA | {"level": "token"}, kills=20, seed=1)


def test_shards_and_merge(tmp_path: Path) -> None:
    kill_and_resume("scgpt", *cells(tmp_path, ".npy"), CELLS, kills=2, seed=0, shards=2)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [*FORMATS, "in place"])
def test_shards_and_merge_often(tmp_path: Path, suffix: str) -> None:
    kill_and_resume("scgpt", *cells(tmp_path, suffix), CELLS, kills=20, seed=1, shards=3)


@pytest.mark.slow
def test_shards_of_sequences_often(tmp_path: Path) -> None:
    kill_and_resume("nt", write_fasta(tmp_path / "dna.fa", 40), tmp_path / "out.parquet", DNA, kills=20, seed=1, shards=3)


def test_update(tmp_path: Path) -> None:
    kill_and_resume("scgpt", *more_cells(tmp_path, ".npy"), CELLS | {"update": True}, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_update_often(tmp_path: Path, suffix: str) -> None:
    kill_and_resume("scgpt", *more_cells(tmp_path, suffix), CELLS | {"update": True}, kills=20, seed=1)


# Moments that are rarely drawn


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_update_between_the_old_result_and_the_new(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is out of the way already; what was known from it is in the work folder."""
    data, out = more_cells(tmp_path, suffix)
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target == out:
            raise Killed
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            cf.embed_file(data, "scgpt", out=out, update=True, part_rows=PART_ROWS, **CELLS)
    if suffix == ".npy":  # no array, rather than one beside the names of another
        assert not out.exists()
    numbers = computed(monkeypatch)
    assert cf.embed_file(data, "scgpt", out=out, update=True, resume=True, **CELLS).rows == 43
    assert numbers == []


@pytest.mark.parametrize("call", [1, 2, 3])
def test_merge_while_it_tidies_up(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is there; the shards, or some of them, are too."""
    data, out = cells(tmp_path, ".npy")
    for i in (1, 2):
        cf.embed_file(data, "scgpt", out=out, shard=(i, 2), part_rows=PART_ROWS, **CELLS)
    original, count = Journal.remove, 0

    def remove(self: Journal) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise Killed
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", remove)
        with pytest.raises(Killed):
            cf.merge(out)
    before = everything(out)
    assert cf.merge(out)[0].rows == 40
    assert everything(out) == before
    assert [path.name for path in tmp_path.glob("*cellfm")] + [path.name for path in tmp_path.glob("*shard*")] == []


def test_merge_that_was_killed_does_not_take_newer_shards_for_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = cells(tmp_path, ".npy")
    cf.embed_file(data, "scgpt", out=out, shard=(1, 1), part_rows=PART_ROWS, **CELLS)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", killed)
        with pytest.raises(Killed):
            cf.merge(out)
    write_cells(data, 20)
    cf.embed_file(data, "scgpt", out=out, shard=(1, 1), part_rows=PART_ROWS, overwrite=True, **CELLS)
    assert cf.merge(out, overwrite=True)[0].rows == 20


def test_merge_that_was_killed_when_the_result_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = cells(tmp_path, ".parquet")
    cf.embed_file(data, "scgpt", out=out, shard=(1, 1), part_rows=PART_ROWS, **CELLS)
    original = sinks.write

    def write(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sinks, "write", write)
        with pytest.raises(Killed):
            cf.merge(out)
    assert cf.merge(out)[0].rows == 40
