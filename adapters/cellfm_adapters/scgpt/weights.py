"""Keys of ``best_model.pt``, and what becomes of each."""

import logging
from collections.abc import Mapping

from torch import Tensor

from cellfm_adapters.scgpt.model import ScGPTConfig
from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.weights import Key, Layout, dense, norm

logger = logging.getLogger("cellfm_hub")

_SPELLINGS = {"self_attn._impl.": "self_attn.", "self_attn.in_proj_": "self_attn.Wqkv."}
"""Other names of the attention's parameters: files saved with flash-attention 2, and with plain torch attention. The layout is the same."""

_HEADS = ("flag_encoder.", "decoder.", "mvc_decoder.", "cls_decoder.", "grad_reverse_discriminator.")
"""Used in training only."""
_BATCH_LAYERS = ("batch_encoder.", "dsbn.", "bn.")
"""In some fine-tuned files, never in a published one: they tell the batches of one data set apart."""


def published_tensors(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Return what the network needs, under the names of the published files.

    Raises
    ------
    CheckpointFormatError
        If a parameter is there under two names.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_HEADS + _BATCH_LAYERS):
            continue
        published = name
        for other, ours in _SPELLINGS.items():
            published = published.replace(other, ours)
        if published in kept:
            msg = f"{origin} holds {published} under two names, {name} and another; save the model again under one of them"
            raise CheckpointFormatError(msg)
        kept[published] = tensor
    if fine_tuned := sorted({name.split(".")[0] for name in tensors if name.startswith(_BATCH_LAYERS)}):
        logger.warning(
            "%s is fine-tuned with %s, which embedding leaves out, as the original's embed_data does", origin, " and ".join(fine_tuned)
        )
    return kept


def layout(config: ScGPTConfig) -> Layout:
    """Return the whole published file: what we use, and the heads of pretraining, which are dropped."""
    width = config.embsize
    keys: Layout = {
        "encoder.embedding.weight": Key((config.ntoken, width), "encoder.embedding.weight"),
        **norm("encoder.enc_norm", "encoder.enc_norm", width),
        **dense("value_encoder.linear1", "value_encoder.linear1", width, 1),
        **dense("value_encoder.linear2", "value_encoder.linear2", width, width),
        **norm("value_encoder.norm", "value_encoder.norm", width),
    }
    for n in range(config.nlayers):
        theirs, ours = f"transformer_encoder.layers.{n}", f"transformer_encoder.blocks.{n}"
        keys |= dense(f"{theirs}.self_attn.Wqkv", f"{ours}.attention.qkv", 3 * width, width)
        keys |= dense(f"{theirs}.self_attn.out_proj", f"{ours}.attention.out", width, width)
        keys |= dense(f"{theirs}.linear1", f"{ours}.feed_forward.inner", config.d_hid, width)
        keys |= dense(f"{theirs}.linear2", f"{ours}.feed_forward.outer", width, config.d_hid)
        keys |= norm(f"{theirs}.norm1", f"{ours}.attention_norm", width)
        keys |= norm(f"{theirs}.norm2", f"{ours}.feed_forward_norm", width)
    keys["flag_encoder.weight"] = Key((2, width), None)
    keys |= dense("decoder.fc.0", None, width, width) | dense("decoder.fc.2", None, width, width) | dense("decoder.fc.4", None, 1, width)
    keys |= dense("mvc_decoder.gene2query", None, width, width) | dense("mvc_decoder.W", None, width, width, bias=False)
    return keys
