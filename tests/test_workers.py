"""`--device cpu,cpu`: a process for each device."""

import os
import signal
import threading
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

import cellfm_hub as cf
from cellfm_hub.engine.device import choose_devices
from cellfm_hub.errors import DeviceError, InputError
from cellfm_hub.jobs import workers
from cellfm_hub.jobs.journal import Journal, work_folder
from file_runs import CELLS, DNA, everything, receipt, write_cells, write_fasta

TWO = CELLS | {"device": "cpu,cpu"}


def when_parts(out: Path, count: int, act: Any) -> threading.Thread:
    """Do something as soon as so many parts stand in the journal."""

    def wait() -> None:
        journal = work_folder(out) / "journal.jsonl"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b'{"part"') >= count:
                act()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_one_of_two_is_killed(tmp_path: Path) -> None:
    """The result is that of one process, whatever became of the other."""
    data, out = write_cells(tmp_path / "cells.h5ad", 1200), tmp_path / "out.parquet"
    cf.embed_file(data, "scgpt", out=tmp_path / "reference.parquet", part_rows=20, **CELLS)
    killed: list[int] = []

    def kill() -> None:
        child = next(child for child in active_children() if child.name.startswith("cellfm"))
        killed.append(child.pid or 0)
        os.kill(child.pid or 0, signal.SIGKILL)

    thread = when_parts(out, 3, kill)
    summary = cf.embed_file(data, "scgpt", out=out, part_rows=20, **TWO)
    thread.join(10)
    assert len(killed) == 1
    assert summary.rows == 1200
    assert out.read_bytes() == (tmp_path / "reference.parquet").read_bytes()
    assert not [child for child in active_children() if child.name.startswith("cellfm")]


def test_all_are_killed(tmp_path: Path) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 3000), tmp_path / "out.npy"

    def kill() -> None:
        for child in active_children():
            if child.name.startswith("cellfm"):
                os.kill(child.pid or 0, signal.SIGKILL)

    when_parts(out, 2, kill)
    with pytest.raises(DeviceError, match=r"all worker processes died.*--resume"):
        cf.embed_file(data, "scgpt", out=out, part_rows=20, **TWO)
    with Journal(work_folder(out)) as journal:
        assert len(journal.parts) >= 2
    cf.embed_file(data, "scgpt", out=out, resume=True, **CELLS)
    cf.embed_file(data, "scgpt", out=tmp_path / "reference.npy", part_rows=20, **CELLS)
    assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()


def test_sequences_and_errors(tmp_path: Path) -> None:
    """The end of a FASTA file is found by whoever comes to it; what is wrong with it is said once."""
    data, out = write_fasta(tmp_path / "dna.fa", 50), tmp_path / "out.parquet"
    two = DNA | {"device": "cpu,cpu"}
    cf.embed_file(data, "nt", out=out, part_rows=4, **two)
    cf.embed_file(data, "nt", out=tmp_path / "reference.parquet", part_rows=4, **DNA)
    assert out.read_bytes() == (tmp_path / "reference.parquet").read_bytes()
    assert receipt(out, "")["device"] == "cpu"
    data.write_text(data.read_text() + ">wrong\nACGT!\n")
    with pytest.raises(InputError, match=r"'!'.*--resume") as caught:
        cf.embed_file(data, "nt", out=out, part_rows=4, overwrite=True, **two)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_several_models_on_two(tmp_path: Path) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 40)
    how: dict[str, Any] = {"part_rows": 8, "checkpoint": {"scgpt": CELLS["checkpoint"]}, "options": {"pca": {"n_components": 3}}}
    how |= {"precision": "float32"}
    for folder, device in (("one", "cpu"), ("two", "cpu,cpu")):
        (tmp_path / folder).mkdir()
        cf.embed_file(data, ["pca", "scgpt"], out=tmp_path / folder / "out.zarr", device=device, **how)
    assert everything(tmp_path / "two/out.zarr") == everything(tmp_path / "one/out.zarr")


def test_devices() -> None:
    assert choose_devices("cpu") == ["cpu"]
    assert choose_devices("cpu, cpu") == ["cpu", "cpu"]
    assert choose_devices("all")
    with pytest.raises(DeviceError, match="cuda:9"):
        choose_devices("cpu,cuda:9")


class Pipe:
    """The parent's end of a worker's pipe, for a worker that is only told."""

    def __init__(self, *messages: Any) -> None:
        self.messages, self.sent, self.closed = list(messages), [], False

    def recv(self) -> Any:
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, part: Any) -> None:
        self.sent.append(part)

    def close(self) -> None:
        self.closed = True


def test_what_a_dead_worker_leaves_goes_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes: one worker dies with two parts in hand, the other does them; none is done twice."""
    from cellfm_hub.jobs.job import Done, Wanted

    wanted = [Wanted(i) for i in range(4)]
    dying = Pipe(("next", None), ("next", None))
    living = Pipe(*[message for part in (0, 1, 2, 3) for message in (("next", None), ("done", Done(wanted[part], None)))], ("next", None))
    team = [workers._Worker("a", None, dying), workers._Worker("b", None, living)]  # type: ignore[arg-type]
    monkeypatch.setattr(workers, "wait", lambda pipes: pipes[:1])
    done = [done.wanted.number for done in workers.Workers(team, {"rows": None}).compute(wanted)]
    assert sorted(done) == [0, 1, 2, 3]
    assert dying.closed
