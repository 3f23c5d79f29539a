"""The network of DNABERT-2 and DNABERT-S, a MosaicBERT: post-norm encoder, ALiBi in place of positions, gated feed-forward.

T total tokens of a batch, D width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from cellfm_hub.configs import Layers, Positive, Size
from cellfm_hub.nn import Encoder, EncoderConfig, PackedBatch


@dataclass(frozen=True)
class Dnabert2Config:
    """The keys of ``config.json`` that matter, under their published names.

    ``alibi_starting_size`` is what tells the model from a plain BERT. The published ``pad_token_id`` is wrong (0 is ``[UNK]``) and not
    read; nothing here pads.
    """

    divides: ClassVar[dict[str, str]] = {"num_attention_heads": "hidden_size"}

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    alibi_starting_size: Size
    layer_norm_eps: Positive = 1e-12
    type_vocab_size: Size = 2
    hidden_act: Literal["gelu"] = "gelu"


class Dnabert2(nn.Module):
    """Pieces of sequence in, one vector per piece out."""

    def __init__(self, config: Dnabert2Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Encoder(
            EncoderConfig(
                dim=config.hidden_size,
                heads=config.num_attention_heads,
                layers=config.num_hidden_layers,
                ffn_dim=config.intermediate_size,
                norm="post",
                norm_eps=config.layer_norm_eps,
                activation="gelu",
                gated=True,
                ffn_inner_bias=False,
                alibi=True,
            )
        )

    def forward(self, batch: PackedBatch, layer: int, *, first_only: bool = False) -> Tensor:
        """Return the state after `layer`, ``(T, D)``, or of first tokens ``(B, D)``; 0 is the embedding output."""
        # Every token is of type 0, and that row is not zero.
        x = self.embedding_norm(self.words(batch.ids) + self.token_types.weight[0])  # (T, D)
        out: Tensor = self.encoder(x, batch, layer, first_only=first_only)  # (T, D)
        return out
