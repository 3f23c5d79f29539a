"""Which device, which precision, how large a batch."""

import time
from functools import cache
from typing import Literal

import torch

from cellfm_hub.cards import Fidelity
from cellfm_hub.errors import DeviceError, InputError
from cellfm_hub.nn.matmul_precision import exact_products

Precision = Literal["auto", "float32", "bfloat16", "float16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MIN_SPEED_UP = 2.0
"""bfloat16 is chosen for CPUs by itself only where its matrix products are at least so much faster than those of float32."""
CPU_CENTRED_ERROR = 2e-2
"""bfloat16 is chosen for CPUs by itself only where the card measured a centred error (99th percentile) below this."""


def choose_device(device: str) -> torch.device:
    """Return the device; ``"auto"`` is CUDA, else MPS, else the CPU.

    Raises
    ------
    DeviceError
        If the device is not here.
    """
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        msg = f"device={device!r} is not a device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        raise DeviceError(msg) from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(chosen.type, 0)
    if chosen.type == "cuda" and not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        msg = f"device={device!r} is not available: this torch ({torch.__version__}) is built without CUDA; install one that is built"
        msg += " with it (https://pytorch.org/get-started), or use device='auto' or 'cpu'"
        raise DeviceError(msg)
    if (chosen.index or 0) >= count:
        msg = f"device={device!r} is not available: this machine has {count} {chosen.type} device(s); use device='auto' or 'cpu'"
        raise DeviceError(msg)
    return chosen


def choose_devices(devices: str) -> list[str]:
    """Return the names of one device or several: ``"cuda:0,cuda:1"``, ``"cpu,cpu"``, or ``"all"`` for every CUDA device.

    Raises
    ------
    DeviceError
        If one is not here.
    """
    if devices == "all":
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["auto"]
    names = [name.strip() for name in devices.split(",")]
    for name in names:
        choose_device(name)
    return names


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (Intel AMX); without, bfloat16 is slower than float32."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, torch >= 2.6
    return bool(probe and probe())


@cache
def bfloat16_speed_up() -> float:
    """Measure how much faster this CPU multiplies matrices in bfloat16 than in float32; takes some 20 ms."""
    seconds = {}
    with torch.inference_mode(), exact_products():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(256, 512, dtype=dtype)
            weight = torch.ones(512, 512, dtype=dtype)
            times = []
            for _ in range(4):
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                times.append(time.perf_counter() - start)
            seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def choose_dtype(precision: str, device: torch.device, fidelity: Fidelity | None) -> torch.dtype:
    """Return the dtype to compute in.

    ``"auto"``: float16 on CUDA (the engine falls back to bfloat16 where values overflow); float32 on MPS; on a CPU bfloat16 only with
    AMX, where it is measured to pay and the card's measured `fidelity` is within bounds, else float32.
    """
    if precision != "auto":
        try:
            return _DTYPES[precision]
        except KeyError:
            msg = f"precision={precision!r} is not known; use 'auto', {', '.join(map(repr, _DTYPES))}"
            raise InputError(msg) from None
    if device.type == "cuda":
        return torch.float16
    faithful = fidelity is not None and fidelity.centred_error_p99 is not None and fidelity.centred_error_p99 <= CPU_CENTRED_ERROR
    pays = device.type == "cpu" and faithful and has_amx() and bfloat16_speed_up() >= MIN_SPEED_UP
    return torch.bfloat16 if pays else torch.float32


def choose_batch_tokens(batch_tokens: int | None, device: torch.device) -> int:
    """Return the token budget of a batch: as given, else 4k on a CPU, 8k on MPS and 8k to 64k on CUDA by free memory."""
    if batch_tokens is not None:
        if batch_tokens < 1:
            msg = f"batch_tokens={batch_tokens}; expected a positive number of tokens, or None to choose by device"
            raise InputError(msg)
        return batch_tokens
    if device.type == "cuda":
        free_gib = torch.cuda.mem_get_info(device)[0] / 2**30
        return 65_536 if free_gib > 60 else 32_768 if free_gib > 20 else 8_192
    return 8_192 if device.type == "mps" else 4_096
