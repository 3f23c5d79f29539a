"""Attention within rows: every backend gives what the definition says, and the first one that does is used."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cellfm_hub as cf
from cellfm_hub.nn import Alibi, Encoder, EncoderConfig, PackedBatch
from cellfm_hub.nn import attention as attention_module
from cellfm_hub.nn import kernels as kernels_module
from cellfm_hub.nn.attention import (
    BY_BUCKET,
    BY_ROW,
    EFFICIENT,
    FLASH,
    FLEX,
    TOLERANCE,
    VARLEN,
    Backend,
    Choice,
    attend,
    choose,
    preference,
    refusal,
    report,
)
from cellfm_hub.nn.kernels import plain
from cellfm_hub.nn.matmul_precision import exact_products
from golden_cases import PORTABLE, Case

CPU, HEADS = torch.device("cpu"), 3


def ragged(
    lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, heads: int = HEADS
) -> tuple[Tensor, Tensor, Tensor, PackedBatch, Alibi]:
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    query, key, value = torch.randn(3, total, heads, 8, generator=generator).to(dtype)
    batch = PackedBatch(ids=torch.zeros(total, dtype=torch.int64), lengths=lengths)
    return query, key, value, batch, Alibi(heads, batch.longest, dtype, CPU)


def exact(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, alibi: Alibi | None) -> Tensor:
    """Attention of each row by its definition, in float64; `query` holds all tokens."""
    out, start = [], 0
    for length in batch.lengths:
        q, k, v = (x[start : start + length].double() for x in (query, key, value))
        scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
        if alibi is not None:
            places = torch.arange(length)
            scores -= alibi.slopes.double()[:, None, None] * (places[:, None] - places).abs()
        out.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v))
        start += length
    return torch.cat(out)


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=0)


def tiny_network(norm: Any = "post", *, rotary: bool = False, alibi: bool = False) -> Encoder:
    config = EncoderConfig(
        dim=24, heads=HEADS, layers=3, ffn_dim=48, norm=norm, norm_eps=1e-5, activation="gelu", rotary=rotary, alibi=alibi
    )
    torch.manual_seed(0)
    return Encoder(config).eval()


@pytest.fixture(autouse=True)
def _unfused_flex_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")
        yield


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    choose.cache_clear()
    yield
    choose.cache_clear()
    attention_module._failed_in_use.clear()


ON_CPU = [pytest.param(BY_ROW, True, id="row"), pytest.param(BY_BUCKET, False, id="bucket"), pytest.param(FLEX, True, id="flex")]


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize(("backend", "takes_bias"), ON_CPU)
@pytest.mark.parametrize("lengths", [(1,), (5, 5, 5), (200, 64, 63, 63, 1), (1, 130, 2), (128,)], ids=str)
def test_backends_that_run_on_cpus(backend: Backend, takes_bias: bool, lengths: tuple[int, ...], first_only: bool) -> None:
    """They equal the definition, with ALiBi and without, for all tokens and for first ones."""
    query, key, value, batch, alibi = ragged(lengths)
    wanted = batch.starts if first_only else slice(None)
    for bias in (None, alibi) if takes_bias else (None,):
        expected = exact(query, key, value, batch, bias)[wanted]
        for kernel in (backend.kernel, plain):
            assert_near(kernel(query[wanted], key, value, batch, bias), expected)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=8).map(tuple))
def test_any_rows(lengths: tuple[int, ...]) -> None:
    query, key, value, batch, alibi = ragged(lengths)
    expected = exact(query, key, value, batch, None)
    for backend in (BY_ROW, BY_BUCKET):
        assert_near(backend.kernel(query, key, value, batch, None), expected)
    assert_near(attend(query, key, value, batch, alibi), exact(query, key, value, batch, alibi))


def test_packed_operators_are_called_as_torch_declares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a CUDA device: every argument is of the declared kind, at its place."""
    query, key, value, batch, _ = ragged((4, 2))
    seen: dict[str, Any] = {}

    def record(name: str) -> Callable[..., Any]:
        schema = getattr(torch.ops.aten, name).default._schema

        def call(*given: Any) -> tuple[Tensor]:
            seen[name] = {argument.name: value for argument, value in zip(schema.arguments, given, strict=False)}
            assert all(a.kwarg_only or a.has_default_value() for a in schema.arguments[len(given) :])
            return (given[0],)

        return call

    for name in ("_flash_attention_forward", "_efficient_attention_forward"):
        monkeypatch.setattr(torch.ops.aten, name, record(name))
    for queries, longest in ((query, 4), (query[batch.starts], 1)):
        assert FLASH.kernel(queries, key, value, batch, None).shape == queries.shape
        assert EFFICIENT.kernel(queries, key, value, batch, None).shape == queries.shape
        flash, efficient = seen["_flash_attention_forward"], seen["_efficient_attention_forward"]
        assert (flash["max_q"], flash["max_k"]) == (longest, 4)
        assert (efficient["max_seqlen_q"], efficient["max_seqlen_k"]) == (longest, 4)
        assert flash["cum_seq_k"].tolist() == efficient["cu_seqlens_k"].tolist() == [0, 4, 6]
        assert flash["cum_seq_k"].dtype == efficient["cu_seqlens_q"].dtype == torch.int32
        assert flash["cum_seq_q"].tolist() == ([0, 4, 6] if longest == 4 else [0, 1, 2])
        assert (flash["dropout_p"], flash["is_causal"], flash["return_debug_mask"]) == (0.0, False, False)
        assert (efficient["bias"], efficient["dropout_p"], efficient["custom_mask_type"]) == (None, 0.0, 0)
        assert efficient["query"].shape == (1, *queries.shape)


