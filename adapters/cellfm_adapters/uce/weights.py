"""Keys of the published model files, and what becomes of each."""

from collections.abc import Mapping

from torch import Tensor

from cellfm_adapters.uce.model import DECODER_HIDDEN, UCEConfig
from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.weights import Key, Layout, dense, norm

TOKEN_TABLE = "pe_embedding.weight"
PUBLISHED_WIDTH, PUBLISHED_HEADS = 1280, 20


def read_config(tensors: Mapping[str, Tensor], heads: int | None, origin: str) -> UCEConfig:
    """Read the sizes off the tensors.

    Parameters
    ----------
    tensors
        The model file.
    heads
        The user's number of attention heads, which no tensor shows; ``None``: that of the published models.
    origin
        Name of the checkpoint, for messages.

    Raises
    ------
    CheckpointFormatError
        If the file is not a model of UCE, or its heads are not known.
    """
    try:
        d_model, token_dim = tensors["encoder.0.weight"].shape
        d_hid = tensors["transformer_encoder.layers.0.linear1.weight"].shape[0]
        output_dim = tensors["decoder.3.weight"].shape[0]
        rows, pad_length = tensors[TOKEN_TABLE].shape[0], tensors["pos_encoder.pe"].shape[0]
    except (KeyError, ValueError) as error:
        msg = f"{origin} is not a model file of UCE ({error}); expected the state dict of 4layer_model.torch or 33l_8ep_1024t_1280.torch"
        raise CheckpointFormatError(msg) from error
    if heads is None and d_model != PUBLISHED_WIDTH:
        msg = f"{origin} has width {d_model}, not {PUBLISHED_WIDTH} as published, and the number of attention heads cannot be read"
        msg += " from weights; pass options={'nhead': number}"
        raise CheckpointFormatError(msg)
    nhead = heads or PUBLISHED_HEADS
    if d_model % nhead:
        msg = f"nhead={nhead} does not divide the width {d_model} of {origin}; pass the number that the model was trained with"
        raise CheckpointFormatError(msg)
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer_encoder.layers.")}
    return UCEConfig(len(layers), rows, token_dim, d_model, nhead, d_hid, output_dim, pad_length)


def layout(config: UCEConfig) -> Layout:
    """Return the whole published file: what we use, and the head that predicts expression, which is dropped."""
    width, inner, out = config.d_model, config.d_hid, config.output_dim
    keys: Layout = {
        TOKEN_TABLE: Key((config.rows, config.token_dim), None),  # projected row by row, see UCE.project
        "pos_encoder.pe": Key((config.pad_length, 1, width), "positions", counted=False),
    }
    for theirs, ours in (("encoder", "projection"), ("gene_embedding_layer", "gene_embedding_layer")):
        keys |= dense(f"{theirs}.0", f"{ours}.0", width, config.token_dim) | norm(f"{theirs}.2", f"{ours}.2", width)
    for n in range(config.nlayers):
        theirs, ours = f"transformer_encoder.layers.{n}", f"encoder.blocks.{n}"
        keys[f"{theirs}.self_attn.in_proj_weight"] = Key((3 * width, width), f"{ours}.attention.qkv.weight")
        keys[f"{theirs}.self_attn.in_proj_bias"] = Key((3 * width,), f"{ours}.attention.qkv.bias")
        keys |= dense(f"{theirs}.self_attn.out_proj", f"{ours}.attention.out", width, width)
        keys |= norm(f"{theirs}.norm1", f"{ours}.attention_norm", width)
        keys |= dense(f"{theirs}.linear1", f"{ours}.feed_forward.inner", inner, width)
        keys |= dense(f"{theirs}.linear2", f"{ours}.feed_forward.outer", width, inner)
        keys |= norm(f"{theirs}.norm2", f"{ours}.feed_forward_norm", width)
    widths = (width, DECODER_HIDDEN, out, out)
    for n in range(3):
        keys |= dense(f"decoder.{n}.0", f"decoder.{3 * n}", widths[n + 1], widths[n]) | norm(
            f"decoder.{n}.1", f"decoder.{3 * n + 1}", widths[n + 1]
        )
    keys |= dense("decoder.3", "decoder.9", out, out)
    # Dropped: is this gene expressed in this cell?
    widths = (width + out, 2048, 512, 128)
    for n in range(3):
        keys |= dense(f"binary_decoder.{n}.0", None, widths[n + 1], widths[n]) | norm(f"binary_decoder.{n}.1", None, widths[n + 1])
    keys |= dense("binary_decoder.3", None, 1, widths[-1])
    return keys
