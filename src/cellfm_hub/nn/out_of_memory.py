"""Recognise that there is no memory left, whoever says it."""

import torch

_SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "ALLOC_FAILED",  # CUBLAS_STATUS_…, CUDNN_STATUS_…: a card that is full when a library of CUDA is used for the first time
    "ALLOCATION_FAILED",  # newer versions of cuDNN
)
"""What a CPU allocator, libraries of CUDA and other devices write into a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
