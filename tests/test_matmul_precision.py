"""Whatever a process has set for its matrix products, vectors are computed exactly, and what was set is set again afterwards."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch

import cellfm_hub as cf
from cellfm_hub import cost
from cellfm_hub.engine import device as device_module
from cellfm_hub.engine.run import run_network
from cellfm_hub.nn import PackedBatch
from cellfm_hub.nn import attention as attention_module
from cellfm_hub.nn.attention import BY_ROW, Backend, choose
from cellfm_hub.nn.kernels import plain
from cellfm_hub.nn.matmul_precision import exact_products
from cellfm_hub.tokens import Tokens
from golden_cases import PORTABLE, Case

CUDA, ONEDNN, ALL = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None), torch.backends
NEW = hasattr(CUDA, "fp32_precision")  # torch >= 2.9


def of(switch: Any, value: str) -> Callable[[], None]:
    return lambda: setattr(switch, "fp32_precision", value)


SETTINGS: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(CUDA, "allow_tf32", True),
}
if NEW:
    SETTINGS |= {
        "cuda tf32": of(CUDA, "tf32"),
        "cuda ieee": of(CUDA, "ieee"),
        "all tf32": of(ALL, "tf32"),
        "all ieee": of(ALL, "ieee"),
        "cudnn tf32": of(torch.backends.cudnn, "tf32"),
        "onednn bf16": of(ONEDNN, "bf16"),
        "onednn tf32": of(ONEDNN, "tf32"),
    }
COMBINATIONS = [(), *itertools.combinations(SETTINGS, 1), *itertools.permutations(SETTINGS, 2)]


def reset() -> None:
    """Back to torch's defaults."""
    if NEW:
        for switch in (ALL, torch.backends.cudnn, CUDA, ONEDNN):
            switch.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    CUDA.allow_fp16_reduced_precision_reduction = CUDA.allow_bf16_reduced_precision_reduction = True
    if hasattr(CUDA, "allow_fp16_accumulation"):
        CUDA.allow_fp16_accumulation = False
    if NEW:
        CUDA.fp32_precision = ONEDNN.fp32_precision = "none"


@pytest.fixture(autouse=True)
def _set_back() -> Iterator[None]:
    reset()
    yield
    reset()


def read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:
        return "cannot be read"  # old and new switches contradict each other


def state() -> dict[str, Any]:
    """Everything that can be read."""
    found = {"of all": read(torch.get_float32_matmul_precision), "allow_tf32": read(lambda: CUDA.allow_tf32)}
    if NEW:
        found |= {"cuda": CUDA.fp32_precision, "onednn": ONEDNN.fp32_precision, "generic": ALL.fp32_precision}
    return found | {name: getattr(CUDA, name, None) for name in SUMS}


SUMS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction_split_k",
    "allow_bf16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction_split_k",
    "allow_fp16_accumulation",
)


def assert_exact() -> None:
    assert torch.get_float32_matmul_precision() == "highest"  # what the compiler reads
    assert CUDA.allow_tf32 is False
    if NEW:
        assert CUDA.fp32_precision == ONEDNN.fp32_precision == "ieee"
    assert not CUDA.allow_fp16_reduced_precision_reduction
    assert not CUDA.allow_bf16_reduced_precision_reduction
    assert not getattr(CUDA, "allow_fp16_accumulation", False)
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: " + ".join(names) or "nothing")
def test_exact_within_and_as_before_afterwards(names: tuple[str, ...]) -> None:
    """All switches, one or two of them, in both orders."""
    for name in names:
        SETTINGS[name]()
    before = state()
    with exact_products():
        assert_exact()
    assert state() == before
    with pytest.raises(KeyError), exact_products():
        raise KeyError
    assert state() == before


@pytest.mark.skipif(not NEW, reason="torch >= 2.9")
@pytest.mark.parametrize("value", ["tf32", "none", "ieee"])
def test_what_was_inherited_still_is(value: str) -> None:
    """A switch that nobody has set follows the one above it, as before."""
    ALL.fp32_precision = value
    with exact_products():
        pass
    for other in ("ieee", "tf32", "none"):
        ALL.fp32_precision = other
        assert CUDA.fp32_precision == ONEDNN.fp32_precision == other


