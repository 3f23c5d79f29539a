"""HDF5 files and zarr stores that would run code, or read what nobody gave, are refused in one line before a value is read."""

import json
import os
import pickle  # noqa: TID251 - to make the stores that must be refused
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scanpy as sc
import zarr

import cellfm_hub as cf
from cellfm_hub import pl
from cellfm_hub.errors import InputError
from cellfm_hub.sources.safe_stores import KNOWN_CODECS, open_hdf5, open_zarr
from file_runs import CELLS, vectors, write_cells
from test_cli import assert_fails, cellfm
from test_formats import FORMATS, GENEFORMER, expected, geneformer, golden, h5ad

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata:UserWarning"),
]

SECRET = "not yours to read\n"


def refused(action: Callable[[], object], *fragments: str) -> None:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in ("is refused", *fragments):
        assert fragment in message


# HDF5


def external_storage(group: h5py.Group, name: str, secret: Path) -> None:
    group.create_dataset(name, (1,), f"S{len(SECRET)}", external=[(str(secret), 0, len(SECRET))])


def external_link(group: h5py.Group, name: str, secret: Path) -> None:
    with h5py.File(other := secret.with_suffix(".h5"), "a") as file:
        file.require_dataset("values", (1,), "f4")
    group[name] = h5py.ExternalLink(str(other), "values")


def virtual(group: h5py.Group, name: str, secret: Path) -> None:
    external_link(group, f"{name}-source", secret)
    del group[f"{name}-source"]
    layout = h5py.VirtualLayout((1,), "f4")
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "values", (1,))
    group.create_virtual_dataset(name, layout)


KINDS = {"external-storage": external_storage, "external-link": external_link, "virtual": virtual}
SAYS = {"external-storage": "secret", "external-link": "secret.h5", "virtual": "virtual"}
HDF5_FORMATS = ["h5ad", "h5ad-dense-packed", "h5ad-by-genes", "h5mu", "10x-h5-2", "10x-h5-3", "loom"]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


def reaching_out(path: Path, secret: Path, kind: str, place: str = "somewhere/deep") -> Path:
    with h5py.File(path, "a") as file:
        group, _, name = place.rpartition("/")
        KINDS[kind](file.require_group(group or "/"), name, secret)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HDF5_FORMATS)
def test_every_reader(name: str, kind: str, tmp_path: Path, secret: Path) -> None:
    """Wherever it stands, also where nobody would look."""
    path = reaching_out(FORMATS[name](tmp_path, golden()), secret, kind)
    refused(lambda: geneformer().encode(path), path.name, "'somewhere/deep'", SAYS[kind])
    refused(lambda: cf.check(path, "pca"), "'somewhere/deep'")
    refused(lambda: cf.explain(path, "geneformer", cell=0, checkpoint=GENEFORMER / "checkpoint"), "'somewhere/deep'")
    np.testing.assert_array_equal(geneformer().encode(FORMATS[name](make(tmp_path / "good"), golden())), expected())


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", ".parquet", ".npy", "in place"])
def test_nothing_is_copied_into_a_result(suffix: str, tmp_path: Path, secret: Path) -> None:
    """As a column of ``obs``, a foreign file would go whole into the result."""
    data = write_cells(tmp_path / "cells.h5ad", 1)
    with h5py.File(data, "a") as file:
        external_storage(file["obs"], "note", secret)
        file["obs/note"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        file["obs"].attrs["column-order"] = np.array(["batch", "note"], dtype=h5py.string_dtype())
    before = data.read_bytes()
    out = data if suffix == "in place" else tmp_path / f"out{suffix}"
    refused(lambda: cf.embed_file(data, "scgpt", out=out, **CELLS), "obs/note", str(secret))
    assert data.read_bytes() == before
    assert suffix == "in place" or not out.exists()
    assert SECRET.encode() not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p != secret)


