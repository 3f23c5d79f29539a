"""Half precision against float32, on random networks of published size; all shapes: `tests/benchmarks/fidelity.py`."""

import pytest

from benchmarks.fidelity import ROWS, measure
from cellfm_hub.registry import Entry, registry


@pytest.mark.parametrize("model", ["geneformer-v1-10m", "nt-v2-50m-multi-species"])
def test_bfloat16_stays_near_float32(model: str) -> None:
    """Every row keeps its direction."""
    figures = measure(model, ["bfloat16"], rows=8, longest=96)["bfloat16"]
    assert figures["cosine_min"] >= 0.999
    assert figures["centred_error_median"] < 1


MEASURED = [entry for entry in registry().checkpoints.values() if entry.family in ROWS and entry.checkpoint.config]


def test_every_family_with_rows_was_measured() -> None:
    assert {entry.family for entry in MEASURED} == set(ROWS)


@pytest.mark.parametrize("entry", MEASURED, ids=lambda entry: entry.name)
def test_published_figures_are_good_enough(entry: Entry) -> None:
    """What a card states was measured to keep the promise, and is stated for every shape that was measured."""
    assert "bfloat16" in entry.checkpoint.fidelity
    for precision, fidelity in entry.checkpoint.fidelity.items():
        assert 0.999 <= fidelity.cosine_min < 1, precision
        assert fidelity.centred_error_p99 is None or 0 < fidelity.centred_error_p99 < 1, precision


@pytest.mark.parametrize("entry", registry().checkpoints.values(), ids=lambda entry: entry.name)
def test_figures_are_stated_for_networks_only(entry: Entry) -> None:
    """And of none that was not measured."""
    if entry not in MEASURED:
        assert not entry.checkpoint.fidelity
