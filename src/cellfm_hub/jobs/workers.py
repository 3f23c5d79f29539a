"""Several devices of one machine: a process for each, which asks for one part after the other.

Every worker has a pipe of its own, and the parent alone writes the journal: a worker that dies, at whatever moment, leaves nothing locked
and nothing half done. Its parts go to the others.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from cellfm_hub._settings import settings
from cellfm_hub.errors import CellFMError, DeviceError
from cellfm_hub.jobs.job import Done, Spec, Wanted, open_job
from cellfm_hub.jobs.journal import Part

logger = logging.getLogger("cellfm_hub")

GRACE = 10.0
"""Seconds that a worker has to end by itself."""


@dataclass
class _Worker:
    device: str
    process: BaseProcess
    pipe: Connection
    assigned: list[Wanted] = field(default_factory=list)


class Workers:
    """Processes that compute parts."""

    def __init__(self, workers: list[_Worker], about: dict[str, Any]) -> None:
        self._workers, self._about = workers, about
        self._overflowed: set[int] = set()
        self._last_words = ""

    @property
    def rows(self) -> int | None:
        """Inputs in all, if known."""
        rows: int | None = self._about["rows"]
        return rows

    def about(self) -> dict[str, Any]:
        """Say what decides about the vectors; see :meth:`Job.about`."""
        return self._about

    def compute(self, wanted: Iterable[Wanted]) -> Iterator[Done]:
        """Have parts computed; they come in any order.

        Raises
        ------
        DeviceError
            If all workers died.
        CellFMError
            What went wrong in one of them; parts that the others had begun come before.
        """
        todo, again, idle = iter(wanted), list[Wanted](), list[_Worker]()
        error: CellFMError | None = None
        ended = False

        def next_part() -> Wanted | None:
            nonlocal ended
            if error is not None:
                return None
            if again:
                return again.pop(0)
            found = None if ended else next(todo, None)
            ended = found is None
            return found

        while True:
            while idle and (part := next_part()) is not None:
                worker, part = idle.pop(0), replace(part, overflowed=tuple(sorted(self._overflowed)))
                worker.assigned.append(part)
                with suppress(OSError):  # that it is dead shows below
                    worker.pipe.send(part)
            busy = [worker for worker in self._workers if worker.assigned or worker not in idle]
            if not any(worker.assigned for worker in self._workers) and (error is not None or (ended and not again)):
                break
            if not self._workers:
                msg = f"all worker processes died{self._last_words}; use fewer devices, or smaller batch_tokens"
                raise DeviceError(msg)
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError):
                    again += self._bury(worker)
                    continue
                if kind == "next":
                    idle.append(worker)
                elif kind == "done":
                    worker.assigned.remove(content.wanted)
                    self._note_overflow(content.part)
                    yield content
                elif kind == "error":
                    error = error or content
                    self._bury(worker)
                else:
                    self._last_words = f" (the last: {content})"
                    again += self._bury(worker)
        if error is not None:
            raise error

    def _note_overflow(self, part: Part | None) -> None:
        """Remember which models turned to bfloat16, so that vectors do not depend on who draws the next part."""
        if part is None:
            return
        for place, model in enumerate(self._about["models"]):
            if part.precisions[place] != model["receipt"]["precision"]:
                self._overflowed.add(place)

    def _bury(self, worker: _Worker) -> list[Wanted]:
        """Strike a worker off; return what it leaves undone."""
        self._workers.remove(worker)
        worker.pipe.close()
        if worker.assigned:
            logger.warning("the worker on %s died; its parts are computed by others", worker.device)
        return worker.assigned


@contextmanager
def open_workers(spec: Spec, devices: Sequence[str]) -> Iterator[Workers]:
    """Start a process per device, each with the models loaded and the data open.

    Raises
    ------
    CellFMError
        If one cannot start, or computes in another precision than the others.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    for number, device in enumerate(devices):
        pipe, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(theirs, spec, device, number, len(devices), settings.model_dump()), name=f"cellfm {device}", daemon=True
        )
        process.start()
        theirs.close()
        workers.append(_Worker(device, process, pipe))
    everyone = list(workers)
    try:
        yield Workers(workers, _first_words(workers))
        for worker in workers:
            with suppress(OSError):
                worker.pipe.send(None)
        for worker in workers:
            worker.process.join(GRACE)
    finally:
        for worker in everyone:
            worker.process.terminate()
        for worker in everyone:
            worker.process.join(GRACE)
            if worker.process.is_alive():
                worker.process.kill()
            worker.pipe.close()


def _first_words(workers: Sequence[_Worker]) -> dict[str, Any]:
    """Wait until all are ready; return what they agree on."""
    about: dict[str, Any] = {}
    for worker in workers:
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            kind, content = "failed", "it died"
        if kind == "error":
            raise content
        if kind == "failed":
            msg = f"the worker on {worker.device} could not start ({content}); use fewer devices, and in a script of your own put the call"
            msg += " under: if __name__ == '__main__':"
            raise DeviceError(msg)
        precisions = [model["receipt"]["precision"] for model in content["models"]]
        if about and precisions != [model["receipt"]["precision"] for model in about["models"]]:
            msg = f"{worker.device} computes in {', '.join(precisions)}, {workers[0].device} in another precision;"
            msg += " name one with precision=, or use devices of one kind"
            raise DeviceError(msg)
        about = about or content
    return about


# In the worker


def _work(pipe: Connection, spec: Spec, device: str, number: int, workers: int, shared_settings: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    for name, value in shared_settings.items():
        setattr(settings, name, value)
    if number:  # what is to be said of the data need be said once
        logger.setLevel(logging.ERROR)
    sending = threading.Lock()

    def send(kind: str, content: Any = None) -> None:
        with sending:
            pipe.send((kind, content))

    def wanted() -> Iterator[Wanted]:
        while True:
            send("next")
            part = pipe.recv()
            if part is None:
                return
            yield part

    try:
        if device == "cpu":
            import torch

            torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
        with open_job(spec, device) as job:
            send("ready", job.about())
            for done in job.compute(wanted()):
                send("done", done)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except CellFMError as error:
        with suppress(OSError):
            send("error", error)
    except Exception as error:  # noqa: BLE001  # whatever it is, the others go on
        with suppress(OSError):
            send("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
