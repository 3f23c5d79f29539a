"""Every format of cells gives the vectors of the AnnData object in memory, to the bit; a damaged file is refused in one line."""

import gzip
import logging
import shutil
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.io
import scipy.sparse as sp
from anndata.io import write_elem

import cellfm_hub as cf
from cellfm_hub import sinks
from cellfm_hub.cli import _default_output
from cellfm_hub.errors import InputError, OutputError
from cellfm_hub.sources import matrix as matrix_module
from cellfm_hub.sources import temporary_rows
from cellfm_hub.sources.cells import count_blocks, find_counts, open_cells
from golden_cases import PORTABLE, SHARED
from test_cli import assert_fails, cellfm

GENEFORMER = PORTABLE / "geneformer-v2-basic"
PBMC = SHARED / "data/scrna/pbmc3k/pbmc3k_mini.h5ad"


@cache
def geneformer() -> cf.Embedder:
    return cf.load("geneformer", checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32")


@cache
def golden() -> ad.AnnData:
    """Cells of a golden case, without one of two columns of the same gene, which tables of text could not tell apart."""
    source = ad.read_h5ad(GENEFORMER / "input.h5ad")
    ids = pd.Index(source.var["ensembl_id"].astype(str))
    source = source[:, ~ids.duplicated()]
    names = pd.Index(source.var["ensembl_id"].astype(str).to_numpy())
    return ad.AnnData(sp.csr_matrix(source.X), obs=pd.DataFrame({"kind": "a"}, index=source.obs_names), var=pd.DataFrame(index=names))


@cache
def expected() -> np.ndarray:
    return geneformer().encode(golden())


# How each format is written


def h5ad(path: Path, data: ad.AnnData) -> Path:
    data.write_h5ad(path := path / "cells.h5ad")
    return path


def h5ad_dense(path: Path, data: ad.AnnData) -> Path:
    return h5ad(path, ad.AnnData(data.X.toarray(), obs=data.obs, var=data.var))


def h5ad_dense_packed(path: Path, data: ad.AnnData) -> Path:
    dense = ad.AnnData(data.X.toarray(), obs=data.obs, var=data.var)
    dense.write_h5ad(path := path / "cells.h5ad", compression="gzip")
    return path


def h5ad_by_genes(path: Path, data: ad.AnnData) -> Path:
    return h5ad(path, ad.AnnData(data.X.tocsc(), obs=data.obs, var=data.var))


def zarr_of(version: int, by_genes: bool = False, dense: bool = False) -> Callable[[Path, ad.AnnData], Path]:
    def write(path: Path, data: ad.AnnData) -> Path:
        x = data.X.tocsc() if by_genes else data.X.toarray() if dense else data.X
        with ad.settings.override(zarr_write_format=version):
            ad.AnnData(x, obs=data.obs, var=data.var).write_zarr(path := path / "cells.zarr")
        assert (path / ("zarr.json" if version == 3 else ".zgroup")).is_file()
        return path

    return write


def h5mu(path: Path, data: ad.AnnData) -> Path:
    with h5py.File(path := path / "cells.h5mu", "w") as file:
        write_elem(file, "obs", pd.DataFrame(index=data.obs_names[::-1]))
        mod = file.create_group("mod")
        write_elem(mod, "prot", ad.AnnData(np.ones((data.n_obs, 2))))
        write_elem(mod, "rna", data)
    return path


def tenx_h5(version: int) -> Callable[[Path, ad.AnnData], Path]:
    def write(path: Path, data: ad.AnnData) -> Path:
        x = data.X.astype(np.int32)
        ids, names = data.var_names.tolist(), [f"gene{i}" for i in range(data.n_vars)]
        with h5py.File(path := path / "filtered_feature_bc_matrix.h5", "w") as file:
            group = file.create_group("matrix" if version == 3 else "GRCh38")
            if version == 3:  # with two features that are no genes, one of them first
                x = sp.csr_matrix(sp.hstack([np.full((data.n_obs, 1), 7), x, np.full((data.n_obs, 1), 9)], format="csr", dtype=np.int32))
                features = group.create_group("features")
                features["id"] = np.array(["CD3", *ids, "CD4"], dtype="S")
                features["name"] = np.array(["CD3", *names, "CD4"], dtype="S")
                features["feature_type"] = np.array(["Antibody Capture", *["Gene Expression"] * len(ids), "Antibody Capture"], dtype="S")
                features["genome"] = np.array(["", *["GRCh38"] * len(ids), ""], dtype="S")
            else:
                group["genes"], group["gene_names"] = np.array(ids, dtype="S"), np.array(names, dtype="S")
            group["barcodes"] = np.array(data.obs_names.tolist(), dtype="S")
            group["data"], group["indices"], group["indptr"] = x.data, x.indices.astype(np.int64), x.indptr.astype(np.int64)
            group["shape"] = np.array(x.shape[::-1], dtype=np.int32)
        return path

    return write


def mtx(version: int, beginning: str = "") -> Callable[[Path, ad.AnnData], Path]:
    def write(path: Path, data: ad.AnnData) -> Path:
        (path := path / "filtered_feature_bc_matrix").mkdir()
        x = sp.csc_matrix(data.X.T.astype(np.int32))
        scipy.io.mmwrite(path / f"{beginning}matrix.mtx", x)
        genes = [f"{name}\tgene{i}" for i, name in enumerate(data.var_names)]
        if version == 3:
            genes = [f"{line}\tGene Expression" for line in genes]
        (path / f"{beginning}{'features' if version == 3 else 'genes'}.tsv").write_text("".join(f"{line}\n" for line in genes))
        (path / f"{beginning}barcodes.tsv").write_text("".join(f"{name}\n" for name in data.obs_names))
        if version == 3:
            for file in list(path.iterdir()):
                with gzip.open(f"{file}.gz", "wb") as packed:
                    packed.write(file.read_bytes())
                file.unlink()
        return path

    return write


def mtx_file(path: Path, data: ad.AnnData) -> Path:
    return mtx(2, "GSM1_")(path, data) / "GSM1_matrix.mtx"


def loom(chunks: Any) -> Callable[[Path, ad.AnnData], Path]:
    def write(path: Path, data: ad.AnnData) -> Path:
        with h5py.File(path := path / "cells.loom", "w") as file:
            x = data.X.toarray().T
            file.create_dataset("matrix", data=x, chunks=chunks, compression=None if chunks is None else "gzip")
            file.create_dataset("layers/spliced", data=x // 2)
            file["row_attrs/Gene"] = np.array([f"gene{i}" for i in range(data.n_vars)], dtype="S")
            file["row_attrs/Accession"] = np.array(data.var_names.tolist(), dtype="S")
            file["col_attrs/CellID"] = np.array(data.obs_names.tolist(), dtype="S")
            file["col_attrs/kind"] = np.array(data.obs["kind"].tolist(), dtype="S")
        return path

    return write


def table(name: str, separator: str, r_style: bool = False) -> Callable[[Path, ad.AnnData], Path]:
    def write(path: Path, data: ad.AnnData) -> Path:
        text = data.to_df().astype(int).to_csv(sep=separator)
        (path := path / name).write_bytes(text.encode())
        if r_style:
            path.write_text(text[len(separator) :])
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        return path

    return write


FORMATS: dict[str, Callable[[Path, ad.AnnData], Path]] = {
    "h5ad": h5ad,
    "h5ad-dense": h5ad_dense,
    "h5ad-dense-packed": h5ad_dense_packed,
    "h5ad-by-genes": h5ad_by_genes,
    "zarr-2": zarr_of(2),
    "zarr-3": zarr_of(3),
    "zarr-by-genes": zarr_of(2, by_genes=True),
    "zarr-dense": zarr_of(3, dense=True),
    "h5mu": h5mu,
    "10x-h5-2": tenx_h5(2),
    "10x-h5-3": tenx_h5(3),
    "mtx-2": mtx(2),
    "mtx-3": mtx(3),
    "mtx-geo": mtx(3, "GSM1_sample_"),
    "mtx-file": mtx_file,
    "loom": loom((64, 4)),
    "loom-contiguous": loom(None),
    "csv": table("cells.csv", ","),
    "csv-semicolon": table("cells.csv", ";"),
    "csv-gz": table("cells.csv.gz", ","),
    "tsv": table("cells.tsv", "\t"),
    "tsv-R": table("cells.tsv", "\t", r_style=True),
    "txt-gz": table("cells.txt.gz", "\t"),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


@pytest.mark.parametrize("name", FORMATS)
def test_same_vectors(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path, golden())
    result = geneformer().run(path)
    np.testing.assert_array_equal(result.values, expected())
    assert result.names == golden().obs_names.tolist()
    assert result.receipt["counts_from"] == "X"
    assert result.receipt["genes"] == golden().n_vars
    np.testing.assert_array_equal(geneformer().encode(str(path)), expected())


@pytest.mark.parametrize("name", FORMATS)
def test_same_features(name: str, tmp_path: Path) -> None:
    """A model without a network."""
    cells = golden()[golden().X.sum(1).A1 > 0].copy()
    pca = cf.load("pca", options={"n_components": 5})
    np.testing.assert_array_equal(pca.encode(FORMATS[name](tmp_path, cells)), pca.encode(cells))


@pytest.mark.parametrize("name", FORMATS)
def test_parts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In however small parts it is read."""
    monkeypatch.setattr(temporary_rows, "ENTRIES", 50)
    monkeypatch.setattr("cellfm_hub.sources.tenx.ENTRIES", 50)
    monkeypatch.setattr("cellfm_hub.sources.tables._ROWS", 2)
    monkeypatch.setattr("cellfm_hub.sources.loom.ENTRIES", 50)
    monkeypatch.setattr(matrix_module, "_DENSE_VALUES", 400)
    path = FORMATS[name](tmp_path, golden())
    with open_cells(path, (), "a model") as cells:
        matrix = find_counts(cells, None)
        got = sp.vstack([block.counts for block in count_blocks(cells, matrix, 4)]).toarray()
        np.testing.assert_array_equal(matrix.rows(3, 7).toarray(), got[3:7])
    np.testing.assert_array_equal(got, golden().X.toarray())


def test_scanpy_reads_the_same(tmp_path: Path) -> None:
    """Names, columns and counts of 10x files are those of scanpy."""
    readers = {"10x-h5-2": sc.read_10x_h5, "10x-h5-3": sc.read_10x_h5, "mtx-2": sc.read_10x_mtx, "mtx-3": sc.read_10x_mtx}
    for name, read in readers.items():
        (folder := tmp_path / name).mkdir()
        path = FORMATS[name](folder, golden())
        theirs = read(path)
        with open_cells(path, (), "a model") as cells:
            ours = cells.matrices["X"]
            assert cells.obs.index.tolist() == theirs.obs_names.tolist()
            assert ours.var.index.tolist() == theirs.var_names.tolist()
            assert ours.var["gene_ids"].tolist() == theirs.var["gene_ids"].tolist()
            np.testing.assert_array_equal(ours.rows(0, len(cells)).toarray(), theirs.X.toarray())


@pytest.mark.skipif(not PBMC.is_file(), reason="needs ../shared")
def test_real_cells(tmp_path: Path) -> None:
    """Real blood cells, in the formats that hold Ensembl ids."""
    source = ad.read_h5ad(PBMC)[:30].copy()
    data = ad.AnnData(source.X, obs=pd.DataFrame({"kind": "a"}, index=source.obs_names), var=source.var.set_index("ensembl_id")[[]])
    names = ("h5ad-by-genes", "zarr-3", "10x-h5-3", "mtx-3", "h5mu", "loom", "csv-gz")
    for name in names:
        (folder := tmp_path / name).mkdir()
        path = FORMATS[name](folder, data)
        with open_cells(path, (), "a model") as cells:
            matrix = find_counts(cells, None)
            got = sp.vstack([block.counts for block in count_blocks(cells, matrix, 20)])
        assert (sp.csr_matrix(got) != source.X).nnz == 0, name


def test_legacy_h5ad() -> None:
    """The file inside scanpy was written by an AnnData of 2018."""
    path = Path(sc.__file__).parent / "datasets/10x_pbmc68k_reduced.h5ad"
    pca = cf.load("pca", options={"n_components": 5})
    expected = pca.encode(cf.datasets.pbmc700())
    np.testing.assert_array_equal(pca.encode(path), expected)
    assert pca.receipt is not None
    assert pca.receipt["counts_from"] == "raw.X"


def test_legacy_h5ad_takes_no_result(tmp_path: Path) -> None:
    """Said before anything is computed."""
    with h5py.File(source := tmp_path / "old.h5ad", "w") as file:
        file["obs"] = np.zeros(3, dtype=[("index", "S4"), ("n_genes", "i4")])  # a table, where newer files have a group
    with pytest.raises(OutputError, match=r"before 0\.7.*-o"):
        sinks.check_output(tmp_path / "out.h5ad", source=source, keys=["X"], overwrite=False)
    sinks.check_output(tmp_path / "out.zarr", source=source, keys=["X"], overwrite=False)


def test_float16_on_disk(tmp_path: Path) -> None:
    path = h5ad(tmp_path, golden())
    with h5py.File(path, "r+") as file:
        small = np.minimum(file["X/data"][:], 2000)
        del file["X/data"]
        file["X/data"] = small.astype(np.float16)
    capped = golden().copy()
    capped.X.data = np.minimum(capped.X.data, 2000)
    np.testing.assert_array_equal(geneformer().encode(path), geneformer().encode(capped))


def test_layers_and_raw_of_stores(tmp_path: Path) -> None:
    """Files hold more than one matrix, as objects do."""
    x = golden().X
    scaled = x.toarray() - 0.5
    for write in (h5ad, zarr_of(2), zarr_of(3), h5mu):
        data = ad.AnnData(scaled, obs=golden().obs, var=golden().var, layers={"spliced": x, "odd": scaled})
        data.raw = golden()
        (folder := tmp_path / str(len(list(tmp_path.iterdir())))).mkdir()
        result = geneformer().run(write(folder, data) if write in (h5ad, h5mu) else _zarr_with(folder, data, write))
        np.testing.assert_array_equal(result.values, expected())
        assert result.receipt["counts_from"] == "raw.X"


def _zarr_with(folder: Path, data: ad.AnnData, write: Callable[[Path, ad.AnnData], Path]) -> Path:
    plain = write(folder, golden())
    version = 3 if (plain / "zarr.json").exists() else 2
    shutil.rmtree(plain)
    with ad.settings.override(zarr_write_format=version):
        data.write_zarr(plain)
    return plain


def test_backed_objects(tmp_path: Path) -> None:
    for write in (h5ad, h5ad_dense, h5ad_by_genes):
        backed = ad.read_h5ad(write(tmp_path, golden()), backed="r")
        np.testing.assert_array_equal(geneformer().encode(backed), expected())
        np.testing.assert_allclose(geneformer().encode(backed[2:5]), expected()[2:5], atol=2e-6)
        backed.file.close()


def test_a_temporary_copy_is_said_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = h5ad_by_genes(tmp_path, golden())
    (folder := tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with caplog.at_level(logging.INFO, "cellfm_hub"):
        geneformer().encode(path)
    assert caplog.text.count(f"X of {path} (stored by genes) cannot be read by cells; it is copied once") == 1
    assert list(folder.iterdir()) == []


def test_no_room_for_the_temporary_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = h5ad_by_genes(tmp_path, golden())

    class Full:
        def seek(self, *_: int) -> int:
            return 0

        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(InputError, match=r"no room for the temporary copy.*No space left on device.*TMPDIR"):
        geneformer().encode(path)


@pytest.mark.parametrize("name", ["h5ad-by-genes", "mtx-3", "csv", "loom"])
def test_memory_is_bounded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read by cells is never in memory as a whole: four times the cells take no more."""
    for module in ("temporary_rows", "tenx", "loom"):
        monkeypatch.setattr(f"cellfm_hub.sources.{module}.ENTRIES", 20_000)
    monkeypatch.setattr(matrix_module, "_DENSE_VALUES", 20_000)
    peaks = []
    for cells in (500, 2_000):
        x = sp.csr_matrix(sp.random(cells, 200, 0.2, "csr", random_state=0) > 0, dtype=np.float32) * 3
        names = pd.Index([f"c{i}" for i in range(cells)])
        data = ad.AnnData(x, obs=pd.DataFrame({"kind": "a"}, index=names), var=pd.DataFrame(index=[f"g{i}" for i in range(200)]))
        (folder := tmp_path / str(cells)).mkdir()
        path = FORMATS[name](folder, data)
        total = 0.0
        tracemalloc.start()
        with open_cells(path, (), "a model") as opened:
            matrix = opened.matrices["X"]
            matrix.rows(0, 10)
            tracemalloc.reset_peak()
            for start in range(0, cells, 250):
                total += matrix.rows(start, start + 250).sum()
            peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == x.sum()
    # The names of the cells stay, and 8 bytes for each in some formats.
    assert peaks[1] < peaks[0] + 1_500 * 200


# Damaged files


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("zarr")])
def test_cut_short(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path, golden())
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        whole = file.read_bytes()
        cut(file)
        with pytest.raises(InputError) as caught:
            geneformer().encode(path)
        assert "\n" not in str(caught.value)
        assert file.name in str(caught.value) or "matrix.mtx" in str(caught.value)
        file.write_bytes(whole)
    np.testing.assert_array_equal(geneformer().encode(path), expected())


@pytest.mark.parametrize("name", ["zarr-2", "zarr-3", "zarr-by-genes"])
def test_zarr_with_missing_parts(name: str, tmp_path: Path) -> None:
    """zarr reads chunks that are not there as zeros: that must not pass."""
    path = FORMATS[name](tmp_path, golden())
    chunks = [
        p for p in path.rglob("*") if p.is_file() and p.parent.name in ("data", "indices", "indptr", "c") and p.name[0] in "0123456789"
    ]
    chunks = [p for p in chunks if "X" in p.parts]
    assert len(chunks) == 3
    for chunk in chunks:
        away = chunk.rename(tmp_path / "away")
        with pytest.raises(InputError, match=r"cells\.zarr"):
            geneformer().encode(path)
        away.rename(chunk)
        whole = chunk.read_bytes()
        chunk.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"cells\.zarr"):
            geneformer().encode(path)
        chunk.write_bytes(whole)
    for file in path.rglob("*"):
        if file.name in (".zarray", ".zgroup", ".zmetadata", "zarr.json"):
            file.write_text("{")
    with pytest.raises(InputError, match=r"cells\.zarr"):
        geneformer().encode(path)


