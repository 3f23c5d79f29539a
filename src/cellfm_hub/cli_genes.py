"""The command about gene tables. Registered by :mod:`cellfm_hub.cli`."""

from collections.abc import Callable
from typing import Annotated

import typer


def genes(
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch the HGNC table: former symbols, aliases, Entrez ids of human genes.")
    ] = False,
    renew: Annotated[bool, typer.Option("--renew", help="Fetch it again, for a newer one.")] = False,
) -> None:
    """Say which tables of gene names are used, or fetch the one that does not ship."""
    from cellfm_hub.genes import fetch_history, tables
    from cellfm_hub.genes.names import name_book

    if fetch or renew:
        typer.echo(f"fetched {fetch_history(renew=renew)}")
    for species in tables.SHIPPED:
        book = name_book(species)
        assert book is not None
        typer.echo(f"{species}: {len(book.ensembl):,} genes, {book.n_names:,} names, from {', '.join(book.sources)}")
    if not tables.history_files(("hgnc_*",)):
        typer.echo("former symbols and aliases are not known; 'cellfm genes --fetch' brings those of human genes (HGNC)")


def register(app: typer.Typer, one_line_errors: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Add the command to the application."""
    app.command()(one_line_errors(genes))
