"""The 6-mer tokenizer.

From left to right: where the next six letters are all A, C, G or T, they are one token; else the letter alone is one, if it is A, C, G,
T or N; else the whole run of foreign letters becomes a single ``<unk>``. Equal to ``EsmTokenizer`` with the published ``vocab.txt``.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.kernels import compiled
from cellfm_hub.sequences import base_codes, kmer_codes
from cellfm_hub.tokens import Tokens

_BASES = "ATCG"  # the order of the published vocabulary
_N = len(_BASES)


class Tokenizer:
    """Turns DNA into k-mers (k = 6, or 3 in one checkpoint), read off the vocabulary.

    Parameters
    ----------
    vocabulary
        Lines of ``vocab.txt``; the line number is the id.

    Raises
    ------
    CheckpointFormatError
        If the vocabulary is not that of a k-mer tokenizer.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        ids = {token: i for i, token in enumerate(vocabulary)}
        kmers = [token for token in vocabulary if len(token) > 1 and set(token) <= set(_BASES)]
        self.k = len(kmers[0]) if kmers else 0
        needed = ("<unk>", "<cls>", "<mask>", *_BASES, "N")
        if len(kmers) != 4**self.k or any(len(token) != self.k for token in kmers) or any(token not in ids for token in needed):
            msg = (
                f"vocab.txt with {len(vocabulary):,} lines is not that of a k-mer tokenizer: it needs all k-mers of one length, A T C G N,"
            )
            msg += " <unk>, <cls> and <mask>; use the file of the published checkpoint"
            raise CheckpointFormatError(msg)
        self.vocabulary: NDArray[np.str_] = np.array(vocabulary)
        self.unk_id, self.cls_id, self.mask_id = ids["<unk>"], ids["<cls>"], ids["<mask>"]
        codes = kmer_codes(base_codes(kmers, _BASES)[0], self.k, 4)[:: self.k]
        self._kmer_ids = np.empty(4**self.k, dtype=np.int32)
        self._kmer_ids[codes] = [ids[token] for token in kmers]
        # Code of a letter (A T C G N, and -1 for anything else, which is the last entry) -> id of its own token.
        self._letter_ids = np.array([ids[token] for token in (*_BASES, "N", "<unk>")], dtype=np.int32)

    @property
    def used_ids(self) -> int:
        """One more than the largest id that a sequence can produce."""
        return int(max(self._kmer_ids.max(), self._letter_ids.max(), self.cls_id)) + 1

    def tokenize(self, sequences: Sequence[str]) -> Tokens:
        """Split sequences into tokens, without special ones."""
        codes, starts = base_codes(sequences, _BASES + "N")  # (L,) all letters end to end
        ids, widths, offsets = split(codes, starts, self.k, self._kmer_ids, self._letter_ids)
        return Tokens(ids=ids, offsets=offsets, widths=widths)


@compiled
def split(
    codes: NDArray[np.int8], starts: NDArray[np.int64], k: int, kmer_ids: NDArray[np.int32], letter_ids: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Read sequences from left to right.

    Parameters
    ----------
    codes
        ``(L,)`` letters, A T C G N as 0 … 4, any other as -1.
    starts
        ``(n + 1,)`` where sequences begin and end.
    kmer_ids
        ``(4^k,)`` id of each k-mer, first base most significant.
    letter_ids
        Ids of A T C G N, and last that of ``<unk>``.

    Returns
    -------
    The id of each token, how many letters it covers, and where the tokens of each sequence begin and end.
    """
    ids, widths = np.empty(len(codes), dtype=np.int32), np.empty(len(codes), dtype=np.int32)
    offsets = np.zeros(len(starts), dtype=np.int64)
    tokens = 0
    for sequence in range(len(starts) - 1):
        place, end = starts[sequence], starts[sequence + 1]
        while place < end:
            number, read = 0, 0
            while read < k and place + read < end and 0 <= codes[place + read] < _N:
                number = number * _N + codes[place + read]
                read += 1
            if read == k:
                ids[tokens] = kmer_ids[number]
            elif codes[place] >= 0:
                ids[tokens], read = letter_ids[codes[place]], 1
            else:  # a run of foreign letters is one token
                read = 1
                while place + read < end and codes[place + read] < 0:
                    read += 1
                ids[tokens] = letter_ids[-1]
            widths[tokens] = read
            place += read
            tokens += 1
        offsets[sequence + 1] = tokens
    return ids[:tokens].copy(), widths[:tokens].copy(), offsets
