"""One progress bar for notebooks, terminals and the command line."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cellfm_hub._settings import settings


@contextmanager
def progress_bar(description: str, total: int | None, *, show: bool | None) -> Iterator[Callable[[float], None]]:
    """Give a function that is told how many rows are done.

    Parameters
    ----------
    description
        Shown before the bar.
    total
        Rows in all, if known.
    show
        ``None``: as in the settings, and there by default only on a terminal or in a notebook.
    """
    show = settings.progress if show is None else show
    if show is None:
        show = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not show:
        yield lambda _rows: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda rows: bar.advance(task, rows)
