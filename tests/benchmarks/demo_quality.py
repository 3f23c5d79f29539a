"""How good the built-in miniature checkpoints are: beside themselves untrained, and beside plain baselines.

Cells: the 700 blood cells that ship inside scanpy, ten types, none of them trained on. DNA (needs ``../shared/data/dna``): promoters and
splice sites that were held back from training. Vectors go, as they are, into a 5-nearest-neighbour classifier, and standardised into a
logistic regression (C 0.1); 5-fold stratified cross-validation with three seeds. Figures are accuracy and balanced accuracy.

Run from the top of a checkout: ``python tests/benchmarks/demo_quality.py``. Checkpoints of other training seeds, made with
``python -m cellfm_hub.demo_checkpoints.train_cell --seed 1 …``, are scored too when their folders are given:
``--cell FOLDER --dna FOLDER``.
What the network is before its first step, gene embeddings from co-expression, is made with ``--steps 0`` and given as ``--start FOLDER``.
The result stands in ``results/demo_quality.json``, and the table of ``model_cards/demo.md`` is made from it (``--table`` prints it).
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cellfm_hub as cf
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.demo import neighbour_scores
from cellfm_hub.demo_checkpoints.training import layout_of, random_tensors, write_checkpoint
from cellfm_hub.registry import registry

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "demo_quality.json"
SHARED = HERE.parents[2] / "shared" / "data"
SEEDS = (0, 1, 2)
FAMILY = {"demo-cell": "geneformer", "demo-dna": "nucleotide-transformer"}
DNA_TASKS = {
    "promoters without TATA box": "genomic_benchmarks/human_nontata_promoters_3k.csv.gz",
    "promoters with TATA box": "gue/prom_prom_300_tata/test.csv.gz",
    "splice sites": "gue/splice_reconstructed/test.csv.gz",
}
FIGURES = ("knn_accuracy", "knn_balanced", "linear_accuracy", "linear_balanced")

Vectors = NDArray[np.float32]


def score(vectors: Vectors, labels: NDArray[Any]) -> list[dict[str, float]]:
    """Score vectors with each seed of the folds."""
    scores = []
    for seed in SEEDS:
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        guesses = cross_val_predict(probe, vectors, labels, cv=folds)
        linear = (accuracy_score(labels, guesses), balanced_accuracy_score(labels, guesses))
        figures = (*neighbour_scores(vectors, labels, seed=seed), *linear)
        scores.append({name: round(float(figure), 4) for name, figure in zip(FIGURES, figures, strict=True)})
    return scores


def untrained(model: str, seed: int, folder: Path) -> cf.Embedder:
    """Load the same network with the random weights that training begins from."""
    files = CheckpointFiles(registry().find(model)).bring_all()
    for path in files.values():
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, config, random_tensors(layout_of(FAMILY[model], config), seed))
    return cf.load(model, checkpoint=folder, device="cpu", precision="float32")


def variants(model: str, baseline: str, others: list[Path], start: Path | None) -> Iterator[tuple[str, str, Callable[[Any], Vectors]]]:
    """Give kind, name and embedding function of everything that is compared."""

    def encoder(embedder: cf.Embedder) -> Callable[[Any], Vectors]:
        return lambda data: embedder.encode(data, progress=False)

    yield "trained", "shipped", encoder(cf.load(model, device="cpu", precision="float32"))
    for folder in others:
        yield "trained", folder.name, encoder(cf.load(model, checkpoint=folder, device="cpu", precision="float32"))
    if start is not None:
        yield "start of training", f"{start.name}", encoder(cf.load(model, checkpoint=start, device="cpu", precision="float32"))
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            yield "untrained", f"seed {seed}", encoder(untrained(model, seed, Path(folder)))
    for seed in SEEDS if baseline == "pca" else (0,):  # kmer draws nothing
        yield baseline, f"seed {seed}", encoder(cf.load(baseline, seed=seed))


def table(result: dict[str, Any]) -> str:
    """Return mean and range over seeds as Markdown."""
    lines = ["| data | model | 5-NN | 5-NN, balanced | linear | linear, balanced |", "| --- | --- | --- | --- | --- | --- |"]
    for task, rows in result["scores"].items():
        for kind in dict.fromkeys(row["kind"] for row in rows):
            found = [fold for row in rows if row["kind"] == kind for fold in row["folds"]]
            cells = []
            for figure in FIGURES:
                numbers = [fold[figure] for fold in found]
                cells.append(f"{statistics.mean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})")
            runs = sum(row["kind"] == kind for row in rows)
            lines.append(f"| {task} | {kind}, {runs} run{'s' if runs > 1 else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Score everything and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--cell", type=Path, action="append", default=[], help="another demo-cell, trained with another seed")
    parser.add_argument("--dna", type=Path, action="append", default=[], help="another demo-dna")
    parser.add_argument("--start", type=Path, help="demo-cell as it is before its first step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table of an earlier result")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.out.read_text())))  # noqa: T201 - a script
        return

    torch.set_num_threads(1)
    cells = cf.datasets.pbmc700()
    tasks: dict[str, tuple[str, str, list[Path], Any, NDArray[Any]]] = {
        "blood cells": ("demo-cell", "pca", given.cell, cells, cells.obs["cell_type"].to_numpy().astype(str))
    }
    for task, path in DNA_TASKS.items():
        if (given.data / "dna" / path).is_file():
            rows = pd.read_csv(given.data / "dna" / path)
            tasks[task] = ("demo-dna", "kmer", given.dna, rows["sequence"].tolist(), rows["label"].to_numpy())
    scores: dict[str, list[dict[str, Any]]] = {}
    for task, (model, baseline, others, data, labels) in tasks.items():
        scores[task] = []
        for kind, name, encode in variants(model, baseline, others, given.start if model == "demo-cell" else None):
            vectors = encode(data)
            entry = {"kind": model if kind == "trained" else kind, "run": name, "dim": vectors.shape[1]}
            scores[task].append(entry | {"folds": score(vectors, labels)})
            print(task, scores[task][-1], flush=True)  # noqa: T201 - a script
    shipped = {model: registry().find(model).checkpoint.files for model in FAMILY}
    result = {
        "what": "5-nearest neighbours on vectors as they are, logistic regression (C 0.1) on standardised ones; 5 folds, three seeds",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, 1 thread",
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
        "weights": {
            model: next(f.sha256 for path, f in files.items() if path.endswith(".safetensors")) for model, files in shipped.items()
        },
        "scores": scores,
    }
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))  # noqa: T201 - a script


if __name__ == "__main__":
    main()
