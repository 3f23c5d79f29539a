"""Sequences from letters to vectors: tokenizers against their rule written out slowly, one row per base, windows, strands, counts."""

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cellfm_hub as cf
from cellfm_hub import errors
from cellfm_hub.sequences import fit_to_model, reverse_complement
from cellfm_hub.tokens import Tokens, offsets_from_lengths
from golden_cases import DATA, PORTABLE

MODELS = ("dnabert2", "nt-v2")
LETTERS = "ACGT" * 6 + "NNNacgtnRYSWKMBDHVUu-."
DNA = st.text(st.sampled_from(LETTERS), max_size=80)
SHORT = st.text(st.sampled_from("ACGTNacgtnRU-"), max_size=3)
ANY = st.one_of(DNA, SHORT)
WINDOW = 9
"""Tokens of a window where the tests tile, special ones included."""


@cache
def load(name: str, case: str = "upper", max_tokens: int | None = None) -> cf.Embedder:
    model = cf.load(
        name.split("-")[0], checkpoint=PORTABLE / f"{name}-basic" / "checkpoint", options={"case": case}, device="cpu", precision="float32"
    )
    if max_tokens is not None:
        model.adapter.max_tokens = max_tokens  # type: ignore[attr-defined]
    return model


# Tokenizers


def slow_bpe(sequence: str, vocabulary: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    ids = []
    for word in re.findall(r"\w+|[^\w\s]+", sequence):
        pieces = list(word)
        while True:
            found = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
            if not found:
                break
            at = min(found)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        ids += [vocabulary.get(piece, vocabulary["[UNK]"]) for piece in pieces]
    return ids


def slow_kmers(sequence: str, vocabulary: dict[str, int], k: int) -> list[int]:
    ids, at = [], 0
    while at < len(sequence):
        kmer = sequence[at : at + k]
        if len(kmer) == k and set(kmer) <= set("ACGT"):
            ids.append(vocabulary[kmer])
            at += k
        elif sequence[at] in "ACGTN":
            ids.append(vocabulary[sequence[at]])
            at += 1
        else:
            while at < len(sequence) and sequence[at] not in "ACGTN":
                at += 1
            ids.append(vocabulary["<unk>"])
    return ids


def files(*paths: Path) -> list[Any]:
    marks = [pytest.param(p, id="/".join(p.parts[-3:]), marks=[] if p.is_file() else pytest.mark.skip("needs ../shared")) for p in paths]
    return list(marks)


@cache
def bpe(path: Path) -> tuple[Any, dict[str, int], dict[tuple[str, str], int]]:
    from cellfm_adapters.dnabert2.tokenizer import Tokenizer

    model = json.loads(path.read_text())["model"]
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return Tokenizer(path), model["vocab"], {(a, b): rank for rank, (a, b) in enumerate(pairs)}


@cache
def kmers(path: Path) -> tuple[Any, dict[str, int]]:
    from cellfm_adapters.nucleotide_transformer.tokenizer import Tokenizer

    lines = path.read_text().split()
    return Tokenizer(lines), {token: i for i, token in enumerate(lines)}


@pytest.mark.parametrize(
    "path",
    files(
        PORTABLE / "dnabert2-basic/checkpoint/tokenizer.json",
        PORTABLE / "dnabert-s-basic/checkpoint/tokenizer.json",
        DATA / "dnabert2/tokenizer.json",
        DATA / "dnabert2/dnabert-s/tokenizer.json",
    ),
)
@settings(deadline=None, max_examples=60)
@given(sequences=st.lists(ANY, max_size=6))
def test_byte_pairs(path: Path, sequences: list[str]) -> None:
    tokenizer, vocabulary, ranks = bpe(path)
    tokens = tokenizer.tokenize(sequences)
    assert len(tokens) == len(sequences)
    for row, sequence in enumerate(sequences):
        ids = tokens.row(row).tolist()
        assert ids == slow_bpe(sequence, vocabulary, ranks)
        widths = tokens.widths[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
        assert widths == [1 if i == vocabulary["[UNK]"] else len(tokenizer.vocabulary[i]) for i in ids]
        assert sum(widths) == len(sequence)


@pytest.mark.parametrize(
    "path",
    files(
        PORTABLE / "nt-v1-basic/checkpoint/vocab.txt",
        PORTABLE / "nt-v2-basic/checkpoint/vocab.txt",
        DATA / "nucleotide-transformer/vocab_v2_3mer.txt",
    ),
)
@settings(deadline=None, max_examples=60)
@given(sequences=st.lists(ANY, max_size=6))
def test_kmers(path: Path, sequences: list[str]) -> None:
    tokenizer, vocabulary = kmers(path)
    tokens = tokenizer.tokenize(sequences)
    assert len(tokens) == len(sequences)
    for row, sequence in enumerate(sequences):
        assert tokens.row(row).tolist() == slow_kmers(sequence, vocabulary, tokenizer.k)
        assert tokens.widths[tokens.offsets[row] : tokens.offsets[row + 1]].sum() == len(sequence)


# One row per base


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", ["upper", "as-is"])
@settings(deadline=None, max_examples=30)
@given(sequences=st.lists(ANY, min_size=1, max_size=5))
def test_one_row_per_base(name: str, case: str, sequences: list[str]) -> None:
    """Each base has the vector of the token that covers it; special tokens are gone; an empty sequence has no rows.

    Where there is no A, C, G or T (or U), nothing is known, and every letter has NaN; as-is, the original's vectors.
    """
    model = load(name, case)
    bases, by_token, tokens = model.encode(sequences, level="base"), model.encode(sequences, level="token"), model.tokenize(sequences)
    assert np.diff(bases.offsets).tolist() == [len(s) for s in sequences]
    assert tokens.widths is not None
    for row, sequence in enumerate(sequences):
        if case == "upper" and not set(sequence.upper()) & set("ACGTU"):
            assert np.isnan(bases.row(row)).all()
            assert len(tokens.row(row)) == len(by_token.row(row)) == 0
            continue
        widths = tokens.widths[tokens.offsets[row] : tokens.offsets[row + 1]]
        np.testing.assert_array_equal(bases.row(row), np.repeat(by_token.row(row), widths, axis=0))
        part = slice(bases.offsets[row], bases.offsets[row + 1])
        np.testing.assert_array_equal(bases.ids[part], np.repeat(tokens.row(row), widths))


# Windows


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=30)
@given(sequences=st.lists(ANY, min_size=1, max_size=4))
def test_tiles_without_overlap(name: str, sequences: list[str]) -> None:
    """A tiled sequence is its windows, each embedded as a sequence of its own, one behind the other; as-is, also those without a base."""
    model, free = load(name, "as-is", WINDOW), load(name, "as-is")
    inside = WINDOW - len(model.adapter.prefix) - len(model.adapter.suffix)  # type: ignore[attr-defined]
    tiled, tokens = model.encode(sequences, level="base", long="tile"), free.tokenize(sequences)
    plain, means, maxima = (model.encode(sequences, pooling=p, long="tile", on_empty="nan") for p in ("mean", "mean-bases", "max"))
    by_token = model.encode(sequences, level="token", long="tile")
    assert tokens.widths is not None
    for row, sequence in enumerate(sequences):
        widths = tokens.widths[tokens.offsets[row] : tokens.offsets[row + 1]]
        cuts = np.cumsum(widths[widths > 0])
        ends = [int(cuts[min(at + inside, len(cuts)) - 1]) for at in range(0, len(cuts), inside)]
        windows = [sequence[a:b] for a, b in pairwise([0, *ends])]
        assert "".join(windows) == sequence
        if not sequence:
            assert np.isnan(means[row]).all()
            assert np.isnan(plain[row]).all()
            assert len(by_token.row(row)) == 0
            continue
        alone = free.encode(windows, level="base")
        np.testing.assert_allclose(tiled.row(row), alone.values, atol=2e-6)
        in_windows = free.encode(windows, level="token")
        inner = np.isin(in_windows.ids, [*model.adapter.prefix, *model.adapter.suffix], invert=True)  # type: ignore[attr-defined]
        np.testing.assert_allclose(by_token.row(row), in_windows.values, atol=2e-6)
        np.testing.assert_array_equal(by_token.ids[by_token.offsets[row] : by_token.offsets[row + 1]], in_windows.ids)
        # Every token weighs the same, whichever window it is in: the last window is shorter.
        np.testing.assert_allclose(plain[row], in_windows.values.mean(axis=0), atol=2e-6)
        np.testing.assert_allclose(means[row], in_windows.values[inner].mean(axis=0), atol=2e-6)
        np.testing.assert_allclose(maxima[row], in_windows.values.max(axis=0), atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=30)
@given(sequence=st.text(st.sampled_from("ACGTN"), min_size=20, max_size=120), overlap=st.integers(1, 4))
def test_tiles_with_overlap(name: str, sequence: str, overlap: int) -> None:
    """A base that several windows cover gets their mean."""
    assume(set(sequence) != {"N"})
    model = load(name, "upper", WINDOW)
    tokens = model.tokenize([sequence], long="tile", overlap=overlap)
    by_token = model.encode_tokens(cf.Tokens(ids=tokens.ids, offsets=tokens.offsets), level="token")
    assert tokens.widths is not None
    sums, windows = np.zeros((len(sequence), model.embedding_dim)), np.zeros(len(sequence))
    for row in range(len(tokens)):
        at = 0 if tokens.begins is None else int(tokens.begins[row])
        for vector, width in zip(by_token.row(row), tokens.widths[tokens.offsets[row] : tokens.offsets[row + 1]], strict=True):
            sums[at : at + width] += vector
            windows[at : at + width] += 1
            at += int(width)
    assert windows.min() == 1
    got = model.encode([sequence], level="base", long="tile", overlap=overlap)
    np.testing.assert_allclose(got.values, sums / windows[:, None], atol=2e-6)
    np.testing.assert_array_equal(model.encode_tokens(tokens, level="base").values, got.values)


@settings(deadline=None, max_examples=100)
@given(widths=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=40), min_size=1, max_size=3), overlap=st.integers(0, 5))
def test_windows_share_as_much_as_they_may(widths: list[list[int]], overlap: int) -> None:
    """Neighbouring windows share at most `overlap` bases, and with one token more it would be more; together they are the sequence."""
    flat = np.array([w for row in widths for w in row], dtype=np.int32)
    offsets = offsets_from_lengths([len(row) for row in widths])
    body = Tokens(ids=np.arange(len(flat), dtype=np.int32), offsets=offsets, widths=flat)
    begins = offsets_from_lengths(flat)
    names = [str(n) for n in range(len(widths))]
    fitted = fit_to_model(body, names, max_tokens=6, prefix=(), suffix=(), long="tile", overlap=overlap)
    rows = np.arange(len(fitted)) if fitted.rows is None else fitted.rows
    for row in range(len(widths)):
        windows = [fitted.row(n).tolist() for n in np.flatnonzero(rows == row)]
        assert windows[0][0] == offsets[row]
        assert windows[-1][-1] == offsets[row + 1] - 1
        for window, following in pairwise(windows):
            assert window == list(range(window[0], window[0] + 6))
            end, first = begins[window[-1] + 1], following[0]
            assert end - begins[first] <= overlap
            assert end - begins[first - 1] > overlap


