"""How fast the hub is on a CPU, as ratios to what others run, measured in the same process in turn. One thread.

``encoders``: networks with random weights in published shapes, beside what a careful user of Hugging Face would run: rows sorted by
length, as many padded tokens in a batch as the hub packs, SDPA, no head. ``tokenizers``: from counts in memory to tokens, the inner loop
alone, on made-up cells. ``reading``: blocks of a compressed file. ``files``: the whole way, from a file to tokens and to a file of vectors,
beside the procedures of the original releases as they are (``upstream.py``: their manner, our writing). Each entry of the results says
what is timed and on how many rows.

Run on an idle machine: ``python tests/benchmarks/cpu.py``, some 10 minutes; ``--smoke`` shows that everything runs, and says nothing about
speed. ``files`` needs the founders' folder (``CELLFM_SHARED``). With the package ``datasets`` installed, Geneformer's procedure includes
its second half. Results: ``results/cpu.json``; ``python tests/benchmarks/cpu_tables.py`` makes the README's tables of them.
"""

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from benchmarks import upstream
from benchmarks.common import (
    CPU,
    GENES,
    RESULTS,
    HuggingFace,
    Model,
    Padded,
    cpu_seconds,
    environment,
    gemm_flops,
    interleave,
    made_up_cells,
    make_model,
    padded_batches,
    padding,
    parser,
    random_tokens,
    rank_tokenizer,
    significant,
    useful_flops,
    vocabulary_of,
    wall_seconds,
    write_report,
)
from benchmarks.cpu_tables import tables
from benchmarks.whole_way import files, has_datasets
from cellfm_adapters.nucleotide_transformer.tokenizer import Tokenizer as Kmers
from cellfm_adapters.scgpt.tokenizer import Tokenizer as Bins
from cellfm_adapters.scgpt.tokenizer import Vocabulary
from cellfm_adapters.uce.species import Species
from cellfm_adapters.uce.tokenizer import place_genes
from cellfm_adapters.uce.tokenizer import tokenize as sentences
from cellfm_hub.engine.device import has_amx
from cellfm_hub.sources.cells import BLOCK_ROWS, count_blocks, find_counts, open_cells
from cellfm_hub.tokens import Tokens

BUDGET = 4096

FLOORS: dict[str, dict[str, float]] = {
    "256x6": {"HF SDPA": 1.1, "share of GEMM peak": 0.60},
    "512x12": {"HF SDPA": 1.05, "share of GEMM peak": 0.60},
    "768x12": {"HF SDPA": 1.05, "share of GEMM peak": 0.65},
    "tokenizers": {"ranks": 20, "ranks, bare argsort": 4, "bins": 5, "sentences": 10, "6-mers": 50, "two threads": 1.6},
    "reading": {"gzip over anndata backed": 1.0},
    "geneformer, file to tokens": {"original procedure": 1.1},
    "geneformer, file to vectors": {"original procedure": 2.0},
    "scgpt, file to tokens": {"original procedure": 2.0},
    "scgpt, file to vectors": {"original procedure": 1.5},
    "nucleotide-transformer, file to tokens": {"original procedure": 10},
}
"""What must be reached, float32."""


# Encoders


