"""The command line, ``cellfm``.

Only the standard library, typer and the commands about weights are imported here, so that ``--help`` is quick; everything else on use.
"""

import functools
import json
import logging
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from cellfm_hub import cli_check, cli_demo, cli_genes, cli_weights
from cellfm_hub.cli_options import Long, Precision, by_model, parse_options

if TYPE_CHECKING:
    from cellfm_hub.jobs.run import Summary

app = typer.Typer(
    name="cellfm",
    help="Embed cells and DNA with published foundation models.",
    epilog="Start with: cellfm demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class OnEmpty(StrEnum):  # noqa: D101
    nan = "nan"
    error = "error"


class Level(StrEnum):  # noqa: D101
    cell = "cell"
    gene = "gene"
    sequence = "sequence"
    token = "token"
    base = "base"
    variant = "variant"


class Strands(StrEnum):  # noqa: D101
    mean = "mean"


class Modality(StrEnum):  # noqa: D101
    cell = "cell"
    sequence = "sequence"


P = ParamSpec("P")
_show_traceback = False


def _one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors that the hub raises on purpose into one line and exit code 1, or 2 where the command was not meant so."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from cellfm_hub.errors import CellFMError, UsageError

        try:
            command(*args, **kwargs)
        except CellFMError as error:
            if _show_traceback:
                raise
            typer.echo(f"cellfm: error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
        except KeyboardInterrupt as stop:
            typer.echo(f"cellfm: interrupted{f'; {stop}' if str(stop) else ''}", err=True)
            raise typer.Exit(130) from None

    return wrapped


def _complete_model(incomplete: str) -> list[str]:
    from cellfm_hub.registry import registry

    return [name for name in registry().names if name.startswith(incomplete.lower())]


def _parse_shard(text: str) -> tuple[int, int]:
    place, slash, count = text.partition("/")
    if not slash or not place.isdecimal() or not count.isdecimal() or not 1 <= int(place) <= int(count):
        message = f"{text!r} is not of the form i/n, with i from 1 to n"
        raise typer.BadParameter(message, param_hint="--shard")
    return int(place), int(count)


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere on the line.")] = False,
) -> None:
    global _show_traceback
    _show_traceback = _show_traceback or debug


@app.command()
@_one_line_errors
def embed(
    data: Annotated[
        Path,
        typer.Argument(
            help="Cells: .h5ad, .zarr, 10x .h5 or mtx folder, .h5mu, .loom, .csv or .tsv. Sequences: FASTA, FASTQ, BED or VCF (also .gz).",
            show_default=False,
        ),
    ],
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            help="Family or checkpoint. May be given again: several models read DATA once, into one .h5ad or .zarr.",
            autocompletion=_complete_model,
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Result: .h5ad, .zarr, .parquet or .npy.", show_default="beside DATA, <stem>.<model>.h5ad or .parquet"
        ),
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Add the result to DATA itself (.h5ad).")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result; forget an interrupted run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run, if there is one.")] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Take the vectors of rows that did not change from the existing result.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(help="Compute the i-th of n equal shares of the rows only, from 1/n to n/n; then 'cellfm merge OUT'.")
    ] = None,
    part_rows: Annotated[
        int | None, typer.Option(help="Rows between two savings, what a crash costs at most.", show_default="8192")
    ] = None,
    level: Annotated[
        Level | None,
        typer.Option(
            help="One vector per cell or sequence, per gene, token or base, or per variant of a VCF.", show_default="cell or sequence"
        ),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Cells: layer with raw counts, or X, or raw.", show_default="found")] = None,
    gene_ids: Annotated[str | None, typer.Option(help="Cells: var column with gene identifiers, or index.", show_default="found")] = None,
    species: Annotated[str | None, typer.Option(help="Cells: species of the data, checked against the model's.")] = None,
    key_added: Annotated[
        list[str] | None, typer.Option(help="Key in obsm and uns; with several models model=KEY.", show_default="X_<model>")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Bundle of pooling and layer; 'cellfm info MODEL' lists them.")] = "default",
    pooling: Annotated[str | None, typer.Option(help="How tokens become one vector.", show_default="the recipe's")] = None,
    output_layer: Annotated[
        int | None, typer.Option(help="0 embedding output, k after block k, -1 last.", show_default="the recipe's")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps; several (cuda:0,cuda:1) or all: a process for each.")
    ] = "auto",
    precision: Annotated[Precision, typer.Option(help="Number format of the network.")] = Precision.auto,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens computed together; changes no vector.", show_default="by device")] = None,
    seed: Annotated[int, typer.Option(help="For models that sample.")] = 0,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="Folder with the model's files as published; with several models model=FOLDER.", show_default=False),
    ] = None,
    revision: Annotated[
        list[str] | None,
        typer.Option(help="Commit on the hub instead of the pinned one; with several models model=COMMIT.", show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", help="Switch of the family, key=value; repeatable; with several models model.key=value.", show_default=False
        ),
    ] = None,
    on_empty: Annotated[OnEmpty, typer.Option(help="Cells without any gene the model knows.")] = OnEmpty.nan,
    long: Annotated[Long, typer.Option(help="Sequences longer than the model's input.")] = Long.error,
    overlap: Annotated[int, typer.Option(help="Bases that windows share with --long tile.")] = 0,
    reverse_complement: Annotated[Strands | None, typer.Option(help="Average over both strands.")] = None,
    genome: Annotated[Path | None, typer.Option(help="BED and VCF: FASTA file of the genome.")] = None,
    window: Annotated[int, typer.Option(help="VCF: bases of the reference window.")] = 512,
    progress: Annotated[bool | None, typer.Option(help="Show a progress bar.", show_default="on a terminal")] = None,
    qc: Annotated[bool, typer.Option("--qc", help="Cells: add what the model saw of each to obs.")] = False,
    commercial_ok: cli_weights.CommercialOk = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Embed the cells or sequences of a file."""
    from cellfm_hub import settings
    from cellfm_hub.registry import registry

    settings.commercial = settings.commercial or commercial_ok

    options = parse_options(option or [], model)
    own = {
        name: by_model(values, model, f"--{name.replace('_', '-')}")
        for name, values in {"key_added": key_added, "checkpoint": checkpoint, "revision": revision}.items()
    }
    wanted = None if shard is None else _parse_shard(shard)
    modality = registry().find(model[0]).modality
    per_token = level in (Level.gene, Level.token, Level.base)
    suffix = ".h5ad" if len(model) > 1 or (modality == "cell" and not per_token) else ".parquet"
    _check_place(data, out, in_place=in_place)
    out = data if in_place else out or _default_output(data, "+".join(model), suffix)

    from cellfm_hub.jobs.run import embed_file

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    begin = time.perf_counter()
    summaries = embed_file(
        data,
        model,
        out=out,
        resume=resume,
        overwrite=overwrite,
        update=update,
        shard=wanted,
        part_rows=part_rows,
        level=None if level is None else level.value,
        layer=layer,
        gene_ids=gene_ids,
        species=species,
        key_added=own["key_added"],
        recipe=recipe,
        pooling=pooling,
        output_layer=output_layer,
        device=device,
        precision=precision.value,
        batch_tokens=batch_tokens,
        seed=seed,
        checkpoint=own["checkpoint"],
        revision=own["revision"],
        options=options,
        on_empty=on_empty.value,
        progress=progress,
        long=long.value,
        overlap=overlap,
        reverse_complement=None if reverse_complement is None else "mean",
        genome=genome,
        window=window,
        qc=qc,
    )
    seconds = time.perf_counter() - begin
    if as_json:
        shown = [
            {"out": str(s.out), "key": s.key, "rows": s.rows, "dim": s.dim, "seconds": round(seconds, 3), "receipt": s.receipt}
            for s in summaries
        ]
        typer.echo(json.dumps(shown[0] if len(shown) == 1 else shown, indent=1))
        return
    for summary in summaries:
        _say(summary, modality, seconds)
    if wanted is not None:
        if summaries[0].out == out:
            typer.echo(f"shard {shard}: nothing to do, all shards are merged into {out}")
        else:
            typer.echo(f"shard {shard} is finished; when all {wanted[1]} are: cellfm merge {out}")


def _say(summary: "Summary", modality: str, seconds: float | None = None) -> None:
    where = f"obsm[{summary.key!r}] of {summary.out}" if summary.out.suffix in (".h5ad", ".zarr") else str(summary.out)
    took = "" if seconds is None else f" in {seconds:.1f} s"
    typer.echo(f"{summary.rows:,} {modality}s x {summary.dim}{took} -> {where}")
    receipt = summary.receipt
    if "genes_used" in receipt:
        share = f"{receipt['counts_used']:.1%} of all counts, " if "counts_used" in receipt else ""  # not of logarithms
        typer.echo(
            f"genes: {receipt['genes_used']:,} of {receipt['genes']:,} known to the model (column {receipt['gene_ids']}), "
            f"{share}from {receipt['counts_from']}"
        )


@app.command()
@_one_line_errors
def merge(
    out: Annotated[Path, typer.Argument(help="The result that shards were computed of, with --shard.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the shards.")] = False,
) -> None:
    """Put the shards of a result together."""
    from cellfm_hub.jobs.merge import merge
    from cellfm_hub.registry import registry

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for summary in merge(out, overwrite=overwrite, keep=keep):
        _say(summary, registry().find(str(summary.receipt["family"])).modality)


def _check_place(data: Path, out: Path | None, *, in_place: bool) -> None:
    """See that the input is changed only where that was said: however ``-o`` spells its name, and through links too."""
    from cellfm_hub.errors import UsageError
    from cellfm_hub.sinks import same_file

    if out is None or same_file(out, data) == in_place:
        return
    if in_place:
        message = f"--in-place adds the result to {data} itself, -o {out} is another file; leave out one of them"
    else:
        message = f"-o {out} is the input itself; pass --in-place to add the result to it, or choose another name with -o"
    raise UsageError(message)


def _default_output(data: Path, model: str, suffix: str) -> Path:
    data = data if data.name else data.resolve()
    stem = data.name.removesuffix(".gz")
    stem = data.name if data.is_dir() and not stem.endswith(".zarr") else Path(stem).stem
    return data.with_name(f"{stem}.{model.replace('/', '_')}{suffix}")


@app.command()
@_one_line_errors
def models(
    modality: Annotated[Modality | None, typer.Option(help="Only models of cells, or of sequences.")] = None,
    commercial: Annotated[bool | None, typer.Option(help="Only weights that may (or may not) be used commercially.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models."""
    from dataclasses import asdict

    from cellfm_hub.registry import list_models

    found = list_models(modality=None if modality is None else modality.value, commercial=commercial)
    if as_json:
        typer.echo(json.dumps([asdict(info) for info in found], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("family", "model", "of", "width", "parameters", "licence", "commercial use"):
        table.add_column(heading, no_wrap=heading in ("family", "model"), justify="right" if heading in ("width", "parameters") else "left")
    for info in found:
        table.add_row(
            info.family,
            f"{info.name}{' (default)' if info.default else ''}",
            info.modality,
            _number(info.embedding_dim),
            _number(info.parameters),
            info.licence,
            _yes_no(info.commercial_use),
        )
    # A pipe gets full lines, whatever the width of a terminal.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@app.command()
@_one_line_errors
def info(
    name: Annotated[str, typer.Argument(help="Family or checkpoint.", autocompletion=_complete_model, show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is known of a model: its card."""
    from dataclasses import asdict

    from cellfm_hub.registry import registry

    entry = registry().find(name)
    card, checkpoint = entry.card, entry.checkpoint
    if as_json:
        facts = asdict(entry.info()) | {
            "options": entry.options,
            "recipes": {key: recipe.model_dump() for key, recipe in entry.recipes.items()},
            "requires": entry.requires.model_dump(),
            "files": {path: file.model_dump() for path, file in checkpoint.files.items()},
            "fidelity": {key: value.model_dump() for key, value in checkpoint.fidelity.items()},
        }
        typer.echo(json.dumps(facts, indent=1))
        return
    summary = entry.info()
    requires = entry.requires
    needs = [requires.values, requires.ids and f"{requires.ids} ids", ", ".join(requires.species)]
    lines = [
        f"{entry.name}: {summary.description}",
        f"  family          {entry.family} ({card.cellfm.title})",
        f"  needs           {'; '.join(part for part in needs if part)}",
        f"  vectors         {_number(summary.embedding_dim)} wide",
        f"  network         {_number(summary.layers)} layers, {_number(summary.parameters)} parameters",
        f"  longest input   {_number(summary.max_tokens)} tokens",
        f"  licence         {summary.licence}; commercial use: {_yes_no(summary.commercial_use)}",
        f"  citation        {'https://doi.org/' + summary.citation if summary.citation else 'none'}",
        f"  source          {summary.source or 'no weights'}{' at ' + summary.revision if summary.revision else ''}",
        *(f"  also called     {', '.join(summary.aliases)}" for _ in summary.aliases[:1]),
        *(f"  checkpoints     {', '.join(card.cellfm.checkpoints)}" for _ in list(card.cellfm.checkpoints)[1:2]),
        *_block("recipes", {key: recipe.description for key, recipe in entry.recipes.items()}),
        *_block("options", entry.options),
        *_block(
            "files", {path: f"{_number(file.size)} bytes, SHA-256 {file.sha256 or 'not known'}" for path, file in checkpoint.files.items()}
        ),
        "",
        card.text,
    ]
    typer.echo("\n".join(lines))


def _block(title: str, entries: dict[str, str]) -> list[str]:
    return [f"  {title}", *(f"    {key}: {text}" for key, text in entries.items())] if entries else []


def _number(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _yes_no(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "no"


@app.command()
@_one_line_errors
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices and folders: what a report of a problem should hold."""
    from importlib.metadata import version

    import torch

    from cellfm_hub import settings
    from cellfm_hub.engine.device import choose_batch_tokens, choose_device, choose_dtype, has_amx
    from cellfm_hub.nn.attention import report
    from cellfm_hub.receipt import versions
    from cellfm_hub.registry import list_models

    device = choose_device("auto")
    facts: dict[str, Any] = dict(versions())
    facts |= {f"{name}_version": version(name) for name in ("anndata", "scanpy", "scipy", "huggingface_hub", "safetensors")}
    facts |= {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "amx": has_amx(),
        "precision_auto": str(choose_dtype("auto", device, None)).removeprefix("torch."),
        "batch_tokens": choose_batch_tokens(None, device),
        **report(device, choose_dtype("auto", device, None)),
        "cache_dir": str(settings.cache_dir),
        "offline": settings.offline,
        "models": len(list_models()),
        "plug_ins": sorted({info.package for info in list_models()} - {"cellfm-hub"}),
    }
    typer.echo(json.dumps(facts, indent=1) if as_json else "\n".join(f"{key:<24}{value}" for key, value in facts.items()))


cli_demo.register(app, _one_line_errors)
cli_check.register(app, _one_line_errors)
cli_weights.register(app, _one_line_errors)
cli_genes.register(app, _one_line_errors)


def main() -> None:
    """Run the command line."""
    global _show_traceback
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        _show_traceback = True
    app()


if __name__ == "__main__":
    main()
