"""Running out of memory: remember how much was too much."""

import logging

import torch

logger = logging.getLogger("cellfm_hub")

CLEAN_BATCHES = 50
"""After so many batches in a row that fitted, a little more is tried."""
GROWTH = 1.25
CLOSE_TO_FAILURE = 0.9
"""A budget never grows beyond this share of one that failed."""


def release(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device. Nothing may hold on to the tensors of the failed batch any more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class TokenBudget:
    """How many tokens of one model fit together on one device in one precision, learnt from batches that did not."""

    def __init__(self) -> None:
        self._limit: int | None = None
        self._failed = 0
        self._clean = 0

    def allowed(self, wanted: int) -> int:
        """Return `wanted` tokens, or as many as can be hoped to fit."""
        return wanted if self._limit is None else min(wanted, self._limit)

    def failed(self, tokens: int) -> None:
        """Learn that a batch of `tokens` did not fit: from now on at most half."""
        self._failed = tokens if self._limit is None else min(self._failed, tokens)
        self._limit, self._clean = max(1, tokens // 2), 0
        logger.warning("out of memory with %d tokens in a batch; continuing with at most %d", tokens, self._limit)

    def fitted(self) -> None:
        """Learn that a batch fitted."""
        if self._limit is None:
            return
        self._clean += 1
        if self._clean == CLEAN_BATCHES:
            highest = max(self._limit, int(CLOSE_TO_FAILURE * self._failed))
            self._limit, self._clean = min(int(GROWTH * self._limit) + 1, highest), 0