@pytest.mark.parametrize("name", ["h5ad", "h5mu", "10x-h5-3", "h5ad-by-genes"])
def test_parts_that_do_not_fit(name: str, tmp_path: Path) -> None:
    """Indices outside the matrix, ends that do not match, sizes that contradict the names, missing parts."""
    place = {"h5mu": "mod/rna/X", "10x-h5-3": "matrix"}.get(name, "X")
    for number, part in enumerate(("indices", "negative", "indptr", "data", "names")):
        (folder := tmp_path / f"{number}").mkdir()
        path = FORMATS[name](folder, golden())
        with h5py.File(path, "r+") as file:
            group = file[place]
            if part == "indices":
                group["indices"][3] = 10_000
            elif part == "negative":
                group["indices"][3] = -1
            elif part == "indptr":
                group["indptr"][-1] = group["indptr"][-1] - 1
            elif part == "data":
                del group["data"]
            elif name == "10x-h5-3":
                del group["barcodes"]
                group["barcodes"] = np.array(["a", "b"], dtype="S")
            else:
                del group.parent["obs"]
                write_elem(group.parent, "obs", pd.DataFrame(index=["a", "b"]))
        with pytest.raises(InputError, match=path.name) as caught:
            geneformer().encode(path)
        assert "\n" not in str(caught.value)


