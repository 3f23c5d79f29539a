"""The miniature checkpoints that ship with the package, and ``cellfm demo``."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cellfm_hub as cf
from benchmarks import demo_quality
from cellfm_hub import cache
from cellfm_hub import registry as registry_module
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.cli import app
from cellfm_hub.demo import neighbour_scores
from cellfm_hub.demo_checkpoints import train_cell, train_dna, training
from cellfm_hub.errors import CheckpointError, ChecksumError, InputError, OutputError
from cellfm_hub.registry import registry

CARD = registry_module._own_cards() / "demo.md"
RESULT = json.loads(demo_quality.RESULTS.read_text()) if demo_quality.RESULTS.is_file() else None
LIMITS = {"demo-cell": 4_000_000, "demo-dna": 2_500_000}
"""Bytes that each may add to the package."""


@pytest.mark.parametrize("name", LIMITS)
def test_files_are_those_of_the_card(name: str) -> None:
    files = CheckpointFiles(registry().find(name)).bring_all(again=True)
    assert all(path.stat().st_size == registry().find(name).checkpoint.files[published].size for published, path in files.items())
    assert sum(path.stat().st_size for path in files.values()) <= LIMITS[name]
    beside = {path.name for path in next(iter(files.values())).parent.iterdir()}
    assert beside == {path.name for path in files.values()}, "a file that the card does not list"
    assert {path.suffix for path in files.values()} <= {".safetensors", ".json", ".tsv", ".txt"}


def test_nothing_is_written_and_no_network(tmp_path: Path) -> None:
    """Offline (see conftest), with a cache folder that does not exist, which then still does not."""
    with cf.settings.override(cache_dir=tmp_path / "absent", offline=True):
        assert cf.load("demo").encode(cf.datasets.pbmc700()[:5]).shape == (5, 64)
        assert cf.load("demo-dna").encode(["ACGTACGTACGT"]).shape == (1, 96)
    assert not (tmp_path / "absent").exists()


def test_gene_names(tmp_path: Path) -> None:
    """Symbols, old ones too, and Ensembl ids lead to the same vectors."""
    cells = cf.datasets.pbmc700()[:10].copy()
    model = cf.load("demo-cell")
    by_symbol = model.encode(cells)
    assert model.receipt is not None
    assert model.receipt["genes_used"] > 0.95 * cells.n_vars
    id_of = model.adapter.tokenizer.dictionaries.mapping
    cells = cells[:, np.array([name.upper() in id_of for name in cells.var_names])].copy()
    cells.var_names = [id_of[name.upper()] for name in cells.var_names]
    np.testing.assert_allclose(model.encode(cells), by_symbol, atol=1e-5)


def test_cell_network_is_bert() -> None:
    """The shipped file, read by transformers' own BERT, gives the same hidden states."""
    transformers = pytest.importorskip("transformers")
    folder = CheckpointFiles(registry().find("demo-cell")).get("config.json").parent
    bert = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = cf.load("demo-cell", device="cpu", precision="float32")
    cells = cf.datasets.pbmc700()[:3]
    tokens = model.tokenize(cells)
    for layer in range(model.adapter.layers + 1):
        ours = model.encode(cells, level="gene", output_layer=layer)
        for row in range(3):
            with torch.no_grad():
                states = bert(torch.from_numpy(tokens.row(row)).long()[None], output_hidden_states=True).hidden_states
            part = slice(tokens.offsets[row], tokens.offsets[row + 1])
            np.testing.assert_allclose(ours.values[part], states[layer][0].numpy(), atol=2e-5)


def test_trained_beats_untrained(tmp_path: Path) -> None:
    """By 0.1 in balanced accuracy and more, on cells of another donor; the same by neighbours and by a line."""
    cells = cf.datasets.pbmc700()
    labels = cells.obs["cell_type"].to_numpy().astype(str)
    trained = demo_quality.score(cf.load("demo-cell").encode(cells), labels)[0]
    bare = demo_quality.score(demo_quality.untrained("demo-cell", 0, tmp_path).encode(cells), labels)[0]
    assert trained["knn_balanced"] > bare["knn_balanced"] + 0.1
    assert trained["linear_balanced"] > bare["linear_balanced"] + 0.1


