"""Cells for a model of sequences, and the reverse: refused before a file of the model is looked for. `check` and `embed` agree."""

import gzip
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import cellfm_hub as cf
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.errors import CellFMError, InputError
from cellfm_hub.suitability import modality_of
from golden_cases import PORTABLE
from test_formats import FORMATS, cut, golden
from test_usage import cellfm

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "geneformer": ("geneformer", {"checkpoint": PORTABLE / "geneformer-v2-basic" / "checkpoint"}),
    "nt": ("nt", {"checkpoint": PORTABLE / "nt-v1-basic" / "checkpoint"}),
    "kmer": ("kmer", {}),
    "pca": ("pca", {"options": {"n_components": 2}}),
}
"""Tiny models with and without a network, of cells and of sequences."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
    pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning"),
]

FASTA = ">a\nACGTACGT\n>b\nACGT\n"


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as a file of a model is asked for."""

    def asked(*_: object, **__: object) -> None:
        pytest.fail("a file of the model was asked for")

    monkeypatch.setattr(CheckpointFiles, "check_use", asked)


def assert_refused(call: Callable[[], object], *fragments: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.usefixtures("no_files")
def test_in_memory() -> None:
    """With the names of models that fit."""
    cells = golden().copy()
    sequences: list[Any] = [["ACGT"], {"a": "ACGT"}, pd.Series(["ACGT"]), ("ACGT",), np.array(["ACGT"])]
    for data in sequences:
        says = ("a model of cells", type(data).__name__, "AnnData", "dnabert2")
        assert_refused(lambda d=data: cf.embed(d, "geneformer"), *says)  # type: ignore[misc]
        assert_refused(lambda d=data: cf.explain(d, "geneformer", cell=0), *says)  # type: ignore[misc]
        assert list(cf.check(data, "geneformer").refusals) == ["geneformer-v2-316m"]
    assert_refused(lambda: cf.embed(cells, "nt"), "a model of sequences", "AnnData", "list of str", "geneformer", "scgpt")
    assert_refused(lambda: cf.explain(cells, "nt", cell=0), "a model of sequences")
    assert_refused(lambda: cf.explain(cells, "pca", cell=0), "without tokens")
    others: list[Any] = [pd.DataFrame({"a": ["ACGT"]}), 5, None, b"ACGT", np.ones((2, 2)), sp.eye(3, format="csr")]
    for data in others:
        for model in ("nt", "geneformer"):
            assert_refused(lambda d=data, m=model: cf.embed(d, m), type(data).__name__)  # type: ignore[misc]


@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize("name", ["dna.fa", "dna.fa.gz", "dna.fastq", "dna.bed", "calls.vcf.gz", "dna.txt", "dna.txt.gz", "reads"])
def test_files_of_sequences(tmp_path: Path, name: str) -> None:
    """Also where only the first letter tells."""
    data, text = tmp_path / name, FASTA.encode()
    data.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert_refused(lambda: cf.embed(data, "geneformer"), name, "holds sequences", "a model of cells")
    assert_refused(lambda: cf.embed_file(data, "geneformer", out=tmp_path / "out.npy"), name, "holds sequences", "dnabert2")
    assert_refused(lambda: cf.embed_file(data, ["geneformer", "scgpt"], out=tmp_path / "out.h5ad"), "holds sequences")
    done = cellfm("embed", data, "--model", "scgpt", "--model", "geneformer")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "holds sequences" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == [name]


@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize("name", ["h5ad", "zarr-3", "mtx-3", "10x-h5-3", "loom", "csv", "tsv", "txt-gz"])
def test_files_of_cells(tmp_path: Path, name: str) -> None:
    data = FORMATS[name](tmp_path, golden())
    holds = "is a folder" if data.is_dir() else "holds cells"
    assert_refused(lambda: cf.embed(data, "nt"), data.name, holds, "a model of sequences")
    assert_refused(lambda: cf.embed_file(data, ["nt", "dnabert2"], out=tmp_path / "out.h5ad"), data.name, holds, "geneformer")
    done = cellfm("explain", data, "--model", "nt", "--cell", "x")
    assert done.exit_code == 1
    assert "a model of sequences" in done.stderr


@pytest.mark.usefixtures("no_files")
def test_switches(tmp_path: Path) -> None:
    """Those of a family are looked at first of all, and those of the second model before the first is loaded."""
    data, options = FORMATS["h5ad"](tmp_path, golden()), {"scgpt": {"q": 1}}
    assert_refused(lambda: cf.embed_file(data, ["geneformer", "scgpt"], out=tmp_path / "out.h5ad", options=options), "'q'", "ties")
    assert_refused(lambda: cf.embed(golden().copy(), "kmer", options={"q": 1}), "'q'", "k=4")


def test_a_loaded_model() -> None:
    """The same words where the weights are there already."""
    for name, data in (("geneformer", ["ACGT"]), ("nt", golden().copy())):
        model, options = MODELS[name]
        embedder = cf.load(model, device="cpu", precision="float32", **options)
        assert_refused(lambda e=embedder, d=data: e.encode(d), "is a model of")  # type: ignore[misc]
        assert_refused(lambda e=embedder, d=data: e.tokenize(d), "is a model of")  # type: ignore[misc]


@pytest.mark.parametrize("name", [*FORMATS])
def test_cells_of_every_format_are_known(tmp_path: Path, name: str) -> None:
    assert modality_of(FORMATS[name](tmp_path, golden())) == "cell"


# check and embed


def cells_with(change: Callable[[ad.AnnData], Any]) -> Callable[[Path], Any]:
    def make(_: Path) -> ad.AnnData:
        adata = golden().copy()
        changed = change(adata)
        return adata if changed is None else changed

    return make


def with_value(value: float) -> Callable[[ad.AnnData], None]:
    def change(adata: ad.AnnData) -> None:
        adata.X = adata.X.toarray()
        adata.X[3, 5] = value

    return change


def with_layer(adata: ad.AnnData) -> None:
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.toarray() - 0.5


def logarithms(adata: ad.AnnData) -> None:
    x = sp.csr_matrix(adata.X, dtype=np.float64)
    adata.X = sp.csr_matrix(x.multiply(1e4 / np.maximum(x.sum(1), 1))).log1p()


def renamed(adata: ad.AnnData) -> None:
    adata.var_names = [f"g{i}" for i in range(adata.n_vars)]


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return make


def written(name: str, damage: Callable[[Path], Any] = lambda _: None) -> Callable[[Path], Any]:
    def make(folder: Path) -> Path:
        path = FORMATS[name](folder, golden())
        damage(path)
        return path

    return make


AWKWARD: dict[str, Callable[[Path], Any]] = {
    **{name: written(name) for name in FORMATS},
    **{f"cut {name}": written(name, cut) for name in FORMATS if not name.startswith(("zarr", "mtx"))},
    "plain": cells_with(lambda _: None),
    **{f"value {value}": cells_with(with_value(value)) for value in (-1.0, np.nan, np.inf, 0.5)},
    "layer": cells_with(with_layer),
    "logarithms": cells_with(logarithms),
    "unknown genes": cells_with(renamed),
    "no cells": cells_with(lambda a: a[:0].copy()),
    "no genes": cells_with(lambda a: a[:, :0].copy()),
    "one cell": cells_with(lambda a: a[:1].copy()),
    "two cells": cells_with(lambda a: a[:2].copy()),
    "nothing": lambda _: ad.AnnData(),
    "all empty": cells_with(lambda a: ad.AnnData(a.X * 0, obs=a.obs, var=a.var)),
    "repeated names": cells_with(lambda a: ad.AnnData(a.X, var=a.var, obs=pd.DataFrame(index=["same"] * a.n_obs))),
    "wide": cells_with(lambda a: ad.AnnData(sp.csc_matrix(a.X), obs=a.obs, var=a.var)),
    "frame": lambda _: pd.DataFrame(np.ones((3, 3))),
    "number": lambda _: 5,
    "missing": lambda folder: folder / "missing.h5ad",
    "empty folder": lambda folder: folder,
    "not HDF5": text("cells.h5ad", b"not HDF5"),
    "other": text("cells.xlsx", "x"),
    "list": lambda _: ["ACGT", "ttga"],
    "empty list": lambda _: [],
    "empty string": lambda _: ["ACGT", ""],
    "one string": lambda _: "ACGTACGT",
    "number in a list": lambda _: ["ACGT", 5],
    "protein": lambda _: {"p53": "MEEPQSDPSV"},
    "spaces": lambda _: ["ACGT ACGT"],
    "too long": lambda _: pd.Series(["ACGT", "ACGTAC" * 256]),
    "all unknown": lambda _: ["NNNN"],
    "fasta": text("dna.fa", FASTA),
    "fasta with an empty record": text("dna.fa", FASTA + ">c\n>d\nAC\n"),
    "fasta of another name": text("dna.txt", FASTA),
    "fasta without a suffix": text("reads", FASTA),
    "empty fasta": text("dna.fa", ""),
    "broken fasta": text("dna.fa", FASTA + ">x\nAC!GT\n"),
    "long fasta": text("dna.fa", FASTA + f">x\n{'ACGTAC' * 256}\n"),
    "no fasta": text("dna.fa", "no FASTA"),
    "binary": text("dna.fa", b">a\n\xff\xfe\x00"),
    "cut gzip": text("dna.fa.gz", gzip.compress(FASTA.encode() * 50)[:60]),
    "fastq": text("dna.fq", "@a\nACGT\n+\nIIII\n"),
    "cut fastq": text("dna.fq", "@a\nACGT\n+\nIII"),
    "bed without a genome": text("peaks.bed", "chr1\t1\t5\n"),
}


@cache
def loaded(name: str) -> cf.Embedder:
    model, options = MODELS[name]
    return cf.load(model, device="cpu", precision="float32", **options)


def refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except CellFMError as error:
        return str(error)
    return None


def checked(data: Any, name: str) -> str | None:
    """Return why `check` says that a model refuses data."""
    model, options = MODELS[name]
    refusals: dict[str, str] = {}
    return refusal(lambda: refusals.update(cf.check(data, model, device="cpu", **options).refusals)) or next(iter(refusals.values()), None)


@pytest.mark.parametrize("kind", AWKWARD)
def test_check_says_what_embed_does(tmp_path: Path, kind: str) -> None:
    for name in MODELS:
        (folder := tmp_path / name).mkdir()
        data = AWKWARD[kind](folder)
        by_check = checked(data, name)
        by_embed = refusal(lambda n=name, d=data: loaded(n).encode(d))  # type: ignore[misc]
        assert (by_check is None) == (by_embed is None), (name, by_check, by_embed)
        assert "\n" not in f"{by_check}{by_embed}"


def test_a_long_sequence_behind_those_that_are_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellfm_hub.checking.TOKENIZED_BASES", 10)
    assert checked(["ACGTACGT"] * 5 + ["ACGTA"], "nt") is None
    by_check = checked(["ACGTACGT"] * 5 + ["ACGTAC" * 256, "ACGT"], "nt")
    assert by_check is not None
    assert by_check.startswith("sequence '5' has 1,536 bases")
