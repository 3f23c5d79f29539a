"""The tokens of one cell, as a model sees them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.adapter import CellAdapter
from cellfm_hub.api import load_tokenizer
from cellfm_hub.embedder import Embedder
from cellfm_hub.errors import InputError, did_you_mean
from cellfm_hub.genes import CountMatrix, GeneMap, identifier_columns
from cellfm_hub.receipt import Receipt
from cellfm_hub.sources.cells import CellData, count_blocks, find_counts, open_cells
from cellfm_hub.tokens import Tokens


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
        By status: expressed columns of the matrix, and their counts.
    """

    cell: str
    model: str
    table: pd.DataFrame
    facts: Receipt
    genes: dict[str, int]
    counts: dict[str, float]

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
    return explain_cell(
        data,
        load_tokenizer(model, checkpoint=checkpoint, revision=revision, options=options, seed=seed),
        cell=cell,
        layer=layer,
        gene_ids=gene_ids,
        species=species,
    ).table


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
    if not isinstance(adapter, CellAdapter):
        of = "of sequences" if embedder.modality == "sequence" else "without tokens"
        msg = f"{embedder.name} is a model {of}; explain shows the tokens of a cell, take a model of cells such as geneformer"
        raise InputError(msg)
    request = embedder.request(layer=layer, gene_ids=gene_ids, species=species)
    with open_cells(data, adapter.obs_columns, embedder.name) as cells:
        row = _find(cells, cell)
        matrix = find_counts(cells, request.layer, adapter.values)
        match = embedder.match_genes(cells, matrix, request)
        genes, facts = match.genes, dict(match.facts)
        block = next(count_blocks(cells, matrix, values=adapter.values, rows=range(row, row + 1)))
        counts = block.counts
        tokens = adapter.tokenize(genes.apply(counts), genes, block.obs, request.seed)
        columns = identifier_columns(matrix.var, request.gene_ids)
        # Behind the name of the column may stand what its identifiers were read as.
        ids = columns[max((name for name in columns if match.column.startswith(name)), key=len)]
        frame, status = _table(tokens, counts, genes, adapter, names=(ids, matrix.var.index.astype(str).tolist()))
    found = {kind: np.flatnonzero(status == kind) for kind in ("kept", "cut", "unknown", "special") if (status == kind).any()}
    return Explanation(
        cell=str(block.obs.index[0]),
        model=embedder.name,
        table=frame,
        facts=facts,
        genes={kind: len(at) for kind, at in found.items()},
        counts={kind: float(counts.data[counts.data != 0][at].sum(dtype=np.float64)) for kind, at in found.items()},
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


def _table(
    tokens: Tokens, counts: CountMatrix, genes: GeneMap, adapter: CellAdapter, *, names: tuple[Sequence[str], Sequence[str]]
) -> tuple[pd.DataFrame, NDArray[np.str_]]:
    """Say which expressed columns each token stands for.

    Returns
    -------
    The table, and the status of each expressed column of `counts`.
    """
    expressed = counts.indices[counts.data != 0]
    count = counts.data[counts.data != 0].astype(np.float64)
    place_of = np.full(genes.n_columns, -1)
    place_of[genes.columns] = genes.targets
    members: dict[int, list[int]] = {}
    """Place of a gene -> which expressed columns feed it."""
    for i, column in enumerate(expressed):
        if place_of[column] >= 0:
            members.setdefault(int(place_of[column]), []).append(i)

    # Places of each token id, largest count first; one id has several where a model keeps columns of one gene apart.
    places: dict[int, list[int]] = {}
    for place in sorted(members, key=lambda place: -count[members[place]].sum()):
        places.setdefault(int(genes.tokens[place]), []).append(place)
    values = np.full(len(tokens.ids), np.nan, dtype=np.float32) if tokens.values is None else tokens.values
    positions: dict[int, list[int]] = {}
    for at in sorted(range(len(tokens.ids)), key=lambda at: (-np.nan_to_num(values[at]), at)):
        positions.setdefault(int(tokens.ids[at]), []).append(at)

    fed_by: dict[int, list[int]] = {}
    """Position -> expressed columns."""
    status = np.array(["unknown"] * len(expressed), dtype="<U7")
    for token, own in places.items():
        stands = positions.get(token, []) if token not in adapter.special_ids else []
        every = [i for place in own for i in members[place]]
        status[every] = "special" if token in adapter.special_ids else "cut"
        # A token that stands more often than its gene was drawn repeatedly.
        groups = [every] * len(stands) if len(stands) > len(own) else [members[place] for place in own]
        for position, group in zip(stands, groups, strict=False):
            fed_by[position] = group
            status[group] = "kept"

    ids, var_names = names
    row = np.repeat(np.arange(len(tokens)), tokens.lengths)
    rows: list[dict[str, Any]] = []
    for at, token in enumerate(tokens.ids):
        columns = fed_by.get(at, [])
        rows.append(
            {
                "position": at - int(tokens.offsets[row[at]]),
                "token": str(adapter.vocabulary[token]),
                "token_id": int(token),
                "gene": "+".join(ids[expressed[i]] for i in columns),
                "name": "+".join(var_names[expressed[i]] for i in columns),
                "count": count[columns].sum() if columns else np.nan,
                "value": float(values[at]),
                "status": "kept" if columns else "special",
                "draw": int(row[at]),
            }
        )
    left = [i for i in np.argsort(-count, kind="stable") if status[i] != "kept"]
    rows += [
        {"gene": ids[expressed[i]], "name": var_names[expressed[i]], "count": count[i], "value": np.nan, "status": str(status[i])}
        for i in left
    ]
    columns_of_table = ["position", "token", "token_id", "gene", "name", "count", "value", "status", "draw"]
    frame = pd.DataFrame(rows, columns=columns_of_table).astype({"position": "Int64", "token_id": "Int64", "draw": "Int64"})
    frame["token"] = frame["token"].fillna("")
    return (frame if len(tokens) > 1 else frame.drop(columns="draw")), status
