"""`--shard i/n` and `cellfm merge`."""

import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

import cellfm_hub as cf
from cellfm_hub.errors import InputError, OutputError
from cellfm_hub.jobs.job import Job
from cellfm_hub.jobs.journal import Journal
from cellfm_hub.jobs.shares import share_of
from file_runs import CELLS, DNA, loaded, receipt, vectors, write_cells, write_fasta


def embed_shards(data: Path, model: str, out: Path, n: int, options: dict[str, Any]) -> list[cf.Summary]:
    order = np.random.default_rng(0).permutation(n)
    return [cf.embed_file(data, model, out=out, shard=(int(i) + 1, n), part_rows=4, **options) for i in order]


def assert_same(out: Path, whole: Path, key: str, *, shards: int, atol: float) -> None:
    """Compare a merged result with that of one run."""
    np.testing.assert_allclose(vectors(out, key), vectors(whole, key), atol=atol, rtol=0)
    assert receipt(out, key) == receipt(whole, key) | {"shards": shards}
    assert names(out) == names(whole)


def names(out: Path) -> list[str]:
    if out.suffix == ".npy":
        return out.with_suffix(".ids.txt").read_text().splitlines()
    if out.suffix == ".parquet":
        return pd.read_parquet(out).index.tolist()
    return (ad.read_h5ad(out) if out.suffix == ".h5ad" else ad.read_zarr(out)).obs_names.tolist()


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".parquet", ".npy"])
def test_merge_restores_the_whole(tmp_path: Path, suffix: str) -> None:
    """Shards, made in any order, give what one run gives; their rows do not depend on the size of a part."""
    data, out, whole = write_cells(tmp_path / "cells.h5ad", 18), tmp_path / f"out{suffix}", tmp_path / "whole" / f"out{suffix}"
    whole.parent.mkdir()
    cf.embed_file(data, "scgpt", out=whole, part_rows=4, **CELLS)
    made = embed_shards(data, "scgpt", out, 4, CELLS)
    assert sorted(summary.rows for summary in made) == [4, 4, 5, 5]
    assert not out.exists()
    (summary,) = cf.merge(out)
    assert (summary.rows, summary.dim) == (18, 32)
    assert_same(out, whole, "X_scgpt", shards=4, atol=2e-6)
    assert sorted(path.name for path in tmp_path.glob("*shard*")) == []


def test_rows_of_a_shard() -> None:
    """Rows floor((i-1) N / n) to floor(i N / n): equal shares, each row once; some empty where there are more shards than rows."""
    assert [len(share_of(352, (i, 3))) for i in (1, 2, 3)] == [117, 117, 118]
    for rows in (0, 1, 5, 8191, 8192, 8193):
        for n in (1, 2, 3, 7, 100):
            shares = [share_of(rows, (i, n)) for i in range(1, n + 1)]
            assert [row for share in shares for row in share] == list(range(rows))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("part_rows", [None, 5, 1])
def test_few_rows_are_shared_out(tmp_path: Path, part_rows: int | None) -> None:
    """Fewer than a part holds; bit for bit the same where parts begin at the same rows."""
    data, out = write_cells(tmp_path / "cells.h5ad", 11), tmp_path / "out.npy"
    made = [cf.embed_file(data, "scgpt", out=out, shard=(i, 3), part_rows=part_rows, **CELLS).rows for i in (3, 1, 2)]
    assert made == [4, 3, 4]
    cf.merge(out)
    cf.embed_file(data, "scgpt", out=tmp_path / "whole.npy", part_rows=1, **CELLS)
    assert_same(out, tmp_path / "whole.npy", "", shards=3, atol=0 if part_rows == 1 else 2e-6)


def test_more_shards_than_rows(tmp_path: Path) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 2), tmp_path / "out.zarr"
    made = [cf.embed_file(data, "scgpt", out=out, shard=(i, 5), **CELLS).rows for i in range(1, 6)]
    assert made == [0, 0, 1, 0, 1]
    assert cf.merge(out)[0].rows == 2
    np.testing.assert_allclose(vectors(out, "X_scgpt"), loaded("scgpt", CELLS).encode(data), atol=2e-6, rtol=0)


