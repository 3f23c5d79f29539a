"""Weights: fetched once, verified, at home offline. A server on 127.0.0.1 plays the hub and a plain host."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from golden_cases import PORTABLE
from weights_server import HTML, POINTER, Behaviour, Server, serve

NT = PORTABLE / "nt-v2-basic" / "checkpoint"
NAMES = ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json")
CARD = yaml.safe_load((Path(__file__).parents[1] / "model_cards/nucleotide-transformer.md").read_text().split("---\n")[1])
MODEL = "tiny-nt"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def snapshot(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a cache that holds contents; locks and notes are the cache's own business."""
    own = {"cellfm.lock", "hashes.json", "CACHEDIR.TAG", ".no_exist"}
    return {
        str(path.relative_to(folder)): sha(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in own and ".lock" not in path.suffix and "locks" not in str(path)
    }


@dataclass
class Place:
    """A user's machine: cards, a cellfm cache, a hub cache, and the server."""

    root: Path
    server: Server
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.root / "cellfm"

    @property
    def hub(self) -> Path:
        return self.root / "hf"

    @property
    def lock(self) -> dict[str, Any]:
        return json.loads((self.cache / "cellfm.lock").read_text())

    def folder(self, name: str = MODEL) -> Path:
        return self.cache / "models" / name

    def card(
        self, kind: str, *, hashes: bool = True, sizes: bool = True, name: str = MODEL, names: tuple[str, ...] = NAMES, **more: Any
    ) -> None:
        """Write the card of a model whose files are those of the golden checkpoint, published on the hub or on a plain host."""
        contents = {path: (NT / path).read_bytes() for path in names}
        files: dict[str, Any] = {
            path: {"sha256": sha(body) if hashes else None, "size": len(body) if sizes else None} for path, body in contents.items()
        }
        source: dict[str, Any] = {"hub": "lab/tiny"} if kind == "hub" else {"url": more.pop("page", "https://example.org/tiny")}
        if kind == "url":
            files = {path: facts | {"url": f"{self.server.url}/plain/{path}"} for path, facts in files.items()}
        files |= more.pop("files", {})
        self.server.files |= {f"lab/tiny/{path}": body for path, body in contents.items()}
        self.server.files |= {f"plain/{path}": body for path, body in contents.items()}
        self.server.files |= {f"mirror/{path}": body for path, body in contents.items()}
        checkpoint = {
            "description": "test",
            "default": True,
            "source": source | {"mirrors": more.pop("mirrors", [])},
            "revision": self.server.commit if kind == "hub" else None,
            "files": files,
            "config": json.loads((NT / "config.json").read_text()),
            "parameters": None,
            "embedding_dim": 32,
            "layers": 2,
            "max_tokens": 256,
            "commercial_use": more.pop("commercial_use", True),
        }
        checkpoint["config"] = {k: v for k, v in checkpoint["config"].items() if isinstance(v, bool | int | float | str | None)}
        family = CARD["cellfm"] | {"checkpoints": {name: checkpoint}, "aliases": [], "title": name}
        card = {"license": "mit", "library_name": "cellfm-hub", "pipeline_tag": "feature-extraction", "cellfm": family}
        cards = self.root / "cards"
        cards.mkdir(exist_ok=True)
        (cards / f"{name}-family.md").write_text(f"---\n{yaml.safe_dump(card)}---\ntext\n")

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("weights_cli.py")), str(self.root / "cards"), *map(str, arguments)]

    def env(self, **more: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "CELLFM_"))}
        own = {"CELLFM_CACHE": str(self.cache), "HF_HOME": str(self.hub), "HF_ENDPOINT": self.server.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        return inherited | own | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "COLUMNS": "200"} | self.environment | more

    def run(self, *arguments: object, options: dict[str, Any] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.env(**env), capture_output=True, text=True, check=False, timeout=120, **(options or {})
        )

    def good(self, *arguments: object, **env: str) -> str:
        done = self.run(*arguments, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def bad(self, *arguments: object, options: dict[str, Any] | None = None, **env: str) -> str:
        """Run a command that fails; return its one line of error."""
        done = self.run(*arguments, options=options, **env)
        assert done.returncode == 1, done.stdout + done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("cellfm: error: ")]
        assert len(errors) == 1, done.stderr
        assert "Traceback" not in done.stderr
        return errors[0]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with serve() as server:
        yield Place(tmp_path, server)


