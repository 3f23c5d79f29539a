"""Keys of the published ``EsmForMaskedLM`` files, and what becomes of each."""

from cellfm_adapters.nucleotide_transformer.model import NucleotideTransformerConfig
from cellfm_hub.weights import Key, Layout, dense, norm


def layout(config: NucleotideTransformerConfig) -> Layout:
    """Return the whole published file: what we use, and what we drop on purpose."""
    width, inner, biases = config.hidden_size, config.intermediate_size, config.add_bias_fnn
    keys: Layout = {
        "esm.embeddings.word_embeddings.weight": Key((config.vocab_size, width), "words.weight"),
        # v2 files hold a position table that its rotary network does not use.
        "esm.embeddings.position_embeddings.weight": Key(
            (config.max_position_embeddings, width), None if config.rotary else "positions.weight"
        ),
        **norm("esm.encoder.emb_layer_norm_after", "encoder.final_norm", width),
    }
    for n in range(config.num_hidden_layers):
        theirs, ours = f"esm.encoder.layer.{n}", f"encoder.blocks.{n}"
        keys |= norm(f"{theirs}.attention.LayerNorm", f"{ours}.attention_norm", width)
        for i, name in enumerate(("query", "key", "value")):
            keys |= dense(f"{theirs}.attention.self.{name}", f"{ours}.attention.qkv", width, width, part=(i, 3))
        keys |= dense(f"{theirs}.attention.output.dense", f"{ours}.attention.out", width, width)
        keys |= norm(f"{theirs}.LayerNorm", f"{ours}.feed_forward_norm", width)
        keys |= dense(
            f"{theirs}.intermediate.dense",
            f"{ours}.feed_forward.inner",
            inner * (2 if config.gated else 1),
            width,
            bias=biases,
        )
        keys |= dense(f"{theirs}.output.dense", f"{ours}.feed_forward.outer", width, inner, bias=biases)
        # Recomputed in float32 instead.
        half_head = width // config.num_attention_heads // 2
        keys[f"{theirs}.attention.self.rotary_embeddings.inv_freq"] = Key((half_head,), None, required=False)
    # Dropped: position numbers (v1), the contact head and the language-model head.
    keys["esm.embeddings.position_ids"] = Key((1, config.max_position_embeddings), None, required=False)
    keys |= dense("esm.contact_head.regression", None, 1, config.num_hidden_layers * config.num_attention_heads)
    keys |= dense("lm_head.dense", None, width, width) | norm("lm_head.layer_norm", None, width)
    keys |= dense("lm_head.decoder", None, config.vocab_size, width, bias=False)
    keys["lm_head.bias"] = Key((config.vocab_size,), None)
    return keys
