"""Tokens of a stretch of the data, and how their vectors become those of the inputs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.errors import InputError
from cellfm_hub.request import Level
from cellfm_hub.tokens import Ragged, Tokens, flat_indices, offsets_from_lengths

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class TokenBlock:
    """Tokens of some consecutive inputs.

    With two strands or alleles ``rows`` counts all inputs on the forward strand, then all on the reverse one, and both again for the
    other allele.
    """

    tokens: Tokens
    names: list[str]
    strands: int = 1
    alleles: int = 1
    bases: NDArray[np.int64] | None = None
    """Sequences only: the length of each input."""


def stack_parts(parts: list[Tokens], inputs: int) -> Tokens:
    """Put strands and alleles one behind the other, so that ``rows`` is part × inputs + input."""
    rows = [(np.arange(len(p)) if p.rows is None else p.rows) + part * inputs for part, p in enumerate(parts)]
    joined = [Tokens(ids=p.ids, offsets=p.offsets, widths=p.widths, rows=r) for p, r in zip(parts, rows, strict=True)]
    return Tokens.concatenate(joined)


def join(blocks: list[TokenBlock]) -> Tokens:
    """Join the tokens of all blocks; ``rows`` then counts the inputs of the whole data set."""
    if all(block.tokens.rows is None for block in blocks):
        return Tokens.concatenate([block.tokens for block in blocks])
    parts, before = [], 0
    for block in blocks:
        tokens = block.tokens
        rows = np.arange(len(tokens)) if tokens.rows is None else tokens.rows
        begins = np.zeros(len(tokens), np.int64) if tokens.begins is None else tokens.begins
        parts.append(Tokens(ids=tokens.ids, offsets=tokens.offsets, widths=tokens.widths, rows=before + rows, begins=begins))
        before += len(block.names)
    return Tokens.concatenate(parts)


def empty_inputs(tokens: Tokens, inputs: int) -> NDArray[np.int64]:
    """Return the inputs of which no row has a token."""
    if tokens.rows is None:
        return np.flatnonzero(tokens.lengths == 0)
    return np.flatnonzero(np.bincount(tokens.rows, weights=tokens.lengths, minlength=inputs) == 0)


def merge_windows(block: TokenBlock) -> Tokens:
    """Join the windows of each input into one row; they already stand one behind the other."""
    tokens = block.tokens
    if tokens.rows is None:
        return Tokens(ids=tokens.ids, offsets=tokens.offsets)
    lengths = np.zeros(len(block.names), dtype=np.int64)
    np.add.at(lengths, tokens.rows, tokens.lengths)
    return Tokens(ids=tokens.ids, offsets=offsets_from_lengths(lengths))


def select_inputs(block: TokenBlock, index: NDArray[np.int64]) -> TokenBlock:
    """Return some inputs of a block, in the given order, with all their windows, strands and alleles."""
    inputs = len(block.names)
    names = [block.names[i] for i in index]
    bases = None if block.bases is None else block.bases[index]
    if block.tokens.rows is None:
        return TokenBlock(block.tokens.take(index), names, block.strands, block.alleles, bases)
    place = np.full(inputs, -1, dtype=np.int64)
    place[index] = np.arange(len(index))
    part, of_input = np.divmod(block.tokens.rows, inputs)
    kept = np.flatnonzero(place[of_input] >= 0)
    kept = kept[np.lexsort((place[of_input[kept]], part[kept]))]  # stable: windows stay in their order
    tokens = replace(block.tokens.take(kept), rows=part[kept] * len(index) + place[of_input[kept]])
    return TokenBlock(tokens, names, block.strands, block.alleles, bases)


def cut_by_tokens(block: TokenBlock, most: int) -> Iterator[TokenBlock]:
    """Cut a block into stretches of inputs with at most `most` tokens each (and bases, if they are known), one input at least."""
    inputs = len(block.names)
    rows = np.arange(inputs) if block.tokens.rows is None else block.tokens.rows % inputs
    sizes = np.bincount(rows, weights=block.tokens.lengths, minlength=inputs).astype(np.int64)
    if block.bases is not None:
        sizes = np.maximum(sizes, block.bases)
    before, start = offsets_from_lengths(sizes), 0
    while start < inputs:
        stop = max(int(np.searchsorted(before, before[start] + most, side="right")) - 1, start + 1)
        yield block if stop - start == inputs else select_inputs(block, np.arange(start, stop))
        start = stop


def unpool(values: Vectors, block: TokenBlock, level: Level, adapter: TokenAdapter) -> Ragged:
    """Arrange one vector per token by inputs, or repeat them for the bases that each covers."""
    tokens = block.tokens
    if level != "base":
        merged = adapter.token_rows(merge_windows(block))
        return Ragged(values, merged.ids, merged.offsets, adapter.vocabulary)
    assert tokens.widths is not None
    assert block.bases is not None
    offsets = offsets_from_lengths(block.bases)
    # The first base of each token, counted through all inputs.
    row_begins = offsets[np.arange(len(tokens)) if tokens.rows is None else tokens.rows]
    if tokens.begins is not None:
        row_begins = row_begins + tokens.begins
    before = offsets_from_lengths(tokens.widths)
    token_begins = before[:-1] + np.repeat(row_begins - before[tokens.offsets[:-1]], tokens.lengths)
    widths = tokens.widths.astype(np.int64)
    base, token = flat_indices(token_begins, widths), np.repeat(np.arange(len(widths)), widths)
    ids = np.full(offsets[-1], -1, dtype=np.int32)
    ids[base] = tokens.ids[token]
    windows = np.bincount(base, minlength=len(ids))
    spread = sp.csr_matrix(((1 / windows[base]).astype(np.float32), (base, token)), shape=(len(ids), len(widths)))
    vectors: Vectors = spread @ values
    vectors[windows == 0] = np.nan
    return Ragged(vectors, ids, offsets, adapter.vocabulary)


def tokens_with_bases(tokens: Tokens) -> NDArray[np.int64]:
    """Count the tokens of each row that are not special."""
    assert tokens.widths is not None
    return np.diff(offsets_from_lengths(tokens.widths > 0)[tokens.offsets])


def input_bases(tokens: Tokens, inputs: int) -> NDArray[np.int64]:
    """Return how many bases of each input the tokens reach."""
    if tokens.widths is None:
        msg = "level='base' needs Tokens.widths, the number of bases of each token; take the tokens from tokenize(), or use level='token'"
        raise InputError(msg)
    before = offsets_from_lengths(tokens.widths)[tokens.offsets]
    reached = np.diff(before) + (0 if tokens.begins is None else tokens.begins)
    bases = np.zeros(inputs, dtype=np.int64)
    np.maximum.at(bases, np.arange(len(tokens)) if tokens.rows is None else tokens.rows, reached)
    return bases


def combine(values: Vectors, block: TokenBlock, pooling: str) -> Vectors:
    """Make one vector per input of those of its windows and strands.

    Means: over all tokens of all windows; max: element-wise; otherwise the plain mean of the windows. Strands are averaged, and the
    reference allele is taken away from the alternative one.
    """
    tokens = block.tokens
    if tokens.rows is None:
        return values
    inputs = len(block.names) * block.strands * block.alleles
    if pooling == "max":
        combined = np.full((inputs, values.shape[1]), -np.inf, dtype=np.float32)
        np.maximum.at(combined, tokens.rows, values)
    else:
        if pooling == "mean":
            counted = np.maximum(tokens.lengths, 1)  # an empty row stays NaN
        elif pooling == "mean-bases" and tokens.widths is not None:
            counted = np.maximum(tokens_with_bases(tokens), 1)
        else:
            counted = np.ones(len(tokens), np.int64)
        weights = counted.astype(np.float64)
        gather = sp.csr_matrix((weights, (tokens.rows, np.arange(len(tokens)))), shape=(inputs, len(tokens)))
        combined = (gather @ values.astype(np.float64) / gather.sum(axis=1)).astype(np.float32)
    by_allele = np.asarray(combined).reshape(block.alleles, block.strands, len(block.names), -1).mean(axis=1, dtype=np.float32)
    vectors: Vectors = by_allele[1] - by_allele[0] if block.alleles == 2 else by_allele[0]
    return vectors


def unit_length(vectors: Vectors) -> Vectors:
    """Divide each vector by its Euclidean length; NaN stays NaN."""
    scaled: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled
