"""The network of the Nucleotide Transformer: a pre-norm encoder in two generations.

v1 (and AgroNT): learned positions, GELU feed-forward with biases. v2: rotary positions, gated SiLU feed-forward without biases.

T total tokens of a batch, B rows, D width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cellfm_hub.configs import Layers, Positive, Size, TokenId
from cellfm_hub.nn import Encoder, EncoderConfig, PackedBatch, segment_mean

_MASK_RATIO_TRAIN = 0.15 * 0.8
"""Share of tokens that training replaced by ``<mask>``."""


@dataclass(frozen=True)
class NucleotideTransformerConfig:
    """The keys of ``config.json`` that matter, under their published names."""

    divides: ClassVar[dict[str, str]] = {"num_attention_heads": "hidden_size"}

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    layer_norm_eps: Positive
    token_dropout: bool
    position_embedding_type: Literal["absolute", "rotary"]
    pad_token_id: TokenId = 1
    mask_token_id: TokenId = 2
    add_bias_fnn: bool = True
    emb_layer_norm_before: Literal[False] = False

    @property
    def gated(self) -> bool:
        """Only v2 writes ``add_bias_fnn: false``; it is also what tells the generations apart."""
        return not self.add_bias_fnn

    @property
    def rotary(self) -> bool:
        return self.position_embedding_type == "rotary"


class NucleotideTransformer(nn.Module):
    """k-mers in, one vector per k-mer out."""

    def __init__(self, config: NucleotideTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = None if config.rotary else nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.encoder = Encoder(
            EncoderConfig(
                dim=config.hidden_size,
                heads=config.num_attention_heads,
                layers=config.num_hidden_layers,
                ffn_dim=config.intermediate_size,
                norm="pre",
                norm_eps=config.layer_norm_eps,
                activation="silu" if config.gated else "gelu",
                gated=config.gated,
                ffn_bias=config.add_bias_fnn,
                rotary=config.rotary,
            )
        )

    def forward(self, batch: PackedBatch, layer: int, *, first_only: bool = False) -> Tensor:
        """Return the state after `layer`, ``(T, D)``, or of first tokens ``(B, D)``; 0 is the embedding output.

        The last has passed the final LayerNorm.
        """
        x = self.words(batch.ids)  # (T, D)
        if self.config.token_dropout:
            # Words are scaled as if a share of them had been masked, whether any is or not: without a mask by 0.88.
            masked = batch.ids == self.config.mask_token_id  # (T,)
            share = segment_mean(masked[:, None], batch, torch.ones_like(masked))  # (B, 1)
            x = x.masked_fill(masked[:, None], 0.0) * batch.per_token((1 - _MASK_RATIO_TRAIN) / (1 - share)).to(x.dtype)
        if self.positions is not None:
            x = x + self.positions(batch.positions + self.config.pad_token_id + 1)
        out: Tensor = self.encoder(x, batch, layer, first_only=first_only)  # (T, D)
        return out