@pytest.mark.parametrize("overlap", [(0, 0), (5, 0), (6, 6), (7, 6), (11, 6), (12, 12)])
def test_overlap_is_exact(overlap: tuple[int, int]) -> None:
    """Tokens of six bases: as many whole ones as fit into the overlap."""
    asked, got = overlap
    tokens = load("nt-v2", "upper", WINDOW).tokenize(["ACGTTG" * 30], long="tile", overlap=asked)
    assert tokens.begins is not None
    inside = WINDOW - 1
    np.testing.assert_array_equal(np.diff(tokens.begins), 6 * inside - got)


@pytest.mark.parametrize("name", MODELS)
def test_cut_bases_have_no_vector(name: str) -> None:
    """With ``truncate`` the rows still are as many as bases, those cut off NaN, and they are counted."""
    model = load(name, "upper", WINDOW)
    sequences = ["ACGTN" * 20, "ACG", "NNNNNNNNNA"]
    got = model.encode(sequences, level="base", long="truncate")
    assert np.diff(got.offsets).tolist() == [100, 3, 10]
    missing = np.isnan(got.values).any(axis=1)
    np.testing.assert_array_equal(missing, got.ids == -1)
    assert (got.names[missing] == "").all()
    assert missing[100:103].sum() == 0
    assert model.receipt is not None
    assert model.receipt["bases_truncated"] == missing.sum() > 0
    assert model.receipt["n_truncated"] == 2


