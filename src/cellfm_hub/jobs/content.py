"""What a row holds, as 128 bits: rows with the same tokens have the same vector."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.blocks import TokenBlock, Vectors
from cellfm_hub.kernels import compiled
from cellfm_hub.reading import Prepared
from cellfm_hub.receipt import Receipt
from cellfm_hub.seeding import splitmix64
from cellfm_hub.sources.cells import CellBlock
from cellfm_hub.sources.sequences import SequenceBlock

Content = NDArray[np.uint64]
"""``(n, 2)``."""

RowFacts = NDArray[np.uint64]
"""``(n, 3)``: the content of each row, and a hash of the vector that was computed from it."""


@compiled
def _hash_rows(
    words: NDArray[np.uint64], offsets: NDArray[np.int64], inputs: NDArray[np.int64], salts: NDArray[np.uint64], out: NDArray[np.uint64]
) -> None:
    for row in range(len(offsets) - 1):
        at = inputs[row]
        a, b = out[at, 0] ^ salts[row], out[at, 1] + salts[row]
        for i in range(offsets[row], offsets[row + 1]):
            for column in range(words.shape[0]):
                a = splitmix64(a ^ words[column, i])
                b = splitmix64(b + words[column, i])
        out[at, 0], out[at, 1] = splitmix64(a), splitmix64(b)


def token_content(block: TokenBlock) -> Content:
    """Hash what the network sees of each input, in order: tokens, their values and positions, windows, strands and alleles.

    A row's vector is a function of just that (where a window begins follows from the widths in those before it), so that rows of equal
    hash need not be computed twice. The hash is not meant to withstand an attacker.
    """
    tokens, inputs = block.tokens, len(block.names)
    columns = [tokens.ids.astype(np.int64)]
    if tokens.values is not None:
        columns.append(tokens.values.astype(np.float64).view(np.int64))
    if tokens.positions is not None:
        columns.append(tokens.positions)
    if tokens.widths is not None:
        columns.append(tokens.widths.astype(np.int64))
    rows = np.arange(inputs) if tokens.rows is None else tokens.rows
    part, of_input = np.divmod(rows, inputs)
    salts = (part.astype(np.uint64) << np.uint64(48)) ^ np.uint64(len(columns))
    out = np.zeros((inputs, 2), dtype=np.uint64)
    _hash_rows(np.stack(columns).view(np.uint64), tokens.offsets, of_input.astype(np.int64), salts, out)
    return out


def vector_hashes(vectors: Vectors) -> NDArray[np.uint64]:
    """Hash each vector, as float32, to 64 bits: a vector that somebody changed has another hash."""
    bits = np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint32)
    hashes = np.empty(len(bits), dtype=np.uint64)
    _hash_vectors(bits, hashes)
    return hashes


@compiled
def _hash_vectors(bits: NDArray[np.uint32], out: NDArray[np.uint64]) -> None:
    for row in range(len(bits)):
        state = np.uint64(0)
        for i in range(bits.shape[1]):
            state = splitmix64(state ^ np.uint64(bits[row, i]))
        out[row] = state


def made_by(content: Content, receipt: Receipt) -> Content:
    """Mix what decides about a model's vectors, beside the row, into the content of rows; doing so again takes it out.

    So rows that stem from another model's result, put together with these, are told from them.
    """
    decisive = [receipt.get(name) for name in _DECISIVE]
    model = hashlib.sha256(json.dumps(decisive, default=str).encode()).digest()
    mixed: Content = content ^ np.frombuffer(model[:16], dtype="<u8")
    return mixed


_DECISIVE = ("family", "weights_sha256", "options", "level", "pooling", "normalize", "output_layer", "precision")


def row_facts(content: Content, vectors: Vectors, receipt: Receipt) -> RowFacts:
    """Say of each row what its vector was made from, and which vector that was."""
    return np.column_stack([made_by(content, receipt), vector_hashes(vectors)])


def digest(blocks: Sequence[Sequence[Prepared]], contents: Sequence[Sequence[Content | None]]) -> str:
    """Hash all rows of a part, names and contents, as SHA-256: tells whether it was made from the same data."""
    found = hashlib.sha256()
    for of_models, of_rows in zip(blocks, contents, strict=True):
        for prepared, content in zip(of_models, of_rows, strict=True):
            found.update(json.dumps(prepared.names).encode())
            block = prepared.block
            if content is not None:
                found.update(content.tobytes())
            elif isinstance(block, CellBlock):
                for array in (block.counts.indptr, block.counts.indices, block.counts.data):
                    found.update(np.ascontiguousarray(array).tobytes())
            elif isinstance(block, SequenceBlock):
                found.update(json.dumps(block.alleles).encode())
    return found.hexdigest()
