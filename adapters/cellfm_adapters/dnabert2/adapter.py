"""DNABERT-2 and DNABERT-S: byte pairs through a MosaicBERT encoder."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from cellfm_adapters.dnabert2.model import Dnabert2, Dnabert2Config
from cellfm_adapters.dnabert2.tokenizer import Tokenizer
from cellfm_adapters.dnabert2.weights import Head, layout
from cellfm_hub.adapter import Options, SequenceAdapter
from cellfm_hub.checkpoints import WEIGHT_FILES, CheckpointFiles
from cellfm_hub.configs import parse_config
from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.safe_files import read_json_object, read_tensors
from cellfm_hub.sequences import Case
from cellfm_hub.tokens import Tokens
from cellfm_hub.weights import Layout, load_network


class Dnabert2Options(Options):
    """Switches of DNABERT-2 and DNABERT-S."""

    case: Case = "upper"
    """``as-is``: as in the original release, where each lower-case letter is one unknown token."""


class Dnabert2Adapter(SequenceAdapter):
    """Either model; how its file was saved is read from the file."""

    options = Dnabert2Options
    first_only = True
    poolings = ("mean", "cls", "max", "mean-bases")
    unlimited = True
    saved_with: ClassVar[Head] = "masked-lm"

    network: Dnabert2
    tokenizer: Tokenizer

    @classmethod
    def published(cls, config: dict[str, Any]) -> tuple[nn.Module, Layout]:
        parsed = parse_config(Dnabert2Config, config, "the card")
        return Dnabert2(parsed), layout(parsed, "bert." if cls.saved_with == "masked-lm" else "", cls.saved_with)

    @classmethod
    def load(cls, files: CheckpointFiles, options: Dnabert2Options, device: torch.device, dtype: torch.dtype) -> Self:
        config = parse_config(Dnabert2Config, read_json_object(files.get("config.json")), files.origin)
        tensors = read_tensors(files.get(*WEIGHT_FILES))
        tokenizer = Tokenizer(files.get("tokenizer.json"))
        if len(tokenizer.vocabulary) > config.vocab_size:
            msg = f"tokenizer.json of {files.origin} has {len(tokenizer.vocabulary):,} tokens, the weights have {config.vocab_size:,} rows;"
            msg += " use the files of one checkpoint"
            raise CheckpointFormatError(msg)
        prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""

        adapter = cls()
        adapter.network = load_network(
            lambda: Dnabert2(config),
            tensors,
            layout(config, prefix, cls.saved_with),
            origin=files.origin,
            device=device,
            dtype=dtype,
        )
        adapter.tokenizer = tokenizer
        adapter.layers = config.num_hidden_layers
        adapter.embedding_dim = config.hidden_size
        # Not a limit: the size of windows where truncation or tiling is asked for.
        adapter.max_tokens = config.alibi_starting_size
        adapter.vocabulary = tokenizer.vocabulary
        adapter.unknown_id = tokenizer.unk_id
        adapter.special_ids = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id)
        adapter.prefix = (tokenizer.cls_id,)
        adapter.suffix = (tokenizer.sep_id,)
        return adapter

    def tokenize(self, sequences: Sequence[str]) -> Tokens:
        return self.tokenizer.tokenize(sequences)


class DnabertSAdapter(Dnabert2Adapter):
    """The same model; its published file comes with a pooler, which was never trained, in place of the language-model head."""

    saved_with = "pooler"
