"""The benchmark of CPUs is fair to those it compares with, and says what it times."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cpu
from benchmarks.common import padded_batches, padding
from benchmarks.cpu_tables import tables
from golden_cases import DATA, SHARED

SCRIPT = Path(cpu.__file__)
LENGTHS = np.random.default_rng(0).integers(1, 500, 300)


def test_a_careful_user_sorts_rows_and_fills_batches() -> None:
    batches = list(padded_batches(LENGTHS, budget=1000))
    rows = np.concatenate([index for index, _ in batches])
    assert sorted(rows) == list(range(len(LENGTHS)))
    assert (np.diff(LENGTHS[rows]) <= 0).all()
    for (index, padded), (following, _) in pairwise(batches):
        assert padded == LENGTHS[index].max()
        assert len(index) * padded <= 1000 < (len(index) + 1) * padded, "one more would not have fitted"
        assert LENGTHS[following].max() <= LENGTHS[index].min()
    assert padding(LENGTHS, budget=1000) < 1.05 < padding(LENGTHS, rows=10)


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert [index.tolist() for index, _ in padded_batches(np.array([3, 900, 2]), budget=10)] == [[1], [0, 2]]


def test_the_original_procedures_take_rows_as_they_come() -> None:
    batches = [(index.tolist(), padded) for index, padded in padded_batches(np.array([3, 7, 2, 65, 1]), rows=2, multiple=4)]
    assert batches == [([0, 1], 8), ([2, 3], 68), ([4], 4)]


@pytest.mark.parametrize(("longest", "batches"), [(2048, 4), (1200, 3), (2048, 2)])
def test_few_cells_are_padded_as_little_as_many(longest: int, batches: int) -> None:
    """All cells in one batch, padded to the longest, would be 1.3 to 1.6 times the tokens."""
    lengths = cpu.mixed_lengths(longest, batches, cpu.BUDGET)
    assert len(list(padded_batches(lengths, budget=cpu.BUDGET))) == batches
    assert padding(lengths, budget=cpu.BUDGET) < 1.02 < 1.2 < padding(lengths, rows=len(lengths))


def entries(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all that was measured, with where it stands."""
    single = {section: report[section] for section in ("tokenizers", "reading")}
    return single | report["encoders"] | report.get("files", {})


@pytest.mark.slow
def test_every_entry_says_what_is_timed_and_on_how_many_rows(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "cpu.json"
    has_files = (DATA / "scrna").is_dir()
    command = [sys.executable, SCRIPT, *([] if has_files else ["encoders", "tokenizers", "reading"]), "--smoke", "--json", out]
    environment = os.environ | {"CELLFM_SHARED": str(SHARED), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    for section in ("encoders", "tokenizers", "reading", *(["files"] if has_files else [])):
        measured = report["measured"][section]
        assert measured["machine"]["processor"], section
        assert {"python", "torch", "transformers", "cellfm-hub"} <= measured["versions"].keys(), section
    found = entries(report)
    assert len(found) == (10 if has_files else 5)
    for name, entry in found.items():
        assert len(entry["timed"]) > 40, name
        assert entry["rows"], name
        assert all(value > 0 for value in entry["ratios"].values()), name
    for place, floors in cpu.FLOORS.items():
        if place in found:
            assert floors.keys() <= found[place]["ratios"].keys(), place
    assert tables(report) in done.stdout
    rows = [line for line in tables(report).splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 3 + (2 + 5 if has_files else 0)  # head and rule, networks; head and rule, whole ways
