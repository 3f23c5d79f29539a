"""Values that float16 cannot hold: computed again in bfloat16, said for every row, and nothing else is taken for it."""

import logging
import weakref
from collections.abc import Callable
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

import cellfm_hub as cf
from cellfm_hub import reading
from cellfm_hub.jobs import job as job_module
from cellfm_hub.jobs.job import Done, Wanted, open_job
from cellfm_hub.jobs.journal import Part
from cellfm_hub.jobs.workers import Workers, _Worker
from file_runs import CELLS, SCGPT, receipt, vectors, write_cells
from golden_cases import PORTABLE, Case

WARNING = "overflows in float16; computing in bfloat16"


def guarded(name: str, case: Case) -> cf.Embedder:
    """Load a model as ``precision="auto"`` does on CUDA."""
    model = cf.load(name, checkpoint=case.checkpoint, options=case.options, device="cpu", precision="float16")
    model._guard_overflow = True
    return model


def overflow_at(model: cf.Embedder, call: int) -> None:
    """Let the network overflow once, at its n-th batch."""
    network, seen = model.adapter.network, []  # type: ignore[attr-defined]
    forward = network.forward

    def overflows(*given: Any, **named: Any) -> torch.Tensor:
        seen.append(True)
        hidden: torch.Tensor = forward(*given, **named)
        return hidden * torch.inf if len(seen) == call else hidden

    network.forward = overflows


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read eight cells at a time."""
    monkeypatch.setattr(reading, "count_blocks", partial(reading.count_blocks, block_rows=8))


CASE = Case(SCGPT)


def test_a_receipt_tells_both(tmp_path: Path, small_blocks: None, caplog: pytest.LogCaptureFixture) -> None:
    """The first block stays in float16, the second overflows: rows of differing exactness stand in one matrix."""
    data = write_cells(tmp_path / "cells.h5ad", 24)
    model = guarded("scgpt", CASE)
    in_float16 = model.encode(data)
    assert model.receipt is not None
    assert model.receipt["precision"] == "float16"
    overflow_at(model, 2)
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        got = model.encode(data)
    assert caplog.text.count(WARNING) == 1
    assert model.receipt["precision"] == "float16+bfloat16"
    np.testing.assert_array_equal(got[:8], in_float16[:8])
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(model.encode(data)[8:], got[8:])  # from now on, all of it
    assert model.receipt["precision"] == "bfloat16"
    assert model.precision == "bfloat16"


def test_a_part_tells_both(tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a file holds several blocks."""
    data, out, load = write_cells(tmp_path / "cells.h5ad", 48), tmp_path / "out.npy", job_module.load

    def loading(*given: Any, **named: Any) -> cf.Embedder:
        model = load(*given, **named)
        model._guard_overflow = True
        overflow_at(model, 2)
        return model

    monkeypatch.setattr(job_module, "load", loading)
    cf.embed_file(data, "scgpt", out=out, part_rows=24, **CELLS | {"precision": "float16"})
    assert receipt(out, "scgpt")["precision"] == "float16+bfloat16"  # in the first part alone, whose first block it is
    assert np.isfinite(vectors(out, "scgpt")).all()


DEFINED_AS_NAN: list[tuple[str, str, dict[str, Any], Callable[[cf.Embedder], cf.Tokens]]] = [
    # a mean over no base; a cell whose tokens do not end in the two depths
    ("nt", "nt-v2-basic", {"pooling": "mean-bases"}, lambda model: cf.Tokens.from_lists([[3], model.tokenize(["ACGTACGTACGT"]).row(0)])),
    ("scfoundation", "scfoundation-basic", {}, lambda _model: cf.Tokens(ids=np.arange(6), offsets=[0, 6], values=np.ones(6))),
]


