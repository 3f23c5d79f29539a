"""Small files that would stop the process. Each is one line of error, in seconds and within a gigabyte above what the libraries take."""

import bz2
import gzip
import json
import pickle  # noqa: TID251 - to make malicious files
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellfm_adapters.dnabert2.tokenizer import Tokenizer
from cellfm_hub import cards, safe_files
from cellfm_hub.errors import CheckpointFormatError
from golden_cases import PORTABLE

SECONDS = 60
ROOM = 2 * 2**30
"""Bytes above what the libraries take."""
TOKENIZER = PORTABLE / "dnabert2-basic/checkpoint/tokenizer.json"

PROGRAM = f"""
import resource, sys
from pathlib import Path
from cellfm_hub import cards, safe_files
from cellfm_hub.errors import CellFMError

kind, *paths = sys.argv[1:]
if kind in ("tensors", "checkpoint"):
    import safetensors.torch
if kind == "tokenizer":
    from cellfm_adapters.dnabert2.tokenizer import Tokenizer
read = {{
    "dict": safe_files.read_pickled_dict,
    "tensors": safe_files.read_tensors,
    "checkpoint": safe_files.read_checkpoint,
    "json": safe_files.read_json,
    "archive": safe_files.archive_members,
    "tokenizer": lambda path: Tokenizer(path),
    "card": cards.read_card,
}}[kind]
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {ROOM}, taken + {ROOM}))
for path in paths:
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + {SECONDS}, resource.RLIM_INFINITY))
    try:
        read(Path(path))
        print("was read", flush=True)
    except CellFMError as error:
        print(str(error).replace(chr(10), "LINE"), flush=True)
"""


