"""Open files that somebody else made. Nothing in them is ever executed.

Tensor files are read as safetensors or with torch's weights-only unpickler. What is not about tensors stands in modules of its own and is
handed on here: text and JSON (:mod:`~cellfm_hub.text_files`), the authors' pickled dictionaries (:mod:`~cellfm_hub.pickles`) and archives
(:mod:`~cellfm_hub.archives`). A file that is damaged or malicious is an error of one line, never an empty or a default content.
"""

import hashlib
import io
import json
import os
import pickle  # noqa: TID251 - for the errors that torch raises
import struct
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellfm_hub._settings import settings
from cellfm_hub.archives import Archive, archive_members, extract
from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.pickles import MAX_PICKLE_BYTES, NUMPY_NUMBERS, PickleError, look_through, read_pickled_dict
from cellfm_hub.stand_ins import damage, head, refuse_stand_ins, stand_in
from cellfm_hub.text_files import read_json, read_json_object, read_text

if TYPE_CHECKING:  # torch is imported where tensors are read: hashing, fetching and listing do without
    from torch import Tensor

__all__ = [
    "Archive",
    "MappedTensors",
    "archive_members",
    "damage",
    "extract",
    "read_checkpoint",
    "read_json",
    "read_json_object",
    "read_pickled_dict",
    "read_tensors",
    "read_text",
    "sha256",
    "stand_in",
    "write_atomically",
    "write_tensors",
]


def sha256(path: Path, *, fresh: bool = False) -> str:
    """Return the SHA-256 of a file.

    It is remembered while the file keeps its size and time of change; that of a large file across processes, in ``hashes.json`` of the
    cache, because hashing takes longer than loading.

    Parameters
    ----------
    path
        The file.
    fresh
        Read the file again, whatever is remembered.
    """
    status = path.stat()
    size, mtime_ns, key = status.st_size, status.st_mtime_ns, str(path.absolute())
    settled = time.time() - mtime_ns / 1e9 > _SETTLED_SECONDS
    notes = settings.cache_dir / "hashes.json" if size >= _LARGE and settled else None
    if not fresh:
        for known in (_hashes, _notes(notes)):
            if known.get(key, ())[:2] == [size, mtime_ns]:
                return str(known[key][2])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if settled:
        _hashes[key] = [size, mtime_ns, digest]
    if notes is not None:
        # Two processes may lose each other's line; it is then made again. A cache that cannot be written only costs time.
        with suppress(OSError):
            kept = {place: entry for place, entry in _notes(notes).items() if Path(place).is_file()}
            write_atomically(notes, json.dumps(kept | {key: [size, mtime_ns, digest]}, indent=0).encode())
    return digest


_LARGE = 32 * 2**20
_SETTLED_SECONDS = 2.0
"""A file that changed just now may change again within the clock's resolution."""
_hashes: dict[str, list[Any]] = {}
"""Path -> size, time of change, hash."""


