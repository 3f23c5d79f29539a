"""Look at data before they are embedded, and before anything is downloaded: :func:`check`."""

import io
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cellfm_hub._settings import settings
from cellfm_hub.adapter import CellAdapter, CellFeatures, TokenAdapter
from cellfm_hub.api import load_tokenizer
from cellfm_hub.blocks import TokenBlock
from cellfm_hub.cards import Modality
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.cost import Cost, estimate
from cellfm_hub.embedder import Embedder
from cellfm_hub.engine.device import Precision, choose_device, choose_dtype
from cellfm_hub.errors import CellFMError, InputError, SequenceError, WeightsUnavailableError
from cellfm_hub.genes import SpeciesGuess, guess_species, identifier_columns, main_system, systems_of
from cellfm_hub.genes.identifiers import in_words
from cellfm_hub.genes.species import species_of_data
from cellfm_hub.jobs.run import of_model
from cellfm_hub.qc import row_sums
from cellfm_hub.reading import CellInput, Input, SequenceInput, Task
from cellfm_hub.receipt import Tally
from cellfm_hub.registry import Entry, registry
from cellfm_hub.request import EncodeOptions, check_modality
from cellfm_hub.sequences import BaseCounts, Long, clean
from cellfm_hub.sources.cells import CellData, count_blocks, find_counts, open_cells
from cellfm_hub.sources.counts import MatrixValues, describe_matrices
from cellfm_hub.sources.genome import WINDOW
from cellfm_hub.sources.sequences import check_not_empty, check_places, sequence_blocks
from cellfm_hub.sources.some_rows import spread, take_rows
from cellfm_hub.suitability import check_suits, modality_of

ALL_CELLS_UP_TO, STRETCHES, STRETCH = 20_000, 32, 256
"""Of more cells than this, so many stretches of so many cells are looked at, spread evenly over the data."""

TOKENIZED_BASES = 20_000_000
"""Letters are counted in all sequences; tokens in the first so many bases."""

Verdict = Literal["ok", "warn", "refuse"]


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some numbers."""

    smallest: float
    median: float
    largest: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> "Spread | None":
        """Return those of an array, ``None`` if it is empty."""
        return cls(float(values.min()), float(np.median(values)), float(values.max())) if len(values) else None

    def __str__(self) -> str:
        return f"{self.smallest:,.0f} / {self.median:,.0f} / {self.largest:,.0f}"


@dataclass(frozen=True)
class MatrixFacts:
    """One matrix of the data: what it holds, and whether the counts are taken from it."""

    name: str
    holds: str
    taken: bool


@dataclass(frozen=True)
class IdentifierFacts:
    """One column of ``var`` that may identify genes."""

    column: str
    system: str
    examples: tuple[str, ...]
    missing: int
    repeated: int
    """Entries that stand somewhere before them too."""


@dataclass(frozen=True)
class CellFacts:
    """What cells are, whatever the model.

    Parameters
    ----------
    cells, genes
        Of the matrix that is taken, else of the largest.
    looked_at
        Cells of which counts were read; the numbers about counts are of these.
    matrices
        Each matrix that was looked at, in this order.
    problem
        Why there are no counts, ``None`` if there are.
    identifiers
        The candidates for gene identifiers.
    species, species_evidence
        As the identifiers tell; ``None`` where they do not.
    repeated_genes, repeated_cells
        Names of genes and cells that stand somewhere before them too.
    empty_cells
        Cells without any count.
    counts_per_cell, genes_per_cell
        Library sizes and expressed genes.
    """

    cells: int
    genes: int
    looked_at: int
    matrices: tuple[MatrixFacts, ...]
    problem: str | None
    identifiers: tuple[IdentifierFacts, ...]
    species: str | None
    species_evidence: str
    repeated_genes: int
    repeated_cells: int
    empty_cells: int = 0
    counts_per_cell: Spread | None = None
    genes_per_cell: Spread | None = None


@dataclass(frozen=True)
class SequenceFacts:
    """What sequences are, whatever the model.

    Parameters
    ----------
    sequences, looked_at
        All, and those that were tokenized.
    problem
        What cannot be read, ``None`` if everything can.
    length
        Bases per sequence.
    bases, lower_case, uracil, ambiguous
        Letters: all, lower case, U, and others than A, C, G, T (N, IUPAC codes, gaps).
    empty, repeated_names
        Sequences without bases, and names that stand somewhere before them too.
    """

    sequences: int
    looked_at: int
    problem: str | None
    length: Spread | None
    bases: int
    lower_case: int
    uracil: int
    ambiguous: int
    empty: int
    repeated_names: int


@dataclass(frozen=True)
class ModelReport:
    """What one model makes of the data; ``None`` is not known.

    Parameters
    ----------
    model, verdict
        ``ok``, ``warn`` (it would run, and say something) or ``refuse``.
    reasons
        What it would say, and what is not known; one line each.
    files
        Whether its files are on this machine.
    download
        Bytes that are missing.
    gene_ids
        Column of ``var`` that it would read.
    genes_known, counts_known
        Genes of the data that it knows, and the share of all counts on them.
    truncated
        Cells or sequences, of those looked at, of which only a part fits into its input.
    empty
        Cells or sequences, of those looked at, in which it finds nothing.
    max_tokens
        Longest input.
    licence, commercial_use
        Of the weights.
    cost
        Time and memory on this device.
    """

    model: str
    verdict: Verdict
    reasons: tuple[str, ...]
    files: bool
    download: int | None
    licence: str
    commercial_use: bool | None
    max_tokens: int | None
    cost: Cost
    gene_ids: str | None = None
    genes_known: int | None = None
    counts_known: float | None = None
    truncated: int | None = None
    empty: int | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`check` found. ``print(report)`` shows it on a screen."""

    origin: str
    modality: Modality
    data: CellFacts | SequenceFacts
    models: tuple[ModelReport, ...]
    device: str

    @property
    def refusals(self) -> dict[str, str]:
        """The models that would refuse the data, and why."""
        return {model.model: model.reasons[0] for model in self.models if model.verdict == "refuse"}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as nested dicts and lists, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        from rich.console import Console

        from cellfm_hub.check_screen import render

        console = Console(file=io.StringIO(), width=140, color_system=None)
        console.print(render(self))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