def refused(reader: str, files: dict[str, Path]) -> dict[str, str]:
    """Read files in one process with limits on memory and time; return the line of error of each."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, reader, *map(str, files.values())], capture_output=True, text=True, check=False)
    lines = dict(zip(files, done.stdout.splitlines(), strict=False))
    assert done.returncode == 0, f"died of {list(files)[len(lines)]!r}: {done.stderr[-1000:] or done.returncode}"
    for what, line in lines.items():
        assert str(files[what]) in line, (what, line)
        assert "LINE" not in line, (what, line)
        assert len(line) < 1000, (what, line)
    assert list(lines) == list(files)
    return lines


# Pickles


def laughs(levels: int, key: bytes = b"K\x01") -> bytes:
    """Return opcodes of a tuple of two tuples of two tuples …, each made once: 2 to the power of `levels` values to hash."""
    out = key + b"\x85q\x01"
    for level in range(levels):
        out += b"h" + bytes([level + 1]) + b"\x86q" + bytes([level + 2])
    return out


PICKLES = {
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "memo as text": b"\x80\x02}p2147483647\n.",
    "a key that takes for ever to hash": b"\x80\x02}" + laughs(60) + b"K\x01s.",
    "a key too deep to hash": b"\x80\x02}K\x01" + b"\x85" * 2_000_000 + b"K\x01s.",
    "a string longer than the file": b"\x80\x04}\x8d" + struct.pack("<Q", 2**40) + b"aK\x01s.",
    "bytes longer than the file": b"\x80\x04}\x8e" + struct.pack("<Q", 2**40) + b"aK\x01s.",
    "a number longer than the file": b"\x80\x02}X\x01\x00\x00\x00a\x8b\xff\xff\xff\x7f\x01s.",
    "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "a number of ten million bits": b"\x80\x02}X\x01\x00\x00\x00a\x8b" + struct.pack("<i", 1_250_000) + b"\x7f" * 1_250_000 + b"s.",
    "a number of 5,000 digits": b"}S'a'\nI" + b"9" * 5000 + b"\ns.",
    "not a number": pickle.dumps({"gene": float("nan")}),
    "ten million empty lists": b"\x80\x02(" + b"]" * 10_000_000 + b"l.",
    "copies": b"\x80\x02}" + b"2" * 1000 + b".",
    "a class changed": b"\x80\x02cnumpy\ndtype\n}X\x04\x00\x00\x00nameK\x01sb.",
    "an extension": b"\x80\x02\x82\x01.",
    "a name of two lines": b"\x80\x04\x8c\x02os\x8c\x08sys\ntem!\x93.",
}


def test_pickles(tmp_path: Path) -> None:
    files = {what: tmp_path / f"{n}.pkl" for n, what in enumerate(PICKLES)}
    for what, path in files.items():
        path.write_bytes(PICKLES[what])
    refused("dict", files)


def test_real_pickles_pass(tmp_path: Path) -> None:
    """Every protocol, numpy numbers of both byte orders, values that stand twice."""
    content = {f"ENSG{i:011}": value for i, value in enumerate([1, -5, 2**62, 0.5, "ENSG", "ENSG", True] * 2_000)}
    numbers = {f"g{i}": np.float32(i) for i in range(300)} | {"big": np.dtype(">f8").type(3), "int": np.int64(7)}
    path = tmp_path / "d.pkl"
    for protocol in range(6):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert safe_files.read_pickled_dict(path) == content
    for protocol in (4, 5):
        path.write_bytes(pickle.dumps(numbers, protocol=protocol))
        assert safe_files.read_pickled_dict(path) == {name: number.item() for name, number in numbers.items()}


# Torch files


def torch_zip(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", "little")
        for name, body in records.items():
            archive.writestr(f"x/{name}", body)
        archive.writestr("x/version", "3\n")
    return path


def aliased(path: Path) -> None:
    """One record of 8 MB that stands in the list a thousand times."""
    torch_zip(path, pickle.dumps({}, protocol=2), big=b"\0" * 2**23)
    with zipfile.ZipFile(path, "a") as archive:
        original = archive.getinfo("x/big")
        for i in range(1000):
            again = zipfile.ZipInfo(f"x/copy{i}")
            again.header_offset, again.CRC, again.file_size, again.compress_size = original.header_offset, original.CRC, 2**23, 2**23
            archive.filelist.append(again)
        archive._didModify = True  # type: ignore[attr-defined]  # the list is written anew


LEGACY = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


def expanded() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(1).expand(2**20, 2**20)}


TORCH: dict[str, Callable[[Path], object]] = {
    "a compressed list of tensors": lambda p: torch_zip(p, b"\x80\x02(" + b"]" * 2**26 + b"l.", zipfile.ZIP_DEFLATED),
    "a compressed record": lambda p: torch_zip(p, b"\x80\x02}.", zipfile.ZIP_DEFLATED, big=b"\0" * 2**28),
    "one record a thousand times": aliased,
    "a long list of tensors": lambda p: torch_zip(p, b"\x80\x02(" + b"]" * 2**25 + b"l."),
    "a key that takes for ever to hash": lambda p: torch_zip(p, b"\x80\x02}q\x00" + laughs(60) + b"K\x01s."),
    "a key too deep to hash": lambda p: torch_zip(p, b"\x80\x02}K\x01" + b"\x85" * 2_000_000 + b"K\x01s."),
    "the same, in an old file": lambda p: p.write_bytes(LEGACY + b"\x80\x02}q\x00" + laughs(60) + b"K\x01s." + pickle.dumps([], 2)),
    "deep, in an old file": lambda p: p.write_bytes(LEGACY + b"\x80\x02}K\x01" + b"\x85" * 2_000_000 + b"K\x01s." + pickle.dumps([], 2)),
    "more numbers than there are": lambda p: torch.save(expanded(), p),
    "more numbers than there are, nested": lambda p: torch.save({"cell": {"state_dict": [expanded()]}}, p),
    "a sparse tensor": lambda p: torch.save({"w": torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (2**20, 2**20))}, p),
    "a tensor of no numbers": lambda p: torch.save({"w": torch.empty(2**20, 2**20, device="meta")}, p),
    "an old file of holes": lambda p: holes(p, LEGACY + b"\x80\x02X\xff\xff\xff\x7f"),
}


def holes(path: Path, begin: bytes) -> None:
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(2**33)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("reader", ["tensors", "checkpoint"])
def test_torch_files(tmp_path: Path, reader: str) -> None:
    files = {what: tmp_path / f"{n}.pt" for n, what in enumerate(TORCH)}
    for what, path in files.items():
        TORCH[what](path)
        assert path.stat().st_blocks * 512 < 2**26
    refused(reader, files)


def asking(path: Path, name: str, arguments: bytes = b")", *, whole: bool = False) -> Path:
    """Write a torch file in which settings (or the whole content) are what calling `name` returns."""
    module, _, function = name.rpartition(".")
    call = f"c{module}\n{function}\n".encode() + arguments + b"R"
    inside = b"}q\x00X\x04\x00\x00\x00cell}q\x01X\x06\x00\x00\x00config" + call + b"ss"
    return torch_zip(path, b"\x80\x02" + (call if whole else inside) + b".")


ONE_WORD = b"X\x04\x00\x00\x00true\x85"


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("posix.system", ONE_WORD),
        ("builtins.eval", ONE_WORD),
        ("subprocess.Popen", b")"),
        ("torch.hub.load", ONE_WORD),
        ("numpy.load", ONE_WORD),
        ("somebody.else.run", ONE_WORD),
        ("nowhere", b")"),
    ],
)
@pytest.mark.parametrize("read", [safe_files.read_tensors, safe_files.read_checkpoint])
def test_forbidden_names(tmp_path: Path, read: Callable[[Path], Any], name: str, arguments: bytes, *, whole: bool) -> None:
    """A function is no settings object without settings: the file is refused by the name it asks for."""
    path = asking(tmp_path / "models.ckpt", name, arguments, whole=whole)
    with pytest.raises(CheckpointFormatError) as caught:
        read(path)
    assert name.rpartition(".")[2] in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "safe_globals" not in str(caught.value)


def test_settings_of_libraries(tmp_path: Path) -> None:
    """Objects of classes without arguments are their items; a whole file that is one such object without items is no empty mapping."""
    content = safe_files.read_checkpoint(asking(tmp_path / "a.ckpt", "omegaconf.dictconfig.DictConfig"))
    assert content == {"cell": {"config": {}}}
    with pytest.raises(CheckpointFormatError, match="an object of the class omegaconf"):
        safe_files.read_checkpoint(asking(tmp_path / "b.ckpt", "omegaconf.dictconfig.DictConfig", whole=True))
    with pytest.raises(CheckpointFormatError, match=r"asks for collections\.defaultdict"):
        safe_files.read_tensors(asking(tmp_path / "c.ckpt", "collections.defaultdict", whole=True))


def test_numpy_numbers_in_checkpoints(tmp_path: Path) -> None:
    """A best loss that was a numpy number comes out as that number, not as an empty mapping."""
    torch.save({"best": np.float64(0.25), "epoch": np.int64(7)}, tmp_path / "x.ckpt")
    assert safe_files.read_checkpoint(tmp_path / "x.ckpt") == {"best": 0.25, "epoch": 7}


# Safetensors: the library sees to it


def test_safetensors(tmp_path: Path) -> None:
    def one(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    headers: list[tuple[dict[str, Any], int | None]] = [
        ({}, 2**63),
        ({}, 99_999_999),
        ({"w": one("F32", [2**40, 2**40], 0, 0)}, None),
        ({"w": one("F32", [1], 2**63, 2**63 + 4)}, None),
        ({"a": one("U8", [8], 0, 8), "b": one("U8", [8], 0, 8)}, None),
    ]
    files = {}
    for n, (header, length) in enumerate(headers):
        text = json.dumps(header).encode()
        files[str(n)] = path = tmp_path / f"{n}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 8)
    refused("tensors", files)


# JSON


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": ' + b"9" * 5000 + b"}", "4300"),
        (b'{"a": -' + b"9" * 5000 + b"}", "4300"),
        (b'{"a": 1e999}', "not a finite number"),
        (b'{"a": NaN}', "not a finite number"),
        (b'{"a": [-Infinity]}', "not a finite number"),
        (b'{"A1BG": 1, "A1CF": 2, "A1BG": 3}', "'A1BG' stands twice"),
        (b'{"a":' * 200_000, "recursion"),
        (b"[" * 1_000_000 + b"]" * 1_000_000, "recursion"),
    ],
)
@pytest.mark.parametrize("read", [safe_files.read_json, safe_files.read_json_object, safe_files.read_pickled_dict])
def test_json(tmp_path: Path, content: bytes, says: str, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=says) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_json_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"[" + b"[]," * 30_000_000 + b"[]]")
    assert "bytes; a file of text has at most" in refused("json", {"lists": path})["lists"]


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 1e400])
def test_numbers_of_dictionaries(tmp_path: Path, value: float) -> None:
    path = tmp_path / "d.pkl"
    path.write_bytes(pickle.dumps({"gene": value}))
    with pytest.raises(CheckpointFormatError, match="expected"):
        safe_files.read_pickled_dict(path)


def test_hashes_that_cannot_be_read(tmp_path: Path) -> None:
    """What is remembered of files is no reason to fail."""
    from cellfm_hub import settings

    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    (settings.cache_dir / "hashes.json").write_bytes(b"[" * 1_000_000)
    assert safe_files._notes(settings.cache_dir / "hashes.json") == {}


# Archives

ZEROS = 2**28


def tar_of_zeros(path: Path, open_packed: Callable[..., Any]) -> None:
    with open_packed(path, "wb") as packed:
        header = tarfile.TarInfo("weights.pt")
        header.size = ZEROS
        packed.write(header.tobuf())
        for _ in range(ZEROS // 2**20):
            packed.write(b"\0" * 2**20)
        packed.write(b"\0" * 1024)


def zip_of_zeros(path: Path, compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive, archive.open("weights.pt", "w", force_zip64=True) as file:
        for _ in range(ZEROS // 2**20):
            file.write(b"\0" * 2**20)


def long_name(path: Path) -> None:
    """A header of 4 GB, with holes."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**32
    holes(path, header.tobuf(tarfile.GNU_FORMAT))


