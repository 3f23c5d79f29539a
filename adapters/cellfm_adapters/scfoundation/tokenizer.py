"""A cell as its expressed genes with their normalised values, followed by two tokens that say how deeply it was sequenced.

Follows ``model/get_embedding.py`` of the original release, with genes matched by name whatever the number and order of columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.errors import CheckpointFormatError, InputError
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.tokens import Tokens, flat_indices, offsets_from_lengths

TARGET_SUM = 1e4
"""Counts a cell is normalised to."""


@dataclass(frozen=True)
class TargetDepth:
    """The depth that the model is asked to imagine, ``tgthighres`` of the original release.

    Parameters
    ----------
    kind
        ``"t"``: a log10 of counts; ``"f"``: so many times the cell's own counts; ``"a"``: so much more than their log10.
    number
        That number.
    """

    kind: Literal["t", "f", "a"]
    number: float

    @classmethod
    def parse(cls, text: str) -> "TargetDepth":
        """Read ``t4``, ``f1.5`` or ``a5``.

        Raises
        ------
        ValueError
            Saying what is allowed.
        """
        kind, number = text[:1], text[1:]
        if kind not in ("t", "f", "a") or not number.replace(".", "", 1).isdigit() or not number.isascii():
            msg = "expected t, f or a and a number: t4 (10^4 counts), f2 (twice the cell's counts), a1 (10^1 times)"
            raise ValueError(msg)
        if kind != "a" and float(number) == 0:
            msg = f"{kind}0 is a depth of nothing; expected a number above 0"
            raise ValueError(msg)
        return cls(kind, float(number))  # type: ignore[arg-type]  # checked above

    def of(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the target of cells with the given totals."""
        if self.kind == "t":
            return np.full(len(totals), self.number)
        return np.log10(totals * self.number) if self.kind == "f" else np.log10(totals) + self.number


@dataclass(frozen=True)
class BulkGeneMap(GeneMap):
    """Genes of bulk samples, with what was learnt from all samples.

    Parameters
    ----------
    median_total
        Of the samples that have any expression; each sample is brought to it.
    """

    median_total: float = 0.0