@dataclass(frozen=True)
class _Asked:
    """The options of a call."""

    layer: str | None
    gene_ids: str | None
    species: str | None
    device: torch.device
    precision: Precision
    long: Long
    genome: str | Path | None
    window: int
    checkpoint: Path | None = None
    revision: str | None = None
    options: dict[str, Any] | None = None


def check(
    data: Any,
    model: str | Sequence[str] | None = None,
    *,
    layer: str | None = None,
    gene_ids: str | None = None,
    species: str | None = None,
    checkpoint: str | Path | Mapping[str, str | Path] | None = None,
    revision: str | Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    long: Long = "error",
    genome: str | Path | None = None,
    window: int = WINDOW,
) -> Report:
    """Say what data hold and what models would make of them. Nothing is downloaded, and nothing is changed.

    Where the files of a model are on this machine, or `checkpoint` names a folder with them, the data are matched and tokenized as
    :func:`cellfm_hub.embed` would do it, without loading weights. Otherwise the card decides what it can: whether there are counts, and
    whether the species fits; the coverage stays unknown.

    Of more than 20,000 cells 8,192 are looked at, in 32 stretches spread over the data; of sequences all are read and the first 20 million
    bases tokenized.

    Parameters
    ----------
    data
        What :func:`cellfm_hub.embed` takes.
    model
        One or several names; ``None``: the default checkpoint of every family for such data.
    layer, gene_ids, species, long, genome, window
        See :meth:`cellfm_hub.Embedder.encode`.
    checkpoint, revision, options
        See :func:`cellfm_hub.load`; with a list of models: a dict, by the name of the model.
    device, precision
        For the estimate of time and memory, see :func:`cellfm_hub.load`.

    Returns
    -------
    :class:`Report`.

    Raises
    ------
    InputError
        If there are no data to look at.
    ModelNotFoundError
        If no model has such a name.

    Examples
    --------
    >>> import cellfm_hub as cf
    >>> report = cf.check(cf.datasets.pbmc700(), "pca")
    >>> report.models[0].verdict, report.data.species
    ('ok', 'human')
    """
    names = [model] if isinstance(model, str) else list(model or ())
    given = {"checkpoint": checkpoint, "revision": revision, "options": options}
    if not names and any(given.values()):
        msg = "checkpoint, revision and options are those of a model; name it"
        raise InputError(msg)
    own = [{o: of_model(o, value, name, names, several=not isinstance(model, str)) for o, value in given.items()} for name in names]
    entries = [registry().find(name) for name in names]
    modality = modality_of(data) or (entries[0].modality if entries else "cell")
    encode = EncodeOptions(layer=layer, gene_ids=gene_ids, species=species, long=long, genome=genome, window=window)
    check_modality(f"data that hold {modality}s", modality, **encode)
    if modality == "sequence":
        check_places(data, genome, window)
    names = names or [name for name, e in registry().checkpoints.items() if e.checkpoint.default and e.modality == modality]
    of_all = _Asked(layer, gene_ids, species, choose_device(device), precision, long, genome, window)
    drafts = [_Draft(name, replace(of_all, **own[i]) if own else of_all) for i, name in enumerate(names)]
    for draft in drafts:
        with draft.refusing():
            check_suits(data, draft.name, draft.entry, **encode)
    facts: CellFacts | SequenceFacts
    if modality == "sequence":
        origin = str(data) if isinstance(data, str | Path) else f"a {type(data).__name__}"
        facts, sample = _look_at_sequences(data, of_all)
        models = [draft.refused() if draft.error else _check_sequences(draft, facts, sample) for draft in drafts]
    else:
        with open_cells(data, None, "check") as cells:
            origin = cells.origin
            looked_at = spread(len(cells), all_up_to=ALL_CELLS_UP_TO, stretches=STRETCHES, length=STRETCH)
            some = cells if looked_at == [(0, len(cells))] else take_rows(cells, looked_at)
            facts, guess = _look_at_cells(cells, some, of_all)
            models = [draft.refused() if draft.error else _check_cells(draft, facts, some, guess) for draft in drafts]
    return Report(origin, modality, facts, tuple(models), str(of_all.device))


