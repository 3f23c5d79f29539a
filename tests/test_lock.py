"""``cellfm.lock``: a hash that was recorded is never changed by what somebody else says, and never in silence."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

import cellfm_hub as cf
from cellfm_hub import cache, downloads, lock
from cellfm_hub.cards import File, Source
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.errors import CheckpointError, CheckpointFormatError, ChecksumError, InputError, OutputError
from cellfm_hub.genes import history
from cellfm_hub.registry import Entry, Registry, registry
from golden_cases import PORTABLE

FOLDER = PORTABLE / "nt-v2-basic/checkpoint"
NAMES = ("config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt")
REVISION = "d" * 40


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


TRUE = {name: sha((FOLDER / name).read_bytes()) for name in NAMES}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Register models whose files are those of the golden checkpoint; without hashes, as many cards are."""

    def make(*models: str, hashes: dict[str, str | None] | None = None) -> None:
        own = registry()
        like = own.find("nt-v2-50m-multi-species")
        files = {name: File(sha256=(hashes or {}).get(name), size=None) for name in NAMES}
        config = {
            k: v for k, v in json.loads((FOLDER / "config.json").read_text()).items() if isinstance(v, bool | int | float | str | None)
        }
        update = {"files": files, "config": config, "source": Source(hub="lab/tiny"), "revision": "c" * 40}
        entries = {name: Entry(name, like.card, like.checkpoint.model_copy(update=update)) for name in models}
        changed = Registry(own.cards, own.checkpoints | entries, own.names | {name: name for name in models})
        for module in ("api", "cache"):
            monkeypatch.setattr(f"cellfm_hub.{module}.registry", lambda: changed)

    make("tiny")
    return make


def locked(name: str, hashes: dict[str, str], licence: str | None = None) -> dict[str, lock.LockedModel]:
    files = {path: lock.LockedFile(sha256=digest, size=(FOLDER / path).stat().st_size, origin="test") for path, digest in hashes.items()}
    return {name: lock.LockedModel(licence=licence, files=files)}


def recorded(name: str = "tiny") -> dict[str, str]:
    return {path: file.sha256 for path, file in lock.read().models.get(name, lock.LockedModel()).files.items()}


def archive(path: Path, models: dict[str, lock.LockedModel], members: dict[str, bytes], **more: Any) -> Path:
    """Write an archive as ``bundle`` does, with any lock."""
    content = json.dumps(lock.Lock(models=models).model_dump() | more).encode()
    with tarfile.open(path, "w") as tar:
        for name, body in {lock.NAME: content, **members}.items():
            header = tarfile.TarInfo(name)
            header.size = len(body)
            tar.addfile(header, io.BytesIO(body))
    return path


def everything(name: str = "tiny") -> dict[str, bytes]:
    return {f"models/{name}/{path}": (FOLDER / path).read_bytes() for path in NAMES}


def test_a_lock_alone_changes_nothing(make: Any, tmp_path: Path) -> None:
    """The claim of an archive without the files is no reason to forget what was seen here, nor to believe it."""
    lock.update(locked("tiny", TRUE))
    before = lock.path().read_bytes()
    for claimed in (dict.fromkeys(NAMES, "0" * 64), TRUE):
        with pytest.raises(CheckpointError) as caught:
            cache.unbundle(archive(tmp_path / "x.tar", locked("tiny", claimed), {}))
        assert "\n" not in str(caught.value)
        assert lock.path().read_bytes() == before
    lock.path().unlink()
    with pytest.raises(CheckpointError, match="holds no file"):
        cache.unbundle(archive(tmp_path / "x.tar", locked("tiny", dict.fromkeys(NAMES, "0" * 64)), {}))
    assert not recorded()


@pytest.mark.parametrize("by_card", [True, False])
def test_contradictions_are_refused(make: Any, tmp_path: Path, *, by_card: bool) -> None:
    """One false hash beside true files: both hashes are named, nothing is unpacked, nothing recorded."""
    if by_card:
        make("tiny", hashes=dict(TRUE))
    else:
        lock.update(locked("tiny", {"vocab.txt": TRUE["vocab.txt"]}))
    before = recorded()
    other = (FOLDER / "vocab.txt").read_bytes()[::-1]
    for members in (everything() | {"models/tiny/vocab.txt": other}, {k: v for k, v in everything().items() if "vocab" not in k}):
        with pytest.raises(ChecksumError) as caught:
            cache.unbundle(archive(tmp_path / "x.tar", locked("tiny", TRUE | {"vocab.txt": sha(other)}), members))
        for fragment in (
            TRUE["vocab.txt"],
            sha(other),
            "the model card lists" if by_card else str(lock.path()),
            "cellfm cache --delete tiny",
        ):
            assert fragment in str(caught.value)
        assert recorded() == before
        assert not CheckpointFiles(cache.registry().find("tiny")).cache.exists()


