"""Rank-value encoding: a cell is the list of its genes, ordered by expression relative to each gene's median over the training corpus.

Follows ``TranscriptomeTokenizer`` of the original release (``geneformer/tokenizer.py``), with ties in column order instead of in the
order of an unstable sort, and without tokens for stored zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.kernels import compiled, sort_row
from cellfm_hub.tokens import Tokens, offsets_from_lengths


@dataclass(frozen=True)
class Dictionaries:
    """The three dictionaries of a training corpus.

    Parameters
    ----------
    tokens
        Ensembl id or special token -> token id.
    medians
        Ensembl id -> median of its non-zero expression over the corpus.
    mapping
        Any known identifier (current or retired Ensembl id, for V2 also symbols), upper case -> current Ensembl id.
    """

    tokens: Mapping[str, int]
    medians: Mapping[str, float]
    mapping: Mapping[str, str]

    def __post_init__(self) -> None:
        ids = sorted(self.tokens.values())
        if ids != list(range(len(ids))):
            msg = f"the token dictionary does not number its {len(ids):,} entries 0, 1, 2, …; use the dictionary of the release"
            raise CheckpointFormatError(msg)
        unranked = [gene for gene in self.tokens if not gene.startswith("<") and gene not in self.medians]
        if unranked:
            msg = f"{len(unranked):,} genes of the token dictionary have no median (first: {unranked[0]});"
            msg += " use the token and the median dictionary of one corpus"
            raise CheckpointFormatError(msg)

    @property
    def has_cls(self) -> bool:
        """Whether cells are framed by ``<cls>`` and ``<eos>`` (V2), or not (V1)."""
        return "<cls>" in self.tokens and "<eos>" in self.tokens

    @property
    def vocabulary(self) -> NDArray[np.str_]:
        """``(V,)``: the gene or special token of each id."""
        return np.array(sorted(self.tokens, key=self.tokens.__getitem__))


class Tokenizer:
    """Turns counts into ranked genes.

    Parameters
    ----------
    dictionaries
        Of the corpus that the weights were trained on.
    max_tokens
        Longest row, special tokens included.
    """

    def __init__(self, dictionaries: Dictionaries, max_tokens: int) -> None:
        self.dictionaries = dictionaries
        self.max_tokens = max_tokens
        self._median_of_token = np.array([dictionaries.medians.get(gene, np.nan) for gene in dictionaries.vocabulary])

    def match_genes(self, ids: Sequence[str]) -> GeneMap:
        """Map identifiers to genes with a token, as ``sum_ensembl_ids`` of the original release does.

        Identifiers are looked up in upper case. Several identifiers of one gene are summed, and the gene then stands behind all genes
        with a single column, which decides ties. The same identifier written twice, and nothing else to sum, stays two tokens.
        """
        known = self.dictionaries.tokens
        matched = [
            (column, written, gene)
            for column, written in enumerate(ids)
            if (gene := self.dictionaries.mapping.get(written.upper())) is not None and gene in known
        ]
        columns = np.array([column for column, _, _ in matched], dtype=np.int64)
        genes = [gene for _, _, gene in matched]
        if len({written for _, written, _ in matched}) == len(set(genes)):
            order = genes  # nothing to sum: one place per column
            targets = np.arange(len(genes))
        else:
            columns_of = dict[str, int]()
            for gene in genes:
                columns_of[gene] = columns_of.get(gene, 0) + 1
            order = [g for g, n in columns_of.items() if n == 1] + [g for g, n in columns_of.items() if n > 1]
            place = {gene: i for i, gene in enumerate(order)}
            targets = np.array([place[gene] for gene in genes], dtype=np.int64)
        return GeneMap(columns, targets, np.array([known[gene] for gene in order], dtype=np.int32), len(ids))

    def tokenize(self, counts: CountMatrix, genes: GeneMap) -> Tokens:
        """Rank the genes of each cell by count over median, cut to the model's input, frame with special tokens.

        The original divides by the cell's total and multiplies by 10,000 first; neither changes the order.
        """
        special = self.dictionaries.tokens
        frame = 1 if self.dictionaries.has_cls else 0  # <cls> in front, <eos> behind
        row_starts = counts.indptr.astype(np.int64)
        expressed = np.diff(row_starts)
        kept = np.minimum(expressed, self.max_tokens - 2 * frame)
        offsets = offsets_from_lengths(np.where(kept > 0, kept + 2 * frame, 0))
        ids = np.empty(offsets[-1], dtype=np.int32)
        medians = self._median_of_token[genes.tokens]
        rank_genes(counts.data, counts.indices, row_starts, medians, genes.tokens, ids, offsets[:-1] + frame, kept)
        if frame:
            ids[offsets[:-1][kept > 0]] = special["<cls>"]
            ids[offsets[1:][kept > 0] - 1] = special["<eos>"]
        return Tokens(ids=ids, offsets=offsets, cut=expressed - kept)


@compiled
def rank_genes(
    counts: NDArray[np.floating],
    genes: NDArray[np.int32],
    offsets: NDArray[np.int64],
    medians: NDArray[np.float64],
    tokens: NDArray[np.int32],
    ids: NDArray[np.int32],
    places: NDArray[np.int64],
    kept: NDArray[np.int64],
) -> None:
    """Write the tokens of each cell's genes, largest count over median first.

    Parameters
    ----------
    counts, genes
        ``(total,)`` the count of each expressed gene of each cell, and which gene it is.
    offsets
        ``(n + 1,)`` where cells begin and end.
    medians, tokens
        ``(g,)`` of each gene; medians float64, and so is the quotient.
    ids
        Written to: from ``places[i]`` on the first ``kept[i]`` genes of cell *i*.
    """
    for cell in range(len(offsets) - 1):
        start, length = np.uint64(offsets[cell]), np.uint64(offsets[cell + 1] - offsets[cell])
        values = np.empty(length, dtype=np.float64)
        for i in range(length):
            values[i] = counts[start + i] / medians[np.uint32(genes[start + i])]
        order, place = sort_row(values), np.uint64(places[cell])
        for i in range(np.uint64(kept[cell])):
            ids[place + i] = tokens[np.uint32(genes[start + np.uint32(order[i])])]
