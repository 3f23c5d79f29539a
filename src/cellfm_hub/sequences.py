"""What sequence models share: cleaning, strands, k-mers, and fitting long sequences into a model's input."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.errors import SequenceError
from cellfm_hub.tokens import Tokens, flat_indices, offsets_from_lengths

Case = Literal["upper", "as-is"]
Long = Literal["error", "truncate", "tile"]

NUCLEOTIDES = "ACGTUNRYSWKMBDHV-."
"""IUPAC codes of nucleotides, and gaps."""
_LETTERS = NUCLEOTIDES + NUCLEOTIDES.lower()

_COMPLEMENT = str.maketrans("ACGTUNRYSWKMBDHVacgtunryswkmbdhv", "TGCAANYRSWMKVHDBtgcaanyrswmkvhdb")


def reverse_complement(sequence: str) -> str:
    """Return the other strand, IUPAC codes included.

    Examples
    --------
    >>> reverse_complement("AACGR")
    'YCGTT'
    """
    return sequence.translate(_COMPLEMENT)[::-1]


@dataclass
class BaseCounts:
    """What was done to the bases on the way in, summed over a run."""

    bases: int = 0
    upper_cased: int = 0
    u_to_t: int = 0
    ambiguous: int = 0
    """Letters other than A, C, G, T (after conversion): N, IUPAC codes, gaps."""
    unknown: int = 0
    """Bases that the model saw only as its unknown token."""
    truncated: int = 0
    """Bases that were cut off."""


def clean(names: Sequence[str], sequences: Sequence[str], case: Case, counts: BaseCounts) -> list[str]:
    """Check sequences and bring them to the form a tokenizer expects. Empty ones pass: they make empty rows.

    Parameters
    ----------
    names, sequences
        What came in.
    case
        ``"upper"``: upper-case, and U becomes T. ``"as-is"``: nothing is changed, as in the original releases.
    counts
        Is added to.

    Raises
    ------
    SequenceError
        If a sequence holds anything but nucleotides, naming it and the place.
    """
    out = []
    for name, sequence in zip(names, sequences, strict=True):
        # Before they are upper-cased: there are letters of which that makes several others.
        if foreign := set(sequence).difference(_LETTERS):
            at = min(sequence.index(letter) for letter in foreign)
            msg = f"sequence {name!r} holds {sequence[at]!r} at position {at + 1}; expected nucleotides (A C G T U N, IUPAC codes, gaps)."
            msg += " Proteins, spaces and other symbols cannot be embedded"
            raise SequenceError(msg)
        upper = sequence.upper()
        converted = upper.replace("U", "T") if case == "upper" else sequence
        counts.bases += len(sequence)
        if case == "upper":
            counts.upper_cased += len(sequence) - sum(map(sequence.count, NUCLEOTIDES))
            counts.u_to_t += upper.count("U")
        counts.ambiguous += len(sequence) - sum(map(converted.count, "ACGT"))
        out.append(converted)
    return out


def drop_baseless(sequences: Sequence[str]) -> list[str]:
    """Empty the sequences in which no letter is A, C, G or T, such as gaps of an assembly: a model knows nothing of them.

    Letters are those that :func:`clean` returns for ``"upper"``.
    """
    return [sequence if any(base in sequence for base in "ACGT") else "" for sequence in sequences]


def base_codes(sequences: Sequence[str], alphabet: str) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Pack sequences into one array of codes: the place of each letter in `alphabet`, -1 for any other.

    Returns
    -------
    codes, ``(total,)`` int8, and offsets, ``(n + 1,)`` int64.
    """
    table = np.full(256, -1, dtype=np.int8)
    table[np.frombuffer(alphabet.encode(), dtype=np.uint8)] = np.arange(len(alphabet))
    letters = np.frombuffer("".join(sequences).encode("latin-1"), dtype=np.uint8)
    return table[letters], offsets_from_lengths([len(s) for s in sequences])


def kmer_codes(codes: NDArray[np.int8], k: int, letters: int) -> NDArray[np.int64]:
    """Read a number in base `letters` from every k consecutive codes, first code most significant.

    Returns
    -------
    ``(total - k + 1,)`` int64 (empty if there are fewer than k codes); meaningless where a window holds a negative code.
    """
    windows = max(len(codes) - k + 1, 0)
    numbers = np.zeros(windows, dtype=np.int64)
    for i in range(k):
        numbers *= letters
        numbers += codes[i : i + windows]
    return numbers