KINDS = ("hub", "url")


def served(kind: str, name: str) -> str:
    return f"lab/tiny/{name}" if kind == "hub" else f"plain/{name}"


# Pull


@pytest.mark.parametrize("kind", KINDS)
def test_pull(place: Place, kind: str) -> None:
    """Files come once, their hashes are written down, and the model then works without a socket."""
    place.card(kind)
    out = place.good("pull", MODEL)
    assert "4 files" in out
    assert "4 match the hash in the card" in out
    assert "licensed mit (commercial use is allowed)" in out
    locked = place.lock["models"][MODEL]["files"]
    assert {path: entry["sha256"] for path, entry in locked.items()} == {path: sha((NT / path).read_bytes()) for path in NAMES}
    assert all(("lab/tiny@" if kind == "hub" else place.server.url) in entry["origin"] for entry in locked.values())
    asked = len(place.server.requests)
    again = place.good("pull", MODEL, "--no-sockets")
    assert "licensed" not in again
    assert len(place.server.requests) == asked
    done = place.good("embed", fasta(place), "-m", MODEL, "-o", place.root / "out.npy", "--device", "cpu", "--no-sockets")
    assert "16 sequences" in done
    assert len(place.server.requests) == asked


def fasta(place: Place) -> Path:
    return Path(shutil.copy(NT.parent / "sequences.fasta", place.root / "dna.fa"))


def test_first_use_fetches(place: Place) -> None:
    """No pull is needed: embed brings what it reads."""
    place.card("hub")
    assert "16 sequences" in place.good("embed", fasta(place), "-m", MODEL, "-o", place.root / "out.npy", "--device", "cpu")
    assert place.server.bodies("model.safetensors") == [""]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("behaviour", "fragments"),
    [
        (Behaviour(status=404), ("HTTP 404",)),
        (Behaviour(status=403, html_status=True), ("HTTP 403",)),
        (Behaviour(body=HTML), ("it is a web page ('Just a moment...')", "expected", "rejected-")),
        (Behaviour(body=POINTER), ("Git LFS pointer of", "expected", "rejected-")),
        (Behaviour(body=b"something else" * 30000), ("another version", "expected", "rejected-")),
    ],
    ids=["404", "403", "web page", "pointer", "other"],
)
def test_bad_answers(place: Place, kind: str, behaviour: Behaviour, fragments: tuple[str, ...]) -> None:
    """The error says what came; the other files stay as they are; the bad one is kept aside, and a good one can be fetched then."""
    place.card(kind)
    place.server.behaviour[served(kind, "model.safetensors")] = Behaviour(status=404)
    place.bad("pull", MODEL)  # brings config.json, the first of the files
    before = snapshot(place.root)
    assert any("config.json" in path for path in before)
    place.server.behaviour[served(kind, "model.safetensors")] = behaviour
    error = place.bad("pull", MODEL)
    for fragment in ("model.safetensors", MODEL, *fragments):
        assert fragment in error
    if behaviour.status == 200:
        assert sha((NT / "model.safetensors").read_bytes()) in error
        assert behaviour.body is not None
        assert sha(behaviour.body) in error
    after = snapshot(place.root)
    assert before.items() <= after.items()
    kept = [path for path in after if "rejected-" in path]
    assert len(kept) == (behaviour.status == 200)
    place.server.behaviour.clear()
    assert "4 match" in place.good("pull", MODEL)
    assert after.items() <= snapshot(place.root).items()


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_only(place: Place, kind: str) -> None:
    """Where the card knows a size alone, the size is checked, and the hash that was seen holds from then on."""
    place.card(kind, hashes=False)
    place.server.behaviour[served(kind, "model.safetensors")] = Behaviour(body=b"\0" * 1000)
    error = place.bad("pull", MODEL)
    size = f"{(NT / 'model.safetensors').stat().st_size:,}"
    assert f"1,000 bytes, expected {size}" in error
    assert f"cut short: 1,000 of {size} bytes" in error
    place.server.behaviour.clear()
    assert "0 match the hash in the card, 4 the one in cellfm.lock" in place.good("pull", MODEL)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_after_lock(place: Place, kind: str) -> None:
    """Trust on first use: a file that later comes with another hash is refused, whoever serves it."""
    place.card(kind, hashes=False, sizes=False)
    place.good("pull", MODEL)
    first = place.lock["models"][MODEL]["files"]["vocab.txt"]["sha256"]
    shutil.rmtree(place.folder(), ignore_errors=True)
    shutil.rmtree(place.hub, ignore_errors=True)
    changed = place.server.files[served(kind, "vocab.txt")].replace(b"AAAAAA", b"AAAAAC")
    place.server.behaviour[served(kind, "vocab.txt")] = Behaviour(body=changed)
    error = place.bad("pull", MODEL)
    for fragment in ("vocab.txt", sha(changed), first, "cellfm.lock", "when it was first used", "rejected-"):
        assert fragment in error
    assert place.lock["models"][MODEL]["files"]["vocab.txt"]["sha256"] == first


