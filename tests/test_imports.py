"""What importing costs, and what is public."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cellfm_hub
import cellfm_hub.testing

HEAVY = {"torch", "anndata", "scanpy", "transformers", "pandas", "scipy", "sklearn", "numba", "h5py", "huggingface_hub"}
MODULES = [cellfm_hub, cellfm_hub.datasets, cellfm_hub.errors, cellfm_hub.pl, cellfm_hub.testing]
"""Modules whose functions people call."""


def imported_by(code: str, folder: Path) -> set[str]:
    """Return every module that a fresh process imports for a line of code."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "cellfm_hub" in names
    return names


def tops(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_import_is_light(tmp_path: Path) -> None:
    imported = imported_by("import cellfm_hub", tmp_path)
    assert tops(imported) & (HEAVY | {"numpy", "pydantic", "yaml", "typer"}) == set()


@pytest.mark.parametrize(
    "code",
    [
        "from cellfm_hub import list_models; assert list_models()",
        "from cellfm_hub import list_models; assert list_models(modality='cell', commercial=True)",
        "from cellfm_hub.registry import registry; registry().find('geneformer').info()",
        "from cellfm_hub import settings, errors, datasets",
    ],
)
def test_listing_is_light(code: str, tmp_path: Path) -> None:
    """Listing models imports no adapter, no torch, no anndata. (datasets, which returns arrays, needs numpy and scipy.)"""
    allowed = {"scipy"} if "datasets" in code else set()
    imported = imported_by(code, tmp_path)
    assert tops(imported) & (HEAVY - allowed) == set()
    assert {name for name in imported if name.startswith("cellfm_adapters")} == set()


@pytest.mark.parametrize("data", ["ad.AnnData(np.ones((2, 2)), var=dict(gene_ids=[LYZ, NKG7]))", "['ACGTACGTAC']"], ids=["cells", "dna"])
def test_loading_is_light(data: str, tmp_path: Path) -> None:
    """A second and more: torch's compiler, which drawing initial values of an embedding would load."""
    code = "import anndata as ad, cellfm_hub as cf, numpy as np; LYZ, NKG7 = 'ENSG00000090382', 'ENSG00000105374';"
    code += f" data = {data}; cf.load('demo-dna' if isinstance(data, list) else 'demo-cell', device='cpu').encode(data)"
    assert "torch._dynamo" not in imported_by(code, tmp_path)


def test_all_is_what_is_public() -> None:
    """`__all__` holds the names declared for type checkers, each resolves, and nothing public stands beside them."""
    assert cellfm_hub.__all__ == sorted(cellfm_hub.__all__)
    declared: set[str] = set()
    for node in ast.parse(Path(cellfm_hub.__file__).read_text()).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            declared |= {alias.name for statement in node.body for alias in statement.names}  # type: ignore[attr-defined]
    assert set(cellfm_hub.__all__) == declared
    for name in cellfm_hub.__all__:
        assert getattr(cellfm_hub, name) is not None
    public = {name for name, value in vars(cellfm_hub).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    assert public - {"TYPE_CHECKING", "Any"} <= set(cellfm_hub.__all__)
    assert dir(cellfm_hub) == sorted(cellfm_hub.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        cellfm_hub.embedd  # noqa: B018


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every function and method that people call; constructors of plain records are not among them."""
    for module in MODULES:
        names = (
            module.__all__
            if module is cellfm_hub
            else [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
        )
        for name in names:
            value = getattr(module, name)
            if name.startswith("_"):
                continue
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                for method, function in inspect.getmembers(value, callable):
                    home = getattr(inspect.unwrap(function), "__module__", "") or ""
                    if not method.startswith("_") and home.startswith("cellfm_hub"):
                        yield f"{module.__name__}.{name}.{method}", function


FUNCTIONS = dict(public_functions())


def test_functions_were_found() -> None:
    assert {"cellfm_hub.embed", "cellfm_hub.load", "cellfm_hub.list_models", "cellfm_hub.Embedder.encode"} < set(FUNCTIONS)
    assert {"cellfm_hub.Tokens.take", "cellfm_hub.datasets.pbmc700", "cellfm_hub.testing.check_cell_model"} < set(FUNCTIONS)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_signature(name: str) -> None:
    """At most three positional parameters; booleans only by keyword; every parameter and result has a type."""
    parameters = [p for p in inspect.signature(FUNCTIONS[name]).parameters.values() if p.name not in {"self", "cls"}]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    assert len(positional) <= 3, [p.name for p in positional]
    flags = [p.name for p in positional if isinstance(p.default, bool) or re.search(r"\bbool\b", str(p.annotation))]
    assert flags == []
    assert all(p.kind is not p.VAR_POSITIONAL for p in parameters)
    assert all(p.annotation is not p.empty for p in parameters)


def own_modules() -> list[str]:
    package = Path(cellfm_hub.__file__).parent
    found = [path.relative_to(package).with_suffix("") for path in package.rglob("*.py") if not path.name.startswith("__")]
    return sorted(".".join(("cellfm_hub", *path.parts)) for path in found)


@pytest.mark.parametrize("name", own_modules())
def test_every_module_imports_and_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, name