def fit_to_model(
    body: Tokens,
    names: Sequence[str],
    *,
    max_tokens: int | None,
    prefix: Sequence[int],
    suffix: Sequence[int],
    long: Long,
    overlap: int,
) -> Tokens:
    """Bring tokenized sequences to the length a model takes, and add special tokens. An empty row stays empty.

    Parameters
    ----------
    body
        Sequences without special tokens, with ``widths``.
    names
        What they are called.
    max_tokens
        Longest row, special tokens included; ``None``: any.
    prefix, suffix
        Special tokens around every row.
    long
        What to do with a longer sequence: refuse it, cut its end off, or tile it with windows.
    overlap
        Bases that neighbouring windows share at most; windows begin where a token begins.

    Returns
    -------
    With ``tile`` one sequence can make several rows; ``rows`` and ``begins`` then say which, and where in it.

    Raises
    ------
    SequenceError
        If a sequence is too long and `long` is ``"error"``, or if `overlap` leaves no progress.
    """
    room = None if max_tokens is None else max_tokens - len(prefix) - len(suffix)
    lengths = body.lengths
    too_long = np.zeros(0, np.int64) if room is None else np.flatnonzero(lengths > room)
    if len(too_long) and long == "error":
        at = int(too_long[0])
        bases = int(_widths(body)[body.offsets[at] : body.offsets[at + 1]].sum())
        needed = int(lengths[at]) + len(prefix) + len(suffix)
        msg = f"sequence {names[at]!r} has {bases:,} bases = {needed:,} tokens, the model takes {max_tokens:,}"
        msg += f" ({len(too_long)} of {len(lengths)} sequences are too long). Pass long='truncate' to keep the beginning"
        msg += " or long='tile' to average over windows"
        raise SequenceError(msg)
    starts, taken, rows = body.offsets[:-1], lengths, np.arange(len(lengths))
    if room is not None and long == "truncate":
        taken = np.minimum(lengths, room)
    elif room is not None and len(too_long):
        starts, taken, rows = _windows(body, room, overlap)
    cut = None if long == "tile" else lengths - taken
    fitted = _with_special(body, starts, taken, prefix, suffix)
    if len(rows) == len(lengths):
        return replace(fitted, cut=cut)
    bases_before = np.concatenate(([0], np.cumsum(_widths(body), dtype=np.int64)))
    return replace(fitted, rows=rows, begins=bases_before[starts] - bases_before[body.offsets[rows]])


def _widths(body: Tokens) -> NDArray[np.int32]:
    assert body.widths is not None
    return body.widths


def _windows(body: Tokens, room: int, overlap: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Lay windows of at most `room` tokens over every sequence."""
    ends_in_bases = np.cumsum(_widths(body), dtype=np.int64)
    starts, taken, rows = [], [], []
    for row, (begin, end) in enumerate(zip(body.offsets[:-1].tolist(), body.offsets[1:].tolist(), strict=True)):
        at = begin
        while True:
            stop = min(at + room, end)
            starts.append(at)
            taken.append(stop - at)
            rows.append(row)
            if stop == end:
                break
            # First token that begins within the last `overlap` bases of this window.
            at_next = int(np.searchsorted(ends_in_bases, ends_in_bases[stop - 1] - overlap, side="left")) + 1
            if at_next <= at:
                msg = f"overlap={overlap} bases covers a whole window of {room} tokens; use a smaller one"
                raise SequenceError(msg)
            at = min(at_next, stop)
    return np.array(starts), np.array(taken), np.array(rows)


def _with_special(
    body: Tokens, starts: NDArray[np.int64], lengths: NDArray[np.int64], prefix: Sequence[int], suffix: Sequence[int]
) -> Tokens:
    """Take the given stretches of tokens as rows, and put special tokens around those that are not empty."""
    filled = lengths > 0
    offsets = offsets_from_lengths(np.where(filled, lengths + len(prefix) + len(suffix), 0))
    begins, ends = offsets[:-1][filled], offsets[1:][filled]
    inside = flat_indices(begins + len(prefix), lengths[filled])
    taken = flat_indices(starts, lengths)
    ids = np.empty(offsets[-1], dtype=np.int32)
    widths = np.zeros(offsets[-1], dtype=np.int32)
    ids[inside], widths[inside] = body.ids[taken], _widths(body)[taken]
    for i, special in enumerate(prefix):
        ids[begins + i] = special
    for i, special in enumerate(suffix):
        ids[ends - len(suffix) + i] = special
    return Tokens(ids=ids, offsets=offsets, widths=widths)