def test_changed_on_disk(place: Place) -> None:
    """A cached file that was changed behind our back is noticed at the next use."""
    place.card("url")
    place.good("pull", MODEL)
    weights = place.folder() / "model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(bytes(body))
    error = place.bad("embed", fasta(place), "-m", MODEL, "-o", place.root / "out.npy", "--device", "cpu")
    assert "was changed or damaged" in error
    assert (aside := place.folder() / f"model.safetensors.rejected-{sha(bytes(body))[:8]}").read_bytes() == bytes(body)
    assert str(aside) in error


@pytest.mark.parametrize("kind", KINDS)
def test_broken_connection(place: Place, kind: str) -> None:
    """A body that breaks off is continued where it ended, not begun again."""
    body = os.urandom(2**20) * 24
    big = {"sha256": sha(body), "size": len(body)} | ({"url": f"{place.server.url}/plain/big.bin"} if kind == "url" else {})
    place.card(kind, files={"big.bin": big})
    place.server.files[served(kind, "big.bin")] = body
    place.server.behaviour[served(kind, "big.bin")] = Behaviour(cut=15_000_000)
    assert "5 match" in place.good("pull", MODEL)
    first, *later = place.server.bodies("big.bin")
    assert first == ""
    assert all(0 < int(asked.removeprefix("bytes=").removesuffix("-")) <= 15_000_000 for asked in later)
    assert later


def test_continued_by_a_later_call(place: Place) -> None:
    """What came of a broken download is kept, and the next call asks for the rest only; unless the file has changed meanwhile."""
    place.card("url")
    name = served("url", "model.safetensors")
    good = place.server.files[name]
    folder = place.folder()
    folder.mkdir(parents=True)
    for mark, expected_ranges in ((sha(good), 1), ("0" * 64, 2)):
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors.part").write_bytes(good[:40_000])
        (folder / "model.safetensors.part.etag").write_text(f'"{mark}"')
        place.server.requests.clear()
        place.good("pull", MODEL)
        assert place.server.bodies("model.safetensors") == ["bytes=40000-"], expected_ranges
        assert (folder / "model.safetensors").read_bytes() == good
        assert not list(folder.glob("*.part*"))


def test_server_without_ranges(place: Place) -> None:
    """A server that sends the whole file again does not spoil it."""
    place.card("url")
    place.server.behaviour[served("url", "model.safetensors")] = Behaviour(cut=50_000, ranges=False)
    place.good("pull", MODEL)
    assert (place.folder() / "model.safetensors").read_bytes() == (NT / "model.safetensors").read_bytes()


def test_connection_that_never_holds(place: Place) -> None:
    """After some attempts without progress there is an error; what came is kept."""
    place.card("url")
    place.server.behaviour[served("url", "model.safetensors")] = Behaviour(cut=0, always_cut=True)
    error = place.bad("pull", MODEL)
    assert "keeps breaking" in error
    assert "try again to continue" in error


