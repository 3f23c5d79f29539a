"""scFoundation: expressed genes and two depth tokens through an encoder; gene vectors through a decoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor, nn

from cellfm_adapters.scfoundation.model import ScFoundation, ScFoundationConfig
from cellfm_adapters.scfoundation.tokenizer import TargetDepth, Tokenizer
from cellfm_adapters.scfoundation.weights import layout, sub_model
from cellfm_hub.adapter import CellAdapter, CellOptions
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.configs import parse_config
from cellfm_hub.errors import CheckpointFormatError, InputError
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.nn import PackedBatch, segment_max, segment_mean, segment_pool
from cellfm_hub.safe_files import read_checkpoint, read_text
from cellfm_hub.tokens import Tokens, offsets_from_lengths
from cellfm_hub.weights import Layout, load_network

GENE_LIST = "OS_scRNA_gene_index.19264.tsv"


class ScFoundationOptions(CellOptions):
    """Switches of scFoundation, named as in the original release."""

    input_type: Literal["singlecell", "bulk"] = "singlecell"
    """Single cells, or bulk samples."""
    pre_normalized: Literal["F", "T", "A"] = "F"
    """``F``: raw counts. ``T``: values are log1p of counts per 10,000. ``A``: the same, and the last column is the raw total."""
    tgthighres: str = "t4"
    """Depth the model is asked to imagine: ``t4`` = 10^4 counts, ``f2`` = twice the cell's, ``a1`` = 10 times; bulk ignores it."""
    version: Literal["ce", "rde"] = "ce"
    """Weights for cell vectors: for embedding, or for read-depth enhancement."""

    @field_validator("pre_normalized")
    @classmethod
    def _known_for_bulk(cls, value: str, info: ValidationInfo) -> str:
        if value == "A" and info.data.get("input_type") == "bulk":
            msg = "bulk samples are 'F' or 'T'"
            raise ValueError(msg)
        return value

    @field_validator("tgthighres")
    @classmethod
    def _readable(cls, value: str) -> str:
        TargetDepth.parse(value)
        return value


def read_gene_list(path: Path) -> list[str]:
    """Read the symbols in the order of the file, which is the order of the model and not sorted.

    Raises
    ------
    CheckpointFormatError
        If it is not the published table.
    """
    rows = [line.split("\t") for line in read_text(path).removesuffix("\n").split("\n")]
    if not rows or rows[0] != ["gene_name", "index"] or any(row[1:] != [str(i)] for i, row in enumerate(rows[1:])):
        msg = f"{path} is not the published gene list; expected the columns gene_name and index, the latter counting 0, 1, 2, …"
        raise CheckpointFormatError(msg)
    return [row[0] for row in rows[1:]]


