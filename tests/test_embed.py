"""`embed`, `load` and the Embedder on cells, as notebooks use them."""

import json
import logging
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import cellfm_hub as cf
from cellfm_hub.registry import registry
from golden_cases import PORTABLE

GENEFORMER = PORTABLE / "geneformer-v2-basic"
WHERE = {"checkpoint": GENEFORMER / "checkpoint", "device": "cpu", "precision": "float32"}


@pytest.fixture
def adata() -> ad.AnnData:
    return ad.read_h5ad(GENEFORMER / "input.h5ad")


@pytest.fixture
def model() -> cf.Embedder:
    return cf.load("geneformer", **WHERE)  # type: ignore[arg-type]


def test_writes_into_the_object(adata: ad.AnnData, model: cf.Embedder) -> None:
    returned = cf.embed(adata, "Geneformer", **WHERE)  # type: ignore[call-overload]
    assert returned is None
    np.testing.assert_array_equal(adata.obsm["X_Geneformer"], model.encode(adata))
    assert adata.uns["cellfm"]["X_Geneformer"] == model.receipt
    # A second model keeps the first one's receipt.
    cf.embed(adata, "pca", options={"n_components": 5}, key_added="X_own")
    assert set(adata.uns["cellfm"]) == {"X_Geneformer", "X_own"}
    assert adata.uns["cellfm"]["X_own"]["dataset_dependent"] is True


def test_copy(adata: ad.AnnData) -> None:
    copied = cf.embed(adata, "geneformer", copy=True, **WHERE)  # type: ignore[call-overload]
    assert "X_geneformer" in copied.obsm
    assert not adata.obsm
    assert not adata.uns


def test_view(adata: ad.AnnData, model: cf.Embedder) -> None:
    """A view becomes an object of its own, without a warning, and its parent stays as it was."""
    view = adata[:5]
    assert cf.embed(view, "geneformer", **WHERE) is None  # type: ignore[call-overload]
    np.testing.assert_allclose(view.obsm["X_geneformer"], model.encode(adata)[:5], atol=2e-6, rtol=0)
    assert not adata.obsm


def test_half_precision_result_is_float32(adata: ad.AnnData) -> None:
    half = cf.load("geneformer", checkpoint=GENEFORMER / "checkpoint", device="cpu", precision="bfloat16")
    vectors = half.encode(adata)
    assert vectors.dtype == np.float32
    assert half.receipt is not None
    assert half.receipt["precision"] == "bfloat16"
    full = cf.load("geneformer", **WHERE).encode(adata)  # type: ignore[arg-type]
    usable = np.isfinite(full).all(axis=1)
    cosine = (vectors * full).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(full, axis=1)
    assert cosine[usable].min() > 0.999


def test_recipes(adata: ad.AnnData, model: cf.Embedder) -> None:
    np.testing.assert_array_equal(model.encode(adata), model.encode(adata, pooling="cls", output_layer=-2))
    np.testing.assert_array_equal(model.encode(adata, recipe="last"), model.encode(adata, pooling="cls", output_layer=-1))
    np.testing.assert_array_equal(model.encode(adata, recipe="mean"), model.encode(adata, pooling="mean", output_layer=1))
    np.testing.assert_array_equal(model.encode(adata, recipe="mean", output_layer=0), model.encode(adata, pooling="mean", output_layer=0))


def test_first_generation_has_no_cls() -> None:
    v1 = PORTABLE / "geneformer-v1-basic"
    model = cf.load("geneformer", checkpoint=v1 / "checkpoint", device="cpu", precision="float32")
    cells = ad.read_h5ad(v1 / "input.h5ad")
    np.testing.assert_array_equal(model.encode(cells), model.encode(cells, pooling="mean"))
    with pytest.raises(cf.errors.InputError, match="'mean', 'max'"):
        model.encode(cells, pooling="cls")


def test_gene_level(adata: ad.AnnData, model: cf.Embedder) -> None:
    """One vector per token, in the order of the tokens; an empty cell has none; names are genes."""
    tokens, vectors = model.tokenize(adata), model.encode(adata, level="gene")
    np.testing.assert_array_equal(vectors.ids, tokens.ids)
    np.testing.assert_array_equal(vectors.offsets, tokens.offsets)
    assert len(vectors) == adata.n_obs
    assert len(vectors.row(7)) == 0
    assert vectors.names[0] == "<cls>"
    assert vectors.names[1].startswith("ENSG")
    again = model.encode_tokens(tokens, level="gene")
    np.testing.assert_array_equal(again.values, vectors.values)
    # The mean over genes is the mean of their vectors.
    genes = vectors.row(0)[1:-1]
    np.testing.assert_allclose(genes.mean(axis=0), model.encode(adata, pooling="mean")[0], atol=2e-6)
    np.testing.assert_array_equal(genes.max(axis=0), model.encode(adata, pooling="max")[0])