# Cells


def _look_at_cells(cells: CellData, some: CellData, asked: _Asked) -> tuple[CellFacts, SpeciesGuess]:
    largest = max(cells.matrices.values(), key=lambda m: m.shape[1], default=None)
    problem, taken, matrices = None, None, {}
    totals: list[NDArray[np.float64]] = []
    expressed: list[NDArray[np.float64]] = []
    try:
        taken = find_counts(some, asked.layer)
    except InputError as error:
        problem = str(error)
    if len(some) and largest is not None:
        with _collected_warnings():
            matrices = describe_matrices(some, None if taken is None else asked.layer)
    try:
        for block in count_blocks(some, taken) if taken is not None else ():
            totals.append(row_sums(block.counts))
            expressed.append(row_sums((block.counts != 0).tocsr()))
    except InputError as error:
        problem = str(error)
    matrix = taken or largest
    columns = {} if matrix is None else identifier_columns(matrix.var)
    if asked.gene_ids is not None and matrix is not None:
        with suppress(InputError):  # every model says so
            columns = identifier_columns(matrix.var, asked.gene_ids)
    guess = guess_species(columns) if columns else SpeciesGuess(None, "there are no genes", certain=False, by_ids=False, counts={})
    all_totals = np.concatenate(totals) if totals else np.empty(0)
    return CellFacts(
        cells=len(cells),
        genes=0 if matrix is None else matrix.shape[1],
        looked_at=len(some),
        matrices=tuple(MatrixFacts(name, holds, taken is not None and name == taken.name) for name, holds in matrices.items()),
        problem=problem,
        identifiers=tuple(_identifiers(name, ids) for name, ids in columns.items() if len(set(ids)) > 0.5 * len(ids)),
        species=guess.species,
        species_evidence=guess.evidence,
        repeated_genes=0 if matrix is None else int(matrix.var.index.duplicated().sum()),
        repeated_cells=int(cells.obs.index.duplicated().sum()),
        empty_cells=int((all_totals == 0).sum()),
        counts_per_cell=Spread.of(all_totals),
        genes_per_cell=Spread.of(np.concatenate(expressed) if expressed else np.empty(0)),
    ), guess


def _identifiers(column: str, ids: Sequence[str]) -> IdentifierFacts:
    given = [name for name in ids if name]
    return IdentifierFacts(
        column, in_words(main_system(systems_of(ids))), tuple(given[:3]), len(ids) - len(given), len(given) - len(set(given))
    )


