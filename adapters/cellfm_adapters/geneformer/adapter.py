"""Geneformer: ranked genes through a BERT encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch import nn

from cellfm_adapters.geneformer.dictionaries import find_dictionaries
from cellfm_adapters.geneformer.model import Geneformer, GeneformerConfig
from cellfm_adapters.geneformer.tokenizer import Tokenizer
from cellfm_adapters.geneformer.weights import layout
from cellfm_hub.adapter import CellAdapter, CellOptions
from cellfm_hub.checkpoints import WEIGHT_FILES, CheckpointFiles
from cellfm_hub.configs import parse_config
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.safe_files import read_json_object, read_tensors
from cellfm_hub.tokens import Tokens
from cellfm_hub.weights import Layout, load_network


class GeneformerOptions(CellOptions):
    """Switches of Geneformer."""

    dictionaries: Path | None = None
    """Folder with the token, median and mapping dictionaries; default: beside the weights, then the cache."""


class GeneformerAdapter(CellAdapter):
    """All generations of Geneformer; which one is read from the checkpoint."""

    options = GeneformerOptions
    gene_columns: ClassVar[tuple[str, ...]] = ("ensembl_id",)
    obs_columns: ClassVar[tuple[str, ...]] = ("filter_pass",)
    first_only = True
    pool_special = False  # "cell" of the original release: the mean over genes

    network: Geneformer
    tokenizer: Tokenizer

    @classmethod
    def published(cls, config: dict[str, Any]) -> tuple[nn.Module, Layout]:
        parsed = parse_config(GeneformerConfig, config, "the card")
        return Geneformer(parsed), layout(parsed)

    @classmethod
    def load(cls, files: CheckpointFiles, options: GeneformerOptions, device: torch.device, dtype: torch.dtype) -> Self:
        config = parse_config(GeneformerConfig, read_json_object(files.get("config.json")), files.origin)
        weights = files.get(*WEIGHT_FILES)
        dictionaries = find_dictionaries(files, options.dictionaries, config.vocab_size)

        adapter = cls()
        tensors = read_tensors(weights)
        adapter.network = load_network(lambda: Geneformer(config), tensors, layout(config), origin=files.origin, device=device, dtype=dtype)
        adapter.tokenizer = Tokenizer(dictionaries, config.max_position_embeddings)
        adapter.layers = config.num_hidden_layers
        adapter.embedding_dim = config.hidden_size
        adapter.max_tokens = config.max_position_embeddings
        adapter.vocabulary = dictionaries.vocabulary
        adapter.special_ids = tuple(i for token, i in dictionaries.tokens.items() if token.startswith("<"))
        adapter.poolings = ("cls", "mean", "max") if dictionaries.has_cls else ("mean", "max")
        return adapter

    def match_genes(self, ids: Sequence[str]) -> GeneMap:
        return self.tokenizer.match_genes(ids)

    def tokenize(self, counts: CountMatrix, genes: GeneMap, obs: pd.DataFrame, seed: int) -> Tokens:
        if "filter_pass" in obs:
            # The original release leaves out cells whose filter_pass is not 1.
            kept = (obs["filter_pass"] == 1).to_numpy()
            counts = counts.multiply(kept[:, None]).tocsr()
            counts.eliminate_zeros()
        return self.tokenizer.tokenize(counts, genes)

    def gene_embeddings(self) -> pd.DataFrame:
        vectors = self.network.genes.weight.float().cpu().numpy()
        genes = np.setdiff1d(np.arange(len(self.vocabulary)), self.special_ids)
        return pd.DataFrame(vectors[genes], index=pd.Index(self.vocabulary[genes], name="gene_id"))
