"""Nucleotide Transformer against the original code."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import cellfm_hub as cf
from cellfm_hub import errors
from cellfm_hub.sources.sequences import read_fasta
from golden_cases import DATA, Case, cases, check_sequence_embeddings, check_sequence_tokens, hidden_states

CASES = cases("nt-")


def load(case: Case, letters: str = "as-is") -> cf.Embedder:
    return cf.load("nt", checkpoint=case.checkpoint, options={"case": letters}, device="cpu", precision="float32")


def long(case: Case) -> Literal["truncate", "error"]:
    return "truncate" if case.facts["truncation"] else "error"


@pytest.mark.parametrize("case", CASES)
def test_tokens(case: Case) -> None:
    check_sequence_tokens(case, load(case), long=long(case))


@pytest.mark.parametrize("case", CASES)
def test_embeddings(case: Case) -> None:
    check_sequence_embeddings(case, load(case), long=long(case))


@pytest.mark.parametrize("case", [c for c in CASES if "basic" in c.id])
def test_hidden_states(case: Case) -> None:
    """Each token's vector in every layer is met."""
    model, fasta = load(case), case.path / "sequences.fasta"
    for row, layer, expected, what in hidden_states(case):
        case.assert_close(model.encode(fasta, level="token", output_layer=layer).row(row), expected, what)


@pytest.mark.parametrize("case", [c for c in CASES if "basic" in c.id])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_masked_tokens(case: Case, pooling: str) -> None:
    """Tokens made by the caller, <mask> among them, pass through the network alone (v1 rescales by the masked share)."""
    tokens = cf.Tokens.from_lists([entry["input_ids"] for entry in case.json("masked_inputs.json")])
    case.assert_close(load(case).encode_tokens(tokens, pooling=pooling), case.array(f"expected_masked_{pooling}_last.npy"))


@pytest.mark.parametrize("case", [c for c in CASES if "basic" in c.id])
def test_lower_case_is_upper_cased(case: Case) -> None:
    """By default a lower-case sequence has the vector of its upper-case twin, and the receipt counts the letters."""
    model = load(case, "upper")
    sequences = dict(read_fasta(case.path / "sequences.fasta"))
    pair = {name: sequences[name] for name in ("softmasked_64bp", "softmasked_64bp_upper")}
    lower, upper = model.encode(pair)
    np.testing.assert_array_equal(lower, upper)
    assert model.receipt is not None
    assert model.receipt["bases_upper_cased"] == sum(letter.islower() for letter in pair["softmasked_64bp"])


def test_recorded_ids_of_the_real_models() -> None:
    """The token ids recorded with vectors of the real weights are met, for both generations and the 3-mer model."""
    from cellfm_adapters.nucleotide_transformer.tokenizer import Tokenizer

    folder = DATA / "nucleotide-transformer"
    if not folder.is_dir():
        pytest.skip("needs ../shared")

    def tokenizer(file: str) -> Tokenizer:
        return Tokenizer(Path(folder / file).read_text().split())

    by_kind = {"3mer": tokenizer("vocab_v2_3mer.txt"), "v2": tokenizer("vocab_v2.txt"), "v1": tokenizer("vocab_v1.txt")}
    vectors = json.loads((folder / "real_weight_vectors.json").read_text())["vectors"]
    assert vectors
    for entry in vectors:
        kind = "3mer" if "3mer" in entry["hub_id"] else "v2" if "-v2-" in entry["hub_id"] else "v1"
        chosen = by_kind[kind]
        assert [chosen.cls_id, *chosen.tokenize([entry["sequence"]]).ids] == entry["input_ids"]


def recorded() -> list[Any]:
    path = DATA / "nucleotide-transformer" / "real_weight_vectors.json"
    return json.loads(path.read_text())["vectors"] if path.is_file() else []


@pytest.mark.network
@pytest.mark.parametrize("entry", recorded(), ids=lambda e: f"{e['hub_id'].split('/')[1]}-{e['sequence'][:12]}")
def test_recorded_vectors_of_the_real_models(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors recorded by a third party with the authors' code, where the weights are on this machine or can be fetched."""
    assert entry["layer"].startswith("last")
    assert entry["pooling"].startswith("mean")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with cf.settings.override(offline=False):
        try:
            # The name of the repository is an alias of the checkpoint.
            model = cf.load(entry["hub_id"].split("/")[1], revision=entry["revision"], device="cpu", precision="float32")
        except errors.WeightsUnavailableError as error:
            pytest.skip(str(error))
    got = model.encode([entry["sequence"]])[0]
    np.testing.assert_allclose(got, np.array(entry["values"], dtype=np.float32), atol=1e-4)
