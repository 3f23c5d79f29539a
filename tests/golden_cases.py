"""Golden cases: numbers computed by the original code, in ``tests/golden`` (portable) and ``../shared/golden`` (large).

Numbers are compared as the case states; nothing here loosens a tolerance.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import cellfm_hub as cf
from cellfm_hub.sources.sequences import read_fasta

PORTABLE = Path(__file__).parent / "golden"
SHARED = Path(os.environ.get("CELLFM_SHARED", Path(__file__).parents[2] / "shared"))
LARGE = SHARED / "golden"
DATA = SHARED / "data"


@dataclass(frozen=True)
class Case:
    """One golden case."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def facts(self) -> dict[str, Any]:
        """``case.json``."""
        facts: dict[str, Any] = json.loads((self.path / "case.json").read_text())
        return facts

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def options(self) -> dict[str, Any]:
        """Switches without which the checkpoint cannot be loaded: the weights of UCE do not show the number of heads."""
        return {"nhead": self.facts["parameters"]["nhead"]} if self.facts.get("model") == "uce" else {}

    def array(self, name: str) -> NDArray[Any]:
        return np.load(self.path / name, allow_pickle=False)

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def assert_close(self, got: NDArray[np.float32], expected: NDArray[np.float32], what: str = "") -> None:
        """Compare within the tolerance that the case states; NaN rows must be NaN rows."""
        tolerance = self.facts["tolerance"]
        atol = next(tolerance[key] for key in ("atol", "float32_abs", "fp32_cpu_abs") if key in tolerance)
        np.testing.assert_allclose(got, expected, atol=atol, rtol=tolerance.get("rtol", 0.0), err_msg=f"{self.name} {what}")


def cases(prefix: str) -> list[Any]:
    """Return every case of a family as pytest parameters: the portable ones, and the large ones where they are."""
    found = [("portable", path) for path in sorted(PORTABLE.glob(f"{prefix}*"))]
    found += [("large", path) for path in sorted(LARGE.glob(f"{prefix}*"))]
    return [pytest.param(Case(path), id=f"{kind}-{path.name}") for kind, path in found]


def check_sequence_tokens(case: Case, model: cf.Embedder, **options: Any) -> None:
    """Compare the token ids of every sequence of a case with the original's."""
    fasta, expected = case.path / "sequences.fasta", case.json("expected_tokens.json")
    tokens, names = model.tokenize(fasta, **options), [name for name, _ in read_fasta(fasta)]
    assert sorted(names) == sorted(expected)
    for row, name in enumerate(names):
        entry = expected[name]
        assert tokens.row(row).tolist() == (entry["input_ids"] if isinstance(entry, dict) else entry), name


def check_sequence_embeddings(case: Case, model: cf.Embedder, **options: Any) -> None:
    """Compare every pooling of every layer that a case holds."""
    paths = sorted(case.path.glob("expected_*_layer*.npy"))
    assert paths
    for path in paths:
        match = re.fullmatch(r"expected_(cls|mean|max)_layer(\d+)", path.stem)
        assert match is not None, path.name
        got = model.encode(case.path / "sequences.fasta", pooling=match[1], output_layer=int(match[2]), **options)
        case.assert_close(got, case.array(path.name), path.name)


def hidden_states(case: Case) -> Iterator[tuple[int, int, NDArray[np.float32], str]]:
    """Give the row, the layer and the expected vectors of the tokens of every sequence whose hidden states a case holds."""
    names = [name for name, _ in read_fasta(case.path / "sequences.fasta")]
    paths = sorted(case.path.glob("expected_hidden_*.npy"))
    assert paths
    for path in paths:
        row = names.index(path.stem.removeprefix("expected_hidden_"))
        for layer, expected in enumerate(case.array(path.name)):
            yield row, layer, expected, f"{path.name} layer {layer}"