class Tokenizer:
    """Turns counts, or values that are normalised already, into tokens.

    Parameters
    ----------
    genes
        Symbols in the order of the model: the place of a gene is its token.
    input_type, pre_normalized
        As in the original release; the module :mod:`adapter` says what they mean.
    target
        Depth to imagine; single cells only.
    """

    def __init__(
        self, genes: Sequence[str], input_type: Literal["singlecell", "bulk"], pre_normalized: Literal["F", "T", "A"], target: TargetDepth
    ) -> None:
        self.place = {gene: i for i, gene in enumerate(genes)}
        if len(self.place) < len(genes):
            msg = f"the gene list names {len(genes) - len(self.place)} genes twice; use the file of the original release, unchanged"
            raise CheckpointFormatError(msg)
        self.bulk, self.pre_normalized, self.target = input_type == "bulk", pre_normalized, target
        self.target_token, self.source_token = len(genes), len(genes) + 1

    def match_genes(self, ids: Sequence[str]) -> GeneMap:
        """Look symbols up as they are written. Several columns of one symbol are summed.

        With ``pre_normalized="A"`` the last column holds the cells' totals, and gets a place behind the genes.
        """
        with_total = self.pre_normalized == "A"
        if with_total and ids and ids[-1] in self.place:
            msg = f"pre_normalized='A' takes the last column for the cells' raw totals, but it is the gene {ids[-1]!r};"
            msg += " append the totals as one more column, or use 'T'"
            raise InputError(msg)
        found = [(column, place) for column, gene in enumerate(ids) if (place := self.place.get(gene)) is not None]
        columns, targets = [column for column, _ in found], [place for _, place in found]
        if with_total:
            columns, targets = [*columns, len(ids) - 1], [*targets, len(self.place)]
        return GeneMap(
            np.array(columns, dtype=np.int64),
            np.array(targets, dtype=np.int64),
            np.arange(len(self.place) + with_total, dtype=np.int32),
            len(ids),
            n_other=int(with_total),
        )

    def survey(self, genes: GeneMap, blocks: Iterable[CountMatrix]) -> BulkGeneMap:
        """Find the median total of all samples, over the genes of the model."""
        totals = np.concatenate([np.asarray(block.astype(np.float64).sum(axis=1)).ravel() for block in blocks])
        positive = totals[totals > 0]
        median = float(np.median(positive)) if len(positive) else 0.0
        return BulkGeneMap(genes.columns, genes.targets, genes.tokens, genes.n_columns, median_total=median)

    def tokenize(self, counts: CountMatrix, genes: GeneMap) -> Tokens:
        """Normalise, and write each cell as its expressed genes in the order of the model, then target depth and source depth.

        A depth token that is not above 0 would vanish, and the model's vector be made of other tokens: such a cell gets none. That is a
        cell without any known gene, and a single cell with one count (its source depth is log10(1) = 0).
        """
        if self.pre_normalized != "F" and genes.n_summed:
            msg = f"{genes.n_summed} genes stand in more than one column; logarithms cannot be added: sum the columns before normalising"
            raise InputError(msg)
        cell_starts = counts.indptr.astype(np.int64)
        places, values = counts.indices, counts.data.astype(np.float64)
        if self.pre_normalized == "A":
            cell_starts, places, values, totals = self._split_totals(cell_starts, places, values)
        else:
            totals = _sums(values, cell_starts)
        per_cell = np.diff(cell_starts)
        with np.errstate(divide="ignore", invalid="ignore"):  # cells without counts, dropped below
            if self.pre_normalized == "F":
                target_sum = genes.median_total if isinstance(genes, BulkGeneMap) else TARGET_SUM
                values = np.log1p(values / np.repeat(totals, per_cell) * target_sum)
            if not self.bulk:
                source, target = np.log10(totals), self.target.of(totals)
            else:
                # Bulk samples have no target: both tokens say the sum of what the model sees; its log10 only if we normalised.
                source = target = np.log10(_sums(values, cell_starts)) if self.pre_normalized == "F" else totals

        usable = (per_cell > 0) & (target > 0) & (source > 0)
        offsets = offsets_from_lengths(np.where(usable, per_cell + 2, 0))
        begins, ends, kept = offsets[:-1][usable], offsets[1:][usable], per_cell[usable]
        taken, put = flat_indices(cell_starts[:-1][usable], kept), flat_indices(begins, kept)
        ids, expression = np.empty(offsets[-1], dtype=np.int32), np.empty(offsets[-1], dtype=np.float32)
        ids[put], expression[put] = places[taken], values[taken]
        ids[ends - 2], expression[ends - 2] = self.target_token, target[usable]
        ids[ends - 1], expression[ends - 1] = self.source_token, source[usable]
        return Tokens(ids=ids, offsets=offsets, values=expression)

    def _split_totals(
        self, cell_starts: NDArray[np.int64], places: NDArray[np.int32], values: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
        """Take the totals, which stand behind all genes, out of the rows."""
        is_total = places == len(self.place)
        totals = np.zeros(len(cell_starts) - 1)
        totals[np.searchsorted(cell_starts, np.flatnonzero(is_total), side="right") - 1] = values[is_total]
        return np.concatenate(([0], np.cumsum(~is_total)))[cell_starts], places[~is_total], values[~is_total], totals


def _sums(values: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Add up each row of packed values."""
    # reduceat would give an empty row the first value of the next one.
    filled = np.flatnonzero(np.diff(starts))
    sums = np.zeros(len(starts) - 1)
    if len(filled):
        sums[filled] = np.add.reduceat(values, starts[:-1][filled])
    return sums
