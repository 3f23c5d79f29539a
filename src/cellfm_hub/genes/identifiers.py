"""Which system a gene identifier belongs to, told from its spelling alone."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.errors import InputError

System = Literal["Ensembl", "Ensembl with version", "Entrez", "name", "missing"]
"""``"name"``: anything else with a letter in it, in practice a gene symbol."""

ENSEMBL = re.compile(r"(ENS[A-Z]*G)(\d{11})(\.\d+)?")
"""An Ensembl gene id. Clone-based symbols end in ``.1`` too (``AC002116.7``), so a version is a version only behind such an id."""

_WORDS: dict[str, str] = {
    "Ensembl": "Ensembl ids",
    "Ensembl with version": "Ensembl ids with version",
    "Entrez": "Entrez ids",
    "name": "symbols",
    "missing": "nothing",
    "mixed": "mixed identifiers",
}


def system_of(identifier: str) -> System:
    """Tell the system of one identifier."""
    if match := ENSEMBL.fullmatch(identifier):
        return "Ensembl with version" if match[3] else "Ensembl"
    if identifier.isdigit() and identifier.isascii():
        return "Entrez"
    return "name" if identifier else "missing"


def systems_of(ids: Sequence[str]) -> NDArray[np.object_]:
    """Tell the system of each identifier, ``(n,)`` of :data:`System`."""
    return np.array([system_of(identifier) for identifier in ids], dtype=object)


def main_system(systems: Sequence[str] | NDArray[np.object_]) -> str:
    """Return the system of at least 90 % of the identifiers that are not missing, else ``"mixed"``; ``"missing"`` if there are none."""
    counts = Counter(systems)
    del counts["missing"]
    if not counts:
        return "missing"
    if counts["Ensembl"] + counts["Ensembl with version"] >= 0.9 * counts.total():
        return "Ensembl with version" if counts["Ensembl with version"] > counts["Ensembl"] else "Ensembl"
    system, number = counts.most_common(1)[0]
    return system if number >= 0.9 * counts.total() else "mixed"


def in_words(system: str) -> str:
    """Name a system, or ``"mixed"``, in the plural."""
    return _WORDS[system]


_OTHER_FEATURES = frozenset(
    {
        "antibody capture", "antibody", "adt", "protein", "proteins", "antigen capture", "hto", "hashtag", "multiplexing capture",
        "crispr guide capture", "guide", "grna", "sgrna", "peaks", "peak", "atac", "chromatin accessibility", "custom", "vdj",
    }
)  # fmt: skip
"""What features that are no genes are called, by Cell Ranger and others, whatever each is named after."""


def are_genes(var: pd.DataFrame) -> NDArray[np.bool_]:
    """Say which features are genes: all but those of which the annotation says that they are something else."""
    kinds = _feature_types(var)
    return np.ones(len(var), dtype=bool) if kinds is None else ~kinds.str.strip().str.lower().isin(_OTHER_FEATURES).to_numpy()


def _feature_types(var: pd.DataFrame) -> "pd.Series[str] | None":
    column = next((name for name in ("feature_types", "feature_type") if name in var), None)
    return None if column is None else var[column].astype(str)


def other_features(var: pd.DataFrame) -> str:
    """Count the features that are no genes, by kind; an empty string if there are none."""
    others, kinds = ~are_genes(var), _feature_types(var)
    counts = Counter(kinds[others].tolist()) if kinds is not None else Counter[str]()
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common())


def identifier_columns(var: pd.DataFrame, column: str | None = None) -> dict[str, list[str]]:
    """Return the index and every text column of `var`, or the one that the user chose; missing entries become empty strings.

    So do those of features that are no genes: the antibody CD4 is not the gene of this name. White space round an identifier does not
    count, unless another one is the same without it: the original releases read that one alone.
    Whole numbers are text here where they stand in the index or in a column that the user chose: they may be Entrez ids.

    Raises
    ------
    InputError
        If there is no such column.
    """
    columns = {"index": _texts(var.index, numbers=True)}
    for place, name in enumerate(map(str, var.columns)):
        values = var.iloc[:, place]
        if isinstance(values.dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(values.dtype) or values.dtype == object:
            columns[name] = _texts(values, numbers=column == name)
        elif column == name and values.dtype.kind in "iu":
            columns[name] = values.astype(str).tolist()
    for place in np.flatnonzero(~are_genes(var)).tolist():
        for ids in columns.values():
            ids[place] = ""
    if column is None:
        return columns
    if column not in columns:
        msg = f"gene_ids={column!r} is not a text column of var; it has {', '.join(map(repr, columns))}"
        raise InputError(msg)
    return {column: columns[column]}


def _texts(values: "pd.Index | pd.Series", *, numbers: bool) -> list[str]:
    """Return identifiers as text without white space round them; missing ones, and numbers where they are none, are empty."""

    def text(value: object) -> str:
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if numbers and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return value if isinstance(value, str) else ""

    given = [text(value) for value in values.tolist()]
    written = set(given) - {""}
    return [name if (plain := name.strip()) == name or plain in written else plain for name in given]
