"""How fast the hub is on CPUs, as ratios to what others run, measured in the same process in turn. One thread, processor seconds.

Networks have random weights in published shapes; tokenizers get made-up cells of about 2,190 expressed genes, as the founders' figures do.
Run: ``python tests/benchmarks/cpu.py`` (a few minutes); ``--smoke`` takes half a minute and says nothing about speed. With the
package ``datasets`` installed, the original procedure of Geneformer includes its second half. Results: ``results/cpu.json``.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

from benchmarks import upstream
from benchmarks.common import (
    CPU,
    GENES,
    RESULTS,
    HuggingFace,
    Model,
    Padded,
    TorchLayers,
    cpu_seconds,
    environment,
    gemm_flops,
    interleave,
    made_up_cells,
    make_model,
    parser,
    random_tokens,
    rank_tokenizer,
    useful_flops,
    vocabulary_of,
    wall_seconds,
    write_report,
)
from cellfm_adapters.nucleotide_transformer.tokenizer import Tokenizer as Kmers
from cellfm_adapters.scgpt.tokenizer import Tokenizer as Bins
from cellfm_adapters.scgpt.tokenizer import Vocabulary
from cellfm_adapters.uce.species import Species
from cellfm_adapters.uce.tokenizer import place_genes
from cellfm_adapters.uce.tokenizer import tokenize as sentences
from cellfm_hub.engine.device import has_amx
from cellfm_hub.engine.overlap import prefetch
from cellfm_hub.sources.cells import BLOCK_ROWS, count_blocks, find_counts, open_cells

BUDGET = 4096

FLOORS: dict[str, dict[str, float]] = {
    "256x6": {"vs HF eager": 1.7, "vs upstream procedure": 3.0, "share of GEMM peak": 0.60},
    "512x12": {"vs HF eager": 1.1, "vs nn.TransformerEncoder": 2.2, "share of GEMM peak": 0.60},
    "768x12": {"vs HF eager": 1.3, "share of GEMM peak": 0.65},
    "tokenizers": {"ranks": 20, "ranks, bare argsort": 4, "bins": 5, "sentences": 10, "6-mers": 50, "two threads": 1.6},
    "reading": {"gzip over anndata backed": 1.0},
    "pipeline": {"end to end over network alone": 0.90, "end to end over network alone, on the wall": 0.90},
}
"""What must be reached, float32."""


# Encoders


def encoders(*, smoke: bool) -> dict[str, Any]:
    """Compare forward passes over cells of mixed lengths."""
    out = {}
    for shape, name, cells, longest, rows in (
        ("256x6", "geneformer-v1-10m", 16, 2048, 16),
        ("512x12", "scgpt-human", 10, 1200, 10),
        ("768x12", "geneformer-v2-104m", 4, 2048, 4),
    ):
        lengths = np.random.default_rng(1).integers(300, longest + 1, cells)
        if smoke:
            lengths = lengths[:2] // 16
        model = make_model(name)
        out[shape] = compare(model, lengths, rows, upstream_of=shape, rounds=1 if smoke else 2)
        print(shape, out[shape]["ratios"], flush=True)  # noqa: T201, a script for people
    return out


def compare(model: Model, lengths: np.ndarray, rows: int, *, upstream_of: str, rounds: int) -> dict[str, Any]:
    """Measure one shape: the hub and the others, whole encoder, float32; then Geneformer's recipe against its procedure."""
    tokens, config = random_tokens(model, lengths), model.config
    vocabulary, longest = vocabulary_of(model), max(model.longest, int(lengths.max()))

    def hugging_face(
        attention: str, *, head: bool = False, by_length: bool = False, autocast: torch.dtype | None = None
    ) -> Callable[[], object]:
        network = HuggingFace(config, vocabulary, longest, attention=attention, head=head)
        batches: dict[str, Any] = {"budget": BUDGET} if by_length else {"rows": rows}
        return lambda: Padded(network, **batches, autocast=autocast).run(tokens, CPU)

    variants: dict[str, Callable[[], object]] = {
        "hub": lambda: model.run(tokens, CPU, BUDGET, layer=config.layers, pooling="mean"),
        "HF eager": hugging_face("eager"),
        "HF SDPA": hugging_face("sdpa"),
        "HF SDPA, longest first": hugging_face("sdpa", by_length=True),
    }
    if has_amx():
        half = make_model(model.name)
        half.adapter.network.to(torch.bfloat16)
        variants["hub bfloat16"] = lambda: half.run(tokens, CPU, BUDGET, layer=config.layers, pooling="mean")
        variants["HF SDPA bfloat16 autocast"] = hugging_face("sdpa", autocast=torch.bfloat16)
    if upstream_of == "256x6":
        variants["hub, recipe"] = lambda: model.run(tokens, CPU, BUDGET)
        variants["upstream procedure"] = hugging_face("eager", head=True, by_length=True)
    if upstream_of == "512x12":
        layers = TorchLayers(config, vocabulary)
        variants["hub, recipe"] = lambda: model.run(tokens, CPU, BUDGET)
        variants["nn.TransformerEncoder"] = lambda: Padded(layers, rows=rows).run(tokens, CPU)
    peaks: list[float] = []
    variants["GEMM"] = lambda: peaks.append(gemm_flops(CPU, torch.float32, 1024, cpu_seconds))
    small = random_tokens(model, np.array([40, 20]))
    model.run(small, CPU, BUDGET)
    seconds = interleave(variants, rounds, cpu_seconds)
    del seconds["GEMM"]
    peak, flops = max(peaks), useful_flops(config, lengths, config.layers)
    hub, recipe = seconds["hub"], seconds.get("hub, recipe", seconds["hub"])
    ratios = {f"vs {name}": value / hub for name, value in seconds.items() if not name.startswith("hub")}
    if "upstream procedure" in seconds:
        ratios["vs upstream procedure"] = seconds["upstream procedure"] / recipe
    if "nn.TransformerEncoder" in seconds:
        ratios["recipe (first tokens) vs nn.TransformerEncoder"] = seconds["nn.TransformerEncoder"] / recipe
    ratios["share of GEMM peak"] = flops / hub / peak
    return {
        "model": model.name,
        "lengths": lengths.tolist(),
        "rows of a padded batch": rows,
        "padding of the padded ones": padding(lengths, rows),
        "GEMM peak, Gflop/s": peak / 1e9,
        "useful Gflop/s": flops / hub / 1e9,
        "cpu_seconds": seconds,
        "ratios": ratios,
    }