@pytest.mark.parametrize("splits", [False, True], ids=["torch 2.11", "torch 2.12"])
def test_varlen_attention_keeps_from_cudnn(splits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch can be told how often to split a row, it is told once: then neither cuDNN nor the size of the batch decides."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    seen: list[dict[str, Any]] = []

    def older(query: Tensor, *given: Any, is_causal: bool = False) -> Tensor:
        seen.append({})
        return query

    def newer(query: Tensor, *given: Any, num_splits: int | None = None) -> Tensor:
        seen.append({"num_splits": num_splits})
        return query

    monkeypatch.setattr(varlen, "varlen_attn", newer if splits else older)
    query, key, value, batch, _ = ragged((4, 2))
    VARLEN.kernel(query, key, value, batch, None)
    VARLEN.kernel(query[batch.starts], key, value, batch, None)
    assert seen == [{"num_splits": 1} if splits else {}] * 2


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and func is not torch.ops.aten.as_strided.default:  # a view takes no memory
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("backend", [BY_ROW, FLEX], ids=["row", "flex"])
def test_the_bias_of_one_query_is_one_row(backend: Backend) -> None:
    """On devices other than a CPU biases are written out: for the first token alone, in rows of 10,000, that is little."""
    length, heads, device = 10_000, 12, torch.device("meta")
    key, value = (torch.empty(2 * length, heads, 8, device=device) for _ in range(2))
    batch = PackedBatch(ids=torch.empty(2 * length, dtype=torch.int64, device=device), lengths=(length, length))
    alibi = Alibi(heads, length, torch.float32, device)
    with Largest() as largest:
        assert backend.kernel(torch.empty(2, heads, 8, device=device), key, value, batch, alibi).shape == (2, heads, 8)
    assert largest.elements <= 2 * heads * length * 8


@pytest.mark.parametrize(
    ("device_type", "dtype", "biased", "expected"),
    [
        ("cuda", torch.float16, False, (VARLEN, FLASH, EFFICIENT, BY_BUCKET)),
        ("cuda", torch.bfloat16, False, (VARLEN, FLASH, EFFICIENT, BY_BUCKET)),
        ("cuda", torch.float32, False, (EFFICIENT, BY_BUCKET)),
        ("cuda", torch.float16, True, (FLEX, BY_ROW)),
        ("mps", torch.float32, False, (BY_BUCKET,)),
        ("mps", torch.float32, True, (BY_ROW,)),
        ("cpu", torch.float32, False, (BY_ROW,)),
        ("cpu", torch.bfloat16, True, (BY_ROW,)),
    ],
)
def test_order_of_preference(device_type: str, dtype: torch.dtype, biased: bool, expected: tuple[Backend, ...]) -> None:
    assert preference(device_type, dtype, biased=biased) == expected


GOOD = Backend("good", lambda q, k, v, batch, alibi: plain(q, k, v, batch, alibi).to(q.dtype))
LEAKS = Backend("leaks", lambda q, k, v, batch, _: plain(q, k, v, batch, None) + 0.3)
NOT_A_NUMBER = Backend("nan", lambda q, k, v, batch, _: torch.full_like(q, torch.nan))


def _fails(*_: Any) -> Tensor:
    msg = "no kernel image\nis available"
    raise NotImplementedError(msg)


ABSENT = Backend("absent", _fails)


@pytest.mark.parametrize("biased", [False, True])
def test_the_first_that_works_is_chosen(biased: bool, monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    """A backend that fails, gives other numbers or no numbers is passed over, and the report says why."""
    monkeypatch.setattr(attention_module, "preference", lambda *_, **__: (ABSENT, LEAKS, NOT_A_NUMBER, GOOD, BY_ROW))
    choice = choose(CPU, torch.float32, 8, biased=biased)
    assert choice.backend is GOOD
    reasons = dict(choice.rejected)
    assert reasons["absent"] == "NotImplementedError: no kernel image"
    assert reasons["leaks"].startswith("differs by 3.0e-01") or biased
    assert reasons["nan"] == "differs by nan from plain attention"
    assert choose(CPU, torch.float32, 8, biased=biased) is choice
    text = report(CPU, torch.float32)["attention_alibi" if biased else "attention"]
    assert text.startswith("good (tried: agrees with plain attention; absent refused: NotImplementedError")


def test_the_last_resort(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setattr(attention_module, "preference", lambda *_, **__: (ABSENT, BY_BUCKET))
    assert choose(CPU, torch.float32, 8, biased=False).backend is BY_BUCKET
    assert report(CPU, torch.float32)["attention"].startswith("sdpa by length bucket (works everywhere; absent refused")


NO_MEMORY = [torch.OutOfMemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["torch", "cublas"])
def test_no_memory_says_nothing_about_a_backend(error: Exception, monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    """Neither when it is tried nor later."""

    def full(*_: Any) -> Tensor:
        raise error

    with pytest.raises(type(error)):
        refusal(Backend("full", full), CPU, torch.float32, 8, biased=False)
    small, works = ragged((4, 2)), True

    def full_later(*given: Any) -> Tensor:
        if works:
            return plain(*given)
        raise error

    backend = Backend("full later", full_later)
    monkeypatch.setattr(attention_module, "preference", lambda *_, **__: (backend, BY_ROW))
    attend(*small)
    works = False
    with pytest.raises(type(error)):
        attend(*small)
    works = True
    attend(*small)
    assert choose(CPU, torch.float32, 8, biased=True, heads=HEADS).backend is backend


def test_a_backend_that_is_wrong_for_first_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    """They are all that the default recipes of Geneformer, scGPT and UCE read."""

    def wrong_for_some(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, alibi: Alibi | None, *, first: bool) -> Tensor:
        out = plain(query, key, value, batch, alibi)
        return out.roll(1, dims=0) if (len(query) == len(batch.lengths)) is first else out

    of_first, of_all = (Backend(name, partial(wrong_for_some, first=first)) for name, first in (("of first", True), ("of all", False)))
    monkeypatch.setattr(attention_module, "preference", lambda *_, **__: (of_first, of_all, GOOD, BY_ROW))
    choice = choose(CPU, torch.float32, 8, biased=False)
    assert choice.backend is GOOD
    assert [name for name, _ in choice.rejected] == ["of first", "of all"]
    assert all(why.startswith("differs by") for _, why in choice.rejected)


def test_a_backend_that_fails_in_use_is_given_up(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler may fail on shapes that were not tried: the run goes on, says so once, and does not try again."""
    tried = []

    def fails_later(query: Tensor, *given: Any) -> Tensor:
        tried.append(len(query))
        if len(query) > 300:
            msg = "LoweringException: out of resource: shared memory\nRequired: 180224"
            raise RuntimeError(msg)
        return plain(query, *given)

    backend = Backend("fails later", fails_later)
    monkeypatch.setattr(attention_module, "preference", lambda *_, **__: (backend, BY_ROW))
    query, key, value, batch, alibi = ragged((400, 3))
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        for _ in range(3):
            assert_near(attend(query, key, value, batch, alibi), exact(query, key, value, batch, alibi))
    assert tried.count(403) == 1
    said = "fails later failed in use: RuntimeError: LoweringException: out of resource: shared memory"
    assert [record.getMessage() for record in caplog.records] == [f"{said}; going on with another way to compute attention"]
    choice = choose(CPU, torch.float32, 8, biased=True, heads=HEADS)
    assert choice.backend is BY_ROW
    assert dict(choice.rejected)["fails later"].startswith("failed in use")
    wrong = key[:, :, :4]  # what no backend can compute is still an error
    with pytest.raises(RuntimeError):
        attend(query, wrong, value, batch, alibi)


def test_the_report_compiles_nothing(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    """``cellfm env`` is a listing; trying FlexAttention on CUDA takes 10 to 40 seconds."""

    def compiles(*_: Any) -> Tensor:
        pytest.fail("compiled for a listing")

    monkeypatch.setattr(attention_module, "preference", lambda *_, **__: (Backend(FLEX.name, compiles, FLEX.slow_to_try), BY_ROW))
    text = report(CPU, torch.float16)["attention_alibi"]
    assert text == "flex attention (compiled and tried when it is needed; else sdpa by row)"


@pytest.fixture
def compiled_flex(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> Iterator[list[None]]:
    """FlexAttention as on CUDA, but run by torch's interpreter on the CPU; one entry for each graph that was made."""
    graphs: list[None] = []

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(None)
        return graph.forward

    monkeypatch.setattr(kernels_module, "FLEX_COMPILED_ON", ("cpu",))
    monkeypatch.setattr(attention_module, "preference", lambda *_, **__: (FLEX, BY_ROW))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    kernels_module._flex_attention.cache_clear()
    yield graphs
    kernels_module._flex_attention.cache_clear()
    torch._dynamo.reset()


def graph_limit(graphs: int) -> AbstractContextManager[None]:
    """As many for each piece of code: torch allows eight, which would take long here."""
    from torch._dynamo import config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    limited: AbstractContextManager[None] = config.patch({name: graphs})
    return limited


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_any_number_of_kinds_is_compiled(compiled_flex: list[None]) -> None:
    """Models and precisions beyond torch's limit on graphs: one graph for each, made when it is tried, whatever the lengths."""
    with graph_limit(2), torch.inference_mode(), exact_products():  # as in a run
        for dtype, heads in ((torch.float32, 3), (torch.float16, 3), (torch.float16, 4)):
            before = len(compiled_flex)
            choice = choose(CPU, dtype, 8, biased=True, heads=heads)
            assert choice.backend is FLEX, choice.rejected
            for lengths in ((20, 3), (257, 1, 1)):
                query, key, value, batch, alibi = ragged(lengths, dtype, heads)
                got = attend(query, key, value, batch, alibi)
                torch.testing.assert_close(got.float(), plain(query, key, value, batch, alibi), atol=TOLERANCE[dtype], rtol=0)
            assert len(compiled_flex) == before + 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_beyond_the_limit_is_an_error_and_not_slow(compiled_flex: list[None], caplog: pytest.LogCaptureFixture) -> None:
    """Where torch would compile no further it must not turn to writing out all scores: the run goes on by row."""
    assert choose(CPU, torch.float32, 8, biased=True, heads=HEADS).backend is FLEX
    query, key, value, batch, alibi = ragged((20, 3))  # with gradients on, which takes a graph of its own
    with graph_limit(1), caplog.at_level(logging.WARNING, "cellfm_hub"):
        assert_near(attend(query, key, value, batch, alibi), exact(query, key, value, batch, alibi))
    assert "flex attention failed in use" in caplog.text
    assert choose(CPU, torch.float32, 8, biased=True, heads=HEADS).backend is BY_ROW


SHAPES = [("post", False, False), ("pre", True, False), ("post", False, True)]


@pytest.mark.parametrize(("norm", "rotary", "alibi"), SHAPES)
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_first_tokens_alone(norm: str, rotary: bool, alibi: bool, layer: int) -> None:
    """The last block computed for first tokens alone gives the numbers that it gives in full."""
    encoder, lengths = tiny_network(norm, rotary=rotary, alibi=alibi), (40, 7, 7, 1)
    batch = PackedBatch(ids=torch.zeros(sum(lengths), dtype=torch.int64), lengths=lengths)
    x = torch.randn(sum(lengths), 24, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got, full = encoder(x, batch, layer, first_only=True), encoder(x, batch, layer)
    assert got.shape == (4, 24)
    torch.testing.assert_close(got, full[batch.starts], atol=2e-6, rtol=0)


def test_first_tokens_alone_are_less_work() -> None:
    """In the last block: the products of all tokens with the matrices of keys and values, and little else."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder, length, rows = tiny_network(), 64, 4
    batch = PackedBatch(ids=torch.zeros(rows * length, dtype=torch.int64), lengths=(length,) * rows)
    x = torch.randn(rows * length, 24)

    def count(layer: int, *, first_only: bool) -> int:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            encoder(x, batch, layer, first_only=first_only)
        return int(sum(counter.get_flop_counts()["Global"].values()))

    full, less = count(1, first_only=False), count(1, first_only=True)
    tokens, width, inner = rows * length, 24, 48
    linear = 2 * tokens * width * (4 * width + 2 * inner)
    assert full >= linear
    assert full - less >= 2 * (tokens - rows) * width * (2 * width + 2 * inner)  # queries, output, feed-forward
    assert count(3, first_only=True) - count(2, first_only=False) == less


@pytest.mark.parametrize("backend", [BY_BUCKET, FLEX], ids=["bucket", "flex"])
@pytest.mark.parametrize("family", ["geneformer-v2", "nt-v2", "dnabert2", "scgpt", "uce", "scfoundation"])
def test_golden_inputs_with_other_backends(family: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models give the vectors they give with the usual backend, which are those of the golden cases: pooled over all, or first."""
    case = Case(PORTABLE / f"{family}-basic")
    model = cf.load(family.removesuffix("-v2"), checkpoint=case.checkpoint, options=case.options, device="cpu", precision="float32")
    tokens = model.tokenize(next(path for stem in ("*.fasta", "*input*.h5ad") for path in sorted(case.path.glob(stem))))
    tokens = tokens.take(np.flatnonzero((tokens.lengths > 0) & (tokens.lengths < 1200))[:5])
    poolings = model.adapter.poolings[:2]  # type: ignore[attr-defined]
    expected = {pooling: model.encode_tokens(tokens, pooling=pooling) for pooling in poolings}
    used = []

    def kernel(*given: Any) -> Tensor:
        used.append(backend.name)
        return backend.kernel(*given)

    def forced(*_: Any, biased: bool, heads: int) -> Choice:
        return Choice(BY_ROW if biased and backend is BY_BUCKET else Backend(backend.name, kernel), "forced")

    monkeypatch.setattr(attention_module, "choose", forced)
    for pooling in poolings:
        got = model.encode_tokens(tokens, pooling=pooling)
        scale = np.abs(expected[pooling]).max()
        np.testing.assert_allclose(got, expected[pooling], atol=2e-6 * max(1, scale), rtol=0)
    assert used or (family == "dnabert2" and backend is BY_BUCKET)
