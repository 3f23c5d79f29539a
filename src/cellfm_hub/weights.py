"""Put published tensors into a network, with nothing left over and nothing missing."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, isnan, prod
from typing import TypeVar

import torch
from torch import Tensor, nn

from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.nn.meta import meta_device
from cellfm_hub.safe_files import MappedTensors

logger = logging.getLogger("cellfm_hub")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Key:
    """What becomes of one tensor of the published file."""

    shape: Shape
    to: str | None
    """Our parameter; ``None``: dropped on purpose."""
    part: tuple[int, int] = (0, 1)
    """It fills block i of n equal blocks of rows (query, key and value stacked in one matrix)."""
    required: bool = True
    """Whether every published file has it."""
    counted: bool = True
    """Whether it counts as a parameter: buffers and second copies of a tied matrix do not."""


Layout = dict[str, Key]
"""Key of the published file -> what becomes of it."""


def dense(source: str, to: str | None, rows: int, columns: int, *, bias: bool = True, part: tuple[int, int] = (0, 1)) -> Layout:
    """Return the keys of a linear layer."""
    layout = {f"{source}.weight": Key((rows, columns), to and f"{to}.weight", part)}
    return layout | ({f"{source}.bias": Key((rows,), to and f"{to}.bias", part)} if bias else {})


def norm(source: str, to: str | None, width: int) -> Layout:
    """Return the keys of a LayerNorm."""
    return {f"{source}.{name}": Key((width,), to and f"{to}.{name}") for name in ("weight", "bias")}


def count_parameters(layout: Layout) -> int:
    """Count the numbers of a published file."""
    return sum(prod(key.shape) for key in layout.values() if key.counted and key.required)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_tensors(tensors: Mapping[str, Tensor], layout: Layout, origin: str) -> None:
    """Raise unless the file holds exactly the keys of `layout`, in their shapes.

    Raises
    ------
    CheckpointFormatError
        Listing missing, unexpected or misshapen keys.
    """
    missing = [name for name, key in layout.items() if key.to is not None and name not in tensors]
    unexpected = [name for name in tensors if name not in layout]
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, expected {key.shape}"
        for name, key in layout.items()
        if key.to is not None and name in tensors and tuple(tensors[name].shape) != key.shape
    ]
    problems = [
        f"{what}: {_few(names)}" for what, names in (("missing", missing), ("not known", unexpected), ("misshapen", misshapen)) if names
    ]
    if problems:
        msg = f"{origin} does not fit the network that its configuration describes; {'; '.join(problems)}. Use the files of one checkpoint"
        raise CheckpointFormatError(msg)


_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def check_numbers(tensor: Tensor, name: str, origin: str) -> None:
    """Raise unless a tensor holds floating-point numbers, all of them finite.

    One pass over the tensor that makes no copy: about a second for 4 GB in memory, and the pages of a mapped file are then in memory, where
    the network needs them.

    Raises
    ------
    CheckpointFormatError
        Naming the tensor and what it holds.
    """
    if tensor.dtype not in _FLOATS:
        msg = f"{name} of {origin} holds {str(tensor.dtype).removeprefix('torch.')} numbers, expected floating-point ones;"
        msg += " if the checkpoint is quantized, use the one it was made from"
        raise CheckpointFormatError(msg)
    if tensor.numel() == 0:
        return
    # NaN is passed on to both.
    least, greatest = (float(value) for value in torch.aminmax(tensor))
    if not isfinite(least) or not isfinite(greatest):
        nan = "NaN" if isnan(least) else "infinite numbers"
        msg = f"{name} of {origin} holds {nan}, expected finite numbers; the file is damaged or its training failed, use the published one"
        raise CheckpointFormatError(msg)


NetworkT = TypeVar("NetworkT", bound=nn.Module)


def load_network(
    make: Callable[[], NetworkT],
    tensors: Mapping[str, Tensor],
    layout: Layout,
    *,
    origin: str,
    device: torch.device,
    dtype: torch.dtype,
) -> NetworkT:
    """Build a network and fill it, tensor by tensor, straight in its final place and dtype.

    On the CPU and in the dtype of the file a tensor is not copied: the network then works on the file that is mapped into memory. What has
    to be copied (another device or dtype, parts of one matrix) leaves memory again soon after.

    Parameters
    ----------
    make
        Builds the network; called on the meta device, so that no memory is used before the tensors come.
    tensors, layout
        The published file, and what becomes of its keys.
    origin
        Name of the checkpoint, for messages.
    device, dtype
        Where and in which precision the network shall run.

    Raises
    ------
    CheckpointFormatError
        If the file does not fit; see :func:`check_tensors` and :func:`check_numbers`.
    """
    check_tensors(tensors, layout, origin)
    with meta_device():
        network = make()
    wanted = network.to(dtype).state_dict()
    in_passing = tensors.in_passing if isinstance(tensors, MappedTensors) else tensors.__getitem__
    state: dict[str, Tensor] = {}
    filled: dict[str, set[tuple[int, int]]] = {name: set() for name in wanted}
    for name, key in layout.items():
        if key.to is None:
            continue
        index, parts = key.part
        target, tensor = wanted[key.to], tensors[name]
        if parts == 1 and tensor.device == device and tensor.dtype == target.dtype and tensor.is_contiguous():
            check_numbers(tensor, name, origin)
            state[key.to] = tensor
        else:
            if key.to not in state:
                state[key.to] = torch.empty(target.shape, dtype=target.dtype, device=device)
            tensor = in_passing(name)
            check_numbers(tensor, name, origin)
            state[key.to].chunk(parts)[index].copy_(tensor)
        filled[key.to].add(key.part)
    # A slip in a family's table must not leave a parameter unset.
    unset = [name for name, done in filled.items() if not done or done != {(i, parts) for _, parts in done for i in range(parts)}]
    if unset:
        msg = f"{origin}: no tensor of the file is mapped to {_few(unset)}"
        raise CheckpointFormatError(msg)
    network.load_state_dict(state, strict=True, assign=True)
    # Buffers that no file holds are the family's to fill.
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))
    dropped = [name for name, key in layout.items() if key.to is None and name in tensors]
    logger.info("%s: %d tensors used, %d dropped on purpose (%s)", origin, len(tensors) - len(dropped), len(dropped), _few(dropped))
    return network.eval().requires_grad_(requires_grad=False)
