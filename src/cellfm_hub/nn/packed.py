"""A batch of rows packed end to end, on the device."""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from cellfm_hub.tokens import Tokens


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

        def move(array: np.ndarray[tuple[int], np.dtype[np.generic]] | None, dtype: torch.dtype) -> Tensor | None:
            return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)

        ids = move(tokens.ids, torch.int64)
        assert ids is not None
        return cls(
            ids=ids,
            lengths=tuple(tokens.lengths.tolist()),
            values=move(tokens.values, torch.float32),
            given_positions=move(tokens.positions, torch.int64),
        )

    @cached_property
    def segment_lengths(self) -> Tensor:
        """``(B,)`` int64, the lengths on the device."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.ids.device)

    @cached_property
    def starts(self) -> Tensor:
        """``(B,)`` int64, where each row begins."""
        return self.segment_lengths.cumsum(0) - self.segment_lengths

    @cached_property
    def positions(self) -> Tensor:
        """``(T,)`` int64, the place of each token in its row: 0, 1, 2, …, unless the tokenizer gave others."""
        if self.given_positions is not None:
            return self.given_positions
        return torch.arange(len(self.ids), device=self.ids.device) - self.per_token(self.starts)

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
