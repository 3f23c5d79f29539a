"""Open files that somebody else made. Nothing in them is ever executed.

Tensor files are read as safetensors or with torch's weights-only unpickler; the authors' pickled dictionaries by a reader that
builds dictionaries, strings, numbers and numpy scalars, and refuses anything else by name.
"""

import hashlib
import io
import json
import os
import pickle  # noqa: TID251 - the restricted reader below is the one permitted use
import re
import shutil
import struct
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import numpy as np

from cellfm_hub._settings import settings
from cellfm_hub.errors import CheckpointFormatError

if TYPE_CHECKING:  # torch is imported where tensors are read: hashing, fetching and listing do without
    from torch import Tensor

MAX_DICTIONARY_BYTES = 64 * 2**20
"""The largest published dictionary has 4 MB."""

MAX_JSON_BYTES = 256 * 2**20
"""The largest published JSON file has 17 MB."""

_LFS_POINTER = b"version https://git-lfs"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def stand_in(path: Path) -> str | None:
    """Recognise what is often found in place of the real file.

    Returns
    -------
    What it is instead, in words, or ``None``.
    """
    head = _head(path)
    if not head:
        return "it is empty"
    if head.startswith(_LFS_POINTER):
        return f"it is a Git LFS pointer of {path.stat().st_size} bytes, not the file itself; fetch it with 'git lfs pull' or download it"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<!doctype", b"<head")):
        with path.open("rb") as file:
            found = re.search(rb"<title[^>]*>([^<]{1,80})", file.read(20_000), re.IGNORECASE)
        title = f" ({found[1].decode(errors='replace').strip()!r})" if found else ""
        return f"it is a web page{title}, as servers send for an error, a login or a licence, not the file itself"
    if start.startswith((b'{"error', b"<?xml")) and path.stat().st_size < 10_000:
        return "it is a server's error message, not the file itself"
    return None


def damage(path: Path, size: int | None = None) -> str | None:
    """Say what is wrong with a file that is not what it should be, as far as one can see.

    Parameters
    ----------
    path
        The file.
    size
        Bytes that it should have, if known.
    """
    if (instead := stand_in(path)) is not None:
        return instead
    got = path.stat().st_size
    if size is not None and got < size:
        return f"it is cut short: {got:,} of {size:,} bytes, the download broke off"
    if _head(path).startswith(b"PK") and not zipfile.is_zipfile(path):
        return "it is a truncated archive: its end is missing"
    return None


