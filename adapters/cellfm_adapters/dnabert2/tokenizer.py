"""The byte-pair tokenizer of DNABERT-2.

A sequence is split at punctuation (a gap ``-`` or ``.``). Each stretch starts as single letters; neighbouring pieces are joined, always
the pair that stands earliest in the list of merges of ``tokenizer.json``, until no pair of the list is left. A letter other than A, C, G
and T, and each gap, is one ``[UNK]`` of its own; letters are never joined across it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        if problem := _foreign(content):
            msg = f"{path} does not hold the byte-pair tokenizer of DNABERT-2 ({problem}); use the file of the published checkpoint"
            raise CheckpointFormatError(msg)
        try:
            # Without what is not used here; the file of DNABERT-S would pad every sequence to 2000 tokens.
            unused = dict.fromkeys(("padding", "truncation", "post_processor", "decoder"))
            self._bpe = tokenizers.Tokenizer.from_str(json.dumps(content | unused))
        except Exception as error:  # the library raises nothing more exact
            msg = f"{path} cannot be read as a tokenizer ({error}); use the file of the published checkpoint"
            raise CheckpointFormatError(msg) from error
        ids = self._bpe.get_vocab(with_added_tokens=True)
        specials = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
        missing = [token for token in (*specials, *"ACGT") if token not in ids]
        if missing or sorted(ids.values()) != list(range(len(ids))):
            msg = f"{path} does not hold the byte-pair tokenizer of DNABERT-2 ("
            msg += f"it lacks {', '.join(missing)}" if missing else "ids with holes"
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


def _foreign(content: dict[str, Any]) -> str | None:
    """Say what in a tokenizer file is not of DNABERT-2, before the library compiles patterns that may take any time."""
    if content.get("normalizer") is not None or content.get("pre_tokenizer") != {"type": "Whitespace"}:
        return "other settings: a normalizer, or not split at punctuation"
    model = content.get("model")
    if not isinstance(model, dict):
        return None  # the library says what is wrong
    # What makes each [UNK] one letter, and each other piece as many letters as its name has.
    switches = ("fuse_unk", "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model.get("type") != "BPE" or (on := [switch for switch in switches if model.get(switch)]):
        return f"type {model.get('type')}" if model.get("type") != "BPE" else f"other settings: {', '.join(on)}"
    return None