def padding(lengths: np.ndarray, rows: int) -> float:
    """Return padded over real tokens."""
    parts = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    return float(sum(len(part) * part.max() for part in parts) / lengths.sum())


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
        "ranks, upstream": (lambda: upstream.geneformer(adata, every, medians, 2048), few.shape[0]),
        "ranks, bare argsort": (lambda: upstream.bare_argsort(few, medians), few.shape[0]),
        "bins": (lambda: bins.tokenize(bin_genes.apply(counts), bin_genes, 0), counts.shape[0]),
        "bins, upstream": (lambda: upstream.scgpt(few, every, 1200), few.shape[0]),
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


def has_datasets() -> bool:
    """Whether the second half of Geneformer's procedure can be run."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        return False
    return True


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
    return {"gzip, cells a cpu second": rates, "ratios": {"gzip over anndata backed": rates["hub"] / rates["anndata"]}}


# From counts to vectors


def pipeline(*, smoke: bool) -> dict[str, Any]:
    """Compare the whole way, from counts in memory, with the network alone: made-up cells, the shape of Geneformer-V1-10M.

    On the wall also: whether torch should leave one core to the thread that tokenizes ahead.
    """
    model, rounds = make_model("geneformer-v1-10m"), 1 if smoke else 2
    tokenizer, names, _ = rank_tokenizer(np.random.default_rng(0))
    genes, counts = tokenizer.match_genes(names), made_up_cells(4 if smoke else 16)
    block, cores = 2 if smoke else 4, os.cpu_count() or 1

    def blocks() -> Any:
        for start in range(0, counts.shape[0], block):
            yield tokenizer.tokenize(genes.apply(counts[start : start + block]), genes)

    def whole(*, ahead: bool, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        with prefetch(blocks()) if ahead else nullcontext(blocks()) as stream:
            for tokens in stream:
                model.run(tokens, CPU, BUDGET)
        torch.set_num_threads(1)

    ready = list(blocks())
    variants: dict[str, Callable[[], object]] = {
        "network alone": lambda: [model.run(tokens, CPU, BUDGET) for tokens in ready],
        "end to end": lambda: whole(ahead=True),
        "end to end, without overlap": lambda: whole(ahead=False),
    }
    cpu = interleave(variants, rounds, cpu_seconds)
    if cores > 1:
        variants["end to end, torch on all cores"] = lambda: whole(ahead=True, threads=cores)
        variants["end to end, torch on all cores but one"] = lambda: whole(ahead=True, threads=cores - 1)
    wall = interleave(variants, rounds, wall_seconds)
    ratios = {
        "end to end over network alone": cpu["network alone"] / cpu["end to end"],
        "end to end over network alone, on the wall": wall["network alone"] / wall["end to end"],
        "overlap over none, on the wall": wall["end to end, without overlap"] / wall["end to end"],
    }
    if cores > 1:
        ratios["all cores over all but one, on the wall"] = (
            wall["end to end, torch on all cores but one"] / wall["end to end, torch on all cores"]
        )
    return {"cells": counts.shape[0], "cores": cores, "cpu_seconds": cpu, "wall_seconds": wall, "ratios": ratios}


MEASURE = {"encoders": encoders, "tokenizers": tokenizers, "reading": reading, "pipeline": pipeline}


def misses(report: dict[str, Any]) -> list[str]:
    """List the floors that were not reached."""
    found = []
    for place, floors in FLOORS.items():
        measured = report.get("encoders", {}).get(place) or report.get(place) or {}
        for name, floor in floors.items():
            value = measured.get("ratios", {}).get(name)
            if value is not None and value < floor:
                found.append(f"{place}, {name}: {value:.3g}, floor {floor:g}")
    return found


def main() -> int:
    """Measure, print and write."""
    options = parser(__doc__, tuple(MEASURE), RESULTS / "cpu.json").parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*nested tensors.*")
    report: dict[str, Any] = environment() | {"threads": 1, "smoke": options.smoke, "amx": has_amx(), "seconds": {}}
    if options.sections and options.json.exists():  # the other sections stay as they are
        report = json.loads(options.json.read_text(encoding="utf-8")) | {key: report[key] for key in ("date", "machine", "versions")}
    for section in options.sections or MEASURE:
        started = time.perf_counter()
        report[section] = MEASURE[section](smoke=options.smoke)
        report["seconds"][section] = time.perf_counter() - started
        print(section, report[section].get("ratios", ""), flush=True)  # noqa: T201
    report["floors"], report["below floor"] = FLOORS, [] if options.smoke else misses(report)
    write_report(report, options.json)
    for line in report["below floor"]:
        print("BELOW FLOOR", line)  # noqa: T201
    return 1 if report["below floor"] else 0


if __name__ == "__main__":
    sys.exit(main())