def test_no_rows(model: cf.Embedder) -> None:
    """No tokens in, no vectors out."""
    assert model.encode_tokens(cf.Tokens.from_lists([])).shape == (0, 32)
    assert len(model.encode_tokens(cf.Tokens.from_lists([]), level="gene")) == 0


def test_progress(adata: ad.AnnData, model: cf.Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    """The bar reaches the end, empty cells included, and goes to standard error."""
    model.encode(adata, progress=True, batch_tokens=50)
    shown = capsys.readouterr()
    assert "13/13" in shown.err
    assert shown.out == ""


def test_static_gene_embeddings(model: cf.Embedder) -> None:
    """Rows of the embedding table, special tokens left out."""
    from safetensors.torch import load_file

    table = load_file(GENEFORMER / "checkpoint/model.safetensors")["bert.embeddings.word_embeddings.weight"].numpy()
    frame = model.gene_embeddings()
    assert isinstance(frame, pd.DataFrame)
    assert frame.shape == (270, 32)
    dictionary = model.adapter.tokenizer.dictionaries.tokens  # type: ignore[attr-defined]
    for gene in frame.index[[0, 100, -1]]:
        np.testing.assert_array_equal(frame.loc[gene].to_numpy(), table[dictionary[gene]])
    assert not any(name.startswith("<") for name in frame.index)


def test_sharded_and_bin_weights(tmp_path: Path, adata: ad.AnnData, model: cf.Embedder) -> None:
    """The same weights as one .bin, or as shards with column-major tensors, give the same vectors."""
    from safetensors.torch import load_file

    reference = model.encode(adata)
    tensors = load_file(GENEFORMER / "checkpoint/model.safetensors")
    tensors = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in tensors.items()}
    for kind in ("bin", "sharded", "legacy"):
        folder = tmp_path / kind
        shutil.copytree(GENEFORMER / "checkpoint", folder)
        (folder / "model.safetensors").unlink()
        if kind == "sharded":
            names = list(tensors)
            files = {f"pytorch_model-0000{i}-of-00002.bin": names[i - 1 :: 2] for i in (1, 2)}
            for file, part in files.items():
                torch.save({name: tensors[name] for name in part}, folder / file)
            index = {"weight_map": {name: file for file, part in files.items() for name in part}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
        other = cf.load("geneformer", checkpoint=folder, device="cpu", precision="float32")
        np.testing.assert_array_equal(other.encode(adata), reference)
        assert other.receipt is not None
        assert len(str(other.receipt["weights_sha256"])) == 64


def test_a_copy_of_the_whole_repository(tmp_path: Path, adata: ad.AnnData, model: cf.Embedder) -> None:
    """`checkpoint=` may be the root of a copy of the published repository, or the model's folder inside it."""
    root = tmp_path / "Geneformer"
    shutil.copytree(GENEFORMER / "checkpoint/geneformer", root / "geneformer")
    inside = root / "Geneformer-V2-104M"
    inside.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GENEFORMER / "checkpoint" / name, inside)
    for folder in (root, inside):
        other = cf.load("geneformer-v2-104m", checkpoint=folder, device="cpu", precision="float32")
        np.testing.assert_array_equal(other.encode(adata), model.encode(adata))


def test_overflow_in_float16_falls_back(tmp_path: Path, adata: ad.AnnData, model: cf.Embedder, caplog: pytest.LogCaptureFixture) -> None:
    """Values that float16 cannot hold are computed again in bfloat16, and the receipt says so."""
    from safetensors.torch import load_file, save_file

    expected = model.encode(adata)
    folder = Path(shutil.copytree(GENEFORMER / "checkpoint", tmp_path / "large"))
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.0.intermediate.dense.weight"] *= 1e5
    save_file(tensors, folder / "model.safetensors")
    half = cf.load("geneformer", checkpoint=folder, device="cpu", precision="float16")
    half._guard_overflow = True  # as precision="auto" sets it on CUDA
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        vectors = half.encode(adata)
    assert "overflows in float16" in caplog.text
    assert half.receipt is not None
    assert half.receipt["precision"] == "bfloat16"
    assert np.isfinite(vectors[np.isfinite(expected)]).all()


def test_warns_of_what_was_lost(adata: ad.AnnData, model: cf.Embedder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        model.encode(adata)
    assert "2 of 13 rows hold nothing" in caplog.text
    assert "3 of 13 rows were longer" in caplog.text


def test_names() -> None:
    """Families, checkpoints and aliases, in any case; listing filters."""
    find = registry().find
    assert find("nt").family == find("Nucleotide-Transformer").family == find("nt-v2-100m").family == "nucleotide-transformer"
    assert find("geneformer").name == find("Geneformer-V2-316M").name == "geneformer-v2-316m"
    assert {info.modality for info in cf.list_models(modality="sequence")} == {"sequence"}
    assert all(info.commercial_use for info in cf.list_models(commercial=True))
    assert not any(info.commercial_use for info in cf.list_models(commercial=False))
    defaults = [info.family for info in cf.list_models() if info.default]
    assert len(defaults) == len(set(defaults))