def encoders(*, smoke: bool) -> dict[str, Any]:
    """Compare forward passes over cells of mixed lengths."""
    out = {}
    for shape, name, longest, batches in (
        ("256x6", "geneformer-v1-10m", 2048, 4),
        ("512x12", "scgpt-human", 1200, 3),
        ("768x12", "geneformer-v2-104m", 2048, 2),
    ):
        lengths = mixed_lengths(longest // 16, 1, BUDGET // 16) if smoke else mixed_lengths(longest, batches, BUDGET)
        out[shape] = compare(make_model(name), lengths, rounds=1 if smoke else 2)
        print(shape, out[shape]["ratios"], flush=True)  # noqa: T201, a script for people
    return out


def mixed_lengths(longest: int, batches: int, budget: int) -> NDArray[np.int64]:
    """Return the lengths of some of the batches that 4,096 cells are cut into: then few cells are padded as little as many are."""
    drawn = np.random.default_rng(1).integers(longest // 7, longest + 1, 4096)
    all_batches = [index for index, _ in padded_batches(drawn, budget=budget)]
    chosen = (np.arange(batches) + 0.5) * len(all_batches) / batches
    return drawn[np.concatenate([all_batches[int(i)] for i in chosen])]


def compare(model: Model, lengths: NDArray[np.int64], *, rounds: int) -> dict[str, Any]:
    """Measure one shape: the hub and others, whole encoder, no head."""
    tokens, config = random_tokens(model, lengths), model.config
    known = Tokens(ids=tokens.ids % vocabulary_of(model), offsets=tokens.offsets)
    positions = max(model.longest, int(lengths.max()))
    hugging_face = HuggingFace(config, vocabulary_of(model), positions, attention="sdpa")

    def hub(model: Model) -> Callable[[], object]:
        return lambda: model.run(tokens, CPU, BUDGET, layer=config.layers, pooling="mean")

    variants: dict[str, Callable[[], object]] = {
        "hub": hub(model),
        "HF SDPA": lambda: Padded(hugging_face, budget=BUDGET).run(known, CPU),
        "HF SDPA, one row at a time": lambda: Padded(hugging_face, rows=1).run(known, CPU),
    }
    if has_amx():
        variants["hub bfloat16"] = hub(make_model(model.name, dtype=torch.bfloat16))
        variants["HF SDPA bfloat16 autocast"] = lambda: Padded(hugging_face, budget=BUDGET, autocast=torch.bfloat16).run(known, CPU)
    peaks: list[float] = []
    variants["GEMM"] = lambda: peaks.append(gemm_flops(CPU, torch.float32, 1024, cpu_seconds))
    model.run(random_tokens(model, np.array([40, 20])), CPU, BUDGET)  # kernels are chosen
    seconds = interleave(variants, rounds, cpu_seconds)
    del seconds["GEMM"]
    flops = useful_flops(config, lengths, config.layers)
    ratios = {name: value / seconds["hub"] for name, value in seconds.items() if not name.startswith("hub")}
    if has_amx():
        ratios["HF SDPA bfloat16 autocast, over hub bfloat16"] = seconds["HF SDPA bfloat16 autocast"] / seconds["hub bfloat16"]
    return {
        "timed": "from token ids in memory to a vector for each cell: batches cut, the whole encoder, mean over tokens; float32",
        "model": model.name,
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "lengths": [int(lengths.min()), int(lengths.max())],
        "tokens of a batch": BUDGET,
        "padding of HF SDPA": padding(lengths, budget=BUDGET),
        "GEMM peak, Gflop/s": max(peaks) / 1e9,
        "useful Gflop/s": flops / seconds["hub"] / 1e9,
        "cpu_seconds": seconds,
        "ratios": ratios | {"share of GEMM peak": flops / seconds["hub"] / max(peaks)},
    }


# Tokenizers


def tokenizers(*, smoke: bool) -> dict[str, Any]:
    """Compare tokenizers with the procedures of the releases, on the same cells, in cells a processor second."""
    rng, rounds = np.random.default_rng(0), 1 if smoke else 3
    counts = made_up_cells(64 if smoke else BLOCK_ROWS)
    few = counts[: 16 if smoke else 512]
    adata = ad.AnnData(few, obs={"n_counts": np.asarray(few.sum(axis=1)).ravel()})
    ranks, names, medians = rank_tokenizer(rng)
    rank_genes, every = ranks.match_genes(names), np.arange(GENES)
    bins = Bins(Vocabulary({f"G{i}": i for i in range(GENES)}, "a made-up checkpoint"), -2, 1200, "seeded")
    bin_genes = bins.match_genes([f"G{i}" for i in range(GENES)])
    species = Species(
        "human", [f"G{i}" for i in range(GENES)], 4, rng.integers(0, 24, GENES).astype(np.int32), rng.integers(1, 2 * 10**8, GENES)
    )
    placed = place_genes([f"G{i}" for i in range(GENES)], species)
    sequences = ["".join(rng.choice(list("ACGT"), 6000)) for _ in range(4 if smoke else 40)]
    kmers, hugging_face = kmer_tokenizers()

    def draw() -> object:
        return sentences(placed.apply(counts), placed, 0, samples=1, first_chromosome=143_574, max_tokens=1536)

    work: dict[str, tuple[Callable[[], object], int]] = {
        "ranks": (lambda: ranks.tokenize(rank_genes.apply(counts), rank_genes), counts.shape[0]),
        "ranks, upstream": (lambda: upstream.geneformer(adata, every, every, medians, 2048), few.shape[0]),
        "ranks, bare argsort": (lambda: upstream.bare_argsort(few, medians), few.shape[0]),
        "bins": (lambda: bins.tokenize(bin_genes.apply(counts), bin_genes, 0), counts.shape[0]),
        "bins, upstream": (lambda: upstream.scgpt(few, every, 1200, cls=GENES, padding=GENES + 1), few.shape[0]),
        "sentences": (draw, counts.shape[0]),
        "sentences, upstream": (lambda: upstream.uce(few, species.chromosomes, species.starts), few.shape[0]),
        "6-mers": (lambda: kmers.tokenize(sequences), len(sequences)),
        "6-mers, HF EsmTokenizer": (lambda: hugging_face(sequences), len(sequences)),
    }
    for name in ("ranks", "bins", "sentences", "6-mers"):
        work[name][0]()  # compiles
    seconds = interleave({name: call for name, (call, _) in work.items()}, rounds, cpu_seconds)
    rates = {name: work[name][1] / seconds[name] for name in work}
    return {
        "timed": "from counts in memory (6-mers: sequences) to tokens; columns were matched before",
        "rows": {name: rows for name, (_, rows) in work.items()},
        "expressed genes of a cell": counts.nnz / counts.shape[0],
        "datasets step included": has_datasets(),
        "cells (6-mers: sequences of 6,000 bases) a cpu second": rates,
        "ratios": {
            "ranks": rates["ranks"] / rates["ranks, upstream"],
            "ranks, bare argsort": rates["ranks"] / rates["ranks, bare argsort"],
            "bins": rates["bins"] / rates["bins, upstream"],
            "sentences": rates["sentences"] / rates["sentences, upstream"],
            "6-mers": rates["6-mers"] / rates["6-mers, HF EsmTokenizer"],
            "two threads": two_threads(lambda: ranks.tokenize(rank_genes.apply(counts), rank_genes), rounds),
        },
    }


def kmer_tokenizers() -> tuple[Kmers, Callable[[list[str]], object]]:
    """Make the hub's tokenizer and that of Hugging Face from one vocabulary, and see that they agree."""
    from itertools import product

    from transformers import EsmTokenizer

    vocabulary = [
        "<unk>",
        "<pad>",
        "<mask>",
        "<cls>",
        "<eos>",
        "<bos>",
        *("".join(letters) for letters in product("ATCG", repeat=6)),
        *"ATCGN",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(vocabulary))
        theirs = EsmTokenizer(str(path), eos_token=None)
    ours, example = Kmers(vocabulary), "ATTCCGATTCCGNNACGTACG"
    assert ours.tokenize([example]).ids.tolist() == theirs(example, add_special_tokens=False)["input_ids"]
    return ours, lambda sequences: theirs(sequences, add_special_tokens=False)


def two_threads(call: Callable[[], object], rounds: int) -> float:
    """Return how much sooner eight pieces of work are done by two threads than by one, on the wall."""

    def with_threads(n: int) -> Callable[[], object]:
        def work() -> None:
            with ThreadPoolExecutor(n) as pool:
                list(pool.map(lambda _: call(), range(8)))

        return work

    seconds = interleave({"one": with_threads(1), "two": with_threads(2)}, max(rounds, 2), wall_seconds)
    return seconds["one"] / seconds["two"]


# Reading


def reading(*, smoke: bool) -> dict[str, Any]:
    """Compare reading a gzip-compressed .h5ad block by block, every value looked at, with slices of anndata's backed matrix."""
    cells, rows = sp.vstack([made_up_cells(64 if smoke else 2048)] * 4).tocsr(), 2048
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        ad.AnnData(cells).write_h5ad(path, compression="gzip")
        with open_cells(path, (), "cpu.py") as data:
            matrix, backed = find_counts(data, None), ad.read_h5ad(path, backed="r")
            seconds = interleave(
                {
                    "hub": lambda: [None for _ in count_blocks(data, matrix)],
                    "anndata": lambda: [backed[start : start + rows].to_memory() for start in range(0, len(data), rows)],
                },
                1 if smoke else 7,
                cpu_seconds,
            )
            backed.file.close()
    rates = {name: cells.shape[0] / taken for name, taken in seconds.items()}
    return {
        "timed": "reading a gzip-compressed .h5ad in blocks, every value looked at; anndata: slices of its backed matrix",
        "rows": cells.shape[0],
        "gzip, cells a cpu second": rates,
        "ratios": {"gzip over anndata backed": rates["hub"] / rates["anndata"]},
    }


MEASURE = {"encoders": encoders, "tokenizers": tokenizers, "reading": reading, "files": files}


def misses(report: dict[str, Any]) -> list[str]:
    """List the floors that were not reached."""
    found = []
    for place, floors in FLOORS.items():
        measured = report.get("encoders", {}).get(place) or report.get("files", {}).get(place) or report.get(place) or {}
        for name, floor in floors.items():
            value = measured.get("ratios", {}).get(name)
            if value is not None and value < floor:
                found.append(f"{place}, {name}: {value:.3g}, floor {floor:g}")
    return found


def main() -> int:
    """Measure, print and write."""
    options = parser(__doc__, tuple(MEASURE), RESULTS / "cpu.json").parse_args()
    torch.set_num_threads(1)
    logging.getLogger("cellfm_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*nested tensors.*")
    report: dict[str, Any] = {"smoke": options.smoke, "measured": {}, "seconds": {}}
    if options.sections and options.json.exists():  # the other sections stay as they are
        report = json.loads(options.json.read_text(encoding="utf-8"))
    for section in options.sections or MEASURE:
        started = time.perf_counter()
        report[section] = MEASURE[section](smoke=options.smoke)
        report["seconds"][section] = time.perf_counter() - started
        report["measured"][section] = environment() | {"threads": 1, "amx": has_amx()}
        print(section, "done after", f"{report['seconds'][section]:.0f} s", flush=True)  # noqa: T201
    report["floors"], report["below floor"] = FLOORS, [] if options.smoke else misses(report)
    write_report(report, options.json)
    print(tables(significant(report)))  # noqa: T201, rounded as in the file
    for line in report["below floor"]:
        print("BELOW FLOOR", line)  # noqa: T201
    return 1 if report["below floor"] else 0


if __name__ == "__main__":
    sys.exit(main())
