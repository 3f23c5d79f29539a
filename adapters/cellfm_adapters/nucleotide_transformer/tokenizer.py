"""The 6-mer tokenizer.

From left to right: where the next six letters are all A, C, G or T, they are one token; else the letter alone is one, if it is A, C, G,
T or N; else the whole run of foreign letters becomes a single ``<unk>``. Equal to ``EsmTokenizer`` with the published ``vocab.txt``.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.sequences import base_codes, kmer_codes
from cellfm_hub.tokens import Tokens, offsets_from_lengths

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
        # Letters fall into runs of bases, of N, and of foreign letters; a run ends with its sequence.
        kind = np.where(codes < 0, 2, np.where(codes == _N, 1, 0))
        run_begins = np.ones(len(codes) + 1, dtype=bool)
        run_begins[1:-1] = kind[1:] != kind[:-1]
        run_begins[starts] = True
        run_begins = run_begins[:-1]  # the last place belongs to sequences that are empty
        begins = np.flatnonzero(run_begins)
        run = np.cumsum(run_begins) - 1
        run_length = np.diff(begins, append=len(codes))
        in_run = np.arange(len(codes)) - begins[run]

        whole = in_run < (run_length // self.k * self.k)[run]  # inside the part of a run that k-mers cover
        is_kmer = (kind == 0) & whole & (in_run % self.k == 0)
        is_letter = ((kind == 0) & ~whole) | (kind == 1)
        is_unknown = (kind == 2) & (in_run == 0)
        at = np.flatnonzero(is_kmer | is_letter | is_unknown)

        ids = self._letter_ids[codes[at]]
        kmer_at = is_kmer[at]
        ids[kmer_at] = self._kmer_ids[kmer_codes(codes, self.k, 4)[at[kmer_at]]]
        per_sequence = np.searchsorted(at, starts)  # the first token at or behind each sequence's begin
        # A token reaches to the next one, or to the end of the last sequence.
        return Tokens(ids=ids, offsets=offsets_from_lengths(np.diff(per_sequence)), widths=np.diff(at, append=len(codes)))
