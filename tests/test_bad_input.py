"""Bad input is refused in one line that names what came, what was expected and what to do."""

import json
import pickle  # noqa: TID251 - to make the files that must be refused
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

import cellfm_hub as cf
from cellfm_hub import errors
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.registry import registry
from cellfm_hub.safe_files import read_pickled_dict, read_tensors
from golden_cases import PORTABLE

GENEFORMER = PORTABLE / "geneformer-v2-basic"
NT = PORTABLE / "nt-v1-basic"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a Geneformer checkpoint, to be damaged."""
    return Path(shutil.copytree(GENEFORMER / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture
def adata() -> ad.AnnData:
    return ad.read_h5ad(GENEFORMER / "input.h5ad")


def load(checkpoint: Path = GENEFORMER / "checkpoint", **options: Any) -> cf.Embedder:
    return cf.load("geneformer", checkpoint=checkpoint, device="cpu", **{"precision": "float32"} | options)


def load_nt(**options: Any) -> cf.Embedder:
    return cf.load("nt", checkpoint=NT / "checkpoint", device="cpu", precision="float32", **options)


def assert_refused(action: Callable[[], object], kind: type[Exception], *fragments: str) -> None:
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_unknown_model() -> None:
    assert_refused(lambda: cf.load("genefomer"), errors.ModelNotFoundError, "'genefomer'", "'geneformer'", "cellfm models")


def test_no_internet() -> None:
    """The exact file, its size, and the place to put it."""
    assert_refused(
        lambda: cf.load("geneformer-v2-104m"),
        errors.WeightsUnavailableError,
        "Geneformer-V2-104M/config.json",
        "05fcbeb8a27d49e0a7a4349152202ee2c1cbfd28",
        "offline",
        str(cf.settings.cache_dir / "models" / "geneformer-v2-104m" / "Geneformer-V2-104M" / "config.json"),
        "checkpoint=",
    )


def test_no_internet_although_online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a connection the answer comes at once, and is the same."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with cf.settings.override(offline=False):
        assert_refused(
            lambda: cf.load("geneformer-v2-104m"),
            errors.WeightsUnavailableError,
            "no internet connection",
            "Geneformer-V2-104M/model.safetensors (417.6 MB)",
            "token_dictionary_gc104M.pkl",
        )


def test_revision_never_seen() -> None:
    assert_refused(lambda: cf.load("nt-v2-500m-multi-species"), errors.WeightsUnavailableError, "revision=")


def test_file_brought_by_hand() -> None:
    """A file put where the message says is found; a wrong one is refused by its hash."""
    place = cf.settings.cache_dir / "models" / "geneformer-v2-104m"
    weights = place / "Geneformer-V2-104M"
    weights.mkdir(parents=True)
    shutil.copy(GENEFORMER / "checkpoint/config.json", weights)
    shutil.copy(GENEFORMER / "checkpoint/model.safetensors", weights)
    assert_refused(lambda: cf.load("geneformer-v2-104m"), errors.ChecksumError, "model.safetensors", "fff5cba2", "fetch it again")


def test_checkpoint_folder_missing(tmp_path: Path) -> None:
    assert_refused(lambda: load(tmp_path / "nowhere"), errors.WeightsUnavailableError, "nowhere", "expected a folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_folder_lacking_one_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_refused(lambda: load(folder), errors.WeightsUnavailableError, name, str(folder))


def test_folder_lacking_dictionaries(folder: Path) -> None:
    shutil.rmtree(folder / "geneformer")
    assert_refused(lambda: load(folder), errors.CheckpointFormatError, "274", "dictionaries")


def test_misshapen_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = "bert.encoder.layer.0.output.dense.weight"
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    assert_refused(lambda: load(folder), errors.CheckpointFormatError, key, "(31, 128)", "(32, 128)")


def test_missing_and_unknown_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.pooler.dense.weight"] = tensors.pop("bert.embeddings.LayerNorm.bias")
    save_file(tensors, folder / "model.safetensors")
    assert_refused(
        lambda: load(folder), errors.CheckpointFormatError, "missing: bert.embeddings.LayerNorm.bias", "not known: bert.pooler.dense.weight"
    )


def test_dictionaries_of_another_generation() -> None:
    options = {"dictionaries": PORTABLE / "geneformer-v1-basic/checkpoint/geneformer/gene_dictionaries_30m"}
    assert_refused(lambda: load(options=options), errors.CheckpointFormatError, "274", "272", "different generations")


def test_lfs_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    assert_refused(lambda: load(folder), errors.CheckpointFormatError, "Git LFS pointer", "git lfs pull")
    (folder / "geneformer/token_dictionary_gc104M.pkl").write_text(pointer)
    assert_refused(lambda: read_pickled_dict(folder / "geneformer/token_dictionary_gc104M.pkl"), errors.CheckpointFormatError, "Git LFS")


class Malicious:
    """A pickle that would run code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_that_runs_code(folder: Path, tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    path = folder / "geneformer" / "token_dictionary_gc104M.pkl"
    path.write_bytes(pickle.dumps({"ENSG1": Malicious(canary)}, protocol=protocol))
    assert_refused(lambda: load(folder), errors.CheckpointFormatError, "refused", "asks for")
    assert not canary.exists()


def test_weights_that_run_code(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    torch.save({"bert.embeddings.LayerNorm.bias": Malicious(canary)}, folder / "pytorch_model.bin")
    assert_refused(lambda: load(folder), errors.CheckpointFormatError, "pytorch_model.bin")
    assert not canary.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({1: 2}), pickle.dumps({"a": [1]})]
)
def test_other_pickles(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(content)
    assert_refused(lambda: read_pickled_dict(path), errors.CheckpointFormatError, str(path))


def test_pickled_numpy_numbers(tmp_path: Path) -> None:
    """What the published dictionaries hold is read exactly, either byte order."""
    content = {"a": np.float64(0.1), "b": np.int16(-3), "c": 7, "d": "text", "e": np.array(2.5, dtype=">f8")[()]}
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(pickle.dumps(content, protocol=4))
    assert read_pickled_dict(path) == {"a": 0.1, "b": -3, "c": 7, "d": "text", "e": 2.5}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_tensor_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 cut short")
    assert_refused(lambda: read_tensors(path), errors.CheckpointFormatError, str(path), "download it again")


def test_shard_missing_or_outside(tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "shard-1.bin"}}')
    assert_refused(lambda: read_tensors(index), errors.CheckpointFormatError, "shard-1.bin")
    index.write_text('{"weight_map": {"a": "../../outside.bin"}}')
    assert_refused(lambda: read_tensors(index), errors.CheckpointFormatError, "outside its own folder")