@pytest.mark.parametrize("kind", KINDS)
def test_slow_server(place: Place, kind: str) -> None:
    """Slow is not broken."""
    place.card(kind)
    place.server.behaviour[served(kind, "model.safetensors")] = Behaviour(delay=0.3)
    begin = time.monotonic()
    place.good("pull", MODEL)
    assert time.monotonic() - begin > 2


def test_silent_server(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends nothing is given up."""
    from cellfm_hub import downloads

    monkeypatch.setattr(downloads, "TIMEOUT", (1.0, 0.2))
    place.card("url")
    place.server.behaviour["plain/model.safetensors"] = Behaviour(stall=2)
    with pytest.raises(downloads.DownloadError, match="sent nothing for"):
        downloads.fetch_from_url(f"{place.server.url}/plain/model.safetensors", place.root / "x" / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(place: Place, kind: str) -> None:
    """Two processes on one cache: both get the right files, each file comes once."""
    place.card(kind)
    for name in NAMES:
        place.server.behaviour[served(kind, name)] = Behaviour(delay=0.1)
    running = [
        subprocess.Popen(place.command("pull", MODEL), env=place.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    for name in NAMES:
        assert len(place.server.bodies(name)) == 1
    assert set(place.lock["models"][MODEL]["files"]) == set(NAMES)


def test_mirrors_in_order(place: Place) -> None:
    """The next place is asked when one fails or serves another file; its own names are used."""
    renamed = {"model.safetensors": "weights/tiny.safetensors", "config.json": "config.json"}
    first = {"url": f"{place.server.url}/nowhere"}
    second = {"url": f"{place.server.url}/other", "names": renamed}
    third = {"hub": "lab/tiny", "revision": place.server.commit}
    place.card("url", mirrors=[first, second, third])
    place.server.files["other/weights/tiny.safetensors"] = (NT / "model.safetensors").read_bytes()
    place.server.behaviour["plain/model.safetensors"] = Behaviour(body=HTML)
    place.server.behaviour["plain/vocab.txt"] = Behaviour(status=403)
    out = place.good("pull", MODEL)
    assert out.count("trying the next place") == 4  # two of each file: its own address, and the mirror that has nothing
    locked = place.lock["models"][MODEL]["files"]
    assert locked["model.safetensors"]["origin"] == f"{place.server.url}/other/weights/tiny.safetensors"
    assert locked["vocab.txt"]["origin"] == f"vocab.txt of lab/tiny@{place.server.commit}"
    place.server.behaviour |= {f"{where}/vocab.txt": Behaviour(status=404) for where in ("plain", "lab/tiny")}
    shutil.rmtree(place.folder())
    shutil.rmtree(place.hub)
    assert "nowhere/vocab.txt" in (error := place.bad("pull", MODEL))
    assert "lab/tiny" in error


def test_token_and_gated_repositories(place: Place) -> None:
    """A repository that wants a token says so."""
    place.card("hub")
    for name in NAMES:
        place.server.behaviour[f"lab/tiny/{name}"] = Behaviour(status=401)
    assert "HTTP 401" in place.bad("pull", MODEL)


# Places that give files to people only


@pytest.mark.parametrize(
    "page", ["https://drive.google.com/drive/folders/1oWh_-ZRdhtoGQ2Fw24HP41FgLoomVo-y", "https://hopebio2020.sharepoint.com/:f:/s/Public"]
)
def test_published_for_people(place: Place, page: str) -> None:
    """The error prints the folder, the files wanted and the command; the command checks and registers what was downloaded."""
    place.card("page", page=page)
    error = place.bad("pull", MODEL)
    for fragment in (page, "config.json", "model.safetensors (297.2 kB)", "vocab.txt", f"cellfm add {MODEL} FOLDER"):
        assert fragment in error
    assert place.server.requests == []
    downloads = place.root / "Downloads"
    shutil.copytree(NT, downloads)
    assert "4 files checked and registered" in place.good("add", MODEL, downloads)
    shutil.rmtree(downloads)
    assert "16 sequences" in place.good("embed", fasta(place), "-m", MODEL, "-o", place.root / "o.npy", "--device", "cpu", "--no-sockets")


def test_add_checks(place: Place) -> None:
    """A missing, a wrong and a misshapen file are refused, and nothing is registered."""
    from safetensors.torch import load_file, save_file

    place.card("page", hashes=False, sizes=False)
    folder = place.root / "Downloads"
    shutil.copytree(NT, folder)
    (folder / "vocab.txt").unlink()
    error = place.bad("add", MODEL, folder)
    assert f"lacks vocab.txt ({(NT / 'vocab.txt').stat().st_size / 1e3:.1f} kB)" in error or "lacks vocab.txt (size not known)" in error
    shutil.copy(NT / "vocab.txt", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["esm.embeddings.word_embeddings.weight"] = tensors["esm.embeddings.word_embeddings.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    assert "misshapen" in place.bad("add", MODEL, folder)
    assert not list(place.folder().rglob("*.*"))
    (folder / "model.safetensors").write_bytes(HTML)
    assert "web page" in place.bad("add", MODEL, folder)
    shutil.copy(NT / "model.safetensors", folder)
    place.good("add", MODEL, folder, "--link")
    assert (place.folder() / "model.safetensors").is_symlink()
    # The lock holds: another file under the same name is refused from now on.
    (place.folder() / "vocab.txt").unlink()
    (folder / "vocab.txt").write_bytes((NT / "vocab.txt").read_bytes() + b"X\n")
    assert "expected" in place.bad("add", MODEL, folder)
    place.card("page")
    (folder / "vocab.txt").write_bytes((NT / "vocab.txt").read_bytes()[:-10])
    error = place.bad("add", MODEL, folder)
    assert "cut short" in error
    assert sha((NT / "vocab.txt").read_bytes()) in error


def test_archives(place: Place) -> None:
    """A file that is published inside an archive is taken out of it; an archive that reaches outside is refused as a whole."""
    inner = "tiny/model.safetensors"
    archive = place.root / "tiny.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(NT / "model.safetensors", arcname=inner)
    body = archive.read_bytes()
    weights = (NT / "model.safetensors").read_bytes()
    files = {
        "tiny.tar.gz": {"sha256": None, "size": None, "url": f"{place.server.url}/plain/tiny.tar.gz"},
        "model.safetensors": {"sha256": sha(weights), "size": len(weights), "archive": "tiny.tar.gz"},
    }
    place.card("url", names=("config.json", "vocab.txt", "tokenizer_config.json"), files=files)
    place.server.files["plain/tiny.tar.gz"] = body[: len(body) // 2]
    assert "cut short" in place.bad("pull", MODEL)
    shutil.rmtree(place.cache)
    place.server.files["plain/tiny.tar.gz"] = body
    assert "5 files" in place.good("pull", MODEL)
    assert (place.folder() / "model.safetensors").read_bytes() == weights


def test_optional_files(place: Place) -> None:
    """A file that the model can do without is asked for, and is no reason to fail."""
    extra = {"mouse.pt": {"sha256": None, "size": None, "optional": True, "url": f"{place.server.url}/plain/mouse.pt"}}
    place.card("url", files=extra)
    out = place.good("pull", MODEL)
    assert "4 files" in out
    assert "mouse.pt is left out, the model works without it" in out
    place.good("bundle", MODEL, "-o", place.root / "models.tar")
    shutil.rmtree(place.cache)
    assert "4 files checked" in place.good("add", MODEL, NT)
    place.server.files["plain/mouse.pt"] = b"a mouse"
    assert "5 files" in place.good("pull", MODEL)


def test_revision_of_the_user(place: Place) -> None:
    """Another revision than the card's has its own part of the lock; files from elsewhere are still checked with the card."""
    place.card("hub")
    place.server.commit, pinned = "d" * 40, place.server.commit
    changed = place.server.files["lab/tiny/vocab.txt"] + b"\n"
    place.server.files["lab/tiny/vocab.txt"] = changed
    assert f"no revision {pinned}" in place.bad("pull", MODEL)
    place.good("pull", MODEL, "--revision", "d" * 40)
    assert place.lock["models"][f"{MODEL}@{'d' * 40}"]["files"]["vocab.txt"]["sha256"] == sha(changed)
    extra = {"genes.tsv": {"sha256": "0" * 64, "size": None, "url": f"{place.server.url}/plain/genes.tsv"}}
    place.card("hub", files=extra)
    place.server.commit = "d" * 40
    place.server.files |= {"lab/tiny/vocab.txt": changed, "plain/genes.tsv": b"A1BG"}
    assert f"expected {'0' * 64}" in place.bad("pull", MODEL, "--revision", "d" * 40)


# No network


@pytest.mark.parametrize("kind", KINDS)
def test_no_network(place: Place, kind: str) -> None:
    """Nobody answers: at once, with the three ways to bring the files."""
    place.card(kind)
    place.server.port, port = 9, place.server.port
    if kind == "url":
        place.card(kind)
    begin = time.monotonic()
    error = place.bad("pull", MODEL)
    assert time.monotonic() - begin < 20
    place.server.port = port
    assert "cannot be reached" in error
    assert "no internet connection" in error
    three_ways(error)


def three_ways(error: str) -> None:
    for fragment in (
        *(MODEL, "config.json", "model.safetensors (297.2 kB)", "vocab.txt (28.7 kB)"),
        *(f"cellfm pull {MODEL}", f"cellfm bundle {MODEL}", "cellfm unbundle", f"cellfm add {MODEL}"),
    ):
        assert fragment in error, error


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "CELLFM_OFFLINE"])
def test_offline_and_empty(place: Place, variable: str) -> None:
    place.card("hub")
    error = place.bad("embed", fasta(place), "-m", MODEL, "--device", "cpu", "--no-sockets", **{variable: "1"})
    assert "offline mode is on" in error
    three_ways(error)
    assert place.server.requests == []