class ScFoundationAdapter(CellAdapter):
    """The one published model, with its sub-models for cells (two versions) and for genes."""

    options = ScFoundationOptions
    gene_columns: ClassVar[tuple[str, ...]] = ("gene_name",)
    poolings = ("all", "max")

    network: ScFoundation
    tokenizer: Tokenizer

    @classmethod
    def published(cls, config: dict[str, Any]) -> tuple[nn.Module, Layout]:
        parsed = parse_config(ScFoundationConfig, config, "the card")
        return ScFoundation(parsed, decoder=True), layout(parsed, decoder=True)

    @classmethod
    def load(cls, files: CheckpointFiles, options: ScFoundationOptions, device: torch.device, dtype: torch.dtype) -> Self:
        # A clone of the original repository keeps the weights in a folder of their own.
        weights = files.get("models.ckpt", "models/models.ckpt")
        genes = read_gene_list(files.get(GENE_LIST))

        adapter = cls()
        adapter._files, adapter._device, adapter._gene_network = files, device, None
        adapter._content = read_checkpoint(weights)
        adapter.network = adapter._sub_model("rde" if options.version == "rde" else "cell", dtype, decoder=False)
        config = adapter.network.config
        if len(genes) != config.genes:
            msg = f"{GENE_LIST} of {files.origin} names {len(genes):,} genes, the weights are for {config.genes:,};"
            msg += " use the files of one release"
            raise CheckpointFormatError(msg)
        adapter.tokenizer = Tokenizer(genes, options.input_type, options.pre_normalized, TargetDepth.parse(options.tgthighres))
        adapter.layers = config.encoder_depth
        adapter.embedding_dim = adapter.width("all", adapter.layers)
        adapter.max_tokens = config.seq_len
        adapter.vocabulary = np.array([*genes, "<target depth>", "<source depth>"])
        adapter.special_ids = (adapter.tokenizer.target_token, adapter.tokenizer.source_token)
        if options.input_type == "bulk":
            adapter.values = "log values" if options.pre_normalized == "T" else "abundances"
            # Samples are brought to the median total of all samples.
            adapter.dataset_dependent = options.pre_normalized == "F"
        elif options.pre_normalized != "F":
            adapter.values = "log values"
        return adapter

    _files: CheckpointFiles
    _device: torch.device
    _content: Mapping[str, Any]
    """The file, mapped into memory: what is not used takes no room."""
    _gene_network: ScFoundation | None

    def _sub_model(self, name: str, dtype: torch.dtype, *, decoder: bool) -> ScFoundation:
        origin = self._files.origin
        config, tensors = sub_model(self._content, name, self._files.entry.checkpoint.config, origin)
        return load_network(
            lambda: ScFoundation(config, decoder=decoder),
            tensors,
            layout(config, decoder=decoder),
            origin=origin,
            device=self._device,
            dtype=dtype,
        )

    # Cells

    def match_genes(self, ids: Sequence[str]) -> GeneMap:
        return self.tokenizer.match_genes(ids)

    def survey(self, genes: GeneMap, blocks: Callable[[], Iterator[CountMatrix]]) -> GeneMap:
        return self.tokenizer.survey(genes, (genes.apply(counts) for counts in blocks()))

    def tokenize(self, counts: CountMatrix, genes: GeneMap, obs: pd.DataFrame, seed: int) -> Tokens:
        return self.tokenizer.tokenize(counts, genes)

    def width(self, pooling: str | None, layer: int) -> int:
        config = self.network.config
        if pooling is None:
            return config.decoder_hidden_dim
        return 4 * config.encoder_hidden_dim if pooling == "all" else config.encoder_hidden_dim

    def pool(self, hidden: Tensor, batch: PackedBatch, pooling: str) -> Tensor:
        if pooling != "all":
            return segment_pool(hidden, batch, torch.ones_like(batch.ids, dtype=torch.bool), pooling)
        target, source = self.special_ids

        def at(token: int, from_end: int) -> Tensor:  # (B, D); NaN where tokens made by the caller end in something else
            rows = batch.starts + batch.segment_lengths - from_end
            return hidden[rows].float().masked_fill((batch.ids[rows] != token)[:, None], torch.nan)

        genes = batch.ids < target
        return torch.cat((at(source, 1), at(target, 2), segment_max(hidden, batch, genes), segment_mean(hidden, batch, genes)), dim=-1)

    # Genes

    def token_rows(self, tokens: Tokens) -> Tokens:
        """Return all genes, expressed or not, for each cell that has a vector."""
        genes, cells = self.network.config.genes, tokens.lengths > 0
        ids = np.tile(np.arange(genes, dtype=np.int32), int(cells.sum()))
        return Tokens(ids=ids, offsets=offsets_from_lengths(cells * genes))

    def token_vectors(self, batch: PackedBatch, layer: int) -> Tensor:
        if layer != self.layers:
            msg = f"gene vectors come from the decoder, which follows the last layer; leave out output_layer={layer}"
            raise InputError(msg)
        # The hub may have turned to another dtype since the weights were read.
        dtype = next(self.network.parameters()).dtype
        if self._gene_network is None:
            self._gene_network = self._sub_model("gene", dtype, decoder=True)
        return self._gene_network.to(dtype).decode(batch)

    def unload(self) -> None:
        super().unload()
        self._gene_network = None

    def gene_embeddings(self) -> pd.DataFrame:
        genes = self.vocabulary[: self.network.config.genes]
        vectors = self.network.positions.weight[: len(genes)].float().cpu().numpy()
        return pd.DataFrame(vectors, index=pd.Index(genes, name="gene_id"))
