"""How exact matrix products are: as exact as their dtype, whatever the rest of the process has set."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_LESS_EXACT_SUMS = (
    "allow_fp16_reduced_precision_reduction",  # partial sums in half precision, which is torch's default
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",  # all sums in half precision; torch >= 2.7
)
"""Switches of ``torch.backends.cuda.matmul``: how products in half precision are summed up."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep matrix products exact: of float32 without TF32 or bfloat16 inside, of half precision with sums in float32.

    Everything that the process may have set is set back at the end. Autocast, which would turn float32 into half precision, is off too.
    """
    with ExitStack() as stack:
        stack.enter_context(_full_float32())
        stack.enter_context(_full_sums())
        for device_type in ("cpu", "cuda", "mps"):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def _full_float32() -> Iterator[None]:
    # torch >= 2.9 has a switch for each library, beside the old one for all. Where somebody has set a new one the old one cannot be read,
    # and parts of torch's compiler look at the old one alone: so both are set, the new ones first, and then the old one can be read.
    of_libraries: list[Any] = [getattr(library, "matmul", None) for library in (torch.backends.cuda, torch.backends.mkldnn)]
    new = [switch for switch in of_libraries if hasattr(switch, "fp32_precision")]
    before = [switch.fp32_precision for switch in new]
    for switch in new:
        switch.fp32_precision = "ieee"
    before_of_all = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before_of_all)  # sets the new ones, too
        for switch, precision in zip(new, before, strict=True):
            switch.fp32_precision = "none"  # inherits from torch.backends.fp32_precision
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision


@contextmanager
def _full_sums() -> Iterator[None]:
    switches = torch.backends.cuda.matmul
    before: dict[str, Any] = {}
    for name in _LESS_EXACT_SUMS:
        if hasattr(switches, name):
            before[name] = getattr(switches, name)
            split_k = getattr(switches, f"{name}_split_k", None)  # newer versions of torch set it together with the other
            if split_k is not None:
                before[name] = (before[name], split_k)
            setattr(switches, name, False if split_k is None else (False, split_k))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(switches, name, value)