def test_sums_of_half_precision_are_set_back() -> None:
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        setattr(CUDA, name, (False, False) if hasattr(CUDA, f"{name}_split_k") else False)
    if hasattr(CUDA, "allow_fp16_accumulation"):
        CUDA.allow_fp16_accumulation = True
    before = state()
    with exact_products():
        assert_exact()
    assert state() == before


MODEL = Case(PORTABLE / "geneformer-v2-basic")


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    reset()
    return cf.load("geneformer", checkpoint=MODEL.checkpoint, device="cpu", precision="float32").encode(MODEL.path / "input.h5ad")


@pytest.mark.parametrize("name", ["cuda tf32", "all tf32", "onednn bf16", "high", "medium"])
def test_encode_whatever_is_set(name: str, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and embedding: the same vectors, bit for bit, with exact products inside the forward."""
    if name not in SETTINGS:
        pytest.skip("torch >= 2.9")
    SETTINGS[name]()
    before, seen = state(), []
    model = cf.load("geneformer", checkpoint=MODEL.checkpoint, device="cpu", precision="float32")
    forward = model.adapter.network.forward  # type: ignore[attr-defined]

    def watched(*given: Any, **named: Any) -> torch.Tensor:
        assert_exact()
        seen.append(True)
        return forward(*given, **named)

    monkeypatch.setattr(model.adapter.network, "forward", watched)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(model.encode(MODEL.path / "input.h5ad"), expected)
    assert seen
    assert state() == before


def test_encode_inside_autocast(expected: np.ndarray) -> None:
    """A receipt that says float32 means it."""
    model = cf.load("geneformer", checkpoint=MODEL.checkpoint, device="cpu", precision="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.encode(MODEL.path / "input.h5ad")
        assert torch.is_autocast_enabled("cpu")
    np.testing.assert_array_equal(got, expected)


def test_uce_projects_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed outside of the network's forward, too."""
    case = Case(PORTABLE / "uce-basic")
    SETTINGS["high"]()
    model, seen = cf.load("uce", checkpoint=case.checkpoint, options=case.options, device="cpu", precision="float32"), []
    project = model.adapter.network.project  # type: ignore[attr-defined]

    def watched(rows: torch.Tensor) -> torch.Tensor:
        assert_exact()
        seen.append(True)
        projected: torch.Tensor = project(rows)
        return projected

    monkeypatch.setattr(model.adapter.network, "project", watched)  # type: ignore[attr-defined]
    model.encode(ad.read_h5ad(case.path / "input.h5ad"))
    assert seen


def test_probes_are_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is right must not be refused because what it is compared with was not exact; nor may speeds be those of TF32."""
    SETTINGS["high"]()
    seen = []

    def watched(*given: Any) -> torch.Tensor:
        assert_exact()
        seen.append("backend")
        return plain(*given)

    monkeypatch.setattr(attention_module, "preference", lambda *_, **__: (Backend("watched", watched), BY_ROW))
    choose.cache_clear()
    choice = choose(torch.device("cpu"), torch.float32, 8, biased=False)
    choose.cache_clear()
    assert choice.backend.name == "watched", choice.rejected
    product, linear = torch.mm, torch.nn.functional.linear

    def mm(*given: torch.Tensor) -> torch.Tensor:
        assert_exact()
        seen.append("speed")
        return product(*given)

    def watched_linear(*given: torch.Tensor) -> torch.Tensor:
        assert_exact()
        seen.append("speed-up")
        return linear(*given)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.nn.functional, "linear", watched_linear)
    cost.probe.__wrapped__(torch.device("cpu"), torch.float32)
    device_module.bfloat16_speed_up.__wrapped__()
    assert set(seen) == {"backend", "speed", "speed-up"}


def test_the_engine_computes_exactly() -> None:
    """Any network, not only those that are shipped."""
    SETTINGS["high"]()

    def forward(batch: PackedBatch) -> torch.Tensor:
        assert_exact()
        return torch.ones(len(batch.lengths), 2)

    tokens = Tokens.from_lists([[1, 2, 3], [4]])
    assert run_network(forward, tokens, dim=2, per_token=False, device=torch.device("cpu"), batch_tokens=8).tolist() == [[1, 1], [1, 1]]