# Caches that cannot be written


def has_namespaces() -> bool:
    """Whether a test may mount something of its own."""
    if shutil.which("unshare") is None:
        return False
    probe = "d=$(mktemp -d) && mount -t tmpfs -o size=1m tmpfs $d"
    return subprocess.run(["unshare", "-rm", "sh", "-c", probe], check=False, capture_output=True).returncode == 0


def run_in_namespace(place: Place, prepare: str, *arguments: object, after: str = "true") -> subprocess.CompletedProcess[str]:
    script = f"{prepare} && {' '.join(place.command(*arguments))}; code=$?; {after}; exit $code"
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], env=place.env(), capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize("kind", KINDS)
def test_read_only_cache(place: Place, kind: str) -> None:
    """A filled cache is used as it is; an empty one is an error that names the folder and the way out."""
    if not has_namespaces():
        pytest.skip("needs user namespaces for a read-only mount (a closed folder is none for root)")
    place.card(kind)
    place.good("pull", MODEL)
    home = place.root / "home"
    place.environment = {"CELLFM_CACHE": str(home / "cellfm"), "HF_HOME": str(home / "hf")}
    home.mkdir()
    for folder in (place.cache, place.hub):
        if folder.exists():
            shutil.move(folder, home / folder.name)
    before = snapshot(home)
    mount = f"mount --bind {home} {home} && mount -o remount,ro,bind {home}"
    done = run_in_namespace(place, mount, "pull", MODEL, "--no-sockets")
    assert "4 match" in done.stdout, done.stderr
    shutil.rmtree(home)
    home.mkdir()
    done = run_in_namespace(place, mount, "pull", MODEL)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert "cannot be written" in error
    assert "CELLFM_CACHE" in error
    assert str(home / ("cellfm" if kind == "url" else "hf")) in error
    assert before


