"""What the README says is so."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import cellfm_hub as cf
from cellfm_hub.registry import markdown_table, weights_table

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "make"), [("models", markdown_table), ("weights", weights_table)])
def test_tables(name: str, make: Callable[[], str]) -> None:
    """The tables are those made from the cards."""
    table = re.search(rf"<!-- {name}: .*?-->\n(.*?)\n<!-- end of {name} -->", README, re.DOTALL)
    assert table is not None
    assert table[1] == make()


@pytest.mark.parametrize("name", sorted(set(re.findall(r'(?:embed|load)\([^)]*?"([a-z0-9.-]+)"', README))))
def test_names_in_examples(name: str) -> None:
    """Every model that an example names exists."""
    if not name.endswith((".fa", ".h5ad")):
        assert cf.list_models(family=cf.load.__globals__["registry"]().find(name).family)


def test_promised_attributes() -> None:
    """Every method that the examples call on a loaded model exists."""
    for method in set(re.findall(r"^m\.(\w+)", README, re.MULTILINE)):
        assert hasattr(cf.Embedder, method) or method == "receipt"
