"""Embed a file in processes that kill themselves at chosen moments; run as a script by ``test_resume.py``.

``python interrupted.py JOB`` with JOB a JSON object: ``data``, ``model``, ``out``, ``options`` of `embed_file`, ``seed``, ``kills``.
First an uninterrupted run into a copy of the folder, then a run that is killed and resumed until it is done. Every moment at which
something on the disk changes counts, and one in between; the next kill is drawn among these. Prints what it saw as JSON.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
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
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed"
    return not os.WIFSIGNALED(status)


def main() -> None:
    todo = json.loads(sys.argv[1])
    data, out, options = Path(todo["data"]), Path(todo["out"]), todo["options"]
    report, computed = out.with_name("moments.txt"), out.with_name("computed.txt")

    # Which parts are computed, each time.
    original = job.Job._compute

    def noted(self: Any, rows: Any) -> Any:
        with computed.open("a") as file:
            file.write(f"{rows.wanted.number}\n")
        return original(self, rows)

    job.Job._compute = noted  # type: ignore[method-assign]

    reference = out.with_name("reference") / out.name
    reference.parent.mkdir()
    in_place = data == out
    source = Path(shutil.copy2(data, reference)) if in_place else data
    assert in_child(lambda: cf.embed_file(source, todo["model"], out=reference, **options), None, report)
    total = int(report.read_text())

    rng = np.random.default_rng(todo["seed"])
    seen = {"moments": total, "kills": 0, "computed_again": 0, "unreadable": 0, "rounds": 0}
    while seen["kills"] < todo["kills"]:
        seen["rounds"] += 1
        if seen["rounds"] > 1:  # from the beginning
            shutil.copy2(reference.with_name("fresh"), out) if in_place else None
            if not in_place:
                shutil.rmtree(out) if out.is_dir() else out.unlink()
        elif in_place:
            shutil.copy2(data, reference.with_name("fresh"))
        done = False
        while not done:
            with Journal(work_folder(out)) as journal:
                before = set(journal.parts)
            computed.write_text("")
            fatal = int(rng.integers(1, total)) if seen["kills"] < todo["kills"] else None
            done = in_child(lambda: cf.embed_file(data, todo["model"], out=out, resume=True, **options), fatal, report)
            seen["kills"] += not done
            seen["computed_again"] += len(before & set(map(int, computed.read_text().split())))
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
