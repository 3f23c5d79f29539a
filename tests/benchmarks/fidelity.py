"""How far half precision is from float32, for every distinct published network shape.

No weights are needed: networks get random ones (seeded), in the published sizes, and run through the engine and the adapter's own pooling
in the default recipe. Two figures per shape and precision, over rows:

- ``cosine_min``: smallest cosine between the half-precision and the float32 vector of a row;
- centred error ``|x16 - x32| / |x32 - mean of x32|``: the error beside what tells rows apart. Random networks give all rows nearly the same
  vector (``spread_median``, ``|x32 - mean| / |x32|``, says how nearly), so this is pessimistic.

Run from the top of a checkout: ``python tests/benchmarks/fidelity.py --minutes 25``. Smallest network first; results are written as they
come.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.engine.run import run_network
from cellfm_hub.registry import Entry, registry
from cellfm_hub.tokens import Tokens, offsets_from_lengths
from cellfm_hub.weights import count_parameters

RESULTS = Path(__file__).parent / "results" / "fidelity-cpu.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Rows:
    """Made-up input, and what the adapter would have read from the published dictionaries."""

    tokens: Tokens
    poolings: tuple[str, ...]
    special_ids: tuple[int, ...]


def draw_lengths(rng: np.random.Generator, rows: int, longest: int) -> NDArray[np.int64]:
    """Draw lengths between a sixteenth of the longest and the longest, log-uniform."""
    return np.exp(rng.uniform(np.log(longest / 16), np.log(longest), rows)).astype(np.int64)


def geneformer_rows(config: dict[str, Any], rng: np.random.Generator, rows: int, longest: int) -> Rows:
    """Cells of four types: genes ranked by a level common to all cells, one of the type and one of the cell."""
    framed = config["vocab_size"] == 20_275  # gc104M: <pad> <mask> <cls> <eos>, then genes; gc30M: <pad> <mask>
    special = 4 if framed else 2
    genes = config["vocab_size"] - special
    common, of_type = rng.normal(0, 2, genes), rng.normal(0, 1, (4, genes))
    cells = []
    for row, length in enumerate(draw_lengths(rng, rows, longest - special + 2)):
        level = common + of_type[row % 4] + rng.normal(0, 1, genes)
        ranked = (special + np.argsort(-level)[:length]).tolist()
        cells.append([2, *ranked, 3] if framed else ranked)
    return Rows(Tokens.from_lists(cells), ("cls", "mean", "max") if framed else ("mean", "max"), tuple(range(special)))


def nucleotide_transformer_rows(config: dict[str, Any], rng: np.random.Generator, rows: int, longest: int) -> Rows:
    """DNA of differing GC content: <cls>, then k-mers, which stand in the order A T C G from id 4 on."""
    k = 3 if config["vocab_size"] == 75 else 6
    sequences = []
    for length in draw_lengths(rng, rows, longest - 1):
        gc = rng.uniform(0.3, 0.7)
        bases = rng.choice(4, size=(length, k), p=[(1 - gc) / 2, (1 - gc) / 2, gc / 2, gc / 2])
        sequences.append([3, *(4 + bases @ 4 ** np.arange(k - 1, -1, -1))])
    return Rows(Tokens.from_lists(sequences), ("mean", "cls", "max"), (3, 2))


def scgpt_rows(config: dict[str, Any], rng: np.random.Generator, rows: int, longest: int) -> Rows:
    """Cells of four types: genes in the order of the vocabulary with bins 1 to 50, behind <cls> with value -2."""
    genes, cls = config["ntoken"] - 3, config["ntoken"] - 2  # the published vocabulary ends with <pad> <cls> <eoc>
    common, of_type = rng.normal(0, 2, genes), rng.normal(0, 1, (4, genes))
    lengths = draw_lengths(rng, rows, longest - 1)
    ids, values = [], []
    for row, length in enumerate(lengths):
        level = common + of_type[row % 4] + rng.normal(0, 1, genes)
        expressed = np.sort(np.argsort(-level)[:length])
        bins = 1 + np.argsort(np.argsort(level[expressed])) * 50 // length
        ids += [[cls], expressed]
        values += [[-2], bins]
    tokens = Tokens(ids=np.concatenate(ids), offsets=offsets_from_lengths(lengths + 1), values=np.concatenate(values))
    return Rows(tokens, ("cls", "mean"), (cls,))


def dnabert_rows(config: dict[str, Any], rng: np.random.Generator, rows: int, longest: int) -> Rows:
    """DNA of differing composition: [CLS] (1), pieces drawn from the vocabulary, [SEP] (2)."""
    pieces = config["vocab_size"] - 5
    level = rng.normal(0, 2, pieces) + rng.normal(0, 1, (4, pieces))
    chance = np.exp(level) / np.exp(level).sum(axis=1, keepdims=True)
    lengths = draw_lengths(rng, rows, longest - 2)
    sequences = [[1, *(5 + rng.choice(pieces, length, p=chance[row % 4])), 2] for row, length in enumerate(lengths)]
    return Rows(Tokens.from_lists(sequences), ("mean", "cls", "max"), (1, 2))


def uce_rows(config: dict[str, Any], rng: np.random.Generator, rows: int, longest: int) -> Rows:
    """Sentences of four types of cell: <cls> (id 3), then genes drawn from the token table."""
    level = rng.normal(0, 2, config["rows"] - 4) + rng.normal(0, 1, (4, config["rows"] - 4))
    lengths = draw_lengths(rng, rows, longest - 1)
    chance = np.exp(level) / np.exp(level).sum(axis=1, keepdims=True)
    sentences = [[3, *(4 + rng.choice(config["rows"] - 4, length, p=chance[row % 4]))] for row, length in enumerate(lengths)]
    return Rows(Tokens.from_lists(sentences), ("cls", "mean", "max"), ())


def scfoundation_rows(config: dict[str, Any], rng: np.random.Generator, rows: int, longest: int) -> Rows:
    """Cells of four types: genes in the order of the list with log-normalised counts, then target depth (10^4) and source depth."""
    genes = config["seq_len"] - 2
    common, of_type = rng.normal(0, 2, genes), rng.normal(0, 1, (4, genes))
    lengths = draw_lengths(rng, rows, longest - 2)
    ids, values = [], []
    for row, length in enumerate(lengths):
        level = common + of_type[row % 4] + rng.normal(0, 1, genes)
        expressed = np.sort(np.argsort(-level)[:length])
        counts = rng.geometric(0.5, length)
        ids += [expressed, [genes, genes + 1]]
        values += [np.log1p(counts * 1e4 / counts.sum()), [4, np.log10(counts.sum())]]
    tokens = Tokens(ids=np.concatenate(ids), offsets=offsets_from_lengths(lengths + 2), values=np.concatenate(values))
    return Rows(tokens, ("all", "max"), (genes, genes + 1))


ROWS: dict[str, Callable[[dict[str, Any], np.random.Generator, int, int], Rows]] = {
    "dnabert-s": dnabert_rows,
    "dnabert2": dnabert_rows,
    "geneformer": geneformer_rows,
    "nucleotide-transformer": nucleotide_transformer_rows,
    "scfoundation": scfoundation_rows,
    "scgpt": scgpt_rows,
    "uce": uce_rows,
}
"""Family -> its made-up input."""


def fill(network: nn.Module, seed: int) -> None:
    """Fill a network with random float32 weights, made on the device it is on."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.normal_(0, 0.02, generator=generator)
            if tensor.dim() == 1 and name.endswith("weight"):  # gain of a LayerNorm
                tensor.mul_(5).add_(1)
        # What an adapter computes ahead of time: UCE's projected proteins, LayerNorm's output times the root of the width.
        for name, buffer in network.named_buffers():
            if name not in network.state_dict():
                buffer.normal_(0, buffer.shape[-1] ** 0.5, generator=generator)


