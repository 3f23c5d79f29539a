"""The files beside an ``.npy`` result, which itself holds nothing but numbers.

The receipt names those that were written, as ``beside``. So a file of the user's that happens to have such a name is told from ours.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from cellfm_hub.errors import OutputError
from cellfm_hub.jobs.durable import sync_folder

IDS, RECEIPT, ROWS, QC = ".ids.txt", ".receipt.json", ".rows.npz", ".qc.parquet"
"""What the rows are called; the receipt; what each row was made from; what the model saw of each cell."""


def refuse_foreign(out: Path) -> None:
    """Raise if a file that was not written with `out` stands where one beside it would.

    Raises
    ------
    OutputError
        If so.
    """
    ours = _named(out)
    for suffix in (IDS, RECEIPT, ROWS, QC):
        if suffix not in ours and (path := out.with_suffix(suffix)).exists():
            msg = f"{path} exists, and no receipt of {out.name} names it, but it would be written or replaced together with {out.name};"
            msg += " move it away, or choose another name with -o"
            raise OutputError(msg)


def appear(growing: Path, out: Path, suffixes: Sequence[str]) -> None:
    """Give a finished array, and the files beside it, their names.

    A reader, or a crash, may come between any two steps. There is then no array, rather than one beside the names of another one: the old
    one goes first, the new one comes last. And the receipt comes before the files that it names, so that they are known as ours when all
    this is done again.
    """
    refuse_foreign(out)
    old = _named(out)
    if out.exists():
        out.replace(growing.with_name(f"replaced{out.suffix}"))
    for suffix in old.difference(suffixes):
        out.with_suffix(suffix).unlink(missing_ok=True)
    for suffix in sorted(suffixes, key=lambda suffix: suffix != RECEIPT):
        growing.with_suffix(suffix).replace(out.with_suffix(suffix))
    sync_folder(out.parent)
    growing.replace(out)


def _named(out: Path) -> set[str]:
    """Return the suffixes of the files that the receipt of `out` names, if there is one."""
    try:
        receipt = json.loads(out.with_suffix(RECEIPT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    return set(str(receipt.get("beside", "")).split()) if isinstance(receipt, dict) else set()
