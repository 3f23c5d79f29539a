"""How fast the hub is on a GPU, and what the GPU could do. Random weights in published shapes; no checkpoint, no data, no anndata needed.

Sections: ``ceilings`` (matrix products, copies, every attention kernel), ``encoders`` (the hub against padded networks and the procedures
of the releases), ``fidelity`` (half precision and every attention backend against float32), ``pipeline`` (from counts to vectors; running
out of memory). For machines that are lent by the minute::

    python tests/benchmarks/gpu.py ceilings --deadline 540
    python tests/benchmarks/gpu.py encoders --models scgpt-human,geneformer-v1-10m --deadline 540 --json encoders-1.json
    python tests/benchmarks/gpu.py fidelity pipeline --deadline 540

At the deadline it stops by itself and writes what it has. ``--device cpu --smoke`` shows that everything runs, and measures nothing.
"""

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import (
    RESULTS,
    HuggingFace,
    Model,
    Padded,
    TorchLayers,
    environment,
    gemm_flops,
    made_up_cells,
    make_model,
    parser,
    random_tokens,
    rank_tokenizer,
    useful_flops,
    vocabulary_of,
    write_report,
)
from benchmarks.fidelity import compare, draw_lengths
from cellfm_hub.engine.memory import TokenBudget
from cellfm_hub.engine.overlap import prefetch
from cellfm_hub.engine.run import run_network
from cellfm_hub.nn import Alibi, PackedBatch
from cellfm_hub.nn.attention import BY_BUCKET, BY_ROW, EFFICIENT, FLASH, FLEX, VARLEN, choose, refusal
from cellfm_hub.nn.kernels import plain
from cellfm_hub.tokens import Tokens

SECTIONS = ("ceilings", "encoders", "fidelity", "pipeline")
MODELS = (
    "scgpt-human,geneformer-v1-10m,geneformer-v2-104m,geneformer-v2-316m,uce-4l,uce-33l,scfoundation-01b,dnabert2-117m,"
    "nt-v2-500m-multi-species,nt-2.5b-multi-species"
)
SMOKE_MODELS = "scgpt-human,geneformer-v1-10m,nt-v2-50m-multi-species"
BACKENDS = (VARLEN, FLASH, EFFICIENT, FLEX, BY_BUCKET, BY_ROW)
BUDGETS = (8_192, 16_384, 32_768, 65_536, 131_072)
ROUNDS = 3


