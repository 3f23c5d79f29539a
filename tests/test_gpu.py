"""On a CUDA device: every attention backend on every golden case, in every precision. Run with ``pytest -m gpu tests/test_gpu.py -s``."""

import copy
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cellfm_hub as cf
from benchmarks.common import CPU, Model, encoder_of, make_model, random_tokens
from benchmarks.fidelity import ROWS, compare
from cellfm_hub.engine.run import run_network
from cellfm_hub.nn import attention
from cellfm_hub.nn.attention import BY_BUCKET, BY_ROW, EFFICIENT, FLASH, FLEX, VARLEN, Backend, Choice, choose, preference, refusal
from cellfm_hub.registry import registry
from cellfm_hub.selftest import run_selftest
from golden_cases import DATA, LARGE, PORTABLE, Case

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
BACKENDS = (VARLEN, FLASH, EFFICIENT, FLEX, BY_BUCKET, BY_ROW)
PRECISIONS = ("float32", "float16", "bfloat16")
CENTRED_ERROR = {"float32": 1e-3, "float16": 0.2, "bfloat16": 1.0}
"""Beside what tells rows apart, at the median; networks of golden cases have random weights, which leave rows nearly alike."""


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    choose.cache_clear()
    yield
    choose.cache_clear()


def can_do(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, *, biased: bool, heads: int) -> bool:
    """Whether a backend takes ALiBi, where there is some, and gives the right numbers."""
    return (not biased or backend in (FLEX, BY_ROW)) and refusal(backend, device, dtype, head_dim, biased=biased, heads=heads) is None


