"""scGPT: genes with binned expression through a transformer without positions."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cellfm_adapters.scgpt.model import ScGPT, ScGPTConfig
from cellfm_adapters.scgpt.tokenizer import Ties, Tokenizer, Vocabulary
from cellfm_adapters.scgpt.weights import layout, published_tensors
from cellfm_hub.adapter import CellAdapter, CellOptions
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.configs import parse_config
from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.safe_files import read_json_object, read_tensors
from cellfm_hub.tokens import Tokens
from cellfm_hub.weights import Layout, load_network


class ScGPTOptions(CellOptions):
    """Switches of scGPT."""

    ties: Ties = "seeded"
    """Bin of a count on which several quantiles fall: drawn from the cell's own content and the seed, or always the highest."""
    max_length: int = Field(1200, ge=2)
    """Longest row, ``<cls>`` included; of a longer cell a random sample of genes is kept."""


class ScGPTAdapter(CellAdapter):
    """All checkpoints of scGPT: they differ in what they were trained on only."""

    options = ScGPTOptions
    gene_columns: ClassVar[tuple[str, ...]] = ("feature_name",)
    first_only = True
    pool_special = False
    unlimited = True  # no positions: the network itself takes rows of any length

    network: ScGPT
    tokenizer: Tokenizer

    @classmethod
    def published(cls, config: dict[str, Any]) -> tuple[nn.Module, Layout]:
        parsed = parse_config(ScGPTConfig, config, "the card")
        return ScGPT(parsed), layout(parsed)

    @classmethod
    def load(cls, files: CheckpointFiles, options: ScGPTOptions, device: torch.device, dtype: torch.dtype) -> Self:
        args = read_json_object(files.get("args.json"))
        vocabulary = Vocabulary(read_json_object(files.get("vocab.json")), files.origin)
        tensors = published_tensors(read_tensors(files.get("best_model.pt")), files.origin)
        config = parse_config(ScGPTConfig, {**args, "ntoken": len(vocabulary)}, files.origin, "args.json")
        _check(config, tensors, files.origin)

        adapter = cls()
        adapter.network = load_network(lambda: ScGPT(config), tensors, layout(config), origin=files.origin, device=device, dtype=dtype)
        # The other policy draws from the counts themselves.
        adapter.order_only = options.ties == "upper"
        adapter.tokenizer = Tokenizer(vocabulary, config.pad_value, options.max_length, options.ties)
        adapter.layers = config.nlayers
        adapter.embedding_dim = config.embsize
        adapter.max_tokens = options.max_length
        adapter.vocabulary = vocabulary.as_array()
        adapter.special_ids = vocabulary.special_ids
        return adapter

    def match_genes(self, ids: Sequence[str]) -> GeneMap:
        return self.tokenizer.match_genes(ids)

    def tokenize(self, counts: CountMatrix, genes: GeneMap, obs: pd.DataFrame, seed: int) -> Tokens:
        return self.tokenizer.tokenize(counts, genes, seed)

    def gene_embeddings(self) -> pd.DataFrame:
        # The original's tutorials take the table through its LayerNorm, special tokens and all.
        genes = self.network.encoder
        norm = genes.enc_norm
        vectors = F.layer_norm(genes.embedding.weight.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        return pd.DataFrame(vectors.cpu().numpy(), index=pd.Index(self.vocabulary, name="gene_id"))


def _check(config: ScGPTConfig, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Find contradictions between the three files that the shapes of the layers alone would not explain.

    Raises
    ------
    CheckpointFormatError
        If the files are not of one checkpoint.
    """
    table = tensors.get("encoder.embedding.weight")
    if table is not None and len(table) != config.ntoken:
        msg = f"vocab.json of {origin} has {config.ntoken:,} tokens (special ones included), best_model.pt has {len(table):,};"
        msg += " take both from the folder of one checkpoint"
        raise CheckpointFormatError(msg)
