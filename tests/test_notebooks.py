"""The notebooks: stored without outputs, and run from an installed wheel, as a reader has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="needs a checkout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs(path: Path) -> None:
    """Pictures and numbers belong to whoever runs it; in the repository they would only age."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_all_run_from_the_wheel(tmp_path: Path) -> None:
    """Every cell of every notebook runs, offline, each notebook in under a minute on an idle machine."""
    site, folder = tmp_path / "site", tmp_path / "notebooks"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site), str(ROOT)]
    subprocess.run(install, check=True, capture_output=True, text=True, cwd=tmp_path)
    folder.mkdir()
    for path in NOTEBOOKS:
        (folder / path.name).write_bytes(path.read_bytes())
    env = os.environ | {
        "PYTHONPATH": str(site),
        "CELLFM_OFFLINE": "1",
        "CELLFM_CACHE": str(tmp_path / "cache"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLBACKEND": "agg",
    }
    where = [sys.executable, "-c", "import cellfm_hub; print(cellfm_hub.__file__)"]
    assert str(site) in subprocess.run(where, check=True, capture_output=True, text=True, cwd=folder, env=env).stdout
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", "--nbmake-timeout=300", "--durations=0", str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=folder, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(NOTEBOOKS)} passed" in done.stdout
    print(done.stdout)  # noqa: T201 - the times of the notebooks, with -s