def _check_cells(draft: "_Draft", facts: CellFacts, some: CellData, guess: SpeciesGuess) -> ModelReport:
    entry, asked = draft.entry, draft.asked
    adapter_class = entry.adapter_class()
    with draft.refusing():
        draft.open()
    with draft.refusing(), _collected_warnings() as said:
        adapter = adapter_class if draft.embedder is None else draft.embedder.adapter
        if draft.error is not None:
            pass
        elif draft.embedder is not None and isinstance(adapter, CellAdapter):
            request = draft.embedder.request(layer=asked.layer, gene_ids=asked.gene_ids, species=asked.species, on_empty="nan")
            tally, lengths = _count_tokens(CellInput(some, [Task(draft.embedder, request)]))
            draft.warnings += [*said, *tally.warnings()]
            draft.found |= {
                "gene_ids": str(tally.facts["gene_ids"]),
                "genes_known": int(tally.facts["genes_used"]),
                "counts_known": tally.counts_used / tally.counts if tally.counts else None,
                "truncated": tally.truncated,
                "empty": tally.empty,
                "max_tokens": adapter.max_tokens,
            }
            return draft.report(lengths, stand_for=facts.cells / len(some))
        else:
            values: MatrixValues = getattr(adapter, "values", "counts")
            matrix = find_counts(some, asked.layer, values)
            for _ in count_blocks(some, matrix, values=values):
                pass  # every value is checked
            draft.warnings += matrix.notes
            if isinstance(adapter, CellFeatures):
                adapter.check_size(facts.cells - facts.empty_cells, facts.genes)
                draft.found |= {"truncated": 0, "empty": facts.empty_cells}
            else:
                known = tuple(entry.requires.species)
                orthologs = (asked.options or {}).get("orthologs") == "one2one"
                species_of_data(guess, asked.species, known=known, model=entry.name, tells=len(known) > 1, orthologs=orthologs)
                draft.notes.append("which genes it knows, and how much of the data they cover, is not known until its files are here")
    # Without the vocabulary: as many tokens as a cell has genes, unless the model always makes the same number.
    fixed, genes = getattr(adapter_class, "tokens_per_cell", None), facts.genes_per_cell
    expected = fixed or (0 if genes is None else min(genes.median, entry.checkpoint.max_tokens or np.inf))
    return draft.report(np.array([expected]), stand_for=facts.cells - facts.empty_cells)


# Sequences


@dataclass
class _Sample:
    """Sequences that are to be tokenized."""

    sequences: dict[str, str] = field(default_factory=dict)
    """Under names of their own."""
    longest: dict[str, str] = field(default_factory=dict)
    """The longest of all others, if there are any."""


def _look_at_sequences(data: Any, asked: _Asked) -> tuple[SequenceFacts, _Sample]:
    """Read all sequences; return the facts, and a sample."""
    counts, names, lengths = BaseCounts(), array("q"), array("q")
    sample = _Sample()
    problems, sampled, longest = list[str](), 0, 0
    try:
        for block in sequence_blocks(data, genome=asked.genome, window=asked.window):
            block = block if block.alternatives is None else block.alleles_as_rows()
            names.extend(map(hash, block.names))
            for name, sequence in zip(block.names, block.sequences, strict=True):
                if sampled < TOKENIZED_BASES:
                    sample.sequences[name if name not in sample.sequences else f"{name} (record {len(lengths)})"] = sequence
                    sampled += len(sequence)
                elif len(sequence) > longest:
                    sample.longest, longest = {name: sequence}, len(sequence)
                lengths.append(len(sequence))
            try:
                clean(block.names, block.sequences, "upper", counts)
                if not isinstance(data, str | Path):  # in a list it is a slip rather than data
                    check_not_empty(block.names, block.sequences)
            except SequenceError as error:
                problems.append(str(error))
    except InputError as error:
        if not lengths:
            raise
        problems.append(str(error))
    return SequenceFacts(
        sequences=len(lengths),
        looked_at=len(sample.sequences),
        problem=problems[0] if problems else None,
        length=Spread.of(np.array(lengths)),
        bases=counts.bases,
        lower_case=counts.upper_cased,
        uracil=counts.u_to_t,
        ambiguous=counts.ambiguous,
        empty=lengths.count(0),
        repeated_names=len(names) - len(set(names)),
    ), sample


