"""Kernels that different processes compiled into one cache work together in a third."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cellfm_hub as cf

PACKAGES = (Path(cf.__file__).parent, Path(cf.__file__).parents[2] / "adapters" / "cellfm_adapters")
OF_NUMBA = {"sort", "median", "nanmedian", "partition", "argpartition", "percentile", "quantile", "nanpercentile", "nanquantile", "unique"}
"""Functions of numpy for which numba makes sorting helpers that share names with those of ``np.argsort``."""

KERNELS = {
    "recovery": "from cellfm_hub.sources.recovery import recognise as look",
    "rounded": "from cellfm_hub.sources.rounded import recognise_gaps as look",
}
DATA = "import numpy as np, scipy.sparse as sp; x = np.random.default_rng(0).poisson(1, (40, 60)) * 1.0; x[:, 0] = 7; s = sp.csr_matrix(x)"


def run(program: str, cache: Path) -> str:
    """Run a program; numba keeps what it compiles in a folder."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_kernels_of_several_processes(tmp_path: Path) -> None:
    """numba names helpers of its own by a count of the process: two of one name would take each other's place."""
    alone = {name: run(f"{DATA}\n{kernel}\nprint(look(s * 0.7))", tmp_path / "cache") for name, kernel in KERNELS.items()}
    for order in (list(KERNELS), list(KERNELS)[::-1]):
        program = DATA + "".join(f"\n{KERNELS[name]}\nprint(look(s * 0.7))" for name in order)
        assert run(program, tmp_path / "cache") == "".join(alone[name] for name in order)


def compiled_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in (path for package in PACKAGES for path in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(isinstance(d, ast.Name) and d.id == "compiled" for d in node.decorator_list):
                yield f"{path.name}:{node.name}", node


def test_kernels_sort_in_one_way() -> None:
    found = dict(compiled_functions())
    assert {"rounded.py:_distinct", "recovery.py:_recover_rows", "kernels.py:sort_row"} <= set(found)
    for name, function in found.items():
        called = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
        assert called.isdisjoint(OF_NUMBA), name
