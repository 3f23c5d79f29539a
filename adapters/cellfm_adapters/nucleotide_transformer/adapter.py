"""Nucleotide Transformer: 6-mers through a pre-norm encoder."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import nn

from cellfm_adapters.nucleotide_transformer.model import NucleotideTransformer, NucleotideTransformerConfig
from cellfm_adapters.nucleotide_transformer.tokenizer import Tokenizer
from cellfm_adapters.nucleotide_transformer.weights import layout
from cellfm_hub.adapter import Options, SequenceAdapter
from cellfm_hub.checkpoints import WEIGHT_FILES, CheckpointFiles
from cellfm_hub.configs import check_value, parse_config
from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.safe_files import read_json_object, read_tensors, read_text
from cellfm_hub.sequences import Case
from cellfm_hub.tokens import Tokens
from cellfm_hub.weights import Layout, load_network

_TwoOrMore = Annotated[int, Field(ge=2)]
"""``<cls>`` and a token; files without a limit state 10^30."""


class NucleotideTransformerOptions(Options):
    """Switches of the Nucleotide Transformer."""

    case: Case = "upper"
    """``as-is``: as in the original release, where a run of lower-case letters is one unknown token."""


class NucleotideTransformerAdapter(SequenceAdapter):
    """Both generations, AgroNT and the 3-mer model; which one is read from the checkpoint."""

    options = NucleotideTransformerOptions
    first_only = True
    poolings = ("mean", "cls", "max", "mean-bases")

    network: NucleotideTransformer
    tokenizer: Tokenizer

    @classmethod
    def published(cls, config: dict[str, Any]) -> tuple[nn.Module, Layout]:
        parsed = parse_config(NucleotideTransformerConfig, config, "the card")
        return NucleotideTransformer(parsed), layout(parsed)

    @classmethod
    def load(cls, files: CheckpointFiles, options: NucleotideTransformerOptions, device: torch.device, dtype: torch.dtype) -> Self:
        config = parse_config(NucleotideTransformerConfig, read_json_object(files.get("config.json")), files.origin)
        weights = files.get(*WEIGHT_FILES)
        tokenizer = Tokenizer(read_text(files.get("vocab.txt")).split())
        # The vocabulary of v1 lists <eos> and <bos> behind the last row of the table; no sequence produces them.
        if tokenizer.used_ids > config.vocab_size:
            msg = f"vocab.txt of {files.origin} makes ids up to {tokenizer.used_ids - 1}, the weights have {config.vocab_size} rows;"
            msg += " v1 and v2 number their tokens differently, use the file of the same checkpoint"
            raise CheckpointFormatError(msg)
        settings = files.find("tokenizer_config.json")
        limit = read_json_object(settings).get("model_max_length") if settings else None
        # Row pad_token_id of the table stands for padding, and positions begin behind it.
        positions = config.max_position_embeddings - config.pad_token_id - 1
        check_value(_TwoOrMore, positions, "max_position_embeddings - pad_token_id - 1", files.origin, "config.json")
        check_value(_TwoOrMore | None, limit, "model_max_length", files.origin, "tokenizer_config.json")

        adapter = cls()
        adapter.network = load_network(
            lambda: NucleotideTransformer(config),
            read_tensors(weights),
            layout(config),
            origin=files.origin,
            device=device,
            dtype=dtype,
        )
        adapter.tokenizer = tokenizer
        adapter.layers = config.num_hidden_layers
        adapter.embedding_dim = config.hidden_size
        adapter.max_tokens = positions if limit is None else min(limit, positions)
        adapter.vocabulary = tokenizer.vocabulary[: config.vocab_size]
        adapter.unknown_id = tokenizer.unk_id
        adapter.special_ids = (tokenizer.cls_id, tokenizer.mask_id)
        adapter.prefix = (tokenizer.cls_id,)
        return adapter

    def tokenize(self, sequences: Sequence[str]) -> Tokens:
        return self.tokenizer.tokenize(sequences)
