"""The network of scFoundation: values and genes through a post-norm encoder; for gene vectors, a Performer decoder over all genes.

T total tokens of a batch, B cells, D width, D' width of the decoder, G genes, P = G + 2 positions (genes, then target and source depth).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cellfm_hub.configs import Finite, Layers, Size, TokenId
from cellfm_hub.errors import InputError
from cellfm_hub.nn import Encoder, EncoderConfig, PackedBatch, Performer, PerformerConfig

_NORM_EPS = 1e-5


@dataclass(frozen=True)
class ScFoundationConfig:
    """The settings of the checkpoint that matter, under their published names; ``encoder.depth`` is ``encoder_depth``."""

    divides: ClassVar[dict[str, str]] = {"encoder_heads": "encoder_hidden_dim"}

    seq_len: Annotated[int, Field(ge=3, le=10_000_000)]
    """P: the genes, the target depth and the source depth."""
    bin_num: Size
    bin_alpha: Finite
    mask_token_id: TokenId
    pad_token_id: TokenId
    encoder_hidden_dim: Size
    encoder_depth: Layers
    encoder_heads: Size
    decoder_hidden_dim: Size
    decoder_depth: Layers
    decoder_heads: Size
    decoder_dim_head: Size

    @property
    def genes(self) -> int:
        return self.seq_len - 2


class ValueEmbedding(nn.Module):
    """A value as a mixture of learned vectors, one per bin ("auto-discretization")."""

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(1, config.bin_num)
        self.second = nn.Linear(config.bin_num, config.bin_num)
        self.bins = nn.Embedding(config.bin_num, config.encoder_hidden_dim)
        self.mask = nn.Embedding(1, config.encoder_hidden_dim)
        self.pad = nn.Embedding(1, config.encoder_hidden_dim)

    def forward(self, values: Tensor) -> Tensor:  # (T,) float32 -> (T, D)
        """Embed each value; the two numbers that stand for "masked" and "padding" have vectors of their own, whoever writes them."""
        config, first, second = self.config, self.first, self.second
        # In float32 whatever the rest runs in: rounding a value is changing the data.
        h = F.leaky_relu(F.linear(values[:, None], first.weight.float(), first.bias.float()), 0.1)  # (T, bins)
        h = config.bin_alpha * h + F.linear(h, second.weight.float(), second.bias.float())
        x = h.softmax(-1).to(self.bins.weight.dtype) @ self.bins.weight  # (T, D)
        x = torch.where((values == config.mask_token_id)[:, None], self.mask.weight, x)
        return torch.where((values == config.pad_token_id)[:, None], self.pad.weight, x)


class Decoder(nn.Module):
    """All positions of a cell through a Performer."""

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(config.encoder_hidden_dim, config.decoder_hidden_dim)
        self.performer = Performer(
            PerformerConfig(
                dim=config.decoder_hidden_dim,
                heads=config.decoder_heads,
                head_dim=config.decoder_dim_head,
                layers=config.decoder_depth,
                ffn_dim=4 * config.decoder_hidden_dim,
                norm_eps=_NORM_EPS,
            )
        )
        self.norm = nn.LayerNorm(config.decoder_hidden_dim, eps=_NORM_EPS)  # a second one, behind the Performer's own

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:  # (B·P, D) -> (B·P, D')
        """Let all positions of a cell look at one another."""
        out: Tensor = self.norm(self.performer(self.embed(x), batch))
        return out


class ScFoundation(nn.Module):
    """Expressed genes with their values, and the two depths, in; one vector per token out.

    Parameters
    ----------
    config
        Sizes.
    decoder
        Whether :meth:`decode` is wanted.
    """

    def __init__(self, config: ScFoundationConfig, *, decoder: bool) -> None:
        super().__init__()
        self.config = config
        self.values = ValueEmbedding(config)
        self.positions = nn.Embedding(config.seq_len + 1, config.encoder_hidden_dim)  # the last row stands for padding
        self.encoder = Encoder(
            EncoderConfig(
                dim=config.encoder_hidden_dim,
                heads=config.encoder_heads,
                layers=config.encoder_depth,
                ffn_dim=4 * config.encoder_hidden_dim,
                norm="post",
                norm_eps=_NORM_EPS,
                activation="relu",
            )
        )
        self.norm = nn.LayerNorm(config.encoder_hidden_dim, eps=_NORM_EPS)
        self.decoder = Decoder(config) if decoder else None

    def forward(self, batch: PackedBatch, layer: int) -> Tensor:
        """Return the state after `layer`, ``(T, D)``; 0 is the embedding output, the last has passed the final LayerNorm."""
        if batch.values is None:
            msg = "tokens without values; scFoundation needs one for each gene and depth: Tokens(ids=..., offsets=..., values=...)"
            raise InputError(msg)
        x = self.values(batch.values) + self.positions(batch.ids)  # (T, D)
        x = self.encoder(x, batch, layer)
        out: Tensor = self.norm(x) if layer == self.config.encoder_depth else x
        return out

    def decode(self, batch: PackedBatch) -> Tensor:
        """Return the vectors of all genes of each cell, expressed or not, ``(B·G, D')``."""
        assert self.decoder is not None
        config, cells = self.config, len(batch.lengths)
        hidden = self(batch, config.encoder_depth)  # (T, D)
        unexpressed = self.values(torch.zeros(1, device=hidden.device))  # (1, D)
        cell = batch.per_token(torch.arange(cells, device=hidden.device))  # (T,)
        x = unexpressed.expand(cells * config.seq_len, -1).index_copy(0, cell * config.seq_len + batch.ids, hidden)  # (B·P, D)
        # Expressed genes get the vector of their position a second time: it is in `hidden` already.
        x = x.view(cells, config.seq_len, -1) + self.positions.weight[: config.seq_len]
        every = PackedBatch(ids=batch.ids.new_empty(cells * config.seq_len), lengths=(config.seq_len,) * cells)
        out: Tensor = self.decoder(x.flatten(0, 1), every)  # (B·P, D')
        return out.view(cells, config.seq_len, -1)[:, : config.genes].flatten(0, 1)