def _check_sequences(draft: "_Draft", facts: SequenceFacts, sample: _Sample) -> ModelReport:
    asked = draft.asked
    if facts.problem is not None:
        draft.error = facts.problem
        return draft.refused()
    lengths: NDArray[np.int64] = np.empty(0, np.int64)
    with draft.refusing():
        draft.open()
    with draft.refusing(), _collected_warnings() as said:
        if draft.embedder is None and draft.error is None:
            draft.notes.append("how many tokens the sequences make is not known until its files are here")
        elif draft.embedder is not None and isinstance(draft.embedder.adapter, TokenAdapter):
            limited = asked.long == "error" and not draft.embedder.adapter.unlimited
            request = draft.embedder.request(long="truncate" if limited else asked.long, on_empty="nan")
            tally, lengths = _count_tokens(SequenceInput(sample.sequences, [Task(draft.embedder, request)]))
            draft.found |= {"truncated": tally.truncated, "empty": tally.empty, "max_tokens": draft.embedder.adapter.max_tokens}
            too_long = sample.sequences if tally.truncated else sample.longest
            if limited and too_long:
                strict = draft.embedder.request(on_empty="nan")
                _count_tokens(SequenceInput(too_long, [Task(draft.embedder, strict)]))  # raises if one is, and says what to do
            draft.warnings += [*said, *tally.warnings()]
        else:
            draft.found |= {"truncated": 0, "empty": facts.empty}
    return draft.report(lengths, stand_for=facts.sequences / len(sample.sequences))


# Reports of models


@dataclass
class _Draft:
    """The report of a model, as it comes about."""

    name: str
    """As the user gave it."""
    asked: _Asked
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not known."""
    found: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    at_hand: bool = True
    embedder: Embedder | None = None

    @property
    def entry(self) -> Entry:
        return registry().find(self.name)

    def open(self) -> None:
        """Load what the model tokenizes with, if its files are here."""
        asked = self.asked
        try:
            with settings.override(offline=True), _collected_warnings():  # the report says the licence anyway
                self.embedder = load_tokenizer(self.name, checkpoint=asked.checkpoint, revision=asked.revision, options=asked.options)
        except WeightsUnavailableError:
            if asked.checkpoint is not None:  # the folder is incomplete
                raise
            self.at_hand = False

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Take down what the model refuses."""
        try:
            yield
        except CellFMError as error:
            self.error = str(error)

    def refused(self) -> ModelReport:
        """Finish with the refusal that was taken down."""
        return self.report(np.empty(0), stand_for=0)

    def report(self, lengths: NDArray[Any], *, stand_for: float) -> ModelReport:
        """Finish.

        Parameters
        ----------
        lengths
            Tokens of some rows.
        stand_for
            Of how many rows each of them stands for.
        """
        entry, asked = self.entry, self.asked
        cost = Cost(None, None, "it would not run")
        if self.error is None:
            fidelity = entry.fidelity("bfloat16") if asked.checkpoint is None and asked.revision is None else None
            dtype = choose_dtype(asked.precision, asked.device, fidelity)
            network = None if self.embedder is None else getattr(self.embedder.adapter, "network", None)
            cost = estimate(entry, network, lengths[lengths > 0] * 1.0, asked.device, dtype, stand_for=stand_for)
        verdict: Verdict = "refuse" if self.error is not None else "warn" if self.warnings else "ok"
        errors = [] if self.error is None else [self.error]
        facts = {"max_tokens": entry.checkpoint.max_tokens, **self.found}
        return ModelReport(
            model=entry.name if self.embedder is None else self.embedder.name,
            verdict=verdict,
            reasons=tuple(dict.fromkeys([*errors, *self.warnings, *self.notes])),
            files=self.at_hand,
            download=None if self.at_hand else _missing(entry, asked.revision),
            licence=entry.licence,
            commercial_use=entry.checkpoint.commercial_use,
            cost=cost,
            **facts,
        )


def _count_tokens(source: Input) -> tuple[Tally, NDArray[np.int64]]:
    """Tokenize everything and keep nothing but what happened to the rows, and how many tokens each has."""
    tally, lengths = Tally(), []
    for (prepared,) in source.blocks():
        tally.add(prepared.tally)
        if isinstance(prepared.block, TokenBlock):
            lengths.append(prepared.block.tokens.lengths)
    return tally, np.concatenate(lengths)


def _missing(entry: Entry, revision: str | None) -> int | None:
    """Return how many bytes of the files that a model needs are not on this machine; ``None`` if a size is not known."""
    here = CheckpointFiles(entry, None, revision).at_hand()
    sizes = [file.size for path, file in entry.checkpoint.files.items() if path not in here and not file.optional]
    return None if None in sizes else sum(filter(None, sizes))


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Keep the hub's warnings from the screen, and give them as a list."""
    said: list[str] = []
    logger = logging.getLogger("cellfm_hub")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                said.append(record.getMessage().split(": ", 1)[-1])

    handler, propagate, level = Handler(), logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)  # a verdict does not depend on what is shown
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)
