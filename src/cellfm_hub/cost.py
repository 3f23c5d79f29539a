"""What a run would cost on this machine: an estimate, made from the card and a short probe before anything is downloaded."""

import json
import time
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.engine.device import choose_batch_tokens
from cellfm_hub.nn import Encoder, EncoderConfig
from cellfm_hub.nn.matmul_precision import exact_products
from cellfm_hub.nn.meta import meta_device
from cellfm_hub.registry import Entry, registry

MEASURED = Path(__file__).parent / "cost.json"
"""Share of the probe's speed that each network reaches, as ``tests/benchmarks/cost.py`` measured it."""

PROBE_SECONDS = 0.05
PROBE_SIZES = {"cuda": (8192, 8192, 8192)}
"""Rows, inner and columns of the product that is timed, by kind of device. On a GPU a small one would time its launch."""
PROBE_SIZES_ELSEWHERE = (1024, 768, 1024)
LIBRARIES = 450_000_000
"""Bytes of Python and its libraries, as measured beside the networks of the table; on the CPU they count."""


@dataclass(frozen=True)
class Cost:
    """What a run would cost; ``None`` is not known.

    Parameters
    ----------
    seconds
        Time in the network.
    memory
        Bytes of the device at the peak, of which the weights take most.
    basis
        What the numbers were made from, one line.
    """

    seconds: float | None
    memory: int | None
    basis: str


def encoder_flops(config: EncoderConfig, lengths: NDArray[np.float64], layers: int) -> float:
    """Count the operations that rows of the given lengths need in so many blocks of an encoder."""
    feed_forward = (3 if config.gated else 2) * config.dim * config.ffn_dim
    per_token = 2 * (4 * config.dim**2 + feed_forward)
    return float(layers * (per_token * lengths.sum() + 4 * config.dim * (lengths**2).sum()))


def estimate(
    entry: Entry, network: nn.Module | None, lengths: NDArray[np.float64], device: torch.device, dtype: torch.dtype, *, stand_for: float
) -> Cost:
    """Estimate the cost of embedding.

    Parameters
    ----------
    entry
        The model.
    network
        Its network, on the meta device will do; ``None``: as the card describes it.
    lengths
        Tokens of some rows.
    device, dtype
        Where and in which precision.
    stand_for
        Of how many rows each of them stands for.
    """
    network = network or _network(entry.name)
    encoder = None if network is None else next((module for module in network.modules() if isinstance(module, Encoder)), None)
    if network is None or encoder is None:
        return Cost(None, None, "it has no network")
    config = encoder.config
    if not len(lengths):
        return Cost(None, None, "the number of tokens is not known")
    size = torch.empty((), dtype=dtype).element_size()
    weights = sum(prod(tensor.shape) for tensor in (*network.parameters(), *network.buffers()))
    together = max(choose_batch_tokens(None, device), int(lengths.max()))
    # Of each token: what enters and leaves a block, query, key and value, and the inner layer before and after its activation.
    memory = int(size * (weights + together * (8 * config.dim + (3 if config.gated else 2) * config.ffn_dim)))
    memory += LIBRARIES if device.type == "cpu" else 0
    precision = str(dtype).removeprefix("torch.")
    networks = json.loads(MEASURED.read_text(encoding="utf-8"))["networks"].get(f"{device.type} {precision}")
    if not networks:
        return Cost(None, memory, f"speed was not measured on {device.type} in {precision}")
    like = entry.name if entry.name in networks else min(networks, key=lambda name: abs(networks[name]["dim"] - config.dim))
    recipe = entry.recipes["default"]
    layers = recipe.output_layer if recipe.output_layer >= 0 else config.layers + 1 + recipe.output_layer
    flops = encoder_flops(config, lengths, layers) * stand_for
    speed, efficiency = probe(device, dtype), networks[like]["efficiency"]
    basis = (
        f"{flops / 1e9:,.0f} GFLOP at {efficiency:.0%} (as measured with {like}) of the {speed / 1e9:,.0f} GFLOP/s that a matrix product"
    )
    basis += f" reaches here now ({device.type}, {precision}, {torch.get_num_threads()} threads)"
    return Cost(flops / (speed * efficiency), memory, basis)


@cache
def _network(name: str) -> nn.Module | None:
    """Build the network of a checkpoint on the meta device, from the card alone."""
    entry = registry().checkpoints[name]
    adapter_class = entry.adapter_class()
    if not issubclass(adapter_class, TokenAdapter) or not entry.checkpoint.config:
        return None
    with meta_device():
        return adapter_class.published(dict(entry.checkpoint.config))[0]


@cache
def probe(device: torch.device, dtype: torch.dtype) -> float:
    """Measure how many operations per second a matrix product reaches, in about 50 ms."""
    rows, inner, columns = PROBE_SIZES.get(device.type, PROBE_SIZES_ELSEWHERE)
    a, b = (torch.ones(shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, columns)))
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
    with torch.inference_mode(), exact_products():
        for _ in range(2):
            torch.mm(a, b)
        while time.perf_counter() < end or best == float("inf"):
            wait()
            begin = time.perf_counter()
            torch.mm(a, b)
            wait()
            best = min(best, time.perf_counter() - begin)
    return 2 * rows * inner * columns / best
