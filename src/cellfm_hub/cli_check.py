"""Commands that look at data before they are embedded: check, explain. Registered by :mod:`cellfm_hub.cli`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellfm_hub.cli_options import Checkpoint, Data, GeneIds, Layer, Long, Options, Precision, Revision, Species, by_model, parse_options

if TYPE_CHECKING:
    from cellfm_hub.explaining import Explanation

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

PIPE_WIDTH = 200
"""A pipe gets full lines, whatever the width of a terminal."""


def check(
    data: Data,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Family or checkpoint; repeatable.", show_default="the default of every family"),
    ] = None,
    layer: Layer = None,
    gene_ids: GeneIds = None,
    species: Species = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="Folder with the model's files as published; with several models MODEL=FOLDER.")
    ] = None,
    revision: Annotated[list[str] | None, typer.Option(help="Commit on the hub instead of the pinned one.")] = None,
    option: Options = None,
    device: Annotated[str, typer.Option(help="For the estimate: auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    precision: Annotated[Precision, typer.Option(help="For the estimate: number format of the network.")] = Precision.auto,
    long: Annotated[Long, typer.Option(help="Sequences longer than the model's input.")] = Long.error,
    genome: Annotated[Path | None, typer.Option(help="BED and VCF: FASTA file of the genome.")] = None,
    window: Annotated[int, typer.Option(help="VCF: bases of the reference window.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Say what a file holds and what models would make of it. Nothing is downloaded.

    Exit code 1 if a model named with --model would refuse the data.
    """
    from rich.console import Console

    from cellfm_hub.check_screen import render
    from cellfm_hub.checking import check as check_data
    from cellfm_hub.errors import CellFMError

    named = model or []
    if not named and (checkpoint or revision or option):
        message = "--checkpoint, --revision and --option are those of a model"
        raise typer.BadParameter(message, param_hint="--model")
    report = check_data(
        data,
        model,
        layer=layer,
        gene_ids=gene_ids,
        species=species,
        checkpoint=by_model(checkpoint, named, "--checkpoint") or None,
        revision=by_model(revision, named, "--revision") or None,
        options=parse_options(option or [], named),
        device=device,
        precision=precision.value,
        long=long.value,
        genome=genome,
        window=window,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(render(report))
    if model and report.refusals:
        name, reason = next(iter(report.refusals.items()))
        others = f" ({len(report.refusals)} of {len(report.models)} models named refuse)" if len(report.refusals) > 1 else ""
        msg = f"{name} would refuse {data}: {reason}{others}"
        raise CellFMError(msg)


def explain(
    data: Data,
    model: Annotated[str, typer.Option("--model", "-m", help="Family or checkpoint of cells.", show_default=False)],
    cell: Annotated[str, typer.Option("--cell", help="Name of the cell, its barcode.", show_default=False)],
    layer: Layer = None,
    gene_ids: GeneIds = None,
    species: Species = None,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    option: Options = None,
    seed: Annotated[int, typer.Option(help="For models that sample.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the tokens of one cell, as a model sees them, and the genes that made none."""
    from cellfm_hub.api import load_tokenizer
    from cellfm_hub.explaining import check_explains, explain_cell

    check_explains(data, model, layer=layer, gene_ids=gene_ids, species=species)
    embedder = load_tokenizer(
        model, checkpoint=checkpoint, revision=revision, options=parse_options(option or [], [model]).get(model), seed=seed
    )
    explained = explain_cell(data, embedder, cell=cell, layer=layer, gene_ids=gene_ids, species=species)
    if as_json:
        facts: dict[str, Any] = {"cell": explained.cell, "model": explained.model, "facts": explained.facts}
        facts |= {"genes": explained.genes, "counts": explained.counts, "n_tokens": explained.n_tokens}
        typer.echo(json.dumps(facts | {"tokens": json.loads(explained.table.to_json(orient="records"))}, indent=1))
    else:
        _print_explanation(explained)


_COLOURS = {"kept": "", "special": "dim", "cut": "yellow", "unknown": "red"}
_MEANINGS = {
    "kept": "are among the tokens",
    "cut": "are known to the model, but did not fit or were not drawn",
    "unknown": "are unknown to the model",
    "special": "hold no gene",
}


def _print_explanation(explained: "Explanation") -> None:
    """Print totals, then the table."""
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    facts = explained.facts
    typer.echo(f"{explained.cell} as {explained.model} sees it: {explained.n_tokens:,} tokens")
    typer.echo(f"counts from {facts['counts_from']}, genes from {facts['gene_ids']}")
    for status, genes in explained.genes.items():
        typer.echo(f"{genes:,} genes with {explained.counts[status]:,.6g} counts {_MEANINGS[status]}")
    if not explained.n_tokens:
        typer.echo("the model gets nothing of this cell; its vector is NaN")
    frame = explained.table.drop(columns="token_id")
    for column in ("name", "value"):
        if frame[column].isna().all() or (column == "name" and (frame["name"] == frame["gene"]).all()):
            frame = frame.drop(columns=column)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in frame.columns:
        table.add_column(column, justify="right" if column in ("position", "count", "value", "draw") else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        cells = ["" if pd.isna(value) else f"{value:.6g}" if isinstance(value, float) else str(value) for value in row]
        table.add_row(*cells, style=_COLOURS[str(row.status)])
    console.print(table)


def register(app: typer.Typer, one_line_errors: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Add the commands to the application."""
    commands: tuple[Callable[..., Any], ...] = (check, explain)
    for command in commands:
        app.command()(one_line_errors(command))
