"""The network of scGPT: a gene and its binned expression, summed, through a post-norm ReLU encoder. No positions.

T total tokens of a batch, D width.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from cellfm_hub.configs import Finite, Layers, Size
from cellfm_hub.nn import Encoder, EncoderConfig, PackedBatch

_EPS = 1e-5
"""Of every LayerNorm; not in ``args.json``."""


@dataclass(frozen=True)
class ScGPTConfig:
    """The keys of ``args.json`` that matter, under their published names, and the size of the vocabulary."""

    divides: ClassVar[dict[str, str]] = {"nheads": "embsize"}

    ntoken: Size
    """Entries of ``vocab.json``; the name is that of the original class's argument."""
    embsize: Size
    nheads: Size
    d_hid: Size
    nlayers: Layers
    pad_value: Finite = -2
    """The value at ``<cls>``, too."""
    n_bins: Size = 51
    max_seq_len: Size = 1200
    """These two are checked and not used: the original takes 51 and 1200 whatever they say."""


class GeneEncoder(nn.Module):
    """Which gene."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.ntoken, config.embsize)
        self.enc_norm = nn.LayerNorm(config.embsize, eps=_EPS)

    def forward(self, ids: Tensor) -> Tensor:  # (T,) -> (T, D)
        """Look genes up."""
        out: Tensor = self.enc_norm(self.embedding(ids))
        return out


class ValueEncoder(nn.Module):
    """How much of it: the number of the bin, taken as a plain number."""

    MAX_VALUE = 512

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, config.embsize)
        self.linear2 = nn.Linear(config.embsize, config.embsize)
        self.norm = nn.LayerNorm(config.embsize, eps=_EPS)

    def forward(self, values: Tensor) -> Tensor:  # (T,) -> (T, D)
        """Encode bins."""
        x = values.clamp(max=self.MAX_VALUE)[:, None].to(self.linear1.weight.dtype)  # (T, 1)
        out: Tensor = self.norm(self.linear2(F.relu(self.linear1(x))))
        return out


class ScGPT(nn.Module):
    """Genes with binned expression in, one vector per gene out."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        self.encoder = GeneEncoder(config)
        self.value_encoder = ValueEncoder(config)
        self.transformer_encoder = Encoder(
            EncoderConfig(
                dim=config.embsize,
                heads=config.nheads,
                layers=config.nlayers,
                ffn_dim=config.d_hid,
                norm="post",
                norm_eps=_EPS,
                activation="relu",
            )
        )

    def forward(self, batch: PackedBatch, layer: int, *, first_only: bool = False) -> Tensor:
        """Return the state after `layer`, ``(T, D)``, or of first tokens ``(B, D)``; 0 is the embedding output."""
        assert batch.values is not None
        x = self.encoder(batch.ids) + self.value_encoder(batch.values)  # (T, D)
        out: Tensor = self.transformer_encoder(x, batch, layer, first_only=first_only)  # (T, D)
        return out