def test_damage_behind_the_first_blocks(tmp_path: Path) -> None:
    """A chunk that cannot be unpacked is met while blocks are being read."""
    x = sp.csr_matrix(sp.random(6000, 30, 0.5, "csr", random_state=0))
    x.data = np.random.default_rng(0).integers(1, 50, x.nnz).astype(np.float32)
    data = ad.AnnData(x, var=pd.DataFrame(index=golden().var_names[:30]))
    path = tmp_path / "cells.h5ad"
    with h5py.File(path, "w") as file:
        write_elem(file, "obs", data.obs)
        write_elem(file, "var", data.var)
        write_elem(file, "X", data.X, dataset_kwargs={"compression": "gzip", "chunks": (1000,)})
        # In no stretch of the sample
        at = int(x.indptr[1200]) // 1000
        place = file["X/data"].id.get_chunk_info(at)
    with path.open("r+b") as raw:
        raw.seek(place.byte_offset)
        raw.write(b"\xff" * place.size)
    with pytest.raises(InputError, match=r"cells\.h5ad cannot be read"):
        geneformer().encode(path)


# What is refused


def test_transposed_tables(tmp_path: Path) -> None:
    genes = ["MALAT1", "B2M", "RPL13", "XYZ1"]
    frame = pd.DataFrame(np.arange(12).reshape(3, 4), index=["AAAC-1", "AAAG-1", "AAAT-1"], columns=genes)
    model = cf.load("pca", options={"n_components": 1})
    frame.to_csv(tmp_path / "right.csv")
    assert model.encode(tmp_path / "right.csv").shape == (3, 1)
    for names in (genes, ["ENSG00000251562", "ENSMUSG00000060802.3", "ENSG00000167526", "ERCC-1"]):
        frame.set_axis(names, axis=1).T.to_csv(tmp_path / "wrong.csv")
        with pytest.raises(
            InputError, match=rf"wrong.csv looks transposed: its first column names genes \({names[0]}.*AAAC-1.*\.T\.to_csv"
        ):
            model.encode(tmp_path / "wrong.csv")