def sparse(path: Path) -> None:
    header = tarfile.TarInfo("weights.pt")
    header.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"77777777777\0"  # its size, once it is unpacked
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + b"\0" * 1024)


def link_in_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("weights.pt")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")


ARCHIVES: dict[str, Callable[[Path], None]] = {
    "tar.gz": lambda path: tar_of_zeros(path, gzip.open),
    "tar.bz2": lambda path: tar_of_zeros(path, bz2.open),
    "zip": lambda path: zip_of_zeros(path, zipfile.ZIP_DEFLATED),
    "a long name": long_name,
    "holes": sparse,
    "a link": link_in_zip,
}


def test_archives(tmp_path: Path) -> None:
    files = {what: tmp_path / f"{n}.archive" for n, what in enumerate(ARCHIVES)}
    for what, path in files.items():
        ARCHIVES[what](path)
        assert path.stat().st_blocks * 512 < 2**20
    lines = refused("archive", files)
    for what in ("tar.gz", "tar.bz2", "zip"):
        assert "268,435,456 bytes, more than 100 times its own size" in lines[what]
    assert "with holes" in lines["holes"]
    assert "a link" in lines["a link"]


@pytest.mark.parametrize("kind", ["crc", "encrypted", "unknown packing"])
def test_archives_that_break_inside(tmp_path: Path, kind: str) -> None:
    """The list is good, the contents are not."""
    path, target = tmp_path / "models.x", tmp_path / "out" / "a.txt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", b"0123456789")
    body = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        begin = body.index(signature)
        if kind == "encrypted":
            body[begin + 6 + at] |= 1
        elif kind == "unknown packing":
            body[begin + 8 + at] = 97
        else:
            body[begin + 14 + at] ^= 1
    path.write_bytes(bytes(body))
    with pytest.raises(CheckpointFormatError) as caught:
        safe_files.extract(path, "a.txt", target)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not target.exists()


