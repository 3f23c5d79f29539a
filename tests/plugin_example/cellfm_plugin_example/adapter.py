"""Three plain facts about a sequence: share of G and C, CpG observed/expected, length."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from cellfm_hub.adapter import Options, SequenceFeatures
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.sequences import base_codes


class GcContentAdapter(SequenceFeatures):
    """Needs no weights."""

    embedding_dim = 3

    @classmethod
    def load(cls, files: CheckpointFiles, options: Options, device: torch.device, dtype: torch.dtype) -> Self:
        """Return the model; there is nothing to read."""
        return cls()

    def embed(self, sequences: Sequence[str]) -> NDArray[np.float32]:
        """Return ``(n, 3)`` float32; NaN for a sequence without A, C, G and T.

        CpG observed/expected is that of Gardiner-Garden and Frommer (1987): CpG × length / (C × G), here 0 where C or G is absent. The
        length counts A, C, G and T.
        """
        codes, offsets = base_codes(sequences, "ACGT")  # all letters end to end; -1 for N and the like
        row = np.repeat(np.arange(len(sequences)), np.diff(offsets))
        known = codes >= 0
        counts = np.bincount(row[known] * 4 + codes[known], minlength=len(sequences) * 4).reshape(-1, 4)
        _, c, g, _ = counts.T
        length = counts.sum(axis=1)

        is_cpg = (codes[:-1] == 1) & (codes[1:] == 2) & (row[:-1] == row[1:])
        cpg = np.bincount(row[:-1][is_cpg], minlength=len(sequences))
        features: NDArray[np.float32] = np.column_stack([(c + g) / np.maximum(length, 1), cpg * length / np.maximum(c * g, 1), length])
        features = features.astype(np.float32)
        features[length == 0] = np.nan
        return features
