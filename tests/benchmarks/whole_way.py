"""The whole way, from a file to tokens and from a file to a file of vectors: the hub beside the procedures of the original releases.

pbmc3k, the published dictionaries and vocabularies, networks of published shape with random weights. What both sides read is the same file.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

import cellfm_hub as cf
from benchmarks import upstream
from benchmarks.common import cpu_seconds, interleave, wall_seconds
from cellfm_adapters.scgpt.model import ScGPTConfig
from cellfm_adapters.scgpt.weights import layout
from cellfm_hub.api import load_tokenizer
from cellfm_hub.registry import registry

SHARED = Path(os.environ.get("CELLFM_SHARED", Path(__file__).parents[3] / "shared"))
CELLS = SHARED / "data/scrna/pbmc3k/pbmc3k.h5ad"
DICTIONARIES = SHARED / "data/geneformer"
VOCABULARY = SHARED / "data/scgpt/vocab_whole_human.json"
SIX_MERS = SHARED / "golden/nt-v2-long/checkpoint"

GENEFORMER_ROWS = 16
"""Cells a batch of Geneformer's procedure, which the user sets; by its default of 100 the head alone would take up to 20 GB here."""

TO_TOKENS = "from opening the file to tokens in memory: counts and genes found, matched, tokenized; dictionaries were loaded before"
TO_VECTORS = (
    "from opening the file to a finished file of vectors: weights loaded, counts and genes found, matched, tokenized, network, written"
)


def files(*, smoke: bool) -> dict[str, Any]:
    """Measure each way."""
    if not CELLS.exists():
        msg = f"{CELLS} is not here; set CELLFM_SHARED to the founders' folder, or name other sections: encoders tokenizers reading"
        raise SystemExit(msg)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for measured in (
            geneformer_tokens(folder, smoke=smoke),
            scgpt_tokens(folder, smoke=smoke),
            nucleotide_transformer_tokens(folder, smoke=smoke),
            geneformer_vectors(folder, smoke=smoke),
            scgpt_vectors(folder, smoke=smoke),
        ):
            found |= measured
            print(measured, flush=True)  # noqa: T201, a script for people
    return found