def test_mtx_that_is_incomplete(tmp_path: Path) -> None:
    path = mtx(2)(tmp_path, golden())
    (path / "genes.tsv").rename(path / "other.tsv")
    with pytest.raises(InputError, match=r"has no features.tsv or genes.tsv"):
        geneformer().encode(path)
    with pytest.raises(InputError, match=r"no matrix.mtx.*did you mean .*filtered_feature_bc_matrix"):
        geneformer().encode(tmp_path)
    (path / "genes.tsv").write_text("a\tb\n")
    with pytest.raises(InputError, match=r"genes.tsv names 1 genes"):
        geneformer().encode(path)
    (path / "other.tsv").rename(path / "genes.tsv")
    lines = (path / "matrix.mtx").read_text().splitlines(keepends=True)
    for changed, said in (
        (lines[:-1], "were announced"),
        ([*lines[:-1], "9999 1 1\n"], "outside the matrix"),
        ([*lines[:-1], "1 x 1\n"], "cannot be read"),
        ([lines[0].replace("coordinate", "array"), *lines[1:]], "expected '%%MatrixMarket matrix coordinate"),
        ([lines[0].replace("general", "symmetric"), *lines[1:]], "symmetric"),
    ):
        (path / "matrix.mtx").write_text("".join(changed))
        with pytest.raises(InputError, match=said) as caught:
            geneformer().encode(path)
        assert str(path / "matrix.mtx") in str(caught.value)


