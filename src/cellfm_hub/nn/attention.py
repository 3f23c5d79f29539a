"""Attention within rows: which kernel does it on this device is tried out, never assumed."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cellfm_hub.nn.alibi import Alibi
from cellfm_hub.nn.kernels import by_bucket, by_row, efficient, flash, flex, plain, varlen
from cellfm_hub.nn.matmul_precision import exact_products
from cellfm_hub.nn.out_of_memory import is_out_of_memory
from cellfm_hub.nn.packed import PackedBatch

logger = logging.getLogger("cellfm_hub")

Kernel = Callable[[Tensor, Tensor, Tensor, PackedBatch, Any], Tensor]
"""Query, key, value, batch, ALiBi or ``None``."""


@dataclass(frozen=True)
class Backend:
    """A way to compute attention."""

    name: str
    """Named in receipts and by ``cellfm env``."""
    kernel: Kernel
    slow_to_try: bool = False
    """Whether it is compiled first, for 10 to 40 seconds."""


BY_ROW = Backend("sdpa by row", by_row)
BY_BUCKET = Backend("sdpa by length bucket", by_bucket)
VARLEN = Backend("torch varlen_attn", varlen)
FLASH = Backend("aten flash attention, packed", flash)
EFFICIENT = Backend("aten efficient attention, packed", efficient)
FLEX = Backend("flex attention", flex, slow_to_try=True)


@dataclass(frozen=True)
class Choice:
    """The backend in use, and why."""

    backend: Backend
    why: str
    rejected: tuple[tuple[str, str], ...] = ()
    """Those that would have been preferred: name, and why not."""


TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""By how much a backend may differ from the plain one on numbers of size 1. A row that looks into its neighbour is off by about 1."""
USUAL_HEADS = 12

_failed_in_use: dict[str, str] = {}
"""Backends that had been tried, and failed later: name, and why. They are not used again in this process."""


def preference(device_type: str, dtype: torch.dtype, *, biased: bool) -> tuple[Backend, ...]:
    """Return the backends for a kind of device, fastest first; the last works everywhere and need not be tried.

    On CPUs slices of the packed tensors beat padding, masks and every other kernel.
    """
    if device_type == "cuda":
        if biased:  # the flash kernels inside torch are built without ALiBi
            return FLEX, BY_ROW
        half = dtype in (torch.float16, torch.bfloat16)
        return (VARLEN, FLASH, EFFICIENT, BY_BUCKET) if half else (EFFICIENT, BY_BUCKET)
    return (BY_BUCKET,) if device_type == "mps" and not biased else (BY_ROW,)


def refusal(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, *, biased: bool, heads: int = USUAL_HEADS
) -> str | None:
    """Run a backend on two small ragged batches beside the plain one; return why it cannot be used, ``None`` if it can."""
    generator = torch.Generator().manual_seed(0)
    for lengths in ((65, 7, 7, 1), (130, 33)):
        query, key, value = torch.randn(3, sum(lengths), heads, head_dim, generator=generator).to(device, dtype)
        batch = PackedBatch(ids=torch.zeros(sum(lengths), dtype=torch.int64, device=device), lengths=lengths)
        alibi = Alibi(heads, batch.longest, dtype, device) if biased else None
        for queries in (query, query[batch.starts]):
            try:
                got = backend.kernel(queries, key, value, batch, alibi).float()
                error = float((got - plain(queries, key, value, batch, alibi)).abs().max())
            except Exception as failure:
                if is_out_of_memory(failure):
                    raise  # says nothing about the backend
                return _in_one_line(failure)
            if not error <= TOLERANCE.get(dtype, TOLERANCE[torch.float32]):  # NaN is refused too
                return f"differs by {error:.1e} from plain attention"
    return None


def _in_one_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"


@cache
def choose(device: torch.device, dtype: torch.dtype, head_dim: int, *, biased: bool, heads: int = USUAL_HEADS) -> Choice:
    """Return the first backend that runs here and gives the right numbers.

    It is tried with as many heads as the network has: compiled backends are compiled for that number, and the work is not done twice.
    """
    *candidates, last = preference(device.type, dtype, biased=biased)
    rejected: list[tuple[str, str]] = []
    with torch.inference_mode(), exact_products():  # what it is compared with, too: it may be asked for outside of a run
        for backend in candidates:
            why_not = _failed_in_use.get(backend.name) or refusal(backend, device, dtype, head_dim, biased=biased, heads=heads)
            if why_not is None:
                return Choice(backend, "tried: agrees with plain attention", tuple(rejected))
            rejected.append((backend.name, why_not))
    return Choice(last, "works everywhere" if rejected else f"fastest on {device.type}", tuple(rejected))


def attend(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, alibi: Alibi | None = None) -> Tensor:
    """Let every token attend to all tokens of its own row.

    Parameters
    ----------
    query
        ``(T, heads, head_dim)``, or ``(B, heads, head_dim)``: those of the first token of each row alone.
    key, value
        ``(T, heads, head_dim)``.
    batch
        Gives the rows.
    alibi
        Added to the scores.

    Returns
    -------
    In the shape of `query`.
    """
    _, heads, head_dim = query.shape
    backend = choose(query.device, query.dtype, head_dim, biased=alibi is not None, heads=heads).backend
    try:
        return backend.kernel(query, key, value, batch, alibi)
    except Exception as failure:
        works_everywhere = preference(query.device.type, query.dtype, biased=alibi is not None)[-1]
        if backend is works_everywhere or is_out_of_memory(failure):
            raise
        _failed_in_use[backend.name] = f"failed in use: {_in_one_line(failure)}"
        logger.warning("%s %s; going on with another way to compute attention", backend.name, _failed_in_use[backend.name])
    choose.cache_clear()
    return attend(query, key, value, batch, alibi)


def report(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Say for ``cellfm env`` which backend is used, and why those before it are not; heads are 64 wide, as in nearly all models."""
    facts = {}
    for key, biased in (("attention", False), ("attention_alibi", True)):
        preferred, *others = preference(device.type, dtype, biased=biased)
        if preferred.slow_to_try:
            facts[key] = f"{preferred.name} (compiled and tried when it is needed; else {', '.join(other.name for other in others)})"
            continue
        choice = choose(device, dtype, 64, biased=biased)
        reasons = [choice.why, *(f"{name} refused: {why}" for name, why in choice.rejected)]
        facts[key] = f"{choice.backend.name} ({'; '.join(reasons)})"
    return facts
