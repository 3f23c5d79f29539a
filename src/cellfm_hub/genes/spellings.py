"""Names of genes in the spellings that programs make of them, and the names that were there before.

================ ======================================== ====================================================================
kind             spelled                                  made by
================ ======================================== ====================================================================
``"genome"``     ``GRCh38_CD3D``, ``mm10___Cd3d``         Cell Ranger, for cells of several genomes; read for the species alone
``"joined"``     ``ENSG00000167286_CD3D``, ``CD3D|ENSG…`` whoever wants names unique and readable; the id decides
``"dots"``       ``HLA.A``, ``X7SK``                      R, whose names hold no dashes and begin with no digit
``"copy"``       ``HLA-A-1``, ``HLA-A.1``, ``ENSG…_PAR_Y`` ``var_names_make_unique``, R's ``make.unique``; GENCODE
================ ======================================== ====================================================================

A name that means a gene as it is written is never read in another way, so that ``NKX2-1`` and ``RP11-34P13.7`` stay what they are; and a
number is taken for that of a copy only where the name without it stands among the others.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

_GENOMES = {
    **dict.fromkeys(("GRCh37", "GRCh38", "hg19", "hg38"), "human"),
    **dict.fromkeys(("GRCm38", "GRCm39", "mm9", "mm10", "mm39"), "mouse"),
}
_GENOME = re.compile(rf"({'|'.join(_GENOMES)})[_-]+(.+)")  # Seurat writes dashes for underscores
_JOINED = re.compile(r"(ENS[A-Z]*G\d{11})(?:\.\d+)?[_|:;-]+(.+)|(.+?)[_|:;-]+(ENS[A-Z]*G\d{11})(?:\.\d+)?")
_PAR_Y = re.compile(r"(?:(ENSG\d{11})(?:\.\d+)?_PAR_Y|ENSGR(\d{10})(?:\.\d+)?)")
_COPY = re.compile(r"(.+)[-._]\d{1,3}")
_MOST_DOTS = 4


def respell(
    names: Sequence[str], means_gene: Callable[[Sequence[str]], NDArray[np.bool_]], species: str | None
) -> tuple[list[str], NDArray[np.object_]]:
    """Write names in the way in which they mean a gene.

    Parameters
    ----------
    names
        All of a column.
    means_gene
        Says which names mean a gene as they are written.
    species
        Of the data; names that are marked as those of another species stay as they are.

    Returns
    -------
    The names, and of which kind the spelling of each was, empty where it is unchanged.
    """
    plain, kinds = list(names), np.full(len(names), "", dtype=object)
    open_places = np.flatnonzero(~means_gene(names)).tolist()
    tried = [(place, kind, other) for place in open_places for kind, other in _other_spellings(names[place], species)]
    meant = means_gene([other for _, _, other in tried])
    for place, kind, other in (tried[i] for i in np.flatnonzero(meant)[::-1].tolist()):  # the first one stays
        plain[place], kinds[place] = other, kind
    unread = set(open_places)
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    for place in open_places:
        match = _COPY.fullmatch(names[place])
        original = None if match is None else first.get(match[1])
        if original is None or (original in unread and not kinds[original]):
            continue
        # "RNU6.1" beside "RNU6" may be RNU6-1 too.
        plain[place], kinds[place] = (names[place], "") if kinds[place] else (plain[original], "copy")
    return plain, kinds


def _other_spellings(name: str, species: str | None) -> Iterator[tuple[str, str]]:
    """Give what a name may have been, best first, by the kind of spelling."""
    if match := _GENOME.fullmatch(name):
        if _GENOMES[match[1]] == species:
            yield "genome", match[2]
            yield from (("genome", other) for _, other in _other_spellings(match[2], species))
    elif match := _PAR_Y.fullmatch(name):
        yield "copy", match[1] or f"ENSG0{match[2]}"
    elif match := _JOINED.fullmatch(name):
        yield "joined", match[1] or match[4]
        yield "joined", match[2] or match[3]
    elif (dots := name.count(".")) <= _MOST_DOTS:
        parts, begins_with_digit = name.split("."), re.match(r"X\d", name) is not None
        for marks in product("-.", repeat=dots):
            written = "".join(part + mark for part, mark in zip(parts, (*marks, ""), strict=True))
            if written != name:
                yield "dots", written
            if begins_with_digit:
                yield "dots", written[1:]


def core(name: str) -> str:
    """Return a name without what stands round it, told by its form alone: the name of a genome, and the second of id and symbol."""
    genome = _GENOME.fullmatch(name)
    inner = genome[2] if genome else name
    joined = _JOINED.fullmatch(inner) if "ENS" in inner else None
    return (joined[1] or joined[3]) if joined else inner
