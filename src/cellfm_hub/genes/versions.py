"""Ensembl ids with and without version: they name the same gene, whichever of them a model's vocabulary holds."""

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_ID = re.compile(r"(ENS[A-Z]*G\d{11})(\.\d+)?", re.IGNORECASE)


def without_versions(
    ids: Sequence[str],
    known: Callable[[Sequence[str]], NDArray[np.bool_]],
    vocabulary: Callable[[], Iterable[str]] | None = None,
    *,
    copies: bool = False,
) -> list[str]:
    """Write each Ensembl id that a model does not know as it is in the way that it does: bare, or with the version of the vocabulary.

    Parameters
    ----------
    ids
        Identifiers of any kind.
    known
        Says which identifiers the model knows.
    vocabulary
        All that it knows, where some of it may be Ensembl ids with versions. Asked only where bare ids are not known.
    copies
        Whether an id is rewritten although another column is called so as it is written. The original releases read that column alone.
    """
    out = list(ids)
    missed = np.flatnonzero(~known(ids)).tolist()
    bare = {i: match[1] for i in missed if ids[i][:3].upper() == "ENS" and (match := _ID.fullmatch(ids[i])) is not None}
    if not bare:
        return out
    written = frozenset() if copies else frozenset(ids)
    unique = list(dict.fromkeys(bare.values()))
    spelled = {name: name for name, k in zip(unique, known(unique), strict=True) if k}
    if len(spelled) < len(unique) and vocabulary is not None:
        versioned = {match[1]: name for name in vocabulary() if name[:3] == "ENS" and (match := _ID.fullmatch(name)) and match[2]}
        spelled = versioned | spelled
    for i, name in bare.items():
        if name in spelled and spelled[name] not in written:
            out[i] = spelled[name]
    return out
