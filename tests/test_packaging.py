"""What is inside the wheel and the sdist, and whether the wheel works where it is installed."""

import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from cellfm_hub.registry import registry

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")


@dataclass(frozen=True)
class Built:
    """Names of the files inside, and the wheel itself."""

    wheel: Path
    in_wheel: set[str]
    in_sdist: set[str]


def run(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Run Python in a process of its own, with nothing but the given folder ahead of what is installed, and return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build the sdist from the checkout, and the wheel from the sdist, as a release does; nothing is fetched."""
    dist = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT), cwd=dist)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as tar:
        in_sdist = {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in tar if member.isfile()}
    return Built(wheel, in_wheel, in_sdist)


def sources() -> set[str]:
    """Every file of the two packages, below the checkout's top."""
    found = {path for folder in ("src/cellfm_hub", "adapters/cellfm_adapters") for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts and not path.suffix.startswith(".nb")}


def test_nothing_is_missing(built: Built) -> None:
    """Each package file and each card is in both archives; a new adapter folder needs no word in pyproject.toml."""
    expected = sources()
    families = [folder for folder in (ROOT / "adapters/cellfm_adapters").iterdir() if (folder / "__init__.py").is_file()]
    assert len(families) >= 3
    for family in families:
        assert f"adapters/cellfm_adapters/{family.name}/adapter.py" in expected
    assert {"src/cellfm_hub/py.typed", "adapters/cellfm_adapters/py.typed"} < expected
    assert expected - built.in_sdist == set()
    assert {name.partition("/")[2] for name in expected} - built.in_wheel == set()

    genes = {f"genes/data/{name}" for name in ("human.npz", "mouse.npz", "provenance.json", "LICENSE.md")}
    assert {f"cellfm_hub/{name}" for name in genes} - built.in_wheel == set()
    assert {f"src/cellfm_hub/{name}" for name in genes} - built.in_sdist == set()

    cards = {path.name for path in (ROOT / "model_cards").glob("*.md")}
    assert len(cards) >= 3
    assert {f"model_cards/{card}" for card in cards} - built.in_sdist == set()
    assert {f"cellfm_hub/model_cards/{card}" for card in cards} - built.in_wheel == set()

    beside = {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml", "tests/conftest.py"}
    assert {name for name in beside if (ROOT / name).is_file()} - built.in_sdist == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in built.in_wheel)


def test_nothing_else_is_inside(built: Built) -> None:
    """The wheel holds the two packages, the portable golden cases (for ``cellfm selftest``) and its own records: no tests, no data."""
    tops = {name.partition("/")[0] for name in built.in_wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cellfm_hub", "cellfm_adapters"}
    golden = {name for name in built.in_wheel if name.startswith("cellfm_hub/golden/")}
    cases = ROOT / "tests" / "golden"
    assert golden == {f"cellfm_hub/golden/{path.relative_to(cases).as_posix()}" for path in cases.rglob("*") if path.is_file()}
    shipped = {f"cellfm_hub/{path}" for entry in registry().checkpoints.values() if entry.is_shipped for path in entry.checkpoint.files}
    assert shipped <= built.in_wheel
    kinds = {PurePosixPath(name).suffix for name in built.in_wheel - golden - shipped if ".dist-info/" not in name}
    assert kinds <= {".py", ".md", ".typed", ".npz", ".json"}, kinds
    assert built.wheel.stat().st_size < 8_000_000
    # The sdist carries the golden cases of the tests, and nothing of the founders' folder.
    tops = {name.partition("/")[0] for name in built.in_sdist}
    assert not any("__pycache__" in name for name in built.in_sdist)
    assert "shared" not in tops


@pytest.fixture(scope="session")
def site(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a fresh folder; its dependencies are those of this environment."""
    target = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(built.wheel), cwd=target.parent)
    return target


def test_installed_wheel_lists_models(site: Path, tmp_path: Path) -> None:
    """`cellfm models` works from the installed wheel, in another directory, and knows every model of the checkout."""
    where = run("-c", "import cellfm_hub; print(cellfm_hub.__file__)", cwd=tmp_path, path=site)
    assert Path(where.strip()).is_relative_to(site)
    listed = run("-m", "cellfm_hub.cli", "models", "--json", cwd=tmp_path, path=site)
    from cellfm_hub import list_models

    for info in list_models():
        if info.package == "cellfm-hub":
            assert f'"{info.name}"' in listed, info.name
    shown = run("-m", "cellfm_hub.cli", "models", cwd=tmp_path, path=site)
    assert "kmer" in shown
    assert (site / "bin" / ("cellfm.exe" if os.name == "nt" else "cellfm")).is_file()


def test_installed_wheel_embeds(site: Path, tmp_path: Path) -> None:
    """An adapter of the installed wheel runs."""
    for model, shape in (("kmer", "(1, 256)"), ("demo-dna", "(1, 96)")):
        code = f"import cellfm_hub as cf; print(cf.embed(['ACGTACGT'], {model!r}).shape)"
        assert run("-c", code, cwd=tmp_path, path=site).strip() == shape


def test_installed_wheel_runs_the_demo_checkpoint(site: Path, tmp_path: Path) -> None:
    """Cells go through the shipped transformer with nothing but what the wheel holds."""
    code = "import cellfm_hub as cf; print(cf.load('demo-cell').encode(cf.datasets.pbmc700()[:20]).shape)"
    assert run("-c", code, cwd=tmp_path, path=site).strip() == "(20, 64)"
