"""The network of UCE: a post-norm transformer over proteins and chromosomes, and a decoder on top.

T total tokens of a batch, P width of a protein vector, D width, O width of the output, V rows of the token table.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellfm_hub.configs import Layers, Size
from cellfm_hub.nn import Encoder, EncoderConfig, PackedBatch

NORM_EPS = 1e-5
DECODER_HIDDEN = 1024


@dataclass(frozen=True)
class UCEConfig:
    """Sizes, under the names of the original code. The published file has no configuration: they are read from its tensors."""

    divides: ClassVar[dict[str, str]] = {"nhead": "d_model"}

    nlayers: Layers
    rows: Size = 145_469
    """Rows of the token table: special tokens, genes of all species, chromosomes of all species."""
    token_dim: Size = 5120
    """Width of a protein vector of ESM2 (15B)."""
    d_model: Size = 1280
    nhead: Size = 20
    d_hid: Size = 5120
    output_dim: Size = 1280
    pad_length: Size = 1536
    """Longest sentence."""


class UCE(nn.Module):
    """Sampled genes, grouped by chromosome, in; one vector per token out."""

    def __init__(self, config: UCEConfig) -> None:
        super().__init__()
        dim, out = config.d_model, config.output_dim
        self.layers = config.nlayers
        self.projection = _projection(config.token_dim, dim)
        self.gene_embedding_layer = _projection(config.token_dim, dim)
        # What `project` makes of each row of the token table; the adapter fills in the rows that are used.
        self.register_buffer("tokens", torch.empty(config.rows, dim), persistent=False)
        self.register_buffer("positions", torch.empty(config.pad_length, 1, dim))
        self.encoder = Encoder(
            EncoderConfig(
                dim=dim,
                heads=config.nhead,
                layers=config.nlayers,
                ffn_dim=config.d_hid,
                norm="post",
                norm_eps=NORM_EPS,
                activation="relu",
            )
        )
        self.decoder = nn.Sequential(
            *_decoder_block(dim, DECODER_HIDDEN), *_decoder_block(DECODER_HIDDEN, out), *_decoder_block(out, out), nn.Linear(out, out)
        )

    tokens: Tensor
    positions: Tensor

    def project(self, rows: Tensor) -> Tensor:
        """Turn rows of the token table, ``(n, P)``, into what enters the transformer, ``(n, D)``. Depends on nothing but the row."""
        # The padding row is zero and stays zero up to here.
        unit = F.normalize(rows.float(), dim=-1, eps=1e-12).to(self.tokens.dtype)  # (n, P)
        projected: Tensor = self.projection(unit) * sqrt(self.tokens.shape[1])  # (n, D)
        return projected

    def forward(self, batch: PackedBatch, layer: int, *, first_only: bool = False) -> Tensor:
        """Return the state after block `layer`, ``(T, D)``, or of first tokens ``(B, D)``; 0 is the embedding output.

        The last has passed the decoder, ``(T, O)`` or ``(B, O)``.
        """
        x: Tensor = self.tokens[batch.ids] + self.positions[batch.positions, 0]  # (T, D)
        x = self.encoder(x, batch, layer, first_only=first_only)  # (T, D)
        if layer == self.layers:
            x = self.decoder(x)  # (T, O)
        return x


def _projection(protein_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(protein_dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=NORM_EPS))


def _decoder_block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs), nn.LayerNorm(outputs, eps=NORM_EPS), nn.GELU()
