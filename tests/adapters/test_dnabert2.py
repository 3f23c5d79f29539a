"""DNABERT-2 and DNABERT-S against the original code."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cellfm_hub as cf
from cellfm_hub import errors
from cellfm_hub.nn import Alibi, PackedBatch, alibi_slopes, attend
from cellfm_hub.registry import registry
from cellfm_hub.sources.sequences import read_fasta
from cellfm_hub.testing import check_sequence_model
from cellfm_hub.weights import count_parameters
from golden_cases import DATA, PORTABLE, Case, cases, check_sequence_embeddings, check_sequence_tokens, hidden_states

CASES = cases("dnabert")
SMALL = Case(PORTABLE / "dnabert2-basic")


def load(case: Case, letters: str = "as-is", checkpoint: Path | None = None) -> cf.Embedder:
    name = "dnabert-s" if "dnabert-s" in case.name else "dnabert2"
    return cf.load(name, checkpoint=checkpoint or case.checkpoint, options={"case": letters}, device="cpu", precision="float32")


@pytest.mark.parametrize("case", CASES)
def test_tokens(case: Case) -> None:
    check_sequence_tokens(case, load(case))


@pytest.mark.parametrize("case", CASES)
def test_embeddings(case: Case) -> None:
    check_sequence_embeddings(case, load(case))


@pytest.mark.parametrize("case", [c for c in CASES if list(c.values[0].path.glob("expected_hidden_*"))])
def test_hidden_states(case: Case) -> None:
    """Each token's vector in every layer is met, and so is their mean without [CLS] and [SEP]."""
    model, fasta = load(case), case.path / "sequences.fasta"
    for row, layer, expected, what in hidden_states(case):
        case.assert_close(model.encode(fasta, level="token", output_layer=layer).row(row), expected, what)
        inner = model.encode(fasta, pooling="mean-bases", output_layer=layer)[row]
        case.assert_close(inner, expected[1:-1].mean(axis=0), what)


@pytest.mark.parametrize("case", [c for c in CASES if "basic" in c.id])
def test_lower_case_is_upper_cased(case: Case) -> None:
    model = load(case, "upper")
    sequences = dict(read_fasta(case.path / "sequences.fasta"))
    pair = {name: sequences[name] for name in ("softmasked_64bp", "softmasked_64bp_upper")}
    lower, upper = model.encode(pair)
    np.testing.assert_array_equal(lower, upper)
    assert model.receipt is not None
    assert model.receipt["bases_upper_cased"] == sum(letter.islower() for letter in pair["softmasked_64bp"])


@pytest.mark.parametrize("case", [c for c in CASES if "portable" in c.id])
def test_contract(case: Case) -> None:
    check_sequence_model(load(case), dict(read_fasta(case.path / "sequences.fasta")))


@pytest.mark.parametrize("name", ["dnabert2", "dnabert-2", "DNABERT2-117M", "dnabert-2-117m", "dnabert-s"])
def test_names(name: str) -> None:
    case = Case(PORTABLE / ("dnabert-s-basic" if name == "dnabert-s" else "dnabert2-basic"))
    assert cf.load(name, checkpoint=case.checkpoint, device="cpu").embedding_dim == 24


@pytest.mark.parametrize("name", ["dnabert2-117m", "dnabert-s"])
def test_published_size(name: str) -> None:
    """The network and key table of the published configuration have the published number of parameters."""
    entry = registry().find(name)
    with torch.device("meta"):
        network, layout = entry.adapter_class().published(entry.checkpoint.config)  # type: ignore[attr-defined]
    assert count_parameters(layout) == entry.checkpoint.parameters
    assert sum(p.numel() for p in network.parameters()) == 116_477_952
    used = {key.to for key in layout.values() if key.to is not None}
    assert used == set(network.state_dict())


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_either_model_in_either_layout(tmp_path: Path, prefix: str, suffix: str) -> None:
    """With and without ``bert.``, with and without heads, as .bin and as safetensors, by either name: the same vectors."""
    from safetensors.torch import save_file

    from cellfm_hub.safe_files import read_tensors

    shutil.copytree(SMALL.checkpoint, tmp_path / "copy", copy_function=shutil.copyfile)
    weights = tmp_path / "copy" / "pytorch_model.bin"
    tensors = {
        prefix + key.removeprefix("bert."): tensor.clone() for key, tensor in read_tensors(weights).items() if key.startswith("bert.")
    }
    weights.unlink()
    if suffix == ".bin":
        torch.save(tensors, weights)
    else:
        save_file(tensors, tmp_path / "copy" / "model.safetensors")
    fasta = SMALL.path / "sequences.fasta"
    expected = load(SMALL).encode(fasta)
    for name in ("dnabert2", "dnabert-s"):
        model = cf.load(name, checkpoint=tmp_path / "copy", options={"case": "as-is"}, device="cpu", precision="float32")
        np.testing.assert_array_equal(model.encode(fasta), expected)


def changed(tmp_path: Path, file: str, change: Any) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(SMALL.checkpoint, folder, copy_function=shutil.copyfile)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


