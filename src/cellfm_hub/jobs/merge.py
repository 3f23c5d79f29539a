"""Put the shards of a result together: :func:`merge`."""

import glob
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cellfm_hub import sinks
from cellfm_hub.errors import CellFMError, InputError, OutputError
from cellfm_hub.jobs import in_place
from cellfm_hub.jobs.fingerprint import Fingerprint, fingerprint
from cellfm_hub.jobs.finished import Finished
from cellfm_hub.jobs.journal import NAME, Journal, work_folder
from cellfm_hub.jobs.parts import sha256
from cellfm_hub.jobs.run import SHARDS, Summary, differences
from cellfm_hub.jobs.shares import Shard, share_of


def merge(out: str | Path, *, overwrite: bool = False, keep: bool = False) -> list[Summary]:
    """Put the shards that :func:`embed_file` made for a file together, in the order of the data.

    Parameters
    ----------
    out
        The file that the shards were made for; they are the folders ``<out>.shard-1-of-8`` and so on beside it.
    overwrite
        Replace `out`.
    keep
        Keep the shards; otherwise they are removed when `out` is complete. Its receipt says how many there were, in ``shards``: one that is
        asked for again is then told from one that is missing.

    Returns
    -------
    A :class:`Summary` for each model.

    Raises
    ------
    OutputError
        If a shard is missing, unfinished, damaged, or made with other options or from other data; or `out` cannot be written.
    InputError
        If the shards together do not hold the rows of the data.
    """
    out = Path(out)
    with ExitStack() as stack:
        work = stack.enter_context(Journal(work_folder(out)))
        merged = work.facts.get("merged", {})
        if merged and out.exists() and all(_is_merged(folder, journal) for folder, journal in _folders(out, merged)):
            return _tidy_up(out, work, keep=keep)  # an earlier merge was killed in doing so
        folders = _shards(out)
        journals = [stack.enter_context(Journal(folder)) for folder in folders]
        _check(journals)
        header = _merged_header(journals)
        source = Path(header["data"])
        parts = [(journal.folder, journal.parts[number]) for journal in journals for number in sorted(journal.parts)]
        result = Finished(header, parts, {})
        summaries = [Summary(out, model.key, result.rows, model.width, model.receipt) for model in result.models]
        log = work.folder / "redo.npz"
        if log.exists():  # a merge was interrupted in its last moment
            in_place.redo(out, log)
        else:
            keys = [model.key for model in result.models]
            before = Fingerprint(**header["input"])
            if sinks.same_file(out, source):
                in_place.drop_leftovers(out, size=before.size, mtime_ns=before.mtime_ns)
            replacing = overwrite or header["overwrite"] or bool(work.facts.get("writing") and not merged)
            sinks.check_output(out, source=source, keys=keys, overwrite=replacing, per_token=result.per_token)
            if out.suffix in (".h5ad", ".zarr"):
                _check_source(source, before)
            work.note(writing=True)
            try:
                sinks.write(out, result, source=source, folder=work.folder)
            except CellFMError:
                work.note(writing=log.exists())  # what is at `out` is not ours, unless it was begun to be changed
                raise
        shards = {journal.folder.name: sha256(journal.folder / NAME) for journal in journals}
        told = [{"key": s.key, "rows": s.rows, "dim": s.dim, "receipt": s.receipt} for s in summaries]
        work.note(merged={"shards": shards, "summaries": told})
    with Journal(work_folder(out)) as work:
        return _tidy_up(out, work, keep=keep)


def _tidy_up(out: Path, work: Journal, *, keep: bool) -> list[Summary]:
    """Remove what is left of the shards of a result that is complete."""
    merged = work.facts["merged"]
    for folder, _ in [] if keep else _folders(out, merged):
        if folder.exists():
            with Journal(folder) as shard:
                shard.remove()
    work.remove()
    return [Summary(out, **summary) for summary in merged["summaries"]]


