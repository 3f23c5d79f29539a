"""`Tokens`, the one currency between tokenizers and networks, and `Ragged`, its counterpart for vectors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellfm_hub.errors import InputError


def offsets_from_lengths(lengths: ArrayLike) -> NDArray[np.int64]:
    """Return the ``n + 1`` offsets at which rows of the given lengths begin and end in a flat array."""
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def flat_indices(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate the ranges ``start … start + length``, one per row."""
    offsets = offsets_from_lengths(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens of differing length, packed end to end; each row exactly as the network sees it.

    Parameters
    ----------
    ids
        Token ids, ``(total,)`` int32, special tokens included.
    offsets
        ``(n + 1,)`` int64; row *i* is ``ids[offsets[i]:offsets[i + 1]]``. An empty row stands for a cell without any usable gene.
    values
        ``(total,)`` float32, the value that accompanies each token, in families that have one.
    positions
        ``(total,)`` int64, in families whose positions are not simply 0, 1, 2, ….
    widths
        ``(total,)`` int32, sequences only: how many bases each token covers (0 for special tokens).
    cut
        ``(n,)`` int64: how many tokens of the row did not fit into the model's input and were left out.
    rows
        ``(n,)`` int64: which input each row belongs to. Only where one input makes several rows (windows and strands of a sequence, several
        draws from a cell); ``None`` means one row per input.
    begins
        ``(n,)`` int64: at which base of its input each row begins; ``None``: all at the first.

    Raises
    ------
    InputError
        If the arrays do not fit together.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    values: NDArray[np.float32] | None = None
    positions: NDArray[np.int64] | None = None
    widths: NDArray[np.int32] | None = None
    cut: NDArray[np.int64] | None = None
    rows: NDArray[np.int64] | None = None
    begins: NDArray[np.int64] | None = None

    _PER_TOKEN = ("ids", "values", "positions", "widths")
    _PER_ROW = ("cut", "rows", "begins")

    def __post_init__(self) -> None:
        dtypes = {"ids": np.int32, "offsets": np.int64, "values": np.float32, "positions": np.int64}
        dtypes |= {"widths": np.int32, "cut": np.int64, "rows": np.int64, "begins": np.int64}
        for field in fields(self):
            given = getattr(self, field.name)
            if given is None:
                continue
            array = np.asarray(given)
            if array.ndim != 1:
                msg = f"Tokens.{field.name} has shape {array.shape}; expected a flat 1-D array (pack rows end to end, set offsets)"
                raise InputError(msg)
            if field.name in {"ids", "offsets", "rows"} and array.size and array.dtype.kind not in "iu":
                msg = f"Tokens.{field.name} has dtype {array.dtype}; expected integers"
                raise InputError(msg)
            object.__setattr__(self, field.name, array.astype(dtypes[field.name], copy=False))
        if len(self.offsets) == 0 or self.offsets[0] != 0 or np.any(np.diff(self.offsets) < 0) or self.offsets[-1] != len(self.ids):
            msg = f"Tokens.offsets must rise from 0 to the number of ids ({len(self.ids)}); received {_shorten(self.offsets)}"
            raise InputError(msg)
        for name in self._PER_TOKEN + self._PER_ROW:
            array = getattr(self, name)
            expected = len(self.ids) if name in self._PER_TOKEN else len(self)
            if array is not None and len(array) != expected:
                msg = (
                    f"Tokens.{name} has {len(array)} entries; expected {expected}, one per {'token' if name in self._PER_TOKEN else 'row'}"
                )
                raise InputError(msg)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each row, ``(n,)`` int64."""
        return np.diff(self.offsets)

    def row(self, index: int) -> NDArray[np.int32]:
        """Return the token ids of one row."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def padded(self, fill: int = 0) -> NDArray[np.int32]:
        """Return the ids as a rectangle ``(n, longest)``, for people and comparisons; networks never need it."""
        lengths = self.lengths
        table = np.full((len(self), int(lengths.max(initial=0))), fill, dtype=np.int32)
        table[np.arange(table.shape[1]) < lengths[:, None]] = self.ids
        return table

    def take(self, index: ArrayLike) -> "Tokens":
        """Return the given rows, in the given order."""
        index = np.asarray(index, dtype=np.int64)
        lengths = self.lengths[index]
        flat = flat_indices(self.offsets[index], lengths)
        taken: dict[str, Any] = {n: a[flat] for n in self._PER_TOKEN if (a := getattr(self, n)) is not None}
        taken |= {n: a[index] for n in self._PER_ROW if (a := getattr(self, n)) is not None}
        return Tokens(offsets=offsets_from_lengths(lengths), **taken)

    def first_tokens(self) -> "Tokens":
        """Return the first token of each row as a row of its own. No row may be empty."""
        starts = self.offsets[:-1]
        taken: dict[str, Any] = {n: a[starts] for n in self._PER_TOKEN if (a := getattr(self, n)) is not None}
        taken |= {n: getattr(self, n) for n in self._PER_ROW}
        return Tokens(offsets=np.arange(len(self.offsets)), **taken)

    @classmethod
    def concatenate(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """Join blocks of rows. Fields that a block lacks must be lacking in all.

        ``rows`` must count through all blocks already.
        """
        if not parts:
            return cls(ids=np.empty(0, np.int32), offsets=np.zeros(1, np.int64))
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in cls._PER_TOKEN + cls._PER_ROW
            if getattr(parts[0], name) is not None
        }
        return cls(offsets=offsets_from_lengths(np.concatenate([part.lengths for part in parts])), **joined)

    @classmethod
    def from_lists(cls, rows: Iterable[Sequence[int]]) -> "Tokens":
        """Pack a list of lists of token ids.

        Examples
        --------
        >>> Tokens.from_lists([[3, 17, 4], [3]]).offsets.tolist()
        [0, 3, 4]
        """
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        ids = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
        return cls(ids=ids, offsets=offsets_from_lengths([len(a) for a in arrays]))


@dataclass(frozen=True)
class Ragged:
    """One vector per token (or per base), rows of differing length packed end to end.

    Parameters
    ----------
    values
        ``(total, d)`` float32.
    ids
        ``(total,)`` int32, the token id each vector belongs to, special tokens included; -1 for a base that was cut off.
    offsets
        ``(n + 1,)`` int64; row *i* is ``values[offsets[i]:offsets[i + 1]]``.
    vocabulary
        ``(V,)`` str: the gene or piece of sequence that each token id stands for.
    """

    values: NDArray[np.float32]
    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    vocabulary: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def names(self) -> NDArray[np.str_]:
        """The gene or piece of sequence of each vector, ``(total,)`` str; empty for a base that was cut off."""
        return np.where(self.ids < 0, "", self.vocabulary[self.ids])

    def row(self, index: int) -> NDArray[np.float32]:
        """Return the vectors of one row, ``(length, d)``."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def concatenate(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """Join blocks of rows, at least one, of the same model."""
        return cls(
            values=np.concatenate([part.values for part in parts]),
            ids=np.concatenate([part.ids for part in parts]),
            offsets=offsets_from_lengths(np.concatenate([np.diff(part.offsets) for part in parts])),
            vocabulary=parts[0].vocabulary,
        )


def _shorten(array: NDArray[Any]) -> str:
    shown = ", ".join(str(x) for x in array[:6])
    return f"[{shown}{', …' if len(array) > 6 else ''}]"
