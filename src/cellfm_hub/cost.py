"""What a run would cost on this machine: an estimate, made from the card and a short probe before anything is downloaded."""

import json
import time
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.engine.device import choose_batch_tokens
from cellfm_hub.nn import Encoder, EncoderConfig
from cellfm_hub.registry import Entry

MEASURED = Path(__file__).parent / "cost.json"
"""Share of the probe's speed that each network reaches, as ``tests/benchmarks/cost.py`` measured it."""

PROBE_SECONDS = 0.05


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


def estimate(entry: Entry, lengths: NDArray[Any], device: torch.device, dtype: torch.dtype, *, rows: int) -> Cost:
    """Estimate the cost of embedding.

    Parameters
    ----------
    entry
        The model.
    lengths
        Tokens of some rows, which stand for all.
    device, dtype
        Where and in which precision.
    rows
        Number of all rows.
    """
    shape = _shape(entry.name)
    if shape is None or not len(lengths):
        return Cost(None, None, "no network" if shape is None else "no rows with tokens")
    config, weights = shape
    size = torch.empty((), dtype=dtype).element_size()
    together = max(choose_batch_tokens(None, device), int(lengths.max()))
    # Of each token: what enters and leaves a block, query, key and value, and the inner layer before and after its activation.
    memory = int(size * (weights + together * (8 * config.dim + (3 if config.gated else 2) * config.ffn_dim)))
    kind, precision = device.type, str(dtype).removeprefix("torch.")
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    networks = measured["networks"].get(f"{kind} {precision}")
    if not networks:
        return Cost(None, memory, f"memory from the card; speed was not measured on {kind} in {precision}")
    like = entry.name if entry.name in networks else min(networks, key=lambda name: abs(networks[name]["dim"] - config.dim))
    recipe = entry.recipes["default"]
    layers = recipe.output_layer if recipe.output_layer >= 0 else config.layers + 1 + recipe.output_layer
    flops = encoder_flops(config, lengths.astype(np.float64), layers) * rows / len(lengths)
    speed = probe(device, dtype)
    basis = f"{flops / 1e9:,.0f} GFLOP at {networks[like]['efficiency']:.0%} (measured with {like}) of {speed / 1e9:,.0f} GFLOP/s, which a"
    basis += f" matrix product reaches here now ({kind}, {precision}, {torch.get_num_threads()} threads)"
    return Cost(flops / (speed * networks[like]["efficiency"]), memory, basis)


@cache
def _shape(name: str) -> tuple[EncoderConfig, int] | None:
    """Return the encoder of a checkpoint and the number of its weights, from the card alone."""
    from cellfm_hub.registry import registry

    entry = registry().checkpoints[name]
    adapter_class = entry.adapter_class()
    if not issubclass(adapter_class, TokenAdapter) or not entry.checkpoint.config:
        return None
    with torch.device("meta"):
        network = adapter_class.published(dict(entry.checkpoint.config))[0]
    encoder = next((module for module in network.modules() if isinstance(module, Encoder)), None)
    weights = sum(prod(tensor.shape) for tensor in (*network.parameters(), *network.buffers()))
    return None if encoder is None else (encoder.config, weights)


@cache
def probe(device: torch.device, dtype: torch.dtype) -> float:
    """Measure how many operations per second a matrix product reaches, in about 50 ms."""
    a, b = (torch.ones(shape, device=device, dtype=dtype) for shape in ((1024, 768), (768, 1024)))
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
    with torch.inference_mode():
        for _ in range(2):
            torch.mm(a, b)
        while time.perf_counter() < end or best == float("inf"):
            wait()
            begin = time.perf_counter()
            torch.mm(a, b)
            wait()
            best = min(best, time.perf_counter() - begin)
    return 2 * 1024 * 768 * 1024 / best
