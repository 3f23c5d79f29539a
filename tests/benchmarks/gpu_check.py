"""What a quarter of an hour on a GPU is spent on: is the hub right there, how fast is it, what could be faster.

``gpu_check.sh`` runs the stages in three calls; look at what one wrote before the next. By itself, from the top of a checkout::

    python tests/benchmarks/gpu_check.py encoders --seconds 190 --models scgpt-human,geneformer-v1-10m --out out

Random weights and tokens in published shapes are made on the device; no checkpoint, no data, no anndata is needed. Each stage writes
``STAGE.json`` as it goes, so that a stop loses little, and begins nothing new after its seconds. ``--device cpu`` is a smoke run: every
stage on tiny networks, which shows that everything runs and measures nothing.
"""

import argparse
import copy
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity

from benchmarks.common import (
    HuggingFace,
    Model,
    Padded,
    TorchLayers,
    encoder_of,
    gemm_flops,
    make_model,
    random_tokens,
    significant,
    useful_flops,
    vocabulary_of,
)
from benchmarks.fidelity import compare, draw_lengths
from cellfm_hub.engine.memory import TokenBudget
from cellfm_hub.engine.run import run_network
from cellfm_hub.nn import Alibi, PackedBatch, Rotary, segment_mean
from cellfm_hub.nn.attention import BY_BUCKET, BY_ROW, EFFICIENT, FLASH, FLEX, VARLEN, Backend, choose
from cellfm_hub.nn.kernels import plain
from cellfm_hub.tokens import Tokens

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MODELS = {
    "correct": "geneformer-v1-10m,geneformer-v2-104m,scgpt-human,dnabert2-117m,nt-v2-50m-multi-species,uce-4l,scfoundation-01b",
    "encoders": "scgpt-human,geneformer-v1-10m,geneformer-v2-104m,dnabert2-117m,nt-v2-500m-multi-species,uce-4l,scfoundation-01b,"
    "geneformer-v2-316m",
    "profile": "geneformer-v1-10m,scgpt-human,dnabert2-117m,nt-v2-500m-multi-species",
}
"""Stage -> the models it takes in turn."""


class Check:
    """One stage: where it runs, until when, what it found."""

    def __init__(self, stage: str, device: torch.device, *, seconds: float, folder: Path) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.smoke = not self.cuda
        self.end = time.monotonic() + seconds
        self.path = folder / f"{stage}.json"
        self.found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "torch": torch.__version__,
            "stage": stage,
        }

    @property
    def late(self) -> bool:
        """Whether nothing more should be begun."""
        return time.monotonic() > self.end

    def save(self) -> None:
        """Write what was found so far."""
        self.path.write_text(json.dumps(significant(self.found), indent=1, default=str))

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Measure until the device has finished."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def milliseconds(self, call: Callable[[], object], rounds: int = 7) -> float:
        """Measure a short call a few times and take the median; the first, which meets its shape anew, does not count."""
        call()
        return 1e3 * float(np.median([self.seconds(call) for _ in range(rounds)]))

    def of_each_model(self, names: list[str], measure: Callable[["Check", str], dict[str, Any]]) -> None:
        """Measure one model after the other; one that fails does not end the rest."""
        for name in names:
            if self.late:
                break
            try:
                self.found[name] = measure(self, name)
            except Exception as error:  # noqa: BLE001, networks fail in every way there is
                self.found[name] = traceback.format_exc()
                say(name, "FAILED", first_line(error))
            self.save()
            if self.cuda:
                torch.cuda.empty_cache()

    def model(self, name: str, dtype: torch.dtype, *, cut_layers: int | None = None) -> Model:
        """Make a model on the device; in a smoke run one block of it, short rows and a small table of tokens."""
        if not self.smoke:
            return make_model(name, device=self.device, dtype=dtype, cut_layers=cut_layers)
        return replace(make_model(name, device=self.device, dtype=dtype, cut_layers=1, cut_table=2000), longest=64)


def say(*words: object) -> None:
    """Print at once."""
    print(*words, flush=True)  # noqa: T201, a script for people


