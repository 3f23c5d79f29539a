"""One transformer encoder for all families, with the switches in which they differ.

Letters in the comments: T total tokens of a batch, D width, H heads, E = D / H width of a head, I inner width of the feed-forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from cellfm_hub.nn.alibi import Alibi
from cellfm_hub.nn.attention import attend, choose
from cellfm_hub.nn.packed import PackedBatch
from cellfm_hub.nn.rotary import Rotary

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and switches of an encoder."""

    dim: int
    heads: int
    layers: int
    ffn_dim: int
    norm: Literal["pre", "post"]
    """LayerNorm before each sub-layer (then also once at the end), or after each residual sum."""
    norm_eps: float
    activation: Literal["relu", "gelu", "silu"]
    """``gelu`` is the exact (erf) form."""
    gated: bool = False
    """Feed-forward multiplies the activated first half of the inner layer by the second."""
    ffn_bias: bool = True
    ffn_inner_bias: bool = True
    """Counts only with `ffn_bias`: ``False`` leaves the inner layer without."""
    rotary: bool = False
    alibi: bool = False


class FeedForward(nn.Module):
    """Two linear layers with an activation, or a gate, between them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation, self.gated = _ACTIVATIONS[config.activation], config.gated
        inner_bias = config.ffn_bias and config.ffn_inner_bias
        self.inner = nn.Linear(config.dim, config.ffn_dim * (2 if config.gated else 1), bias=inner_bias)
        self.outer = nn.Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, D)
        """Transform each token by itself."""
        h = self.inner(x)  # (T, I), gated (T, 2I)
        if self.gated:
            activated, gate = h.chunk(2, dim=-1)  # (T, I) each
            h = self.activation(activated) * gate
        else:
            h = self.activation(h)
        out: Tensor = self.outer(h)
        return out


class SelfAttention(nn.Module):
    """Multi-head attention within each row."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)  # query, key, value stacked
        self.out = nn.Linear(config.dim, config.dim)

    def forward(
        self, x: Tensor, batch: PackedBatch, rotary: Rotary | None, alibi: Alibi | None = None, *, first_only: bool = False
    ) -> Tensor:  # (T, D) -> (T, D)
        """Let tokens of a row look at one another; with `first_only` the first of each row at all others, ``(B, D)``."""
        if first_only:
            dim, weight, bias = x.shape[1], self.qkv.weight, self.qkv.bias
            query = F.linear(x[batch.starts], weight[:dim], bias[:dim]).view(len(batch.lengths), self.heads, -1)  # (B, H, E)
            key, value = F.linear(x, weight[dim:], bias[dim:]).view(len(x), 2, self.heads, -1).unbind(1)  # (T, H, E) each
        else:
            query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (T, H, E) each
        if rotary is not None:
            query, key = rotary(query, batch.starts if first_only else None), rotary(key)
        out: Tensor = self.out(attend(query, key, value, batch, alibi).flatten(1))
        return out


class EncoderBlock(nn.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, x: Tensor, batch: PackedBatch, rotary: Rotary | None, alibi: Alibi | None = None, *, first_only: bool = False
    ) -> Tensor:  # (T, D) -> (T, D)
        """Apply both sub-layers; with `first_only` to the first token of each row, ``(B, D)``: the others are keys and values alone."""
        before = x[batch.starts] if first_only else x
        if self.pre_norm:
            x = before + self.attention(self.attention_norm(x), batch, rotary, alibi, first_only=first_only)
            x = x + self.feed_forward(self.feed_forward_norm(x))
        else:
            x = self.attention_norm(before + self.attention(x, batch, rotary, alibi, first_only=first_only))
            x = self.feed_forward_norm(x + self.feed_forward(x))
        return x


class Encoder(nn.Module):
    """A stack of blocks that stops at the layer asked for."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if config.norm == "pre" else nn.Identity()

    def forward(self, x: Tensor, batch: PackedBatch, layer: int, *, first_only: bool = False) -> Tensor:
        """Return the hidden state after block `layer`, ``(T, D)``; 0 gives `x` back, the last has passed the final norm, if any.

        With `first_only`, that of the first token of each row, ``(B, D)``: the same numbers for less work in the last block.
        """
        config = self.config
        rotary = Rotary(batch.positions, config.dim // config.heads, x.dtype) if config.rotary and layer else None
        alibi = Alibi(config.heads, batch.longest, x.dtype, x.device) if config.alibi and layer else None
        for number, block in enumerate(self.blocks[:layer], start=1):
            x = block(x, batch, rotary, alibi, first_only=first_only and number == layer)
        if first_only and not layer:
            x = x[batch.starts]
        return self.final_norm(x) if layer == len(self.blocks) else x

    def attention_backend(self) -> str:
        """Return the name of what computes the attention, on the device and in the precision the weights are in."""
        config, weight = self.config, next(self.parameters())
        return choose(weight.device, weight.dtype, config.dim // config.heads, biased=config.alibi, heads=config.heads).backend.name
