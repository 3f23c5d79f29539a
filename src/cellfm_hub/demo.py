"""Real cells, or simulated DNA, through a real transformer and a plain baseline, offline, in a minute: what ``cellfm demo`` does."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellfm_hub import datasets, pl
from cellfm_hub.api import load

if TYPE_CHECKING:
    from anndata import AnnData

NEIGHBOURS = 5
WARM_UP = 100
CELL_MODELS = ("demo-cell", "pca")
DNA_MODELS = ("demo-dna", "kmer")


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured of one model."""

    model: str
    shape: tuple[int, int]
    seconds: float
    """To embed, with the model loaded and warm."""
    accuracy: float
    """Share of rows whose label a vote of their 5 nearest neighbours gives, in 5-fold cross-validation."""
    balanced_accuracy: float
    """The same, averaged over labels, so that rare ones count as much as common ones."""


def run_demo(out: Path, picture: Path, *, dna: bool = False) -> list[DemoResult]:
    """Embed, score, and write the vectors (``.h5ad``) and two UMAPs side by side (``.png``).

    Parameters
    ----------
    out, picture
        Where to write.
    dna
        Simulated DNA instead of the 700 blood cells that ship inside scanpy.
    """
    data = _dna() if dna else datasets.pbmc700()
    label = "kind" if dna else "cell_type"
    labels = data.obs[label].to_numpy()
    results = []
    rows = data.obs["sequence"].tolist() if dna else data
    for model in DNA_MODELS if dna else CELL_MODELS:
        embedder = load(model)
        embedder.encode(rows[:WARM_UP])  # what is compiled on first use is no part of the speed
        begin = time.perf_counter()
        vectors = embedder.encode(rows)
        seconds = time.perf_counter() - begin
        data.obsm[f"X_{model}"] = vectors
        data.uns.setdefault("cellfm", {})[f"X_{model}"] = embedder.receipt
        results.append(DemoResult(model, (len(vectors), vectors.shape[1]), seconds, *neighbour_scores(vectors, labels)))
    data.write_h5ad(out)
    pl.umap(data, color=label, out=picture)
    return results


def neighbour_scores(vectors: NDArray[np.float32], labels: NDArray[np.str_], *, seed: int = 0) -> tuple[float, float]:
    """Score vectors by how well neighbours share a label.

    Parameters
    ----------
    vectors
        ``(n, d)``, no NaN.
    labels
        ``(n,)``, each at least five times.
    seed
        Of the folds.

    Returns
    -------
    Accuracy and balanced accuracy of a 5-nearest-neighbour classifier in 5-fold stratified cross-validation.
    """
    from sklearn.metrics import accuracy_score, balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    guesses = cross_val_predict(KNeighborsClassifier(NEIGHBOURS), vectors, labels, cv=folds)
    return float(accuracy_score(labels, guesses)), float(balanced_accuracy_score(labels, guesses))


_BASES = np.array(list("ACGT"))
_KINDS = {
    # Share of G and C; how often a G that would follow a C is drawn anew; whether every third base is a G or C far more often.
    "CpG-rich, as in islands": (0.65, 0.0, False),
    "CpG-poor, as between genes": (0.40, 0.8, False),
    "three-base rhythm, as in coding DNA": (0.40, 0.8, True),
}
"""Simulated, and no more than that: nothing here was copied from a genome."""


def _dna(per_kind: int = 200, length: int = 300, seed: int = 0) -> "AnnData":
    """Simulate three kinds of DNA that differ in composition."""
    import pandas as pd
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    sequences, kinds = [], []
    for kind, (gc, depleted, rhythm) in _KINDS.items():
        share = np.full(length, gc)
        if rhythm:
            share += np.tile([-0.15, -0.15, 0.3], length // 3)
        is_gc = rng.random((per_kind, length)) < share
        bases = np.where(is_gc, rng.integers(1, 3, is_gc.shape), 3 * rng.integers(0, 2, is_gc.shape))  # C or G, A or T
        after_c = np.zeros_like(is_gc)
        after_c[:, 1:] = (bases[:, :-1] == 1) & (bases[:, 1:] == 2)
        bases[after_c & (rng.random(is_gc.shape) < depleted)] = 0  # CpG decays to CpA
        sequences += ["".join(row) for row in _BASES[bases]]
        kinds += [kind] * per_kind
    obs = pd.DataFrame({"kind": pd.Categorical(kinds), "sequence": sequences}, index=[f"simulated_{i}" for i in range(len(kinds))])
    return AnnData(obs=obs)