def test_no_file_outside_is_hashed_as_a_shard(folder: Path, tmp_path: Path) -> None:
    """What an index names is looked at for more than reading: its hash goes into the receipt."""
    (tmp_path / "secret").write_text("not yours to read")
    index = folder / "model.safetensors.index.json"
    for name in ("../secret", str(tmp_path / "secret")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        files = CheckpointFiles(registry().find("geneformer"), folder)
        assert_refused(lambda f=files: f.weights_sha256(index), errors.CheckpointFormatError, "outside its own folder")  # type: ignore[misc]


def test_options() -> None:
    assert_refused(lambda: cf.load("kmer", options={"kk": 3}), errors.InputError, "'kk'", "k=4")
    assert_refused(lambda: cf.load("kmer", options={"k": 99}), errors.InputError, "k=99")
    assert_refused(lambda: load_nt(options={"case": "lower"}), errors.InputError, "'lower'", "upper", "as-is")
    assert_refused(lambda: cf.load("pca", checkpoint="x"), errors.InputError, "no weights")
    assert_refused(lambda: cf.load("kmer", device="tpu0"), errors.DeviceError, "tpu0", "'cpu'")
    assert_refused(lambda: load(precision="int8"), errors.InputError, "int8", "float32")


def test_encode_options(adata: ad.AnnData) -> None:
    model = load()
    assert_refused(lambda: model.encode(adata, pooling="median"), errors.InputError, "'median'", "'cls'", "'mean'")
    assert_refused(lambda: model.encode(adata, output_layer=7), errors.InputError, "7", "-3")
    assert_refused(lambda: model.encode(adata, recipe="las"), errors.InputError, "'last'")
    assert_refused(lambda: model.encode(adata, level="token"), errors.InputError, "'gene'")
    assert_refused(lambda: model.encode(adata, long="tile"), errors.InputError, "long")
    assert_refused(lambda: model.encode(adata, species="mouse"), errors.SpeciesError, "mouse", "human")
    assert_refused(lambda: model.encode(adata, gene_ids="nope"), errors.InputError, "'nope'", "ensembl_id")
    assert_refused(lambda: model.encode(adata, layer="nope"), errors.InputError, "nope", "X")
    assert_refused(lambda: model.encode(adata, batch_tokens=0), errors.InputError, "batch_tokens=0")
    assert_refused(lambda: load_nt().encode(["ACGT"], layer="counts"), errors.InputError, "layer")
    assert_refused(lambda: load_nt().encode(["ACGT"], long="cut"), errors.InputError, "'cut'", "'tile'")  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        model.encode(adata, poling="cls")  # type: ignore[call-overload]


def test_genes_that_match_nothing(adata: ad.AnnData) -> None:
    adata.var["ensembl_id"] = [f"g{i}" for i in range(adata.n_vars)]
    assert_refused(lambda: load().encode(adata), errors.GeneCoverageError, "none of the 189 genes", "g0", "gene_ids=")


@pytest.mark.parametrize(("value", "said"), [(-1.0, "negative"), (np.nan, "NaN"), (np.inf, "infinite"), (0.5, "whole numbers")])
def test_not_counts(adata: ad.AnnData, value: float, said: str) -> None:
    adata.X = adata.X.toarray()
    adata.X[3, 5] = value
    for model in (load(), cf.load("pca")):
        refused = adata.copy()
        assert_refused(lambda m=model, a=refused: m.encode(a), errors.CountsError, said, adata.obs_names[3], adata.var_names[5], "layer=")  # type: ignore[misc]
    # Another matrix of the same object that does hold counts is found.
    adata.layers["counts"] = np.nan_to_num(np.abs(np.rint(np.clip(adata.X, 0, 1e6))))
    model = load()
    model.encode(adata)
    assert model.receipt is not None
    assert model.receipt["counts_from"] == "layers['counts']"


def test_not_counts_in_a_later_block(adata: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is looked at, not only those of the first cells."""
    many = ad.concat([adata] * 100, index_unique="-")
    many.var = adata.var
    many.X = many.X.astype(np.float32)
    many.X.data[-1] = 0.5
    assert_refused(lambda: load().encode(many), errors.CountsError, "whole numbers")


def test_empty_anndata(adata: ad.AnnData) -> None:
    for empty in (adata[:0].copy(), adata[:, :0].copy(), ad.AnnData()):
        assert_refused(lambda e=empty: load().encode(e), errors.InputError, "nothing to embed")  # type: ignore[misc]


def test_all_cells_empty(adata: ad.AnnData) -> None:
    adata.X = adata.X * 0
    vectors = load().encode(adata)
    assert np.isnan(vectors).all()
    assert_refused(lambda: cf.load("pca").encode(adata), errors.InputError, "empty")


def test_empty_cell(adata: ad.AnnData) -> None:
    """One row fails alone."""
    model = load()
    vectors = model.encode(adata)
    assert np.isnan(vectors[[7, 8]]).all()
    assert np.isfinite(np.delete(vectors, [7, 8], axis=0)).all()
    assert model.receipt is not None
    assert model.receipt["n_empty"] == 2
    assert_refused(lambda: model.encode(adata, on_empty="error"), errors.InputError, adata.obs_names[7], "on_empty='nan'")


def test_sequences() -> None:
    model = load_nt()
    assert_refused(lambda: model.encode(["ACGT", ""]), errors.SequenceError, "'1'", "empty")
    assert_refused(lambda: model.encode({"p53": "MEEPQSDPSV"}), errors.SequenceError, "'p53'", "'E'", "position 2", "Proteins")
    assert_refused(lambda: model.encode(["ACGT ACGT"]), errors.SequenceError, "' '", "position 5")
    assert_refused(lambda: model.encode([]), errors.SequenceError, "no sequences")
    assert_refused(lambda: model.encode(["ACGT", 5]), errors.SequenceError, "int")
    assert_refused(lambda: model.encode("ACGTACGT"), errors.InputError, "list")
    assert_refused(lambda: model.encode(pd.DataFrame({"a": ["ACGT"]})), errors.InputError, "DataFrame")
    assert_refused(lambda: model.encode(["ACGTAC" * 256]), errors.SequenceError, "1,536 bases", "257 tokens", "256", "'truncate'", "'tile'")


def test_wrong_kind_of_data(adata: ad.AnnData) -> None:
    assert_refused(lambda: load_nt().encode(adata), errors.InputError, "AnnData")
    assert_refused(lambda: load().encode(["ACGT"]), errors.InputError, "list", "AnnData")
    assert_refused(lambda: load().encode("missing.h5ad"), errors.InputError, "missing.h5ad", "does not exist")
    assert_refused(lambda: cf.embed(["ACGT"], "kmer", copy=True), errors.InputError, "copy")  # type: ignore[call-overload]


def test_tokens() -> None:
    model = load_nt()
    assert_refused(lambda: cf.Tokens(ids=[1, 2], offsets=[0, 3]), errors.InputError, "offsets")  # type: ignore[arg-type]
    assert_refused(lambda: cf.Tokens(ids=[[1, 2]], offsets=[0, 2]), errors.InputError, "1-D")  # type: ignore[arg-type]
    assert_refused(lambda: cf.Tokens(ids=[1, 2], offsets=[0, 2], values=[1]), errors.InputError, "values")  # type: ignore[arg-type]
    assert_refused(lambda: model.encode_tokens(cf.Tokens.from_lists([[3, 4105]])), errors.InputError, "4105", "4104")
    assert_refused(lambda: model.encode_tokens(cf.Tokens.from_lists([[3] * 257])), errors.InputError, "257", "256")
    assert_refused(lambda: cf.load("kmer").tokenize(["ACGT"]), errors.InputError, "no tokens")
    assert_refused(lambda: cf.load("kmer").gene_embeddings(), errors.InputError, "gene embeddings")


def test_damaged_h5ad(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    path.write_bytes(b"not HDF5")
    assert_refused(lambda: load().encode(path), errors.InputError, str(path), ".h5ad")


@pytest.mark.parametrize("dtype", [">f4", ">i4", np.longdouble])
def test_numbers_of_other_machines(adata: ad.AnnData, dtype: Any) -> None:
    """Another order of bytes, or more of them: the same counts. Sparse, scipy can do nothing with the former."""
    expected = load().encode(adata)
    adata.X = adata.X.toarray().astype(dtype)
    np.testing.assert_array_equal(load().encode(adata), expected)
    adata.X = sp.csr_matrix(adata.X.astype(np.float32))
    adata.X.data = adata.X.data.astype(dtype)
    if np.dtype(dtype).isnative:
        np.testing.assert_array_equal(load().encode(adata), expected)
    else:
        with pytest.raises(errors.InputError, match="byte order of another machine"):
            load().encode(adata)


def test_objects_are_no_numbers(adata: ad.AnnData) -> None:
    adata.X = adata.X.toarray().astype(object)
    with pytest.raises(errors.InputError, match="X of the AnnData object holds values of the type object; expected numbers"):
        load().encode(adata)


def test_a_table_without_names_of_cells(adata: ad.AnnData, tmp_path: Path) -> None:
    """Its first column of counts would be lost."""
    adata.var_names = adata.var["ensembl_id"]
    adata.to_df().astype(int).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(errors.InputError, match="seems to have no column with the names of cells"):
        load().encode(tmp_path / "x.csv")
    adata.to_df().astype(int).reset_index(drop=True).to_csv(tmp_path / "x.csv")  # numbers are names as good as others
    np.testing.assert_allclose(load().encode(tmp_path / "x.csv"), load().encode(adata), atol=2e-6, rtol=0)
