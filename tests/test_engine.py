"""The engine: nothing is computed that is not read, running out of memory loses no row, threads leave no trace."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cellfm_hub as cf
from cellfm_hub import cost
from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.cards import Fidelity
from cellfm_hub.engine import device as device_module
from cellfm_hub.engine import run as run_module
from cellfm_hub.engine.device import bfloat16_speed_up, choose_device, choose_dtype
from cellfm_hub.engine.memory import CLEAN_BATCHES, TokenBudget
from cellfm_hub.engine.overlap import AHEAD, prefetch
from cellfm_hub.engine.run import run_network
from cellfm_hub.errors import DeviceError
from cellfm_hub.nn import PackedBatch, first, segment_mean
from cellfm_hub.nn.out_of_memory import is_out_of_memory
from cellfm_hub.tokens import Tokens, offsets_from_lengths
from golden_cases import PORTABLE, Case

CPU = torch.device("cpu")


def tokens_of(lengths: list[int]) -> Tokens:
    """Rows of differing tokens."""
    ids = np.random.default_rng(0).integers(1, 50, sum(lengths))
    return Tokens(ids=ids, offsets=offsets_from_lengths(lengths))


# Only what is read is computed

FAMILIES = ["geneformer-v2", "nt-v1", "nt-v2", "dnabert2", "dnabert-s", "scgpt", "uce"]


@pytest.mark.parametrize("family", FAMILIES)
def test_first_tokens_alone_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pooling ``cls`` the vectors are those of the whole last layer, one row or many."""
    case = Case(PORTABLE / f"{family}-basic")
    name = family.rpartition("-v")[0] or family
    model = cf.load(name, checkpoint=case.checkpoint, options=case.options, device="cpu", precision="float32")
    data = next(path for stem in ("input.h5ad", "human.h5ad", "sequences.fasta") if (path := case.path / stem).exists())
    tokens = model.tokenize(data)
    adapter = model.adapter
    assert isinstance(adapter, TokenAdapter)
    tokens = tokens.take(np.arange(min(len(tokens), 6)))
    row = int(np.argmax(tokens.lengths))
    for layer in range(adapter.layers + 1):
        less = model.encode_tokens(tokens, pooling="cls", output_layer=layer)
        alone = model.encode_tokens(tokens.take([row]), pooling="cls", output_layer=layer)
        assert adapter.reads_first_only("cls")
        with monkeypatch.context() as patch:
            patch.setattr(type(adapter), "first_only", False)
            full = model.encode_tokens(tokens, pooling="cls", output_layer=layer)
        np.testing.assert_allclose(less, full, atol=2e-6, rtol=0)
        np.testing.assert_allclose(alone, full[[row]], atol=2e-6, rtol=0)


# Out of memory

OUT_OF_MEMORY: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."),
    lambda: MemoryError(),
    lambda: RuntimeError("std::bad_alloc"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]


@pytest.mark.parametrize("make", OUT_OF_MEMORY)
def test_out_of_memory_is_recognised(make: Callable[[], Exception]) -> None:
    assert is_out_of_memory(make())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def embedding(batch: PackedBatch) -> torch.Tensor:
    """A vector per token that tells tokens and rows apart."""
    table = torch.arange(50.0)[:, None] * torch.tensor([1.0, 0.5, 0.25])
    return table[batch.ids] + batch.positions[:, None] / 64


def mean(batch: PackedBatch) -> torch.Tensor:
    return segment_mean(embedding(batch), batch, torch.ones_like(batch.ids, dtype=torch.bool))


def run(forward: Callable[[PackedBatch], torch.Tensor], tokens: Tokens, **options: Any) -> np.ndarray:
    return run_network(forward, tokens, dim=3, device=CPU, **{"per_token": False, "batch_tokens": 64, **options})


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    seed=st.integers(0, 2**31),
    share=st.floats(0, 0.7),
    kind=st.sampled_from(range(len(OUT_OF_MEMORY))),
    per_token=st.booleans(),
)
def test_out_of_memory_at_random_batches(lengths: list[int], seed: int, share: float, kind: int, per_token: bool) -> None:
    """No row is lost, none is double, the order is right, and the numbers are the same, bit for bit."""
    tokens, rng = tokens_of(lengths), np.random.default_rng(seed)
    forward = embedding if per_token else mean
    expected, done = run(forward, tokens, per_token=per_token), []

    def unreliable(batch: PackedBatch) -> torch.Tensor:
        if len(batch.lengths) > 1 and batch.lengths[1] > 1 and rng.random() < share:  # never a row alone, filled up
            raise OUT_OF_MEMORY[kind]()
        return forward(batch)

    got = run(unreliable, tokens, per_token=per_token, on_batch=done.append)
    np.testing.assert_array_equal(got, expected)
    assert sum(done) == np.count_nonzero(lengths)


