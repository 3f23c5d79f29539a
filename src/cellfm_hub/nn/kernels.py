"""The ways to compute attention within the rows of a packed batch. All take and give the same; `plain` says what. Some take no ALiBi.

Queries are those of all tokens, ``(T, H, E)``, or of the first token of each row, ``(B, H, E)``; keys and values ``(T, H, E)``.
T total tokens, B rows, H heads, E width of a head, L length of a row.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from inspect import signature
from itertools import groupby
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cellfm_hub.nn.alibi import Alibi
from cellfm_hub.nn.packed import PackedBatch, to_device
from cellfm_hub.tokens import flat_indices

BUCKET = 64
"""Rows are padded to a multiple of this: few shapes, little waste."""
FLEX_BLOCK = 128
"""Tokens of a block of FlexAttention's mask."""
FLEX_COMPILED_ON = ("cuda",)
"""Kinds of devices on which FlexAttention is compiled; without, it writes out all scores."""


def plain(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, alibi: Alibi | None) -> Tensor:
    """Compute attention as its definition says, in float32: what every other way must agree with."""
    out, start = [], 0
    for q, length in zip(torch.split(query, 1 if _first_only(query, batch) else list(batch.lengths)), batch.lengths, strict=True):
        k, v = key[start : start + length].float(), value[start : start + length].float()
        scores = torch.einsum("qhe,khe->hqk", q.float(), k) * query.shape[-1] ** -0.5
        if alibi is not None:
            places = torch.arange(length, device=query.device)
            scores = scores - alibi.slopes[:, None, None] * (places[: len(q), None] - places).abs()
        out.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v))
        start += length
    return torch.cat(out)


def by_row(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, alibi: Alibi | None) -> Tensor:
    """Unmasked SDPA on slices of the packed tensors; neighbouring rows of equal length share a call. No padding, no masks."""
    out = torch.empty_like(query)
    first_only, begin = _first_only(query, batch), 0
    with _without_cudnn(query.device):
        for start, rows, length in batch.equal_runs:
            queries = 1 if first_only else length
            of_queries, of_keys = slice(begin, begin + rows * queries), slice(start, start + rows * length)
            begin = of_queries.stop
            # (T', H, E) -> (rows, H, L, E)
            q = query[of_queries].view(rows, queries, *query.shape[1:]).transpose(1, 2)
            k, v = (x[of_keys].view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (key, value))
            if alibi is None:
                attended = F.scaled_dot_product_attention(q, k, v)
            else:
                bias = alibi.for_reversed_queries(length, queries)
                attended = F.scaled_dot_product_attention(q.flip(2), k, v, attn_mask=bias).flip(2)
            out[of_queries] = attended.transpose(1, 2).flatten(0, 1)
    return out


def by_bucket(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, _alibi: None) -> Tensor:
    """SDPA on neighbouring rows padded to a common length, a multiple of `BUCKET`: few calls, few shapes.

    No bias: it would be written out, with the mask, for every row.
    """
    out = torch.empty_like(query)
    first_only, begin, start = _first_only(query, batch), 0, 0
    with _without_cudnn(query.device):
        for place, there in _buckets(batch.lengths, query.device):
            rows, padded = there.shape
            part = slice(start, start + len(place))
            start = part.stop
            k, v = (_rectangle(x[part], place, rows, padded) for x in (key, value))
            mask = there[:, None, None]  # (rows, 1, 1, padded)
            if first_only:
                q = query[begin : begin + rows, :, None]  # (rows, H, 1, E)
                out[begin : begin + rows] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, 0]
                begin += rows
            else:
                q = _rectangle(query[part], place, rows, padded)
                out[part] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)[place]
    return out