def _notes(path: Path | None) -> dict[str, list[Any]]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # nothing is remembered, so that files are hashed again
    valid = isinstance(content, dict) and all(isinstance(v, list) and len(v) == 3 for v in content.values())
    return content if valid else {}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that others see the old one or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> "Mapping[str, Tensor]":
    """Read a state dict from ``.safetensors``, a torch file, or the index (``.index.json``) of a sharded one.

    Tensors are mapped into memory, not copied, where the format allows it.

    Raises
    ------
    CheckpointFormatError
        If the file is damaged, or holds anything but tensors.
    """
    if path.name.endswith(".index.json"):
        shards = _shards(path)
        if all(shard.suffix == ".safetensors" for shard in shards):
            return MappedTensors(shards)
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            tensors |= read_tensors(shard)
        return tensors
    if path.suffix == ".safetensors":
        return MappedTensors([path])
    refuse_stand_ins(path)
    import torch

    content = _load(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        msg = f"{path} holds a {type(content).__name__} that is not a plain mapping of names to tensors"
        raise CheckpointFormatError(msg)
    return content


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a torch file in which tensors are nested with settings.

    Objects of classes that are neither tensors nor plain data (a configuration library's, say) come out as dictionaries of their items,
    if any: their classes are never looked up. A file that asks for a function, or for anything of Python's or torch's own that is neither
    tensor nor plain data, is refused.

    Raises
    ------
    CheckpointFormatError
        If the file is damaged, or no mapping.
    """
    refuse_stand_ins(path)
    content = _load(path, objects=True)
    if not isinstance(content, Mapping):
        msg = f"{path} holds a {type(content).__name__}; expected a mapping"
        raise CheckpointFormatError(msg)
    return content


def _load(path: Path, *, objects: bool = False) -> Any:
    """Read a file of tensors, whatever it holds; with `objects` also one in which foreign objects stand beside them."""
    import torch

    _look_through(path)
    zipped = head(path).startswith(b"PK")  # files from before torch 1.6 are not zip archives and cannot be mapped
    stand_ins: list[tuple[type, str]] = [(kind, ".".join(name)) for name, kind in NUMPY_NUMBERS.items()]
    if zipped:
        asked = set(_explained(path, lambda: torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        asked -= {name for _, name in stand_ins}
        if asked and not objects:
            raise _forbidden(path, min(asked), "no tensor")
        stand_ins += [(_foreign(path, name), name) for name in asked]
    with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]  # its annotation lacks pairs
        content = _explained(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=zipped))  # noqa: TID251
    if isinstance(content, OrderedDict) and (of_class := getattr(content, "of_class", None)) is not None:
        msg = f"{path} holds an object of the class {of_class}; expected a mapping of names to tensors"
        raise CheckpointFormatError(msg)
    _refuse_other_tensors(path, content)
    return content


MAX_RECORDS = 1_000_000
"""Of a torch file; one for each tensor."""


def _look_through(path: Path) -> None:
    """Refuse a torch file of which reading a few bytes would take far more memory or time than there is."""
    problem = None
    try:
        if not head(path).startswith(b"PK"):
            with path.open("rb") as file:  # five pickles stand before the numbers: a mark, a version, the machine, the names, the order
                front = io.BytesIO(file.read(MAX_PICKLE_BYTES))
            for _ in range(5):
                look_through(front)
            return
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
            total = sum(record.file_size for record in records)
            if packed:
                problem = f"its record {packed[0][:100]!r} is compressed, which torch never does"
            elif total > path.stat().st_size or len(records) > MAX_RECORDS:
                problem = f"its {len(records):,} records have {total:,} bytes, the file {path.stat().st_size:,}"
            for record in () if problem else records:
                if record.filename.rpartition("/")[2] == "data.pkl":
                    if record.file_size > MAX_PICKLE_BYTES:
                        problem = f"the list of its tensors has {record.file_size:,} bytes, expected at most {MAX_PICKLE_BYTES:,}"
                        break
                    look_through(archive.read(record))
    except (PickleError, zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from error
    if problem is not None:
        msg = f"{path} is refused: {problem}; get the file from its authors"
        raise CheckpointFormatError(msg)


_PLAIN_CLASSES = frozenset(
    {f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool", "object")}
    | {"collections.defaultdict", "typing.Any", "argparse.Namespace", "types.SimpleNamespace"}
)
"""Of Python's own: what objects that hold settings ask for, and what runs nothing."""


def _foreign(path: Path, name: str) -> type:
    """Return a class that stands in for one that is none of ours: its object is a dictionary with the items written into it."""
    root = name.partition(".")[0]
    own = root in sys.stdlib_module_names or root in {"torch", "numpy", "__builtin__", "posix", "nt", ""}
    if own and name not in _PLAIN_CLASSES:
        raise _forbidden(path, name, "neither a tensor nor settings")

    class Foreign:
        def __new__(cls, *arguments: object, **named: object) -> Any:
            if (arguments or named) and name not in _PLAIN_CLASSES:
                msg = f"it calls {name[:100]} with arguments, which only runs code"
                raise pickle.UnpicklingError(msg)
            made: Any = OrderedDict()
            made.of_class = name
            return made

    return Foreign


def _forbidden(path: Path, name: str, why: str) -> CheckpointFormatError:
    msg = f"{path} is refused: it asks for {' '.join(name.split())[:100]}, which is {why}; get the file from its authors"
    return CheckpointFormatError(msg)


def _refuse_other_tensors(path: Path, content: Any) -> None:
    """Raise unless each tensor is a plain array, of no more numbers than the file holds."""
    import torch

    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu" and not (value.is_quantized or value.is_nested)
            if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                kind = (
                    f"a tensor of shape {tuple(value.shape)} over fewer numbers"
                    if plain
                    else f"a tensor of {value.layout} on {value.device}"
                )
                msg = f"{path} is refused: it holds {kind}, expected plain arrays as published; get the file from its authors"
                raise CheckpointFormatError(msg)
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value


def _explained(path: Path, read: Callable[[], Any]) -> Any:
    """Read, turning whatever a damaged file makes torch raise into one line."""
    try:
        return read()
    except CheckpointFormatError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that the index of a sharded checkpoint lists. They stand beside it.

    Raises
    ------
    CheckpointFormatError
        If it is no such index, or names a file that is elsewhere.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        msg = f"{index} has no weight_map of tensor names to file names; expected the index of a sharded checkpoint"
        raise CheckpointFormatError(msg)
    names = sorted(set(weight_map.values()))
    if any(Path(name).name != name for name in names):
        msg = f"{index} names a shard outside its own folder: {names}"
        raise CheckpointFormatError(msg)
    return names


def _shards(index: Path) -> list[Path]:
    names = shard_names(index)
    for name in names:
        if not (index.parent / name).is_file():
            msg = f"{index.parent} lacks the shard {name!r} that {index.name} names; expected {', '.join(names)}"
            raise CheckpointFormatError(msg)
    return [index.parent / name for name in names]


def _unreadable(path: Path, error: Exception) -> CheckpointFormatError:
    # torch wraps the reason in advice to try without its safeguard, which is not ours to give.
    said = (str(error).partition("WeightsUnpickler error:")[2] or str(error)).strip().partition(" Please use")[0]
    reason = said.splitlines()[0][:300] if said else type(error).__name__
    msg = f"{path} cannot be read as a file of tensors ({reason}); it may be cut short or not a checkpoint, download it again"
    return CheckpointFormatError(msg)


class MappedTensors(Mapping[str, "Tensor"]):
    """The tensors of safetensors files, mapped into memory: a tensor takes room when its numbers are first looked at.

    Parameters
    ----------
    paths
        One file, or the shards of one checkpoint.

    Raises
    ------
    CheckpointFormatError
        If a file is damaged, or its header lies about the rest.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._home: dict[str, Path] = {}
        self._kept: dict[Path, Any] = {}
        for path in paths:
            refuse_stand_ins(path)
            self._kept[path] = self._open(path)
            self._home |= dict.fromkeys(self._kept[path].keys(), path)
        self._passing: tuple[Path, Any] | None = None
        self._passed = 0
        # So much of a mapping that is only copied from may be in memory.
        self._allowance = max(2**24, sum(path.stat().st_size for path in paths) // 20)

    @staticmethod
    def _open(path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(path, error) from error

    def __getitem__(self, name: str) -> "Tensor":
        return self._get(self._kept[self._home[name]], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def in_passing(self, name: str) -> "Tensor":
        """Return a tensor that will be copied and dropped: its pages leave memory soon after."""
        path = self._home[name]
        if self._passing is None or self._passing[0] != path or self._passed > self._allowance:
            self._passing, self._passed = None, 0  # the old mapping goes before the new one comes
            self._passing = (path, self._open(path))
        tensor = self._get(self._passing[1], name)
        self._passed += tensor.nbytes
        return tensor

    def _get(self, file: Any, name: str) -> "Tensor":
        from safetensors import SafetensorError

        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise _unreadable(self._home[name], error) from error
        return tensor


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> None:
    """Write a safetensors file one tensor after the other, then read it back and compare, bit by bit.

    The library's own writer wants all tensors in memory, without shared storage; here one at a time is enough.

    Raises
    ------
    CheckpointFormatError
        If what was read back differs.
    """
    import torch

    codes = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    # Widest numbers first, so that each tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in codes:
            msg = f"{name} holds {tensor.dtype}, which safetensors does not know"
            raise CheckpointFormatError(msg)
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = tensors[name].contiguous()
            if tensor.numel():
                file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    back = MappedTensors([path])
    for name in names:
        if not _same_bits(back.in_passing(name), tensors[name].contiguous()):
            msg = f"{path}: {name} reads back otherwise than it was written; the disk may be faulty"
            raise CheckpointFormatError(msg)


def _same_bits(one: "Tensor", other: "Tensor") -> bool:
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.numel() == 0 or torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