def test_several_models(tmp_path: Path) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 9), tmp_path / "out.h5ad"
    names = ["scgpt", "scgpt-blood"]
    both: dict[str, Any] = {"device": "cpu", "precision": "float32", "progress": False}
    both |= {"checkpoint": dict.fromkeys(names, CELLS["checkpoint"]), "options": {"scgpt-blood": {"ties": "upper"}}}
    for i in (1, 2):
        summaries = cf.embed_file(data, names, out=out, shard=(i, 2), **both)
        assert [summary.rows for summary in summaries] == [4 if i == 1 else 5] * 2
    assert [summary.key for summary in cf.merge(out)] == ["X_scgpt", "X_scgpt-blood"]
    np.testing.assert_allclose(vectors(out, "X_scgpt"), loaded("scgpt", CELLS).encode(data), atol=2e-6, rtol=0)


def test_merge_in_place(tmp_path: Path) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 18)
    expected = loaded("scgpt", CELLS).encode(data)
    embed_shards(data, "scgpt", data, 2, CELLS)
    cf.merge(data, keep=True)
    np.testing.assert_allclose(vectors(data, "X_scgpt"), expected, atol=2e-6, rtol=0)
    assert len(list(tmp_path.glob("*shard*"))) == 2


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("n", [3, 40])
def test_sequences(tmp_path: Path, level: Any, n: int) -> None:
    """A file of sequences is counted before it is shared out."""
    data, out = write_fasta(tmp_path / "dna.fa", 17), tmp_path / "out.parquet"
    cf.embed_file(data, "nt", out=tmp_path / "whole.parquet", part_rows=4, level=level, **DNA)
    made = embed_shards(data, "nt", out, n, DNA | {"level": level})
    assert sum(summary.rows for summary in made) == 17
    assert max(summary.rows for summary in made) == -(-17 // n)
    cf.merge(out)
    got, expected = pd.read_parquet(out), pd.read_parquet(tmp_path / "whole.parquet")
    pd.testing.assert_frame_equal(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("level", [None, "variant"])
@pytest.mark.parametrize("name", ["peaks.bed", "calls.vcf"])
def test_places(tmp_path: Path, name: str, level: Any) -> None:
    """Comments and blank lines are no rows, an allele is one or two; blocks of four records lie across the ends of shards."""
    genome, data, out = tmp_path / "genome.fa", tmp_path / name, tmp_path / "out.npy"
    genome.write_text(">chr1\n" + "ACGTTGCAAC" * 30 + "\n")
    if name == "peaks.bed":
        lines = [f"chr1\t{i}\t{i + 20}\tpeak{i}" for i in range(0, 70, 7)]
        data.write_text("track name=x\n# peaks\n\n" + "\n".join(lines) + "\n\n")
    else:
        lines = [f"chr1\t{i}\t.\tA\tT{',G' if i > 50 else ''}" for i in range(1, 111, 10)]
        data.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n\n" + "\n".join(lines) + "\n")
    if name == "peaks.bed" and level == "variant":
        pytest.skip("there are no variants in a BED file")
    rows = {("peaks.bed", None): 10, ("calls.vcf", None): 34, ("calls.vcf", "variant"): 17}[name, level]
    options = {"genome": genome, "level": level, "options": {"k": 2}, "progress": False}
    whole = cf.embed_file(data, "kmer", out=tmp_path / "whole.npy", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellfm_hub.sources.sequences.BLOCK_SEQUENCES", 4)
        made = embed_shards(data, "kmer", out, 5, options)
    assert sum(summary.rows for summary in made) == whole.rows == rows
    cf.merge(out)
    assert_same(out, tmp_path / "whole.npy", "", shards=5, atol=0)


def test_nothing_to_share_out(tmp_path: Path) -> None:
    (tmp_path / "dna.fa").write_text("")
    with pytest.raises(InputError, match="no sequences"):
        cf.embed_file(tmp_path / "dna.fa", "nt", out=tmp_path / "out.npy", shard=(1, 2), **DNA)


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
    assert numbers == [0, 1, 0, 1, 2, 1, 2]
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
    with Journal(second) as journal:  # a part that got lost, and a folder under another shard's name
        before = (second / "journal.jsonl").read_bytes()
        journal.drop(journal.parts[2])
    with pytest.raises(OutputError, match=r"not rows 9 to 18.*holds 8 rows.*--shard 2/2 --overwrite"):
        cf.merge(out)
    (second / "journal.jsonl").write_bytes(before)
    first = tmp_path / "out.h5ad.shard-1-of-2"
    shutil.move(first, tmp_path / "aside")
    shutil.copytree(second, first)
    with pytest.raises(OutputError, match=r"holds shard 2/2"):
        cf.merge(out)
    shutil.rmtree(first)
    shutil.move(tmp_path / "aside", first)
    data.rename(tmp_path / "away.h5ad")
    with pytest.raises(OutputError, match="not there"):
        cf.merge(out)
    (tmp_path / "away.h5ad").rename(data)
    (tmp_path / "out.h5ad.shard-1-of-3").mkdir()
    with pytest.raises(OutputError, match="of 2 and of 3"):
        cf.merge(out)
    (tmp_path / "out.h5ad.shard-1-of-3").rmdir()
    assert cf.merge(out)[0].rows == 18


def test_a_finished_shard_that_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of an array that is queued again, before and after the merge: said, or with --resume passed over; nothing is computed."""
    data, out = write_cells(tmp_path / "cells.h5ad", 7), tmp_path / "out.npy"
    for i in (1, 2):
        cf.embed_file(data, "scgpt", out=out, shard=(i, 2), **CELLS)
    second = tmp_path / "out.npy.shard-2-of-2"

    def compute(*_: object) -> None:
        pytest.fail("it was computed again")

    with monkeypatch.context() as patch:
        patch.setattr(Job, "_compute", compute)
        with pytest.raises(OutputError, match=r"shard 2 of 2 is finished \(4 rows .*cellfm merge .*--resume.*--overwrite"):
            cf.embed_file(data, "scgpt", out=out, shard=(2, 2), **CELLS)
        assert cf.embed_file(data, "scgpt", out=out, shard=(2, 2), resume=True, **CELLS).out == second
        with pytest.raises(OutputError, match=r"the finished shard in .* was another one: pooling"):
            cf.embed_file(data, "scgpt", out=out, shard=(2, 2), resume=True, pooling="mean", **CELLS)
        merged = cf.merge(out, keep=False)
        with pytest.raises(OutputError, match=r"merged from shards, shard 2 of 2 among them.*--resume.*--overwrite"):
            cf.embed_file(data, "scgpt", out=out, shard=(2, 2), **CELLS)
        again = cf.embed_file(data, "scgpt", out=out, shard=(2, 2), resume=True, **CELLS)
        assert again == merged[0]
        with pytest.raises(OutputError, match="exists; pass --overwrite"):
            cf.embed_file(data, "scgpt", out=out, shard=(2, 2), resume=True, pooling="mean", **CELLS)
        with pytest.raises(OutputError, match=r"no shards of .* merged into it already"):
            cf.merge(out)
    assert not list(tmp_path.glob("*shard*"))
    assert not list(tmp_path.glob(".*cellfm"))
    # Whoever wants all of it again says so.
    for i in (1, 2):
        cf.embed_file(data, "scgpt", out=out, shard=(i, 2), overwrite=True, **CELLS)
    assert cf.merge(out)[0].rows == 7


@pytest.mark.parametrize("suffix", [".npy", ".h5ad"])
@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_merge_is_killed_while_it_tidies_up(tmp_path: Path, suffix: str, removed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is complete, some shards are gone: the same command comes to an end, and nothing is left."""
    data, out = write_cells(tmp_path / "cells.h5ad", 7), tmp_path / f"out{suffix}"
    for i in (1, 2, 3):
        cf.embed_file(data, "scgpt", out=out, shard=(i, 3), **CELLS)
    original, calls = Journal.remove, []

    def remove(self: Journal) -> None:
        calls.append(self)
        if len(calls) > removed:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", remove)
        patch.setattr(Journal, "__exit__", lambda self, *_: self._lock.release())  # a killed process does not tidy up
        with pytest.raises(KeyboardInterrupt):
            cf.merge(out)
    before = vectors(out, "X_scgpt")
    (summary,) = cf.merge(out)
    assert (summary.out, summary.rows, summary.dim) == (out, 7, 32)
    assert summary.receipt == receipt(out, "X_scgpt")
    np.testing.assert_array_equal(vectors(out, "X_scgpt"), before)
    assert sorted(path.name for path in tmp_path.iterdir() if "shard" in path.name or path.name.startswith(".")) == []


def test_rows_that_were_taken_out_are_no_complete_result(tmp_path: Path) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 7), tmp_path / "out.h5ad"
    cf.embed_file(data, "scgpt", out=out, **CELLS)
    result = ad.read_h5ad(out)
    result[:5].write_h5ad(out)
    with pytest.raises(OutputError, match="exists"):
        cf.embed_file(data, "scgpt", out=out, resume=True, **CELLS)


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
    assert_same(out, tmp_path / "whole.npy", "", shards=2, atol=2e-6)