def test_base_level_needs_widths() -> None:
    with pytest.raises(errors.InputError, match="widths"):
        load("nt-v2").encode_tokens(cf.Tokens.from_lists([[3, 7, 8]]), level="base")
    with pytest.raises(errors.InputError, match="reverse_complement"):
        load("nt-v2").encode(["ACGT"], level="base", reverse_complement="mean")


# Empty sequences


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_sequence_is_a_row_of_nan(name: str) -> None:
    """Where that is asked for; it is counted and changes no other row. In memory it is an error by default, which names it."""
    model = load(name)
    sequences = {"a": "ACGTACGTT", "none": "", "b": "GG"}
    for options in (
        {},
        {"pooling": "max"},
        {"pooling": "cls"},
        {"pooling": "mean-bases"},
        {"long": "tile"},
        {"reverse_complement": "mean"},
    ):
        got = model.encode(sequences, on_empty="nan", **options)
        assert np.isnan(got[1]).all()
        np.testing.assert_allclose(got[[0, 2]], model.encode(["ACGTACGTT", "GG"], **options), atol=2e-6)
    model.encode(sequences, on_empty="nan")
    assert model.receipt is not None
    assert model.receipt["n_empty"] == 1
    for wanted in (None, "error"):
        with pytest.raises(errors.SequenceError, match="'none' is empty"):
            model.encode(sequences, on_empty=wanted)
    assert np.isnan(model.encode([""], on_empty="nan")).all()


