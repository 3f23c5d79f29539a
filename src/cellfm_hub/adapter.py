"""What a family of models implements. ``adapters/README.md`` walks through it.

::

    Adapter
    ├── TokenAdapter             tokens go through a network
    │   ├── CellAdapter            counts of genes
    │   └── SequenceAdapter        DNA or RNA
    ├── CellFeatures             a plain function of counts, no network (pca, hvg)
    └── SequenceFeatures         a plain function of sequences, no network (kmer)

The hub reads data, finds counts, plans batches, moves tensors, pools and writes. An adapter turns rows into :class:`Tokens` and tokens
into hidden states.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.errors import InputError
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.nn import PackedBatch, first, segment_mean, segment_pool
from cellfm_hub.sources.cells import MatrixValues
from cellfm_hub.tokens import Tokens
from cellfm_hub.weights import Layout


class Options(BaseModel):
    """The switches of a family, ``load(..., options={...})``: one annotated field each, defaults included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, given: dict[str, Any] | None, model: str) -> Self:
        """Validate what the user gave.

        Raises
        ------
        InputError
            Listing what is allowed.
        """
        try:
            return cls.model_validate(given or {})
        except ValidationError as error:
            first_error = error.errors()[0]
            key = ".".join(map(str, first_error["loc"]))
            unknown = first_error["type"] == "extra_forbidden"
            wrong = f"{key!r} is not one" if unknown else f"{key}={first_error['input']!r} is refused ({first_error['msg']})"
            msg = f"options of {model}: {wrong}; {cls.describe()}"
            raise InputError(msg) from error

    @classmethod
    def describe(cls) -> str:
        """Say in one line which options there are."""
        schema = cls.model_json_schema().get("properties", {})
        if not schema:
            return "this model takes no options"
        shown = []
        own_first = sorted(cls.model_fields.items(), key=lambda item: item[0] not in cls.__annotations__)
        for name, field in own_first:
            values = " | ".join(str(v) for v in schema[name].get("enum", ()))
            shown.append(f"{name}={field.default}" + (f" ({values})" if values else ""))
        return f"allowed, with their defaults: {', '.join(shown)}"


class CellOptions(Options):
    """The switches that all models of cells have; a family's own are added to them."""

    gene_names: Literal["as-is", "resolve"] = "as-is"
    """Take gene names as the original release does, or by what they mean: former ones, aliases and others, and sum columns of one gene."""
    orthologs: Literal["none", "one2one"] = "none"
    """Mouse data and a human model: read mouse genes as their human one-to-one orthologs."""
    coverage: Literal["checked", "any"] = "checked"
    """Refuse data of which the model knows next to nothing, or take whatever matches."""


class Adapter(ABC):
    """Base of every adapter."""

    options: ClassVar[type[Options]] = Options
    """The family's switches."""

    embedding_dim: int
    """Width of the vectors."""
    dataset_dependent: bool = False
    """Whether the options make a vector depend on the other rows of the data, so that they are surveyed first."""

    @classmethod
    @abstractmethod
    def load(cls, files: CheckpointFiles, options: Any, device: torch.device, dtype: torch.dtype) -> Self:
        """Read a checkpoint. `options` is an instance of the class's own ``options``."""


class TokenAdapter(Adapter):
    """A model that turns each input into tokens and runs a network over them.

    ``load`` sets every attribute below.
    """

    network: nn.Module
    """Called as ``network(batch, layer)`` with a :class:`~cellfm_hub.nn.PackedBatch`; returns ``(T, d)``, the state after `layer`."""
    first_only: ClassVar[bool] = False
    """Whether the network takes ``first_only=True`` and then returns ``(B, d)``, the states of first tokens alone, for less work."""
    layers: int
    max_tokens: int
    """Longest row, special tokens included."""
    unlimited: bool = False
    """Whether the network itself takes longer rows than it was trained on."""
    vocabulary: NDArray[np.str_]
    """``(V,)``: what each token id stands for."""
    special_ids: tuple[int, ...] = ()
    """Ids of ``<cls>`` and the like."""
    poolings: tuple[str, ...] = ("cls", "mean", "max")
    """What ``pooling=`` may be, the checkpoint's own default first."""
    pool_special: bool = True
    """Whether mean and max count special tokens."""

    def width(self, pooling: str | None, layer: int) -> int:
        """Return the width of what :meth:`pool`, or :meth:`token_vectors` where `pooling` is ``None``, gives after block `layer`."""
        return self.embedding_dim

    def unload(self) -> None:
        """Give back the memory that the network takes. From then on the adapter can tokenize, and no longer compute."""
        self.network.to("meta")

    def prepare(self, tokens: Tokens) -> None:
        """Make ready what the network needs for these tokens. Called on the host before they are cut into batches."""

    def reads_first_only(self, pooling: str | None) -> bool:
        """Whether :meth:`row_vectors` asks the network for first tokens alone."""
        return self.first_only and pooling == "cls"

    def row_vectors(self, batch: PackedBatch, layer: int, pooling: str) -> Tensor:
        """Return one vector for each row after `layer`, ``(B, d')``."""
        if self.reads_first_only(pooling):
            return self.pool(self.network(batch, layer, first_only=True), batch.first_tokens, pooling)
        return self.pool(self.network(batch, layer), batch, pooling)

    def token_vectors(self, batch: PackedBatch, layer: int) -> Tensor:
        """Return the vectors of single tokens after `layer`, those of :meth:`token_rows`."""
        out: Tensor = self.network(batch, layer)
        return out

    def token_rows(self, tokens: Tokens) -> Tokens:
        """Return what the vectors of single tokens stand for, where that is not simply `tokens`. Empty rows stay empty."""
        return tokens

    def pool(self, hidden: Tensor, batch: PackedBatch, pooling: str) -> Tensor:
        """Reduce ``(T, d)`` to ``(B, d')``."""
        if pooling == "cls":
            return first(hidden, batch)
        counted = torch.ones_like(batch.ids, dtype=torch.bool)
        if not self.pool_special:
            for special in self.special_ids:
                counted &= batch.ids != special
        return segment_pool(hidden, batch, counted, pooling)

    @classmethod
    @abstractmethod
    def published(cls, config: dict[str, Any]) -> tuple[nn.Module, Layout]:
        """Build the network of a ``config.json`` and the layout of its weight file. Called on the meta device too."""