def test_only_what_was_unpacked_is_recorded(make: Any, tmp_path: Path) -> None:
    """Of two models with files for one; of a model with files for some; the licence was shown to somebody else."""
    make("tiny", "other")
    members = {name: body for name, body in everything().items() if "vocab" not in name}
    path = archive(tmp_path / "x.tar", locked("tiny", TRUE, "mit"), members)
    assert cache.unbundle(path) == ["tiny"]
    assert recorded() == {name: digest for name, digest in TRUE.items() if name != "vocab.txt"}
    assert lock.read().models["tiny"].licence is None
    with pytest.raises(CheckpointError, match="names other but holds no file of it"):
        cache.unbundle(archive(tmp_path / "x.tar", locked("tiny", TRUE) | locked("other", TRUE), everything()))
    assert not recorded("other")
    assert cache.unbundle(archive(tmp_path / "x.tar", locked("tiny", TRUE), everything())) == ["tiny"]
    assert recorded() == TRUE


@pytest.mark.parametrize("name", ["TINY", "nt", "genes", f"tiny@{REVISION}", "demo-dna"])
def test_names_are_exact(make: Any, tmp_path: Path, name: str) -> None:
    """Another spelling, a family, a revision, the gene tables or a shipped model: no entry of the lock comes from an archive."""
    with pytest.raises(CheckpointError, match="no card describes"):
        cache.unbundle(archive(tmp_path / "x.tar", locked(name, TRUE), everything(name)))
    assert lock.read() == lock.Lock()


@pytest.mark.parametrize("kind", ["case", "twice", "folder", "another model", "sparse", "link", "device"])
def test_members(make: Any, tmp_path: Path, kind: str) -> None:
    """What is not exactly the published files is refused before anything is unpacked."""
    members = everything()
    if kind == "case":
        members["models/tiny/VOCAB.txt"] = b"x"
    if kind == "another model":
        members["models/nt-v2-50m-multi-species/vocab.txt"] = b"x"
    path = archive(tmp_path / "x.tar", locked("tiny", TRUE), members)
    with tarfile.open(path, "a") as tar:
        header = tarfile.TarInfo("models/tiny/vocab.txt")
        if kind == "twice":
            header.size = 1
            tar.addfile(header, io.BytesIO(b"x"))
        elif kind in ("sparse", "link", "device"):
            header.type = {"sparse": tarfile.GNUTYPE_SPARSE, "link": tarfile.LNKTYPE, "device": tarfile.BLKTYPE}[kind]
            header.linkname, header.name = "/etc/passwd", "models/tiny/more.txt"
            tar.addfile(header)
        elif kind == "folder":
            header.name, header.type = "models/tiny/vocab.txt/../../../../canary", tarfile.DIRTYPE
            tar.addfile(header)
    with pytest.raises(CheckpointError):
        cache.unbundle(path)
    assert lock.read() == lock.Lock()
    assert not (cf.settings.cache_dir / "models").exists()


