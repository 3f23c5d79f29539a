"""Runs that are killed, interrupted or fail: nothing is lost, nothing is computed twice, the result is that of an uninterrupted run."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest

import cellfm_hub as cf
from cellfm_hub.errors import CountsError, InputError, OutputError, SequenceError
from cellfm_hub.jobs import in_place
from cellfm_hub.jobs.job import Job
from cellfm_hub.jobs.journal import Journal, work_folder
from cellfm_hub.sources.matrix import Matrix
from file_runs import CELLS, DNA, computed, receipt, stop_after, vectors, write_cells, write_fasta

HERE = Path(__file__).parent


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "cells.h5ad", 40)


def left(out: Path) -> list[str]:
    return sorted(path.name for path in work_folder(out).glob("part-??????.*") if path.suffix != ".tmp")


# In place


def test_hdf5_file_survives_every_moment(tmp_path: Path) -> None:
    """In place: whichever write is the last, the file is the old one or the new one, or is made the new one by the redo log."""
    original = write_cells(tmp_path / "original.h5ad", 30)
    path, log = tmp_path / "cells.h5ad", tmp_path / "redo.npz"
    before = original.read_bytes()

    class Crash(BaseException):
        pass

    def change(fatal: int | None) -> int:
        """Write a dataset, and replace it; stop at a write or sync. Return how many there were."""
        count = 0

        def counted(function: Any) -> Any:
            def wrapped(*arguments: Any) -> Any:
                nonlocal count
                count += 1
                if count == fatal:
                    raise Crash
                return function(*arguments)

            return wrapped

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "ftruncate", lambda *_: None)  # nor does a killed process tidy up
            patch.setattr(os, "utime", lambda *_, **__: None)
            patch.setattr(os, "pwrite", counted(os.pwrite))
            patch.setattr(os, "fsync", counted(os.fsync))
            with in_place.changing(path, log) as file:
                file.create_dataset("obsm/X_new", data=np.ones((30, 16), np.float32))
                del file["obs/batch"]
        return count

    shutil.copy2(original, path)
    total = change(None)
    with h5py.File(path) as file:
        assert file["obsm/X_new"].shape == (30, 16)
    assert total > 5
    old = new = 0
    for fatal in range(1, total + 1):
        log.unlink(missing_ok=True)
        shutil.copy2(original, path)
        stamp = path.stat()
        with pytest.raises(Crash):
            change(fatal)
        if log.exists():
            in_place.redo(path, log)
            in_place.redo(path, log)
            new += 1
            with h5py.File(path) as file:
                assert file["obsm/X_new"][29, 15] == 1
                assert "batch" not in file["obs"]
        else:
            old += 1
            with h5py.File(path) as file:
                assert "obsm/X_new" not in file
            in_place.drop_leftovers(path, size=stamp.st_size, mtime_ns=stamp.st_mtime_ns)
            assert path.read_bytes() == before
    assert old
    assert new


def test_redo_spares_a_file_that_others_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, log = write_cells(tmp_path / "cells.h5ad", 10), tmp_path / "redo.npz"
    with in_place.changing(path, log) as file:
        file.create_dataset("obsm/X_new", data=np.ones((10, 4)))
    with h5py.File(path, "r+") as file:
        for i in range(50):
            file.create_group(f"uns/other-{i}")
    now = path.read_bytes()
    with pytest.raises(OutputError, match="changed since"):
        in_place.redo(path, log)
    assert path.read_bytes() == now


# Interrupted


def test_interrupt_leaves_finished_parts(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, options = tmp_path / "out.npy", CELLS | {"part_rows": 8}
    cf.embed_file(cells, "scgpt", out=tmp_path / "reference.npy", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt, match=r"16 rows are finished.*--resume"):
            cf.embed_file(cells, "scgpt", out=out, **options)
    assert left(out) == ["part-000000.npz", "part-000001.npz"]
    assert not out.exists()
    with pytest.raises(OutputError, match=r"16 finished rows.*--resume.*--overwrite"):
        cf.embed_file(cells, "scgpt", out=out, **options)
    numbers = computed(monkeypatch)
    done = cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    assert numbers == [2, 3, 4]
    assert done.rows == 40
    assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()
    assert receipt(out, "X_scgpt") == receipt(tmp_path / "reference.npy", "X_scgpt")
    assert not work_folder(out).exists()
    # Asked again, there is nothing to do; asked for something else, there is.
    again = cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    assert (numbers, again.rows, again.receipt) == ([2, 3, 4], 40, done.receipt)
    with pytest.raises(OutputError, match="exists"):
        cf.embed_file(cells, "scgpt", out=out, resume=True, pooling="mean", **CELLS)


def test_overwrite_begins_anew(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, part_rows=8, **CELLS)
    numbers = computed(monkeypatch)
    cf.embed_file(cells, "scgpt", out=out, part_rows=8, overwrite=True, **CELLS)
    assert numbers == [0, 1, 2, 3, 4]


def test_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT to the command: exit code 130, one line that says how to go on, and going on computes just what is not finished."""
    data, out = write_cells(tmp_path / "cells.h5ad", 3000), tmp_path / "out.npy"
    environment = os.environ | {"CELLFM_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    arguments = ["--checkpoint", CELLS["checkpoint"], "--device", "cpu", "--precision", "float32", "--part-rows", "20", "-o", out]
    command = [sys.executable, "-m", "cellfm_hub.cli", "embed", str(data), "--model", "scgpt", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while len(left(out)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("cellfm: interrupted; ")
    assert "--resume" in errors
    assert "Traceback" not in errors
    with Journal(work_folder(out)) as journal:
        finished = sorted(part.file for part in journal.parts.values())
    # The signal may come between a part and its line in the journal: that part alone is computed again.
    assert finished
    assert left(out)[: len(finished)] == finished
    assert len(left(out)) <= len(finished) + 1
    numbers = computed(monkeypatch)
    cf.embed_file(data, "scgpt", out=out, resume=True, **CELLS)
    assert numbers == list(range(len(finished), 150))
    np.testing.assert_allclose(
        vectors(out, ""), cf.load("scgpt", **{k: v for k, v in CELLS.items() if k != "progress"}).encode(data), atol=2e-6
    )


# Refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pooling": "mean"}, "pooling was 'cls', now 'mean'"),
        ({"output_layer": 0}, "output_layer"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"options": {"ties": "upper"}}, "options"),
        ({"precision": "bfloat16"}, "precision was 'float32', now 'bfloat16'"),
        ({"key_added": "X_other"}, "X_other"),
        ({"part_rows": 9}, "part_rows was 8, now 9"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_options_are_refused(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str) -> None:
    out = tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, **CELLS | {"part_rows": 8})
    with pytest.raises(OutputError, match=says) as caught:
        cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS | change)
    assert "--overwrite" in str(caught.value)
    assert len(left(out)) == 1


def test_other_weights_and_versions_are_refused(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, checkpoint = tmp_path / "out.npy", tmp_path / "checkpoint"
    shutil.copytree(CELLS["checkpoint"], checkpoint)
    options = CELLS | {"checkpoint": checkpoint}
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, part_rows=8, **options)
    with monkeypatch.context() as patch:
        patch.setattr("cellfm_hub.jobs.run.versions", lambda: {"cellfm_hub_version": "0.0", "torch_version": "1"})
        with pytest.raises(OutputError, match="cellfm_hub_version was"):
            cf.embed_file(cells, "scgpt", out=out, resume=True, **options)
    import torch

    weights = torch.load(checkpoint / "best_model.pt", weights_only=True)  # noqa: TID251
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    torch.save(weights, checkpoint / "best_model.pt")
    with pytest.raises(OutputError, match="weights_sha256 was"):
        cf.embed_file(cells, "scgpt", out=out, resume=True, **options)


def test_other_input_is_refused(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, part_rows=8, **CELLS)
    before = cells.read_bytes()
    with h5py.File(cells, "r+") as file:
        file["X/data"][-1] += 1
    with pytest.raises(InputError, match="not the file that the interrupted run"):
        cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    cells.write_bytes(before)  # another time of change, the same content
    assert cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS).rows == 40


