"""From one vector per token to one per row, in float32."""

import torch
from torch import Tensor

from cellfm_hub.errors import InputError
from cellfm_hub.nn.packed import PackedBatch


def _reduce(x: Tensor, batch: PackedBatch, reduction: str) -> Tensor:
    # segment_reduce has no MPS kernel.
    at = torch.device("cpu") if x.device.type == "mps" else x.device
    # "unsafe" leaves out a check of the lengths that would wait for the device.
    reduced: Tensor = torch.segment_reduce(x.float().to(at), reduction, lengths=batch.segment_lengths.to(at), axis=0, unsafe=True)
    return reduced.to(x.device)


def first(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the vector of each row's first token, ``(T, D) -> (B, D)``."""
    return hidden[batch.starts].float()


def segment_mean(hidden: Tensor, batch: PackedBatch, counted: Tensor) -> Tensor:
    """Average the counted tokens of each row, ``(T, D), (T,) bool -> (B, D)``; NaN for a row that counts none."""
    total = _reduce(hidden.float() * counted[:, None], batch, "sum")  # (B, D)
    return total / _reduce(counted.float()[:, None], batch, "sum")


def segment_max(hidden: Tensor, batch: PackedBatch, counted: Tensor) -> Tensor:
    """Take the element-wise maximum over the counted tokens of each row; NaN for a row that counts none."""
    top = _reduce(hidden.float().masked_fill(~counted[:, None], -torch.inf), batch, "max")
    return top.masked_fill(top.isneginf(), torch.nan)


def segment_pool(hidden: Tensor, batch: PackedBatch, counted: Tensor, pooling: str) -> Tensor:
    """Reduce the counted tokens of each row by ``"mean"`` or ``"max"``.

    Raises
    ------
    InputError
        If `pooling` is anything else: a misspelt name must not become another pooling.
    """
    reductions = {"mean": segment_mean, "max": segment_max}
    if pooling not in reductions:
        msg = f"pooling={pooling!r} is not known to this model; expected one that it lists ('cellfm info')"
        raise InputError(msg)
    return reductions[pooling](hidden, batch, counted)
