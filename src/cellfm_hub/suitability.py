"""Do data, models and options go together? Told before a file of a model is fetched or a weight is loaded."""

from pathlib import Path
from typing import Any, Unpack

from cellfm_hub.errors import InputError, UsageError
from cellfm_hub.registry import Entry
from cellfm_hub.request import EncodeOptions, Level, check_options
from cellfm_hub.sources.genome import WINDOW
from cellfm_hub.sources.sequences import check_places, places_of


def check_suits(data: Any, name: str, entry: Entry, *, level: Level | None = None, **options: Unpack[EncodeOptions]) -> None:
    """Raise if a model does not take such data, or not with these options.

    Parameters
    ----------
    data
        What the user gave.
    name, entry
        The model, as the user calls it, and what its card says.
    level, options
        Of ``encode``.

    Raises
    ------
    UsageError
        If options do not go together, or one would have no effect.
    InputError
        If the data are not for such a model.
    """
    check_options(name, entry, level=level, **options)
    if entry.modality == "sequence":
        check_places(data, options.get("genome"), options.get("window", WINDOW))
        if level == "variant" and places_of(data) != "VCF":
            msg = "level='variant' is the difference of two alleles; it needs a VCF file, and genome= with its FASTA file"
            raise InputError(msg)


def check_origin(entry: Entry, checkpoint: str | Path | None, revision: str | None) -> None:
    """Raise if a model cannot come from a folder or a revision, or from both."""
    if entry.checkpoint.source is None and (checkpoint is not None or revision is not None):
        msg = f"{entry.name} has no weights; leave out checkpoint and revision"
        raise InputError(msg)
    if checkpoint is not None and revision is not None:
        msg = f"checkpoint={str(checkpoint)!r} is a folder here, revision={revision!r} a version on the hub; leave out one of them"
        raise UsageError(msg)
