"""Do data, models and options go together? Told before a file of a model is fetched or a weight is loaded."""

import gzip
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

from cellfm_hub.cards import Modality
from cellfm_hub.errors import InputError, UsageError
from cellfm_hub.registry import Entry, registry
from cellfm_hub.request import EncodeOptions, Level, check_options
from cellfm_hub.sources.cells import FORMATS
from cellfm_hub.sources.genome import WINDOW
from cellfm_hub.sources.sequences import BED_SUFFIXES, SOURCES, VCF_SUFFIXES, check_places, places_of

CELL_SUFFIXES = (".h5ad", ".zarr", ".h5mu", ".loom", ".h5", ".mtx")

SEQUENCE_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".frn", ".fas", ".fq", ".fastq", *BED_SUFFIXES, *VCF_SUFFIXES)

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
"""Tables of cells, unless they begin as FASTA or FASTQ does."""

_NAMED = 5
"""So many models that would fit are named."""


def modality_of(data: Any) -> Modality | None:
    """Tell cells from sequences, by the kind of object or the name of a file, else by its first letter; ``None`` where neither shows."""
    if isinstance(data, str | Path):
        return _modality_of_path(Path(data))
    if all(hasattr(data, name) for name in ("obs", "var", "layers")):
        return "cell"
    listed = isinstance(data, Iterable) and not isinstance(data, bytes) and not hasattr(data, "obs") and getattr(data, "ndim", 1) == 1
    return "sequence" if listed else None


def _modality_of_path(path: Path) -> Modality | None:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(SEQUENCE_SUFFIXES):
        return "sequence"
    try:
        if name.endswith(CELL_SUFFIXES) or path.is_dir():
            return "cell"
        if path.is_file() and _first_letter(path) in (b">", b"@"):
            return "sequence"
    except OSError:  # a sequence is too long for the name of a file; what cannot be opened is refused by its reader
        return None
    return "cell" if name.endswith(TEXT_SUFFIXES) else None


def _first_letter(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path) as packed:
                head = packed.read(64)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return b""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


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
    _check_modality(data, name, entry)
    if entry.modality == "sequence":
        check_places(data, options.get("genome"), options.get("window", WINDOW))
        if level == "variant" and places_of(data) != "VCF":
            msg = "level='variant' is the difference of two alleles; it needs a VCF file, and genome= with its FASTA file"
            raise InputError(msg)


def _check_modality(data: Any, name: str, entry: Entry) -> None:
    found = modality_of(data)
    if found == entry.modality or (found is None and isinstance(data, str | Path)):  # what the file is shows when it is read
        return
    takes = f"an AnnData object or the path of {FORMATS}" if entry.modality == "cell" else SOURCES
    if isinstance(data, str | Path):
        received = f"{data}, which {'is a folder' if Path(data).is_dir() else f'holds {found}s'}"
    else:
        received = type(data).__name__
    msg = f"{name} is a model of {entry.modality}s and takes {takes}; received {received}"
    if found is not None:
        msg += f". Models of {found}s are {', '.join(models_of(found)[:_NAMED])}; 'cellfm models' lists all"
    raise InputError(msg)


def models_of(modality: Modality) -> list[str]:
    """Return the default checkpoints of all families of such models, but for those that ship for trying."""
    entries = registry().checkpoints.values()
    return [entry.name for entry in entries if entry.checkpoint.default and entry.modality == modality and not entry.is_shipped]


def check_switches(entry: Entry, options: Mapping[str, Any] | None) -> None:
    """Raise an InputError if a switch of the family is unknown or has a wrong value."""
    entry.adapter_class().options.parse(None if options is None else dict(options), entry.name)


def check_origin(entry: Entry, checkpoint: str | Path | None, revision: str | None) -> None:
    """Raise if a model cannot come from a folder or a revision, or from both."""
    if entry.checkpoint.source is None and (checkpoint is not None or revision is not None):
        msg = f"{entry.name} has no weights; leave out checkpoint and revision"
        raise InputError(msg)
    if checkpoint is not None and revision is not None:
        msg = f"checkpoint={str(checkpoint)!r} is a folder here, revision={revision!r} a version on the hub; leave out one of them"
        raise UsageError(msg)
