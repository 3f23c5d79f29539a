"""Half precision against float32, on random networks of published size; all shapes: `tests/benchmarks/fidelity.py`."""

import pytest

from benchmarks.fidelity import ROWS, measure
from cellfm_hub.registry import registry


@pytest.mark.parametrize("model", ["geneformer-v1-10m", "nt-v2-50m-multi-species"])
def test_bfloat16_stays_near_float32(model: str) -> None:
    """Every row keeps its direction."""
    figures = measure(model, ["bfloat16"], rows=8, longest=96)["bfloat16"]
    assert figures["cosine_min"] >= 0.999
    assert figures["centred_error_median"] < 1


@pytest.mark.parametrize("name", sorted(registry().checkpoints))
def test_published_figures_are_good_enough(name: str) -> None:
    """What a card states was measured to keep the promise, and is stated for every shape that was measured."""
    entry = registry().checkpoints[name]
    for precision, fidelity in entry.checkpoint.fidelity.items():
        assert fidelity.cosine_min >= 0.999, precision
    if entry.family in ROWS and entry.checkpoint.config:
        assert "bfloat16" in entry.checkpoint.fidelity