def embed(entry: Entry, network: nn.Module, rows: Rows) -> NDArray[np.float32]:
    """Run the default recipe."""
    adapter_class = entry.adapter_class()
    assert issubclass(adapter_class, TokenAdapter)
    adapter = adapter_class()
    adapter.special_ids, adapter.poolings = rows.special_ids, rows.poolings
    recipe, layers, dim = entry.recipes["default"], entry.checkpoint.layers, entry.checkpoint.embedding_dim
    assert layers is not None
    assert dim is not None
    layer = recipe.output_layer if recipe.output_layer >= 0 else layers + 1 + recipe.output_layer
    pooling = recipe.pooling or adapter.poolings[0]
    return run_network(
        lambda batch: adapter.pool(network(batch, layer), batch, pooling),
        rows.tokens,
        dim=dim,
        per_token=False,
        device=torch.device("cpu"),
        batch_tokens=4096,
    )


def compare(half: NDArray[np.float32], full: NDArray[np.float32]) -> dict[str, float]:
    """Return the figures of one precision."""
    x, y = half.astype(np.float64), full.astype(np.float64)
    cosine = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    error = np.linalg.norm(x - y, axis=1) / np.linalg.norm(y - y.mean(0), axis=1)
    return {
        "cosine_min": float(cosine.min()),
        "centred_error_median": float(np.median(error)),
        "centred_error_p99": float(np.quantile(error, 0.99)),
    }


