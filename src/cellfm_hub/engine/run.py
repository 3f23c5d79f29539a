"""Drive a network over tokens: plan, compute, put rows back in their places."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellfm_hub.engine.plan import plan_batches
from cellfm_hub.nn.packed import PackedBatch
from cellfm_hub.tokens import Tokens, flat_indices, offsets_from_lengths

Forward = Callable[[PackedBatch], Tensor]
"""Batch -> ``(B, d)`` pooled, or ``(T, d)`` one vector per token."""

MIN_TOKENS = 16
"""Products of fewer than a handful of matrix rows take another path through a BLAS, which rounds differently; so smaller batches are
computed with copies of themselves, and a short sequence alone gets, bit for bit, the vector it gets in company."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep float32 exact: no TF32 and no bfloat16 inside matrix products, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def run_network(
    forward: Forward,
    tokens: Tokens,
    *,
    dim: int,
    per_token: bool,
    device: torch.device,
    batch_tokens: int,
    out_lengths: NDArray[np.int64] | None = None,
    on_batch: Callable[[int], None] = lambda _rows: None,
) -> NDArray[np.float32]:
    """Run `forward` over all rows.

    Parameters
    ----------
    out_lengths
        Where `per_token`: how many vectors each row gives, if not one per token.

    Returns
    -------
    ``(n, dim)`` float32 with NaN for empty rows, or ``(total, dim)`` float32 where `per_token`. The order is that of `tokens`.
    """
    lengths = tokens.lengths if out_lengths is None else out_lengths
    offsets = offsets_from_lengths(lengths)
    out = np.full((offsets[-1] if per_token else len(tokens), dim), np.nan, dtype=np.float32)
    with torch.inference_mode(), full_float32():
        for index in plan_batches(np.maximum(tokens.lengths, lengths), batch_tokens):
            copies = -(-MIN_TOKENS // int(tokens.lengths[index].sum()))
            batch = PackedBatch.from_tokens(tokens.take(np.tile(index, copies)), device)
            result = forward(batch).float().cpu().numpy()
            result = result[: len(result) // copies]
            if per_token:
                out[flat_indices(offsets[index], lengths[index])] = result
            else:
                out[index] = result
            on_batch(len(index))
    return out
