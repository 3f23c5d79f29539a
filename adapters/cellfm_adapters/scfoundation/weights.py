"""Keys of one sub-model of the published ``models.ckpt``, and what becomes of each; its settings."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cellfm_adapters.scfoundation.model import ScFoundationConfig
from cellfm_hub.configs import parse_config
from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.nn import random_features
from cellfm_hub.weights import Key, Layout, dense, norm

SUB_MODELS = ("cell", "rde", "gene")
"""The three models in the file."""


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``{"encoder": {"depth": 12}}`` as ``{"encoder_depth": 12}``, the form that cards use."""
    flat = dict[str, Any]()
    for name, value in settings.items():
        flat |= {f"{name}_{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def sub_model(
    content: Mapping[str, Any], name: str, published: Mapping[str, Any], origin: str
) -> tuple[ScFoundationConfig, dict[str, Tensor]]:
    """Return the settings and tensors of one of the models in the file.

    Parameters
    ----------
    content
        The file.
    name
        ``"cell"``, ``"rde"`` or ``"gene"``.
    published
        Settings of the published model, used where those of the file are not plain data.
    origin
        Name of the checkpoint, for messages.

    Raises
    ------
    CheckpointFormatError
        If the file is not laid out as published.
    """
    part = content.get(name)
    state = part.get("state_dict") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        msg = f"the checkpoint of {origin} has no sub-model {name!r} with a state_dict of tensors; it holds"
        msg += f" {', '.join(map(str, content))[:200] or 'nothing'}, expected {', '.join(SUB_MODELS)}: use the authors' models.ckpt"
        raise CheckpointFormatError(msg)
    try:
        config = part["config"]
        settings = {**config["model_config"]["mae_autobin"], **config["dataset_config"]["rnaseq"]}
    except (KeyError, TypeError):
        settings = dict(published)
    tensors = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    return parse_config(ScFoundationConfig, flatten_settings(settings), origin, "models.ckpt"), tensors


def layout(config: ScFoundationConfig, *, decoder: bool) -> Layout:
    """Return a whole sub-model: what we use, and what we drop on purpose (for cell vectors, the decoder)."""
    width, deep, bins = config.encoder_hidden_dim, config.decoder_hidden_dim, config.bin_num
    keys: Layout = {
        **dense("token_emb.mlp", "values.first", bins, 1),
        **dense("token_emb.mlp2", "values.second", bins, bins),
        "token_emb.emb.weight": Key((bins, width), "values.bins.weight"),
        "token_emb.emb_mask.weight": Key((1, width), "values.mask.weight"),
        "token_emb.emb_pad.weight": Key((1, width), "values.pad.weight"),
        "pos_emb.weight": Key((config.seq_len + 1, width), "positions.weight"),
        **norm("encoder.norm", "norm", width),
    }
    for n in range(config.encoder_depth):
        theirs, ours = f"encoder.transformer_encoder.{n}", f"encoder.blocks.{n}"
        keys[f"{theirs}.self_attn.in_proj_weight"] = Key((3 * width, width), f"{ours}.attention.qkv.weight")
        keys[f"{theirs}.self_attn.in_proj_bias"] = Key((3 * width,), f"{ours}.attention.qkv.bias")
        keys |= dense(f"{theirs}.self_attn.out_proj", f"{ours}.attention.out", width, width)
        keys |= dense(f"{theirs}.linear1", f"{ours}.feed_forward.inner", 4 * width, width)
        keys |= dense(f"{theirs}.linear2", f"{ours}.feed_forward.outer", width, 4 * width)
        keys |= norm(f"{theirs}.norm1", f"{ours}.attention_norm", width)
        keys |= norm(f"{theirs}.norm2", f"{ours}.feed_forward_norm", width)

    def wanted(name: str) -> str | None:
        return f"decoder.{name}" if decoder else None

    heads, head = config.decoder_heads, config.decoder_dim_head
    keys |= dense("decoder_embed", wanted("embed"), deep, width)
    for n in range(config.decoder_depth):
        theirs, ours = f"decoder.performer.net.layers.{n}", f"performer.blocks.{n}"
        keys |= norm(f"{theirs}.0.norm", wanted(f"{ours}.attention_norm"), deep)
        # The random directions are a buffer: fixed, but not a parameter.
        projection = Key((random_features(head), head), wanted(f"{ours}.projection"), counted=False)
        keys[f"{theirs}.0.fn.fast_attention.projection_matrix"] = projection
        for i, name in enumerate(("to_q", "to_k", "to_v")):
            keys |= dense(f"{theirs}.0.fn.{name}", wanted(f"{ours}.qkv"), heads * head, deep, part=(i, 3))
        keys |= dense(f"{theirs}.0.fn.to_out", wanted(f"{ours}.out"), deep, heads * head)
        keys |= norm(f"{theirs}.1.norm", wanted(f"{ours}.feed_forward_norm"), deep)
        keys |= dense(f"{theirs}.1.fn.fn.w1", wanted(f"{ours}.inner"), 4 * deep, deep)
        keys |= dense(f"{theirs}.1.fn.fn.w2", wanted(f"{ours}.outer"), deep, 4 * deep)
    keys |= norm("decoder.norm", wanted("performer.final_norm"), deep)
    keys |= norm("norm", wanted("norm"), deep)
    # Dropped: a counter of training, and the head that predicts expression.
    keys["decoder.performer.calls_since_last_redraw"] = Key((), None, counted=False)
    keys |= dense("to_final", None, 1, deep)
    return keys