def test_on_the_command_line(tmp_path: Path, secret: Path) -> None:
    data = reaching_out(h5ad(tmp_path, golden()), secret, "external-storage", "uns/x")
    model = ["--model", "geneformer", "--checkpoint", GENEFORMER / "checkpoint"]
    for command in (["embed", data, *model], ["check", data], ["explain", data, *model, "--cell", "0"], ["plot", data]):
        assert_fails(cellfm(*command, cwd=tmp_path), "is refused", "'uns/x'")


@pytest.mark.parametrize("kind", KINDS)
def test_legacy_file(kind: str, tmp_path: Path, secret: Path) -> None:
    old = shutil.copy(Path(sc.__file__).parent / "datasets/10x_pbmc68k_reduced.h5ad", tmp_path / "old.h5ad")
    Path(old).chmod(0o644)
    reaching_out(Path(old), secret, kind)
    refused(lambda: cf.load("pca").encode(old), "'somewhere/deep'")


@pytest.mark.parametrize("kind", KINDS)
def test_backed_object(kind: str, tmp_path: Path, secret: Path) -> None:
    backed = ad.read_h5ad(reaching_out(h5ad(tmp_path, golden()), secret, kind), backed="r")
    refused(lambda: geneformer().encode(backed), "'somewhere/deep'")
    backed.file.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".h5ad", "in place"])
def test_results_that_are_read_back(suffix: str, kind: str, tmp_path: Path, secret: Path) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 20)
    out = data if suffix == "in place" else tmp_path / "out.h5ad"
    cf.embed_file(data, "scgpt", out=out, **CELLS)
    reaching_out(out, secret, kind, "obsm/X_other")
    before = out.read_bytes()
    for how in ({"update": True}, {"resume": True}):
        refused(lambda how=how: cf.embed_file(data, "scgpt", out=out, **how, **CELLS), "'obsm/X_other'")  # type: ignore[misc]
    refused(lambda: pl.umap(out, color="batch"), "'obsm/X_other'")
    assert out.read_bytes() == before


def test_in_place_into_what_is_no_file_of_cells(tmp_path: Path) -> None:
    (data := tmp_path / "cells.h5ad").write_text("not HDF5")
    with pytest.raises(InputError, match=r"cells\.h5ad cannot be read"):
        cf.embed_file(data, "pca", out=data)


def test_merged_into_a_file_that_reaches_out(tmp_path: Path, secret: Path) -> None:
    data = write_cells(tmp_path / "cells.h5ad", 8)
    cf.embed_file(data, "scgpt", out=tmp_path / "out.h5ad", shard=(1, 1), **CELLS)
    reaching_out(data, secret, "external-storage")
    refused(lambda: cf.merge(tmp_path / "out.h5ad"), "'somewhere/deep'")


def test_links_inside_a_file_are_fine(tmp_path: Path) -> None:
    """Second names, circles, paths, and paths that lead nowhere."""
    path = h5ad(tmp_path, golden())
    with h5py.File(path, "a") as file:
        group = file.create_group("uns/a")
        group["itself"] = group
        group["root"] = file["/"]
        group["second-name"] = file["X/data"]
        group["path"] = h5py.SoftLink("/uns/a/root/X/indices")
        group["nowhere"] = h5py.SoftLink("/nowhere")
        file.move("var", "genes")
        file["var"] = h5py.SoftLink("/genes")
    np.testing.assert_array_equal(geneformer().encode(path), expected())


def test_behind_circles_and_odd_names(tmp_path: Path, secret: Path) -> None:
    path = h5ad(tmp_path, golden())
    with h5py.File(path, "a") as file:
        group = file["uns"].create_group("a\nb")
        group["back"] = file["uns"]
    refused(lambda: open_hdf5(reaching_out(path, secret, "external-link", "uns/a\nb/c")), r"uns/a\nb/c")


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_every_object_is_looked_at(libver: str, tmp_path: Path, secret: Path) -> None:
    """Among many, in the old and the new layout of groups; any one of them."""
    path = tmp_path / "many.h5ad"
    for wrong in (0, 137, 299):
        with h5py.File(path, "w", libver=libver) as file:
            for i in range(300):
                external_storage(file, f"d{i}", secret) if i == wrong else file.create_dataset(f"d{i}", data=[i])
        refused(lambda: open_hdf5(path), f"'d{wrong}'")


