"""The network of Geneformer: a plain BERT encoder (post-norm; ReLU in all that is published), without its language-model head.

T total tokens of a batch, D width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from cellfm_hub.configs import Layers, Positive, Size
from cellfm_hub.nn import Encoder, EncoderConfig, PackedBatch


@dataclass(frozen=True)
class GeneformerConfig:
    """The keys of ``config.json`` that matter, under their published names."""

    divides: ClassVar[dict[str, str]] = {"num_attention_heads": "hidden_size"}

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    type_vocab_size: Size = 2
    layer_norm_eps: Positive = 1e-12
    hidden_act: Literal["relu", "gelu"] = "relu"
    position_embedding_type: Literal["absolute"] = "absolute"


class Geneformer(nn.Module):
    """Ranked genes in, one vector per gene out."""

    def __init__(self, config: GeneformerConfig) -> None:
        super().__init__()
        self.genes = nn.Embedding(config.vocab_size, config.hidden_size)
        self.ranks = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(
            EncoderConfig(
                dim=config.hidden_size,
                heads=config.num_attention_heads,
                layers=config.num_hidden_layers,
                ffn_dim=config.intermediate_size,
                norm="post",
                norm_eps=config.layer_norm_eps,
                activation=config.hidden_act,
            )
        )

    def forward(self, batch: PackedBatch, layer: int, *, first_only: bool = False) -> Tensor:
        """Return the state after `layer`, ``(T, D)``, or of first tokens ``(B, D)``; 0 is the embedding output."""
        # The position of a gene is its rank: order carries the expression.
        x = self.genes(batch.ids) + self.ranks(batch.positions) + self.token_types.weight[0]  # (T, D)
        out: Tensor = self.encoder(self.norm(x), batch, layer, first_only=first_only)  # (T, D)
        return out
