"""The README's tables of speed from ``results/cpu.json``: ``python tests/benchmarks/cpu_tables.py [FILE]``."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu.json"

NETWORKS = {
    "256x6": "Geneformer V1-10M (256 wide, 6 layers)",
    "512x12": "scGPT (512 wide, 12 layers)",
    "768x12": "Geneformer V2-104M (768 wide, 12 layers)",
}
WAYS = {
    "geneformer, file to tokens": "`.h5ad` to ranks (Geneformer V1)",
    "scgpt, file to tokens": "`.h5ad` to bins (scGPT)",
    "nucleotide-transformer, file to tokens": "FASTA to 6-mers (Nucleotide Transformer; sequences of 6,000 bases)",
    "geneformer, file to vectors": "`.h5ad` to `.h5ad` with vectors (Geneformer V1-10M)",
    "scgpt, file to vectors": "`.h5ad` to `.h5ad` with vectors (scGPT)",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table of Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def number(value: float) -> str:
    """Round to what a reader can use."""
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def network_rows(encoders: Mapping[str, Any]) -> Iterator[list[str]]:
    """Give a row for each network that was measured."""
    for shape, measured in encoders.items():
        ratios = measured["ratios"]
        yield [
            NETWORKS[shape],
            f"{measured['rows']}, {measured['tokens']:,} tokens",
            number(ratios["HF SDPA"]),
            number(ratios["HF SDPA, one row at a time"]),
            f"{ratios['share of GEMM peak']:.0%}",
        ]


def way_rows(files: Mapping[str, Any]) -> Iterator[list[str]]:
    """Give a row for each way that was measured."""
    for way, measured in files.items():
        alone = measured["cpu_seconds"].get("hub, the network alone")
        yield [
            WAYS[way],
            f"{measured['rows']:,}",
            number(measured["cpu_seconds"]["hub"]),
            number(1 / alone * measured["cpu_seconds"]["hub"]) if alone else "",
            number(measured["ratios"]["original procedure"]),
        ]


def circumstances(measured: Mapping[str, Any]) -> str:
    """Say when, where and with what a section was measured."""
    machine = measured["machine"]
    where = f"{machine['processor']}, {machine['cpu_capability']}, {'with' if measured['amx'] else 'without'} AMX"
    return f"{measured['date']}, {measured['threads']} thread of {where}; " + ", ".join(map(" ".join, measured["versions"].items()))


def tables(report: Mapping[str, Any]) -> str:
    """Return the tables of what a report holds."""
    parts = []
    if "encoders" in report:
        head = [
            "network, token ids to vectors",
            "cells",
            "over Hugging Face SDPA",
            "over the same, one cell a batch",
            "share of matrix-product peak",
        ]
        parts += [circumstances(report["measured"]["encoders"]), table(head, list(network_rows(report["encoders"])))]
    if "files" in report:
        head = ["the whole way", "rows", "CPU seconds", "times the network alone", "over the original procedure"]
        parts += [circumstances(report["measured"]["files"]), table(head, list(way_rows(report["files"])))]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS).read_text(encoding="utf-8"))))  # noqa: T201