def test_figures_are_of_the_shipped_files() -> None:
    """The committed result belongs to the committed weights, and the card's table is made from it."""
    assert RESULT is not None
    for name, digest in RESULT["weights"].items():
        assert digest in {file.sha256 for file in registry().find(name).checkpoint.files.values()}
    assert demo_quality.table(RESULT) in CARD.read_text(encoding="utf-8")
    by_kind = {kind: [r["folds"] for r in RESULT["scores"]["blood cells"] if r["kind"] == kind] for kind in ("demo-cell", "untrained")}
    assert all(len(runs) == 3 for runs in by_kind.values())
    means = {kind: np.mean([fold["knn_balanced"] for run in runs for fold in run]) for kind, runs in by_kind.items()}
    assert means["demo-cell"] - means["untrained"] >= 0.1


def test_neighbour_scores() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0) + np.arange(30, dtype=np.float32)[:, None] / 1000
    labels = np.repeat(["a", "b", "c"], 10)
    assert neighbour_scores(vectors, labels) == (1.0, 1.0)
    labels[:3] = "c"
    accuracy, balanced = neighbour_scores(vectors, labels)
    assert 0.8 < accuracy < 1
    assert balanced < 1


# The command


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(("demo-cell ", "pca "))] == [["demo-cell", "700x64"], ["pca", "700x50"]]
    assert "cellfm embed your.h5ad --model demo-cell -o out.h5ad && cellfm plot out.h5ad" in done.stdout
    written = ad.read_h5ad("demo.h5ad")
    assert written.obsm["X_demo-cell"].shape == (700, 64)
    assert set(written.uns["cellfm"]) == {"X_demo-cell", "X_pca"}
    assert Path("demo.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(app, ["demo", "--no-overwrite"])
    assert refused.exit_code == 1
    assert "demo.png exists" in refused.stderr


def test_demo_of_dna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["demo", "--dna"])
    assert done.exit_code == 0, done.output
    assert "simulated" in done.stdout
    written = ad.read_h5ad("demo_dna.h5ad")
    assert written.obsm["X_demo-dna"].shape == (600, 96)
    assert written.obs["sequence"].str.len().eq(300).all()
    assert Path("demo_dna.png").is_file()
    wrong = CliRunner().invoke(app, ["demo", "-o", "x.npy"])
    assert wrong.exit_code == 1
    assert "give a name that ends in .h5ad" in wrong.stderr


# Files that are shipped in a package


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of somebody else's that holds a checkpoint, and a card that says so."""
    folder = tmp_path / "somebodys" / "weights"
    folder.mkdir(parents=True)
    for path in CheckpointFiles(registry().find("demo-dna")).bring_all().values():
        shutil.copy(path, folder)
    cards = tmp_path / "cards"
    cards.mkdir()
    text = (
        CARD.read_text(encoding="utf-8").replace("cellfm_hub, folder", "somebodys, folder").replace("demo_checkpoints/demo-dna", "weights")
    )
    (cards / "demo.md").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry_module, "_card_folders", lambda: iter([(cards, "somebody")]))
    registry.cache_clear()
    yield folder
    registry.cache_clear()


def test_any_package_can_ship_a_checkpoint(shipped: Path) -> None:
    assert cf.load("demo-dna").encode(["ACGTACGT"]).shape == (1, 96)
    assert registry().find("demo-dna").info().source == "the installed package somebodys"


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_installation(shipped: Path, damage: str) -> None:
    """The file is named, and left alone."""
    file = shipped / "vocab.txt"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("AAAAAA")
    with pytest.raises(ChecksumError, match=r"weights/vocab\.txt of demo-dna.*the installation is damaged, reinstall somebody"):
        cf.load("demo-dna")
    assert file.exists() == (damage == "changed")


