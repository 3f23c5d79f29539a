"""A third party's package: built, installed and used, as a stranger would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent / "plugin_example"
CARD = EXAMPLE / "cellfm_plugin_example/model_cards/gc-content.md"


def python(*arguments: str, path: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with more folders to import from."""
    more = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": more}, cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of the example and install it into a folder of its own; nothing is fetched."""
    folder = tmp_path_factory.mktemp("plugin")
    dist, site = folder / "dist", folder / "site"
    built = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(EXAMPLE), path=[], cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = dist.glob("*.whl")
    done = python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), path=[], cwd=folder)
    assert done.returncode == 0, done.stderr
    return site


def fake_plugin(site: Path, name: str, cards: dict[str, str] | None = None) -> Path:
    """Write an installed package as pip would leave it. It must never be imported for a list of models."""
    package = site / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for card, text in (cards or {}).items():
        (package / "model_cards").mkdir(exist_ok=True)
        (package / "model_cards" / card).write_text(text)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cellfm_hub.adapters]\n{name} = {name}\n")
    return site


LIST = """
import json, sys, warnings
import cellfm_hub as cf
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    models = cf.list_models()
print(json.dumps({
    "packages": {m.name: m.package for m in models},
    "imported": [m for m in sys.modules if m.partition(".")[0] in ("cellfm_plugin_example", "cellfm_adapters", "no_cards")],
    "said": [str(w.message) for w in said],
}))
"""


def test_listed_without_import(installed: Path, tmp_path: Path) -> None:
    done = python("-c", LIST, path=[installed], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert listed["packages"]["gc-content"] == "cellfm-plugin-example"
    assert listed["packages"]["kmer"] == "cellfm-hub"
    assert listed["imported"] == []
    assert listed["said"] == []


def test_own_tests_pass(installed: Path) -> None:
    """The example's own tests, with the contract suite, pass against the installed wheel."""
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", path=[installed], cwd=EXAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_embed(installed: Path, tmp_path: Path) -> None:
    code = "import cellfm_hub as cf; print(cf.embed(['ACGTCGCGTT', 'TTTTAAGGCA'], 'gc-content').tolist())"
    done = python("-c", code, path=[installed], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (a, b) = json.loads(done.stdout)
    assert a == pytest.approx([0.6, 3 * 10 / 9, 10])
    assert b == pytest.approx([0.3, 0, 10])


def test_without_cards(installed: Path, tmp_path: Path) -> None:
    """A plug-in without cards costs one warning and nothing else."""
    done = python("-c", LIST, path=[installed, fake_plugin(tmp_path / "site", "no_cards")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert {"gc-content", "kmer"} < set(listed["packages"])
    assert listed["imported"] == []
    assert len(listed["said"]) == 1
    assert "'no_cards'" in listed["said"][0]
    assert "no model_cards folder" in listed["said"][0]


@pytest.mark.parametrize("card", ["gc-content.md", "another-name.md"])
def test_one_name_claimed_twice(installed: Path, tmp_path: Path, card: str) -> None:
    """Two cards with one model's name are an error that names both packages, whether the family's name is the same or not."""
    rival = fake_plugin(tmp_path / "site", "rival", {card: CARD.read_text()})
    done = python("-c", LIST, path=[installed, rival], cwd=tmp_path)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert "'gc-content'" in error
    assert "cellfm-plugin-example" in error
    assert "rival" in error