# Tokenizers


def changed(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(TOKENIZER.read_text()) | changes))
    return path


def test_patterns_in_tokenizers(tmp_path: Path) -> None:
    patterns = {"large": "(?:(?:(?:a{1000}){1000}){1000})", "slow": "(A+)+$"}
    files = {}
    for what, pattern in patterns.items():
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": False}
        files[f"{what} split"] = changed(tmp_path / f"split-{what}.json", pre_tokenizer=split)
        normalizer = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "A"}
        files[f"{what} replaced"] = changed(tmp_path / f"replace-{what}.json", normalizer=normalizer)
    assert all("other settings" in line for line in refused("tokenizer", files).values())


def test_what_a_tokenizer_file_does_not_use(tmp_path: Path) -> None:
    """Patterns that would only be used for decoding are not even compiled."""
    bomb = {"type": "Replace", "pattern": {"Regex": "(?:(?:(?:a{1000}){1000}){1000})"}, "content": ""}
    path = changed(tmp_path / "tokenizer.json", decoder=bomb)
    assert Tokenizer(path).tokenize(["ACGTTGCA"]).ids.tolist() == Tokenizer(TOKENIZER).tokenize(["ACGTTGCA"]).ids.tolist()


# Cards of plug-ins


def test_cards(tmp_path: Path) -> None:
    chain = list(zip("abcdefgh", "bcdefghi", strict=True))
    texts = {
        "lists": "a: &a [x, x, x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in chain),
        "merges": "a: &a {x: 1}\n" + "".join(f"{n}: &{n} {{<<: [{', '.join([f'*{p}'] * 9)}]}}\n" for p, n in chain),
        "deep": "license: " + "[" * 100_000,
        "digits": "license: 1" + "0" * 5000,
        "date": "license: 2001-13-41",
        "key": "? [a, b]\n: 1",
    }
    files = {what: tmp_path / f"{what}.md" for what in texts}
    for what, path in files.items():
        path.write_text(f"---\n{texts[what]}\n---\ntext\n")
    lines = refused("card", files)
    assert "aliases are not allowed" in lines["merges"]


def test_card_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_bytes(b"---\n\xff\n---\n")
    with pytest.raises(cards.CardError, match="UTF-8"):
        cards.read_card(tmp_path / "x.md")