def _refuse_stand_ins(path: Path) -> None:
    if (instead := stand_in(path)) is not None:
        msg = f"{path} cannot be used: {instead}. Move it away and download it again"
        raise CheckpointFormatError(msg)


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
    except (OSError, ValueError):
        return {}
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


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    CheckpointFormatError
        If it is no JSON, or larger than any that is published.
    """
    _refuse_stand_ins(path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        msg = f"{path} has {size:,} bytes; a JSON file has at most {MAX_JSON_BYTES:,}"
        raise CheckpointFormatError(msg)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = f"{path} is not valid JSON ({error}); download it again"
        raise CheckpointFormatError(msg) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        msg = f"{path} holds a JSON {type(content).__name__}; expected an object"
        raise CheckpointFormatError(msg)
    return content


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
    _refuse_stand_ins(path)
    import torch

    content = _load(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        msg = f"{path} holds a {type(content).__name__} that is not a plain mapping of names to tensors"
        raise CheckpointFormatError(msg)
    return content


class _Plain:
    """Stands in for a class that is none of ours: what would be its object is a dictionary with the items written into it."""

    def __new__(cls, *_: object, **__: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # that is the point
        """Make no object of this class."""
        return OrderedDict()


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a torch file in which tensors are nested with settings.

    Objects of classes that are neither tensors nor plain data (a configuration library's, say) come out as dictionaries of their items,
    if any: their classes are never looked up.

    Raises
    ------
    CheckpointFormatError
        If the file is damaged, or no mapping.
    """
    import torch

    _refuse_stand_ins(path)
    foreign: list[str] = []
    if _head(path).startswith(b"PK"):
        foreign = _explained(path, lambda: torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    with torch.serialization.safe_globals([(_Plain, name) for name in foreign]):
        content = _load(path)
    if not isinstance(content, Mapping):
        msg = f"{path} holds a {type(content).__name__}; expected a mapping"
        raise CheckpointFormatError(msg)
    return content


def _load(path: Path) -> Any:
    """Read a file of tensors, whatever it holds."""
    import torch

    def load() -> Any:
        # Files from before torch 1.6 are not zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_head(path).startswith(b"PK"))  # noqa: TID251

    return _explained(path, load)


def _explained(path: Path, read: Callable[[], Any]) -> Any:
    """Read, turning whatever a damaged file makes torch raise into one line."""
    try:
        return read()
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
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
    said = (str(error).partition("WeightsUnpickler error:")[2] or str(error)).strip()
    reason = said.splitlines()[0] if said else type(error).__name__
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
            _refuse_stand_ins(path)
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


def _inside(name: str) -> str:
    """Return the name of an archive's member without leading ``./``, or refuse it.

    Raises
    ------
    CheckpointFormatError
        If it would leave the folder it is unpacked into.
    """
    plain = name.replace("\\", "/").removeprefix("./")
    if plain.startswith("/") or re.match(r"[A-Za-z]:", plain) or ".." in plain.split("/"):
        msg = f"its member {name!r} would be written outside its own folder"
        raise CheckpointFormatError(msg)
    return plain.rstrip("/")


def archive_members(path: Path) -> dict[str, int]:
    """List the files of a tar or zip archive, name -> bytes.

    Raises
    ------
    CheckpointFormatError
        If the archive is damaged, or a member is absolute, climbs out of its folder, or is neither file nor folder.
    """
    with Archive(path) as archive:
        return {name: size for name, (_, size) in archive.members.items()}


def extract(path: Path, wanted: str, target: Path) -> None:
    """Unpack one file of an archive: the member of that path or, where there is just one, of that base name.

    Raises
    ------
    CheckpointFormatError
        If it is not there, or the archive is refused; see :func:`archive_members`.
    """
    with Archive(path) as archive:
        base = wanted.rpartition("/")[2]
        found = [name for name in archive.members if name == wanted] or [
            name for name in archive.members if name.rpartition("/")[2] == base
        ]
        if len(found) != 1:
            held = ", ".join(list(archive.members)[:8])
            msg = f"{path} holds {len(found)} files called {base}, expected one; it has {held or 'nothing'}"
            raise CheckpointFormatError(msg)
        archive.copy(found[0], target)


class Archive:
    """A tar or zip archive that was looked through before anything is unpacked."""

    def __init__(self, path: Path) -> None:
        _refuse_stand_ins(path)
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> "Archive":
        self._file: tarfile.TarFile | zipfile.ZipFile
        listed: list[tuple[str, Any, int, bool, bool]]
        try:
            if zipfile.is_zipfile(self._path):
                self._file = self._stack.enter_context(zipfile.ZipFile(self._path))
                listed = [(i.filename, i, i.file_size, not i.is_dir(), False) for i in self._file.infolist()]
            else:
                self._file = self._stack.enter_context(tarfile.open(self._path))
                listed = [(m.name, m, m.size, m.isfile(), not (m.isfile() or m.isdir())) for m in self._file.getmembers()]
        except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
            self._stack.close()
            msg = f"{self._path} cannot be read as a tar or zip archive ({error or type(error).__name__}); it may be cut short"
            raise CheckpointFormatError(msg) from error
        self.members: dict[str, tuple[Any, int]] = {}
        try:
            for name, member, size, is_file, is_special in listed:
                plain = _inside(name)
                if is_special:
                    msg = f"its member {name!r} is a link or a device"
                    raise CheckpointFormatError(msg)
                if is_file and plain in self.members:
                    msg = f"its member {name!r} stands twice"
                    raise CheckpointFormatError(msg)
                if is_file:
                    self.members[plain] = (member, size)
        except CheckpointFormatError as error:
            self._stack.close()
            msg = f"{self._path} is refused, nothing was unpacked: {error}. Get the archive from its source again"
            raise CheckpointFormatError(msg) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str, limit: int) -> bytes:
        """Return the contents of a small file."""
        with closing(self._open(name)) as source:
            return source.read(limit)

    def copy(self, name: str, target: Path) -> None:
        """Write one file, under its own name when it is whole."""
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            self.unpack(name, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def unpack(self, name: str, target: Path) -> None:
        """Write one file to a place that nobody takes for the file before it is whole."""
        target.parent.mkdir(parents=True, exist_ok=True)
        size = self.members[name][1]
        try:
            with closing(self._open(name)) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            msg = f"{self._path}: {name} cannot be unpacked ({error}); the archive may be cut short, fetch it again"
            raise CheckpointFormatError(msg) from error
        if target.stat().st_size != size:
            msg = f"{self._path}: {name} is cut short, {target.stat().st_size:,} of {size:,} bytes; fetch the archive again"
            raise CheckpointFormatError(msg)

    def _open(self, name: str) -> IO[bytes]:
        member = self.members[name][0]
        opened = self._file.open(member) if isinstance(self._file, zipfile.ZipFile) else self._file.extractfile(member)
        assert opened is not None  # a regular file
        return opened


class _ForbiddenError(Exception):
    """A pickle asks for something that a dictionary does not need."""


class _Dtype:
    """Stands in for ``numpy.dtype`` while unpickling: knows only plain numbers."""

    def __init__(self, code: str, *_: object) -> None:
        if not (isinstance(code, str) and len(code) == 2 and code[0] in "iuf" and code[1] in "1248"):
            msg = f"numpy dtype {code!r}"
            raise _ForbiddenError(msg)
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _scalar(dtype: _Dtype, data: bytes) -> int | float:
    """Stand in for numpy's scalar reconstruction."""
    number: int | float = np.frombuffer(data, dtype=dtype.dtype, count=1)[0].item()
    return number


class _DictionaryUnpickler(pickle.Unpickler):
    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            msg = f"{module}.{name}"
            raise _ForbiddenError(msg) from None


def read_pickled_dict(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of strings to strings or numbers, without running any code in it.

    Only dictionaries, strings, integers, floats and numpy number scalars are rebuilt. Anything else, a class or function above all,
    is refused by name before it is looked up.

    Raises
    ------
    CheckpointFormatError
        Naming what the file wanted to load.
    """
    if path.suffix == ".json":  # the converted form
        return _plain_dict(path, read_json_object(path))
    _refuse_stand_ins(path)
    if (size := path.stat().st_size) > MAX_DICTIONARY_BYTES:
        msg = f"{path} has {size:,} bytes; a dictionary has at most {MAX_DICTIONARY_BYTES:,}"
        raise CheckpointFormatError(msg)
    try:
        content = _DictionaryUnpickler(io.BytesIO(path.read_bytes())).load()
    except _ForbiddenError as error:
        msg = f"{path} is refused: it asks for {error}, but a dictionary holds only str, int, float and numpy numbers;"
        msg += " get the file from its authors"
        raise CheckpointFormatError(msg) from error
    except Exception as error:  # a damaged pickle can raise anything
        msg = f"{path} cannot be read as a pickled dictionary ({type(error).__name__}: {error}); download it again"
        raise CheckpointFormatError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} holds a {type(content).__name__}; expected a dictionary"
        raise CheckpointFormatError(msg)
    return _plain_dict(path, content)


def _plain_dict(path: Path, content: dict[Any, Any]) -> dict[str, Any]:
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float):
            msg = f"{path} maps {type(key).__name__} to {type(value).__name__}; expected str to str or number"
            raise CheckpointFormatError(msg)
    return content