def test_less_is_tried_from_then_on() -> None:
    """What failed is remembered from call to call; other errors are not swallowed."""
    budget, seen = TokenBudget(), []

    def small(batch: PackedBatch) -> torch.Tensor:
        seen.append(len(batch.ids))
        if len(batch.ids) > 100:
            raise torch.OutOfMemoryError
        return mean(batch)

    tokens = tokens_of([20] * 60)
    first_run = run(small, tokens, batch_tokens=1000, budget=budget)
    assert [n for n in seen if n > 100] == [1000, 500, 240, 120]
    seen.clear()
    np.testing.assert_array_equal(run(small, tokens, batch_tokens=1000, budget=budget), first_run)
    assert max(seen) <= 100

    def broken(batch: PackedBatch) -> torch.Tensor:
        msg = "expected scalar type Float"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="expected scalar type"):
        run(broken, tokens)


def test_budget_grows_again_but_not_to_where_it_failed() -> None:
    budget = TokenBudget()
    assert budget.allowed(4096) == 4096
    budget.fitted()
    budget.failed(4000)
    assert budget.allowed(4096) == 2000
    assert budget.allowed(100) == 100
    for _ in range(CLEAN_BATCHES):
        budget.fitted()
    assert budget.allowed(4096) == 2501
    for _ in range(20 * CLEAN_BATCHES):
        budget.fitted()
    assert budget.allowed(4096) == 3600
    budget.failed(3000)
    assert budget.allowed(4096) == 1500


@pytest.mark.parametrize("first_only", [False, True])
def test_a_single_row_that_does_not_fit(first_only: bool) -> None:
    def full(batch: PackedBatch) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(DeviceError, match=r"a single row of 30 tokens does not fit into the memory of cpu; use precision='bfloat16'"):
        run(full, tokens_of([30, 20]), first_only=first_only)


def test_nothing_of_the_failed_batch_is_held() -> None:
    """Its tensors are gone before the next attempt: on a device they would be in the way."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def fails_once(batch: PackedBatch) -> torch.Tensor:
        assert all(reference() is None for reference in held)
        large = torch.zeros(1000)
        if not held:
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError
        return mean(batch)

    run(fails_once, tokens_of([20, 20]))
    assert held


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30), batch_tokens=st.integers(1, 200))
def test_small_batches_are_filled_up(lengths: list[int], batch_tokens: int) -> None:
    """Products never have fewer than 16 rows, and what fills them up is not in the result."""

    def forward(batch: PackedBatch) -> torch.Tensor:
        assert len(batch.lengths) >= 16
        return first(embedding(batch), batch)

    tokens = tokens_of(lengths)
    got = run(forward, tokens, batch_tokens=batch_tokens, first_only=True)
    assert np.isnan(got[tokens.lengths == 0]).all()
    rows = np.flatnonzero(tokens.lengths)
    np.testing.assert_array_equal(got[rows, 0], tokens.ids[tokens.offsets[rows]])


LIMITED = """
import json, resource, sys
import numpy as np, torch
from cellfm_hub.engine.memory import TokenBudget
from cellfm_hub.engine.run import run_network
from cellfm_hub.nn import Encoder, EncoderConfig, segment_mean
from cellfm_hub.tokens import Tokens, offsets_from_lengths

torch.set_num_threads(1)
torch.manual_seed(0)
encoder = Encoder(EncoderConfig(dim=64, heads=2, layers=1, ffn_dim=1024, norm="post", norm_eps=1e-5, activation="relu")).eval()
words = torch.nn.Embedding(50, 64)
lengths = np.random.default_rng(0).integers(20, 120, 2000)
tokens = Tokens(ids=np.random.default_rng(1).integers(0, 50, lengths.sum()), offsets=offsets_from_lengths(lengths))

def forward(batch):
    hidden = encoder(words(batch.ids), batch, 1)
    return segment_mean(hidden, batch, torch.ones_like(batch.ids, dtype=torch.bool))

def run(batch_tokens, budget):
    return run_network(forward, tokens, dim=64, per_token=False, device=torch.device("cpu"), batch_tokens=batch_tokens, budget=budget)

