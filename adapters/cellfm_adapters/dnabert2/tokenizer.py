"""The byte-pair tokenizer of DNABERT-2.

A sequence is split at punctuation (a gap ``-`` or ``.``). Each stretch starts as single letters; neighbouring pieces are joined, always
the pair that stands earliest in the list of merges of ``tokenizer.json``, until no pair of the list is left. A letter other than A, C, G
and T, and each gap, is one ``[UNK]`` of its own; letters are never joined across it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.safe_files import read_json_object
from cellfm_hub.tokens import Tokens, offsets_from_lengths


class Tokenizer:
    """Turns DNA into pieces of 1 to 32 bases.

    Parameters
    ----------
    path
        The published ``tokenizer.json``.

    Raises
    ------
    CheckpointFormatError
        If the file does not hold a byte-pair tokenizer of that kind.
    """

    def __init__(self, path: Path) -> None:
        content = read_json_object(path)
        try:
            self._bpe = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises nothing more exact
            msg = f"{path} cannot be read as a tokenizer ({error}); use the file of the published checkpoint"
            raise CheckpointFormatError(msg) from error
        # The file of DNABERT-S would pad every sequence to 2000 tokens.
        self._bpe.no_padding()
        self._bpe.no_truncation()

        model = content["model"]
        # What makes each [UNK] one letter, and each other piece as many letters as its name has.
        plain = content.get("normalizer") is None and not any(
            model.get(switch)
            for switch in ("fuse_unk", "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        )
        ids = self._bpe.get_vocab(with_added_tokens=True)
        specials = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
        missing = [token for token in (*specials, *"ACGT") if token not in ids]
        if model.get("type") != "BPE" or not plain or missing or sorted(ids.values()) != list(range(len(ids))):
            msg = f"{path} does not hold the byte-pair tokenizer of DNABERT-2 ("
            msg += f"it lacks {', '.join(missing)}" if missing else f"type {model.get('type')}, other settings or ids with holes"
            raise CheckpointFormatError(msg + "); use the file of the published checkpoint")
        self.vocabulary: NDArray[np.str_] = np.array(sorted(ids, key=ids.__getitem__))
        self.unk_id, self.cls_id, self.sep_id, self.pad_id, self.mask_id = (ids[token] for token in specials)
        self._widths = np.char.str_len(self.vocabulary).astype(np.int32)
        self._widths[self.unk_id] = 1

    def tokenize(self, sequences: Sequence[str]) -> Tokens:
        """Split sequences into tokens, without special ones."""
        encoded = self._bpe.encode_batch_fast(list(sequences), add_special_tokens=False)
        rows = [np.array(row.ids, dtype=np.int32) for row in encoded]
        ids = np.concatenate([np.empty(0, np.int32), *rows])
        return Tokens(ids=ids, offsets=offsets_from_lengths([len(row) for row in rows]), widths=self._widths[ids])
