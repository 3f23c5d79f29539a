"""Data that are read once, for one model or several: rows in blocks, each block as every model takes it."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellfm_hub.adapter import CellAdapter, CellFeatures
from cellfm_hub.blocks import TokenBlock
from cellfm_hub.engine.overlap import prefetch
from cellfm_hub.genes import GeneMap
from cellfm_hub.genes.species import OBS_COLUMNS
from cellfm_hub.receipt import Tally
from cellfm_hub.request import Request
from cellfm_hub.sources.cells import CellBlock, CellData, Matrix, MatrixValues, count_blocks, find_counts, open_cells
from cellfm_hub.sources.sequences import SequenceBlock, sequence_blocks

if TYPE_CHECKING:
    from cellfm_hub.embedder import Embedder

logger = logging.getLogger("cellfm_hub")


@dataclass(frozen=True)
class Task:
    """A loaded model, and what is asked of it."""

    model: "Embedder"
    request: Request

    @property
    def fitted(self) -> bool:
        """Whether the model is fitted to the whole data set and has no vectors before all of it is read."""
        return isinstance(self.model.adapter, CellFeatures)

    @property
    def values(self) -> MatrixValues:
        """What the matrix must hold that the model reads."""
        return self.model.adapter.values if isinstance(self.model.adapter, CellAdapter) else "counts"

    def find_counts(self, cells: CellData) -> Matrix:
        """Find that matrix, and say what the user should know of it."""
        order_only = isinstance(self.model.adapter, CellAdapter) and self.model.adapter.order_only
        matrix = find_counts(cells, self.request.layer, self.values, order_only=order_only)
        for note in matrix.notes:
            logger.warning("%s: %s", self.model.name, note)
        return matrix


@dataclass(frozen=True)
class GeneMatch:
    """Which column of a matrix feeds which gene of a model, and what the receipt says of it."""

    genes: GeneMap
    facts: Mapping[str, str | int | float | bool]
    matrix: Matrix


@dataclass(frozen=True)
class Prepared:
    """Some consecutive rows, ready for :meth:`Embedder.finish`: tokens, or what a model without a network takes."""

    block: TokenBlock | SequenceBlock | CellBlock
    names: list[str]
    tally: Tally
    """Of these rows alone."""


class CellInput:
    """Cells that are open for reading. Every matrix is read once, whatever the number of models that want it."""

    def __init__(self, cells: CellData, tasks: Sequence[Task]) -> None:
        self._cells, self._tasks = cells, tasks
        self._matrices = [task.find_counts(cells) for task in tasks]
        self._matches = [
            None if task.fitted else task.model.match_genes(cells, matrix, task.request)
            for task, matrix in zip(tasks, self._matrices, strict=True)
        ]
        # What is read of one matrix in one way is read once.
        self._kinds = [(matrix.name, matrix.by_order, task.values) for task, matrix in zip(tasks, self._matrices, strict=True)]

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self._cells)

    def blocks(self, rows: range | None = None) -> Iterator[list[Prepared]]:
        """Read cells; each block comes once for every model."""
        streams = {
            kind: count_blocks(self._cells, matrix, values=task.values, rows=rows)
            for kind, matrix, task in zip(self._kinds, self._matrices, self._tasks, strict=True)
        }
        with prefetch(zip(*streams.values(), strict=True), 1) as blocks:  # one is read while the one before is tokenized
            for of_kinds in blocks:
                block = dict(zip(streams, of_kinds, strict=True))
                yield [self._prepare(i, block[kind]) for i, kind in enumerate(self._kinds)]

    def _prepare(self, place: int, block: CellBlock) -> Prepared:
        task, match, matrix = self._tasks[place], self._matches[place], self._matrices[place]
        prepared = task.model.prepare_cells(block, match, task.request)
        if match is None:
            prepared.tally.facts |= {"counts_from": matrix.name, **matrix.facts, "genes": matrix.shape[1]}
        return prepared

    def part(self, number: int, part_rows: int, share: range | None = None) -> Iterator[list[Prepared]] | None:
        """Return the blocks of the part of this number, `part_rows` rows each, of a share of all rows; ``None`` behind the last."""
        rows = range(self.rows) if share is None else share
        part = rows[number * part_rows : (number + 1) * part_rows]
        return self.blocks(part) if part else None

    def parts(self, part_rows: int, share: range | None = None) -> int:
        """Return the number of parts."""
        return -(-(self.rows if share is None else len(share)) // part_rows)


class SequenceInput:
    """Sequences that are open for reading, from the first to the last."""

    def __init__(self, data: Any, tasks: Sequence[Task]) -> None:
        self._data, self._tasks = data, tasks
        self._stream: Iterator[SequenceBlock] | None = None
        self._next = 0
        """Number of the part that comes next in the stream."""

    @property
    def rows(self) -> int | None:
        """How many there are, where that is known without reading them."""
        return len(self._data) if hasattr(self._data, "__len__") and not isinstance(self._data, str) else None

    def blocks(self) -> Iterator[list[Prepared]]:
        """Read all; each block comes once for every model."""
        return map(self._prepare, _sequences(self._data, self._tasks[0].request))

    def _prepare(self, block: SequenceBlock) -> list[Prepared]:
        return [task.model.prepare_sequences(block, task.request) for task in self._tasks]

    def part(self, number: int, part_rows: int, share: range | None = None) -> Iterator[list[Prepared]] | None:
        """Return the part of this number of a share of all rows: at most `part_rows` rows of one block; ``None`` behind the last.

        Numbers should rise: sequences are found by reading those before them.
        """
        if self._stream is None or number < self._next:
            blocks = _sequences(self._data, self._tasks[0].request)
            self._stream, self._next = _pieces(blocks if share is None else _within(blocks, share), part_rows), 0
        try:
            for piece in self._stream:
                self._next += 1
                if self._next > number:
                    return iter([self._prepare(piece)])
        except BaseException:
            self._stream = None
            raise
        return None

    def parts(self, _part_rows: int, _share: range | None = None) -> int:
        """Return the number of parts, once :meth:`part` has found the last."""
        return self._next


Input = CellInput | SequenceInput


@contextmanager
def open_input(data: Any, tasks: Sequence[Task]) -> Iterator[Input]:
    """Open what the user gave, for models of one modality.

    Raises
    ------
    InputError
        If it cannot be used.
    """
    model = tasks[0].model
    if model.modality == "cell":
        columns = {column for task in tasks if isinstance(task.model.adapter, CellAdapter) for column in task.model.adapter.obs_columns}
        columns |= set(OBS_COLUMNS)
        with open_cells(data, tuple(sorted(columns)), model.name) as cells:
            yield CellInput(cells, tasks)
    else:
        yield SequenceInput(data, tasks)


def _sequences(data: Any, request: Request) -> Iterator[SequenceBlock]:
    """Read sequences; variants as pairs where their difference is asked for, else as rows."""
    # No bases, no tokens: fine one by one. But there is no vector of nothing.
    may_be_empty = request.on_empty == "nan" or request.per_token or isinstance(data, str | Path)
    for block in sequence_blocks(data, genome=request.genome, window=request.window, may_be_empty=may_be_empty):
        yield block if block.alternatives is None or request.level == "variant" else block.alleles_as_rows()


def _within(blocks: Iterable[SequenceBlock], share: range) -> Iterator[SequenceBlock]:
    """Keep the rows of a share. What is behind it is not read."""
    start = 0
    for block in blocks if share else ():
        stop = start + len(block.names)
        if stop > share.start:
            yield block.rows(max(share.start - start, 0), share.stop - start)
        if stop >= share.stop:
            return
        start = stop


def _pieces(blocks: Iterable[SequenceBlock], rows: int) -> Iterator[SequenceBlock]:
    for block in blocks:
        for start in range(0, len(block.names), rows):
            yield block.rows(start, start + rows)
