"""UCE: sampled genes, as proteins on chromosomes, through a transformer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cellfm_adapters.uce.filtering import filter_genes
from cellfm_adapters.uce.model import UCE, UCEConfig
from cellfm_adapters.uce.species import SPECIAL_NAMES, Genes, check_species, new_species, published_genes, tell_species
from cellfm_adapters.uce.tokenizer import SAMPLE_SIZE, PlacedGenes, place_genes, tokenize
from cellfm_adapters.uce.weights import TOKEN_TABLE, layout, read_config
from cellfm_hub.adapter import CellAdapter, CellOptions
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.configs import parse_config
from cellfm_hub.errors import InputError
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.nn import PackedBatch, segment_pool
from cellfm_hub.nn.matmul_precision import exact_products
from cellfm_hub.safe_files import read_tensors
from cellfm_hub.tokens import Tokens
from cellfm_hub.weights import Layout, check_numbers, load_network

PROJECTED_TOGETHER = 1024
"""Rows of the token table that are projected at once, always the same ones together, so that results do not depend on what came before."""


class UCEOptions(CellOptions):
    """Switches of UCE."""

    filter: bool = False
    """The original's filter of genes and cells, which makes a vector depend on the other cells of the file."""
    samples: int = Field(1, ge=1)
    """Sentences per cell whose vectors are averaged."""
    nhead: int | None = Field(None, ge=1)
    """Attention heads, for weights of another width than the published models, which have 20."""
    proteins: Path | None = None
    """New species: file of ESM2 vectors, symbol -> vector."""
    chromosomes: Path | None = None
    """New species: its table of chromosomes."""
    taxon: int | None = None
    """New species: NCBI taxonomy id."""


class UCEAdapter(CellAdapter):
    """The 4-layer and the 33-layer model."""

    options = UCEOptions
    first_only = True
    poolings = ("cls", "mean", "max")
    tokens_per_cell: ClassVar[int] = 1 + SAMPLE_SIZE + 2 * 24  # human chromosomes

    network: UCE
    genes: Genes
    samples: int
    _config: UCEConfig
    _origin: str
    _table: Tensor
    """The token table, ``(V, P)``, left on disk where it can be; rows are projected when they are first needed."""
    _projected: NDArray[np.bool_]

    @classmethod
    def published(cls, config: dict[str, Any]) -> tuple[nn.Module, Layout]:
        parsed = parse_config(UCEConfig, config, "the card")
        return UCE(parsed), layout(parsed)

    @classmethod
    def load(cls, files: CheckpointFiles, options: UCEOptions, device: torch.device, dtype: torch.dtype) -> Self:
        weights = files.get(*(name for name in files.entry.checkpoint.files if name.endswith(".torch")))
        tensors = read_tensors(weights)
        config = read_config(tensors, options.nhead, files.origin)
        table, file_layout = tensors[TOKEN_TABLE], layout(config)
        adapter = cls()
        if options.proteins is None and options.chromosomes is None and options.taxon is None:
            adapter.genes = published_genes(files, table)
        elif options.proteins is None or options.chromosomes is None or options.taxon is None:
            msg = "options proteins, chromosomes and taxon describe a new species together: pass all three or none"
            raise InputError(msg)
        else:
            # The original release puts the new species in the place of all others.
            adapter.genes, table = new_species(options.proteins, options.chromosomes, options.taxon, table[: len(SPECIAL_NAMES)])
            config = replace(config, rows=len(table))
        check_numbers(table[: len(SPECIAL_NAMES)], TOKEN_TABLE, files.origin)
        adapter.network = load_network(lambda: UCE(config), tensors, file_layout, origin=files.origin, device=device, dtype=dtype)
        adapter.samples, adapter.dataset_dependent = options.samples, options.filter
        adapter.species = adapter.genes.species
        adapter.layers = config.nlayers
        adapter.embedding_dim = config.output_dim
        adapter.max_tokens = config.pad_length
        adapter._config, adapter._table, adapter._origin = config, table, files.origin
        adapter._projected = np.zeros(-(-len(table) // PROJECTED_TOGETHER), dtype=bool)
        return adapter

    @cached_property
    def vocabulary(self) -> NDArray[np.str_]:  # type: ignore[override]  # made when asked for: it needs the genes of all species
        return self.genes.vocabulary(self._config.rows)

    # Genes

    def gene_matcher(self, species: str | None, columns: Mapping[str, Sequence[str]]) -> Callable[[Sequence[str]], GeneMap]:
        note: str | None
        if species is None:
            chosen, note = tell_species(columns, self.genes)
        else:
            chosen = self.genes.get(species)
            note = check_species(chosen, columns, self.genes)
        return lambda ids: place_genes(ids, chosen, note)

    def match_genes(self, ids: Sequence[str]) -> GeneMap:
        return self.gene_matcher(None, {"index": ids})(ids)

    def survey(self, genes: GeneMap, blocks: Callable[[], Iterator[CountMatrix]]) -> GeneMap:
        assert isinstance(genes, PlacedGenes)
        return filter_genes(genes, blocks)

    def tokenize(self, counts: CountMatrix, genes: GeneMap, obs: pd.DataFrame, seed: int) -> Tokens:
        assert isinstance(genes, PlacedGenes)
        first_chromosome = self.genes.first_chromosome
        return tokenize(counts, genes, seed, samples=self.samples, first_chromosome=first_chromosome, max_tokens=self.max_tokens)

    def gene_embeddings(self) -> pd.DataFrame:
        return self.gene_embeddings_of(self.genes.species[0])  # human, or the new species

    def gene_embeddings_of(self, species: str) -> pd.DataFrame:
        chosen = self.genes.get(species)
        rows = self._table[chosen.first_row : chosen.first_row + len(chosen.symbols)]
        layer = self.network.gene_embedding_layer
        at = next(layer.parameters())
        check_numbers(rows, TOKEN_TABLE, self._origin)
        with torch.inference_mode(), exact_products():
            parts = [layer(rows[i : i + PROJECTED_TOGETHER].to(at)).float().cpu() for i in range(0, len(rows), PROJECTED_TOGETHER)]
        return pd.DataFrame(torch.cat(parts).numpy(), index=pd.Index(chosen.symbols, name="gene_id"))

    # Network

    def prepare(self, tokens: Tokens) -> None:
        """Project the rows of the token table that are needed and were not needed before."""
        wanted = np.zeros(len(self._projected), dtype=bool)
        wanted[tokens.ids // PROJECTED_TOGETHER] = True
        with torch.inference_mode(), exact_products():
            for part in np.flatnonzero(wanted & ~self._projected):
                rows = slice(part * PROJECTED_TOGETHER, (part + 1) * PROJECTED_TOGETHER)
                # The rest of the table stays on disk, unread.
                check_numbers(self._table[rows], TOKEN_TABLE, self._origin)
                self.network.tokens[rows] = self.network.project(self._table[rows].to(self.network.tokens.device))
                self._projected[part] = True

    def width(self, pooling: str | None, layer: int) -> int:
        return self._config.output_dim if layer == self.layers else self._config.d_model

    def pool(self, hidden: Tensor, batch: PackedBatch, pooling: str) -> Tensor:
        if pooling == "cls":
            return F.normalize(super().pool(hidden, batch, "cls"), dim=-1, eps=1e-12)
        is_gene = (batch.ids >= len(SPECIAL_NAMES)) & (batch.ids < self.genes.first_chromosome)
        return segment_pool(hidden, batch, is_gene, pooling)
