"""One process's share of a run: models loaded, data open, parts computed and written on demand."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellfm_hub import safe_files
from cellfm_hub.api import load
from cellfm_hub.blocks import TokenBlock, Vectors, cut_by_tokens, select_inputs
from cellfm_hub.engine.device import Precision
from cellfm_hub.engine.overlap import prefetch
from cellfm_hub.errors import CellFMError, InputError
from cellfm_hub.jobs import parts as files
from cellfm_hub.jobs.content import Content, digest, token_content
from cellfm_hub.jobs.journal import Part
from cellfm_hub.jobs.known import Known
from cellfm_hub.jobs.shares import Shard, share_of
from cellfm_hub.reading import CellInput, Input, Prepared, Task, open_input
from cellfm_hub.receipt import Tally
from cellfm_hub.request import EncodeOptions, Level
from cellfm_hub.tokens import Ragged

PART_ROWS = 8192
"""Rows of a part, eight blocks of a file of cells: seconds on a GPU. What a crash costs at most."""

TOKEN_BYTES = 256 * 2**20
"""Vectors of single tokens that are in memory at a time, if not of one row alone."""


@dataclass(frozen=True)
class ModelSpec:
    """One model of a run, as the user asked for it."""

    name: str
    key: str
    checkpoint: Path | None
    revision: str | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """What a run computes. It can be sent to another process."""

    data: Path
    models: tuple[ModelSpec, ...]
    precision: Precision
    seed: int
    level: Level | None
    encode: EncodeOptions
    """The other options of :meth:`Embedder.encode`."""
    part_rows: int
    shard: Shard | None
    """Which share of the rows is computed; ``None`` for all."""
    rows: int | None
    """Of the whole file, where they had to be counted to know the share."""
    folder: Path
    """Where parts go."""
    update: bool
    """Whether `folder` holds earlier results to take vectors from."""
    qc: bool
    """Whether what the models saw of each cell is written too."""


@dataclass(frozen=True)
class Wanted:
    """A part to compute."""

    number: int
    content: str | None = None
    """The part is there, made from rows of this hash: it is computed only if they changed."""
    strict: bool = False
    """They must not have changed."""
    overflowed: tuple[int, ...] = ()
    """Models, by their place, that overflowed in another process: they turn to bfloat16 here too."""


@dataclass(frozen=True)
class Done:
    """What became of a part."""

    wanted: Wanted
    part: Part | None
    """``None``: it is there already, or there is no such part."""
    total: int | None = None
    """How many parts there are, where the wanted one is behind the last."""
    facts: list[dict[str, Any]] | None = None
    """Of a part that is there already: what is said of the file it was compared with, for every model in turn."""


@dataclass(frozen=True)
class _Rows:
    """A part that was read."""

    wanted: Wanted
    blocks: list[list[Prepared]]
    contents: list[list[Content | None]]
    digest: str
    total: int | None = None


class Job:
    """Loaded models and open data."""

    def __init__(self, spec: Spec, tasks: list[Task], source: Input) -> None:
        self.spec, self.tasks, self.source = spec, tasks, source
        self.share = None if spec.shard is None else share_of(self.rows or 0, spec.shard)
        self.fitted = [i for i, task in enumerate(tasks) if task.fitted]
        self._known: dict[int, Known] = {}
        self.collected: dict[int, list[Prepared]] | None = None
        """Rows for models that are fitted, while they pass by."""

    @property
    def rows(self) -> int | None:
        """Inputs of the whole file, if known."""
        return self.source.rows if self.spec.rows is None else self.spec.rows

    def about(self) -> dict[str, Any]:
        """Say what decides about the vectors, beside the data: to be compared by a run that goes on."""
        return {
            "per_token": self.tasks[0].request.per_token,
            "modality": self.tasks[0].model.modality,
            "rows": self.rows,
            "models": [self._about(spec, task) for spec, task in zip(self.spec.models, self.tasks, strict=True)],
        }

    def _about(self, spec: ModelSpec, task: Task) -> dict[str, Any]:
        request, model = task.request, task.model
        return {
            "name": model.name,
            "key": spec.key,
            "fitted": task.fitted,
            "receipt": model.receipt_of(request) | ({"qc": True} if self.spec.qc else {}),
            "files": {name: safe_files.sha256(path) for name, path in sorted(model.files.used.items()) if path.is_file()},
            "batch_tokens": request.batch_tokens,
        }

    def compute(self, wanted: Iterable[Wanted]) -> Iterator[Done]:
        """Compute parts, one after the other, and write them. The next ones are read meanwhile."""
        with prefetch(self._read(wanted), 1) as stream:
            for rows in stream:
                if rows.total is not None:
                    yield Done(rows.wanted, None, rows.total)
                elif rows.digest == rows.wanted.content:
                    yield Done(rows.wanted, None, facts=[tally.facts for tally in self._tallies(rows)])
                else:
                    yield Done(rows.wanted, self._compute(rows))

    def contents(self) -> Iterator[list[Content | None]]:
        """Read all rows, without computing anything: what each model would see of them, a block at a time."""
        assert isinstance(self.source, CellInput)
        return map(_contents, self.source.blocks())

    def _read(self, wanted: Iterable[Wanted]) -> Generator[_Rows]:
        for want in wanted:
            try:
                blocks = self.source.part(want.number, self.spec.part_rows, self.share)
                read = None if blocks is None else list(blocks)
            except CellFMError:
                raise
            except OSError as error:
                msg = f"{self.spec.data} cannot be read ({' '.join(str(error).split())}); it is damaged, or was cut short or taken away"
                raise InputError(msg) from error
            if read is None:
                yield _Rows(want, [], [], "", self.source.parts(self.spec.part_rows, self.share))
                continue
            contents = [_contents(block) for block in read]
            found = digest(read, contents)
            if want.strict and found != want.content:
                msg = f"{self.spec.data} changed since the run began, in the rows of part {want.number}; pass --overwrite to begin anew"
                raise InputError(msg)
            yield _Rows(want, read, contents, found)

    def _compute(self, rows: _Rows) -> Part:
        number = rows.wanted.number
        for place in rows.wanted.overflowed:
            self.tasks[place].model.turn_to_bfloat16()
        names = [name for block in rows.blocks for name in block[0].names]
        if self.tasks[0].request.per_token:
            file = self.spec.folder / f"part-{number:06d}.parquet"
            width = self._write_tokens(file, rows)
            sha256, widths, tallies = files.sha256(file), [width], self._tallies(rows)
        else:
            file = self.spec.folder / f"part-{number:06d}.npz"
            vectors = [None if task.fitted else self._vectors(i, rows) for i, task in enumerate(self.tasks)]
            contents = [None if of[0] is None else np.concatenate(of) for of in zip(*rows.contents, strict=True)]
            tallies = self._tallies(rows)
            sha256 = files.write_vectors(file, names, vectors, contents, [tally.cells for tally in tallies])
            widths = [0 if array is None else array.shape[1] for array in vectors]
        if self.collected is not None:
            for i in self.fitted:
                self.collected.setdefault(i, []).extend(block[i] for block in rows.blocks)
        told = [tally.as_json() for tally in tallies]
        return Part(number, file.name, sha256, len(names), rows.digest, told, widths, self._precisions(tallies))

    def _tallies(self, rows: _Rows) -> list[Tally]:
        tallies = [Tally() for _ in self.tasks]
        for block in rows.blocks:
            for tally, prepared in zip(tallies, block, strict=True):
                tally.add(prepared.tally)
        return tallies

    def _precisions(self, tallies: list[Tally]) -> list[str]:
        """Say what the vectors of a part were computed in; those of earlier results, in what the model computes in now."""
        return ["+".join(tally.precisions) or task.model.precision for tally, task in zip(tallies, self.tasks, strict=True)]

    def _vectors(self, place: int, rows: _Rows) -> Vectors:
        task, found = self.tasks[place], []
        if self.spec.update and place not in self._known:
            self._known[place] = Known(self.spec.folder, place)
        known = self._known.get(place)
        for block, contents in zip(rows.blocks, rows.contents, strict=True):
            compute = partial(_finish_some, task, block[place])
            content = contents[place]
            found.append(compute(None) if known is None or content is None else known.complete(content, compute))
        return np.concatenate(found)

    def _write_tokens(self, file: Path, rows: _Rows) -> int:
        task = self.tasks[0]
        most = max(TOKEN_BYTES // (4 * task.model.embedding_dim), 1)
        width = 0
        with files.token_part(file) as table:
            for (prepared,) in rows.blocks:
                assert isinstance(prepared.block, TokenBlock)
                for piece in cut_by_tokens(prepared.block, most):
                    values = task.model.finish(replace(prepared, block=piece, names=piece.names), task.request)
                    assert isinstance(values, Ragged)
                    table.add(piece.names, values)
                    width = values.values.shape[1]
        return width

    def fit(self) -> Iterator[Part]:
        """Compute models that are fitted to all rows, from what was collected, or from another pass over the data."""
        collected = self.collected
        if collected is None:
            assert isinstance(self.source, CellInput)
            collected = {i: [] for i in self.fitted}
            for block in self.source.blocks():
                for i in self.fitted:
                    collected[i].append(block[i])
        for i in self.fitted:
            task, prepared, tally = self.tasks[i], collected.pop(i), Tally()
            for some in prepared:
                tally.add(some.tally)
            names = [name for some in prepared for name in some.names]
            vectors = task.model.fit([some.block for some in prepared], task.request, tally)  # type: ignore[misc]
            file = self.spec.folder / f"fitted-{i}.npz"
            sha256 = files.write_vectors(file, names, [vectors], [None], [tally.cells])
            yield Part(i, file.name, sha256, len(names), "", [tally.as_json()], [vectors.shape[1]], [task.model.precision])


def _contents(block: Sequence[Prepared]) -> list[Content | None]:
    return [token_content(prepared.block) if isinstance(prepared.block, TokenBlock) else None for prepared in block]


def _finish_some(task: Task, prepared: Prepared, index: NDArray[np.int64] | None) -> Vectors:
    """Compute some rows of a block, or all."""
    if index is not None:
        assert isinstance(prepared.block, TokenBlock)
        block = select_inputs(prepared.block, index)
        prepared = replace(prepared, block=block, names=block.names)
    vectors = task.model.finish(prepared, task.request)
    assert isinstance(vectors, np.ndarray)
    return vectors


@contextmanager
def open_job(spec: Spec, device: str) -> Iterator[Job]:
    """Load the models and open the data.

    Raises
    ------
    CellFMError
        If either is not possible.
    """
    tasks = []
    for model in spec.models:
        embedder = load(
            model.name,
            device=device,
            precision=spec.precision,
            checkpoint=model.checkpoint,
            revision=model.revision,
            options=model.options,
            seed=spec.seed,
        )
        tasks.append(Task(embedder, embedder.request(level=spec.level, **spec.encode)))
    with open_input(spec.data, tasks) as source:
        yield Job(spec, tasks, source)