def test_commands_about_weights(tmp_path: Path) -> None:
    """What comes with the package is neither added, bundled, listed nor deleted."""
    folder = CheckpointFiles(registry().find("demo-dna")).get("config.json").parent
    with pytest.raises(InputError, match="comes with the package; there is nothing to add"):
        cache.add("demo-dna", folder)
    with pytest.raises(InputError, match="comes with the package and works everywhere; leave it out"):
        cache.bundle(["demo-dna"], tmp_path / "models.tar")
    with pytest.raises(InputError, match="comes with the package, not from the cache"):
        cache.remove("demo-dna")
    assert [entry.name for entry in cache.listing()] == []
    with pytest.raises(CheckpointError, match="has one version of it; leave revision out"):
        cf.load("demo-dna", revision="1" * 40)
    done = CliRunner().invoke(app, ["pull", "demo"])
    assert done.exit_code == 0
    assert "ready" in done.stdout


# The training programs


def test_masked_loss_falls_on_a_pattern() -> None:
    """The network learns that rows are made of one of two halves of the vocabulary."""
    config = train_cell.CONFIG | {"vocab_size": 22, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 8}
    layout = training.layout_of("geneformer", config)
    begin = training.random_tensors(layout, 0)
    adapter = registry().find("geneformer").adapter_class()
    from cellfm_hub.weights import load_network

    network = load_network(
        lambda: adapter.published(config)[0], begin, layout, origin="test", device=torch.device("cpu"), dtype=torch.float32
    )
    head = training.Head(training.BERT_HEAD, begin, 1e-12, network.genes.weight)
    rng = np.random.default_rng(0)

    def steps() -> Iterator[training.Step]:
        while True:
            rows = np.stack([2 + 10 * rng.integers(2) + rng.permutation(10)[:8] for _ in range(32)])
            yield training.Step(cf.Tokens(ids=rows.ravel().astype(np.int32), offsets=np.arange(33) * 8), np.arange(2, 22))

    made = steps()
    schedule = training.Schedule(steps=150, peak_rate=5e-3, warmup=10, mask_share=(0.3, 0.3), layer=2)
    curve = training.train(network, head, made, [next(made)], schedule, masking=training.Masking(1, (0, 1)), seed=0)
    # Two questions over 20 tokens cost 2 ln 20 = 6.0 without knowledge; 2 ln 10 = 4.6 knowing the half.
    assert curve[-1]["held_out"] < 5.0
    tensors = training.trained_tensors(network, head, training.BERT_HEAD, layout, begin)
    assert tensors.keys() == begin.keys()
    assert all(tensors[name].shape == begin[name].shape for name in begin)
    moved = {name for name in begin if not torch.equal(tensors[name], begin[name])}
    assert "cls.predictions.transform.dense.weight" in moved
    assert "bert.encoder.layer.1.attention.self.value.weight" in moved


@pytest.mark.slow
@pytest.mark.parametrize(("program", "model"), [(train_cell, "demo-cell"), (train_dna, "demo-dna")], ids=["cell", "dna"])
def test_training_program(program: object, model: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of a few steps make the same files, in the shipped layout, that load under the model's own name."""
    for name in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["train", "--data", str(shared / "data"), "--out", str(tmp_path / name), "--steps", "2"])
        program.main()  # type: ignore[attr-defined]
    made = {path.name for path in (tmp_path / "a").iterdir()} - {"loss.json"}
    assert made == {Path(path).name for path in registry().find(model).checkpoint.files}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in made)
    for name in made - {"model.safetensors"}:
        shipped = CheckpointFiles(registry().find(model)).get(name)
        assert (tmp_path / "a" / name).read_bytes() == shipped.read_bytes(), name
    cf.load(model, checkpoint=tmp_path / "a")


def test_output_suffix_is_checked() -> None:
    with pytest.raises(OutputError, match="pictures are written as"):
        cf.pl.umap(cf.datasets.pbmc700(), out="x.gif")