def measure(variants: dict[str, Callable[[], object]], rounds: int, *, timed: str, rows: int, **facts: Any) -> dict[str, Any]:
    """Run each in turn; return processor seconds and seconds on the wall, and how many times as long as the hub the others take."""
    wall: dict[str, float] = {}

    def both(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def work() -> None:
            wall[name] = min(wall_seconds(call), wall.get(name, float("inf")))

        return work

    cpu = interleave({name: both(name, call) for name, call in variants.items()}, rounds, cpu_seconds)
    ratios = {name: seconds / cpu["hub"] for name, seconds in cpu.items() if name != "hub"}
    return {
        "timed": timed,
        "rows": rows,
        **facts,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "rows a cpu second": {name: rows / seconds for name, seconds in cpu.items()},
        "ratios": ratios,
    }


def cells_file(folder: Path, rows: int) -> Path:
    """Write cells from all over pbmc3k, compressed, with the total counts that Geneformer's procedure wants to find."""
    path = folder / f"cells-{rows}.h5ad"
    if not path.exists():
        adata = ad.read_h5ad(CELLS)
        adata = adata[np.linspace(0, adata.n_obs - 1, rows).astype(int)].copy()
        adata.obs["n_counts"] = np.asarray(adata.X.sum(axis=1)).ravel()
        adata.write_h5ad(path, compression="gzip")
    return path


def has_datasets() -> bool:
    """Whether the second half of Geneformer's procedure can be run."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        return False
    return True


# Geneformer V1-10M


def geneformer_dictionary() -> dict[str, tuple[int, float]]:
    """Return the token and the median of each gene."""
    table = pd.read_csv(DICTIONARIES / "gc30M/tokens.tsv", sep="\t", quoting=3).dropna(subset=["median"])
    return {row.token: (row.token_id, row.median) for row in table.itertuples()}


def geneformer_checkpoint(folder: Path, *, smoke: bool) -> Path:
    """Write a checkpoint of the published shape as the release writes it."""
    from transformers import BertConfig, BertForMaskedLM

    config = dict(registry().find("geneformer-v1-10m").checkpoint.config) | {"hidden_act": "relu", "layer_norm_eps": 1e-12}
    if smoke:
        config["num_hidden_layers"] = 2
    torch.manual_seed(0)
    checkpoint = folder / "geneformer-v1-10m"
    BertForMaskedLM(BertConfig(**config)).save_pretrained(checkpoint)
    return checkpoint


def geneformer_tokens(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Measure ranking."""
    rows = 32 if smoke else 2700
    path, dictionary = cells_file(folder, rows), geneformer_dictionary()
    checkpoint = geneformer_checkpoint(folder, smoke=smoke)
    hub = load_tokenizer("geneformer-v1-10m", checkpoint=checkpoint, options={"dictionaries": DICTIONARIES})
    ours, theirs = hub.tokenize(path), upstream.geneformer_file(path, dictionary, 2048)  # compiles
    assert [len(cell) for cell in theirs] == ours.lengths.tolist()
    figures = measure(
        {"hub": lambda: hub.tokenize(path), "original procedure": lambda: upstream.geneformer_file(path, dictionary, 2048)},
        1 if smoke else 3,
        timed=TO_TOKENS,
        rows=rows,
        datasets_step_included=has_datasets(),
    )
    return {"geneformer, file to tokens": figures}


def geneformer_vectors(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Measure the default recipe beside the procedure: language-model head, SDPA, a fixed number of cells a batch, longest first."""
    rows = 4 if smoke else 128
    path, dictionary, checkpoint = cells_file(folder, rows), geneformer_dictionary(), folder / "geneformer-v1-10m"
    how: dict[str, Any] = {"checkpoint": checkpoint, "options": {"dictionaries": DICTIONARIES}, "device": "cpu", "precision": "float32"}
    model, out = cf.load("geneformer-v1-10m", **how), folder / "geneformer.h5ad"
    tokens = model.tokenize(path)
    theirs: list[Any] = []

    def hub(path: Path = path) -> None:
        cf.embed_file(path, "geneformer-v1-10m", out=out, overwrite=True, progress=False, **how)

    def original() -> None:
        theirs.append(upstream.geneformer_vectors(path, dictionary, 2048, checkpoint, folder / "geneformer.csv", GENEFORMER_ROWS))

    hub(cells_file(folder, 4))  # compiles
    figures = measure(
        {"hub": hub, "hub, the network alone": lambda: model.encode_tokens(tokens), "original procedure": original},
        1,
        timed=TO_VECTORS,
        rows=rows,
        tokens=int(tokens.lengths.sum()),
        datasets_step_included=has_datasets(),
    )
    ours = ad.read_h5ad(out).obsm["X_geneformer-v1-10m"]
    np.testing.assert_allclose(ours, theirs[-1], atol=1e-4, rtol=0)
    return {"geneformer, file to vectors": figures}


# scGPT


def scgpt_checkpoint(folder: Path, vocabulary: dict[str, int], config: dict[str, Any]) -> Path:
    """Write a checkpoint of the published shape as the release writes it."""
    checkpoint = folder / "scgpt"
    checkpoint.mkdir(exist_ok=True)
    torch.manual_seed(0)
    names = ("embsize", "nheads", "d_hid", "nlayers", "ntoken")
    keys = layout(ScGPTConfig(**{name: config[name] for name in names}))
    torch.save({name: 0.02 * torch.randn(key.shape) for name, key in keys.items()}, checkpoint / "best_model.pt")
    written = {"dropout": 0.2, "n_layers_cls": 3, "pad_token": "<pad>", "pad_value": -2}
    (checkpoint / "args.json").write_text(json.dumps({name: config[name] for name in names[:-1]} | written))
    (checkpoint / "vocab.json").write_text(json.dumps(vocabulary))
    return checkpoint


def scgpt_setting(folder: Path, *, smoke: bool) -> tuple[dict[str, int], dict[str, Any], Path]:
    """Return the published vocabulary, the published sizes and a checkpoint."""
    vocabulary: dict[str, int] = json.loads(VOCABULARY.read_text())
    config = dict(registry().find("scgpt-human").checkpoint.config) | ({"nlayers": 2} if smoke else {})
    return vocabulary, config, scgpt_checkpoint(folder, vocabulary, config)


def scgpt_tokens(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Measure binning."""
    rows = 32 if smoke else 2700
    vocabulary, _, checkpoint = scgpt_setting(folder, smoke=smoke)
    path, hub = cells_file(folder, rows), load_tokenizer("scgpt-human", checkpoint=checkpoint)
    ours, theirs = hub.tokenize(path), upstream.scgpt_file(path, vocabulary, 1200)  # compiles
    assert np.concatenate([(ids != vocabulary["<pad>"]).sum(1).numpy() for ids, _ in theirs]).tolist() == ours.lengths.tolist()
    figures = measure(
        {"hub": lambda: hub.tokenize(path), "original procedure": lambda: upstream.scgpt_file(path, vocabulary, 1200)},
        1 if smoke else 3,
        timed=TO_TOKENS,
        rows=rows,
    )
    return {"scgpt, file to tokens": figures}


def scgpt_vectors(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Measure the default recipe beside the procedure: ``nn.TransformerEncoder`` on batches in the order of the file."""
    rows = 4 if smoke else 32
    vocabulary, config, checkpoint = scgpt_setting(folder, smoke=smoke)
    path, out = cells_file(folder, rows), folder / "scgpt.h5ad"
    how: dict[str, Any] = {"checkpoint": checkpoint, "device": "cpu", "precision": "float32"}
    model = cf.load("scgpt-human", **how)
    tokens = model.tokenize(path)
    network = upstream.ScGPT(
        len(vocabulary), dim=config["embsize"], heads=config["nheads"], ffn_dim=config["d_hid"], layers=config["nlayers"]
    )

    def hub(path: Path = path) -> None:
        cf.embed_file(path, "scgpt-human", out=out, overwrite=True, progress=False, **how)

    hub(cells_file(folder, 4))  # compiles
    figures = measure(
        {
            "hub": hub,
            "hub, the network alone": lambda: model.encode_tokens(tokens),
            "original procedure": lambda: upstream.scgpt_vectors(path, vocabulary, 1200, network, folder / "scgpt-original.h5ad"),
        },
        1,
        timed=f"{TO_VECTORS} (original procedure: weights were loaded before)",
        rows=rows,
        tokens=int(tokens.lengths.sum()),
    )
    return {"scgpt, file to vectors": figures}


# Nucleotide Transformer


def nucleotide_transformer_tokens(folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Measure 6-mers of a FASTA file beside Hugging Face's ``EsmTokenizer``."""
    from transformers import EsmTokenizer

    rows = 8 if smoke else 500
    rng, path = np.random.default_rng(0), folder / "sequences.fasta"
    sequences = rng.choice(np.frombuffer(b"ACGT", np.uint8), (rows, 6000))
    path.write_text("".join(f">{i}\n{row.tobytes().decode()}\n" for i, row in enumerate(sequences)))
    theirs, hub = EsmTokenizer.from_pretrained(SIX_MERS), load_tokenizer("nt-v2-50m-multi-species", checkpoint=SIX_MERS)

    def original() -> Any:
        lines = path.read_text().splitlines()
        return theirs([line for line in lines if not line.startswith(">")])["input_ids"]

    assert hub.tokenize(path).row(0).tolist() == original()[0]
    figures = measure({"hub": lambda: hub.tokenize(path), "original procedure": original}, 1 if smoke else 2, timed=TO_TOKENS, rows=rows)
    return {"nucleotide-transformer, file to tokens": figures}
