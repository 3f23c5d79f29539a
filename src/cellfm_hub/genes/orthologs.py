"""Mouse genes as human ones, by one-to-one orthologs."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.errors import InputError
from cellfm_hub.genes import tables
from cellfm_hub.genes.names import AMBIGUOUS, UNKNOWN, Found, NameBook, name_book

_PATTERN = "mouse_human_orthologs*"


def as_human(ids: Sequence[str]) -> Found:
    """Say which human gene is the one-to-one ortholog of each mouse gene; ``how`` tells how the mouse gene was found.

    Genes whose orthology is one to many or many to many have none.

    Raises
    ------
    InputError
        If there is no table of orthologs.
    """
    mouse, human = name_book("mouse"), name_book("human")
    assert mouse is not None
    assert human is not None
    found = mouse.find(ids)
    ortholog = _one_to_one(tables.history_files((_PATTERN,)), mouse, human)
    gene = np.where(found.gene >= 0, ortholog[found.gene], found.gene)
    return Found(gene, np.where((gene >= 0) | (gene == AMBIGUOUS), found.how, "unknown"))


@lru_cache(maxsize=2)
def _one_to_one(files: tuple[tables.Version, ...], mouse: NameBook, human: NameBook) -> NDArray[np.int64]:
    """Return the human gene of each mouse gene."""
    if not files:
        folder = tables.history_folders()[0]
        msg = "orthologs='one2one' needs a table of orthologs, which does not ship with the package: put mouse_human_orthologs.tsv.gz"
        msg += f" (columns mouse_ensembl_id, mouse_symbol, human_ensembl_id, human_symbol, type) into {folder},"
        msg += " or name its folder as CELLFM_GENES"
        raise InputError(msg)
    table = tables.read_table(files[0].path, ("mouse_ensembl_id", "mouse_symbol", "human_ensembl_id", "human_symbol", "type"))
    table = table[table["type"] == "one2one"]

    def genes(book: NameBook, ids: Sequence[str], symbols: Sequence[str]) -> NDArray[np.int64]:
        by_id, by_symbol = book.find(ids).gene, book.find(symbols).gene
        return np.where(by_id >= 0, by_id, by_symbol)

    of_mouse = genes(mouse, table["mouse_ensembl_id"].tolist(), table["mouse_symbol"].tolist())
    of_human = genes(human, table["human_ensembl_id"].tolist(), table["human_symbol"].tolist())
    out = np.full(len(mouse.ensembl), UNKNOWN, dtype=np.int64)
    both = (of_mouse >= 0) & (of_human >= 0)
    out[of_mouse[both]] = of_human[both]
    return out
