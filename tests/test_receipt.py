"""What a result says of itself."""

import importlib.metadata
import re
from pathlib import Path

import pytest

import cellfm_hub as cf
from cellfm_hub.receipt import versions


def test_a_checkout_that_is_not_installed_writes_receipts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no metadata of a package to ask for its version."""

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", unknown)
    vectors = cf.load("kmer", device="cpu")
    vectors.encode(["ACGTACGT"])
    assert vectors.receipt is not None
    assert vectors.receipt["cellfm_hub_version"] == versions()["cellfm_hub_version"] == cf.__version__


def test_the_version_is_that_of_the_package() -> None:
    """One place says it; the wheel and the citation agree."""
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", cf.__version__)
    assert importlib.metadata.version("cellfm-hub") == cf.__version__
    citation = Path(__file__).parents[1] / "CITATION.cff"
    assert f"version: {cf.__version__}" in citation.read_text(encoding="utf-8").splitlines()