@pytest.mark.parametrize("kind", KINDS)
def test_quota(place: Place, kind: str) -> None:
    """A limit on file sizes, as a quota: the error says that no space is left; nothing half is taken for a file."""
    place.card(kind)
    place.server.behaviour[served(kind, "model.safetensors")] = Behaviour(status=404)
    place.bad("pull", MODEL)
    place.server.behaviour.clear()
    before = snapshot(place.root)
    limit: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    error = place.bad("pull", MODEL, options={"preexec_fn": limit})
    assert "no space is left" in error
    assert "CELLFM_CACHE" in error
    assert before.items() <= snapshot(place.root).items()
    assert "4 match" in place.good("pull", MODEL)


@pytest.mark.parametrize("kind", KINDS)
def test_disk_full(place: Place, kind: str) -> None:
    """A disk that is too small for the largest file."""
    if not has_namespaces():
        pytest.skip("needs user namespaces for a small tmpfs")
    place.card(kind)
    small = place.root / "small"
    small.mkdir()
    place.environment = {"CELLFM_CACHE": str(small / "cellfm"), "HF_HOME": str(small / "hf")}
    mount = f"mount -t tmpfs -o size=200k tmpfs {small}"
    done = run_in_namespace(place, mount, "pull", MODEL, after=f"find {small} -name model.safetensors; find {small} -name config.json")
    assert done.returncode == 1, done.stderr
    error = done.stderr.splitlines()[-1]
    assert "no space is left" in error
    assert "CELLFM_CACHE" in error
    assert "config.json" in done.stdout  # what came before stays
    assert "model.safetensors" not in done.stdout  # nothing that could be taken for the file