def use_only(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a backend do what it can do, and count its uses; what it cannot is done by the usual one."""
    used: list[str] = []
    able = cache(can_do)

    def chosen(device: torch.device, dtype: torch.dtype, head_dim: int, *, biased: bool, heads: int) -> Choice:
        if able(backend, device, dtype, head_dim, biased=biased, heads=heads):
            used.append(backend.name)
            return Choice(backend, "forced")
        return choose(device, dtype, head_dim, biased=biased, heads=heads)

    monkeypatch.setattr(attention, "choose", chosen)
    return used


FAMILIES = sorted(name for name, card in registry().cards.items() if card.cellfm.selftests)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name.replace(" ", "-"))
@pytest.mark.parametrize("family", FAMILIES)
def test_selftest_with_every_backend(family: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden cases that ship with the package: float32 within the stated tolerance, half precision in direction."""
    used = use_only(backend, monkeypatch)
    compared = run_selftest(family, device=str(DEVICE))
    assert compared
    assert all(row.passed for row in compared), "\n".join(row.line() for row in compared)
    if not used:
        pytest.skip(f"{backend.name} can do nothing here")


def smallest_of_each_family() -> list[str]:
    """Return the checkpoints with the fewest parameters, of the families of which rows can be made up."""
    entries = sorted(registry().checkpoints.items(), key=lambda item: item[1].checkpoint.parameters or 0, reverse=True)
    return sorted({entry.family: name for name, entry in entries if entry.family in ROWS and entry.checkpoint.config}.values())


@lru_cache(maxsize=1)  # one backend after the other
def two_blocks(name: str) -> tuple[Model, torch.nn.Module]:
    """Make a published network with all but two of its blocks left out; return it, and its weights on the CPU."""
    model = make_model(name, cut_layers=2, cut_table=500)
    return model, model.adapter.network


SHAPE_ERROR = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.4}
"""Centred, at the median; random weights leave rows nearly alike."""


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name.replace(" ", "-"))
@pytest.mark.parametrize("name", smallest_of_each_family())
def test_published_shapes_with_every_backend(name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks with random weights and heads as wide as the published ones, which those of golden cases are not, against the CPU."""
    model, weights = two_blocks(name)
    config = encoder_of(weights).config
    model.adapter.network = weights
    tokens = random_tokens(model, np.array([40, 4, 17, 8, 17]))
    poolings = {model.pooling, *({"cls"} & set(model.adapter.poolings))}  # "cls": queries of first tokens alone
    with monkeypatch.context() as patch:
        use_only(BY_ROW, patch)
        expected = {pooling: model.run(tokens, CPU, 4096, layer=2, pooling=pooling) for pooling in poolings}
    used = use_only(backend, monkeypatch)
    for precision in PRECISIONS:
        dtype = getattr(torch, precision)
        if not can_do(backend, DEVICE, dtype, config.dim // config.heads, biased=config.alibi, heads=config.heads):
            continue
        model.adapter.network = copy.deepcopy(weights).to(DEVICE, dtype)
        for pooling in poolings:
            figures = compare(model.run(tokens, DEVICE, 64, layer=2, pooling=pooling), expected[pooling])
            assert figures["centred_error_median"] < SHAPE_ERROR[precision], (precision, pooling, figures)
    if not used:
        pytest.skip(f"{backend.name} can do nothing here")


PREFIXES = ("dnabert-s", "dnabert2", "geneformer", "nt", "scfoundation", "scgpt", "uce")


def model_of(case: Case) -> str:
    return next(name for name in PREFIXES if case.name.startswith(name))


def options_of(case: Case) -> dict[str, Any]:
    if model_of(case) == "geneformer" and not (case.checkpoint / "geneformer").exists():
        own = case.path / "dictionaries"
        return {"dictionaries": own if own.exists() else DATA / "geneformer"}
    return case.options


def golden() -> list[Any]:
    """Return the cases that the CPU can run whole, which is what is compared with."""
    found = [Case(path) for folder in (PORTABLE, LARGE) for path in sorted(folder.glob("*")) if (path / "checkpoint").exists()]
    return [pytest.param(case, id=f"{case.path.parent.name}-{case.name}") for case in found]


def data_of(case: Case) -> Path:
    names = ("input.h5ad", "human.h5ad", "input_human.h5ad", "sequences.fasta")
    return next((case.path / n for n in names if (case.path / n).exists()), next(iter(sorted(case.path.glob("*.h5ad"))), case.path))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", golden())
def test_cases_against_the_cpu(case: Case, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every golden input: the centred error against float32 on the CPU."""
    data = data_of(case)
    if data.is_dir():
        pytest.skip("no input of its own")
    options: dict[str, Any] = {"checkpoint": case.checkpoint, "options": options_of(case)}
    try:
        on_cpu = cf.load(model_of(case), device="cpu", precision="float32", **options)
        tokens = on_cpu.tokenize(data, long="truncate") if on_cpu.modality == "sequence" else on_cpu.tokenize(data)
    except cf.errors.CellFMError as error:
        pytest.skip(f"needs options of its own: {error}")
    with monkeypatch.context() as patch:
        use_only(BY_ROW, patch)
        expected = on_cpu.encode_tokens(tokens)
    there = ~np.isnan(expected).any(axis=1)
    expected = expected[there].astype(np.float64)
    model = cf.load(model_of(case), device=str(DEVICE), precision=precision, **options)  # type: ignore[arg-type]
    got = model.encode_tokens(tokens)
    assert np.isnan(got[~there]).any(axis=1).all()
    spread = np.linalg.norm(expected - expected.mean(axis=0), axis=1)
    error = np.linalg.norm(got[there] - expected, axis=1) / np.where(spread > 0, spread, 1)
    assert model.receipt is not None
    report = f"{case.name} {precision} {model.receipt['attention']}: centred error median {np.median(error):.1e}, largest {error.max():.1e}"
    print("\n" + report)  # noqa: T201, shown with -s
    assert np.median(error) < CENTRED_ERROR[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_preferred_backend_works(precision: str) -> None:
    """On an ordinary card nothing is refused: a refusal would cost speed and go unseen."""
    dtype = getattr(torch, precision)
    for biased in (False, True):
        choice = choose(DEVICE, dtype, 64, biased=biased)
        assert choice.backend is preference(DEVICE.type, dtype, biased=biased)[0], choice.rejected


def test_nothing_waits_for_the_device() -> None:
    """Batches are computed without a single synchronisation but the arrival of results."""
    case = Case(PORTABLE / "geneformer-v2-basic")
    model = cf.load("geneformer", checkpoint=case.checkpoint, device=str(DEVICE), precision="float16")
    tokens, adapter = model.tokenize(case.path / "input.h5ad"), model.adapter
    model.encode_tokens(tokens)  # kernels are chosen

    def forward(batch: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return adapter.row_vectors(batch, adapter.layers, "mean")  # type: ignore[attr-defined]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    got = run_network(forward, tokens, dim=model.embedding_dim, per_token=False, device=DEVICE, batch_tokens=128)
    assert np.isfinite(got[tokens.lengths > 0]).all()


def test_running_out_of_memory() -> None:
    """With a real lack of memory the vectors are those of small batches."""
    case = Case(PORTABLE / "geneformer-v2-basic")
    model = cf.load("geneformer", checkpoint=case.checkpoint, device=str(DEVICE), precision="float32")
    tokens = model.tokenize(case.path / "input.h5ad")
    tokens = tokens.take(np.tile(np.flatnonzero(tokens.lengths), 2000))
    expected = model.encode_tokens(tokens, batch_tokens=8192)
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(DEVICE) + 2**28
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info(DEVICE)[1], DEVICE)
    try:
        got = model.encode_tokens(tokens, batch_tokens=10**9)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=0)
