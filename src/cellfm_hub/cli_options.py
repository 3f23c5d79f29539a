"""Options that several commands of the command line have in common."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[Path, typer.Argument(help="File with cells or sequences.", show_default=False)]
Layer = Annotated[str | None, typer.Option(help="Cells: layer with raw counts, or X, or raw.", show_default="found")]
GeneIds = Annotated[str | None, typer.Option(help="Cells: var column with gene identifiers, or index.", show_default="found")]
Species = Annotated[str | None, typer.Option(help="Cells: species of the data, checked against the model's.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Folder with the model's files as published.")]
Revision = Annotated[str | None, typer.Option(help="Commit on the hub instead of the pinned one.")]
Options = Annotated[list[str] | None, typer.Option("--option", help="Switch of the family, key=value; repeatable.", show_default=False)]


class Precision(StrEnum):  # noqa: D101
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Long(StrEnum):  # noqa: D101
    error = "error"
    truncate = "truncate"
    tile = "tile"


def parse_options(pairs: list[str]) -> dict[str, str]:
    """Read the switches of a family, ``key=value`` each."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            message = f"{pair!r} is not of the form key=value"
            raise typer.BadParameter(message, param_hint="--option")
        options[key] = value
    return options
