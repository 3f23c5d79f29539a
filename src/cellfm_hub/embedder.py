"""`Embedder`: a loaded model."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from cellfm_hub._progress import progress_bar
from cellfm_hub.adapter import (
    Adapter,
    CellAdapter,
    CellFeatures,
    Options,
    SequenceAdapter,
    SequenceFeatures,
    TokenAdapter,
)
from cellfm_hub.blocks import TokenBlock, Vectors, combine, empty_inputs, input_bases, join, stack_parts, unit_length, unpool
from cellfm_hub.checkpoints import WEIGHT_SUFFIXES, CheckpointFiles
from cellfm_hub.engine.memory import TokenBudget, release
from cellfm_hub.engine.overflow import FiniteStates, watched
from cellfm_hub.engine.overlap import prefetch
from cellfm_hub.engine.run import run_network
from cellfm_hub.errors import CountsError, InputError, SequenceError
from cellfm_hub.matching import match_genes, reads_orthologs
from cellfm_hub.nn.encoder import Encoder
from cellfm_hub.qc import cut_inputs, row_sums
from cellfm_hub.reading import GeneMatch, Prepared, Task, open_input
from cellfm_hub.receipt import Receipt, Tally, as_text, versions
from cellfm_hub.registry import Entry
from cellfm_hub.request import EncodeOptions, Level, OnEmpty, Request, check_species, known_species, make_request
from cellfm_hub.sequences import Case, Long, clean, drop_baseless, fit_to_model, reverse_complement
from cellfm_hub.sources.cells import CellBlock, CellData, Matrix, count_blocks
from cellfm_hub.sources.genome import WINDOW
from cellfm_hub.sources.sequences import SequenceBlock
from cellfm_hub.sources.some_rows import column_totals
from cellfm_hub.suitability import check_suits
from cellfm_hub.tokens import Ragged, Tokens

logger = logging.getLogger("cellfm_hub")


@dataclass(frozen=True)
class Result:
    """Vectors, what the rows are called, and the receipt."""

    values: Vectors | Ragged
    names: list[str]
    receipt: Receipt
    qc: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Cells only: what the model saw of each, see :class:`cellfm_hub.qc.CellQuality`."""


