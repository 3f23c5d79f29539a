"""Copies of published files in formats that need no unpickling: torch files as safetensors, pickled dictionaries as JSON.

What that buys (2 GB on the CPU, ``tests/benchmarks/load_memory.py``): peak memory 1.0 instead of 1.2 times the file, and for files from
before torch 1.6, which cannot be mapped, a load in a tenth of the time. Newer torch files are mapped as well and load about as fast.

They lie in the cache under the hash of the file they were made from, are compared with it when they are made, and their own hash stands in
``cellfm.lock``. :class:`~cellfm_hub.checkpoints.CheckpointFiles` hands them out in place of the published files.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cellfm_hub import lock, safe_files
from cellfm_hub._settings import settings
from cellfm_hub.checkpoints import WEIGHT_SUFFIXES, CheckpointFiles, converted_folder, readable
from cellfm_hub.errors import CheckpointFormatError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("cellfm_hub")


def convert(model: str) -> dict[str, Path]:
    """Convert the files of a model that are here.

    The model is loaded once, so that the files which it reads, and the lists that its family makes of them, are known to be good.

    Parameters
    ----------
    model
        A checkpoint, or a family for its default.

    Returns
    -------
    Published path -> copy, of every file that has one now.

    Raises
    ------
    WeightsUnavailableError
        If files are not here.
    OutputError
        If the cache cannot be written.
    """
    from cellfm_hub.api import load

    with settings.override(offline=True, convert=False):
        files = load(model, device="cpu", precision="float32").files
        files = CheckpointFiles(files.entry)
        published = files.bring_all()
    try:
        return _convert(files, published, dictionaries=True)
    except OSError as error:
        msg = f"{converted_folder()} cannot be written ({error.strerror}); set CELLFM_CACHE to a folder of yours with room for the copies"
        raise OutputError(msg) from error


def convert_used(files: CheckpointFiles) -> None:
    """Convert the weights that were just loaded; what goes wrong here is no reason not to use the model."""
    used = {name: path for name, path in files.used.items() if _is_torch(path) and path.parent != converted_folder()}
    if not used:
        return
    size = sum(path.stat().st_size for path in used.values())
    try:
        converted_folder().mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(converted_folder()).free > 1.5 * size:
            _convert(files, used, dictionaries=False)
    except (OSError, CheckpointFormatError) as error:
        logger.info("%s: no quicker copy was made (%s)", files.entry.name, error)


def _is_torch(path: Path) -> bool:
    if path.name.endswith(".index.json"):
        return not path.name.endswith(".safetensors.index.json")
    return path.suffix in WEIGHT_SUFFIXES - {".safetensors"}


def _convert(files: CheckpointFiles, paths: Mapping[str, Path], *, dictionaries: bool) -> dict[str, Path]:
    out: dict[str, Path] = {}
    for name, path in paths.items():
        if _is_torch(path) and not _is_shard(path, paths):
            tensors = _network_tensors(files, path)
            if tensors is not None:
                out[name] = _keep(files, path, ".safetensors", tensors)
        elif dictionaries and path.suffix == ".pkl":
            out[name] = _keep(files, path, ".json", safe_files.read_pickled_dict(path))
    return out


def _is_shard(path: Path, paths: Mapping[str, Path]) -> bool:
    """Say whether a file is one of several that an index names; the copy is made of all of them together."""
    indices = [other for other in paths.values() if other.name.endswith(".bin.index.json")]
    return any(path.name in safe_files.shard_names(index) for index in indices)


def _network_tensors(files: CheckpointFiles, path: Path) -> "Mapping[str, Tensor] | None":
    """Return the tensors of a file if it holds a network's, not vectors of genes or settings beside tensors."""
    from cellfm_hub.adapter import TokenAdapter
    from cellfm_hub.nn.meta import meta_device

    adapter = files.entry.adapter_class()
    if not issubclass(adapter, TokenAdapter) or not files.entry.checkpoint.config:
        return None
    with meta_device():
        layout = adapter.published(dict(files.entry.checkpoint.config))[1]
    try:
        tensors = safe_files.read_tensors(path)
    except CheckpointFormatError:
        return None
    return tensors if len(layout.keys() & tensors.keys()) > len(layout) / 2 else None


def _keep(files: CheckpointFiles, path: Path, suffix: str, content: "Mapping[str, Tensor] | dict[str, object]") -> Path:
    source = files.weights_sha256(path)
    copy = converted_folder() / f"{source}{suffix}"
    known = lock.read().converted.get(source)
    if copy.is_file() and known is not None and safe_files.sha256(copy) == known.sha256:
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(f".{copy.stem}.{os.getpid()}{suffix}")
    try:
        if suffix == ".json":
            part.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            if safe_files.read_pickled_dict(part) != content:
                msg = f"{path} cannot be written as JSON without a change; it stays as it is"
                raise CheckpointFormatError(msg)
        else:
            safe_files.write_tensors(part, content, {"format": "pt", "source_sha256": source})  # type: ignore[arg-type]
        entry = lock.LockedFile(sha256=safe_files.sha256(part), size=part.stat().st_size, origin=files.entry.name)
        part.replace(copy)
    finally:
        part.unlink(missing_ok=True)
    lock.update({}, {source: entry})
    logger.info("%s: wrote %s (%s)", files.entry.name, copy, readable(entry.size))
    return copy