class Bench:
    """One run: where, how thoroughly, until when."""

    def __init__(self, device: torch.device, *, smoke: bool, deadline: float) -> None:
        self.device, self.smoke, self.end = device, smoke, time.monotonic() + deadline
        self.cuda = device.type == "cuda"

    @property
    def late(self) -> bool:
        """Whether nothing more should be begun."""
        return time.monotonic() > self.end

    def seconds(self, call: Callable[[], object]) -> float:
        """Measure until the device has finished."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def median(self, call: Callable[[], object], rounds: int = 5) -> float:
        """Measure a short call a few times."""
        call()
        return float(np.median([self.seconds(call) for _ in range(rounds)]))

    def refused(self, call: Callable[[], object]) -> str | None:
        """Run once; return the first line of what went wrong."""
        try:
            self.seconds(call)
        except Exception as error:  # noqa: BLE001, kernels fail in every way there is
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        return None


# What the device can do


def ceilings(bench: Bench, _names: list[str]) -> dict[str, Any]:
    """Measure matrix products, copies and attention kernels."""
    size = 256 if bench.smoke else 8192
    out: dict[str, Any] = {"GEMM Tflop/s": {}, "GEMM of a block, Tflop/s": {}, "attention": {}}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        out["GEMM Tflop/s"][name] = gemm_flops(bench.device, dtype, size, bench.seconds) / 1e12
    torch.set_float32_matmul_precision("high")
    out["GEMM Tflop/s"]["tf32"] = gemm_flops(bench.device, torch.float32, size, bench.seconds) / 1e12
    torch.set_float32_matmul_precision("highest")
    for dim, inner in ((256, 512), (512, 512), (768, 3072), (1152, 4608), (1280, 5120)):
        for tokens in (64,) if bench.smoke else (16_384, 32_768, 65_536):
            x = torch.randn(tokens, dim, device=bench.device, dtype=torch.bfloat16)
            w = torch.randn(inner, dim, device=bench.device, dtype=torch.bfloat16)
            seconds = bench.median(lambda x=x, w=w: F.linear(x, w))  # type: ignore[misc]
            out["GEMM of a block, Tflop/s"][f"{tokens} x {dim} x {inner}"] = 2 * tokens * dim * inner / seconds / 1e12
    block = torch.empty(2**20 if bench.smoke else 2**30, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(block)
    out["copy, GB/s read and written"] = 2 * len(block) / bench.median(lambda: target.copy_(block)) / 1e9
    for head_dim in (64, 128):
        for label, lengths in attention_lengths(bench).items():
            if bench.late:
                return out
            out["attention"][f"{label}, heads {head_dim} wide"] = attention_speed(bench, lengths, head_dim)
    out["SDPA, milliseconds of first calls at new shapes"] = first_calls(bench)
    return out


def attention_lengths(bench: Bench) -> dict[str, tuple[int, ...]]:
    """Return batches of about 32k tokens."""
    if bench.smoke:
        return {"mixed": (40, 17, 3)}
    mixed = tuple(sorted(np.random.default_rng(0).integers(200, 4096, 15).tolist(), reverse=True))
    return {f"L {n}": (n,) * (32_768 // n) for n in (512, 1024, 2048, 4096)} | {"mixed": mixed}


def attention_speed(bench: Bench, lengths: tuple[int, ...], head_dim: int) -> dict[str, Any]:
    """Measure every backend, half precision, with ALiBi and without, in Tflop/s; or say why it does not run."""
    heads, total, device = 12, sum(lengths), bench.device
    dtype = torch.bfloat16
    query, key, value = torch.randn(3, total, heads, head_dim, device=device).to(dtype)
    batch = PackedBatch(ids=torch.zeros(total, dtype=torch.int64, device=device), lengths=lengths)
    alibi = Alibi(heads, batch.longest, dtype, device)
    flops = 4.0 * sum(n * n for n in lengths) * heads * head_dim
    calls: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:
        calls[backend.name] = lambda kernel=backend.kernel: kernel(query, key, value, batch, None)  # type: ignore[misc]
    for backend in (FLEX, BY_ROW):
        calls[f"{backend.name}, ALiBi"] = lambda kernel=backend.kernel: kernel(query, key, value, batch, alibi)  # type: ignore[misc]
    if len(set(lengths)) == 1:
        q, k, v = (x.view(len(lengths), lengths[0], heads, head_dim).transpose(1, 2) for x in (query, key, value))
        for name, sdp in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

            def dense(sdp: SDPBackend = sdp) -> object:
                with sdpa_kernel(sdp):
                    return F.scaled_dot_product_attention(q, k, v)

            calls[f"dense SDPA, {name}"] = dense
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, call in calls.items():
            found[name] = bench.refused(call) or flops / bench.median(call) / 1e12
    return found


def first_calls(bench: Bench) -> dict[str, float]:
    """Measure plain SDPA at shapes it has not seen, and again at the same: what planning costs."""
    shapes = [(2, n) for n in ((33, 34) if bench.smoke else (1111, 1222, 1333, 1444, 1555))]
    new, known = [], []
    with torch.inference_mode():
        for rows, length in shapes:
            x = torch.randn(rows, 12, length, 64, device=bench.device, dtype=torch.bfloat16)
            new.append(bench.seconds(lambda x=x: F.scaled_dot_product_attention(x, x, x)))  # type: ignore[misc]
            known.append(bench.seconds(lambda x=x: F.scaled_dot_product_attention(x, x, x)))  # type: ignore[misc]
    return {"new": 1e3 * float(np.median(new)), "known": 1e3 * float(np.median(known))}


# The hub and others


def encoders(bench: Bench, names: list[str]) -> dict[str, Any]:
    """Compare the hub with padded networks, model by model."""
    peak = gemm_flops(bench.device, torch.bfloat16, 256 if bench.smoke else 8192, bench.seconds)
    out: dict[str, Any] = {"GEMM peak, Tflop/s": peak / 1e12}
    for name in names:
        if bench.late:
            break
        out[name] = encoder(bench, name, peak)
        print(f"{name:<28}", {k: v["tokens/s"] for k, v in out[name]["variants"].items()}, flush=True)  # noqa: T201
    return out


def load(bench: Bench, name: str, dtype: torch.dtype) -> Model:
    """Make a model on the device."""
    model = make_model(name, cut_layers=2 if bench.smoke else None)
    model.adapter.network.to(bench.device, dtype)
    return model


def workload(bench: Bench, model: Model, peak: float) -> Tokens:
    """Draw rows that keep the device busy for about a second, between a sixteenth of the longest and the longest."""
    longest = 64 if bench.smoke else model.longest
    rng = np.random.default_rng(0)
    per_row = useful_flops(model.config, draw_lengths(rng, 256, longest), model.layer) / 256
    rows = 4 if bench.smoke else int(np.clip(0.3 * peak / per_row, 128, 4096))
    return random_tokens(model, np.maximum(draw_lengths(rng, rows, longest), 4))


def encoder(bench: Bench, name: str, peak: float) -> dict[str, Any]:
    """Measure all variants of one model, in turn, and report medians."""
    model = load(bench, name, torch.float16)
    tokens = workload(bench, model, peak)
    few = tokens.take(np.arange(max(len(tokens) // 8, 2)))  # for what is slow
    other = load(bench, name, torch.bfloat16)
    vocabulary, longest = vocabulary_of(model), int(tokens.lengths.max()) + 2
    config, half = replace(model.config, layers=model.adapter.layers), torch.float16
    budgets = BUDGETS[:1] if bench.smoke else BUDGETS

    def padded(network: torch.nn.Module, dtype: torch.dtype, rows: int, *, by_length: bool, autocast: torch.dtype | None = None) -> Any:
        runner = Padded(network.to(bench.device, dtype), rows, by_length=by_length, autocast=autocast)
        return lambda given: runner.run(given, bench.device)

    hugging_face = HuggingFace(config, vocabulary, longest, attention="sdpa").to(bench.device, half)
    variants: dict[str, tuple[Callable[[Tokens], object], Tokens]] = {
        f"hub float16, {budget:,} tokens a batch": (lambda given, b=budget: model.run(given, bench.device, b), tokens)  # type: ignore[misc]
        for budget in budgets
    }
    variants["hub bfloat16"] = (lambda given: other.run(given, bench.device, 65_536), tokens)
    variants["HF SDPA float16, longest first"] = (padded(hugging_face, half, 32, by_length=True), tokens)
    variants["HF SDPA float16, file order"] = (padded(hugging_face, half, 32, by_length=False), tokens)
    if model.family == "geneformer":
        network: torch.nn.Module = HuggingFace(config, vocabulary, longest, attention="sdpa", head=True)
        variants["upstream: float32, LM head"] = (padded(network, torch.float32, 16, by_length=True), few)
    elif model.family in ("scgpt", "uce", "scfoundation"):
        network = TorchLayers(config, vocabulary)
        rows = {"scgpt": 64, "uce": 25, "scfoundation": 1}[model.family]
        autocast = half if model.family == "scgpt" and bench.cuda else None
        variants[f"upstream: nn.TransformerEncoder, {rows} a batch"] = (
            padded(network, torch.float32, rows, by_length=False, autocast=autocast),
            few,
        )
    else:
        network = HuggingFace(config, vocabulary, longest, attention="sdpa")
        variants["upstream: HF float32"] = (padded(network, torch.float32, 16, by_length=False), few)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    failed: dict[str, str] = {}
    for turn in range(1 + ROUNDS):  # the first turn meets every shape for the first time
        for variant, (call, given) in variants.items():
            if variant in failed or (bench.late and turn > 1):
                continue
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats(bench.device)
            try:
                seconds.setdefault(variant, []).append(bench.seconds(lambda call=call, given=given: call(given)))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001, one that does not run must not end the rest
                failed[variant] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            memory[variant] = torch.cuda.max_memory_allocated(bench.device) / 2**30 if bench.cuda else float("nan")
    found: dict[str, Any] = {}
    for variant, times in seconds.items():
        if variant in failed or len(times) < 2:
            continue
        given, typical = variants[variant][1], float(np.median(times[1:]))
        found[variant] = {
            "tokens/s": int(given.lengths.sum()) / typical,
            "items/s": len(given) / typical,
            "share of GEMM peak": useful_flops(model.config, given.lengths, model.layer) / typical / peak,
            "first turn, seconds": times[0],
            "later turns, seconds": typical,
            "peak memory, GiB": memory[variant] if bench.cuda else None,
        }
    best = max(v["tokens/s"] for k, v in found.items() if k.startswith("hub float16")) if found else float("nan")
    return {
        "rows": len(tokens),
        "tokens": int(tokens.lengths.sum()),
        "attention": encoder_backend(model),
        "variants": found,
        "hub float16 over": {k: best / v["tokens/s"] for k, v in found.items() if not k.startswith("hub")},
        "does not run": failed,
    }


def encoder_backend(model: Model) -> str:
    """Name what computes the attention of a model."""
    from cellfm_hub.nn import Encoder

    return next(m for m in model.adapter.network.modules() if isinstance(m, Encoder)).attention_backend()


# Right, too?


def fidelity(bench: Bench, names: list[str]) -> dict[str, Any]:
    """Compare half precision and rows in company with float32 and rows alone, and every backend with plain attention."""
    out: dict[str, Any] = {"backends": backend_errors(bench)}
    for name in names:
        if bench.late:
            break
        model = load(bench, name, torch.float32)
        rng, longest = np.random.default_rng(0), 48 if bench.smoke else min(model.longest, 1024)
        tokens = random_tokens(model, np.maximum(draw_lengths(rng, 4 if bench.smoke else 64, longest), 4))
        full = model.run(tokens, bench.device, 16_384)
        row = int(np.argmin(tokens.lengths))
        figures: dict[str, Any] = {"float32": {"alone or in company": alone(bench, model, tokens, full, row)}}
        for label, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
            other = load(bench, name, dtype)
            half = other.run(tokens, bench.device, 16_384)
            figures[label] = compare(half, full) | {"alone or in company": alone(bench, other, tokens, half, row)}
        out[name] = figures
        print(f"{name:<28}", figures, flush=True)  # noqa: T201
    return out


def alone(bench: Bench, model: Model, tokens: Tokens, together: np.ndarray, row: int) -> float:
    """Return how much the vector of a row changes, relative to its length, when the row is alone."""
    single = model.run(tokens.take([row]), bench.device, 16_384)[0]
    return float(np.linalg.norm(single - together[row]) / np.linalg.norm(together[row]))


def backend_errors(bench: Bench) -> dict[str, Any]:
    """Compare every backend with plain attention; a text says why one is refused."""
    found: dict[str, Any] = {}
    lengths = (130, 70, 33, 1)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        found[label] = {"chosen": choose(bench.device, dtype, 64, biased=False).backend.name}
        found[label]["chosen with ALiBi"] = choose(bench.device, dtype, 64, biased=True).backend.name
        query, key, value = torch.randn(3, sum(lengths), 4, 64, generator=generator).to(bench.device, dtype)
        batch = PackedBatch(ids=torch.zeros(sum(lengths), dtype=torch.int64, device=bench.device), lengths=lengths)
        for backend in BACKENDS:
            why_not = refusal(backend, bench.device, dtype, 64, biased=False)
            with torch.inference_mode():
                found[label][backend.name] = why_not or float(
                    (backend.kernel(query, key, value, batch, None).float() - plain(query, key, value, batch, None)).abs().max()
                )
    return found


# From counts to vectors


def pipeline(bench: Bench, _names: list[str]) -> dict[str, Any]:
    """Embed made-up cells from memory and from a gzipped file; then with less memory than a batch wants."""
    model = load(bench, "geneformer-v1-10m", torch.float16 if bench.cuda else torch.float32)
    tokenizer, gene_names, _ = rank_tokenizer(np.random.default_rng(0))
    genes, source = tokenizer.match_genes(gene_names), made_up_cells(16 if bench.smoke else 4096)
    cells, block = (16, 8) if bench.smoke else (200_000, 4096)
    budget = 2048 if bench.smoke else 65_536
    busy = [0.0]

    def from_memory() -> Iterator[Tokens]:
        rng = np.random.default_rng(1)
        for start in range(0, cells, block):
            counts = source[rng.integers(0, source.shape[0], min(block, cells - start))]
            yield tokenizer.tokenize(genes.apply(counts), genes)

    def run(blocks: Any) -> Callable[[], None]:
        def work() -> None:
            busy[0] = 0.0
            with prefetch(blocks()) as stream:
                for tokens in stream:
                    busy[0] += bench.seconds(lambda tokens=tokens: model.run(tokens, bench.device, budget))  # type: ignore[misc]
                    if bench.late:
                        break

        return work

    model.run(next(from_memory()), bench.device, budget)
    out: dict[str, Any] = {"cells": cells}
    seconds = bench.seconds(run(from_memory))
    out["from memory"] = {"cells/s": cells / seconds, "share of time in the engine": busy[0] / seconds}
    with tempfile.TemporaryDirectory() as folder:
        path = write_gzip(source, Path(folder) / "cells.h5", repeats=1 if bench.smoke else 8)
        rows = source.shape[0] * (1 if bench.smoke else 8)
        seconds = bench.seconds(run(lambda: from_file(path, tokenizer, genes, block)))
        out["from a gzipped file"] = {"cells/s": rows / seconds, "share of time in the engine": busy[0] / seconds}
    out["out of memory"] = out_of_memory(bench, model, next(from_memory()))
    return out


def write_gzip(counts: Any, path: Path, *, repeats: int) -> Path:
    """Write CSR arrays as an h5ad file holds them, compressed."""
    import h5py

    indptr = np.concatenate([counts.indptr[:-1] + i * counts.nnz for i in range(repeats)] + [[repeats * counts.nnz]])
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "data", data=np.tile(counts.data, repeats), compression="gzip", chunks=(65_536,) if counts.nnz > 65_536 else True
        )
        file.create_dataset("indices", data=np.tile(counts.indices, repeats), compression="gzip")
        file["indptr"] = indptr
    return path


def from_file(path: Path, tokenizer: Any, genes: Any, block: int) -> Iterator[Tokens]:
    """Read and tokenize block by block."""
    import h5py
    import scipy.sparse as sp

    with h5py.File(path) as file:
        indptr = file["indptr"][:]
        for start in range(0, len(indptr) - 1, block):
            part = indptr[start : start + block + 1]
            data, indices = file["data"][part[0] : part[-1]], file["indices"][part[0] : part[-1]]
            counts = sp.csr_matrix((data, indices, part - part[0]), shape=(len(part) - 1, genes.n_columns))
            yield tokenizer.tokenize(genes.apply(counts), genes)


def out_of_memory(bench: Bench, model: Model, tokens: Tokens) -> dict[str, Any]:
    """Ask for everything in one batch, with little memory (CUDA) or with batches that are refused (CPU): the vectors must not change."""
    tokens = tokens.take(np.arange(min(len(tokens), 1024)))
    expected, budget = model.run(tokens, bench.device, 8192), TokenBudget()
    limit = int(tokens.lengths.sum()) // 3

    def forward(batch: PackedBatch) -> torch.Tensor:
        if not bench.cuda and len(batch.ids) > limit:
            raise torch.OutOfMemoryError
        return model.adapter.row_vectors(batch, model.layer, model.pooling)

    if bench.cuda:
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_allocated(bench.device) + 2**30
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info(bench.device)[1], bench.device)
    try:
        got = run_network(forward, tokens, dim=model.dim, per_token=False, device=bench.device, batch_tokens=10**9, budget=budget)
    finally:
        if bench.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
    return {
        "tokens": int(tokens.lengths.sum()),
        "tokens that fit together": budget.allowed(10**9),
        "largest difference": float(np.abs(got - expected).max()),
    }


def main() -> int:
    """Measure, print and write."""
    options_of = parser(__doc__, SECTIONS, RESULTS / "gpu.json")
    options_of.add_argument("--models", default=None, help="names of checkpoints, separated by commas")
    options_of.add_argument("--device", default="cuda")
    options_of.add_argument("--deadline", type=float, default=540, help="seconds after which nothing more is begun")
    options = options_of.parse_args()
    if not options.smoke and not options.device.startswith("cuda"):
        options_of.error("only a GPU is worth measuring here; use --smoke to see that everything runs, and cpu.py for CPUs")
    warnings.filterwarnings("ignore", message=".*nested tensors.*|flex_attention called without.*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bench = Bench(torch.device(options.device), smoke=options.smoke, deadline=options.deadline)
    names = (options.models or (SMOKE_MODELS if options.smoke else MODELS)).split(",")
    started = time.perf_counter()
    report: dict[str, Any] = environment() | {"device": options.device, "smoke": options.smoke}
    for section in options.sections or SECTIONS:
        if bench.late:
            report["stopped before"] = section
            break
        report[section] = {"ceilings": ceilings, "encoders": encoders, "fidelity": fidelity, "pipeline": pipeline}[section](bench, names)
        report["seconds"] = time.perf_counter() - started
        write_report(report, options.json)
        print(section, "done after", f"{report['seconds']:.0f} s", flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