class CellAdapter(TokenAdapter):
    """A model of cells: counts of genes become tokens."""

    options: ClassVar[type[Options]] = CellOptions

    gene_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of ``var`` in which the family's users keep its identifiers, preferred where several match equally well."""
    obs_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of ``obs`` that the tokenizer reads, where they exist."""
    tokens_per_cell: ClassVar[int | None] = None
    """About how many tokens every cell makes, in models that draw as many genes from each; others make one token per expressed gene."""
    values: MatrixValues = "counts"
    """What the matrix must hold."""
    order_only: bool = False
    """Whether the vector of a cell with no more genes than fit depends on nothing but the order of its values, ties included. Values
    that grow with the counts, such as logarithms, then give the vectors of the counts, and are taken where there are no counts."""
    species: tuple[str, ...] = ()
    """What ``species=`` may be, where the files of the checkpoint decide; otherwise the card does."""

    def gene_matcher(self, species: str | None, columns: Mapping[str, Sequence[str]]) -> Callable[[Sequence[str]], GeneMap]:
        """Return the :meth:`match_genes` for data of one species. Models of one species have no choice.

        Parameters
        ----------
        species
            The user's ``species=``; ``None``: to be told from the identifiers.
        columns
            The candidates for gene identifiers, by the name of their ``var`` column.

        Raises
        ------
        SpeciesError
            If the species cannot be told, or the identifiers are of another one.
        """
        return self.match_genes

    def survey(self, genes: GeneMap, blocks: Callable[[], Iterator[CountMatrix]]) -> GeneMap:
        """Look at the whole data set first, where options or recipe make vectors depend on it.

        Parameters
        ----------
        genes
            What :meth:`match_genes` returned.
        blocks
            Starts a pass over all raw counts, all columns, block by block.

        Returns
        -------
        The map to use; its ``apply`` may be another.
        """
        return genes

    @abstractmethod
    def match_genes(self, ids: Sequence[str]) -> GeneMap:
        """Map the columns of a matrix to the vocabulary. Once per file."""

    @abstractmethod
    def tokenize(self, counts: CountMatrix, genes: GeneMap, obs: pd.DataFrame, seed: int) -> Tokens:
        """Turn cells into tokens; a cell without any usable gene becomes an empty row.

        Parameters
        ----------
        counts
            Raw counts, ``(n, g)`` CSR: the columns are those of ``genes.tokens``, no stored zeros, indices sorted in each row.
        genes
            What :meth:`match_genes` returned.
        obs
            The ``obs_columns`` that the data have, ``n`` rows.
        seed
            The user's, for models that sample.
        """

    @abstractmethod
    def gene_embeddings(self) -> pd.DataFrame:
        """Return the static vector of each gene: index gene id, ``d`` columns, float32."""

    def gene_embeddings_of(self, species: str) -> pd.DataFrame:
        """Return those of one species; it is one that the model knows."""
        return self.gene_embeddings()


class SequenceAdapter(TokenAdapter):
    """A model of DNA or RNA: stretches of bases become tokens."""

    prefix: tuple[int, ...] = ()
    """Special tokens before every sequence."""
    suffix: tuple[int, ...] = ()
    """Special tokens after it."""
    unknown_id: int | None = None
    """Stands for letters that the vocabulary lacks, in models that have such a token."""

    def pool(self, hidden: Tensor, batch: PackedBatch, pooling: str) -> Tensor:
        """Reduce ``(T, d)`` to ``(B, d)``; ``mean-bases`` is the mean without `prefix` and `suffix`."""
        if pooling != "mean-bases":
            return super().pool(hidden, batch, pooling)
        counted = torch.ones_like(batch.ids, dtype=torch.bool)
        for special in (*self.prefix, *self.suffix):
            counted &= batch.ids != special
        return segment_mean(hidden, batch, counted)

    @abstractmethod
    def tokenize(self, sequences: Sequence[str]) -> Tokens:
        """Turn sequences into tokens of any length, without special ones, with ``widths``. The hub cuts, and adds the special tokens."""


class CellFeatures(Adapter):
    """A plain function of a whole matrix of counts."""

    gene_columns: ClassVar[tuple[str, ...]] = ()

    def check_size(self, cells: int, genes: int) -> None:
        """Raise an InputError where so few cells with counts, or genes, cannot be embedded."""

    @abstractmethod
    def embed(self, counts: CountMatrix, seed: int) -> NDArray[np.float32]:
        """Return ``(n, d)`` float32. No row of `counts` is empty."""


class SequenceFeatures(Adapter):
    """A plain function of single sequences."""

    @abstractmethod
    def embed(self, sequences: Sequence[str]) -> NDArray[np.float32]:
        """Return ``(n, d)`` float32; NaN for a sequence that has no features."""
