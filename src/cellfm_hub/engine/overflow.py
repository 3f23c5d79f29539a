"""Notice values that a number format cannot hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FiniteStates:
    """Whether all that came out of a network was finite, as far as it was looked at.

    What pooling makes of it says nothing: that may be NaN by definition.
    """

    def __init__(self) -> None:
        self._of_batches: list[Tensor] = []

    def __call__(self, _network: nn.Module, _given: tuple[Any, ...], hidden: Tensor) -> None:
        """Look at the states of a batch, on their device."""
        self._of_batches.append(hidden.isfinite().all())

    def __bool__(self) -> bool:
        """Ask, when all batches are done: it waits for the device."""
        return not self._of_batches or bool(torch.stack(self._of_batches).all())


@contextmanager
def watched(network: nn.Module) -> Iterator[FiniteStates]:
    """Look at what comes out of a network."""
    states = FiniteStates()
    hook = network.register_forward_hook(states)
    try:
        yield states
    finally:
        hook.remove()