def test_other_hdf5_files(tmp_path: Path) -> None:
    for suffix, said in (
        (".h5ad", "no obs and no var"),
        (".h5mu", "no modality 'rna'"),
        (".loom", "no matrix"),
        (".h5", "not a feature-barcode matrix"),
    ):
        with h5py.File(path := tmp_path / f"other{suffix}", "w") as file:
            file["something"] = 1
        with pytest.raises(InputError, match=rf"{path.name}.*{said}"):
            geneformer().encode(path)
    with h5py.File(path := tmp_path / "two.h5", "w") as file:
        for genome in ("hg19", "mm10"):
            file[f"{genome}/genes"], file[f"{genome}/barcodes"] = [1], [1]
    with pytest.raises(InputError, match=r"2 genomes \(hg19, mm10\)"):
        geneformer().encode(path)
    path = tenx_h5(3)(tmp_path, golden())
    with h5py.File(path, "r+") as file:
        file["matrix/features/feature_type"][:] = b"Peaks"
    with pytest.raises(InputError, match="no features of type 'Gene Expression', but 'Peaks'"):
        geneformer().encode(path)
    for name in ("cells.rds", "cells.xlsx"):
        (tmp_path / name).write_text("x")
        with pytest.raises(InputError, match=r"\.(rds|xlsx) is none of the formats that can be read"):
            geneformer().encode(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder with no matrix"):
        geneformer().encode(tmp_path / "empty")


# Results


def test_annotation_of_cells_is_kept(tmp_path: Path) -> None:
    """Where the format has one."""
    for name in ("zarr-2", "h5mu", "loom", "mtx-2", "csv"):
        (folder := tmp_path / name).mkdir()
        source, out = FORMATS[name](folder, golden()), folder / "result.h5ad"
        cf.embed_file(source, "geneformer", out=out, key_added="X", checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="float32")
        written = ad.read_h5ad(out)
        np.testing.assert_array_equal(written.obsm["X"], expected())
        assert written.obs_names.tolist() == golden().obs_names.tolist()
        assert ("kind" in written.obs) == (name in ("zarr-2", "h5mu", "loom"))


def test_command_line(tmp_path: Path) -> None:
    """Folders are taken too, and the result stands beside them."""
    done = cellfm("embed", mtx(3)(tmp_path, golden()), "--model", "pca", "--option", "n_components=5")
    assert done.returncode == 0, done.stderr
    assert ad.read_h5ad(tmp_path / "filtered_feature_bc_matrix.pca.h5ad").obsm["X_pca"].shape == (golden().n_obs, 5)
    assert_fails(cellfm("embed", tmp_path, "--model", "kmer"), "is a folder")


@pytest.mark.parametrize(
    ("data", "out"),
    [
        ("cells.zarr", "cells.pca.h5ad"),
        ("outs", "outs.pca.h5ad"),
        ("sample.1", "sample.1.pca.h5ad"),
        ("cells.csv.gz", "cells.pca.h5ad"),
        ("a.b.h5ad", "a.b.pca.h5ad"),
    ],
)
def test_default_output(tmp_path: Path, data: str, out: str) -> None:
    if "." not in data or data.endswith((".zarr", ".1")):
        (tmp_path / data).mkdir()
    assert _default_output(tmp_path / data, "pca", ".h5ad") == tmp_path / out
