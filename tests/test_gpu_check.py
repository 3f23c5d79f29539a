"""The GPU check, which runs on machines that are lent by the minute, runs to its end: every stage on the CPU, on tiny networks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")  # what the hub is compared with

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu_check.sh"
CUDA_ONLY = ("torch varlen_attn", "aten flash attention", "aten efficient attention")
NO_FACTS = {"device", "torch", "stage", "seconds"}
"""What every report holds besides its findings."""


def run_part(part: str, out: Path) -> str:
    """Run one of the three parts on the CPU; return what it printed."""
    own = {"OUT": str(out), "DEVICE": "cpu", "PYTHON": sys.executable, "WORKERS": "1", "PATIENCE": "20", "TMPDIR": str(out.parent)}
    done = subprocess.run(["bash", SCRIPT, part], env=os.environ | own, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout, done.stdout
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout


def findings(out: Path, stage: str) -> dict[str, Any]:
    """Return what a stage wrote."""
    report: dict[str, Any] = json.loads((out / f"{stage}.json").read_text())
    assert report["stage"] == stage
    assert report["device"] == "cpu"
    return {name: found for name, found in report.items() if name not in NO_FACTS}


def test_is_it_right(tmp_path: Path) -> None:
    printed = run_part("1", tmp_path / "out")
    assert "skipped" in printed  # the GPU tests, for want of a GPU
    found = findings(tmp_path / "out", "correct")
    assert len(found.pop("chosen")) == 6
    for name, errors in found.pop("errors").items():
        if name.startswith(CUDA_ONLY):
            assert "NotImplementedError" in errors, name
        else:
            assert errors["repeat"] == errors["alone vs company"] == 0, name
            assert max(errors["all"], errors["first"]) < (1e-5 if "float32" in name else 0.05), name
    assert list(found) == gpu_check.MODELS["correct"].split(",")
    for name, of_model in found.items():
        assert of_model["float32"]["centred_error_p99"] < 1e-4, name
        for dtype in ("torch.float16", "torch.bfloat16"):
            assert of_model[dtype]["cosine_min"] > 0.98, name
            assert of_model[dtype]["centred_error_median"] < 0.5, name
            assert of_model[dtype]["alone"] < 0.02, name


def test_how_fast_is_it(tmp_path: Path) -> None:
    run_part("2", tmp_path / "out")
    found = findings(tmp_path / "out", "encoders")
    assert found.pop("peak") > 0
    assert len(found) == 7
    for name, of_model in found.items():
        assert of_model["bad"] == {}, name
        assert len(of_model["variants"]) == 4, name
        assert all(variant["tok/s"] > 0 for variant in of_model["variants"].values()), name
    found = findings(tmp_path / "out", "profile")
    assert list(found) == gpu_check.MODELS["profile"].split(",")
    for name, of_model in found.items():
        assert of_model["wall ms"] > 0, name
        assert of_model["host ms to queue a forward"] > 0, name
        assert of_model["top"], name


def test_what_is_left(tmp_path: Path) -> None:
    run_part("3", tmp_path / "out")
    assert findings(tmp_path / "out", "oom") == {"skipped": True}
    found = findings(tmp_path / "out", "ideas")
    assert len(found) == 2 + 3 + 6 + 4  # poolings, pointwise operations, linear layers, attention
    for name, figures in found.items():
        for what, value in figures.items():
            if what.startswith(CUDA_ONLY):
                assert "NotImplementedError" in value, name
            elif what in ("two-level", "_addmm_activation ms"):
                assert math.isnan(value), name  # rows too short for pieces; an operator of CUDA alone
            else:
                assert math.isfinite(value), (name, what)
                assert value > 0, (name, what)