def test_pad_id_of_a_config_is_ignored(tmp_path: Path) -> None:
    """Configurations say 0, which is [UNK]."""
    folder = changed(tmp_path, "config.json", lambda c: c.update(pad_token_id=0))
    model = load(SMALL, checkpoint=folder)
    assert model.adapter.tokenizer.pad_id == 3  # type: ignore[attr-defined]
    np.testing.assert_array_equal(model.encode(["NNACGT", "A"]), load(SMALL).encode(["NNACGT", "A"]))


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", lambda c: c.pop("alibi_starting_size"), "alibi_starting_size"),
        ("config.json", lambda c: c.update(vocab_size=100), "rows"),
        ("tokenizer.json", lambda c: c["model"].update(fuse_unk=True), "other settings"),
        ("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"}), "other settings"),
        ("tokenizer.json", lambda c: c.pop("model"), "cannot be read as a tokenizer"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path: Path, file: str, change: Any, says: str) -> None:
    with pytest.raises(errors.CheckpointFormatError, match=says) as caught:
        load(SMALL, checkpoint=changed(tmp_path, file, change))
    assert "\n" not in str(caught.value)


def test_any_length() -> None:
    """No limit unless one is asked for; then it is counted."""
    model = load(SMALL)
    assert model.tokenize(["ACGT" * 3000]).lengths[0] > 512
    assert model.tokenize(["ACGT" * 3000], long="truncate").lengths[0] == 512
    model.encode(["ACGT" * 3000, "ACGT"], long="truncate")
    assert model.receipt is not None
    assert model.receipt["n_truncated"] == 1


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_slopes(heads: int) -> None:
    """Against the recursive form of the paper's code."""

    def slopes(n: int) -> list[float]:
        if n & (n - 1) == 0:
            start = 2.0 ** (-8 / n)
            return [start ** (i + 1) for i in range(n)]
        power = 1 << (n.bit_length() - 1)
        return slopes(power) + slopes(2 * power)[0::2][: n - power]

    np.testing.assert_allclose(alibi_slopes(heads), slopes(heads), rtol=1e-12)


def test_slopes_of_twelve_heads() -> None:
    assert alibi_slopes(12) == [2.0**-k for k in (1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_the_table_of_distances(dtype: torch.dtype) -> None:
    """Attention with the view equals attention with the whole table, row by row, in a batch of mixed lengths."""
    lengths, heads = (40, 7, 7, 1), 6
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(sum(lengths), heads, 8, generator=generator).to(dtype) for _ in range(3))
    batch = PackedBatch(ids=torch.zeros(sum(lengths), dtype=torch.int64), lengths=lengths)
    got = attend(query, key, value, batch, Alibi(heads, max(lengths), dtype, query.device))
    slopes, start = torch.tensor(alibi_slopes(heads)), 0
    for length in lengths:
        part = slice(start, start + length)
        start += length
        places = torch.arange(length)
        table = -slopes[:, None, None] * (places[:, None] - places).abs()
        scores = torch.einsum("qhd,khd->hqk", query[part].float(), key[part].float()) / 8**0.5 + table
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[part].float())
        torch.testing.assert_close(got[part].float(), expected, atol=2e-6 if dtype == torch.float32 else 3e-2, rtol=0)


def test_bias_takes_no_memory() -> None:
    """The kernel that never writes out the scores accepts the view."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    lengths = (300, 300, 5)
    query = torch.randn(sum(lengths), 3, 8)
    batch = PackedBatch(ids=torch.zeros(sum(lengths), dtype=torch.int64), lengths=lengths)
    alibi = Alibi(3, 300, torch.float32, query.device)
    assert alibi.row.numel() == 3 * 599
    assert alibi.for_reversed_queries(300, 300).untyped_storage().data_ptr() == alibi.row.untyped_storage().data_ptr()
    with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attend(query, query, query, batch, alibi)


def recorded() -> list[Any]:
    path = DATA / "dnabert2" / "real_weight_vectors.json"
    return json.loads(path.read_text())["vectors"] if path.is_file() else []


def test_recorded_ids_of_the_real_models() -> None:
    """The token ids recorded with vectors of the real weights are met."""
    from cellfm_adapters.dnabert2.tokenizer import Tokenizer

    if not recorded():
        pytest.skip("needs ../shared")
    for entry in recorded():
        folder = DATA / "dnabert2" / ("dnabert-s" if entry["hub_id"].endswith("DNABERT-S") else "")
        tokenizer = Tokenizer(folder / "tokenizer.json")
        ids = [tokenizer.cls_id, *tokenizer.tokenize([entry["sequence"]]).ids, tokenizer.sep_id]
        assert ids == entry["input_ids"], entry["sequence"]


@pytest.mark.network
@pytest.mark.parametrize("entry", recorded(), ids=lambda e: f"{e['hub_id'].split('/')[1]}-{e['sequence'][:12]}")
def test_recorded_vectors_of_the_real_models(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors recorded by a third party with the authors' code, where the weights are on this machine or can be fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with cf.settings.override(offline=False):
        try:
            model = cf.load("dnabert-s" if entry["hub_id"].endswith("DNABERT-S") else "dnabert2", device="cpu", precision="float32")
        except errors.WeightsUnavailableError as error:
            pytest.skip(str(error))
    assert entry["layer"].startswith("last")
    pooling = entry["pooling"].split()[0].lower().strip("[]")
    got = model.encode([entry["sequence"]], pooling="cls" if pooling == "cls" else "mean")[0]
    np.testing.assert_allclose(got, np.array(entry["values"], dtype=np.float32), atol=1e-4)
