"""Embed a file in processes that kill themselves at chosen moments; run as a script by ``test_killed.py``.

``python interrupted.py JOB`` with JOB a JSON object: ``data``, ``model``, ``out``, ``options`` of `embed_file`, ``shards`` (0: none),
``seed``, ``kills``. First an uninterrupted run into the folder ``reference``, then one that is killed and resumed until it is done. Every
moment at which something on the disk changes counts, and one in between; the next kill is drawn among these. Whatever bears the name of
`out` already (a result to update) is there again in every round. Prints what it saw as JSON.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import cellfm_hub as cf
from cellfm_hub.jobs import job
from cellfm_hub.jobs.journal import Journal, work_folder

MOMENTS: list[tuple[Any, str]] = [
    (os, "fsync"),
    (os, "pwrite"),
    (os, "ftruncate"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "rmdir"),
    (shutil, "rmtree"),
    (job.Job, "_compute"),
]


class Moments:
    """Counts them, and ends the process at the one that is asked for."""

    def __init__(self, fatal: int | None) -> None:
        self.count, self.fatal = 0, fatal
        for place, name in MOMENTS:
            setattr(place, name, self.counted(getattr(place, name)))

    def tick(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return wrapped


class Steps:
    """The calls that make a result, one after the other. Which of them are done is noted, as a user would know."""

    def __init__(self, calls: Sequence[Callable[[], Any]], note: Path) -> None:
        self.calls, self.note = calls, note
        note.write_text("0")

    def run(self) -> None:
        for number in range(int(self.note.read_text()), len(self.calls)):
            self.calls[number]()
            self.note.write_text(str(number + 1))


def in_child(run: Callable[[], Any], fatal: int | None, report: Path) -> bool:
    """Run in a process of its own; say whether it came to its end. `report` then holds the number of moments."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            moments = Moments(fatal)
            run()
            report.write_text(str(moments.count))
            status = 0
        except BaseException:  # noqa: BLE001 - the child must say why it ended, whatever it was
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed"
    return not os.WIFSIGNALED(status)


def calls(data: Path, out: Path, todo: dict[str, Any]) -> list[Callable[[], Any]]:
    """Say what a user would call: `embed_file`, or it for every shard and then `merge`."""
    embed = partial(cf.embed_file, data, todo["model"], out=out, resume=True, **todo["options"])
    n = todo["shards"]
    if not n:
        return [embed]

    def merge() -> None:
        if not out.exists() or shards_of(out):  # killed after the last shard was removed: nothing is left to be done
            cf.merge(out)

    return [*(partial(embed, shard=(i, n)) for i in range(1, n + 1)), merge]


def shards_of(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}.shard-*"))


def bearing_its_name(out: Path) -> list[Path]:
    return [path for path in out.parent.iterdir() if path.name.lstrip(".").startswith(f"{out.stem}.")]


def remove(paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy(paths: Sequence[Path], folder: Path) -> None:
    for path in paths:
        shutil.copytree(path, folder / path.name) if path.is_dir() else shutil.copy2(path, folder / path.name)


def finished_parts(out: Path) -> set[str]:
    found = set()
    for folder in [work_folder(out), *shards_of(out)]:
        if folder.is_dir():
            with Journal(folder) as journal:
                found |= {f"{folder.name} {number}" for number in journal.parts}
    return found


def main() -> None:
    todo = json.loads(sys.argv[1])
    data, out = Path(todo["data"]), Path(todo["out"])
    notes = out.with_name("notes")
    fresh, reference = out.with_name("fresh"), out.with_name("reference") / out.name
    for folder in (notes, fresh, reference.parent):
        folder.mkdir()
    report, computed = notes / "moments", notes / "computed"

    # Which parts are computed, each time.
    original = job.Job._compute

    def noted(self: Any, rows: Any) -> Any:
        with computed.open("a") as file:
            file.write(f"{self.spec.folder.name} {rows.wanted.number}\n")
        return original(self, rows)

    job.Job._compute = noted  # type: ignore[method-assign]

    in_place = data == out
    copy(bearing_its_name(out), fresh)
    copy(bearing_its_name(out), reference.parent)
    assert in_child(Steps(calls(reference if in_place else data, reference, todo), notes / "steps").run, None, report)
    total = int(report.read_text())

    rng = np.random.default_rng(todo["seed"])
    seen = {"moments": total, "kills": 0, "computed_again": 0, "unreadable": 0, "rounds": 0}
    while seen["kills"] < todo["kills"]:
        seen["rounds"] += 1
        remove(bearing_its_name(out))  # from the beginning
        copy(sorted(fresh.iterdir()), out.parent)
        steps = Steps(calls(data, out, todo), notes / "steps")
        done = False
        while not done:
            before = finished_parts(out)
            computed.write_text("")
            fatal = int(rng.integers(1, total)) if seen["kills"] < todo["kills"] else None
            done = in_child(steps.run, fatal, report)
            seen["kills"] += not done
            seen["computed_again"] += len(before & set(computed.read_text().splitlines()))
            if in_place:
                try:
                    with h5py.File(out, "r") as file:
                        file["X"].keys() if isinstance(file["X"], h5py.Group) else file["X"][0]
                except (OSError, KeyError):
                    assert (work_folder(out) / "redo.npz").exists()
                    seen["unreadable"] += 1
    print(json.dumps(seen))  # noqa: T201


if __name__ == "__main__":
    main()