expected = run(2000, TokenBudget())
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = used + 160 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
budget = TokenBudget()
got = run(10**9, budget)
print(json.dumps({"equal": bool((got == expected).all()), "allowed": budget.allowed(10**9), "tokens": int(lengths.sum())}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_budget_beyond_the_memory_recovers() -> None:
    """In a process that may use 160 MB more, a batch of everything fails, and smaller ones give the same numbers."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["equal"]
    assert result["allowed"] < result["tokens"]


# Precision

FAITHFUL = Fidelity(centred_error_p99=1e-2, cosine_min=0.9999)


@pytest.mark.parametrize(
    ("amx", "speed_up", "fidelity", "expected"),
    [
        (True, 3.3, FAITHFUL, torch.bfloat16),
        (True, 1.4, FAITHFUL, torch.float32),
        (False, 3.3, FAITHFUL, torch.float32),
        (True, 3.3, Fidelity(centred_error_p99=5e-2, cosine_min=0.9999), torch.float32),
        (True, 3.3, None, torch.float32),
    ],
    ids=["pays", "slow", "no-amx", "unfaithful", "unmeasured"],
)
def test_bfloat16_on_cpus(amx: bool, speed_up: float, fidelity: Any, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only with AMX, where it is measured to be fast, and where the card says that it is faithful."""
    monkeypatch.setattr(device_module, "has_amx", lambda: amx)
    monkeypatch.setattr(device_module, "bfloat16_speed_up", lambda: speed_up)
    assert choose_dtype("auto", CPU, fidelity) == expected
    assert choose_dtype("float32", CPU, fidelity) == torch.float32
    assert choose_dtype("auto", torch.device("cuda"), fidelity) == torch.float16
    assert choose_dtype("auto", torch.device("mps"), fidelity) == torch.float32


def test_the_probe_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of several tries of either precision counts, on a clock that only the products move."""
    clock, calls = [0.0], [0]

    def product(x: torch.Tensor, _: torch.Tensor) -> None:
        calls[0] += 1
        warm_up = 5.0 if calls[0] % 4 == 1 else 1.0
        clock[0] += warm_up * (0.25 if x.dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    monkeypatch.setattr(device_module.time, "perf_counter", lambda: clock[0])
    assert bfloat16_speed_up.__wrapped__() == 4
    assert calls[0] == 8


# Devices


def test_a_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause is named, not "0 devices": a card may be there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=rf"device='{name}' is not available: this torch .* built without CUDA"):
            choose_device(name)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(DeviceError, match=r"this machine has 0 cuda device\(s\)"):
        choose_device("cuda")


def test_waiting_for_a_device_takes_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that read and tokenize need it."""
    made: list[dict[str, Any]] = []

    class Event:
        def __init__(self, **options: Any) -> None:
            made.append(options)

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:0"

    class OnCard:
        device = torch.device("cuda", 0)

        def to(self, device: str, *, non_blocking: bool) -> str:
            assert (device, non_blocking) == ("cpu", True)
            return "copy"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    copy, _ = run_module._to_host(OnCard())  # type: ignore[arg-type]
    assert copy == "copy"
    assert made == [{"blocking": True}]


def test_the_longest_row_is_looked_for_once() -> None:
    """Every layer asks for it, in batches of up to 4,096 rows."""
    looked = []

    class Lengths(tuple[int, ...]):
        __slots__ = ()

        def __iter__(self) -> Iterator[int]:
            looked.append(True)
            return super().__iter__()

    batch = PackedBatch(ids=torch.zeros(6, dtype=torch.int64), lengths=Lengths((4, 2)))
    assert [batch.longest for _ in range(24)] == [4] * 24
    assert len(looked) == 1


def test_the_probe_of_a_gpu_times_work_and_not_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """8192 cubed takes a millisecond on the fastest; what a CPU multiplies, microseconds. Without a measured row there is no estimate."""
    product, shapes = torch.mm, set()

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.add((*a.shape, *b.shape))
        return product(a, b)

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda shape, device, dtype: ones(shape, device="meta", dtype=dtype))
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cost.probe.__wrapped__(torch.device("cuda"), torch.float16)
    cost.probe.__wrapped__(CPU, torch.float32)
    assert shapes == {(8192, 8192, 8192, 8192), (1024, 768, 768, 1024)}


# Overlap


def threads() -> int:
    return sum(t.name.startswith("cellfm-prefetch") for t in threading.enumerate())


def test_prefetch_runs_ahead_and_not_further() -> None:
    made, closed = [], []

    def numbers() -> Generator[int]:
        try:
            for i in range(20):
                made.append((i, threading.current_thread().name))
                yield i
        finally:
            closed.append(True)

    with prefetch(numbers()) as stream:
        got = []
        for item in stream:
            got.append(item)
            time.sleep(0.001)
            assert len(made) <= item + 1 + AHEAD
    assert got == list(range(20))
    assert all(name.startswith("cellfm-prefetch") for _, name in made)
    assert closed
    assert threads() == 0


def test_an_exception_comes_at_its_place() -> None:
    def breaks() -> Generator[int]:
        yield 0
        yield 1
        msg = "row 2 is bad"
        raise cf.errors.InputError(msg)

    got = []

    def use() -> None:
        with prefetch(breaks()) as stream:
            for item in stream:
                got.append(item)  # noqa: PERF402, those before the exception count

    with pytest.raises(cf.errors.InputError, match="row 2"):
        use()
    assert got == [0, 1]
    assert threads() == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_leaving_early_closes_everything(error: type[BaseException]) -> None:
    closed = []

    def endless() -> Generator[int]:
        try:
            i = 0
            while True:
                yield i
                i += 1
        finally:
            closed.append(True)

    def leave() -> None:
        with prefetch(endless()) as stream:
            assert next(stream) == 0
            raise error

    with pytest.raises(error):
        leave()
    assert closed
    assert threads() == 0
    with prefetch(endless()):
        pass
    assert len(closed) == 1  # the second was never begun, so there is nothing to close
    assert threads() == 0
