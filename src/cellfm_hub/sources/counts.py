"""Which matrix holds raw counts, and its blocks, every value checked.

Looked at, in this order: ``layers["counts"]``; other layers, those with a usual name for counts first, then by name; ``raw.X``; ``X``.
The first that holds non-negative whole numbers is taken, unless ``raw.X`` or ``X`` holds the same counts of more genes. Where none does,
the first whose values are normalised counts is taken, and the counts are recovered from it (see :mod:`~cellfm_hub.sources.recovery`).
Normalised values that were rounded are whole numbers, but no counts: they are recovered too, or refused (see
:mod:`~cellfm_hub.sources.rounded`).

Layers of RNA velocity hold a part of the counts and are taken only when ``layer=`` names them. Whole numbers that look like something
else (zeros and ones, bins, ranks) are taken from ``layers["counts"]``, ``raw.X`` or ``X`` if there is nothing better, with
a warning, and never from another layer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellfm_hub.errors import CountsError, InputError
from cellfm_hub.genes import CountMatrix
from cellfm_hub.sources.matrix import CellBlock, CellData, Matrix
from cellfm_hub.sources.recovery import Scaling, recognise
from cellfm_hub.sources.rounded import recognise_gaps, recognise_totals

BLOCK_ROWS = 1024
"""Cells that are read, tokenized and sorted together. Larger blocks are slower: their arrays no longer come from memory in use before."""

MatrixValues = Literal["counts", "abundances", "log values"]
"""What a model reads: whole numbers; any numbers from 0 up, as bulk data are; logarithms of normalised counts."""

_COUNT_NAMES = ("counts", "raw_counts", "counts_raw", "raw_count", "count", "umi_counts", "umis", "umi", "raw")
"""Usual names of layers with counts, best first, in lower case."""

_PARTS = {
    *("spliced", "unspliced", "ambiguous", "spanning"),  # velocyto, STARsolo, scVelo
    *("mature", "nascent"),  # kallisto
    *("exon", "exons", "exonic", "intron", "introns", "intronic"),
}
"""Words in the names of layers that hold a part of the counts."""

_SAMPLE_WINDOWS, _SAMPLE_ROWS = 4, 256
"""A matrix is judged by so many stretches of so many cells, spread over it."""

_ENOUGH_CELLS = 20
"""Cells that must agree before a pattern means anything."""


def find_counts(data: CellData, layer: str | None, values: MatrixValues = "counts", *, order_only: bool = False) -> Matrix:
    """Return the matrix that holds raw counts, or what else a model reads.

    Parameters
    ----------
    data
        The cells.
    layer
        The user's choice: a layer, or ``"X"`` or ``"raw"``. ``None``: found, as the module describes.
    values
        What it must hold.
    order_only
        Whether the model needs no more than the order of the counts within a cell: then values that show it are taken for want of counts.

    Raises
    ------
    InputError
        If there is nothing in the data, or no such layer.
    CountsError
        If no matrix holds counts, saying what each holds.
    """
    candidates, left_out = _candidates(data, layer, values)
    if len(data) == 0 or max((m.shape[1] for m in data.matrices.values()), default=0) == 0:
        shape = f"{len(data)} cells and {max((m.shape[1] for m in data.matrices.values()), default=0)} genes"
        msg = f"{data.origin} has {shape}: there is nothing to embed, pass data with at least one cell and one gene"
        raise InputError(msg)
    looked_at = []
    for matrix in candidates:
        looked_at.append(_look(matrix, data, values))
        if looked_at[-1].fits:
            return _with_most_genes(looked_at[-1], candidates, data) if layer is None and values == "counts" else matrix
    if values == "counts":
        if layer is not None and looked_at[0].problem is None:
            return _doubtful(looked_at[0])
        for found in looked_at:
            if (recovered := _recover(found)) is not None:
                return recovered
        if (doubtful := _best_doubtful(looked_at)) is not None:
            return _doubtful(doubtful)
        ordered = [found for found in looked_at if order_only and found.unordered is None]
        if ordered:
            return _by_order(ordered[0].matrix)
    wanted, why = _WANTED[values]
    problems = "; ".join([*(found.describe() for found in looked_at), *left_out]) or "it has no matrix"
    msg = (
        f"no {wanted} in {data.origin}: {problems}. {why}: name the layer that holds them with layer=, or go back to the unprocessed matrix"
    )
    raise CountsError(msg)


def describe_matrices(data: CellData, layer: str | None) -> dict[str, str]:
    """Say of each matrix that :func:`find_counts` looks at, in its order, what it holds.

    Raises
    ------
    InputError
        If there is no such layer.
    """
    candidates, left_out = _candidates(data, layer, "counts")
    said = {}
    for found in (_look(matrix, data, "counts") for matrix in candidates):
        scaling = found.matrix.scaling
        said[found.matrix.name] = (
            scaling.describe()
            if scaling is not None
            else "non-negative whole numbers"
            if found.fits
            else found.describe().removeprefix(f"{found.matrix.name} holds ")
        )
    return said | {text.split(" is ", 1)[0]: text.split(" is ", 1)[1] for text in left_out}


def count_blocks(
    data: CellData, matrix: Matrix, block_rows: int = BLOCK_ROWS, *, values: MatrixValues = "counts", rows: range | None = None
) -> Iterator[CellBlock]:
    """Read the count matrix, or some rows of it, block by block, checking every value; recover counts where that is possible.

    Raises
    ------
    CountsError
        At the first value that is not a count (or what else the model reads), naming cell and gene.
    """
    rows = range(len(data)) if rows is None else rows
    for start in range(rows.start, rows.stop, block_rows):
        stop = min(start + block_rows, rows.stop)
        block = CellBlock(start, matrix.rows(start, stop), data.obs.iloc[start:stop])
        fractions = isinstance(matrix.scaling, Scaling) or matrix.by_order
        problem = _unfit(block, matrix, "abundances" if fractions else values)
        if problem is None and matrix.scaling is not None:
            counts, row, reason = matrix.scaling.recover(block.counts)
            block = replace(block, counts=counts)
            problem = (
                None
                if row < 0
                else f"{matrix.name} holds values of which counts cannot be recovered in cell {block.obs.index[row]!r}: {reason}"
            )
        if problem:
            msg = f"no {_WANTED[values][0]} in {data.origin}: {problem}. Name the layer that holds {_WANTED[values][0]} with layer="
            raise CountsError(msg)
        yield block


_WANTED: dict[MatrixValues, tuple[str, str]] = {
    "counts": ("raw counts", "Models need whole-number counts per gene, not normalised values"),
    "abundances": ("abundances", "These options need numbers from 0 up"),
    "log values": ("log-normalised values", "These options need logarithms of normalised counts"),
}
"""What a matrix shall hold, and what to say where none does."""


# Where to look


def _candidates(data: CellData, layer: str | None, values: MatrixValues) -> tuple[list[Matrix], list[str]]:
    """Return the matrices to look at, in order, and what to say of those that are not looked at."""
    named = data.matrices
    if layer is not None:
        places = (layer, f"layers[{layer!r}]", f"{layer}.X")
        name = next((place for place in places if place in named), None)
        if name is None:
            msg = f"layer={layer!r} is not in {data.origin}; it has {', '.join(named) or 'no matrix'}"
            raise InputError(msg)
        return [named[name]], []
    if values != "counts":
        return [named[name] for name in ("layers['counts']", "X", "raw.X") if name in named], []
    layers = sorted((name for name in named if name.startswith("layers[")), key=_preference)
    parts = _parts_of_counts(layers)
    order = [*(name for name in layers if name not in parts), *(name for name in ("raw.X", "X") if name in named)]
    return [named[name] for name in order], [f"{name} is a part of the counts by its name, and only taken if named" for name in parts]


def _preference(name: str) -> tuple[int, str]:
    said = _layer_name(name).lower()
    return (_COUNT_NAMES.index(said) if said in _COUNT_NAMES else len(_COUNT_NAMES), name)


def _layer_name(name: str) -> str:
    return name.removeprefix("layers[").removesuffix("]").strip("'\"")


def _parts_of_counts(layers: list[str]) -> list[str]:
    """Return the layers of RNA velocity and the like."""

    def words(name: str) -> set[str]:
        return set(re.split(r"[^a-z]+", _layer_name(name).lower()))

    parts = [name for name in layers if words(name) & _PARTS or _layer_name(name) in ("U", "S", "A")]
    # velocyto's name for spliced and unspliced together
    return [*parts, *(name for name in layers if parts and _layer_name(name).lower() == "matrix")]


# What a matrix holds


@dataclass(frozen=True)
class _Look:
    """What a sample of a matrix shows."""

    matrix: Matrix
    sample: CellBlock
    problem: str | None
    """Why it does not hold what is wanted."""
    doubt: str | None
    """Why it may hold something else although it looks right."""
    only_if_named: bool = False
    """Whether that is so likely that it is taken only if the user names it."""

    @property
    def unordered(self) -> str | None:
        """Why the order of its values within a cell is not that of counts, as far as can be seen."""
        counts = self.sample.counts
        whole = _unfit(self.sample, self.matrix, "counts") is None
        if whole or _unfit(self.sample, self.matrix, "abundances") is not None:
            return "it holds whole numbers, or no numbers from 0 up"
        filled = np.count_nonzero(counts.data)
        if filled == counts.shape[0] * counts.shape[1]:
            return "it has no zeros"
        # Counts repeat within a cell, whatever was made of them; by gene or batch each gets a value of its own.
        cells = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        order = np.lexsort((counts.data, cells))
        repeated = np.count_nonzero((np.diff(counts.data[order]) == 0) & (np.diff(cells) == 0) & (counts.data[order][1:] != 0))
        return "most values of a cell are different" if repeated < 0.5 * filled else None

    @property
    def fits(self) -> bool:
        return self.problem is None and self.doubt is None

    @property
    def is_zero(self) -> bool:
        return not self.sample.counts.data.any()

    def describe(self) -> str:
        if self.problem is not None:
            return self.problem
        return f"{self.matrix.name} holds {self.doubt}"


def _look(matrix: Matrix, data: CellData, values: MatrixValues) -> _Look:
    sample = _sample(matrix, data)
    problem = _unfit(sample, matrix, values) or _not_logarithms(sample, matrix, values)
    if values != "counts":
        return _Look(matrix, sample, problem, None)
    if problem is None:
        return _look_at_whole_numbers(matrix, sample)
    if _unfit(sample, matrix, "abundances") is None:
        scaling, row, reason = recognise(sample.counts)
        if scaling is not None:
            matrix = replace(matrix, scaling=scaling)
        else:
            cell = f" (cell {sample.obs.index[row]!r})" if row >= 0 else ""
            problem += f", of which counts cannot be recovered: {reason}{cell}"
    return _Look(matrix, sample, problem, None)


def _look_at_whole_numbers(matrix: Matrix, sample: CellBlock) -> _Look:
    rounded = recognise_gaps(sample.counts)
    if rounded is None or rounded.certainty != "proven":
        if (doubt := _doubt(sample.counts, matrix.name)) is not None:
            return _Look(matrix, sample, None, doubt)
        rounded = rounded or recognise_totals(sample.counts)
    if rounded is None:
        return _Look(matrix, sample, None, None)
    if rounded.certainty != "proven":
        return _Look(matrix, sample, None, rounded.says, only_if_named=rounded.certainty == "likely")
    return _Look(replace(matrix, scaling=rounded.scaling), sample, f"{matrix.name} holds {rounded.says}", None)


def _sample(matrix: Matrix, data: CellData) -> CellBlock:
    """Read some stretches of cells from all over the matrix; the whole of a small one."""
    n = len(data)
    if n <= _SAMPLE_WINDOWS * _SAMPLE_ROWS:
        return CellBlock(0, matrix.rows(0, n), data.obs)
    starts = [round(i * (n - _SAMPLE_ROWS) / (_SAMPLE_WINDOWS - 1)) for i in range(_SAMPLE_WINDOWS)]
    counts = sp.csr_matrix(sp.vstack([matrix.rows(start, start + _SAMPLE_ROWS) for start in starts], format="csr"))
    rows = np.concatenate([np.arange(start, start + _SAMPLE_ROWS) for start in starts])
    return CellBlock(0, counts, data.obs.iloc[rows])


def _not_logarithms(block: CellBlock, matrix: Matrix, values: MatrixValues) -> str | None:
    """Recognise counts where logarithms are expected."""
    data = block.counts.data
    if values == "log values" and data.any() and (data == np.rint(data)).all():
        return f"{matrix.name} holds only whole numbers, which look like raw counts"
    return None


def _unfit(block: CellBlock, matrix: Matrix, values: MatrixValues) -> str | None:
    """Say what is wrong with a block of would-be counts, or ``None``."""
    data = block.counts.data
    if data.dtype.kind == "u":
        return None
    if data.dtype.kind not in "if":
        return f"{matrix.name} holds {data.dtype} values"
    whole = values != "counts" or data.dtype.kind == "i" or np.array_equal(data, np.rint(data))
    if whole and (not len(data) or (data.min() >= 0 and data.max() < np.inf)):  # nearly always; NaN is neither
        return None
    faults = {"NaN or infinite values": ~np.isfinite(data), "negative values": data < 0}
    if values == "counts":
        faults["values that are not whole numbers"] = data != np.rint(data)
    for what, wrong in faults.items():
        if wrong.any():
            at = int(np.argmax(wrong))
            row = int(np.searchsorted(block.counts.indptr, at, side="right")) - 1
            cell, gene = block.obs.index[row], matrix.var.index[block.counts.indices[at]]
            return f"{matrix.name} holds {what} ({data[at]:.6g} in cell {cell!r}, gene {gene!r})"
    return None


# Whole numbers that may not be counts

_PROCESSED = re.compile(
    r"(^|[^a-z])(bin|bins|binned|binary|binari[sz]ed|rank|ranks|ranked|discreti[sz]ed|digiti[sz]ed|mask|scaled?|log|log1p|norm|normali[sz]ed)([^a-z]|$)"
)


def _doubt(counts: CountMatrix, name: str) -> str | None:
    """Say what whole numbers might be instead of counts, or ``None``."""
    if _PROCESSED.search(_layer_name(name).lower()) and name.startswith("layers["):
        return "whole numbers, but by its name no counts"
    if not counts.data.any():
        return "only zeros"
    if counts.data.max() == 1:
        return "only zeros and ones, as presence and absence do"
    filled = sp.csr_matrix(counts[np.diff(counts.indptr) > 0])
    if filled.data.min() == 0:
        filled.eliminate_zeros()
        filled = sp.csr_matrix(filled[np.diff(filled.indptr) > 0])
    if filled.shape[0] < _ENOUGH_CELLS:
        return None
    starts, per_cell = filled.indptr[:-1], np.diff(filled.indptr)
    greatest = np.maximum.reduceat(filled.data, starts)
    # Ranks without ties: so many different numbers in a row.
    cells = np.repeat(np.arange(filled.shape[0]), per_cell)
    order = np.lexsort((filled.data, cells))
    steps, inside = np.diff(filled.data[order]), np.diff(cells) == 0
    if (per_cell >= 10).all() and (steps[inside] == 1).all():
        return "whole numbers of which each stands once in a cell, as ranks do"
    if (greatest == greatest[0]).all():
        return f"whole numbers with the same maximum ({greatest[0]:.6g}) in every cell, as bins do"
    return None


def _doubtful(found: _Look) -> Matrix:
    """Return a matrix that is taken although it may look odd, and say so; empty cells are said elsewhere."""
    if found.doubt is None or found.is_zero:
        return found.matrix
    note = f"{found.matrix.name} is taken for raw counts, but it holds {found.doubt}; if it is something else, name the counts with layer="
    return _noted(found.matrix, note, counts_doubt=found.doubt)


def _best_doubtful(looked_at: list[_Look]) -> _Look | None:
    """Return the first odd matrix to take for want of a better one."""
    usual = ("layers['counts']", "raw.X", "X")
    doubtful = [found for found in looked_at if found.problem is None and not found.only_if_named and found.matrix.name in usual]
    with_counts = [found for found in doubtful if not found.is_zero]
    if with_counts:
        return with_counts[0]
    # Nothing but zeros is a data set of empty cells, unless some other matrix shows that it is not.
    return doubtful[0] if doubtful and all(found.is_zero for found in looked_at) else None


# What was taken


def _noted(matrix: Matrix, note: str, **facts: str | bool) -> Matrix:
    """Return a matrix with one more thing to tell of it, behind what its reader has to say."""
    return replace(matrix, facts={**matrix.facts, **facts}, notes=(*matrix.notes, note))


def _recover(found: _Look) -> Matrix | None:
    """Return a matrix of normalised counts as one of counts."""
    matrix = found.matrix
    if matrix.scaling is None:
        return None
    said = matrix.scaling.describe()
    note = f"no raw counts were found; they are recovered from {matrix.name}, which holds {said}"
    note += " (exact, but for a factor that all counts of a cell have in common)"
    return _noted(matrix, note, counts_recovered=said)


def _by_order(matrix: Matrix) -> Matrix:
    """Return a matrix without counts for a model that needs only their order."""
    note = f"no raw counts were found; {matrix.name} is taken, for this model uses only the order of the values within a cell:"
    note += " right for logarithms and the like, not after scaling by gene or correction of batches"
    return replace(_noted(matrix, note, counts_by_order=True), by_order=True)


def _with_most_genes(found: _Look, candidates: list[Matrix], data: CellData) -> Matrix:
    """Of two matrices with the same counts take the one with more genes, and say which genes the one that is taken lacks."""
    matrix = found.matrix
    genes = pd.Index(matrix.var.index.astype(str))
    for rival in (candidate for candidate in candidates if candidate.name in ("raw.X", "X")):
        others = pd.Index(rival.var.index.astype(str))
        missing = others.difference(genes, sort=False)
        shared = genes.intersection(others, sort=False)
        shared = shared[~shared.isin(genes[genes.duplicated()]) & ~shared.isin(others[others.duplicated()])]
        if missing.empty or shared.empty:  # nothing is lost; or names of another kind, which tell nothing
            continue
        other = _look(rival, data, "counts")
        columns, rival_columns = genes.get_indexer_for(shared), others.get_indexer_for(shared)
        same = other.fits and (found.sample.counts[:, columns] != other.sample.counts[:, rival_columns]).nnz == 0
        if same and rival.shape[1] > matrix.shape[1]:
            lacking = genes.difference(others, sort=False)
            note = f"{rival.name} is taken for raw counts: {matrix.name} holds the same, but lacks {_some(missing)} of its genes"
            note += f"; {rival.name} lacks {_some(lacking)} of those of {matrix.name}" if len(lacking) else ""
            return _noted(rival, note, counts_choice=note)
        holds = "the same counts" if same else "other counts" if other.fits else "no raw counts"
        note = f"{matrix.name} is taken for raw counts, but lacks {_some(missing)} of the genes of {rival.name}, which holds {holds};"
        note += " choose with layer="
        return _noted(matrix, note, counts_choice=note)
    return _say_rivals(found, candidates, data)


def _some(names: pd.Index) -> str:
    """Count names, and give the first three."""
    return f"{len(names):,} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _say_rivals(found: _Look, candidates: list[Matrix], data: CellData) -> Matrix:
    """Say that ``X`` or ``raw.X`` holds other counts than the matrix that is taken, unless its name says that it holds the raw ones."""
    matrix = found.matrix
    if matrix.name.startswith("layers[") and _layer_name(matrix.name).lower() in _COUNT_NAMES:
        return matrix
    for rival in candidates:
        if rival.name in ("raw.X", "X") and rival.name != matrix.name and rival.shape == matrix.shape:
            other = _look(rival, data, "counts")
            if other.fits and abs(other.sample.counts - found.sample.counts).max() > 0:
                note = f"{matrix.name} is taken for raw counts, but {rival.name} holds whole numbers too, and others; choose with layer="
                return _noted(matrix, note)
    return matrix
