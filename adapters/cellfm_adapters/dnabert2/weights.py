"""Keys of the published files, and what becomes of each."""

from typing import Literal

from cellfm_adapters.dnabert2.model import Dnabert2Config
from cellfm_hub.weights import Key, Layout, dense, norm

Head = Literal["masked-lm", "pooler"]
"""What a file holds besides the encoder. DNABERT-2 was saved with its language-model head, DNABERT-S with a pooler; both are dropped."""


def layout(config: Dnabert2Config, prefix: str, head: Head) -> Layout:
    """Return the whole published file: what we use, and what we drop on purpose.

    Parameters
    ----------
    config
        Sizes.
    prefix
        Before every key of the encoder: ``"bert."`` where the file was saved with a head, else ``""``.
    head
        Which one the file is published with.
    """
    width, inner = config.hidden_size, config.intermediate_size
    keys: Layout = {
        f"{prefix}embeddings.word_embeddings.weight": Key((config.vocab_size, width), "words.weight"),
        f"{prefix}embeddings.token_type_embeddings.weight": Key((config.type_vocab_size, width), "token_types.weight"),
        **norm(f"{prefix}embeddings.LayerNorm", "embedding_norm", width),
    }
    for n in range(config.num_hidden_layers):
        theirs, ours = f"{prefix}encoder.layer.{n}", f"encoder.blocks.{n}"
        keys |= dense(f"{theirs}.attention.self.Wqkv", f"{ours}.attention.qkv", 3 * width, width)
        keys |= dense(f"{theirs}.attention.output.dense", f"{ours}.attention.out", width, width)
        keys |= norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm", width)
        keys |= dense(f"{theirs}.mlp.gated_layers", f"{ours}.feed_forward.inner", 2 * inner, width, bias=False)
        keys |= dense(f"{theirs}.mlp.wo", f"{ours}.feed_forward.outer", width, inner)
        keys |= norm(f"{theirs}.mlp.layernorm", f"{ours}.feed_forward_norm", width)
    masked_lm = dense("cls.predictions.transform.dense", None, width, width) | norm("cls.predictions.transform.LayerNorm", None, width)
    masked_lm["cls.predictions.decoder.bias"] = Key((config.vocab_size,), None)
    # The same matrix as the word embeddings; safetensors copies leave it out.
    masked_lm["cls.predictions.decoder.weight"] = Key((config.vocab_size, width), None, counted=False)
    heads: dict[Head, Layout] = {"masked-lm": masked_lm, "pooler": dense(f"{prefix}pooler.dense", None, width, width)}
    for name, extra in heads.items():
        keys |= {key: Key(k.shape, None, required=name == head, counted=k.counted) for key, k in extra.items()}
    return keys