def test_a_large_file_that_was_touched_is_compared(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file too large to be hashed whole, the rows that are finished are read again."""
    monkeypatch.setattr("cellfm_hub.jobs.fingerprint.WHOLE", 2048)
    monkeypatch.setattr("cellfm_hub.jobs.fingerprint.STRETCH", 16)
    out = tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, part_rows=8, **CELLS)
    os.utime(cells)
    numbers = computed(monkeypatch)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    assert numbers == [2]
    with h5py.File(cells, "r+") as file:
        row = file["X/indptr"][3]
        file["X/data"][row] += 1
    with pytest.raises(InputError, match=r"changed since the run began|is not the file"):
        cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)


# Faults


def raise_at_row(monkeypatch: pytest.MonkeyPatch, row: int, error: Exception) -> None:
    """Make reading fail at a row."""
    original = Matrix.rows

    def rows(self: Matrix, start: int, stop: int) -> Any:
        if start <= row < stop and stop - start <= 8:  # not the look at the beginning
            raise error
        return original(self, start, stop)

    monkeypatch.setattr(Matrix, "rows", rows)


def test_reader_raises_at_a_row(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.npy"
    cf.embed_file(cells, "scgpt", out=tmp_path / "reference.npy", part_rows=8, **CELLS)
    with monkeypatch.context() as patch:
        raise_at_row(patch, 20, InputError(f"{cells} cannot be read"))
        with pytest.raises(InputError, match=r"cannot be read.*16 rows are finished.*--resume") as caught:
            cf.embed_file(cells, "scgpt", out=out, part_rows=8, **CELLS)
    assert "\n" not in str(caught.value)
    assert len(left(out)) == 2
    numbers = computed(monkeypatch)
    cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    assert numbers == [2, 3, 4]
    assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()


def test_a_mended_file_goes_on(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is no count at row 20; mended, the rows before it are compared and kept."""
    out, good = tmp_path / "out.npy", cells.read_bytes()
    cf.embed_file(cells, "scgpt", out=tmp_path / "reference.npy", part_rows=8, **CELLS)
    broken = ad.read_h5ad(cells)
    broken.X[20, broken.X[20].indices[0]] = -1
    broken.write_h5ad(cells)
    monkeypatch.setattr("cellfm_hub.sources.counts._SAMPLE_WINDOWS", 2)
    monkeypatch.setattr("cellfm_hub.sources.counts._SAMPLE_ROWS", 8)
    with pytest.raises(CountsError, match=r"negative.*16 rows are finished"):
        cf.embed_file(cells, "scgpt", out=out, part_rows=8, **CELLS)
    cells.write_bytes(good)
    numbers = computed(monkeypatch)
    cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    assert numbers == [2, 3, 4]
    assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()


def test_sequences_that_break_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before the break is written by itself; once mended, only what is missing is computed."""
    data, out = write_fasta(tmp_path / "dna.fa", 40), tmp_path / "out.parquet"
    good = data.read_text()
    cf.embed_file(data, "nt", out=tmp_path / "reference.parquet", part_rows=8, **DNA)
    data.write_text("".join(good.splitlines(keepends=True)[:50]) + ">wrong\nACGT!\n")
    with pytest.raises(SequenceError, match=r"'!'.*24 rows before that place stand in .*out.partial.parquet.*--resume"):
        cf.embed_file(data, "nt", out=out, part_rows=8, **DNA)
    expected = vectors(tmp_path / "reference.parquet", "")
    np.testing.assert_array_equal(vectors(tmp_path / "out.partial.parquet", ""), expected[:24])
    data.write_text(good)
    numbers = computed(monkeypatch)
    cf.embed_file(data, "nt", out=out, resume=True, **DNA)
    assert numbers == [3, 4]
    assert out.read_bytes() == (tmp_path / "reference.parquet").read_bytes()


def test_truncated_h5ad(cells: Path, tmp_path: Path) -> None:
    cells.write_bytes(cells.read_bytes()[:-2000])
    with pytest.raises(InputError) as caught:
        cf.embed_file(cells, "scgpt", out=tmp_path / "out.npy", **CELLS)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["cells.h5ad"]


def test_input_changed_under_way(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, out = Job._compute, tmp_path / "out.npy"

    def compute(self: Job, rows: Any) -> Any:
        if rows.wanted.number == 2:
            os.utime(cells)
        return original(self, rows)

    monkeypatch.setattr(Job, "_compute", compute)
    with pytest.raises(InputError, match=r"was changed or taken away.*16 rows are finished"):
        cf.embed_file(cells, "scgpt", out=out, part_rows=8, **CELLS)


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """Give a function that limits the size of the files of this process, as a full disk would."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".h5ad", ".zarr", "in place"])
def test_full_disk(cells: Path, tmp_path: Path, suffix: str, full_disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts have room, the result has not."""
    big = write_cells(tmp_path / "big.h5ad", 400)
    out = big if suffix == "in place" else tmp_path / f"out{suffix}"
    before, stamp = big.read_bytes(), big.stat()
    cf.embed_file(cells, "scgpt", out=tmp_path / "warm.npy", **CELLS)  # compiled, hashed
    full_disk((len(before) + 4000) if suffix == "in place" else 40_000)
    with pytest.raises(OutputError, match=r"cannot be written.*--resume") as caught:
        cf.embed_file(big, "scgpt", out=out, part_rows=100, **CELLS)
    assert "\n" not in str(caught.value)
    assert len(left(out)) == 4
    assert big.read_bytes() == before
    assert big.stat().st_mtime_ns == stamp.st_mtime_ns
    full_disk(resource.RLIM_INFINITY)
    numbers = computed(monkeypatch)
    cf.embed_file(big, "scgpt", out=out, resume=True, **CELLS)
    assert numbers == []
    assert vectors(out, "X_scgpt").shape == (400, 32)


def test_full_disk_while_computing(cells: Path, tmp_path: Path, full_disk: Any) -> None:
    out = tmp_path / "out.npy"
    cf.embed_file(cells, "scgpt", out=tmp_path / "reference.npy", part_rows=8, **CELLS)
    full_disk(1500)  # a journal of one part, and no part
    with pytest.raises(OutputError, match="cannot be written"):
        cf.embed_file(cells, "scgpt", out=out, part_rows=8, **CELLS)
    full_disk(resource.RLIM_INFINITY)
    cf.embed_file(cells, "scgpt", out=out, resume=True, part_rows=8, **CELLS)
    assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()


def test_damaged_part_is_computed_again(cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            cf.embed_file(cells, "scgpt", out=out, part_rows=8, **CELLS)
    part = work_folder(out) / "part-000001.npz"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    journal = work_folder(out) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"part": {"numb')  # a line cut short
    numbers = computed(monkeypatch)
    cf.embed_file(cells, "scgpt", out=out, resume=True, **CELLS)
    assert numbers == [1, 3, 4]


def test_second_process_is_refused(cells: Path, tmp_path: Path) -> None:
    """Two processes that write one result: the second is refused at once. A dead one blocks nobody."""
    out = tmp_path / "out.npy"
    hold = (
        "import sys, time; from pathlib import Path; from cellfm_hub.jobs.journal import Journal, work_folder\n"
        f"with Journal(work_folder(Path({str(out)!r}))): print('held', flush=True); time.sleep(300)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        begin = time.monotonic()
        with pytest.raises(OutputError, match="another process writes the same result"):
            cf.embed_file(cells, "scgpt", out=out, **CELLS, **flags)
        assert time.monotonic() - begin < 5
    other.kill()
    other.communicate()
    assert cf.embed_file(cells, "scgpt", out=out, **CELLS).rows == 40


def test_file_open_elsewhere_is_refused(cells: Path, tmp_path: Path) -> None:
    """In place: nobody may be reading the file while its index changes."""
    hold = f"import h5py, time\nwith h5py.File({str(cells)!r}): print('held', flush=True); time.sleep(300)"
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(OutputError, match=r"another program has it open.*--resume"):
            cf.embed_file(cells, "scgpt", out=cells, **CELLS)
    finally:
        other.kill()
        other.communicate()
    assert cf.embed_file(cells, "scgpt", out=cells, resume=True, **CELLS).rows == 40