def first_line(error: Exception) -> str:
    """Name an error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


# Is it right?


def correct(check: Check, names: list[str]) -> None:
    """Say which attention was chosen; compare every kernel with the definition, and whole models with float32 on the CPU."""
    check.found["chosen"] = chosen_backends(check)
    check.save()
    check.found["errors"] = attention_errors(check)
    odd = {
        name: figures
        for name, figures in check.found["errors"].items()
        if not isinstance(figures, dict) or figures["repeat"] or max(figures["all"], figures["first"]) > 0.05
    }
    say("attention oddities:", json.dumps(significant(odd, 2))[:3000])
    check.save()
    check.of_each_model(names, model_errors)


def chosen_backends(check: Check) -> dict[str, Any]:
    """Let the hub choose for each precision, with ALiBi and without, and measure how long that takes."""
    chosen = {}
    for dtype in DTYPES:
        for biased in (False, True):
            start = time.perf_counter()
            choice = choose(check.device, dtype, 64, biased=biased)
            seconds = time.perf_counter() - start
            facts = {"backend": choice.backend.name, "why": choice.why, "rejected": choice.rejected, "seconds": seconds}
            chosen[f"{dtype} biased={biased}"] = facts
            say(dtype, "biased" if biased else "", "->", choice.backend.name, choice.rejected, f"{seconds:.1f} s")
    return chosen


def attention_errors(check: Check) -> dict[str, Any]:
    """Compare every kernel with the definition, at every width of a head and in every precision; or say why it does not run."""
    errors: dict[str, Any] = {}
    for head_dim in (32, 64, 128):
        for dtype in DTYPES:
            for backend in (VARLEN, FLASH, EFFICIENT, BY_BUCKET, BY_ROW):
                try:
                    errors[f"{backend.name} {dtype} hd{head_dim}"] = kernel_errors(check, backend, head_dim, dtype)
                except Exception as error:  # noqa: BLE001, private operators fail in every way there is
                    errors[f"{backend.name} {dtype} hd{head_dim}"] = first_line(error)
    return errors


@torch.inference_mode()
def kernel_errors(check: Check, backend: Backend, head_dim: int, dtype: torch.dtype) -> dict[str, float]:
    """Return the largest errors for all queries and for first ones, between two calls, and of a row alone beside the same in company."""
    lengths = (1500, 700, 129, 128, 65, 64, 33, 8, 7, 1, 1) if check.cuda else (130, 33, 1)
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, sum(lengths), 4, head_dim, generator=generator).to(check.device, dtype)
    batch = no_ids(lengths, check.device)
    expected = plain(query, key, value, batch, None)
    got = backend.kernel(query, key, value, batch, None)
    of_first = backend.kernel(query[batch.starts], key, value, batch, None)
    start, stop = sum(lengths[:2]), sum(lengths[:3])
    alone = backend.kernel(query[start:stop], key[start:stop], value[start:stop], no_ids(lengths[2:3], check.device), None)

    def largest(x: Tensor, y: Tensor) -> float:
        return float((x.float() - y.float()).abs().max())

    return {
        "all": largest(got, expected),
        "first": largest(of_first, expected[batch.starts]),
        "repeat": largest(backend.kernel(query, key, value, batch, None), got),
        "alone vs company": largest(alone, got[start:stop]),
    }


def no_ids(lengths: tuple[int, ...], device: torch.device) -> PackedBatch:
    """Make a batch of which only the lengths matter."""
    return PackedBatch(ids=torch.zeros(sum(lengths), dtype=torch.int64, device=device), lengths=lengths)


def model_errors(check: Check, name: str) -> dict[str, Any]:
    """Compare a model of few blocks, so that the CPU is quick, with float32 there; and a row alone with the same in company."""
    model = check.model(name, torch.float32, cut_layers=4)
    model = replace(model, layer=model.adapter.layers)
    tokens = random_tokens(model, draw_lengths(np.random.default_rng(0), 12, min(model.longest, 512)))
    weights = model.adapter.network
    model.adapter.network = copy.deepcopy(weights).to("cpu")
    on_cpu = model.run(tokens, torch.device("cpu"), 4096)
    model.adapter.network = weights
    figures: dict[str, Any] = {"float32": compare(model.run(tokens, check.device, 8192), on_cpu)}
    row = int(np.argmin(tokens.lengths))
    for dtype in (torch.float16, torch.bfloat16):
        model.adapter.network = copy.deepcopy(weights).to(dtype)
        half = model.run(tokens, check.device, 8192)
        alone = model.run(tokens.take(np.array([row])), check.device, 8192)[0]
        of_company = float(np.linalg.norm(alone - half[row]) / np.linalg.norm(half[row]))
        figures[str(dtype)] = compare(half, on_cpu) | {"alone": of_company}
    say(name, json.dumps(significant(figures, 2)))
    return figures


# How fast is it, beside others?


def encoders(check: Check, names: list[str]) -> None:
    """Compare the hub with padded networks, model by model."""
    peak = gemm_flops(check.device, torch.bfloat16, 256 if check.smoke else 8192, check.seconds)
    check.found["peak"] = peak / 1e12
    say(f"GEMM bf16 {peak / 1e12:.0f} TFLOP/s")
    check.of_each_model(names, lambda check, name: encoder(check, name, peak))


Variant = tuple[Callable[[Tokens], object], Tokens]
"""What is measured, and on which rows."""


def encoder(check: Check, name: str, peak: float) -> dict[str, Any]:
    """Measure all variants of one model in turn; report the median of all turns but the first, which meets every shape anew."""
    started = time.perf_counter()
    model = check.model(name, torch.float16)
    rng = np.random.default_rng(0)
    flops_of_row = useful_flops(model.config, draw_lengths(rng, 256, model.longest), model.layer) / 256
    rows = 6 if check.smoke else int(np.clip(0.15 * peak / flops_of_row, 192, 4096))  # some fifth of a second
    tokens = random_tokens(model, draw_lengths(rng, rows, model.longest))
    variants = hub_variants(check, model, tokens) | other_variants(check, model, tokens)
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for turn in range(2 if check.smoke else 4):
        for variant, (call, given) in variants.items():
            if variant in failed or (turn > 1 and check.late):
                continue
            try:
                seconds.setdefault(variant, []).append(check.seconds(lambda call=call, given=given: call(given)))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001, one that does not run must not end the rest
                failed[variant] = first_line(error)
    measured = {}
    for variant, (first, *later) in seconds.items():
        if variant in failed or not later:
            continue
        lengths, typical = variants[variant][1].lengths, float(np.median(later))
        share = useful_flops(model.config, lengths, model.layer) / typical / peak
        measured[variant] = {"tok/s": int(lengths.sum()) / typical, "MFU": share, "first": first, "later": later}
    backend = encoder_of(model.adapter.network).attention_backend()
    taken = time.perf_counter() - started
    say(f"{name} rows {rows} [{backend}] {taken:.0f} s")
    for variant, v in measured.items():
        times = f"first {v['first']:.2f} s  later {min(v['later']):.3f}-{max(v['later']):.3f}"
        say(f"   {variant:<40}{v['tok/s']:>12,.0f} tok/s  MFU {v['MFU']:.3f}  {times}")
    if failed:
        say("   does not run:", failed)
    return {
        "rows": rows,
        "tokens": int(tokens.lengths.sum()),
        "setup+all s": taken,
        "variants": measured,
        "bad": failed,
        "backend": backend,
    }


def hub_variants(check: Check, model: Model, tokens: Tokens) -> dict[str, Variant]:
    """Return the hub at some sizes of a batch."""
    budgets = (8192,) if check.smoke else (16_384, 65_536, 131_072)

    def hub(budget: int) -> Callable[[Tokens], object]:
        return lambda given: model.run(given, check.device, budget)

    return {f"ours fp16 {budget // 1024}k": (hub(budget), tokens) for budget in budgets}


def other_variants(check: Check, model: Model, tokens: Tokens) -> dict[str, Variant]:
    """Return padded networks: what a careful user would run, and the procedure of the release, which gets an eighth of the rows.

    Hugging Face's BERT has no gate and no ALiBi: for the DNA models it computes less than they do.
    """
    vocabulary = min(vocabulary_of(model), 60_000)
    positions = -(-int(tokens.lengths.max() + 2) // 64) * 64 + 64
    known = Tokens(ids=tokens.ids % vocabulary, offsets=tokens.offsets)
    few = known.take(np.arange(max(len(known) // 8, 2)))

    def padded(network: torch.nn.Module, **batches: Any) -> Callable[[Tokens], object]:
        runner = Padded(network, **batches)
        return lambda given: runner.run(given, check.device)

    with torch.device(check.device):
        hugging_face = HuggingFace(model.config, vocabulary, positions, attention="sdpa").to(torch.float16)
        variants = {
            "HF sdpa fp16, by length, 64k padded": (padded(hugging_face, budget=65_536, multiple=64), known),
            "HF sdpa fp16, file order, 32": (padded(hugging_face, rows=32), known),
        }
        if model.family == "geneformer":
            network: torch.nn.Module = HuggingFace(model.config, vocabulary, positions, attention="sdpa", head=True)
            variants["upstream fp32 LM head"] = (padded(network, rows=16), few)
        elif model.family in ("scgpt", "uce", "scfoundation"):
            network = TorchLayers(model.config, vocabulary)
            rows = {"scgpt": 64, "uce": 25, "scfoundation": 1}[model.family]
            autocast = torch.float16 if model.family == "scgpt" and check.cuda else None
            variants["upstream nn.TransformerEncoder"] = (padded(network, rows=rows, autocast=autocast), few)
        else:
            network = HuggingFace(model.config, vocabulary, positions, attention="sdpa")
            variants["upstream HF fp32"] = (padded(network, rows=16), few)
    return variants


# Where does the time go?


BATCHES = 4


def profile(check: Check, names: list[str]) -> None:
    """Take the profiler to a few batches of each model."""
    check.of_each_model(names, profile_model)


def profile_model(check: Check, name: str) -> dict[str, Any]:
    """Return how busy the device is, with what, and how long the host takes to queue a forward."""
    model = check.model(name, torch.float16)
    budget = 256 if check.smoke else 65_536
    lengths = draw_lengths(np.random.default_rng(0), 4096, model.longest)
    tokens = random_tokens(model, lengths[: int(np.searchsorted(np.cumsum(lengths), budget * BATCHES))])

    def work() -> None:
        model.run(tokens, check.device, budget)

    work()
    wall = check.seconds(work)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        check.seconds(work)
    events = sorted(profiler.key_averages(), key=device_microseconds, reverse=True)
    on_device = [event for event in events if device_microseconds(event) and "DeviceType.CUDA" in str(event.device_type)]
    total = sum(map(device_microseconds, on_device))
    share: dict[str, float] = {}
    for event in on_device:
        kind = kernel_kind(event.key.lower())
        share[kind] = share.get(kind, 0) + device_microseconds(event) / total
    figures: dict[str, Any] = {
        "batches": BATCHES,
        "wall ms": 1e3 * wall,
        "device ms": total / 1e3,
        "busy": total / 1e6 / wall,
        "launches": sum(event.count for event in on_device),
        "share": share,
        "host ms to queue a forward": queueing_milliseconds(check, model, tokens),
    }
    say(name, json.dumps(significant(figures)))
    return figures | {"top": [(event.key[:90], event.count, device_microseconds(event) / 1e3) for event in events[:14]]}


def device_microseconds(event: Any) -> float:
    """Return the device time of an event of the profiler, without that of the events inside it."""
    return getattr(event, "self_device_time_total", 0) or 0


KERNEL_KINDS = {
    "attention": ("flash", "fmha", "attention", "flex"),
    "gemm": ("gemm", "cutlass_8", "cutlass_9", "nvjet", "xmma", "sm90_xm"),
    "segment_reduce": ("segment_reduce",),
    "layer_norm": ("layer_norm",),
    "memcpy": ("memcpy", "memset"),
}
"""Kind -> what its kernels have in their names; the first that fits."""


def kernel_kind(name: str) -> str:
    """Return what a kernel does."""
    return next((kind for kind, signs in KERNEL_KINDS.items() if any(sign in name for sign in signs)), "pointwise/other")


def queueing_milliseconds(check: Check, model: Model, tokens: Tokens) -> float:
    """Measure how long the host takes for one batch when it does not wait for the device."""
    batch = PackedBatch.from_tokens(tokens.take(np.arange(min(len(tokens), 32))), check.device)
    with torch.inference_mode():
        model.adapter.row_vectors(batch, model.layer, model.pooling)
        check.wait()
        start = time.perf_counter()
        model.adapter.row_vectors(batch, model.layer, model.pooling)
        queued = time.perf_counter() - start
        check.wait()
    return 1e3 * queued


# What could be faster?


@torch.inference_mode()
def ideas(check: Check, _names: list[str]) -> None:
    """Measure each thing that could be faster, beside what is done now; half precision, a batch of 65,536 tokens."""
    total = 256 if check.smoke else 65_536
    for name, figures in (*mean_pooling(check, total), *pointwise(check, total), *linear_layers(check, total), *attention_speeds(check)):
        check.found[name] = figures
        say(name, json.dumps(significant(figures)))
        check.save()


Figures = Iterator[tuple[str, dict[str, Any]]]
"""Pairs of name and figures, as they are measured."""


def random_half(check: Check, *shape: int) -> Tensor:
    return torch.randn(*shape, device=check.device, dtype=torch.float16)


def mean_pooling(check: Check, total: int, rows: int = 32) -> Figures:
    """Compare the mean over each row with an ``index_add`` and with a sum in two levels, of pieces of 64 tokens first."""
    length, piece = total // rows, 64
    for dim in (256, 1024):
        hidden = random_half(check, total, dim)
        batch = no_ids((length,) * rows, check.device)
        counted = torch.ones(total, dtype=torch.bool, device=check.device)
        row_of = batch.per_token(torch.arange(rows, device=check.device))
        tokens = batch.segment_lengths.float()[:, None]

        def now(hidden: Tensor = hidden, batch: PackedBatch = batch, counted: Tensor = counted) -> Tensor:
            return segment_mean(hidden, batch, counted)

        def index_add(hidden: Tensor = hidden, row_of: Tensor = row_of, tokens: Tensor = tokens, dim: int = dim) -> Tensor:
            return torch.zeros(rows, dim, device=check.device).index_add_(0, row_of, hidden.float()) / tokens

        def two_levels(hidden: Tensor = hidden, tokens: Tensor = tokens) -> Tensor:
            of_pieces = torch.full((total // piece,), piece, dtype=torch.int64, device=check.device)
            of_rows = torch.full((rows,), length // piece, dtype=torch.int64, device=check.device)
            pieces = torch.segment_reduce(hidden.float(), "sum", lengths=of_pieces, axis=0, unsafe=True)
            return torch.segment_reduce(pieces, "sum", lengths=of_rows, axis=0, unsafe=True) / tokens

        yield (
            f"mean pooling D={dim} ms",
            {
                "now": check.milliseconds(now),
                "index_add": check.milliseconds(index_add),
                "two-level": check.milliseconds(two_levels) if length >= piece else float("nan"),
            },
        )


def pointwise(check: Check, total: int) -> Figures:
    """Compare rotary embedding, a gate and a residual sum with its norm as they are with the same compiled."""
    dim, heads, inner = 1024, 16, 32 if check.smoke else 4096
    rotary = Rotary(torch.arange(total, device=check.device), dim // heads, torch.float16)
    norm = torch.nn.LayerNorm(dim, device=check.device, dtype=torch.float16)

    def gate(x: Tensor) -> Tensor:
        activated, factor = x.chunk(2, -1)
        return F.silu(activated) * factor

    def add_norm(x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = norm(x + y)
        return out

    x, y = random_half(check, total, dim), random_half(check, total, dim)
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "rotary of q": (lambda query: rotary(query), (random_half(check, total, heads, dim // heads),)),
        "GLU silu": (gate, (random_half(check, total, 2 * inner),)),
        "add + LayerNorm": (add_norm, (x, y)),
    }
    for name, (call, given) in calls.items():
        figures: dict[str, Any] = {"eager ms": check.milliseconds(lambda call=call, given=given: call(*given))}  # type: ignore[misc]
        if check.cuda and not check.late:
            try:
                compiled = torch.compile(call, dynamic=True)
                figures["compile s"] = check.seconds(lambda compiled=compiled, given=given: compiled(*given))  # type: ignore[misc]
                figures["compiled ms"] = check.milliseconds(lambda compiled=compiled, given=given: compiled(*given))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001, compilers fail in every way there is
                figures["compiled"] = first_line(error)
        yield name, figures


def linear_layers(check: Check, total: int) -> Figures:
    """Measure the linear layers of the published blocks, and one with its ReLU beside the fused operator."""
    for dim, inner in ((256, 512), (512, 512), (768, 3072), (1152, 4608), (1280, 5120), (1024, 8192)):
        x, weight, bias = random_half(check, total, dim), random_half(check, inner, dim), random_half(check, inner)
        fused = float("nan")
        if check.cuda:
            fused = check.milliseconds(lambda x=x, w=weight, b=bias: torch._addmm_activation(b, x, w.t()))  # type: ignore[misc]
        linear = check.milliseconds(lambda x=x, w=weight, b=bias: F.linear(x, w, b))  # type: ignore[misc]
        yield (
            f"linear {dim}x{inner}",
            {
                "TFLOP/s": 2 * total * dim * inner / linear / 1e9,
                "linear+relu ms": check.milliseconds(lambda x=x, w=weight, b=bias: torch.relu(F.linear(x, w, b))),  # type: ignore[misc]
                "_addmm_activation ms": fused,
            },
        )


def attention_speeds(check: Check) -> Figures:
    """Measure every kernel in TFLOP/s, with ALiBi where it takes that; or say why it does not run."""
    mixed = tuple(sorted(np.random.default_rng(0).integers(200, 4096, 15).tolist(), reverse=True))
    for head_dim, lengths in ((64, (2048,) * 16), (64, mixed), (64, (64,) * 512), (128, (1000,) * 32)):
        figures: dict[str, Any] = {}
        for backend in (VARLEN, FLASH, EFFICIENT, BY_BUCKET, FLEX):
            figures[backend.name] = attention_speed(check, backend, head_dim, lengths, biased=False)
        for backend in (FLEX, BY_ROW):
            figures[f"{backend.name} ALiBi"] = attention_speed(check, backend, head_dim, lengths, biased=True)
        yield f"attention hd{head_dim} {len(lengths)} rows of {lengths[0]}..", figures


def attention_speed(check: Check, backend: Backend, head_dim: int, lengths: tuple[int, ...], *, biased: bool) -> float | str:
    if check.late:
        return "not measured: no time left"
    if check.smoke:
        lengths = (64, 64)
    heads = 12
    query, key, value = random_half(check, 3, sum(lengths), heads, head_dim)
    batch = no_ids(lengths, check.device)
    alibi = Alibi(heads, max(lengths), torch.float16, check.device) if biased else None
    flops = 4.0 * sum(n * n for n in lengths) * heads * head_dim
    try:
        return flops / check.milliseconds(lambda: backend.kernel(query, key, value, batch, alibi), 5) / 1e9
    except Exception as error:  # noqa: BLE001, private operators fail in every way there is
        return first_line(error)


# With too little memory


def oom(check: Check, _names: list[str]) -> None:
    """Ask for everything in one batch where half a GiB is left: the vectors must be those of small batches."""
    if not check.cuda:
        check.found["skipped"] = True  # the CPU's allocator cannot be given a limit
        return
    model = check.model("geneformer-v1-10m", torch.float16)
    tokens = random_tokens(model, draw_lengths(np.random.default_rng(0), 1024, model.longest))
    expected: NDArray[np.float32] = model.run(tokens, check.device, 8192)
    budget = TokenBudget()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**29) / total)
    try:
        got = run_network(
            lambda batch: model.adapter.row_vectors(batch, model.layer, model.pooling),
            tokens,
            dim=model.dim,
            per_token=False,
            device=check.device,
            batch_tokens=10**9,
            budget=budget,
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    difference, scale = float(np.abs(got - expected).max()), float(np.abs(expected).max())
    check.found["oom"] = {"fits": budget.allowed(10**9), "difference": difference, "scale": scale}
    say(check.found["oom"])


STAGES: dict[str, Callable[[Check, list[str]], None]] = {
    "correct": correct,
    "encoders": encoders,
    "profile": profile,
    "ideas": ideas,
    "oom": oom,
}


def main() -> int:
    """Run one stage; 1 if it broke off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--models", default="", help="names of checkpoints, separated by commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing new after this time")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for the results")
    options = parser.parse_args()
    started = time.perf_counter()
    check = Check(options.stage, torch.device(options.device), seconds=options.seconds, folder=options.out)
    names = (options.models or MODELS.get(options.stage, "")).split(",")
    broke_off = False
    try:
        STAGES[options.stage](check, names)
    except Exception:  # noqa: BLE001, what was found so far is to be kept
        traceback.print_exc()
        broke_off = True
    check.found["seconds"] = time.perf_counter() - started
    check.save()
    say(options.stage, f"{check.found['seconds']:.0f} s")
    return int(broke_off)


if __name__ == "__main__":
    sys.exit(main())
