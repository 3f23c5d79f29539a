"""Open HDF5 files and zarr stores that somebody else made. Nothing in them is ever executed, nothing outside them is ever read.

Both are looked through before the first value is read, by what they say of themselves and not by what anybody is about to ask of them.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from cellfm_hub.errors import InputError
from cellfm_hub.text_files import MAX_TEXT_BYTES

if TYPE_CHECKING:
    import zarr

_REWRITE = "if you trust it, read it with anndata, write it anew with AnnData.write_h5ad and pass that"


# HDF5


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading.

    Raises
    ------
    InputError
        If a part of it stands in another file.
    OSError
        If it cannot be read.
    """
    file = h5py.File(path, "r")
    try:
        for place, problem in _outside(file):
            msg = f"{path} is refused: {place!r} {problem}, and a data file may not reach into others; {_REWRITE}"
            raise InputError(msg)
    except BaseException:
        file.close()
        raise
    return file


def _outside(file: h5py.File) -> Iterator[tuple[str, str]]:
    """Find what reaches out of an HDF5 file: the place, and how. No link is followed but those to objects of the file itself."""
    root = h5py.h5g.open(file.id, b"/")
    seen = {h5py.h5o.get_info(root).addr}
    waiting = [(root, b".")]  # names, not open groups: a group may hold a hundred thousand
    while waiting:
        parent, name = waiting.pop()
        group = h5py.h5g.open(parent, name)
        links: list[tuple[bytes, int, int]] = []  # name, kind, address
        # h5py hands out one object again and again: what it says is taken down at once.
        group.links.iterate(lambda name, info, found=links: found.append((name, info.type, info.u)), info=True, order=h5py.h5.ITER_NATIVE)
        for name, link, address in links:
            if link == h5py.h5l.TYPE_SOFT:  # a path in this file, whose every object is looked at
                continue
            if link != h5py.h5l.TYPE_HARD:
                yield _place(group, name), _target(group, name, link)
                continue
            if address in seen:  # a second name, perhaps a circle
                continue
            seen.add(address)
            kind = h5py.h5o.get_info(group, name).type
            if kind == h5py.h5o.TYPE_GROUP:
                waiting.append((group, name))
            elif kind == h5py.h5o.TYPE_DATASET and (problem := _elsewhere(h5py.h5d.open(group, name))):
                yield _place(group, name), problem


def _target(group: Any, name: bytes, link: int) -> str:
    if link != h5py.h5l.TYPE_EXTERNAL:
        return f"is a link of an unknown kind ({link})"
    return f"is a link to another file, {os.fsdecode(group.links.get_val(name)[0])!r}"


def _elsewhere(dataset: Any) -> str | None:
    """Say how the values of a data set come from another file, ``None`` if they stand in this one."""
    creation = dataset.get_create_plist()
    if creation.get_external_count():
        return f"has its values in another file, {os.fsdecode(creation.get_external(0)[0])!r}"
    if creation.get_layout() == h5py.h5d.VIRTUAL:
        return "is put together from other data sets (virtual)"
    return None


def _place(group: Any, name: bytes) -> str:
    return os.fsdecode((h5py.h5i.get_name(group) or b"").strip(b"/") + b"/" + name).strip("/")


# Zarr

KNOWN_CODECS = frozenset(
    {
        # numbers as bytes, and in which order
        *("bytes", "endian", "transpose", "sharding_indexed"),
        # compression
        *("blosc", "zstd", "lz4", "gzip", "zlib", "bz2", "lzma"),
        # check sums
        *("crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3"),
        # numbers as other numbers
        *("shuffle", "delta", "fixedscaleoffset", "quantize", "bitround", "astype", "packbits", "categorize"),
        # text and bytes of any length; json2 makes lists, numbers and text
        *("vlen-utf8", "vlen-bytes", "json2", "base64"),
    }
)
"""Names of codecs that do nothing but arithmetic. Others may run code (``pickle``), or whatever a package that registers them does."""

_METADATA = (".zarray", ".zmetadata", "zarr.json")
"""Files that describe arrays. (``.zgroup`` and ``.zattrs`` do not.)"""


def open_zarr(path: Path) -> "zarr.Group":
    """Open a folder in either format of zarr for reading.

    Raises
    ------
    InputError
        If an array is encoded in a way that is not known, or a file in it is a link.
    OSError, ValueError
        If it cannot be read.
    """
    for file in _files(path):
        # Not every file system tells upper from lower case.
        if file.name.casefold() in _METADATA:
            _check_metadata(file, path)
    import zarr

    return zarr.open_group(zarr.storage.LocalStore(path, read_only=True), mode="r")


def _files(store: Path) -> Iterator["os.DirEntry[str]"]:
    """Walk through a store; the folder itself may be a link."""
    waiting = [os.fspath(store)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry
                else:
                    what = "a link" if entry.is_symlink() else "neither a file nor a folder"
                    msg = f"{store} is refused: {os.path.relpath(entry.path, store)!r} in it is {what}, and a store may not reach out of"
                    msg += " its folder; if you trust it, copy it with cp -rL and pass the copy"
                    raise InputError(msg)


def _check_metadata(file: "os.DirEntry[str]", store: Path) -> None:
    if (size := file.stat().st_size) > MAX_TEXT_BYTES:
        msg = f"{file.path} has {size:,} bytes; the description of a zarr store has at most {MAX_TEXT_BYTES:,}"
        raise InputError(msg)
    content = json.loads(Path(file.path).read_bytes())  # as zarr does it
    folder = os.path.relpath(Path(file.path).parent, store)
    for place, description in _described(folder, content):
        for name in _codecs(description):
            if name.removeprefix("numcodecs.") not in KNOWN_CODECS:
                msg = f"{store} is refused: its array {os.path.normpath(place)!r} is encoded by {name!r}, which is none of the codecs that"
                msg += f" are known to be safe ({', '.join(sorted(KNOWN_CODECS))}); if you trust it, read it with anndata, write it anew"
                msg += " with AnnData.write_zarr and pass that"
                raise InputError(msg)


def _described(place: str, content: Any) -> Iterator[tuple[str, Any]]:
    """Give every description of an array or group: the one of a file, and those of a whole store that were gathered in it."""
    yield place, content
    for gathered in (content, content.get("consolidated_metadata") or {}):  # format 2, 3
        for name, inner in (gathered.get("metadata") or {}).items():
            path = Path(name)
            if path.is_absolute() or path.drive or ".." in path.parts:
                msg = f"it describes {name!r}, a place outside its folder"
                raise ValueError(msg)
            if path.name != ".zattrs":  # anybody's own words
                yield from _described(f"{place}/{name}".removesuffix("/.zarray"), inner)


def _codecs(description: Any) -> Iterator[str]:
    """Name every codec of an array, in the words of either format, and those inside others."""
    codecs = [*(description.get("filters") or ()), *(description.get("codecs") or ())]
    if description.get("compressor"):
        codecs.append(description["compressor"])
    for codec in codecs:
        if isinstance(codec, str):
            yield codec
            continue
        settings = codec.get("configuration") or {}
        yield from (str(named[key]) for named, key in ((codec, "id"), (codec, "name"), (settings, "id")) if key in named)
        yield from _codecs({"codecs": [*(settings.get("codecs") or ()), *(settings.get("index_codecs") or ())]})
