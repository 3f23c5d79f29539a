"""Commands about weights: pull, add, bundle, unbundle, cache, convert, selftest. Registered by :mod:`cellfm_hub.cli`."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cellfm_hub.registry import Entry

Models = Annotated[list[str], typer.Argument(help="Families or checkpoints.", show_default=False)]
Model = Annotated[str, typer.Argument(help="Family or checkpoint.", show_default=False)]
CommercialOk = Annotated[bool, typer.Option("--commercial-ok", help="Refuse weights that are not known to allow commercial use.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def _settings(*, commercial: bool) -> Iterator[None]:
    from cellfm_hub._settings import settings

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    with settings.override(commercial=commercial or settings.commercial):
        yield


def pull(
    models: Models,
    revision: Annotated[str | None, typer.Option(help="Commit on the hub instead of the pinned one.")] = None,
    commercial_ok: CommercialOk = False,
) -> None:
    """Fetch models, or check what is here: every file is read again and its hash compared."""
    from cellfm_hub.checkpoints import CheckpointFiles, readable
    from cellfm_hub.registry import registry

    entries = [registry().find(model) for model in models]
    if revision is not None:
        _check_revision(revision, entries)
    with _settings(commercial=commercial_ok):
        for entry in entries:
            if entry.checkpoint.source is None:
                typer.echo(f"{entry.name}: has no weights, nothing to fetch")
                continue
            files = CheckpointFiles(entry, revision=revision)
            paths = files.bring_all(again=True)
            size = sum(path.stat().st_size for path in paths.values())
            hashed = sum(file.sha256 is not None for file in entry.checkpoint.files.values()) if files.lock_name == entry.name else 0
            typer.echo(
                f"{entry.name}: {len(paths)} files, {readable(size)}, ready; {hashed} match the hash in the card,"
                f" {len(paths) - hashed} the one in cellfm.lock"
            )


def _check_revision(revision: str, entries: "Sequence[Entry]") -> None:
    """See that a commit can be one of all that is to be fetched."""
    from cellfm_hub.errors import UsageError
    from cellfm_hub.suitability import check_origin

    for entry in entries:
        check_origin(entry, None, revision)
    places = sorted({entry.info().source or entry.name for entry in entries})
    if len(places) > 1:
        message = (
            f"--revision {revision} is a commit in one place, the models come from {', '.join(places)}; fetch them one after the other"
        )
        raise UsageError(message)


def add(
    model: Model,
    path: Annotated[Path, typer.Argument(help="Folder with the files as published.", show_default=False)],
    link: Annotated[bool, typer.Option("--link", help="Refer to the files where they are instead of copying them.")] = False,
    commercial_ok: CommercialOk = False,
) -> None:
    """Check a folder of files that were downloaded by hand, and register it."""
    from cellfm_hub import cache

    with _settings(commercial=commercial_ok):
        placed = cache.add(model, path, link=link)
    typer.echo(f"{model}: {len(placed)} files checked and registered; names, hashes and shapes fit")


def bundle(
    models: Models,
    out: Annotated[Path, typer.Option("--out", "-o", help="Archive to write.", show_default=False)],
) -> None:
    """Write models into one archive, for a machine without internet."""
    from cellfm_hub import cache
    from cellfm_hub.checkpoints import readable

    with _settings(commercial=False):
        size = cache.bundle(models, out)
    typer.echo(f"wrote {out}, {readable(size)}; on the other machine: cellfm unbundle {out.name}")


def unbundle(archive: Annotated[Path, typer.Argument(help="Archive made by 'cellfm bundle'.", show_default=False)]) -> None:
    """Unpack an archive of models into the cache, checking every file."""
    from cellfm_hub import cache

    with _settings(commercial=False):
        names = cache.unbundle(archive)
    typer.echo(f"ready: {', '.join(names)}")


def cache(
    delete: Annotated[list[str] | None, typer.Option(help="Delete the files of this model; repeatable.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the models that are here, their sizes and origins; delete those that are named."""
    from dataclasses import asdict

    from cellfm_hub import cache as models
    from cellfm_hub._settings import settings
    from cellfm_hub.checkpoints import readable
    from cellfm_hub.errors import UsageError
    from cellfm_hub.registry import registry

    if delete and as_json:
        message = "--json prints the list of models, --delete prints none; leave out one of them"
        raise UsageError(message)
    if delete:
        for name in [registry().find(name).name for name in delete]:
            gone = models.remove(name)
            typer.echo("\n".join(f"deleted {path}" for path in gone))
        return
    held = models.listing()
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in held], indent=1))
        return
    for entry in held:
        state = "complete" if entry.files == entry.of else f"{entry.files} of {entry.of} files"
        typer.echo(f"{entry.name}: {state}, {readable(entry.size)}, from {'; '.join(entry.origins) or 'nowhere yet'}")
        typer.echo("".join(f"  {folder}\n" for folder in entry.folders), nl=False)
    typer.echo(f"{len(held)} models in {settings.cache_dir} and the hub's cache; 'cellfm cache --delete MODEL' removes one")


def convert(models: Models, commercial_ok: CommercialOk = False) -> None:
    """Write safetensors and JSON copies of a model's files into the cache, which need no unpickling and less memory."""
    from cellfm_hub.convert import convert as convert_model

    with _settings(commercial=commercial_ok):
        for model in models:
            copies = convert_model(model)
            for name, path in copies.items():
                typer.echo(f"{model}: {name} -> {path}")
            if not copies:
                typer.echo(f"{model}: nothing to convert, its files need no copy")


def selftest(
    model: Model,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    precision: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.", show_default="all the device has")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare this machine's numbers with those of the original code, for a model's family."""
    from dataclasses import asdict

    from cellfm_hub.errors import CellFMError
    from cellfm_hub.selftest import run_selftest

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    rows = run_selftest(model, device=device, precisions=precision)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        typer.echo("\n".join(row.line() for row in rows))
    if failed := [row for row in rows if row.passed is False]:
        msg = f"{len(failed)} of {len(rows)} comparisons with the original code fail on this machine; please report them with 'cellfm env'"
        raise CellFMError(msg)


def register(app: typer.Typer, one_line_errors: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Add the commands to the application."""
    commands: tuple[Callable[..., Any], ...] = (pull, add, bundle, unbundle, cache, convert, selftest)
    for command in commands:
        app.command()(one_line_errors(command))
