"""Blocks that several families share. Everything works on packed tokens: ``(total_tokens, …)``, no padding."""

from cellfm_hub.nn.alibi import Alibi, alibi_slopes
from cellfm_hub.nn.attention import attend
from cellfm_hub.nn.encoder import Encoder, EncoderConfig
from cellfm_hub.nn.packed import PackedBatch
from cellfm_hub.nn.performer import Performer, PerformerConfig, random_features
from cellfm_hub.nn.pooling import first, segment_max, segment_mean, segment_pool
from cellfm_hub.nn.rotary import Rotary

__all__ = [
    "Alibi",
    "Encoder",
    "EncoderConfig",
    "PackedBatch",
    "Performer",
    "PerformerConfig",
    "Rotary",
    "alibi_slopes",
    "attend",
    "first",
    "random_features",
    "segment_max",
    "segment_mean",
    "segment_pool",
]