def _folders(out: Path, merged: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """Return the folders that were merged, and the hashes of their journals."""
    return [(out.with_name(name), journal) for name, journal in merged["shards"].items()]


def _is_merged(folder: Path, journal: str) -> bool:
    """Whether a shard is still the one that was merged, or is gone, or about to."""
    return not (folder / NAME).exists() or sha256(folder / NAME) == journal


def _merged_header(journals: Sequence[Journal]) -> dict[str, Any]:
    """Return what the run was; the receipts say that it was done in shards."""
    header = journals[0].header
    assert header is not None
    models = [model | {"receipt": model["receipt"] | {SHARDS: len(journals)}} for model in header["models"]]
    return header | {"models": models}


def _shards(out: Path) -> list[Path]:
    """Find the folders of all shards, in order."""
    found: dict[int, dict[int, Path]] = {}
    for folder in out.parent.glob(f"{glob.escape(out.name)}.shard-*-of-*"):
        if match := re.fullmatch(rf"{re.escape(out.name)}\.shard-(\d+)-of-(\d+)", folder.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = folder
    if not found:
        msg = f"there are no shards of {out} ({out.name}.shard-1-of-…); make them with 'cellfm embed DATA -o {out} --shard 1/8' and so on"
        if out.exists():
            msg += f"; {out} is there, and if they were merged into it already, there is nothing to do"
        raise OutputError(msg)
    if len(found) > 1:
        msg = f"there are shards of {out} of {' and of '.join(map(str, sorted(found)))}; remove those that are not wanted"
        raise OutputError(msg)
    ((count, folders),) = found.items()
    if missing := [f"{i}/{count}" for i in range(1, count + 1) if i not in folders]:
        msg = f"{len(missing)} of {count} shards of {out} are missing: {', '.join(missing[:10])}; compute them with --shard"
        raise OutputError(msg)
    return [folders[i] for i in range(1, count + 1)]


def _check(journals: Sequence[Journal]) -> None:
    """Compare the shards with each other."""
    count = len(journals)
    for i, journal in enumerate(journals, 1):
        if journal.header is None or not journal.facts.get("complete"):
            msg = f"{journal.folder} is not finished; go on with it: --shard {i}/{count} --resume"
            raise OutputError(msg)
        if journal.header["shard"] != [i, count]:
            msg = f"{journal.folder} holds shard {'/'.join(map(str, journal.header['shard']))}, whatever its name; rename it, or remove it"
            raise OutputError(msg)
        free = {"shard": None, "part_rows": None}  # parts of any size make up a shard
        if wrong := differences({**(journals[0].header or {}), **free}, {**journal.header, **free}):
            msg = f"shards 1 and {i} of {count} are not of one run: {'; '.join(wrong[:3])}; compute one of them again with --overwrite"
            raise OutputError(msg)
        first, this = (Fingerprint(**(other.header or {})["input"]) for other in (journals[0], journal))
        if not first.same_content(this) or journal.header["rows"] != (journals[0].header or {})["rows"]:
            msg = f"shards 1 and {i} of {count} were made from different versions of the data; compute one of them again with --overwrite"
            raise OutputError(msg)
        for part in journal.parts.values():
            file = journal.folder / part.file
            if not file.is_file() or sha256(file) != part.sha256:
                msg = f"{file} is damaged; compute it again: --shard {i}/{count} --resume"
                raise OutputError(msg)
        _check_rows(journal, (i, count))


def _check_rows(journal: Journal, shard: Shard) -> None:
    """See that a shard holds its rows, all of them: so the shards together hold every row once."""
    assert journal.header is not None
    share = share_of(journal.header["rows"], shard)
    gaps = set(range(len(journal.parts))) - set(journal.parts)
    if gaps or journal.rows != len(share):
        what = f"its part {min(gaps)} is missing" if gaps else f"it holds {journal.rows:,} rows"
        msg = f"{journal.folder} is not rows {share.start:,} to {share.stop:,} of {journal.header['data']}: {what}; compute it again:"
        msg += f" --shard {shard[0]}/{shard[1]} --overwrite"
        raise OutputError(msg)


def _check_source(source: Path, before: Fingerprint) -> None:
    """See that the data are there, whose annotation goes into the result."""
    try:
        same = fingerprint(source).same_content(before)
    except InputError as error:
        msg = f"{source}, whose annotation goes into the result, is not there; bring it back, or merge into .parquet or .npy"
        raise OutputError(msg) from error
    if not same:
        msg = f"{source} changed since the shards were made from it; bring that version back, or compute them again"
        raise OutputError(msg)