class Embedder:
    """A loaded model; made by :func:`cellfm_hub.load`.

    Attributes
    ----------
    name
        The checkpoint; for a folder of the user's loaded by the name of a family, the family.
    receipt
        Of the most recent :meth:`encode` or :meth:`encode_tokens`; ``None`` before.
    """

    def __init__(
        self,
        name: str,
        entry: Entry,
        adapter: Adapter,
        files: CheckpointFiles,
        *,
        options: Options,
        device: torch.device,
        dtype: torch.dtype,
        guard_overflow: bool,
        batch_tokens: int | None,
        seed: int,
    ) -> None:
        self.name, self.entry, self.adapter, self.files = name, entry, adapter, files
        self.device, self.dtype = device, dtype
        self.receipt: Receipt | None = None
        self._options, self._guard_overflow = options, guard_overflow
        self._batch_tokens, self._seed = batch_tokens, seed
        self._budget = TokenBudget()

    def __repr__(self) -> str:
        return f"<Embedder {self.name} on {self.device} in {self.precision}, from {self.files.origin}>"

    @property
    def modality(self) -> str:
        """``"cell"`` or ``"sequence"``."""
        return self.entry.modality

    @property
    def precision(self) -> str:
        """Number format of the network: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors."""
        return self.adapter.embedding_dim

    @overload
    def encode(self, data: Any, *, level: Literal["gene", "token", "base"], **options: Unpack[EncodeOptions]) -> Ragged: ...
    @overload
    def encode(
        self, data: Any, *, level: Literal["cell", "sequence", "variant"] | None = None, **options: Unpack[EncodeOptions]
    ) -> Vectors: ...
    def encode(
        self,
        data: Any,
        *,
        level: Level | None = None,
        layer: str | None = None,
        gene_ids: str | None = None,
        species: str | None = None,
        recipe: str = "default",
        pooling: str | None = None,
        output_layer: int | None = None,
        batch_tokens: int | None = None,
        seed: int | None = None,
        on_empty: OnEmpty | None = None,
        progress: bool | None = None,
        long: Long = "error",
        overlap: int = 0,
        reverse_complement: Literal["mean"] | None = None,
        genome: str | Path | None = None,
        window: int = WINDOW,
    ) -> Vectors | Ragged:
        """Embed cells or sequences. The input is never changed.

        Parameters
        ----------
        data
            Cells: an AnnData object, or the path of an ``.h5ad``, ``.h5mu`` (modality ``rna``), ``.loom`` or 10x ``.h5`` file, of a
            ``.zarr`` store, of a folder with ``matrix.mtx``, or of a ``.csv``, ``.tsv`` or ``.txt`` table (a row per cell, its name
            first, a column per gene). Sequences: a list of str, a dict or Series of str, or the path of a FASTA, FASTQ, BED or VCF
            file, plain or gzipped.
        level
            ``"cell"`` or ``"sequence"`` (default): one vector per input. ``"gene"`` or ``"token"``: one per token of each input.
            ``"base"``: one per base of each sequence, that of the token which covers it; a base in two windows gets the mean of both,
            one that was cut off NaN. ``"variant"``: of each variant of a VCF file, the vector of the alternative window minus that of
            the reference; otherwise both are sequences of their own, ``name/ref`` and ``name/alt``.
        layer
            Cells: the layer with raw counts, or ``"X"`` or ``"raw"``. Default: the first of ``layers["counts"]``, other layers, ``raw``
            and ``X`` that holds non-negative whole numbers; layers of RNA velocity are left out. Where none does, the counts are
            recovered from the first that holds (log-)normalised counts, and that is said.
        gene_ids
            Cells: the column of ``var`` with the gene identifiers, or ``"index"``. Default: the one that matches most genes.
        species
            Cells: the species of the data, to be checked against the model's.
        recipe
            Named bundle of `pooling` and `output_layer`; ``cellfm info MODEL`` lists them.
        pooling
            How tokens become one vector; default: the recipe's.
        output_layer
            0 = embedding output, k = after block k, -1 = last; default: the recipe's.
        batch_tokens
            Tokens that are computed together. Changes speed and memory, and no vector beyond rounding.
        seed
            For models that sample; a cell's draw depends on its content and this number alone.
        on_empty
            What to do with a cell without any gene the model knows, or a sequence without any base (empty, or of N and gaps alone; with
            ``case=as-is`` empty): ``"nan"``, a row of NaN, or ``"error"``.
            Default: NaN; but an empty string in a list, dict or Series is an error, for it is a slip rather than data.
            One vector per token or base of nothing is no vector, and no error.
        progress
            Show a progress bar; default: on a terminal.
        long
            Sequences longer than the model's input: ``"error"``, ``"truncate"`` (keep the beginning) or ``"tile"`` (windows, averaged).
        overlap
            With ``"tile"``, bases that neighbouring windows share.
        reverse_complement
            ``"mean"``: average over both strands.
        genome
            BED and VCF files only: the FASTA file of the assembly. An index (``.fai``) is made beside it where there is none.
        window
            VCF files only: bases of the window around each variant.

        Returns
        -------
        ``(n, d)`` float32 in the order of the input, or a :class:`Ragged` with ``(total, d)`` float32.

        Raises
        ------
        InputError
            If the data or an option cannot be used; the message says what to do.
        """
        return self.run(
            data,
            level=level,
            layer=layer,
            gene_ids=gene_ids,
            species=species,
            recipe=recipe,
            pooling=pooling,
            output_layer=output_layer,
            batch_tokens=batch_tokens,
            seed=seed,
            on_empty=on_empty,
            progress=progress,
            long=long,
            overlap=overlap,
            reverse_complement=reverse_complement,
            genome=genome,
            window=window,
        ).values

    def run(self, data: Any, *, level: Level | None = None, **options: Unpack[EncodeOptions]) -> Result:
        """Embed as :meth:`encode` does, and return the row names and the receipt too."""
        request = self.request(level=level, **options)
        check_suits(data, self.name, self.entry, level=level, **options)
        tally, names, parts, fitted = Tally(), list[str](), list[Vectors | Ragged](), list[CellBlock]()

        def finished() -> Result:
            joined: Vectors | Ragged = Ragged.concatenate(parts) if request.per_token else np.concatenate(parts)  # type: ignore[arg-type]
            return self._result(joined, names, request, tally)

        with (
            open_input(data, [Task(self, request)]) as source,
            prefetch(source.blocks()) as blocks,
            progress_bar(self.name, source.rows, show=request.progress) as advance,
        ):
            try:
                for (prepared,) in blocks:
                    if isinstance(prepared.block, CellBlock):
                        fitted.append(prepared.block)
                    else:
                        parts.append(self.finish(prepared, request, advance))
                    tally.add(prepared.tally)
                    names += prepared.names
            except InputError as error:
                if parts and self.modality == "sequence":
                    error.finished = finished()
                raise
        if fitted:
            parts.append(self.fit(fitted, request, tally))
        return finished()

    def _result(self, values: Vectors | Ragged, names: list[str], request: Request, tally: Tally) -> Result:
        """Write the receipt, and say what the user should know."""
        self.receipt = self._receipt(request, tally)
        for text in tally.warnings():
            logger.warning("%s: %s", self.name, text)
        logger.info("%s: embedded %d rows", self.name, tally.rows)
        return Result(values, names, self.receipt, tally.cells.columns())

    def tokenize(
        self,
        data: Any,
        *,
        layer: str | None = None,
        gene_ids: str | None = None,
        species: str | None = None,
        seed: int | None = None,
        on_empty: OnEmpty | None = None,
        long: Long = "error",
        overlap: int = 0,
        genome: str | Path | None = None,
        window: int = WINDOW,
    ) -> Tokens:
        """Turn data into tokens, as the network will see them. The options are those of :meth:`encode`.

        Returns
        -------
        :class:`Tokens`; a cell without any usable gene is an empty row.

        Raises
        ------
        InputError
            If the data cannot be used, or the model has no tokens.
        """
        self._token_adapter()
        options = EncodeOptions(
            layer=layer,
            gene_ids=gene_ids,
            species=species,
            seed=seed,
            on_empty=on_empty or "nan",
            long=long,
            overlap=overlap,
            genome=genome,
            window=window,
        )
        request = self.request(**options)
        check_suits(data, self.name, self.entry, **options)
        with open_input(data, [Task(self, request)]) as source:
            return join([prepared.block for (prepared,) in source.blocks() if isinstance(prepared.block, TokenBlock)])

    @overload
    def encode_tokens(
        self,
        tokens: Tokens,
        *,
        level: Literal["gene", "token", "base"],
        recipe: str = ...,
        output_layer: int | None = ...,
        batch_tokens: int | None = ...,
    ) -> Ragged: ...
    @overload
    def encode_tokens(
        self,
        tokens: Tokens,
        *,
        level: Literal["cell", "sequence"] | None = None,
        recipe: str = ...,
        pooling: str | None = ...,
        output_layer: int | None = ...,
        batch_tokens: int | None = ...,
    ) -> Vectors: ...
    def encode_tokens(
        self,
        tokens: Tokens,
        *,
        level: Level | None = None,
        recipe: str = "default",
        pooling: str | None = None,
        output_layer: int | None = None,
        batch_tokens: int | None = None,
    ) -> Vectors | Ragged:
        """Run the network alone, on tokens from :meth:`tokenize` or made by the caller.

        Parameters
        ----------
        tokens
            Rows as the network shall see them, special tokens included.
        level, recipe, pooling, output_layer, batch_tokens
            As in :meth:`encode`.

        Returns
        -------
        ``(n, d)`` float32, NaN for empty rows; or a :class:`Ragged`. Rows that belong to one input (``tokens.rows``) are combined.

        Raises
        ------
        InputError
            If an id is not in the vocabulary, or a row is longer than the network's input.
        """
        adapter = self._token_adapter()
        request = self.request(level=level, recipe=recipe, pooling=pooling, output_layer=output_layer, batch_tokens=batch_tokens)
        if request.level == "variant":
            msg = "level='variant' needs a VCF file and a genome; pass them to encode()"
            raise InputError(msg)
        self._check_tokens(tokens)
        inputs = len(tokens) if tokens.rows is None else int(tokens.rows.max(initial=-1)) + 1
        bases = input_bases(tokens, inputs) if request.level == "base" else None
        block = TokenBlock(tokens, [str(i) for i in range(inputs)], bases=bases)
        values = self._embed_block(block, request)
        self.receipt = self._receipt(request, Tally(rows=inputs, empty=len(empty_inputs(tokens, inputs))))
        return unpool(values, block, request.level, adapter) if request.per_token else values

    def gene_embeddings(self, *, species: str | None = None) -> pd.DataFrame:
        """Return the static vector of every gene, independent of any cell.

        Parameters
        ----------
        species
            Of which species, where the model has several; default: its first.

        Returns
        -------
        Index gene id, ``d`` float32 columns.

        Raises
        ------
        InputError
            If the model has none.
        """
        if not isinstance(self.adapter, CellAdapter):
            msg = f"{self.name} has no gene embeddings; models of cells with a network do"
            raise InputError(msg)
        if species is None:
            return self.adapter.gene_embeddings()
        check_species(species, self.name, self.entry, self.adapter)
        return self.adapter.gene_embeddings_of(species)

    # What was asked for

    def _token_adapter(self) -> TokenAdapter:
        if not isinstance(self.adapter, TokenAdapter):
            msg = f"{self.name} has no tokens: it is a plain function of its input; use encode()"
            raise InputError(msg)
        return self.adapter

    def request(self, *, level: Level | None = None, **given: Unpack[EncodeOptions]) -> Request:
        """Validate options of :meth:`encode`, and fill in the defaults."""
        return make_request(
            self.name,
            self.entry,
            self.adapter,
            device=self.device,
            default_batch_tokens=self._batch_tokens,
            default_seed=self._seed,
            orthologs=reads_orthologs(self._options),
            level=level,
            **given,
        )

    # From data to tokens

    def match_genes(self, cells: CellData, matrix: Matrix, request: Request) -> GeneMatch:
        """Find out which columns of a matrix feed which genes, and say what the user should know of it."""
        adapter = self.adapter
        assert isinstance(adapter, CellAdapter)
        matched = match_genes(
            matrix.var,
            adapter,
            model=self.name,
            known_species=known_species(self.entry, adapter),
            options=self._options,
            gene_ids=request.gene_ids,
            species=request.species,
            obs=cells.obs,
            totals=partial(column_totals, cells, matrix),
        )
        genes = matched.genes
        if matrix.by_order and genes.n_summed:
            msg = f"{genes.n_summed} columns would be added to others of the same gene, which is right for raw counts only,"
            msg += f" but {matrix.name} holds none; leave one column for each gene, or pass raw counts"
            raise CountsError(msg)
        if request.dataset_dependent:
            genes = adapter.survey(genes, lambda: (block.counts for block in count_blocks(cells, matrix, values=adapter.values)))
        for note in matched.notes:
            logger.warning("%s: %s", self.name, note)
        facts = {"counts_from": matrix.name, **matrix.facts, **matched.facts, **genes.facts, "genes_used": genes.n_matched}
        return GeneMatch(genes, facts, matrix)

    def prepare_cells(self, block: CellBlock, match: GeneMatch | None, request: Request) -> Prepared:
        """Turn cells into what :meth:`finish` takes; a model that is fitted to the whole data set takes them as they are."""
        names = block.obs.index.astype(str).tolist()
        adapter = self.adapter
        if match is None or not isinstance(adapter, CellAdapter):
            tally = Tally(rows=len(names))
            totals = row_sums(block.counts)
            tally.cells.add(row_sums((block.counts != 0).tocsr()), totals, totals, np.zeros(len(names), bool))
            return Prepared(block, names, tally)
        tally = Tally(facts=dict(match.facts))
        known = match.genes.apply(block.counts)
        tokens = adapter.tokenize(known, match.genes, block.obs, request.seed)
        if match.matrix.by_order and tokens.cut is not None and tokens.cut.any():
            msg = f"cell {names[int(np.argmax(tokens.cut > 0))]!r} has more genes than fit, and which are kept depends on the raw counts,"
            msg += f" but {match.matrix.name} holds none; pass raw counts, or raise the longest input that the model's options allow"
            raise CountsError(msg)
        used, all_counts = row_sums(known), None
        if adapter.values != "log values" and not match.matrix.by_order:  # a share of logarithms says nothing
            all_counts = row_sums(block.counts)
            tally.counts, tally.counts_used = float(all_counts.sum()), float(used.sum())
        seen = np.ones(len(names))
        seen[empty_inputs(tokens, len(names))] = 0
        tally.cells.add(seen * np.diff(known.indptr), all_counts, seen * used, cut_inputs(tokens, len(names)))
        self._count(tokens, names, request, tally)
        return Prepared(TokenBlock(tokens, names), names, tally)

    def prepare_sequences(self, block: SequenceBlock, request: Request) -> Prepared:
        """Turn sequences into what :meth:`finish` takes."""
        adapter, tally = self.adapter, Tally()
        case: Case = getattr(self._options, "case", "upper")
        alleles = [clean(block.names, sequences, case, tally.bases) for sequences in block.alleles]
        # As-is, letters are the original's business, and it gives unknown ones a vector.
        known = [drop_baseless(sequences) if case == "upper" else sequences for sequences in alleles]
        if not isinstance(adapter, SequenceAdapter):
            tally.rows = len(block.names)
            return Prepared(SequenceBlock(block.names, *known), block.names, tally)
        parts, forward = [], []
        for sequences in known:
            bodies = [adapter.tokenize(strand) for strand in _strands(sequences, request)]
            fitted = [
                fit_to_model(
                    body,
                    block.names,
                    max_tokens=None if adapter.unlimited and request.long == "error" else adapter.max_tokens,
                    prefix=adapter.prefix,
                    suffix=adapter.suffix,
                    long=request.long,
                    overlap=request.overlap,
                )
                for body in bodies
            ]
            parts += fitted
            forward.append(fitted[0])
            self._count_bases(bodies[0], fitted[0], request, tally)
        tokens = stack_parts(parts, len(block.names)) if len(parts) > 1 else parts[0]
        cuts = [part.cut for part in forward if part.cut is not None]
        self._count(replace(forward[0], cut=np.max(cuts, axis=0)) if cuts else forward[0], block.names, request, tally)
        token_block = TokenBlock(
            tokens,
            block.names,
            strands=len(parts) // len(alleles),
            alleles=len(alleles),
            bases=np.array([len(s) for s in alleles[0]], dtype=np.int64),
        )
        return Prepared(token_block, block.names, tally)

    def _count_bases(self, body: Tokens, fitted: Tokens, request: Request, tally: Tally) -> None:
        assert isinstance(self.adapter, SequenceAdapter)
        assert body.widths is not None
        assert fitted.widths is not None
        if self.adapter.unknown_id is not None:
            tally.bases.unknown += int(body.widths[body.ids == self.adapter.unknown_id].sum())
        if request.long == "truncate":
            tally.bases.truncated += int(body.widths.sum()) - int(fitted.widths.sum())

    def _count(self, tokens: Tokens, names: list[str], request: Request, tally: Tally) -> None:
        empty = empty_inputs(tokens, len(names))
        if len(empty) and request.on_empty == "error":
            name = names[empty[0]]
            if self.modality == "sequence":
                msg = f"sequence {name!r} is empty or holds no A, C, G or T; remove it, or pass on_empty='nan'"
                raise SequenceError(msg)
            msg = f"cell {name!r} holds no gene that {self.name} knows; remove it, or pass on_empty='nan'"
            raise InputError(msg)
        tally.rows += len(names)
        tally.empty += len(empty)
        tally.truncated += int(cut_inputs(tokens, len(names)).sum())
        tally.tokens_cut += 0 if tokens.cut is None else int(tokens.cut.sum())

    def _check_tokens(self, tokens: Tokens) -> None:
        adapter = self._token_adapter()
        size = len(adapter.vocabulary)
        if len(tokens.ids) and (tokens.ids.min() < 0 or tokens.ids.max() >= size):
            wrong = tokens.ids[(tokens.ids < 0) | (tokens.ids >= size)][0]
            msg = f"token id {wrong} is not in the vocabulary of {self.name} (0 to {size - 1}); tokenize with the same checkpoint"
            raise InputError(msg)
        longest = int(tokens.lengths.max(initial=0))
        if longest > adapter.max_tokens and not adapter.unlimited:
            msg = f"a row has {longest:,} tokens, {self.name} takes at most {adapter.max_tokens:,}; cut it, or use encode(long=...)"
            raise InputError(msg)

    # From tokens to vectors

    def finish(self, prepared: Prepared, request: Request, advance: Callable[[float], None] = lambda _inputs: None) -> Vectors | Ragged:
        """Compute the vectors of a block, in its order."""
        block = prepared.block
        if isinstance(block, TokenBlock):
            values = self._embed_block(block, request, advance)
            prepared.tally.computed_in(self.precision)
            return unpool(values, block, request.level, self._token_adapter()) if request.per_token else values
        assert isinstance(block, SequenceBlock)
        vectors = self._features_of_sequences(block, request, prepared.tally)
        advance(len(prepared.names))
        return vectors

    def _embed_block(self, block: TokenBlock, request: Request, advance: Callable[[float], None] = lambda _inputs: None) -> Vectors:
        """Compute a block: ``(inputs, d)``, or ``(tokens, d)``. `advance` is told how many inputs are done."""
        values, finite = self._run_network(block, request, advance)
        if not finite and self._guard_overflow:
            logger.warning("%s overflows in float16; computing in bfloat16 from here on", self.name)
            self.turn_to_bfloat16()
            values, _ = self._run_network(block, request)  # the bar has moved already
        if request.pooling is None:
            return values
        vectors = combine(values, block, request.pooling)
        return unit_length(vectors) if request.normalize else vectors

    def _run_network(
        self, block: TokenBlock, request: Request, advance: Callable[[float], None] = lambda _inputs: None
    ) -> tuple[Vectors, bool]:
        """Run the network on a block: one vector per row or token, and whether all it computed was finite, as far as that is looked at."""
        adapter = self._token_adapter()
        pooling = request.pooling
        adapter.prepare(block.tokens)
        inputs_per_row = len(block.names) / max(len(block.tokens), 1)

        def forward(batch: Any) -> torch.Tensor:
            if pooling is None:
                return adapter.token_vectors(batch, request.output_layer)
            return adapter.row_vectors(batch, request.output_layer, pooling)

        with watched(adapter.network) if self._guard_overflow else nullcontext(FiniteStates()) as finite:
            values = run_network(
                forward,
                block.tokens,
                dim=adapter.width(pooling, request.output_layer),
                per_token=request.per_token,
                out_lengths=adapter.token_rows(block.tokens).lengths if pooling is None else None,
                device=self.device,
                batch_tokens=request.batch_tokens,
                first_only=adapter.reads_first_only(pooling),
                budget=self._budget,
                on_batch=lambda rows: advance(rows * inputs_per_row),
            )
        advance(np.count_nonzero(block.tokens.lengths == 0) * inputs_per_row)  # empty rows are in no batch
        if self._guard_overflow and request.per_token:  # vectors of single tokens may come from a network of their own
            return values, bool(finite) and bool(np.isfinite(values).all())
        return values, bool(finite)

    def turn_to_bfloat16(self) -> None:
        """Compute in bfloat16 from here on: it holds what float16 cannot."""
        if self.dtype == torch.bfloat16:
            return
        adapter = self._token_adapter()
        adapter.unload()  # the device need not hold two networks
        release(self.device)
        # From the files: a weight that overflowed is lost in float16.
        self.adapter = type(adapter).load(self.files, self._options, self.device, torch.bfloat16)
        self.dtype, self._guard_overflow, self._budget = torch.bfloat16, False, TokenBudget()

    def fit(self, blocks: Sequence[CellBlock], request: Request, tally: Tally) -> Vectors:
        """Apply a model that is fitted to the whole data set, all blocks of it."""
        assert isinstance(self.adapter, CellFeatures)
        counts = sp.csr_matrix(sp.vstack([block.counts for block in blocks], format="csr"))
        usable = row_sums(counts) > 0
        if not usable.any():
            msg = "every cell is empty; there is nothing to embed"
            raise InputError(msg)
        vectors = self.adapter.embed(counts[usable], request.seed)
        values: Vectors = np.full((len(usable), vectors.shape[1]), np.nan, dtype=np.float32)
        values[usable] = vectors
        self._count_empty(values, [name for block in blocks for name in block.obs.index.astype(str)], request, tally)
        return values

    def _features_of_sequences(self, block: SequenceBlock, request: Request, tally: Tally) -> Vectors:
        assert isinstance(self.adapter, SequenceFeatures)
        of_alleles = []
        for sequences in block.alleles:
            of_strands = [self.adapter.embed(strand) for strand in _strands(sequences, request)]
            of_alleles.append(np.mean(of_strands, axis=0, dtype=np.float32))
        values = np.asarray(of_alleles[1] - of_alleles[0] if len(of_alleles) > 1 else of_alleles[0], dtype=np.float32)
        self._count_empty(values, block.names, request, tally)
        return values

    def _count_empty(self, values: Vectors, names: Sequence[str], request: Request, tally: Tally) -> None:
        empty = np.flatnonzero(np.isnan(values).any(axis=1))
        if len(empty) and request.on_empty == "error":
            msg = f"row {names[empty[0]]!r} is empty ({len(empty)} of {len(names):,}); remove it, or pass on_empty='nan'"
            raise InputError(msg)
        tally.empty += len(empty)

    def receipt_of(self, request: Request) -> Receipt:
        """Say what is known before the data are read: the model and how it is used."""
        entry, files = self.entry, self.files
        receipt: Receipt = {
            "model": self.name,
            "family": entry.family,
            "weights": files.origin,
            "licence": entry.licence,
            "recipe": request.recipe,
            "level": request.level,
            "seed": request.seed,
            "options": as_text(self._options.model_dump(mode="json")),
            "dataset_dependent": request.dataset_dependent,
            "device": str(self.device),
            "precision": self.precision,
        }
        if isinstance(self.adapter, TokenAdapter):
            receipt |= {
                "pooling": request.pooling or "none",
                "normalize": request.normalize,
                "output_layer": request.output_layer,
                "attention": self._attention(),
                "weights_sha256": self._weights_sha256(),
            }
        if self.modality == "sequence":
            receipt |= {
                "long": request.long,
                "overlap": request.overlap,
                "reverse_complement": request.reverse_complement or "none",
            }
        if request.genome is not None:
            receipt |= {"genome": str(request.genome), "window": request.window}
        return receipt | {"asked": as_text(request.asked(receipt))}

    def _receipt(self, request: Request, tally: Tally) -> Receipt:
        return self.receipt_of(request) | tally.receipt() | versions()

    def _attention(self) -> str:
        encoders = [module for module in self._token_adapter().network.modules() if isinstance(module, Encoder)]
        return encoders[0].attention_backend() if encoders else "the network's own"

    def _weights_sha256(self) -> str:
        weights = [path for name, path in self.files.used.items() if path.suffix in WEIGHT_SUFFIXES or name.endswith(".index.json")]
        return self.files.weights_sha256(weights[0])


def _strands(sequences: list[str], request: Request) -> list[list[str]]:
    return [sequences, [reverse_complement(s) for s in sequences]] if request.reverse_complement else [sequences]
