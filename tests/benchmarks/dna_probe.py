"""Linear probe of DNA vectors on real labelled sequences.

How well a plain classifier tells promoters, splice sites, enhancers and binding sites from other sequences by their vectors alone: by those
of the k-mer baseline, and by those of a network with random weights, which is what trained weights have to be compared with.

The data and the figures of the k-mer baseline to meet come from ``../shared/data/dna`` (its README): standardised features, logistic
regression (C 0.01) and 15 nearest neighbours; trained on ``train`` (``dev`` where there is none) and scored on ``test``, or 5-fold.

Run from the top of a checkout: ``python tests/benchmarks/dna_probe.py``. Trained weights: ``--checkpoint dnabert2=FOLDER``. Ends with an
error if the k-mer baseline is not in line with the README.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, matthews_corrcoef
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import cellfm_hub as cf

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "dna-probe.json"
SHARED = HERE.parents[2] / "shared" / "data"

README = {
    "prom_core_tata": (0.752, 0.505),
    "prom_300_tata": (0.669, 0.340),
    "splice_reconstructed": (0.560, 0.127),
    "EMP_H3": (0.794, 0.589),
    "tf_0": (0.777, 0.563),
    "mouse_0": (0.730, 0.459),
    "human_nontata_promoters_3k": (0.824, 0.651),
    "human_enhancers_cohn_3k": (0.715, 0.430),
}
"""Task -> accuracy and Matthews correlation of the logistic regression on 4-mers."""

IN_LINE = 0.01
"""Largest difference of accuracy to the README's that still is the same figure: versions of the solver, order of the folds."""


@dataclass(frozen=True)
class Set:
    """One labelled data set."""

    train: pd.DataFrame
    test: pd.DataFrame | None
    """``None``: 5-fold cross-validation on `train`."""


@dataclass(frozen=True)
class Score:
    """How well labels are told from vectors."""

    task: str
    model: str
    dim: int
    accuracy: float
    mcc: float
    knn_accuracy: float
    knn_mcc: float
    seconds: float
    """To embed."""


def load_set(task: str, data: Path) -> Set:
    """Read one task."""
    folder = data / "dna" / "gue" / (f"prom_{task}" if task.startswith("prom") else task)
    if not folder.is_dir():
        return Set(pd.read_csv(data / "dna" / "genomic_benchmarks" / f"{task}.csv.gz"), None)
    train = folder / "train.csv.gz"
    return Set(pd.read_csv(train if train.is_file() else folder / "dev.csv.gz"), pd.read_csv(folder / "test.csv.gz"))


def probe(task: str, name: str, model: cf.Embedder, data: Path = SHARED) -> Score:
    """Embed a task and train the two classifiers."""
    chosen = load_set(task, data)
    begin = time.perf_counter()
    x, y = model.encode(chosen.train["sequence"], progress=False), chosen.train["label"].to_numpy()
    held_out = None if chosen.test is None else model.encode(chosen.test["sequence"], progress=False)
    seconds = time.perf_counter() - begin

    def score(classifier: Pipeline) -> tuple[float, float]:
        truth: NDArray[Any]
        if held_out is None or chosen.test is None:
            truth, guess = y, cross_val_predict(classifier, x, y, cv=StratifiedKFold(5, shuffle=True, random_state=0))
        else:
            truth, guess = chosen.test["label"].to_numpy(), classifier.fit(x, y).predict(held_out)
        return round(float(accuracy_score(truth, guess)), 4), round(float(matthews_corrcoef(truth, guess)), 4)

    linear = score(make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)))
    nearest = score(make_pipeline(StandardScaler(), KNeighborsClassifier(15)))
    return Score(task, name, x.shape[1], *linear, *nearest, round(seconds, 1))


def random_dnabert2(folder: Path, tokenizer: Path, seed: int = 0) -> cf.Embedder:
    """Make a small DNABERT-2 with random weights and the real tokenizer, as a checkpoint in the published layout, and load it."""
    config = {"vocab_size": 4096, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 768}
    config |= {"alibi_starting_size": 512, "layer_norm_eps": 1e-12, "type_vocab_size": 2}
    from cellfm_hub.registry import registry

    adapter: Any = registry().find("dnabert2").adapter_class()
    with torch.device("meta"):
        layout = adapter.published(config)[1]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, key in layout.items():
        if key.to is None:
            continue
        is_norm = name.lower().endswith("norm.weight")
        tensors[name] = torch.ones(key.shape) if is_norm else torch.randn(key.shape, generator=generator) * 0.02
        if name.endswith(".bias"):
            tensors[name].zero_()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return cf.load("dnabert2", checkpoint=folder, device="cpu", precision="float32")


def main() -> None:
    """Run all tasks and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--checkpoint", action="append", default=[], metavar="MODEL=FOLDER", help="trained weights to probe as well")
    parser.add_argument("--tasks", nargs="+", choices=list(README), default=list(README))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = {"kmer (k=4)": cf.load("kmer")}
        models["dnabert2, random weights, 4 layers of 192"] = random_dnabert2(Path(folder), given.data / "dnabert2" / "tokenizer.json")
        for pair in given.checkpoint:
            name, _, place = pair.partition("=")
            models[name] = cf.load(name, checkpoint=place)
        scores = []
        for task in given.tasks:
            for name, model in models.items():
                scores.append(probe(task, name, model, given.data))
                print(scores[-1], flush=True)  # noqa: T201 - a script
    off = {s.task: s.accuracy - README[s.task][0] for s in scores if s.model.startswith("kmer")}
    result = {
        "what": "standardised vectors; logistic regression (C 0.01) and 15 nearest neighbours; test split or 5-fold",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, 1 thread, shared with other work",
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__, "pandas": pd.__version__},
        "readme_kmer": {task: dict(zip(("accuracy", "mcc"), README[task], strict=True)) for task in given.tasks},
        "kmer_accuracy_minus_readme": {task: round(difference, 4) for task, difference in off.items()},
        "scores": [asdict(score) for score in scores],
    }
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    if wrong := [task for task, difference in off.items() if abs(difference) > IN_LINE]:
        sys.exit(f"the k-mer baseline is not in line with the README of the data: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
