"""Rotary position embedding (Su et al. 2021, doi:10.48550/arXiv.2104.09864)."""

import torch
from torch import Tensor


class Rotary:
    """Rotate queries and keys by their position, in the "rotate half" layout: dimension j is paired with j + head_dim / 2."""

    def __init__(self, positions: Tensor, head_dim: int, dtype: torch.dtype, base: float = 10_000.0) -> None:
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)  # (head_dim/2,)
        angles = positions.float()[:, None] * frequencies  # (T, head_dim/2)
        # Angles in float32 whatever the network runs in; (T, 1, head_dim), the same for every head.
        self.cos = torch.cat((angles, angles), dim=-1).cos().to(dtype)[:, None, :]
        self.sin = torch.cat((angles, angles), dim=-1).sin().to(dtype)[:, None, :]

    def __call__(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Rotate ``(T, heads, head_dim)``, or ``(n, heads, head_dim)``, the `n` tokens named by `at`."""
        cos, sin = (self.cos, self.sin) if at is None else (self.cos[at], self.sin[at])
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin
