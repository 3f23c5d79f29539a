"""Every real data set and every family of cells: what check says, and what embed does.

The checkpoints are golden ones with random weights. Those of Geneformer, scGPT and scFoundation have the vocabulary of the release; those
of UCE have the proteins of 1,200 human or 600 mouse genes, which is why they know few counts, and each is used for its species.
"""

import json
import re
import warnings
from functools import cache
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scanpy as sc

import cellfm_hub as cf
from cellfm_hub.checking import CellFacts, Spread
from golden_cases import DATA, LARGE

pytestmark = pytest.mark.skipif(not LARGE.is_dir(), reason="needs ../shared")

SETS = {
    "pbmc3k": "pbmc3k/pbmc3k.h5ad",
    "pbmc3k_mini": "pbmc3k/pbmc3k_mini.h5ad",
    "sc_mixology": "sc_mixology/sc_mixology_3cl.h5ad",
    "gut_crohns": "gut_crohns_68types/gut_crohns_68types.h5ad",
    "baron_pancreas": "baron_pancreas_mini/baron_pancreas_mini.h5ad",
    "mouse_pancreas_739": "mouse_pancreas_739/mouse_pancreas_739.h5ad",
    "mouse_pancreas_50": "mouse_pancreas_50/mouse_pancreas_50.h5ad",
    "mouse_paul15": "mouse_paul15/paul15.h5ad",
    "mouse_merfish": "mouse_merfish_brain/mouse_merfish_brain.h5ad",
    "mouse_neurons": "mouse_neurons_10k/mouse_neurons_10k_x_1000genes.h5ad",
    "pbmc68k_reduced": "",
}
"""Name -> file below data/scrna; the last one ships with scanpy and holds no raw counts."""

CHECKPOINTS = {
    "geneformer": "geneformer-v1-tiny",
    "scgpt": "scgpt-fullvocab",
    "scfoundation": "scfoundation-full19264",
    "uce human": "uce-human-l3",
    "uce mouse": "uce-mouse-headratio-l2",
}

CUT = r"^{} of {} rows were longer than the model's input and were cut$"
TWO_SPECIES = "^obs\\['species'\\] says that 153 of 328 cells are mouse, but their genes have human identifiers"
RECOVERED = "^no raw counts were found; they are recovered from raw.X, which holds log1p of counts"
MOUSE = "^the genes are those of mouse .* is a model of human;.*orthologs"
FEW = "^the model knows genes with only {}% of all counts$"
NOT_OF_THIS_SPECIES = "^species='human', but the genes are those of another: mouse"

EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "pbmc3k": {
        "geneformer": ("warn", CUT.format("6", "2,700")),
        "scgpt": ("warn", CUT.format("178", "2,700")),
        "scfoundation": ("ok", ""),
        "uce human": ("warn", FEW.format(5)),
        "uce mouse": ("refuse", NOT_OF_THIS_SPECIES),
    },
    "pbmc3k_mini": {
        "geneformer": ("warn", CUT.format("1", "352")),
        "scgpt": ("warn", CUT.format("56", "352")),
        "scfoundation": ("ok", ""),
        "uce human": ("warn", FEW.format(5)),
        "uce mouse": ("refuse", NOT_OF_THIS_SPECIES),
    },
    "sc_mixology": {
        "geneformer": ("warn", CUT.format("300", "300")),
        "scgpt": ("warn", CUT.format("300", "300")),
        "scfoundation": ("warn", "^1 columns are summed with others of the same gene$"),
        "uce human": ("warn", FEW.format(6)),
        "uce mouse": ("refuse", NOT_OF_THIS_SPECIES),
    },
    "gut_crohns": {
        "geneformer": ("warn", CUT.format("112", "1,020")),
        "scgpt": ("warn", CUT.format("278", "1,020")),
        "scfoundation": ("ok", ""),
        "uce human": ("warn", FEW.format(5)),
    },
    "baron_pancreas": {
        "geneformer": ("warn", TWO_SPECIES),
        "scgpt": ("warn", TWO_SPECIES),
        "scfoundation": ("warn", TWO_SPECIES),
        "uce human": ("warn", TWO_SPECIES),
    },
    "pbmc68k_reduced": {
        "geneformer": ("warn", RECOVERED),
        "scgpt": ("warn", RECOVERED),
        "scfoundation": ("warn", RECOVERED),
        "uce human": ("warn", RECOVERED),
    },
} | {
    name: {
        "geneformer": ("refuse", MOUSE),
        "scgpt": ("refuse", MOUSE),
        "scfoundation": ("refuse", MOUSE),
        "uce mouse": ("warn", said),
    }
    for name, said in {
        "mouse_pancreas_739": FEW.format(2),
        "mouse_pancreas_50": FEW.format(2),
        "mouse_paul15": FEW.format(2),
        "mouse_merfish": "^38 of 1,000 rows hold nothing the model knows",
        "mouse_neurons": "^690 of 10,000 rows hold nothing the model knows",
    }.items()
}
"""Set -> family -> verdict of check on the whole set, and one of the reasons. What check refuses embed refuses; all else is embedded."""

FACTS = {
    "pbmc3k": ("X", "human"),
    "pbmc3k_mini": ("X", "human"),
    "sc_mixology": ("X", "human"),
    "gut_crohns": ("X", "human"),
    "baron_pancreas": ("X", "human"),
    "mouse_pancreas_739": ("X", "mouse"),
    "mouse_pancreas_50": ("X", "mouse"),
    "mouse_paul15": ("X", "mouse"),
    "mouse_merfish": ("X", "mouse"),
    "mouse_neurons": ("X", "mouse"),
    "pbmc68k_reduced": ("raw.X", "human"),
}
"""Set -> matrix from which the counts come, and species."""
PAIRS = [(name, family) for name, families in EXPECTED.items() for family in families]


def read(name: str) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that repeat, and a file of an early anndata
        return ad.read_h5ad(DATA / "scrna" / SETS[name]) if SETS[name] else sc.datasets.pbmc68k_reduced()


@cache
def few(name: str) -> ad.AnnData:
    """Six cells, spread over the set."""
    whole = read(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return whole[np.linspace(0, whole.n_obs - 1, 6).astype(int)].copy()


def options(family: str) -> dict[str, Any]:
    case = LARGE / CHECKPOINTS[family]
    switches: dict[str, Any] = {"dictionaries": str(DATA / "geneformer")} if family == "geneformer" else {}
    if family.startswith("uce"):
        switches["nhead"] = json.loads((case / "case.json").read_text())["parameters"]["nhead"]
    return {"checkpoint": case / "checkpoint", "options": switches}


def test_every_set_is_here() -> None:
    there = {str(path.relative_to(DATA / "scrna")) for path in (DATA / "scrna").glob("*/*.h5ad")}
    assert {path for path in SETS.values() if path} == there
    assert set(EXPECTED) == set(SETS) == set(FACTS)


def check_and_embed(data: Any, family: str, refused: str | None) -> cf.Report:
    """Check and embed agree: what check refuses embed refuses for the same reason, all else is embedded."""
    model = family.split()[0]
    report = cf.check(data, model, **options(family))
    (found,) = report.models
    embedder = cf.load(model, device="cpu", precision="float32", **options(family))
    if refused is not None:
        assert found.verdict == "refuse"
        assert report.refusals == {model: found.reasons[0]}
        assert re.search(refused, found.reasons[0])
        with pytest.raises(cf.errors.SpeciesError) as caught:
            embedder.encode(data)
        assert str(caught.value) == found.reasons[0]
    else:
        vectors = embedder.encode(data)
        assert embedder.receipt is not None
        assert found.verdict in ("ok", "warn")
        assert found.gene_ids == embedder.receipt["gene_ids"]
        assert found.genes_known == embedder.receipt["genes_used"]
        assert (found.truncated, found.empty) == (embedder.receipt["n_truncated"], embedder.receipt["n_empty"])
        assert found.counts_known == pytest.approx(embedder.receipt["counts_used"], abs=1e-6)
        assert np.isnan(vectors).any(axis=1).sum() == found.empty
    return report


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_few_cells(name: str, family: str) -> None:
    verdict, reason = EXPECTED[name][family]
    check_and_embed(few(name), family, reason if verdict == "refuse" else None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_whole_set(name: str, family: str) -> None:
    verdict, reason = EXPECTED[name][family]
    data = DATA / "scrna" / SETS[name] if SETS[name] else read(name)
    (found,) = check_and_embed(data, family, reason if verdict == "refuse" else None).models
    assert found.verdict == verdict
    assert found.reasons == () if not reason else any(re.search(reason, text) for text in found.reasons), found.reasons


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str) -> None:
    """The numbers about the data are those that anndata and numpy give."""
    data = cf.check(DATA / "scrna" / SETS[name] if SETS[name] else read(name), "pca").data
    counts = read(name) if SETS[name] else cf.datasets.pbmc700()
    totals, genes = np.asarray(counts.X.sum(axis=1)).ravel(), np.asarray((counts.X != 0).sum(axis=1)).ravel()
    assert isinstance(data, CellFacts)
    assert ([matrix.name for matrix in data.matrices if matrix.taken], data.species) == ([FACTS[name][0]], FACTS[name][1])
    assert (data.cells, data.genes) == counts.shape
    assert data.looked_at == data.cells
    assert data.counts_per_cell == Spread(totals.min(), np.median(totals), totals.max())
    assert data.genes_per_cell == Spread(genes.min(), np.median(genes), genes.max())
    assert data.empty_cells == (totals == 0).sum()
    assert data.repeated_genes == len(counts.var_names) - len(set(counts.var_names))
    assert data.repeated_cells == 0
    assert data.problem is None