def test_after_a_kill_and_a_full_disk(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was unpacked before is kept and recorded; the half file of the attempt that died is overwritten, then gone."""
    path = archive(tmp_path / "x.tar", locked("tiny", TRUE), everything())
    place = CheckpointFiles(cache.registry().find("tiny")).cache
    copy, done = shutil.copyfileobj, []

    def break_off(source: Any, file: Any, length: int) -> None:
        if len(done) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        done.append(file.name)
        copy(source, file, length)

    monkeypatch.setattr(shutil, "copyfileobj", break_off)
    with pytest.raises(OutputError, match="No space left"):
        cache.unbundle(path)
    monkeypatch.setattr(shutil, "copyfileobj", copy)
    assert sorted(recorded()) == sorted(p.name for p in place.iterdir()) == list(NAMES[:2])
    (place / f".{NAMES[2]}.unchecked").write_bytes(b"half of a process that was killed")
    assert cache.unbundle(path) == ["tiny"]
    assert sorted(p.name for p in place.iterdir()) == list(NAMES)
    assert recorded() == TRUE


def test_bundle_claims_what_it_holds(make: Any, tmp_path: Path) -> None:
    """A file that was used once and is gone is not in the archive, nor in its lock."""
    place = CheckpointFiles(cache.registry().find("tiny")).cache
    shutil.copytree(FOLDER, place)
    lock.update({"tiny": lock.LockedModel(files={"gone.txt": lock.LockedFile(sha256="0" * 64, size=1, origin="x")})})
    cache.bundle(["tiny"], tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as tar:
        content = tar.extractfile(lock.NAME)
        assert content is not None
        assert sorted(json.loads(content.read())["models"]["tiny"]["files"]) == list(NAMES)
    shutil.rmtree(cf.settings.cache_dir)
    assert cache.unbundle(tmp_path / "x.tar") == ["tiny"]


def test_add(make: Any, tmp_path: Path) -> None:
    """A folder never stands for other files that are in the cache; a refused one leaves every revision's record as it was."""
    lock.update(locked(f"tiny@{REVISION}", TRUE, "mit"))
    folder = Path(shutil.copytree(FOLDER, tmp_path / "folder"))
    place = CheckpointFiles(cache.registry().find("tiny")).cache
    place.mkdir(parents=True)
    (place / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ChecksumError) as caught:
        cache.add("tiny", folder)
    assert sha(b"{}") in str(caught.value)
    assert TRUE["tokenizer_config.json"] in str(caught.value)
    assert not recorded()
    (place / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text("{}")
    before = lock.read()
    with pytest.raises(CheckpointFormatError):
        cache.add("tiny", folder)
    assert lock.read() == before
    (folder / "config.json").write_bytes((FOLDER / "config.json").read_bytes())
    cache.add("tiny", folder)
    assert recorded() == TRUE
    assert recorded(f"tiny@{REVISION}") == TRUE


def test_two_processes_see_different_files(make: Any) -> None:
    """The second to write does not win: it is told."""
    lock.update(locked("tiny", {"vocab.txt": TRUE["vocab.txt"]}))
    with pytest.raises(ChecksumError) as caught:
        lock.update(locked("tiny", {"config.json": TRUE["config.json"], "vocab.txt": "0" * 64}))
    assert "0" * 64 in str(caught.value)
    assert TRUE["vocab.txt"] in str(caught.value)
    assert recorded() == {"vocab.txt": TRUE["vocab.txt"]}
    lock.update(locked("tiny", {"config.json": TRUE["config.json"]}))
    assert sorted(recorded()) == ["config.json", "vocab.txt"]


def test_a_newer_card_is_said(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The card of a new version lists another file than was recorded: it is taken, and both hashes are said."""
    make("tiny", hashes=dict(TRUE))
    shutil.copytree(FOLDER, CheckpointFiles(cache.registry().find("tiny")).cache)
    lock.update(locked("tiny", {"vocab.txt": "0" * 64}, "cc-by-nc-sa-4.0"))
    CheckpointFiles(cache.registry().find("tiny")).bring_all()
    assert recorded() == TRUE
    assert TRUE["vocab.txt"] in caplog.text
    assert "0" * 64 in caplog.text


def test_gene_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that was fetched before and is gone is not replaced by a newer one unasked."""
    content = [b"old"]

    def fetch(_: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content[0])

    monkeypatch.setattr(downloads, "fetch_from_url", fetch)
    monkeypatch.setattr(history, "_check", lambda _: None)
    monkeypatch.setattr(type(cf.settings), "offline", property(lambda _: False), raising=False)
    target = history.fetch_history()
    target.unlink()
    content[0] = b"new"
    with pytest.raises(ChecksumError) as caught:
        history.fetch_history()
    assert sha(b"old") in str(caught.value)
    assert sha(b"new") in str(caught.value)
    assert not list(target.parent.iterdir())
    assert history.fetch_history(renew=True).read_bytes() == b"new"
    assert recorded("genes") == {history.FILE: sha(b"new")}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not a lock file"),
        (b'{"models": {"tiny": {"fil', "is not a lock file"),
        (b"\xff\xfe{}", "is not a lock file"),
        (b"[" * 100_000, "is not a lock file"),
        (b'{"version": 1' + b"0" * 5000 + b"}", "is not a lock file"),
        (b'{"version": 2, "models": {}, "signatures": []}', "newer cellfm-hub"),
        (b'{"models": {"tiny": {"files": {"../x": {"sha256": "' + b"0" * 64 + b'", "size": 1, "origin": ""}}}}}', "is not a lock file"),
        (None, "more than 16,777,216 bytes"),
    ],
    ids=["empty", "cut", "not utf-8", "deep", "long number", "newer", "climbs", "huge"],
)
def test_damaged_locks(make: Any, content: bytes | None, says: str) -> None:
    """One line, and the file is left as it is."""
    lock.path().parent.mkdir(parents=True, exist_ok=True)
    with lock.path().open("wb") as file:
        file.write(b"{" if content is None else content)
        if content is None:
            file.truncate(2**40)
    for action in (lock.read, lambda: lock.update(locked("tiny", TRUE)), lambda: lock.forget("tiny")):
        with pytest.raises(CheckpointFormatError) as caught:
            action()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000
    assert lock.path().stat().st_size == (2**40 if content is None else len(content))


def test_unreadable_lock(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.update(locked("tiny", TRUE))
    if os.geteuid() == 0:
        monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    else:
        lock.path().chmod(0)
    with pytest.raises(CheckpointFormatError, match="Permission denied"):
        lock.update(locked("tiny", {"vocab.txt": "0" * 64}))


def test_not_an_archive(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        cache.unbundle(tmp_path / "none.tar")
