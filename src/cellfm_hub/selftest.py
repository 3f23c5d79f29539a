"""Compare this machine's numbers with those of the original code: what ``cellfm selftest`` does."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellfm_hub._settings import settings
from cellfm_hub.api import load
from cellfm_hub.blocks import Vectors
from cellfm_hub.cards import Recorded, SelfTest
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.embedder import Embedder
from cellfm_hub.engine.device import choose_device
from cellfm_hub.errors import DeviceError, InputError
from cellfm_hub.registry import Entry, registry
from cellfm_hub.tokens import Tokens

RECORDED_ATOL = 1e-4
"""Recorded on other machines and versions of torch, which are said to agree to about 1e-5."""


@dataclass(frozen=True)
class Comparison:
    """One expected array against what this machine computes."""

    precision: str
    case: str
    expected: str
    max_error: float
    lowest_cosine: float
    """Of the worst row."""
    passed: bool

    def line(self) -> str:
        """Return it as a line of a table."""
        verdict = "ok" if self.passed else "FAILS"
        text = f"largest error {self.max_error:.1e}, lowest cosine {self.lowest_cosine:.6f}"
        return f"{self.precision:<9} {self.case:<22} {self.expected:<34} {text}  {verdict}"


HALF_PRECISION_COSINE = 0.99
"""Bound for half precision, for which the golden cases state no tolerance. Rounding alone leaves 0.998 at worst (a homopolymer, in which
the same rounding error meets every token and does not average out); a broken kernel leaves far less."""


def golden_folder() -> Path:
    """Return the folder of the golden cases: inside the package, or (editable install) in the tests of the checkout."""
    package = Path(__file__).parent
    inside = package / "golden"
    return inside if inside.is_dir() else package.parents[1] / "tests" / "golden"


def run_selftest(model: str, *, device: str = "auto", precisions: Sequence[str] | None = None) -> list[Comparison]:
    """Run the golden cases of a model's family and, where its published weights are here, the vectors recorded with them.

    Parameters
    ----------
    model
        A family or checkpoint.
    device
        As for :func:`cellfm_hub.load`.
    precisions
        Default: float32, bfloat16 and, on CUDA and MPS, float16.

    Raises
    ------
    InputError
        If the family has no golden case.
    """
    entry = registry().find(model)
    family = entry.card.cellfm
    if not family.selftests:
        msg = f"{entry.family} has no golden cases; those that do: "
        msg += ", ".join(name for name, card in registry().cards.items() if card.cellfm.selftests)
        raise InputError(msg)
    chosen = choose_device(device)
    names = list(precisions or ["float32", "bfloat16", *(["float16"] if chosen.type != "cpu" else [])])
    rows = []
    level = logging.getLogger("cellfm_hub").level
    logging.getLogger("cellfm_hub").setLevel(logging.ERROR)  # cases hold odd cells on purpose
    try:
        for precision in names:
            loaded: dict[str, Embedder] = {}
            for test in family.selftests:
                try:
                    rows.append(_run_case(entry, test, str(chosen), precision, loaded))
                except DeviceError:
                    if precisions is not None:
                        raise
    finally:
        logging.getLogger("cellfm_hub").setLevel(level)
    if family.recorded is not None and (vectors := [v for v in family.recorded.vectors if v.checkpoint == entry.name]):
        rows += _run_recorded(entry, vectors, str(chosen))
    return rows


def _run_case(entry: Entry, test: SelfTest, device: str, precision: str, loaded: dict[str, Embedder]) -> Comparison:
    folder = golden_folder() / test.case
    key = f"{test.case} {test.options}"
    if key not in loaded:
        loaded[key] = load(
            entry.name,
            checkpoint=folder / "checkpoint",
            device=device,
            precision=precision,  # type: ignore[arg-type]  # a wrong one is refused by name
            options=dict(test.options),
        )
    embedder = loaded[key]
    options: dict[str, Any] = {**test.encode, "progress": False}
    got: Vectors
    if test.tokens is not None:
        ids, lengths = (np.load(folder / name, allow_pickle=False) for name in test.tokens)
        del options["progress"]
        got = embedder.encode_tokens(Tokens.from_lists([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]), **options)
    else:
        got = embedder.encode(folder / test.input, **options)
    tolerance = json.loads((folder / "case.json").read_text())["tolerance"]
    atol = tolerance.get("atol", tolerance.get("float32_abs"))
    return _compare(precision, test.case, test.expected, got, np.load(folder / test.expected, allow_pickle=False), atol, tolerance)


def _compare(precision: str, case: str, name: str, got: Vectors, expected: Vectors, atol: float, tolerance: dict[str, Any]) -> Comparison:
    known = ~np.isnan(expected)
    error = np.abs(got - expected, where=known, out=np.zeros(expected.shape))
    rows = np.atleast_2d(expected)
    there = ~np.isnan(rows).any(axis=1)
    mine, theirs = np.atleast_2d(got)[there].astype(np.float64), rows[there].astype(np.float64)
    cosine = (mine * theirs).sum(axis=1) / (np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1))
    lowest = float(cosine.min(initial=1.0))
    if not np.array_equal(np.isnan(got), ~known):  # a row without a vector is one on both sides
        passed = False
    elif precision == "float32":
        allowed = atol + float(tolerance.get("rtol", 0.0)) * np.abs(np.where(known, expected, 0.0))
        passed = bool((error <= allowed).all())
    else:
        passed = lowest >= HALF_PRECISION_COSINE
    return Comparison(precision, case, name, float(error.max(initial=0.0)), lowest, passed)


def _run_recorded(entry: Entry, vectors: Sequence[Recorded], device: str) -> list[Comparison]:
    """Compare with what was recorded of the published weights, if those are on this machine; nothing is fetched for it."""
    if len(CheckpointFiles(entry).at_hand()) < len(entry.checkpoint.files):
        return []
    with settings.override(offline=True):
        embedder = load(entry.name, device=device, precision="float32")
    rows = []
    for vector in vectors:
        got = embedder.encode([vector.sequence], pooling=vector.pooling, progress=False)[0, : len(vector.first)]
        expected = np.array(vector.first, dtype=np.float32)
        rows.append(
            _compare("float32", "published weights", f"{vector.pooling} of {vector.sequence[:18]}", got, expected, RECORDED_ATOL, {})
        )
    return rows
