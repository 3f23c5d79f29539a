"""A pytest plugin: CPU stand-ins for torch's private attention operators of CUDA, so that the tests of the GPU path run without a GPU.

``PYTHONPATH=tests pytest -p cpu_as_gpu -m gpu tests/test_gpu.py``. The stand-ins compute by the definition and refuse what the C++ code
refuses, or worse, reads wrongly: this is what is checked of the hub's calls. They are registered for the whole process, for good, so that
the suite uses them in a process of its own (``test_cuda_path.py``).
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from cellfm_hub.nn import attention as hub_attention

calls: Counter[str] = Counter()
_library = torch.library.Library("aten", "IMPL")


def contract(query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int) -> None:
    """Check what the kernels for packed rows take for granted; `query`, `key`, `value` are ``(T, H, E)``."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        assert x.dim() == 3, f"{name}: (T, H, E)"
        assert x.stride(-1) == 1, f"{name}: a head's numbers lie side by side"
        bytes_apart = (x.data_ptr(), x.stride(0) * x.element_size(), x.stride(1) * x.element_size())
        assert all(n % 16 == 0 for n in bytes_apart), f"{name}: 16-byte alignment"
        assert x.shape[-1] % 8 == 0, f"{name}: width of a head"
        assert x.shape[-1] <= 256, f"{name}: width of a head"
        assert x.dtype == query.dtype, f"{name}: one dtype"
    assert key.shape == value.shape, "keys and values"
    for name, ends, tokens, longest in (("query", ends_q, len(query), longest_q), ("key", ends_k, len(key), longest_k)):
        assert ends.dtype == torch.int32, f"{name}: int32 bounds"
        assert ends.dim() == 1, f"{name}: one row of bounds"
        assert ends.is_contiguous(), f"{name}: contiguous bounds"
        assert ends.device == query.device, f"{name}: bounds on the device"
        assert type(longest) is int, f"{name}: the longest row as a plain number, known without waiting for the device"
        lengths = ends.diff()
        assert int(ends[0]) == 0, f"{name}: bounds begin at the first token"
        assert int(ends[-1]) == tokens, f"{name}: bounds end behind the last token"
        assert int(lengths.min()) >= 1, f"{name}: no empty row"
        assert int(lengths.max()) <= longest, f"{name}: no row longer than the longest"
    assert len(ends_q) == len(ends_k), "as many rows of queries as of keys"


def attention(query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, scale: float | None) -> Tensor:
    """Compute attention within rows as its definition says, in float32."""
    rows = zip(ends_q.diff().tolist(), ends_k.diff().tolist(), strict=True)
    out, q, k = torch.empty_like(query), 0, 0
    for queries, keys in rows:
        scores = torch.einsum("qhe,khe->hqk", query[q : q + queries].float(), key[k : k + keys].float())
        weights = (scores * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
        out[q : q + queries] = torch.einsum("hqk,khe->qhe", weights, value[k : k + keys].float())
        q, k = q + queries, k + keys
    return out


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **_rest: Any,
) -> tuple[Tensor, ...]:
    """Stand in for ``aten::_flash_attention_forward``."""
    calls["flash"] += 1
    if query.dtype not in (torch.float16, torch.bfloat16):
        msg = "FlashAttention only support fp16 and bf16 data type"
        raise RuntimeError(msg)
    assert (dropout_p, is_causal, return_debug_mask) == (0, False, False)
    assert {window_size_left, window_size_right} <= {None, -1}
    contract(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    nothing = torch.empty(0)
    seed = torch.empty(2, dtype=torch.uint64)
    return (
        attention(query, key, value, cum_seq_q, cum_seq_k, scale),
        torch.empty(query.shape[1], len(query)),
        seed,
        nothing,
        nothing.clone(),
    )


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
    seqlen_k: Tensor | None = None,
    window_size: int | None = None,
) -> tuple[Tensor | int, ...]:
    """Stand in for ``aten::_efficient_attention_forward``."""
    calls["efficient"] += 1
    assert query.dim() == key.dim() == value.dim() == 4
    assert len(query) == len(key) == len(value) == 1, "packed rows are a batch of one"
    assert bias is seqlen_k is window_size is None
    assert (dropout_p, custom_mask_type, compute_log_sumexp) == (0, 0, False)
    contract(query[0], key[0], value[0], cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out = attention(query[0], key[0], value[0], cu_seqlens_q, cu_seqlens_k, scale)[None]
    seed, offset = (torch.empty((), dtype=torch.int64) for _ in range(2))
    return out, torch.empty(1, query.shape[2], 0), seed, offset, max_seqlen_q, max_seqlen_k


def pytest_configure() -> None:
    """Register the stand-ins, in the process that was started with this plugin, and let the hub choose kernels as if the CPU were CUDA."""
    _library.impl("_flash_attention_forward", flash, "CPU")
    _library.impl("_efficient_attention_forward", efficient, "CPU")
    of_device = hub_attention.preference
    hub_attention.preference = lambda _device_type, dtype, *, biased: of_device("cuda", dtype, biased=biased)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of the GPU run on the CPU."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        if module.__name__.endswith("test_gpu"):
            module.DEVICE = torch.device("cpu")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how often each stand-in was called."""
    terminalreporter.write_line("stand-ins called: " + " ".join(f"{name}={calls[name]}" for name in ("flash", "efficient")))
