"""A batch of rows packed end to end, on the device."""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellfm_hub.tokens import Tokens


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Move an array to a device without waiting for it to arrive."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # Only from pinned memory does a copy run beside the computation; torch keeps and reuses such memory.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class PackedBatch:
    """What a network sees of a batch. T = total tokens, B = rows; no row is empty.

    Lengths stay on the host as plain numbers, so that nothing on the way through the network waits for the device.
    """

    ids: Tensor  # (T,) int64
    lengths: tuple[int, ...]  # B
    values: Tensor | None = None  # (T,) float32
    given_positions: Tensor | None = None  # (T,) int64

    @classmethod
    def from_tokens(cls, tokens: Tokens, device: torch.device) -> "PackedBatch":
        """Move the rows of `tokens` to a device."""
        return cls(
            ids=to_device(tokens.ids, device).long(),
            lengths=tuple(tokens.lengths.tolist()),
            values=None if tokens.values is None else to_device(tokens.values, device),
            given_positions=None if tokens.positions is None else to_device(tokens.positions, device),
        )

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @cached_property
    def segment_lengths(self) -> Tensor:
        """``(B,)`` int64, the lengths on the device."""
        return to_device(np.array(self.lengths, dtype=np.int64), self.ids.device)

    @cached_property
    def starts(self) -> Tensor:
        """``(B,)`` int64, where each row begins."""
        return self.segment_lengths.cumsum(0) - self.segment_lengths

    @cached_property
    def bounds(self) -> Tensor:
        """``(B + 1,)`` int32, where rows begin and end, as attention kernels want it."""
        return to_device(np.cumsum((0, *self.lengths), dtype=np.int32), self.ids.device)

    @cached_property
    def positions(self) -> Tensor:
        """``(T,)`` int64, the place of each token in its row: 0, 1, 2, …, unless the tokenizer gave others."""
        if self.given_positions is not None:
            return self.given_positions
        return torch.arange(len(self.ids), device=self.ids.device) - self.per_token(self.starts)

    @cached_property
    def first_tokens(self) -> "PackedBatch":
        """The first token of each row as a row of its own: what vectors ``(B, D)`` of first tokens belong to."""
        return PackedBatch(
            ids=self.ids[self.starts],
            lengths=(1,) * len(self.lengths),
            values=None if self.values is None else self.values[self.starts],
            given_positions=self.positions[self.starts],
        )

    def per_token(self, per_row: Tensor) -> Tensor:
        """Repeat one entry per row, ``(B, …)``, for each of its tokens, ``(T, …)``."""
        return per_row.repeat_interleave(self.segment_lengths, dim=0, output_size=len(self.ids))

    @cached_property
    def equal_runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbouring rows of equal length as ``(first token, rows, length)``: they form a rectangle without padding."""
        runs, start = [], 0
        for length, group in groupby(self.lengths):
            count = sum(1 for _ in group)
            runs.append((start, count, length))
            start += count * length
        return tuple(runs)
