"""How a report of :func:`cellfm_hub.check` looks on a screen."""

from collections.abc import Iterator

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cellfm_hub.checking import CellFacts, ModelReport, Report, SequenceFacts
from cellfm_hub.checkpoints import readable

_COLOURS = {"ok": "green", "warn": "yellow", "refuse": "red"}
_COMMERCIAL_USE = {None: "not known", True: "yes", False: "no"}


def render(report: Report) -> Group:
    """Return the facts of the data, a table of models, and what is to be said of each."""
    lines = _cell_lines(report.data) if isinstance(report.data, CellFacts) else _sequence_lines(report.data)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for heading, text in lines:
        facts.add_row(heading, escape(text))
    said: dict[str, list[ModelReport]] = {}
    for model in report.models:
        for reason in model.reasons:
            said.setdefault(reason, []).append(model)
    reasons = [
        Text.assemble((f"{', '.join(model.model for model in models)}: ", f"bold {_COLOURS[models[0].verdict]}"), reason)
        for reason, models in said.items()
    ]
    timed = next((model for model in report.models if model.cost.seconds is not None), None)
    notes = [] if timed is None else [Text(f"Time and memory are estimates. {timed.model}: {timed.cost.basis}", style="dim")]
    return Group(Text(_title(report), style="bold"), facts, "", _table(report), *reasons, *notes)


def _title(report: Report) -> str:
    data = report.data
    size = f"{data.cells:,} cells x {data.genes:,} genes" if isinstance(data, CellFacts) else f"{data.sequences:,} sequences"
    return f"{report.origin}: {size}"


def _cell_lines(data: CellFacts) -> Iterator[tuple[str, str]]:
    heading = "counts"
    for matrix in data.matrices:
        yield heading, f"{'->' if matrix.taken else '  '} {matrix.name}: {matrix.holds}"
        heading = ""
    if data.problem is not None:
        yield "problem", data.problem
    heading = "gene ids"
    for column in data.identifiers:
        odd = [f"{number:,} {what}" for number, what in ((column.missing, "missing"), (column.repeated, "repeated")) if number]
        yield heading, f"{column.column}: {column.system} ({', '.join((*column.examples, '…'))}){', ' if odd else ''}{', '.join(odd)}"
        heading = ""
    yield "species", f"{data.species or 'not known'} ({data.species_evidence})"
    if data.repeated_genes or data.repeated_cells:
        yield "repeated", f"{data.repeated_genes:,} names of genes, {data.repeated_cells:,} names of cells"
    if data.counts_per_cell is not None:
        of = "" if data.looked_at == data.cells else f" (of {data.looked_at:,} cells, spread over all)"
        yield (
            "cells",
            f"{data.empty_cells:,} empty; counts {data.counts_per_cell}, genes {data.genes_per_cell} (smallest / median / largest){of}",
        )


def _sequence_lines(data: SequenceFacts) -> Iterator[tuple[str, str]]:
    if data.problem is not None:
        yield "problem", data.problem
    if data.length is not None:
        yield "bases", f"{data.bases:,}; per sequence {data.length} (smallest / median / largest), {data.empty:,} empty"
    yield "letters", f"{data.lower_case:,} lower case, {data.uracil:,} U, {data.ambiguous:,} other than A, C, G, T"
    if data.repeated_names:
        yield "repeated", f"{data.repeated_names:,} names"
    if data.looked_at != data.sequences:
        yield "tokens", f"of the first {data.looked_at:,} sequences"


def _table(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    of_cells = isinstance(report.data, CellFacts)
    headings = ["model", "verdict", *(["genes known", "of counts"] if of_cells else []), "truncated", "empty"]
    headings += ["time", "memory", "files", "licence (commercial use)"]
    for heading in headings:
        table.add_column(heading, justify="right" if heading in headings[2:-2] else "left", no_wrap=heading in ("model", "verdict"))
    for model in report.models:
        known = [_number(model.genes_known), _share(model.counts_known)] if of_cells else []
        table.add_row(
            model.model,
            Text(model.verdict, style=_COLOURS[model.verdict]),
            *known,
            _number(model.truncated),
            _number(model.empty),
            _time(model.cost.seconds),
            "?" if model.cost.memory is None else readable(model.cost.memory),
            _files(model),
            escape(f"{model.licence} ({_COMMERCIAL_USE[model.commercial_use]})"),
        )
    return table


def _files(model: ModelReport) -> str:
    if model.files:
        return "here"
    return "to fetch" if model.download is None else f"to fetch, {readable(model.download)}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.1%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
