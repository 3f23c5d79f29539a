"""The tokens of one cell, as a model sees them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.adapter import CellAdapter
from cellfm_hub.api import load_tokenizer
from cellfm_hub.blocks import TokenBlock
from cellfm_hub.embedder import Embedder
from cellfm_hub.errors import InputError, did_you_mean
from cellfm_hub.genes import CountMatrix, GeneMap, identifier_columns
from cellfm_hub.reading import Task
from cellfm_hub.receipt import Receipt
from cellfm_hub.registry import registry
from cellfm_hub.request import EncodeOptions
from cellfm_hub.sources.cells import CellData, count_blocks, open_cells
from cellfm_hub.suitability import check_suits
from cellfm_hub.tokens import Tokens

Status = Literal["kept", "cut", "unknown", "special"]


@dataclass(frozen=True)
class Explanation:
    """What a model sees of one cell.

    Parameters
    ----------
    cell, model
        Names of both.
    table
        What :func:`explain` returns.
    facts
        What was read: the matrix, the gene column, the coverage of the genes of the data.
    genes, counts
        By status: expressed genes, those that the model sums counted once, and their counts.
    """

    cell: str
    model: str
    table: pd.DataFrame
    facts: Receipt
    genes: dict[Status, int]
    counts: dict[Status, float]

    @property
    def n_tokens(self) -> int:
        """Tokens of the cell, special ones included."""
        return int(self.table["position"].notna().sum())


def explain(
    data: Any,
    model: str,
    *,
    cell: str | int,
    layer: str | None = None,
    gene_ids: str | None = None,
    species: str | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    options: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """Show one cell as a model sees it: token by token, then the expressed genes that made no token.

    The tokens are those of :meth:`cellfm_hub.Embedder.tokenize`. The weights stay on disk, and of the cells only this one is read, besides
    what finding the counts takes (and all of them for models that survey the whole data set).

    Parameters
    ----------
    data
        An AnnData object, or the path of a file with cells.
    model
        Name of a family or checkpoint of cells.
    cell
        Name of the cell, or its number from 0.
    layer, gene_ids, species, seed
        See :meth:`cellfm_hub.Embedder.encode`.
    checkpoint, revision, options
        See :func:`cellfm_hub.load`.

    Returns
    -------
    A row per token in the order of the model, then a row per other expressed gene, largest count first:

    ``position``
        Place in the row of tokens, from 0 (for Geneformer: the rank); missing where there is no token.
    ``token``, ``token_id``
        What the model sees; empty and missing where there is none.
    ``gene``, ``name``
        The identifier in the data and the entry of ``var_names``, several joined by ``+`` where their counts are summed; empty for special
        tokens.
    ``count``
        What was counted; NaN for special tokens.
    ``value``
        What accompanies the token: scGPT's bin, scFoundation's normalised value; NaN in models without.
    ``status``
        ``kept``; ``special``, a token that stands for no gene of the data; ``cut``, a gene the model knows that did not fit or was not
        drawn; ``unknown``, a gene the model does not know.
    ``draw``
        Only where one cell makes several rows of tokens: which of them.

    Raises
    ------
    InputError
        If there is no such cell, or it is a model of sequences or one without tokens.

    Examples
    --------
    >>> import cellfm_hub as cf
    >>> cf.explain(adata, "geneformer", cell="AAACATACAACCAC-1")  # doctest: +SKIP
    """
    check_explains(data, model, layer=layer, gene_ids=gene_ids, species=species)
    return explain_cell(
        data,
        load_tokenizer(model, checkpoint=checkpoint, revision=revision, options=options, seed=seed),
        cell=cell,
        layer=layer,
        gene_ids=gene_ids,
        species=species,
    ).table


def check_explains(data: Any, model: str, **options: Unpack[EncodeOptions]) -> None:
    """Raise, before any file of the model is fetched, if it is not one whose tokens are explained, or not one for such data."""
    entry = registry().find(model)
    if not issubclass(entry.adapter_class(), CellAdapter):
        of = "of sequences" if entry.modality == "sequence" else "without tokens"
        msg = f"{model} is a model {of}; explain shows the tokens of a cell, take a model of cells such as geneformer"
        raise InputError(msg)
    check_suits(data, model, entry, **options)


def explain_cell(
    data: Any,
    embedder: Embedder,
    *,
    cell: str | int,
    layer: str | None = None,
    gene_ids: str | None = None,
    species: str | None = None,
) -> Explanation:
    """Do what :func:`explain` does, and say what was read too."""
    adapter = embedder.adapter
    assert isinstance(adapter, CellAdapter)  # check_explains saw to it
    request = embedder.request(layer=layer, gene_ids=gene_ids, species=species)
    with open_cells(data, adapter.obs_columns, embedder.name) as cells:
        row = _find(cells, cell)
        matrix = Task(embedder, request).find_counts(cells)
        match = embedder.match_genes(cells, matrix, request)
        genes, facts = match.genes, dict(match.facts)
        block = next(count_blocks(cells, matrix, values=adapter.values, rows=range(row, row + 1)))
        prepared = embedder.prepare_cells(block, match, request).block
        assert isinstance(prepared, TokenBlock)
        tokens = prepared.tokens
        columns = identifier_columns(matrix.var, request.gene_ids)
        # Behind the name of the column may stand what its identifiers were read as.
        read_as = str(facts["gene_ids"])
        ids = columns[max((name for name in columns if read_as.startswith(name)), key=len)]
        expressed = _expressed_genes(block.counts, genes, ids, matrix.var.index.astype(str).tolist())
        stands_for = _genes_of_tokens(tokens, expressed, adapter.special_ids)
        table = _table(tokens, expressed, stands_for, adapter.vocabulary)
    kinds: list[Status] = [kind for kind in get_args(Status) if any(gene.status == kind for gene in expressed)]
    return Explanation(
        cell=str(block.obs.index[0]),
        model=embedder.name,
        table=table,
        facts=facts,
        genes={kind: sum(gene.status == kind for gene in expressed) for kind in kinds},
        counts={kind: sum(gene.count for gene in expressed if gene.status == kind) for kind in kinds},
    )


def _find(cells: CellData, cell: str | int) -> int:
    """Return the row of a cell."""
    if isinstance(cell, int):
        if not 0 <= cell < len(cells):
            msg = f"cell={cell} is not one of the {len(cells):,} cells of {cells.origin}, counted from 0"
            raise InputError(msg)
        return cell
    names = cells.obs.index.astype(str)
    rows = np.flatnonzero(names == cell)
    if len(rows) == 0:
        msg = f"no cell of {cells.origin} is called {cell!r}.{did_you_mean(cell, names)} The first of its {len(cells):,} is {names[0]!r}"
        raise InputError(msg)
    if len(rows) > 1:
        msg = f"{len(rows)} cells of {cells.origin} are called {cell!r} (rows {', '.join(map(str, rows[:5]))}); pass the number of one,"
        msg += f" cell={rows[0]} in Python, or make the names unique"
        raise InputError(msg)
    return int(rows[0])


@dataclass
class _Gene:
    """An expressed gene: what its columns are called, and their counts together."""

    ids: list[str]
    names: list[str]
    count: float
    token: int
    """-1: the model does not know it."""
    status: Status = "unknown"


def _expressed_genes(counts: CountMatrix, genes: GeneMap, ids: Sequence[str], names: Sequence[str]) -> list[_Gene]:
    """Return the genes of a cell, largest count first: columns that the model sums are one gene."""
    place_of = np.full(genes.n_columns, -1)
    place_of[genes.columns] = genes.targets
    found: dict[tuple[int, int], _Gene] = {}
    for column, count in zip(counts.indices, counts.data, strict=True):
        place = place_of[column]
        token = -1 if place < 0 else int(genes.tokens[place])
        # An unknown column is a gene of its own.
        gene = found.setdefault((place, column if place < 0 else -1), _Gene([], [], 0.0, token)) if count else None
        if gene is not None:
            gene.ids.append(ids[column])
            gene.names.append(names[column])
            gene.count += float(count)
    return sorted(found.values(), key=lambda gene: -gene.count)


def _genes_of_tokens(tokens: Tokens, expressed: list[_Gene], special: Sequence[int]) -> dict[int, list[_Gene]]:
    """Say which genes each token stands for, and set their status."""
    by_token: dict[int, list[_Gene]] = {}
    for gene in expressed:
        if gene.token >= 0:
            gene.status = "special" if gene.token in special else "cut"
            by_token.setdefault(gene.token, []).append(gene)
    # One id has several genes where a model keeps columns of one gene apart; values rise with counts.
    values = np.zeros(len(tokens.ids)) if tokens.values is None else tokens.values
    positions: dict[int, list[int]] = {}
    for at in np.argsort(-values, kind="stable").tolist():
        positions.setdefault(int(tokens.ids[at]), []).append(at)
    stands_for: dict[int, list[_Gene]] = {}
    for token, own in by_token.items():
        places = positions.get(token, []) if token not in special else []
        # A token that stands more often than its gene was drawn repeatedly.
        groups = [own] * len(places) if len(places) > len(own) else [[gene] for gene in own]
        for at, group in zip(places, groups, strict=False):
            stands_for[at] = group
            for gene in group:
                gene.status = "kept"
    return stands_for


def _table(tokens: Tokens, expressed: list[_Gene], stands_for: dict[int, list[_Gene]], vocabulary: NDArray[np.str_]) -> pd.DataFrame:
    """Write tokens in their order, then the genes without."""

    def described(genes: list[_Gene]) -> dict[str, Any]:
        return {
            "gene": "+".join(name for gene in genes for name in gene.ids),
            "name": "+".join(name for gene in genes for name in gene.names),
            "count": sum(gene.count for gene in genes) if genes else np.nan,
            "status": genes[0].status if genes else "special",
        }

    draw = np.repeat(np.arange(len(tokens)), tokens.lengths)
    rows = [
        {
            "position": at - int(tokens.offsets[draw[at]]),
            "token": str(vocabulary[token]),
            "token_id": int(token),
            **described(stands_for.get(at, [])),
            "value": np.nan if tokens.values is None else float(tokens.values[at]),
            "draw": int(draw[at]),
        }
        for at, token in enumerate(tokens.ids)
    ]
    rows += [{"token": "", **described([gene])} for gene in expressed if gene.status != "kept"]
    columns = ["position", "token", "token_id", "gene", "name", "count", "value", "status", "draw"]
    frame = pd.DataFrame(rows, columns=columns).astype({"position": "Int64", "token_id": "Int64", "value": float, "draw": "Int64"})
    return frame if len(tokens) > 1 else frame.drop(columns="draw")