# Licences


def test_commercial_use(place: Place) -> None:
    """Weights that are not for commercial use are refused where the user says that his is; else their licence is printed once."""
    place.card("hub", commercial_use=False)
    for arguments, env in ((("--commercial-ok",), {}), ((), {"CELLFM_COMMERCIAL": "1"})):
        error = place.bad("pull", MODEL, *arguments, **env)
        assert "licensed mit" in error
        assert "do not allow commercial use" in error
    assert place.server.requests == []
    assert "do not allow" in place.bad("embed", fasta(place), "-m", MODEL, "--commercial-ok")
    assert "licensed mit (not for commercial use)" in place.good("pull", MODEL)
    assert "licensed" not in place.good("pull", MODEL)
    place.card("hub", commercial_use=None)
    assert "not known to allow" in place.bad("pull", MODEL, "--commercial-ok")
    place.card("hub")
    assert "4 match" in place.good("pull", MODEL, "--commercial-ok")


# Bundles and the cache


def test_bundle(place: Place) -> None:
    """One archive carries a model with its lock to a machine that never sees the network."""
    place.card("hub", hashes=False)
    archive = place.root / "models.tar"
    assert "cellfm pull" in place.bad("bundle", MODEL, "-o", archive)
    assert not archive.exists()
    place.good("pull", MODEL)
    assert "cellfm unbundle models.tar" in place.good("bundle", MODEL, "-o", archive)
    assert "exists" in place.bad("bundle", MODEL, "-o", archive)
    with tarfile.open(archive) as tar:
        assert set(tar.getnames()) == {"cellfm.lock", *(f"models/{MODEL}/{name}" for name in NAMES)}
    offline = {"CELLFM_CACHE": str(place.root / "there"), "HF_HOME": str(place.root / "there-hf"), "HF_HUB_OFFLINE": "1"}
    assert MODEL in place.good("unbundle", archive, "--no-sockets", **offline)
    assert MODEL in place.good("unbundle", archive, "--no-sockets", **offline)  # again changes nothing
    out = place.good("embed", fasta(place), "-m", MODEL, "-o", place.root / "o.npy", "--device", "cpu", "--no-sockets", **offline)
    assert "16 sequences" in out
    lock = json.loads((place.root / "there/cellfm.lock").read_text())
    assert lock["models"][MODEL]["files"] == place.lock["models"][MODEL]["files"]
    # A file that is here and differs is neither overwritten nor accepted.
    vocab = place.root / "there/models" / MODEL / "vocab.txt"
    vocab.write_text("mine")
    assert "move it away" in place.bad("unbundle", archive, **offline)
    assert vocab.read_text() == "mine"


