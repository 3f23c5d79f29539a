"""Loading: mapped, converted once, and refusing everything that is not what it says."""

import io
import json
import os
import pickle  # noqa: TID251 - to make malicious files
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cellfm_hub as cf
from cellfm_hub import lock, safe_files
from cellfm_hub.cards import File, Mirror, Source
from cellfm_hub.checkpoints import CheckpointFiles, converted_folder
from cellfm_hub.convert import convert
from cellfm_hub.errors import CheckpointFormatError, InputError
from cellfm_hub.registry import Entry, Registry, registry, weights_table
from cellfm_hub.selftest import run_selftest
from cellfm_hub.weights import Key, load_network
from golden_cases import PORTABLE, Case

CPU = torch.device("cpu")


# Lean loading


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(8, 4)
        self.parts = nn.Linear(8, 6, bias=False)
        self.register_buffer("own", torch.zeros(3), persistent=False)


def small_file(path: Path) -> dict[str, torch.Tensor]:
    tensors = {"w": torch.randn(4, 8), "b": torch.randn(4), "q": torch.randn(3, 8), "k": torch.randn(3, 8), "head": torch.randn(2, 2)}
    save_file(tensors, path)
    return tensors


LAYOUT = {
    "w": Key((4, 8), "whole.weight"),
    "b": Key((4,), "whole.bias"),
    "q": Key((3, 8), "parts.weight", (0, 2)),
    "k": Key((3, 8), "parts.weight", (1, 2)),
    "head": Key((2, 2), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every number arrives, in the dtype that was asked for, whether mapped or copied."""
    tensors = small_file(tmp_path / "m.safetensors")
    network = load_network(Small, safe_files.read_tensors(tmp_path / "m.safetensors"), LAYOUT, origin="m", device=CPU, dtype=dtype)
    expected = {"whole.weight": tensors["w"], "whole.bias": tensors["b"], "parts.weight": torch.cat((tensors["q"], tensors["k"]))}
    state = network.state_dict()
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert state[name].dtype == dtype
        torch.testing.assert_close(state[name], value.to(dtype), rtol=0, atol=0)
    assert not any(p.is_meta or p.requires_grad for p in network.parameters())
    assert not network.own.is_meta
    assert not network.training


def test_network_does_not_write_to_the_file(tmp_path: Path) -> None:
    """The file is mapped privately: what a user does to the network stays in memory."""
    path = tmp_path / "m.safetensors"
    small_file(path)
    before = path.read_bytes()
    network = load_network(Small, safe_files.read_tensors(path), LAYOUT, origin="m", device=CPU, dtype=torch.float32)
    network.whole.weight.add_(1)
    assert path.read_bytes() == before


def test_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Missing, unknown and misshapen keys are named together; what is dropped on purpose is said."""
    path = tmp_path / "m.safetensors"
    tensors = small_file(path)
    with caplog.at_level("INFO", logger="cellfm_hub"):
        load_network(Small, safe_files.read_tensors(path), LAYOUT, origin="m", device=CPU, dtype=torch.float32)
    assert "4 tensors used, 1 dropped on purpose (head)" in caplog.text
    save_file({"w": tensors["w"][:3].clone(), "q": tensors["q"], "k": tensors["k"], "more": tensors["b"]}, path)
    with pytest.raises(CheckpointFormatError) as caught:
        load_network(Small, safe_files.read_tensors(path), LAYOUT, origin="m", device=CPU, dtype=torch.float32)
    for fragment in ("missing: b", "not known: more", "w is (3, 8), expected (4, 8)"):
        assert fragment in str(caught.value)


def test_pages_leave_memory(tmp_path: Path) -> None:
    """Tensors that are only copied from do not pile up."""
    path = tmp_path / "m.safetensors"
    save_file({f"t{i:02}": torch.randn(1000, 1000) for i in range(40)}, path)
    tensors = safe_files.read_tensors(path)
    assert isinstance(tensors, safe_files.MappedTensors)

    def resident() -> int:
        return (
            int(next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Rss")).split()[1]) * 1024
        )

    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs Linux")
    start = peak = resident()
    for name in tensors:
        tensors.in_passing(name).sum()
        peak = max(peak, resident())
    assert peak - start < 0.3 * path.stat().st_size


# Conversion


NT_V1, GENEFORMER = PORTABLE / "nt-v1-basic", PORTABLE / "geneformer-v2-basic"


def published(monkeypatch: pytest.MonkeyPatch, case: Path, model: str, weights: str, *extra: str) -> str:
    """Let a golden checkpoint be the published files of a model, put into the cache by hand."""
    entry = registry().find(model)
    paths = [str(p.relative_to(case / "checkpoint")) for p in sorted((case / "checkpoint").rglob("*")) if p.is_file()]
    config = json.loads((case / "checkpoint/config.json").read_text())
    files = {path: File(sha256=safe_files.sha256(case / "checkpoint" / path), size=None) for path in paths}
    assert weights in files
    wanted = {k: v for k, v in config.items() if isinstance(v, bool | int | float | str | None)}
    source = Source(hub="lab/tiny")
    update = {"files": files, "config": wanted, "source": source, "revision": "c" * 40}
    checkpoint = entry.checkpoint.model_copy(update=update)
    tiny = Entry("tiny", entry.card, checkpoint)
    own = registry()
    changed = Registry(own.cards, own.checkpoints | {"tiny": tiny}, own.names | {"tiny": "tiny"})
    for module in ("registry", "api"):
        monkeypatch.setattr(f"cellfm_hub.{module}.registry", lambda: changed)
    for path in paths:
        place = cf.settings.cache_dir / "models" / "tiny" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((case / "checkpoint" / path).read_bytes())
    return "tiny"


def test_conversion_after_the_first_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch file is kept as safetensors; the next load reads that, with the same vectors and the receipt of the published file."""
    model = published(monkeypatch, NT_V1, "nt-500m-human-ref", "pytorch_model.bin")
    fasta = NT_V1 / "sequences.fasta"
    first = cf.load(model, device="cpu", precision="float32", options={"case": "as-is"})
    before = first.encode(fasta)
    source = safe_files.sha256(cf.settings.cache_dir / "models/tiny/pytorch_model.bin")
    copy = converted_folder() / f"{source}.safetensors"
    assert copy.is_file()
    assert lock.read().converted[source].sha256 == safe_files.sha256(copy)
    second = cf.load(model, device="cpu", precision="float32", options={"case": "as-is"})
    assert second.files.used["pytorch_model.bin"] == copy
    np.testing.assert_array_equal(second.encode(fasta), before)
    assert first.receipt is not None
    assert second.receipt is not None
    assert second.receipt["weights_sha256"] == first.receipt["weights_sha256"] == source
    Case(NT_V1).assert_close(second.encode(fasta, pooling="mean", output_layer=2), Case(NT_V1).array("expected_mean_layer2.npy"))
    # A copy that was changed is not used.
    body = bytearray(copy.read_bytes())
    body[-1] ^= 1
    copy.write_bytes(bytes(body))
    third = cf.load(model, device="cpu", precision="float32", options={"case": "as-is"})
    assert third.files.used["pytorch_model.bin"].name == "pytorch_model.bin"
    np.testing.assert_array_equal(third.encode(fasta), before)


def test_no_conversion_where_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with the setting off, nor of a user's own folder."""
    model = published(monkeypatch, NT_V1, "nt-500m-human-ref", "pytorch_model.bin")
    with cf.settings.override(convert=False):
        cf.load(model, device="cpu")
    cf.load("nt", checkpoint=NT_V1 / "checkpoint", device="cpu")
    assert not converted_folder().exists()


def test_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dictionaries become JSON with the same content, and are read from there."""
    model = published(monkeypatch, GENEFORMER, "geneformer-v2-104m", "model.safetensors")
    # Only published dictionaries are found by the size of the vocabulary.
    monkeypatch.setattr("cellfm_adapters.geneformer.dictionaries._corpus_of", lambda *_: "gc104M")
    copies = convert(model)
    assert sorted(copies) == sorted(path for path in CheckpointFiles(registry_entry()).entry.checkpoint.files if path.endswith(".pkl"))
    for name, copy in copies.items():
        content = safe_files.read_pickled_dict(GENEFORMER / "checkpoint" / name)
        assert json.loads(copy.read_text()) == content == safe_files.read_pickled_dict(copy)
    files = CheckpointFiles(registry_entry())
    name = next(iter(copies))
    assert files.find(name) == copies[name]
    assert convert(model) == copies


def registry_entry() -> Entry:
    from cellfm_hub import api

    return api.registry().find("tiny")


def test_written_tensors(tmp_path: Path) -> None:
    """Tied, strided, empty, scalar and integer tensors survive, and the library's own reader agrees."""
    base = torch.randn(6, 4)
    tensors = {
        "a": base,
        "tied": base,
        "strided": base.T,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 5),
        "ids": torch.arange(7),
        "half": base.half(),
        "bf16": base.bfloat16(),
        "mask": base > 0,
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    safe_files.write_tensors(tmp_path / "t.safetensors", tensors, {"format": "pt"})
    back = load_file(tmp_path / "t.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    with pytest.raises(CheckpointFormatError, match="complex"):
        safe_files.write_tensors(tmp_path / "c.safetensors", {"c": torch.zeros(2, dtype=torch.complex64)}, {})


# Selftest


@pytest.mark.parametrize("model", [name for name, card in registry().cards.items() if card.cellfm.selftests])
def test_selftest(model: str) -> None:
    """Every comparison in float32 is within the tolerance of its case, and half precision within its bound."""
    rows = run_selftest(model, device="cpu")
    assert all(row.passed for row in rows)
    assert {row.precision for row in rows} == {"float32", "bfloat16"}
    assert all("ok" in row.line() for row in rows)


def test_selftest_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number fails."""
    from cellfm_hub.embedder import Embedder

    encode = Embedder.encode
    monkeypatch.setattr(Embedder, "encode", lambda self, *a, **k: encode(self, *a, **k) + np.float32(1e-3))
    rows = run_selftest("nt", device="cpu", precisions=["float32"])
    assert all(row.passed is False for row in rows)
    assert "FAILS" in rows[0].line()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize(("turned_by", "passed"), [(3, True), (12, False), (90, False), (180, False)])
def test_selftest_notices_in_half_precision(turned_by: float, passed: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that are turned by more than rounding does fail: what a GPU user relies on."""
    from cellfm_hub.embedder import Embedder

    encode, rng = Embedder.encode, np.random.default_rng(0)

    def turned(self: Embedder, *given: Any, **named: Any) -> np.ndarray:
        vectors = encode(self, *given, **named)
        other = rng.normal(size=vectors.shape)
        other -= vectors * (other * vectors).sum(-1, keepdims=True) / (vectors**2).sum(-1, keepdims=True)  # at right angles
        other *= np.linalg.norm(vectors, axis=-1, keepdims=True) / np.linalg.norm(other, axis=-1, keepdims=True)
        angle = np.deg2rad(turned_by)
        return (np.cos(angle) * vectors + np.sin(angle) * other).astype(np.float32)

    monkeypatch.setattr(Embedder, "encode", turned)
    rows = run_selftest("nt", device="cpu", precisions=[precision])
    assert rows
    assert all(row.passed is passed for row in rows), "\n".join(row.line() for row in rows)
    assert all(("FAILS" in row.line()) is not passed for row in rows)


def test_selftest_of_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where published weights are here, their recorded vectors are compared too."""
    published(monkeypatch, NT_V1, "nt-500m-human-ref", "pytorch_model.bin")
    from cellfm_hub import api, selftest
    from cellfm_hub.cards import Recorded

    monkeypatch.setattr(selftest, "registry", api.registry)
    vector = cf.load("tiny", device="cpu", precision="float32").encode(["ACGTTGCATT"], pooling="mean")[0, :8]
    entry = registry_entry()
    for change, passed in ((0.0, True), (0.01, False)):
        recorded = Recorded(checkpoint="tiny", sequence="ACGTTGCATT", pooling="mean", first=tuple((vector + change).tolist()))
        (row,) = selftest._run_recorded(entry, [recorded], "cpu")
        assert row.passed is passed
    assert selftest._run_recorded(registry().find("nt-v2-50m-multi-species"), [recorded], "cpu") == []


def test_selftest_without_cases() -> None:
    with pytest.raises(InputError, match="geneformer"):
        run_selftest("pca")


# Malicious files


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


class Custom:
    """A class of the file's author."""

    def __init__(self) -> None:
        self.weight = torch.zeros(2)


def refused(path: Path, read: Any, *fragments: str, canary: Path | None = None) -> None:
    with pytest.raises(CheckpointFormatError) as caught:
        read(path)
    message = str(caught.value)
    for fragment in (str(path), *fragments):
        assert fragment in message
    assert "\n" not in message
    if canary is not None:
        assert not canary.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_that_runs_code(tmp_path: Path, canary: Path, protocol: int) -> None:
    path = tmp_path / "token_dictionary.pkl"
    path.write_bytes(pickle.dumps({"gene": 1, "bomb": Bomb(canary)}, protocol=protocol))
    refused(path, safe_files.read_pickled_dict, "system", canary=canary)


def test_pickle_of_builtins(tmp_path: Path, canary: Path) -> None:
    """Functions that every pickle can reach."""
    for opcode in (f"cbuiltins\nexec\n(S'open({str(canary)!r}, \"w\")'\ntR.", f"cbuiltins\neval\n(S'open({str(canary)!r}, \"w\")'\ntR."):
        path = tmp_path / "d.pkl"
        path.write_bytes(opcode.encode())
        refused(path, safe_files.read_pickled_dict, "builtins.", canary=canary)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path: Path, canary: Path, zipped: bool) -> None:
    """A torch file that runs code, and one with a class of its author."""
    for name, content in (("bomb.pt", {"w": torch.zeros(2), "bomb": Bomb(canary)}), ("custom.pt", {"model": Custom()})):
        path = tmp_path / name
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        refused(path, safe_files.read_tensors, canary=canary)


def test_torch_file_of_other_things(tmp_path: Path) -> None:
    torch.save({"w": [1, 2, 3]}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", safe_files.read_tensors, "not a plain mapping")
    torch.save(OrderedDict(w=torch.zeros(2)), tmp_path / "y.bin")
    assert set(safe_files.read_tensors(tmp_path / "y.bin")) == {"w"}


def lying(header: dict[str, Any], body: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


@pytest.mark.parametrize(
    "content",
    [
        lying({"w": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}}, b"\0" * 16),
        lying({"w": {"dtype": "F32", "shape": [100], "data_offsets": [0, 16]}}, b"\0" * 16),
        lying({"w": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, b"\0" * 16),
        lying(
            {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "v": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
            b"\0" * 24,
        ),
        lying({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16, length=2**40),
        lying({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}, b"\0" * 16),
        lying({"w": {"dtype": "code", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
        b"\x08",
    ],
    ids=["beyond the end", "shape", "negative", "overlap", "header length", "overflow", "dtype", "short"],
)
def test_safetensors_with_a_lying_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, safe_files.read_tensors, "cannot be read as a file of tensors")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("name", ["../canary", "a/../../canary", "ABSOLUTE", "..\\canary", "C:\\canary"])
def test_archives_that_reach_outside(tmp_path: Path, canary: Path, kind: str, name: str) -> None:
    """The whole archive is refused, also where another member is asked for; nothing is unpacked."""
    name = str(canary) if name == "ABSOLUTE" else name
    path, target = tmp_path / f"x.{kind}", tmp_path / "inner" / "good.txt"
    write_archive(path, kind, {"good.txt": b"good", name: b"bad"})
    for wanted in ("good.txt", "canary"):
        refused(path, lambda p, w=wanted: safe_files.extract(p, w, target), "outside its own folder", "nothing was unpacked", canary=canary)
    assert not target.parent.exists()


def write_archive(path: Path, kind: str, members: dict[str, bytes]) -> None:
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, body in members.items():
                file.writestr(zipfile.ZipInfo(name), body)
        return
    with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
        for name, body in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_archives_with_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("good.txt")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    refused(path, safe_files.archive_members, "link or a device")


def test_archives(tmp_path: Path) -> None:
    """Members by path or base name; what stands twice or not at all is an error."""
    for kind in ("tar", "tar.gz", "zip"):
        path = tmp_path / f"x.{kind}"
        write_archive(path, kind, {"a/one.txt": b"1", "a/two.txt": b"22", "b/two.txt": b"222"})
        assert safe_files.archive_members(path) == {"a/one.txt": 1, "a/two.txt": 2, "b/two.txt": 3}
        safe_files.extract(path, "elsewhere/one.txt", tmp_path / kind / "one.txt")
        assert (tmp_path / kind / "one.txt").read_bytes() == b"1"
        safe_files.extract(path, "b/two.txt", tmp_path / kind / "two.txt")
        assert (tmp_path / kind / "two.txt").read_bytes() == b"222"
        refused(path, lambda p: safe_files.extract(p, "c/two.txt", tmp_path / "t"), "2 files called two.txt")
        refused(path, lambda p: safe_files.extract(p, "three.txt", tmp_path / "t"), "0 files called three.txt")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"[1, 2]", "expected an object"),
        (b'{"A1BG": 0, "A1CF"', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"<html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"", "empty"),
    ],
)
def test_json(tmp_path: Path, content: bytes, fragment: str) -> None:
    (tmp_path / "vocab.json").write_bytes(content)
    refused(tmp_path / "vocab.json", safe_files.read_json_object, fragment)


@pytest.mark.parametrize("content", [{"gene": [1]}, {"gene": None}, {"gene": {"a": 1}}])
def test_vocabulary_of_wrong_types(tmp_path: Path, content: dict[str, Any]) -> None:
    """In JSON as in a pickle."""
    (tmp_path / "d.json").write_text(json.dumps(content))
    refused(tmp_path / "d.json", safe_files.read_pickled_dict, "expected str to str or number")
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(content))
    refused(tmp_path / "d.pkl", safe_files.read_pickled_dict, "expected str to str or number")


def test_files_of_absurd_size(tmp_path: Path) -> None:
    """Sparse files: nothing of them is read."""
    for name, read in (("d.pkl", safe_files.read_pickled_dict), ("v.json", safe_files.read_json)):
        with (tmp_path / name).open("wb") as file:
            file.write(b"{")
            file.truncate(2**33)
        refused(tmp_path / name, read, "8,589,934,592 bytes")


@pytest.mark.parametrize("shard", ["../other.bin", "/etc/passwd", 3])
def test_index_that_reaches_outside(tmp_path: Path, shard: object) -> None:
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": {"w": shard}}))
    refused(path, safe_files.read_tensors)


# Cards


@pytest.mark.parametrize("url", ["http://example.org/x", "file:///etc/passwd", "ftp://example.org/x"])
def test_addresses_in_cards(url: str) -> None:
    with pytest.raises(ValueError, match="https"):
        File(sha256=None, size=None, url=url)
    with pytest.raises(ValueError, match="https"):
        Mirror(url=url)


def test_mirrors_in_cards() -> None:
    for wrong in ({}, {"hub": "a/b"}, {"hub": "a/b", "revision": "c" * 40, "url": "https://x.org"}):
        with pytest.raises(ValueError, match="a mirror is"):
            Mirror(**wrong)


def test_remembered_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file is read once for its hash, in all processes, while it does not change."""
    monkeypatch.setattr(safe_files, "_LARGE", 10)
    path = tmp_path / "big"
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(10**18, 10**18))
    first = safe_files.sha256(path)
    assert json.loads((cf.settings.cache_dir / "hashes.json").read_text()) == {str(path): [100, 10**18, first]}
    safe_files._hashes.clear()
    monkeypatch.setattr(safe_files.hashlib, "file_digest", None)
    assert safe_files.sha256(path) == first
    monkeypatch.undo()
    path.write_bytes(b"y" * 100)
    assert safe_files.sha256(path) != first
    # Same size and time, other content: only a fresh look sees it, which is what `pull` takes.
    safe_files._hashes[str(path)] = [100, path.stat().st_mtime_ns, first]
    assert safe_files.sha256(path, fresh=True) != first


# Lint


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import pickle", "unpickling runs code"),
        ("import torch\n\ntorch.load('x')", "cellfm_hub.safe_files.read_tensors"),
        ("import torch\n\ntorch.hub.load('x', 'y')", "no remote code"),
        ("from transformers import AutoModel", "trust_remote_code"),
        ("eval('1')", "S307"),
        ("exec('1')", "S102"),
        ("import dill", "unpickling runs code"),
        ("import pandas\n\npandas.read_pickle('x')", "unpickling runs code"),
    ],
)
def test_banned(code: str, reason: str) -> None:
    """The lint rules refuse what could run somebody else's code, and say why."""
    ruff = shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff")
    root = Path(__file__).parents[1]
    command = [ruff, "check", "--no-cache", "--stdin-filename", str(root / "src/cellfm_hub/probe.py"), "-"]
    done = subprocess.run(command, cwd=root, input=code, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert reason in done.stdout


def test_no_remote_code() -> None:
    """No file that is shipped switches remote code on."""
    root = Path(__file__).parents[1]
    sources = [*(root / "src").rglob("*.py"), *(root / "adapters").rglob("*.py")]
    assert sources
    assert [path for path in sources if "trust_remote_code" in path.read_text(encoding="utf-8")] == []


def test_weights_table() -> None:
    """Every family with weights has a row; licences and sizes are those of the cards."""
    table = weights_table()
    families = {entry.family for entry in registry().checkpoints.values() if entry.checkpoint.source is not None}
    assert {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]} == families
    assert "Hugging Face `ctheodoris/Geneformer`" in table
    assert "cc-by-nc-sa-4.0 | no" in table
