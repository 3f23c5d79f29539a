"""Embed a file in constant memory: :func:`embed_file`."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np

from cellfm_hub import sinks
from cellfm_hub._progress import progress_bar
from cellfm_hub.api import default_key
from cellfm_hub.engine.device import Precision, choose_devices
from cellfm_hub.errors import CellFMError, InputError, OutputError, UsageError, cannot_write
from cellfm_hub.jobs import in_place, known
from cellfm_hub.jobs.content import made_by
from cellfm_hub.jobs.fingerprint import Fingerprint, fingerprint, stamp
from cellfm_hub.jobs.finished import Finished, fingerprints
from cellfm_hub.jobs.job import PART_ROWS, Done, Job, ModelSpec, Spec, Wanted, open_job
from cellfm_hub.jobs.journal import Journal, Part, work_folder
from cellfm_hub.jobs.parts import sha256
from cellfm_hub.jobs.shares import Shard, share_of
from cellfm_hub.jobs.stored import Stored, read_stored
from cellfm_hub.jobs.workers import Workers, open_workers
from cellfm_hub.qc import COLUMNS
from cellfm_hub.receipt import Receipt, versions
from cellfm_hub.registry import registry
from cellfm_hub.request import PER_TOKEN, EncodeOptions, Level, OnEmpty
from cellfm_hub.sequences import Long
from cellfm_hub.sources.genome import WINDOW
from cellfm_hub.sources.sequences import count_rows
from cellfm_hub.suitability import check_origin, check_suits, check_switches

logger = logging.getLogger("cellfm_hub")

SHARDS = "shards"
"""In the receipt of a merged result: how many there were."""

REDO = "redo.npz"
"""In the work folder: see :mod:`cellfm_hub.jobs.in_place`."""


@dataclass(frozen=True)
class Summary:
    """What was written."""

    out: Path
    """The result; of a shard, the folder that :func:`merge` reads."""
    key: str
    """Key in ``obsm`` and ``uns["cellfm"]``."""
    rows: int
    dim: int
    receipt: Receipt


class FileOptions(EncodeOptions, total=False):
    """Keyword options of :func:`embed_file`."""

    resume: bool
    overwrite: bool
    update: bool
    shard: Shard | None
    part_rows: int | None
    level: Level | None
    key_added: str | Mapping[str, str] | None
    device: str
    precision: Precision
    checkpoint: str | Path | Mapping[str, str | Path] | None
    revision: str | Mapping[str, str] | None
    options: Mapping[str, Any] | None
    qc: bool


@overload
def embed_file(path: str | Path, model: str, *, out: str | Path, **options: Unpack[FileOptions]) -> Summary: ...
@overload
def embed_file(
    path: str | Path, model: list[str] | tuple[str, ...], *, out: str | Path, **options: Unpack[FileOptions]
) -> list[Summary]: ...
def embed_file(
    path: str | Path,
    model: str | list[str] | tuple[str, ...],
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    update: bool = False,
    shard: Shard | None = None,
    part_rows: int | None = None,
    level: Level | None = None,
    layer: str | None = None,
    gene_ids: str | None = None,
    species: str | None = None,
    key_added: str | Mapping[str, str] | None = None,
    recipe: str = "default",
    pooling: str | None = None,
    output_layer: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_tokens: int | None = None,
    seed: int | None = None,
    checkpoint: str | Path | Mapping[str, str | Path] | None = None,
    revision: str | Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    on_empty: OnEmpty | None = None,
    progress: bool | None = None,
    long: Long = "error",
    overlap: int = 0,
    reverse_complement: Literal["mean"] | None = None,
    genome: str | Path | None = None,
    window: int = WINDOW,
    qc: bool = False,
) -> Summary | list[Summary]:
    """Embed the cells or sequences of a file into another file, in constant memory.

    Rows are computed in parts. A part that is finished is on the disk, in a folder beside `out` (``.<out>.cellfm``), and a run that was
    killed goes on from there with ``resume=True``. The folder is removed when `out` is complete, which appears all at once.

    Parameters
    ----------
    path
        The file (see :meth:`Embedder.encode`). It is not changed, unless `out` is the same ``.h5ad`` file.
    model
        Family or checkpoint; or several of one modality, for which the file is read once.
    out
        ``.h5ad`` (a copy of `path` with the vectors; or `path` itself, whose matrices are then not rewritten), ``.zarr``, ``.parquet`` or
        ``.npy``. One vector per token goes to ``.parquet`` only, several models to ``.h5ad`` or ``.zarr``.
    resume
        Go on with an interrupted run, if there is one. In float32 the result is, bit for bit, that of an uninterrupted run.
    overwrite
        Replace `out`, and forget an interrupted run.
    update
        Take the vectors of rows that did not change from `out`, and compute the others only. A row did not change if the model sees the
        same tokens; its name and its place may be others. With `overwrite` an interrupted update is forgotten, and begins anew.
    shard
        ``(i, n)``: compute the i-th of n shares of the N rows, counted from 1, into a folder of its own; :func:`merge` puts them together.
        It holds rows floor((i-1) N / n) to floor(i N / n), whatever `part_rows`; for that a file of sequences is counted first. In float32
        the result is that of one run to 2e-6, and the same bit for bit on a CPU where parts begin at the same rows.
    part_rows
        Rows of a part, what a crash costs at most; default: 8192. Less is better for slow models on a CPU.
    level, layer, gene_ids, species, recipe, pooling, output_layer, batch_tokens, seed, on_empty, progress
        See :meth:`Embedder.encode`.
    long, overlap, reverse_complement, genome, window
        The same, for sequences only.
    qc
        Cells only: add what the models saw of each to ``obs``, as :func:`embed` does; in ``.parquet`` behind the dimensions, beside an
        ``.npy`` in ``.qc.parquet``.
    key_added
        Key in ``obsm`` and ``uns["cellfm"]``. Default: ``X_`` and the name of the model as given.
    device
        See :func:`load`; or several, ``"cuda:0,cuda:1"``, or ``"all"`` for every CUDA device: a process for each.
    precision
        See :func:`load`.
    checkpoint, revision, options, key_added
        See :func:`load`. With several models: a dict, by the name of the model.

    Returns
    -------
    A :class:`Summary`; for a list of models a list of them.

    Raises
    ------
    InputError
        If the data or an option cannot be used, the data change under way, or they are not those of the run to be resumed.
    OutputError
        If `out` cannot be written, is being written by another process, or exists; or if a run is to be resumed with other options.
    CellFMError
        See :func:`load`.

    Examples
    --------
    >>> import cellfm_hub as cf
    >>> cf.embed_file("atlas.h5ad", "scgpt", out="atlas.zarr", resume=True)  # doctest: +SKIP
    """
    several = not isinstance(model, str)
    names = [model] if isinstance(model, str) else list(model)
    models = _models(names, several=several, key_added=key_added, checkpoint=checkpoint, revision=revision, options=options)
    if resume and overwrite:
        msg = "resume goes on with what is there, overwrite begins anew; leave out one of resume and overwrite"
        raise UsageError(msg)
    if update and shard:
        msg = "update takes vectors from a finished result, which a shard has not; leave out one of update and shard"
        raise UsageError(msg)
    if update and level in PER_TOKEN:
        msg = f"update takes one vector per row; with level={level!r} there is one per token, leave out update"
        raise UsageError(msg)
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        msg = f"shard={shard[0]}/{shard[1]}: shards are counted from 1; expected 1/{shard[1]} to {shard[1]}/{shard[1]}"
        raise InputError(msg)
    if part_rows is not None and part_rows < 1:
        msg = f"part_rows={part_rows}; expected a positive number of rows"
        raise InputError(msg)
    modality = registry().find(names[0]).modality
    if qc and (level not in (None, "cell") or modality != "cell"):
        msg = "qc says what a model saw of each cell; leave it out for sequences and for one vector per gene"
        raise UsageError(msg)
    path, out = Path(path), Path(out)
    sinks.check_suffix(out)
    if not path.exists():
        msg = f"{path} does not exist; give the path of a file with cells or sequences"
        raise InputError(msg)
    encode = EncodeOptions(
        layer=layer,
        gene_ids=gene_ids,
        species=species,
        recipe=recipe,
        pooling=pooling,
        output_layer=output_layer,
        batch_tokens=batch_tokens,
        on_empty=on_empty,
        progress=False,
        long=long,
        overlap=overlap,
        reverse_complement=reverse_complement,
        genome=genome,
        window=window,
    )
    for name in names:
        check_suits(path, name, registry().find(name), level=level, **encode)
    spec = Spec(
        data=path,
        models=models,
        precision=precision,
        seed=seed or 0,
        level=level,
        encode=encode,
        part_rows=part_rows or PART_ROWS,
        shard=shard,
        rows=count_rows(path, variants=level == "variant") if shard is not None and modality == "sequence" else None,
        folder=work_folder(out, shard),
        update=update,
        qc=qc,
    )
    run = Run(spec, out, resume=resume, overwrite=overwrite, devices=choose_devices(device), progress=progress)
    summaries = run.run(part_rows_given=part_rows is not None)
    return summaries if several else summaries[0]


def _models(names: Sequence[str], *, several: bool, **per_model: Any) -> tuple[ModelSpec, ...]:
    if not names or len(set(names)) < len(names):
        msg = f"models {', '.join(names) or '(none)'}: name at least one, and each once"
        raise InputError(msg)
    modalities = {registry().find(name).modality for name in names}
    if len(modalities) > 1:
        msg = f"{', '.join(names)}: models of cells and of sequences read different files; embed them one after the other"
        raise InputError(msg)
    found = []
    for name in names:
        own = {option: of_model(option, value, name, names, several=several) for option, value in per_model.items()}
        checkpoint = own["checkpoint"]
        check_origin(registry().find(name), checkpoint, own["revision"])
        check_switches(registry().find(name), own["options"])
        found.append(
            ModelSpec(
                name,
                own["key_added"] or default_key(name),
                None if checkpoint is None else Path(checkpoint),
                own["revision"],
                dict(own["options"] or {}),
            )
        )
    if wrong := next((model.key for model in found if "/" in model.key or model.key.strip(".") == "" or not model.key.isprintable()), None):
        msg = f"key_added={wrong!r}: a key may hold no '/', dots alone or control characters, which files cannot hold; choose another"
        raise InputError(msg)
    keys = [model.key for model in found]
    if len(set(keys)) < len(keys):
        msg = f"two models would be written under one key ({', '.join(keys)}); give each its own"
        raise InputError(msg)
    return tuple(found)


def of_model(option: str, value: Any, name: str, names: Sequence[str], *, several: bool) -> Any:
    """Return what was given for one of several models."""
    if value is None or not several:
        return value
    if not isinstance(value, Mapping) or (wrong := set(value) - set(names)):
        what = f"{sorted(wrong)[0]!r} is none of {', '.join(names)}" if isinstance(value, Mapping) else f"received {value!r}"
        msg = f"{option} with several models: {what}; expected it by model, {{{names[0]!r}: …}} (command line: {names[0]}=… )"
        raise InputError(msg)
    return value.get(name)


class Run:
    """One run from its begin, or where it was left, to its end."""

    def __init__(
        self,
        spec: Spec,
        out: Path,
        *,
        resume: bool,
        overwrite: bool,
        devices: Sequence[str],
        progress: bool | None,
    ) -> None:
        self.spec, self.out, self.resume, self.overwrite = spec, out, resume, overwrite
        self.shard, self.devices, self.progress = spec.shard, devices, progress
        self.keys = [model.key for model in spec.models]
        self.per_token = spec.level in PER_TOKEN
        self.in_place = sinks.same_file(out, spec.data)

    def run(self, *, part_rows_given: bool) -> list[Summary]:
        """Do what is not done yet."""
        self._check_output(overwrite=True)  # the place; whether something is there comes later
        with Journal(self.spec.folder) as journal:
            written = (self.spec.folder / REDO).exists()
            if written:
                in_place.redo(self.out, self.spec.folder / REDO)
            if not self.out.exists() and not (self.resume and journal.header is not None and journal.header["update"]):
                self.spec = replace(self.spec, update=False)  # all is new
            if journal.header is not None:
                self._look_at_leftovers(journal, part_rows_given=part_rows_given)
            there = self.out.exists()
            # What is there was written by the run that is resumed.
            ours = journal.header is not None and bool(journal.facts.get("writing"))
            replacing = self.overwrite or self.spec.update or ours or bool(journal.header and journal.header["overwrite"])
            replacing |= self.shard is not None and journal.header is not None  # when all are merged is the time to ask
            if there and self.shard is not None and not replacing and not self.resume:
                self._check_not_merged()
            if not (self.resume and journal.header is None and there):
                self._check_output(overwrite=replacing)
            with self._computing() as computing:
                header = self._header(computing)
                if written and journal.header is not None:
                    self._require_same(journal, header)
                    return self._end(journal)
                if self.resume and journal.header is None and there and not replacing:
                    complete = self._complete(header, computing)
                    if complete is not None:
                        return complete
                    self._check_output(overwrite=False)
                try:
                    wanted = self._begin(journal, header)
                except OSError as error:
                    raise cannot_write(self.spec.folder, error) from error
                self._compute(journal, computing, wanted)
            return self._end(journal)

    # Before

    def _check_output(self, *, overwrite: bool) -> None:
        columns = [f"{key}_{name}" for key in self.keys for name in COLUMNS] if self.spec.qc else []
        sinks.check_output(self.out, source=self.spec.data, keys=self.keys, overwrite=overwrite, per_token=self.per_token, columns=columns)

    def _look_at_leftovers(self, journal: Journal, *, part_rows_given: bool) -> None:
        """Decide what becomes of an interrupted run."""
        assert journal.header is not None
        kept = journal.parts or journal.fitted or journal.facts.get("complete")
        if self.resume and kept:
            encode = self.spec.encode.copy()
            if encode["batch_tokens"] is None:  # of another device, perhaps: the same batches, the same rounding
                encode["batch_tokens"] = journal.header["models"][0]["batch_tokens"]
            rows = self.spec.part_rows if part_rows_given else journal.header["part_rows"]
            self.spec = replace(self.spec, part_rows=rows, encode=encode)
            if self.in_place:
                before = Fingerprint(**journal.header["input"])
                in_place.drop_leftovers(self.out, size=before.size, mtime_ns=before.mtime_ns)
        elif self.overwrite or not kept:
            journal.header, journal.parts, journal.fitted, journal.facts = None, {}, {}, {}
        elif journal.facts.get("complete"):
            msg = f"{_named(self.shard)} is finished ({journal.rows:,} rows in {self.spec.folder}); when all are, put them together with:"
            msg += f" cellfm merge {self.out}; pass --resume to leave it as it is, or --overwrite to compute it again"
            raise OutputError(msg)
        else:
            msg = f"{self.spec.folder} holds {journal.rows:,} finished rows of an interrupted run;"
            msg += " pass --resume to go on with it, or --overwrite to begin anew"
            raise OutputError(msg)

    def _check_not_merged(self) -> None:
        """See that a shard is still wanted: one that is computed after all were merged would belong to nothing."""
        stored = [read_stored(self.out, key) for key in self.keys]
        if all(found is not None and SHARDS in found.receipt for found in stored):
            msg = f"{self.out} is finished, merged from shards, {_named(self.shard)} among them; pass --resume to leave it as it is,"
            msg += " or --overwrite to compute the shards again"
            raise OutputError(msg)

    @contextmanager
    def _computing(self) -> Iterator[Job | Workers]:
        if len(self.devices) == 1:
            with open_job(self.spec, self.devices[0]) as job:
                yield job
        else:
            with open_workers(self.spec, self.devices) as workers:
                yield workers

    def _header(self, computing: Job | Workers) -> dict[str, Any]:
        """Describe the run: everything that decides about the result."""
        self.input: Fingerprint = fingerprint(self.spec.data)
        genome = self.spec.encode.get("genome")
        about = computing.about()
        for model in about["models"]:
            model["receipt"]["device"] = _kind(model["receipt"]["device"], len(self.devices))
            if model["fitted"] and self.shard is not None:
                msg = f"{model['name']} is fitted to all rows and cannot be computed in shards; leave out --shard"
                raise InputError(msg)
            if self.spec.update and (model["fitted"] or model["receipt"]["dataset_dependent"]):
                msg = f"the vectors of {model['name']} depend on all rows of the file; leave out --update, and pass --overwrite"
                raise InputError(msg)
        return about | {
            "part_rows": self.spec.part_rows,
            "input": asdict(self.input),
            "genome": None if genome is None else _by_content(fingerprint(Path(genome))),
            "versions": versions(),
            "data": str(self.spec.data.resolve()),
            "out": self.out.suffix,
            "overwrite": self.overwrite or self.spec.update,
            "update": self.spec.update,
            "shard": None if self.shard is None else list(self.shard),
            "qc": self.spec.qc,
        }

    def _complete(self, header: Mapping[str, Any], computing: Job | Workers) -> list[Summary] | None:
        """Return what is there already, if it is what was asked for."""
        summaries, every = [], list[Stored]()
        for model in header["models"]:
            stored = read_stored(self.out, model["key"])
            expected = {**model["receipt"], **header["versions"], **fingerprints(header)}
            for name in ("weights", "attention", *(["input_fingerprint"] if self.in_place else [])):
                expected.pop(name, None)
            if stored is None or any(stored.receipt.get(name) != value for name, value in expected.items()):
                return None
            if not self.per_token and stored.rows != stored.receipt.get("n_rows"):  # some were taken out of it
                return None
            summaries.append(Summary(self.out, model["key"], int(stored.receipt.get("n_rows", stored.rows)), stored.width, stored.receipt))
            every.append(stored)
        # The result changed the file that it was made from: whether the rest is as it was, the rows tell.
        return summaries if not self.in_place or self._same_rows(header, every, computing) else None

    def _same_rows(self, header: Mapping[str, Any], every: Sequence[Stored], computing: Job | Workers) -> bool:
        """Whether the rows of the data are, in order, those that stored vectors were made from."""
        if not isinstance(computing, Job):
            with open_job(self.spec, "cpu") as job:
                return self._same_rows(header, every, job)
        start = 0
        for contents in computing.contents():
            stop = start
            for model, stored, content in zip(header["models"], every, contents, strict=True):
                if content is None or stored.facts is None:
                    return False
                stop = start + len(content)
                if not np.array_equal(made_by(content, model["receipt"]), stored.facts[start:stop, :2]):
                    return False
            start = stop
        return all(stored.facts is not None and len(stored.facts) == start for stored in every)

    def _begin(self, journal: Journal, header: dict[str, Any]) -> "_Pending":
        """Compare with the run to be resumed, or begin a new one; return the parts that are missing."""
        if journal.header is None:
            if self.spec.update:
                self._keep_known(header)
            keep = [path.name for path in self.spec.folder.glob("known-*.npy")] if self.spec.update else []
            journal.begin(header, keep=keep)
            return self._pending(journal, {})
        self._require_same(journal, header)
        before = Fingerprint(**journal.header["input"])
        broken = bool(journal.facts.get("broken"))
        changed = not before.same_content(self.input) or journal.header["rows"] != header["rows"]
        touched = not before.whole and before.mtime_ns != self.input.mtime_ns
        if changed and not broken:
            msg = f"{self.spec.data} is not the file that {_told(journal)} in {self.spec.folder} began with (its size or content"
            msg += " changed); bring that one back, or pass --overwrite to begin anew"
            raise InputError(msg)
        if changed or touched:
            how = "mended" if changed else "touched since the run began"
            logger.warning("%s was %s; parts that are finished are compared with it", self.spec.data, how)
        if broken:
            # In this order: whenever this run is killed in turn, the next one compares too, until every part was.
            journal.note(total=None, complete=False, compare=changed or touched or bool(journal.facts.get("compare")))
            journal.amend(input=asdict(self.input), rows=header["rows"])
            journal.note(broken=False)
        compare = bool(journal.facts.get("compare"))
        doubtful = compare or touched
        damaged = [part for part in journal.parts.values() if not _whole(self.spec.folder, part)]
        for part in damaged:
            logger.warning("%s is damaged; it is computed again", self.spec.folder / part.file)
            journal.drop(part)
        for part in list(journal.fitted.values()):
            if doubtful or not _whole(self.spec.folder, part):
                journal.drop_fitted(part)
        check = {n: Wanted(n, part.content, not compare) for n, part in journal.parts.items()} if doubtful else {}
        logger.info("%d of %s rows are finished already", journal.rows, self._rows(header) or "?")
        return self._pending(journal, check)

    def _require_same(self, journal: Journal, now: Mapping[str, Any]) -> None:
        """See that the run to be resumed is the one that is asked for."""
        assert journal.header is not None
        if wrong := differences(journal.header, now):
            msg = f"{_told(journal)} in {self.spec.folder} was another one: {'; '.join(wrong[:3])};"
            msg += " give the same options to go on with it, or pass --overwrite to begin anew"
            raise OutputError(msg)

    def _keep_known(self, header: Mapping[str, Any]) -> None:
        for place, model in enumerate(header["models"]):
            stored = read_stored(self.out, model["key"])
            if stored is None:
                msg = f"{self.out} has no vectors {model['key']!r} of the hub to update; leave out --update, and pass --overwrite"
                raise OutputError(msg)
            if wrong := _other_model(stored, model["receipt"], header["versions"]):
                msg = f"{self.out} cannot be updated, it was made with other options: {'; '.join(wrong[:3])}; give the same,"
                msg += " or leave out --update and pass --overwrite to compute it anew"
                raise OutputError(msg)
            known.keep(self.spec.folder, place, stored, model["receipt"])

    def _pending(self, journal: Journal, check: Mapping[int, Wanted]) -> "_Pending":
        assert journal.header is not None
        rows = self._rows(journal.header)
        if journal.header["modality"] == "sequence":  # parts end with blocks, whose length is known when they are read
            total = journal.facts.get("total")
        else:
            assert rows is not None
            total = -(-rows // journal.header["part_rows"])
        if all(model["fitted"] for model in journal.header["models"]):
            total = 0
        if total is not None:
            journal.drop_behind(total)
        return _Pending(total, journal.parts, check)

    def _rows(self, header: Mapping[str, Any]) -> int | None:
        """Return how many rows the run computes, if that is known."""
        rows: int | None = header["rows"]
        return rows if rows is None or self.shard is None else len(share_of(rows, self.shard))

    # The work

    def _compute(self, journal: Journal, computing: Job | Workers, pending: "_Pending") -> None:
        assert journal.header is not None
        fitted = [i for i, model in enumerate(journal.header["models"]) if model["fitted"]]
        missing = [i for i in fitted if i not in journal.fitted]
        if isinstance(computing, Job) and missing and not journal.parts and pending.total != 0:
            computing.collected = {}
        name = ", ".join(model["name"] for model in journal.header["models"])
        try:
            with progress_bar(name, self._rows(journal.header), show=self.progress) as advance:
                advance(journal.rows)
                for done in computing.compute(pending):
                    self._take(journal, pending, done, advance)
            if journal.facts.get("compare"):
                journal.note(compare=False)
            if missing:
                self._fit(journal, computing)
            self._check_unchanged()
        except KeyboardInterrupt:
            kept = f"{journal.rows:,} rows are finished; " if journal.rows else "nothing was finished; "
            raise KeyboardInterrupt(kept + "the same command with --resume goes on") from None
        except CellFMError as error:
            raise self._explained(error, journal) from error
        except OSError as error:
            raise self._explained(cannot_write(self.spec.folder, error), journal) from error

    def _take(self, journal: Journal, pending: "_Pending", done: Done, advance: Any) -> None:
        if done.total is not None:
            if pending.total is None:
                journal.note(total=done.total)
            pending.total = done.total
            journal.drop_behind(done.total)
        elif done.part is not None:
            self._check_unchanged()
            journal.add(done.part)
            advance(done.part.rows)
        elif done.facts is not None:  # the rows are the same, but what is said of their file may not be
            part = journal.parts[done.wanted.number]
            tallies = [tally | {"facts": facts} for tally, facts in zip(part.tallies, done.facts, strict=True)]
            if tallies != part.tallies:
                journal.add(replace(part, tallies=tallies))

    def _fit(self, journal: Journal, computing: Job | Workers) -> None:
        if isinstance(computing, Job):
            for part in computing.fit():
                self._check_unchanged()
                journal.add_fitted(part)
            return
        assert journal.header is not None
        of_fitted = [i for i, model in enumerate(journal.header["models"]) if model["fitted"]]
        spec = replace(self.spec, models=tuple(self.spec.models[i] for i in of_fitted))
        with open_job(spec, "cpu") as job:
            for part in job.fit():
                file = f"fitted-{of_fitted[part.number]}.npz"
                (self.spec.folder / part.file).replace(self.spec.folder / file)
                journal.add_fitted(replace(part, number=of_fitted[part.number], file=file))

    def _check_unchanged(self) -> None:
        try:
            now = stamp(self.spec.data)
        except OSError:
            now = (0, 0)
        if now != (self.input.size, self.input.mtime_ns):
            msg = f"{self.spec.data} was changed or taken away while it was read"
            raise InputError(msg)

    def _explained(self, error: CellFMError, journal: Journal) -> CellFMError:
        """Add to an error what is kept, and how to go on."""
        if not journal.parts:
            return error
        assert journal.header is not None
        message = str(error)
        if isinstance(error, InputError):
            journal.note(broken=True)
            if journal.header["modality"] == "sequence" and self.shard is None:
                kept = self.out.with_name(f"{self.out.stem}.partial{self.out.suffix}")
                parts = _from_the_first(journal.parts)
                if parts:
                    message += self._keep_partial(journal, parts, kept)
        message += f"; {journal.rows:,} rows are finished and kept: when this is mended, the same command with --resume goes on"
        message += ", with --overwrite it begins anew"
        return type(error)(message)

    def _keep_partial(self, journal: Journal, parts: Sequence[Part], kept: Path) -> str:
        """Write the rows before the place where the input breaks off; say where they are, or why not."""
        rows = f"{sum(part.rows for part in parts):,} rows before that place"
        try:
            ours = journal.facts.get("partial") == kept.name
            sinks.check_output(kept, source=self.spec.data, keys=self.keys, overwrite=ours, per_token=self.per_token)
        except OutputError:
            return f"; the {rows} are not written by themselves, because {kept} or a file beside it exists"
        journal.note(partial=kept.name)
        sinks.write(kept, self._finished(journal, parts), source=self.spec.data, folder=self.spec.folder)
        return f"; the {rows} stand in {kept}"

    # After

    def _finished(self, journal: Journal, parts: Sequence[Part]) -> Finished:
        assert journal.header is not None
        folder = self.spec.folder
        fitted = {place: (folder, part) for place, part in journal.fitted.items()}
        return Finished(journal.header, [(folder, part) for part in parts], fitted)

    def _end(self, journal: Journal) -> list[Summary]:
        """Put the parts together."""
        assert journal.header is not None
        if (first := len(_from_the_first(journal.parts))) < len(journal.parts):
            msg = f"part {first} is not finished in {self.spec.folder}, others behind it are; nothing was written,"
            msg += " pass --overwrite to begin anew"
            raise InputError(msg)
        result = self._finished(journal, [journal.parts[n] for n in sorted(journal.parts)])
        if self.shard is not None:
            if result.rows != self._rows(journal.header):
                msg = f"{self.spec.data} gave {result.rows:,} rows of this shard, {self._rows(journal.header):,} were counted before;"
                msg += " the file changed or is damaged; pass --overwrite to begin anew"
                raise InputError(msg)
            journal.note(complete=True)
            return [Summary(self.spec.folder, m.key, result.rows, m.width, m.receipt) for m in result.models]
        if not (self.spec.folder / REDO).exists():
            try:
                journal.note(writing=True)
                sinks.write(self.out, result, source=self.spec.data, folder=self.spec.folder)
            except OSError as error:
                msg = f"{error}; all rows are finished and kept: the same command with --resume goes on"
                raise OutputError(msg) from error
        summaries = [Summary(self.out, m.key, result.rows, m.width, m.receipt) for m in result.models]
        for model in result.models:
            for text in model.tally.warnings():
                logger.warning("%s: %s", model.receipt["model"], text)
        journal.remove()
        return summaries


class _Pending:
    """The parts that are to be computed, in order; where the number of parts is not known, until they end."""

    def __init__(self, total: int | None, finished: Mapping[int, Part], check: Mapping[int, Wanted]) -> None:
        self.total = total
        self._next = 0
        self._finished, self._check = set(finished) - set(check), check

    def __iter__(self) -> Iterator[Wanted]:
        while self.total is None or self._next < self.total:
            number = self._next
            self._next += 1
            if number not in self._finished:
                yield self._check.get(number, Wanted(number))


def _told(journal: Journal) -> str:
    return "the finished shard" if journal.facts.get("complete") else "the interrupted run"


def _named(shard: Shard | None) -> str:
    return "the run" if shard is None else f"shard {shard[0]} of {shard[1]}"


def _by_content(found: Fingerprint) -> dict[str, Any]:
    """Return what identifies a file: a copy is as good, but of a large one not every byte was hashed."""
    return {"size": found.size, "sha256": found.sha256} | ({} if found.whole else {"mtime_ns": found.mtime_ns})


def _whole(folder: Path, part: Part) -> bool:
    file = folder / part.file
    return file.is_file() and sha256(file) == part.sha256


def _from_the_first(parts: Mapping[int, Part]) -> list[Part]:
    """Return the parts before the first that is missing."""
    found: list[Part] = []
    while len(found) in parts:
        found.append(parts[len(found)])
    return found


def _kind(device: str, devices: int) -> str:
    """Name the device of a run; of one on several, their kind."""
    return device if devices == 1 else device.partition(":")[0]


_SAME_ANYWAY = {"data", "rows", "input", "overwrite", "weights", "batch_tokens", "attention"}
"""What may differ when a run goes on: where files are, and what changes no vector beyond rounding."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in what two runs differ, a line for each: its name, what it was and what it is now."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if _comparable(name, old.get(name)) != _comparable(name, new.get(name))
    ]


def _comparable(name: str, value: Any) -> Any:
    return _kind(value, 2) if name.rpartition(".")[2] == "device" and isinstance(value, str) else value


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name not in _SAME_ANYWAY:
                # The names of the levels say nothing to a user.
                yield from _leaves(value, prefix if name in ("models", "receipt") else f"{prefix}{name}.")
    elif isinstance(tree, list) and tree and isinstance(tree[0], Mapping):
        for item in tree:
            yield from _leaves(item, f"{prefix}{item['key']}." if len(tree) > 1 else prefix)
    else:
        yield prefix.rstrip("."), tree


def _other_model(stored: Stored, receipt: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say in what the model that made a result differs from the one now."""
    expected = {**receipt, "cellfm_hub_version": now["cellfm_hub_version"]}
    found: list[str] = []
    for name, value in expected.items():
        was = stored.receipt.get(name)
        if name not in (*_SAME_ANYWAY, "genome", "qc") and _comparable(name, was) != _comparable(name, value):
            found.append(f"{name} was {was!r}, now {value!r}")
    return found
