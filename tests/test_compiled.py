"""Kernels that different processes compiled into one cache work together in a third."""

import os
import subprocess
import sys
from pathlib import Path

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
