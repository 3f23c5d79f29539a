"""`--shard i/n` and `cellfm merge`."""

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import cellfm_hub as cf
from cellfm_hub.errors import InputError, OutputError
from cellfm_hub.jobs.job import Job
from file_runs import CELLS, DNA, everything, loaded, vectors, write_cells, write_fasta


def embed_shards(data: Path, model: str, out: Path, n: int, options: dict[str, Any]) -> list[cf.Summary]:
    order = np.random.default_rng(0).permutation(n)
    return [cf.embed_file(data, model, out=out, shard=(int(i) + 1, n), part_rows=4, **options) for i in order]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".parquet", ".npy"])
def test_merge_restores_the_whole(tmp_path: Path, suffix: str) -> None:
    """Shards, made in any order, give what one run gives; one of them is even without rows."""
    data, out, whole = write_cells(tmp_path / "cells.h5ad", 18), tmp_path / f"out{suffix}", tmp_path / "whole" / f"out{suffix}"
    whole.parent.mkdir()
    cf.embed_file(data, "scgpt", out=whole, part_rows=4, **CELLS)
    made = embed_shards(data, "scgpt", out, 6, CELLS)
    assert sorted(summary.rows for summary in made) == [0, 2, 4, 4, 4, 4]
    assert not out.exists()
    (summary,) = cf.merge(out)
    assert (summary.rows, summary.dim) == (18, 32)
    assert everything(out) == everything(whole)
    assert sorted(path.name for path in tmp_path.glob("*shard*")) == []


def test_merge_in_place(tmp_path: Path) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 18)
    expected = loaded("scgpt", CELLS).encode(data)
    embed_shards(data, "scgpt", data, 2, CELLS)
    cf.merge(data, keep=True)
    np.testing.assert_allclose(vectors(data, "X_scgpt"), expected, atol=2e-6, rtol=0)
    assert len(list(tmp_path.glob("*shard*"))) == 2


@pytest.mark.parametrize("options", [DNA, DNA | {"level": "token"}], ids=["vectors", "tokens"])
def test_sequences(tmp_path: Path, options: dict[str, Any]) -> None:
    """Sequences are not counted before they are read."""
    data, out = write_fasta(tmp_path / "dna.fa", 17), tmp_path / "out.parquet"
    cf.embed_file(data, "nt", out=tmp_path / "whole.parquet", part_rows=4, **options)
    embed_shards(data, "nt", out, 3, options)
    cf.merge(out)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_shard_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 18), tmp_path / "out.npy"
    original, numbers = Job._compute, []

    def compute(self: Job, rows: Any) -> Any:
        numbers.append(rows.wanted.number)
        if len(numbers) == 2:
            raise KeyboardInterrupt
        return original(self, rows)

    monkeypatch.setattr(Job, "_compute", compute)
    with pytest.raises(KeyboardInterrupt):
        cf.embed_file(data, "scgpt", out=out, shard=(1, 2), part_rows=4, **CELLS)
    cf.embed_file(data, "scgpt", out=out, shard=(2, 2), part_rows=4, **CELLS)
    with pytest.raises(OutputError, match=r"not finished.*--shard 1/2 --resume"):
        cf.merge(out)
    with pytest.raises(OutputError, match="4 finished rows"):
        cf.embed_file(data, "scgpt", out=out, shard=(1, 2), part_rows=4, **CELLS)
    cf.embed_file(data, "scgpt", out=out, shard=(1, 2), resume=True, **CELLS)
    cf.embed_file(data, "scgpt", out=out, shard=(1, 2), resume=True, **CELLS)  # finished already
    assert numbers == [0, 2, 1, 3, 2, 4]
    assert cf.merge(out)[0].rows == 18


def test_merge_refuses(tmp_path: Path) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 18), tmp_path / "out.h5ad"
    with pytest.raises(OutputError, match="no shards of"):
        cf.merge(out)
    cf.embed_file(data, "scgpt", out=out, shard=(1, 2), part_rows=4, **CELLS)
    with pytest.raises(OutputError, match=r"1 of 2 shards.*missing: 2/2"):
        cf.merge(out)
    second = tmp_path / "out.h5ad.shard-2-of-2"
    for change, says in (({"pooling": "mean"}, "pooling was 'cls', now 'mean'"), ({"seed": 3}, "seed was 0, now 3")):
        cf.embed_file(data, "scgpt", out=out, shard=(2, 2), part_rows=4, overwrite=True, **CELLS, **change)
        with pytest.raises(OutputError, match=says):
            cf.merge(out)
    shutil.copy2(data, tmp_path / "before.h5ad")
    with h5py.File(data, "r+") as file:
        file["X/data"][-1] += 1
    cf.embed_file(data, "scgpt", out=out, shard=(2, 2), part_rows=4, overwrite=True, **CELLS)
    with pytest.raises(OutputError, match="different versions of the data"):
        cf.merge(out, overwrite=True)
    shutil.copy2(tmp_path / "before.h5ad", data)
    cf.embed_file(data, "scgpt", out=out, shard=(2, 2), part_rows=4, overwrite=True, **CELLS)
    part = next(second.glob("part-*"))
    good = part.read_bytes()
    part.write_bytes(good[:-1] + b"x")
    with pytest.raises(OutputError, match=r"damaged.*--shard 2/2"):
        cf.merge(out)
    part.write_bytes(good)
    data.rename(tmp_path / "away.h5ad")
    with pytest.raises(OutputError, match="not there"):
        cf.merge(out)
    (tmp_path / "away.h5ad").rename(data)
    (tmp_path / "out.h5ad.shard-1-of-3").mkdir()
    with pytest.raises(OutputError, match="of 2 and of 3"):
        cf.merge(out)
    (tmp_path / "out.h5ad.shard-1-of-3").rmdir()
    assert cf.merge(out)[0].rows == 18


def test_a_model_that_is_fitted_has_no_shards(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fitted to all rows"):
        cf.embed_file(write_cells(tmp_path / "cells.h5ad", 8), "pca", out=tmp_path / "out.npy", shard=(1, 2))


def test_a_model_that_surveys_the_file_has(tmp_path: Path) -> None:
    """scFoundation's bulk form brings samples to the median of all; every shard looks at all of them first."""
    from golden_cases import PORTABLE

    case = PORTABLE / "scfoundation-basic"
    data = case / "input.h5ad"
    options: dict[str, Any] = {"checkpoint": case / "checkpoint", "device": "cpu", "precision": "float32", "progress": False}
    options |= {"options": {"input_type": "bulk"}}
    out = tmp_path / "out.npy"
    cf.embed_file(data, "scfoundation", out=tmp_path / "whole.npy", part_rows=4, **options)
    embed_shards(data, "scfoundation", out, 2, options)
    cf.merge(out)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
