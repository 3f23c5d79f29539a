"""Keys of the published ``BertForMaskedLM`` files, and what becomes of each."""

from cellfm_adapters.geneformer.model import GeneformerConfig
from cellfm_hub.weights import Key, Layout, dense, norm


def layout(config: GeneformerConfig) -> Layout:
    """Return the whole published file: what we use, and the language-model head, which is dropped."""
    width, inner = config.hidden_size, config.intermediate_size
    keys: Layout = {
        "bert.embeddings.word_embeddings.weight": Key((config.vocab_size, width), "genes.weight"),
        "bert.embeddings.position_embeddings.weight": Key((config.max_position_embeddings, width), "ranks.weight"),
        "bert.embeddings.token_type_embeddings.weight": Key((config.type_vocab_size, width), "token_types.weight"),
        **norm("bert.embeddings.LayerNorm", "norm", width),
    }
    for n in range(config.num_hidden_layers):
        theirs, ours = f"bert.encoder.layer.{n}", f"encoder.blocks.{n}"
        for i, name in enumerate(("query", "key", "value")):
            keys |= dense(f"{theirs}.attention.self.{name}", f"{ours}.attention.qkv", width, width, part=(i, 3))
        keys |= dense(f"{theirs}.attention.output.dense", f"{ours}.attention.out", width, width)
        keys |= norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm", width)
        keys |= dense(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.inner", inner, width)
        keys |= dense(f"{theirs}.output.dense", f"{ours}.feed_forward.outer", width, inner)
        keys |= norm(f"{theirs}.output.LayerNorm", f"{ours}.feed_forward_norm", width)
    # Dropped: position numbers (V1), the language-model head, and in .bin files second copies of its tied matrix.
    keys["bert.embeddings.position_ids"] = Key((1, config.max_position_embeddings), None, required=False)
    keys["cls.predictions.bias"] = Key((config.vocab_size,), None)
    keys |= dense("cls.predictions.transform.dense", None, width, width) | norm("cls.predictions.transform.LayerNorm", None, width)
    keys["cls.predictions.decoder.weight"] = Key((config.vocab_size, width), None, required=False)
    keys["cls.predictions.decoder.bias"] = Key((config.vocab_size,), None, required=False)
    return keys