def test_a_filter_that_is_not_installed(tmp_path: Path) -> None:
    """The user's environment decides which filters there are: where one lacks, one line says so."""
    path = h5ad(tmp_path, golden())
    with h5py.File(path, "a") as file:
        values = file["X/data"][:]
        del file["X/data"]
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk(values.shape)
        creation.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_OPTIONAL, (4,))
        h5py.Dataset(h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple(values.shape), creation))[:] = (
            values
        )
    content = path.read_bytes()
    assert content.count(b"deflate\x00") == 1
    at = content.index(b"deflate\x00") - 8  # its number stands before its name
    path.write_bytes(content[:at] + (32_123).to_bytes(2, "little") + content[at + 2 :])
    with pytest.raises(InputError, match=r"cells\.h5ad.*HDF5_PLUGIN_PATH") as caught:
        geneformer().encode(path)
    assert "\n" not in str(caught.value)


# Zarr


class _Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


@pytest.fixture
def old_numcodecs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer ones run a pickle only when told to."""
    import numcodecs.pickles

    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)


def changed(path: Path, place: str, change: dict[str, Any], *, gathered: bool = True, own: bool = True) -> Path:
    """Change the description of an array: its own, and that in the summary of the store."""
    descriptions = [(path / ".zmetadata", ["metadata", f"{place}/.zarray"]), (path / place / ".zarray", [])]
    if (path / "zarr.json").is_file():
        descriptions = [(path / "zarr.json", ["consolidated_metadata", "metadata", place]), (path / place / "zarr.json", [])]
    for (file, keys), wanted in zip(descriptions, (gathered, own), strict=True):
        content = json.loads(file.read_text())
        inner = content
        for key in keys:
            inner = inner[key]
        if wanted:
            inner |= change
        file.write_text(json.dumps(content))
    return path


PICKLES: list[dict[str, Any]] = [
    {"compressor": {"id": "pickle"}},
    {"compressor": None, "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}]},
]


@pytest.mark.usefixtures("old_numcodecs")
@pytest.mark.parametrize("change", PICKLES, ids=["compressor", "filter"])
@pytest.mark.parametrize("where", [{}, {"own": False}, {"gathered": False}], ids=["both", "summary", "array"])
def test_a_pickle_is_not_run(change: dict[str, Any], where: dict[str, bool], tmp_path: Path) -> None:
    path = changed(FORMATS["zarr-2"](tmp_path, golden()), "obs/_index", change, **where)
    for chunk in (path / "obs/_index").glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(_Malicious(tmp_path / "canary")))
    if where.get("gathered") is False:
        (path / ".zmetadata").unlink()
    for action in (
        lambda: cf.check(path),
        lambda: geneformer().encode(path),
        lambda: cf.embed_file(path, "pca", out=tmp_path / "out.zarr"),
    ):
        refused(action, "cells.zarr", "'obs/_index'", "'pickle'", "blosc")
    assert not (tmp_path / "canary").exists()


CODECS_3: list[Any] = [
    {"name": "mine"},
    "mine",
    {"name": "numcodecs.mine", "configuration": {}},
    {"name": "numcodecs.zlib", "configuration": {"id": "mine"}},
    {"name": "sharding_indexed", "configuration": {"codecs": [{"name": "bytes"}, {"name": "mine"}], "index_codecs": [{"name": "bytes"}]}},
    {"name": "sharding_indexed", "configuration": {"codecs": [{"name": "bytes"}], "index_codecs": [{"name": "mine"}]}},
]


@pytest.mark.parametrize("codec", CODECS_3, ids=str)
@pytest.mark.parametrize("where", [{}, {"own": False}, {"gathered": False}], ids=["both", "summary", "array"])
def test_unknown_codecs(codec: Any, where: dict[str, bool], tmp_path: Path) -> None:
    path = changed(FORMATS["zarr-3"](tmp_path, golden()), "X/data", {"codecs": [codec]}, **where)
    refused(lambda: geneformer().encode(path), "'X/data'", "mine")


def test_unknown_codecs_of_the_other_format(tmp_path: Path) -> None:
    """A summary of format 3 may describe arrays of format 2; and nobody need look where the summary does not."""
    path = FORMATS["zarr-3"](tmp_path, golden())
    changed(path, "X/data", {"zarr_format": 2, "compressor": {"id": "mine"}, "codecs": []}, own=False)
    refused(lambda: open_zarr(path), "'X/data'", "'mine'")
    (unlisted := path / "uns/more/unlisted").mkdir(parents=True)
    (unlisted / "ZARR.JSON").write_text(json.dumps({"codecs": [{"name": "other"}]}))
    changed(path, "X/data", {"compressor": None}, own=False)
    refused(lambda: open_zarr(path), "'uns/more/unlisted'", "'other'")


def test_words_of_others_are_no_codecs(tmp_path: Path) -> None:
    """Attributes, and names of groups and arrays."""
    for version in (2, 3):
        (folder := tmp_path / str(version)).mkdir()
        data = ad.AnnData(golden().X, obs=golden().obs, var=golden().var)
        for name in ("codecs", "filters", "compressor", "metadata", "attributes"):
            data.uns[name] = {"codecs": "mine", "filters": np.ones(2)}
        with ad.settings.override(zarr_write_format=version):
            data.write_zarr(path := folder / "cells.zarr")
        group = zarr.open_group(path, mode="r+", use_consolidated=False)
        group.attrs["codecs"] = group.attrs["filters"] = [{"id": "mine"}]
        group["X/data"].attrs["compressor"] = {"id": "mine"}
        zarr.consolidate_metadata(path)
        np.testing.assert_array_equal(geneformer().encode(path), expected())


@pytest.mark.parametrize("name", ["../outside", "/outside", "obs/../../outside"])
def test_a_summary_of_places_outside(name: str, tmp_path: Path) -> None:
    for kind in ("zarr-2", "zarr-3"):
        path = FORMATS[kind](make(tmp_path / kind), golden())
        file = path / (".zmetadata" if kind == "zarr-2" else "zarr.json")
        content = json.loads(file.read_text())
        gathered = content["metadata"] if kind == "zarr-2" else content["consolidated_metadata"]["metadata"]
        gathered[name + ("/.zarray" if kind == "zarr-2" else "")] = gathered["X/data/.zarray" if kind == "zarr-2" else "X/data"]
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"outside its folder") as caught:
            geneformer().encode(path)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Numcodecs codecs:UserWarning")
@pytest.mark.parametrize(
    "codecs",
    [
        {"compressors": None},
        {"compressors": zarr.codecs.GzipCodec()},
        {"compressors": [zarr.codecs.BloscCodec(), zarr.codecs.Crc32cCodec()]},
        {"compressors": zarr.codecs.ZstdCodec(), "shards": "whole"},
        {"compressors": {"name": "numcodecs.lzma", "configuration": {}}},
        {
            "filters": {"name": "numcodecs.delta", "configuration": {"dtype": "<i4"}},
            "compressors": {"name": "numcodecs.bz2", "configuration": {}},
        },
    ],
    ids=["none", "gzip", "blosc and crc32c", "zstd in shards", "lzma", "delta and bz2"],
)
def test_known_codecs(codecs: dict[str, Any], tmp_path: Path) -> None:
    path = FORMATS["zarr-3"](tmp_path, golden())
    indices = golden().X.indices.astype(np.int32)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)["X"]
    del group["indices"]
    if "shards" in codecs:
        chunk = len(indices) // 8 + 1
        codecs = codecs | {"chunks": (chunk,), "shards": (8 * chunk,)}
    group.create_array("indices", data=indices, **codecs)
    zarr.consolidate_metadata(path)
    np.testing.assert_array_equal(geneformer().encode(path), expected())


@pytest.mark.parametrize("name", ["zarr-2", "zarr-3"])
def test_symbolic_links_in_a_store(name: str, tmp_path: Path, secret: Path) -> None:
    """The store itself may be one."""
    path = FORMATS[name](tmp_path, golden())
    (by_another_name := tmp_path / "link.zarr").symlink_to(path)
    np.testing.assert_array_equal(geneformer().encode(by_another_name), expected())
    chunk = next(p for p in sorted((path / "obs").rglob("*")) if p.is_file() and not p.name.startswith((".", "zarr")))
    shutil.copy(chunk, tmp_path / "chunk")
    for place, target in (
        (chunk, tmp_path / "chunk"),
        (chunk.with_name("99"), secret),
        (path / "uns/more", tmp_path),
        (path / "x", Path("no")),
    ):
        kept = place.read_bytes() if place.exists() else None
        place.unlink(missing_ok=True)
        place.symlink_to(target)
        for given in (path, by_another_name):
            refused(lambda given=given: geneformer().encode(given), "is a link", place.name)  # type: ignore[misc]
        place.unlink()
        if kept is not None:
            place.write_bytes(kept)
    os.mkfifo(path / "pipe")
    refused(lambda: geneformer().encode(path), "'pipe'", "neither a file nor a folder")


@pytest.mark.parametrize("change", ["codec", "link"])
def test_zarr_results_that_are_read_back(change: str, tmp_path: Path, secret: Path) -> None:
    data, out = write_cells(tmp_path / "cells.h5ad", 20), tmp_path / "out.zarr"
    cf.embed_file(data, "scgpt", out=out, **CELLS)
    before = vectors(out, "X_scgpt")
    if change == "link":
        (out / "obsm/more").symlink_to(secret)
    else:
        description = {"codecs": [{"name": "mine"}]} if (out / "zarr.json").exists() else {"compressor": {"id": "mine"}}
        changed(out, "obsm/X_scgpt", description)
    says = "obsm/more" if change == "link" else "mine"
    for how in ({"update": True}, {"resume": True}):
        refused(lambda how=how: cf.embed_file(data, "scgpt", out=out, **how, **CELLS), says)  # type: ignore[misc]
    refused(lambda: pl.umap(out, color="batch"), says)
    refused(lambda: cf.embed_file(out, "scgpt", out=tmp_path / "again.npy", **CELLS), says)
    cf.embed_file(data, "scgpt", out=out, overwrite=True, **CELLS)
    np.testing.assert_array_equal(vectors(out, "X_scgpt"), before)


def test_a_plot_of_a_damaged_store(tmp_path: Path) -> None:
    for path in (tmp_path / "empty.zarr", tmp_path / "file.zarr"):
        path.mkdir() if path.stem == "empty" else path.write_bytes(b"PK\x03\x04")
        with pytest.raises(InputError, match=rf"{path.name}.*cannot be read") as caught:
            pl.umap(path)
        assert "\n" not in str(caught.value)


def test_codecs_that_run_code_are_not_known() -> None:
    assert KNOWN_CODECS.isdisjoint({"pickle", "msgpack2", "vlen-array"})


# All of the hub


def sources() -> Iterator[Path]:
    package = Path(cf.__file__).parent
    yield from package.rglob("*.py")
    yield from (package.parents[1] / "adapters").rglob("*.py")


def test_nobody_opens_stores_otherwise() -> None:
    """A new reader goes through the same door. What writes our own files is listed."""
    writers = {"in_place.py": 2, "testing.py": 1, "sinks.py": 1, "safe_stores.py": 2}
    opening = re.compile(r"h5py\.File\(|zarr\.open\w*\(|read_h5ad\(|read_zarr\(|read_10x_\w+\((?!…)|read_loom\(")
    found = {path.name: len(hits) for path in sources() if (hits := opening.findall(path.read_text()))}
    examples = {"datasets.py", "train_cell.py", "make_tables.py", "anndata_store.py"}  # files of ours; and one that was looked through
    assert {name: n for name, n in found.items() if name not in examples} == writers