# Strands and counts


def test_reverse_complement_of_every_code() -> None:
    """Against the sets of bases that IUPAC codes stand for."""
    sets = {
        "A": "A",
        "C": "C",
        "G": "G",
        "T": "T",
        "R": "AG",
        "Y": "CT",
        "S": "CG",
        "W": "AT",
        "K": "GT",
        "M": "AC",
        "B": "CGT",
        "D": "AGT",
    }
    sets |= {"H": "ACT", "V": "ACG", "N": "ACGT"}
    other = {frozenset(bases): code for code, bases in sets.items()}
    for code, bases in sets.items():
        expected = other[frozenset("TGCA"["ACGT".index(base)] for base in bases)]
        assert reverse_complement(code) == expected
        assert reverse_complement(code.lower()) == expected.lower()
    assert reverse_complement("AC-.GU") == "AC.-GT"


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=20)
@given(sequence=DNA.filter(bool))
def test_both_strands(name: str, sequence: str) -> None:
    model = load(name)
    got = model.encode([sequence], reverse_complement="mean")
    pair = model.encode([sequence, reverse_complement(sequence.upper().replace("U", "T"))])
    np.testing.assert_allclose(got[0], pair.mean(axis=0), atol=2e-6)


@pytest.mark.parametrize(
    ("name", "case", "unknown"), [("dnabert2", "upper", 4), ("nt-v2", "upper", 2), ("dnabert2", "as-is", 8), ("nt-v2", "as-is", 6)]
)
def test_counts(name: str, case: str, unknown: int) -> None:
    """Every change and every loss is in the receipt. NT knows N; DNABERT-2 does not."""
    model = load(name, case)
    model.encode(["ACGTuacN", "NR-ACGTU"])
    receipt = model.receipt
    assert receipt is not None
    assert receipt["bases"] == 16
    assert receipt["bases_upper_cased"] == (3 if case == "upper" else 0)
    assert receipt["bases_u_to_t"] == (2 if case == "upper" else 0)
    assert receipt["bases_unknown"] == unknown
    assert receipt["bases_ambiguous"] == (4 if case == "upper" else 8)
    assert receipt["bases_truncated"] == 0


@pytest.mark.parametrize("letter", ["ß", "ı", "ﬀ", "ſ"])
def test_letters_that_become_others_in_upper_case(letter: str) -> None:
    with pytest.raises(errors.SequenceError, match=f"'{letter}' at position 3"):
        cf.embed([f"AC{letter}GT"], "kmer")