@pytest.mark.parametrize("what", ["damaged", "unlisted", "climbs", "absolute", "link", "no lock", "web page", "truncated"])
def test_bad_bundles(place: Place, what: str) -> None:
    """Archives are looked through before anything is unpacked."""
    place.card("hub")
    place.good("pull", MODEL)
    good = place.root / "good.tar"
    place.good("bundle", MODEL, "-o", good)
    bad = place.root / "bad.tar"
    names = {"unlisted": f"models/{MODEL}/extra.bin", "climbs": f"models/{MODEL}/../../../canary", "absolute": str(place.root / "canary")}
    with tarfile.open(good) as source, tarfile.open(bad, "w") as tar:
        for member in source:
            content = source.extractfile(member)
            assert content is not None
            if what == "no lock" and member.name == "cellfm.lock":
                continue
            if what == "damaged" and member.name.endswith("vocab.txt"):
                member.name, body = member.name, bytearray(content.read())
                body[0] ^= 1
                import io

                tar.addfile(member, io.BytesIO(bytes(body)))
                continue
            tar.addfile(member, content)
        extra = tarfile.TarInfo(names.get(what, "x"))
        if what in names:
            import io

            extra.size = 3
            tar.addfile(extra, io.BytesIO(b"bad"))
        if what == "link":
            extra.name, extra.type, extra.linkname = f"models/{MODEL}/link", tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(extra)
    if what == "web page":
        bad.write_bytes(HTML)
    if what == "truncated":
        bad.write_bytes(good.read_bytes()[:60_000])
    there = {"CELLFM_CACHE": str(place.root / "there")}
    error = place.bad("unbundle", bad, **there)
    expected = {
        "damaged": "not what its lock says",
        "unlisted": "no model card lists",
        "climbs": "outside its own folder",
        "absolute": "outside its own folder",
        "link": "link or a device",
        "no lock": "has no cellfm.lock",
        "web page": "web page",
        "truncated": "cut short",
    }
    assert expected[what] in error
    assert str(bad) in error
    assert not (place.root / "canary").exists()
    assert not (place.root / "there/models" / MODEL / "extra.bin").exists()
    assert not list((place.root / "there").rglob("*unchecked*"))


@pytest.mark.parametrize("kind", KINDS)
def test_cache(place: Place, kind: str) -> None:
    """The listing tells what is there; only what is named is deleted."""
    place.card(kind)
    assert "0 models" in place.good("cache")
    place.card(kind, name="other-nt")
    place.good("pull", MODEL, "other-nt")
    listed = json.loads(place.good("cache", "--json"))
    assert [entry["name"] for entry in listed] == ["other-nt", MODEL]
    size = sum((NT / name).stat().st_size for name in NAMES)
    assert all(entry["size"] == size and entry["files"] == entry["of"] == 4 for entry in listed)
    origin = f"lab/tiny@{place.server.commit}" if kind == "hub" else f"{place.server.url}/plain"
    assert all(entry["origins"] == [origin] for entry in listed)
    assert origin in place.good("cache")
    assert "no model is called" in place.bad("cache", "--delete", "nonsense")
    before = snapshot(place.root)
    if kind == "url":
        assert place.good("cache", "--delete", MODEL).count("deleted") == 4
        assert [entry["name"] for entry in json.loads(place.good("cache", "--json"))] == ["other-nt"]
        after = snapshot(place.root)
        assert {path for path in before if path not in after} == {f"cellfm/models/{MODEL}/{name}" for name in NAMES}
        assert MODEL not in place.lock["models"]
    else:  # both models are of one repository: neither can be deleted alone
        assert "nothing of" in place.bad("cache", "--delete", MODEL)
        assert snapshot(place.root) == before


def test_cache_of_the_hub(place: Place) -> None:
    """A deleted model leaves nothing of its contents in the hub's cache."""
    place.card("hub")
    place.good("pull", MODEL)
    place.good("cache", "--delete", MODEL)
    assert not [path for path in place.hub.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert "4 match" in place.good("pull", MODEL)


def test_damaged_lock(place: Place) -> None:
    place.card("hub")
    place.good("pull", MODEL)
    (place.cache / "cellfm.lock").write_text('{"models": {"x": 3}}')
    error = place.bad("pull", MODEL)
    assert "is not a lock file" in error
    assert "move it away" in error
