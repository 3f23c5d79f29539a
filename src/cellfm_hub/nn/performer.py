"""A Performer: a transformer whose attention (FAVOR+) is linear in the length of a row.

Choromanski et al. 2021, doi:10.48550/arXiv.2009.14794.

Letters in the comments: T total tokens of a batch, R rows of equal length L, D width, H heads, E width of a head, M random features.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellfm_hub.nn.packed import PackedBatch

_EPS = 1e-4
"""Added to every feature, after the exponential."""


@dataclass(frozen=True)
class PerformerConfig:
    """Sizes of a Performer."""

    dim: int
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    norm_eps: float


def random_features(head_dim: int) -> int:
    """Return how many random features a head of this width has, in the original implementation and all models made with it."""
    return int(head_dim * log(head_dim))


def row_maximum(features: Tensor) -> Tensor:
    """Return the largest key feature of each row, over heads, positions and features: ``(R, H, L, M) -> (R, 1, 1, 1)``."""
    return features.amax(dim=(1, 2, 3), keepdim=True)


def linear_attend(query: Tensor, key: Tensor, value: Tensor, projection: Tensor, batch: PackedBatch) -> Tensor:
    """Approximate softmax attention of every token to all tokens of its own row.

    The small number added to each feature does not cancel, so the maximum that is subtracted from the keys shapes the result. It is taken
    over one row: over a whole batch, as some implementations do, neighbours would change each other's vectors.

    Always in float32: exponentials and sums over a whole row do not bear less.

    Parameters
    ----------
    query, key, value
        ``(T, H, E)``.
    projection
        ``(M, E)``, the fixed random directions of the checkpoint.
    batch
        Gives the rows.

    Returns
    -------
    ``(T, H, E)``, in the dtype of `query`.
    """
    scale = query.shape[-1] ** -0.25
    directions = projection.float().T * scale  # (E, M)
    out = torch.empty_like(query)
    for start, rows, length in batch.equal_runs:
        part = slice(start, start + rows * length)
        q, k, v = (x[part].float().view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))  # (R, H, L, E)
        dash = k @ directions  # (R, H, L, M)
        norm = k.square().sum(-1, keepdim=True) * (scale**2 / 2)
        k_features = (dash - norm - row_maximum(dash)).exp_().add_(_EPS)
        context = k_features.transpose(2, 3) @ v  # (R, H, M, E)
        k_sum = k_features.sum(2)[..., None]  # (R, H, M, 1)
        dash = q @ directions
        norm = q.square().sum(-1, keepdim=True) * (scale**2 / 2)
        q_features = (dash - norm - dash.amax(-1, keepdim=True)).exp_().add_(_EPS)
        attended = (q_features @ context) / (q_features @ k_sum)  # the 1/√M of both features cancels
        out[part] = attended.transpose(1, 2).flatten(0, 1).to(out.dtype)
    return out


class PerformerBlock(nn.Module):
    """Linear attention and feed-forward, each with a LayerNorm before and a residual around it."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.qkv = nn.Linear(config.dim, 3 * inner)  # query, key, value stacked
        self.projection = nn.Buffer(torch.empty(random_features(config.head_dim), config.head_dim))
        self.out = nn.Linear(inner, config.dim)
        self.feed_forward_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.inner = nn.Linear(config.dim, config.ffn_dim)
        self.outer = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:  # (T, D) -> (T, D)
        """Apply both sub-layers."""
        query, key, value = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (T, H, E) each
        x = x + self.out(linear_attend(query, key, value, self.projection, batch).flatten(1))
        out: Tensor = x + self.outer(F.gelu(self.inner(self.feed_forward_norm(x))))
        return out


class Performer(nn.Module):
    """A stack of blocks and a last LayerNorm."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PerformerBlock(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """Return the state after the last block, ``(T, D)``."""
        for block in self.blocks:
            x = block(x, batch)
        out: Tensor = self.final_norm(x)
        return out
