"""Drive a network over tokens: plan, compute, put rows back in their places."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellfm_hub.engine.memory import TokenBudget, release
from cellfm_hub.engine.plan import plan_batches
from cellfm_hub.errors import DeviceError
from cellfm_hub.nn.matmul_precision import exact_products
from cellfm_hub.nn.out_of_memory import is_out_of_memory
from cellfm_hub.nn.packed import PackedBatch
from cellfm_hub.tokens import Tokens, flat_indices, offsets_from_lengths

Forward = Callable[[PackedBatch], Tensor]
"""Batch -> ``(B, d)`` pooled, or ``(T, d)`` one vector per token."""

MIN_ROWS = 16
"""Products of fewer than a handful of matrix rows take another path through a BLAS, which rounds differently; so small batches are filled
up with rows of one token, and a short sequence alone gets the vector it gets in company: on a CPU bit for bit in float32; on CUDA, where
the number of tokens chooses the kernel, to rounding."""


def run_network(
    forward: Forward,
    tokens: Tokens,
    *,
    dim: int,
    per_token: bool,
    device: torch.device,
    batch_tokens: int,
    out_lengths: NDArray[np.int64] | None = None,
    first_only: bool = False,
    budget: TokenBudget | None = None,
    on_batch: Callable[[int], None] = lambda _rows: None,
) -> NDArray[np.float32]:
    """Run `forward` over all rows.

    A batch that does not fit into memory is split and tried again; no vector depends, beyond rounding, on how rows are split.

    Parameters
    ----------
    out_lengths
        Where `per_token`: how many vectors each row gives, if not one per token.
    first_only
        Whether `forward` computes its last part for one token of each row alone.
    budget
        What is known, and is learnt, of the tokens that fit together.

    Returns
    -------
    ``(n, dim)`` float32 with NaN for empty rows, or ``(total, dim)`` float32 where `per_token`. The order is that of `tokens`.

    Raises
    ------
    DeviceError
        If a single row does not fit into memory.
    """
    budget = budget or TokenBudget()
    lengths = tokens.lengths if out_lengths is None else out_lengths
    sizes = np.maximum(tokens.lengths, lengths)
    offsets = offsets_from_lengths(lengths)
    out = np.full((offsets[-1] if per_token else len(tokens), dim), np.nan, dtype=np.float32)

    def collect(index: NDArray[np.int64], result: Tensor, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        where = flat_indices(offsets[index], lengths[index]) if per_token else index
        out[where] = result[: len(where)].numpy()
        on_batch(len(index))

    waiting = None  # the results of a batch are collected when the next one is under way
    todo = plan_batches(sizes, budget.allowed(batch_tokens))[::-1]
    with torch.inference_mode(), exact_products():
        while todo:
            index = todo.pop()
            used, allowed = int(sizes[index].sum()), budget.allowed(batch_tokens)
            if used > allowed and len(index) > 1:  # less fits than was thought when the plan was made
                todo += [index[part] for part in plan_batches(sizes[index], allowed)][::-1]
                continue
            result = _attempt(forward, _filled(tokens.take(index), first_only=first_only), device)
            if result is None:
                if len(index) == 1:
                    raise DeviceError(_too_long(used, device))
                budget.failed(used)
                release(device)
                todo.append(index)
                continue
            budget.fitted()
            if waiting is not None:
                collect(*waiting)
            waiting = index, *_to_host(result)
        if waiting is not None:
            collect(*waiting)
    return out


def _filled(tokens: Tokens, *, first_only: bool) -> Tokens:
    missing = MIN_ROWS - (len(tokens) if first_only else len(tokens.ids))
    if missing <= 0:
        return tokens
    return Tokens.concatenate([tokens, tokens.first_tokens().take(np.arange(missing) % len(tokens))])


def _attempt(forward: Forward, tokens: Tokens, device: torch.device) -> Tensor | None:
    """Compute a batch; ``None`` if memory runs out. Then the exception, which holds on to tensors, is gone by the time of the return."""
    try:
        return forward(PackedBatch.from_tokens(tokens, device)).float()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _to_host(result: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start the copy of a result, and name the event of its arrival."""
    if result.device.type != "cuda":
        return result.cpu(), None
    copy = result.to("cpu", non_blocking=True)  # into pinned memory
    # Whoever waits for it sleeps: spinning would take a core from the threads that read and tokenize.
    arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(result.device))
    return copy, arrived


def _too_long(tokens: int, device: torch.device) -> str:
    msg = f"a single row of {tokens:,} tokens does not fit into the memory of {device}; use precision='bfloat16', another device,"
    return msg + " or shorter rows (sequences: long='tile' or 'truncate')"
