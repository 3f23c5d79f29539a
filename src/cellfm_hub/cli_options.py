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


def by_model(values: list[str] | None, models: list[str], option: str) -> dict[str, str]:
    """Read ``value``, or ``model=value``, which it must be with several models."""
    found: dict[str, str] = {}
    for text in values or []:
        name, equals, value = text.partition("=")
        if not (equals and name in models):
            if len(models) != 1:
                message = f"{text!r}: say which model it is for, {models[0]}=…; models are {', '.join(models)}"
                raise typer.BadParameter(message, param_hint=option)
            name, value = models[0], text
        _note_once(found, name, value, option)
    return found


def parse_options(pairs: list[str], models: list[str]) -> dict[str, dict[str, str]]:
    """Read ``key=value``, or ``model.key=value``, which it must be with several models."""
    found: dict[str, dict[str, str]] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            message = f"{pair!r} is not of the form key=value"
            raise typer.BadParameter(message, param_hint="--option")
        name, dot, rest = key.rpartition(".")
        if not (dot and name in models):
            if len(models) != 1:
                message = f"{pair!r}: say which model it is for, {models[0]}.{pair}; models are {', '.join(models)}"
                raise typer.BadParameter(message, param_hint="--option")
            name, rest = models[0], key
        _note_once(found.setdefault(name, {}), rest, value, "--option")
    return found


def _note_once(found: dict[str, str], name: str, value: str, option: str) -> None:
    """Take a value; a second one for the same name would silently replace the first."""
    if found.setdefault(name, value) != value:
        message = f"{name} is given twice, {found[name]!r} and {value!r}; leave out one of them"
        raise typer.BadParameter(message, param_hint=option)
