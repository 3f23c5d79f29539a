"""Attention with linear biases (Press et al. 2022, doi:10.48550/arXiv.2108.12409), in its bidirectional form."""

import numpy as np
import torch
from torch import Tensor

from cellfm_hub.nn.packed import to_device


def alibi_slopes(heads: int) -> list[float]:
    """Return the slope of each head.

    Let p be the largest power of two that is not above `heads`: 2^(-8 k / p) for k = 1 … p, then every second slope of 2 p heads.

    Examples
    --------
    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> alibi_slopes(6)[4:]
    [0.5, 0.125]
    """

    def of_power_of_two(power: int) -> list[float]:
        return [2.0 ** (-8 * k / power) for k in range(1, power + 1)]

    power = 1 << (heads.bit_length() - 1)
    return (of_power_of_two(power) + of_power_of_two(2 * power)[::2])[:heads]


class Alibi:
    """What is added to the attention scores of each head: minus its slope times the distance of query and key.

    Only one row of numbers per head is kept. With the queries in reverse order the bias of query i and key j stands at place i + j of that
    row, so the whole ``(length, length)`` table is a view of it and takes no memory.
    """

    def __init__(self, heads: int, longest: int, dtype: torch.dtype, device: torch.device) -> None:
        distance = torch.arange(1 - longest, longest, device=device).abs()  # (2 longest - 1,)
        self.slopes = to_device(np.array(alibi_slopes(heads), dtype=np.float32), device)  # (H,)
        self.longest = longest
        self.row = (-self.slopes[:, None] * distance).to(dtype)  # (H, 2 longest - 1)

    def for_reversed_queries(self, length: int, queries: int) -> Tensor:
        """Return ``(1, H, queries, length)`` for the first so many queries of a row: the last of them first, keys in order.

        The leading dimension matters: without it torch falls back to a kernel that writes out all scores, three times as slow.
        """
        stride = self.row.stride(0)
        table = self.row.as_strided((1, len(self.row), queries, length), (0, stride, 1, 1), self.longest - queries)
        # Kernels of other devices want rows of their own.
        return table if table.device.type == "cpu" else table.contiguous()