@lru_cache(maxsize=1)  # the layers of a network ask one after the other
def _buckets(lengths: tuple[int, ...], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each bucket of rows: the place of each token in the padded rectangle, and which places of the rectangle hold a token."""
    found = []
    for padded, group in groupby(lengths, key=lambda length: -(-length // BUCKET) * BUCKET):
        members = np.fromiter(group, dtype=np.int64)
        place = flat_indices(np.arange(len(members)) * padded, members)
        found.append((to_device(place, device), to_device(np.arange(padded) < members[:, None], device)))
    return found


def _rectangle(x: Tensor, place: Tensor, rows: int, padded: int) -> Tensor:  # (T', H, E) -> (rows, H, padded, E)
    return x.new_zeros(rows * padded, *x.shape[1:]).index_copy(0, place, x).view(rows, padded, *x.shape[1:]).transpose(1, 2)


def varlen(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, _alibi: None) -> Tensor:
    """Flash attention through torch's public function for rows of differing length (torch 2.10 and newer, CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    attention: Callable[..., Any] = varlen_attn
    # Positional: the options behind them differ from one torch to the next.
    out = attention(query, key, value, *_bounds(query, batch), **_one_split(attention))
    assert isinstance(out, Tensor)
    return out


@cache
def _one_split(varlen_attn: Callable[..., Any]) -> dict[str, int]:
    """Return the option, where there is one, that keeps torch from cuDNN and from sums that are cut by the size of the batch.

    cuDNN, which torch 2.14 prefers on newer cards, plans anew, for tens of milliseconds, at every new shape: each batch is one.
    """
    return {"num_splits": 1} if "num_splits" in signature(varlen_attn).parameters else {}


def flash(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, _alibi: None) -> Tensor:
    """Flash attention through torch's private operator."""
    dropout, is_causal, return_debug_mask = 0.0, False, False
    out: Tensor = torch.ops.aten._flash_attention_forward(query, key, value, *_bounds(query, batch), dropout, is_causal, return_debug_mask)[
        0
    ]
    return out


def efficient(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, _alibi: None) -> Tensor:
    """Memory-efficient attention through torch's private operator: float32 too, and older cards."""
    bias, dropout, mask_type = None, 0.0, 0
    out: Tensor = torch.ops.aten._efficient_attention_forward(
        query[None], key[None], value[None], bias, *_bounds(query, batch), dropout, mask_type
    )[0]
    return out[0]


def flex(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, alibi: Alibi | None) -> Tensor:
    """FlexAttention: rows as a block mask, ALiBi as a function of the score; compiled on CUDA."""
    if _first_only(query, batch):
        return by_row(query, key, value, batch, alibi)  # a single query each: nothing to save
    filler = -len(query) % (2 * FLEX_BLOCK)  # a single block would be a case of its own for the compiler
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, filler)).transpose(0, 1)[None] for x in (query, key, value))  # (1, H, T', E)

    def with_distance(score: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert alibi is not None
        return score - alibi.slopes[h] * (i - j).abs()

    mask = _block_mask((*batch.lengths, filler) if filler else batch.lengths, query.device)
    attention = _flex_attention(query.device, query.dtype, *query.shape[1:], biased=alibi is not None)
    out = attention(q, k, v, score_mod=with_distance if alibi else None, block_mask=mask)
    return out[0].transpose(0, 1)[: len(query)]


@lru_cache(maxsize=1)
def _block_mask(lengths: tuple[int, ...], device: torch.device) -> object:
    """Name, for each block of queries, the blocks of keys that hold tokens of the same rows."""
    from torch.nn.attention.flex_attention import BlockMask

    ends = np.cumsum(lengths)
    row_of = to_device(np.repeat(np.arange(len(lengths)), lengths), device)

    def same_row(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return row_of[i] == row_of[j]

    blocks = int(ends[-1]) // FLEX_BLOCK
    first_query = np.arange(blocks) * FLEX_BLOCK
    first_row = np.searchsorted(ends, first_query, side="right")
    last_row = np.searchsorted(ends, first_query + FLEX_BLOCK - 1, side="right")
    low = (ends - lengths)[first_row] // FLEX_BLOCK
    count = (ends[last_row] - 1) // FLEX_BLOCK - low + 1
    index = np.minimum(low[:, None] + np.arange(blocks), blocks - 1)  # what is behind `count` is not read
    return BlockMask.from_kv_blocks(
        to_device(count.astype(np.int32), device)[None, None],
        to_device(index.astype(np.int32), device)[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=same_row,
    )


@cache
def _flex_attention(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, *, biased: bool) -> Callable[..., Tensor]:  # noqa: ARG001
    """Return FlexAttention for tensors of one kind: each needs a compiled graph of its own, whatever the number of tokens.

    torch counts graphs by the code they were made from, and after the eighth falls back, with a line in its log, to writing out all
    scores: hundreds of gigabytes. So each kind gets a copy of the code, and one graph too many is an error (``fullgraph``).
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any) -> Any:
        return flex_attention(query, key, value, score_mod=score_mod, block_mask=block_mask)

    if device.type not in FLEX_COMPILED_ON:
        return attention
    copy = FunctionType(attention.__code__.replace(), attention.__globals__, closure=attention.__closure__)
    compiled: Callable[..., Tensor] = torch.compile(copy, dynamic=True, fullgraph=True)
    return compiled


def _first_only(query: Tensor, batch: PackedBatch) -> bool:
    """Whether queries are one for each row; where every row is a single token, both readings are the same."""
    return len(query) == len(batch.lengths)


def _bounds(query: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, int, int]:
    """Where rows begin and end among queries and among keys, and the longest of both."""
    queries = batch.first_tokens if _first_only(query, batch) else batch
    return queries.bounds, batch.bounds, queries.longest, batch.longest


def _without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Keep SDPA from cuDNN, which plans anew, for tens of milliseconds, at every new shape."""
    if device.type != "cuda":
        return nullcontext()
    allowed: AbstractContextManager[None] = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return allowed