@pytest.mark.parametrize(("name", "case", "options", "tokens"), DEFINED_AS_NAN, ids=["nt", "scfoundation"])
def test_what_is_nan_by_definition_is_no_overflow(
    name: str,
    case: str,
    options: dict[str, Any],
    tokens: Callable[[cf.Embedder], cf.Tokens],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No model is loaded again for it."""
    model = guarded(name, Case(PORTABLE / case))
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        got = model.encode_tokens(tokens(model), **options)
    assert np.isnan(got[0]).any()
    assert WARNING not in caplog.text
    assert model.precision == "float16"


@pytest.mark.parametrize("level", ["cell", "gene"])
def test_single_tokens_and_pooled(tmp_path: Path, level: Any) -> None:
    """Both ways to read the network's states notice."""
    data = write_cells(tmp_path / "cells.h5ad", 6)
    model = guarded("scgpt", CASE)
    overflow_at(model, 1)
    got = model.encode(data, level=level)
    assert np.isfinite(got.values if isinstance(got, cf.Ragged) else got).all()
    assert model.precision == "bfloat16"


def test_a_network_of_its_own_for_single_genes(caplog: pytest.LogCaptureFixture) -> None:
    """scFoundation's gene vectors come from another sub-model, which is loaded anew and freed with the first."""
    case = Case(PORTABLE / "scfoundation-basic")
    model = guarded("scfoundation", case)
    tokens = model.tokenize(case.path / "input.h5ad").take([0, 1])
    model.encode_tokens(tokens, level="gene")
    network = model.adapter._gene_network  # type: ignore[attr-defined]
    network.decoder.norm.weight.data *= torch.inf
    freed = [weakref.ref(parameter) for parameter in network.parameters()]
    del network
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        got = model.encode_tokens(tokens, level="gene")
    assert WARNING in caplog.text
    assert np.isfinite(got.values).all()
    assert all(reference() is None for reference in freed)


def test_one_network_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them need not fit: the first is gone before the second is read."""
    model = guarded("scgpt", CASE)
    adapter_class = type(model.adapter)
    first = [weakref.ref(tensor) for tensor in model.adapter.network.parameters()]  # type: ignore[attr-defined]
    load, held = adapter_class.load, []

    def loading(*given: Any) -> Any:
        held.append(sum(reference() is not None for reference in first))
        return load(*given)

    monkeypatch.setattr(adapter_class, "load", loading)
    overflow_at(model, 1)
    model.encode(write_cells(tmp_path / "cells.h5ad", 6))
    assert held == [0]


# Several processes


def test_a_part_is_computed_in_what_another_process_turned_to(tmp_path: Path) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 24)
    spec = job_module.Spec(
        data,
        (job_module.ModelSpec("scgpt", "X_scgpt", Path(CELLS["checkpoint"]), None, {}),),
        precision="float16",
        seed=0,
        level=None,
        encode={},
        part_rows=8,
        shard=None,
        rows=None,
        folder=tmp_path,
        update=False,
        qc=False,
    )
    with open_job(spec, "cpu") as job:
        wanted = [Wanted(0), Wanted(1, overflowed=(0,)), Wanted(2)]
        parts = [done.part for done in job.compute(wanted)]
    assert [part.precisions for part in parts if part is not None] == [["float16"], ["bfloat16"], ["bfloat16"]]


def test_the_other_processes_are_told() -> None:
    """Parts that are not begun when one process overflows are computed in bfloat16 by all."""
    received: list[tuple[str, Wanted]] = []

    def work(name: str, pipe: Connection) -> None:
        with pipe:
            pipe.send(("next", None))
            while (wanted := pipe.recv()) is not None:
                received.append((name, wanted))
                overflows = name == "second" or 1 in wanted.overflowed
                precisions = ["float32", "float16+bfloat16" if overflows else "float16"]
                pipe.send(("done", Done(wanted, Part(wanted.number, "", "", 1, "", [], [], precisions))))
                pipe.send(("next", None))

    found, threads = [], []
    for name in ("first", "second"):
        pipe, theirs = Pipe()
        threads.append((Thread(target=work, args=(name, theirs), daemon=True), pipe))
        found.append(_Worker(name, None, pipe))  # type: ignore[arg-type]  # no process
    about = {"rows": 40, "models": [{"receipt": {"precision": "float32"}}, {"receipt": {"precision": "float16"}}]}
    for thread, _ in threads:
        thread.start()
    done = list(Workers(found, about).compute(Wanted(n) for n in range(40)))
    for thread, pipe in threads:
        pipe.send(None)
        thread.join(10)
    assert sorted(d.wanted.number for d in done) == list(range(40))
    assert {wanted.overflowed for _, wanted in received} == {(), (1,)}
    first_told = min(i for i, (_, wanted) in enumerate(received) if wanted.overflowed)
    assert all(wanted.overflowed == (1,) for _, wanted in received[first_told + 2 :])