def measure(name: str, precisions: list[str], *, rows: int, longest: int, seed: int = 0) -> dict[str, Any]:
    """Measure the shape of one checkpoint."""
    entry = registry().find(name)
    adapter_class, config = entry.adapter_class(), entry.checkpoint.config
    assert issubclass(adapter_class, TokenAdapter)
    made = ROWS[entry.family](config, np.random.default_rng(seed), rows, min(longest, entry.checkpoint.max_tokens or longest))
    with torch.device("meta"):
        network = adapter_class.published(config)[0]
    network.to_empty(device="cpu").eval()
    fill(network, seed)
    full = embed(entry, network, made)
    assert np.isfinite(full).all()
    figures: dict[str, Any] = {}
    for i, precision in enumerate(precisions):
        if i:
            network.float()
            fill(network, seed)
        started = time.perf_counter()
        half = embed(entry, network.to(DTYPES[precision]), made)
        figures[precision] = compare(half, full) | {"seconds": round(time.perf_counter() - started, 1)}
    spread = np.linalg.norm(full - full.mean(0), axis=1) / np.linalg.norm(full, axis=1)
    return {
        "rows": rows,
        "tokens": len(made.tokens.ids),
        "longest": int(made.tokens.lengths.max()),
        "spread_median": float(np.median(spread)),
        **figures,
    }


def shapes() -> dict[str, list[str]]:
    """Return one checkpoint of each distinct shape, smallest network first, and all checkpoints that have it."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name, entry in registry().checkpoints.items():
        if entry.family in ROWS and entry.checkpoint.config:
            adapter_class = entry.adapter_class()
            assert issubclass(adapter_class, TokenAdapter)
            with torch.device("meta"):
                size = sum(prod(p.shape) for p in adapter_class.published(entry.checkpoint.config)[0].parameters())
            shape = (entry.adapter_path, json.dumps(entry.checkpoint.config, sort_keys=True))
            found.setdefault(shape, []).append((size, name))
    return {members[0][1]: [name for _, name in members] for members in sorted(found.values())}


def workload(parameters: int) -> tuple[int, int]:
    """Rows and longest row that a shape of this size is given: larger ones get fewer and shorter rows."""
    if parameters < 200e6:
        return 32, 1024
    if parameters < 600e6:
        return 24, 512
    return 8, 192


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def free_memory() -> float:
    """Return the bytes that can be used without pushing others out; unknown counts as endless."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def main() -> None:
    """Measure everything that fits into the time given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="start no further shape after this time")
    parser.add_argument("--float16-below", type=float, default=60e6, help="float16 too, for networks with fewer parameters")
    parser.add_argument("--family", choices=sorted(ROWS), action="append", help="only this family; earlier results of others are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": processor(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "weights": "random, seed 0: normal with standard deviation 0.02, gains of LayerNorm 1 + 0.1 normal",
        "shapes": json.loads(arguments.out.read_text())["shapes"] if arguments.family and arguments.out.exists() else {},
    }
    for name, members in shapes().items():
        entry = registry().find(name)
        if arguments.family and entry.family not in arguments.family:
            continue
        adapter_class = entry.adapter_class()
        assert issubclass(adapter_class, TokenAdapter)
        parameters = count_parameters(adapter_class.published(entry.checkpoint.config)[1])
        if time.monotonic() > deadline or 5 * parameters > free_memory():
            print(f"{name}: left out, no {'time' if time.monotonic() > deadline else 'memory'}", flush=True)  # noqa: T201, a script for people
            continue
        rows, longest = workload(parameters)
        precisions = ["bfloat16", *(["float16"] if parameters < arguments.float16_below else [])]
        started = time.monotonic()
        report["shapes"][name] = {"also": members[1:], "parameters": parameters, **measure(name, precisions, rows=rows, longest=longest)}
        print(name, f"{time.monotonic() - started:.0f} s", json.dumps(report["shapes"][name]), flush=True)  # noqa: T201
        partial = arguments.out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(partial, arguments.out)  # noqa: PTH105, atomic


if __name__ == "__main__":
    main()
