"""UCE against the original code."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from numpy.typing import NDArray

import cellfm_hub as cf
from cellfm_adapters.uce.adapter import UCEAdapter
from cellfm_adapters.uce.filtering import FilteredGenes
from cellfm_adapters.uce.species import PROTEIN_FILES, Chromosomes, check_species, read_symbols
from cellfm_adapters.uce.tokenizer import SAMPLE_SIZE, PlacedGenes, Runs, draw_genes, spell, streams_of, tokenize
from cellfm_hub import errors
from cellfm_hub.cards import File
from cellfm_hub.genes import CountMatrix, GeneMap
from cellfm_hub.registry import registry
from cellfm_hub.seeding import advance, row_seeds, uniform
from cellfm_hub.testing import check_cell_model
from cellfm_hub.weights import count_parameters
from golden_cases import DATA, PORTABLE, Case, cases

BASIC = Case(PORTABLE / "uce-basic")


@dataclass(frozen=True)
class Run:
    """One run of the original code over one file of a case."""

    case: Case
    prefix: str
    input: str
    species: str
    filter: bool
    seed: int

    @property
    def adata(self) -> ad.AnnData:
        return ad.read_h5ad(self.case.path / self.input)

    def array(self, name: str) -> NDArray[Any]:
        return self.case.array(f"{self.prefix}{name}.npy")

    def json(self, name: str) -> Any:
        return self.case.json(f"{self.prefix}{name}.json")

    @property
    def rows(self) -> NDArray[np.int64]:
        """Cells that the original kept."""
        return self.adata.obs_names.get_indexer(self.json("obs_names"))

    @property
    def embedding(self) -> NDArray[np.float32]:
        """The answer without padding; the large cases keep the one with padding under the plain name."""
        padding_free = self.case.path / f"{self.prefix}embedding_batch1.npy"
        return np.load(padding_free) if padding_free.is_file() else self.array("embedding")

    @property
    def tokens(self) -> cf.Tokens:
        return cf.Tokens.from_lists([row[:length] for row, length in zip(self.array("tokens"), self.array("lengths"), strict=True)])


def runs() -> Iterator[Any]:
    for parameter in cases("uce"):
        case: Case = parameter.values[0]
        facts = case.facts
        plain = {
            "prefix": "expected_",
            "input": "input.h5ad",
            "species": facts["parameters"]["species"],
            "filter": facts["parameters"]["filter"],
            "sampling_numpy_legacy_seed": facts["seeds"]["sampling_numpy_legacy"],
        }
        for run in facts.get("runs", [plain]):
            found = Run(case, run["prefix"], run["input"], run["species"], run["filter"], run["sampling_numpy_legacy_seed"])
            yield pytest.param(found, id=f"{parameter.id}-{found.species}")


RUNS = list(runs())


def load(case: Case, checkpoint: Path | None = None, **options: Any) -> cf.Embedder:
    """Load the checkpoint of a case; its number of heads cannot be read from the weights."""
    folder, facts = checkpoint or case.checkpoint, case.facts["parameters"]
    options = case.options | options
    if facts["species"] not in PROTEIN_FILES:
        (listed,) = (folder / "new_species_protein_embeddings.csv").read_text().splitlines()[1:]
        options |= {"proteins": folder / listed.split(",")[1], "chromosomes": folder / facts["spec_chrom_csv"], "taxon": 9031}
    return cf.load("uce", checkpoint=folder, options=options, device="cpu", precision="float32")


def adapter_of(model: cf.Embedder) -> UCEAdapter:
    assert isinstance(model.adapter, UCEAdapter)
    return model.adapter


def genes_of(model: cf.Embedder, run: Run, *, filtered: bool) -> PlacedGenes:
    adata, adapter = run.adata, adapter_of(model)
    genes: GeneMap = adapter.gene_matcher(run.species, {"index": adata.var_names.tolist()})(adata.var_names.tolist())
    if filtered:
        genes = adapter.survey(genes, lambda: iter([sp.csr_matrix(adata.X)]))
    assert isinstance(genes, PlacedGenes)
    return genes


# The numbers of the original code


@pytest.mark.parametrize("run", RUNS)
def test_genes(run: Run) -> None:
    """Symbols, rows of the token table, chromosomes and starts of the genes that are kept, in the order of the columns."""
    model = load(run.case)
    genes = genes_of(model, run, filtered=run.filter)
    assert run.adata.var_names[genes.columns].tolist() == run.json("gene_names")
    tokens = genes.tokens[genes.targets]
    np.testing.assert_array_equal(tokens, run.array("gene_token_index"))
    np.testing.assert_array_equal(genes.chromosomes[genes.targets], run.array("gene_chrom_code"))
    species = adapter_of(model).genes.get(run.species)
    np.testing.assert_array_equal(species.starts[tokens - species.first_row], run.array("gene_start"))
    assert adapter_of(model).genes.first_chromosome == run.case.facts["parameters"]["CHROM_TOKEN_OFFSET"]
    vocabulary = adapter_of(model).vocabulary
    assert [name.upper() for name in vocabulary[tokens]] == [name.upper() for name in run.json("gene_names")]


@pytest.mark.parametrize("run", RUNS)
def test_sentences(run: Run) -> None:
    """Given the random numbers of the original, the sentences are exactly its own, and no other cell is left out."""
    model = load(run.case)
    genes = genes_of(model, run, filtered=run.filter)
    counts = genes.apply(sp.csr_matrix(run.adata.X))
    kept = run.rows
    np.testing.assert_array_equal(np.flatnonzero(np.diff(counts.indptr)), kept)

    random = np.random.RandomState(run.seed)
    drawn, orders, begin = [], [], 0
    for cell in kept:
        # The original looks at columns in the order of the file, in float32.
        weights = np.log1p(counts[cell].toarray().ravel()[genes.targets].astype(np.float32))
        p = weights / weights.sum()
        p = p / sum(p)
        drawn.append(np.sort(genes.targets[random.choice(len(p), size=1024, p=p, replace=True)]))
        order = np.arange(len(np.unique(genes.chromosomes[drawn[-1]])))
        random.shuffle(order)
        orders.append(begin + order)
        begin += len(order)
    table = np.array(drawn, dtype=np.int32)
    in_order = Runs.find(table, genes).take(np.concatenate(orders))
    first_chromosome = adapter_of(model).genes.first_chromosome
    sentences = spell(table, in_order, genes, first_chromosome=first_chromosome, max_tokens=model.adapter.max_tokens)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(sentences.lengths, run.array("lengths"))
    np.testing.assert_array_equal(sentences.padded(), run.array("tokens")[:, : sentences.lengths.max()])


@pytest.mark.parametrize("run", RUNS)
def test_embeddings(run: Run) -> None:
    """The network alone, on the sentences of the original: cells, tokens, every stage, static genes."""
    model, tokens = load(run.case), run.tokens
    run.case.assert_close(model.encode_tokens(tokens), run.embedding, "cells")
    first = tokens.take([0])
    stages = np.load(run.case.path / f"{run.prefix}stages_cell0.npz")
    for name in stages.files:
        if layer := re.fullmatch(r"after_layer_(\d+)", name):
            number = int(layer[1]) + 1
            if number == adapter_of(model).layers:
                continue  # here the last layer has passed the decoder
        elif name in ("with_position", "decoder_output"):
            number = {"with_position": 0, "decoder_output": -1}[name]
        else:
            continue
        got = model.encode_tokens(first, level="gene", output_layer=number).values
        run.case.assert_close(got[: len(stages[name])], stages[name], name)
    if (path := run.case.path / f"{run.prefix}sequence_output_cell0.npy").is_file():
        expected = np.load(path)
        run.case.assert_close(model.encode_tokens(first, level="gene").row(0)[: len(expected)], expected, path.name)
    for path in run.case.path.glob(f"{run.prefix}gene_layer_first*.npy"):
        static = model.gene_embeddings(species=run.species)
        by_symbol = static.set_axis(static.index.str.upper())
        expected = np.load(path)
        run.case.assert_close(by_symbol.loc[[n.upper() for n in run.json("gene_names")[: len(expected)]]].to_numpy(), expected, path.name)


@pytest.mark.parametrize("run", [run for run in RUNS if run.values[0].filter])
def test_filter(run: Run) -> None:
    """Cells that the original drops have no sentence, and no others."""
    tokens = load(run.case, filter=True).tokenize(run.adata, species=run.species)
    assert len(tokens) == run.adata.n_obs
    np.testing.assert_array_equal(np.flatnonzero(tokens.lengths), run.rows)


def test_filter_is_said() -> None:
    """Option and recipe ``upstream`` are the same; cells left out are NaN rows and counted, and the receipt says whose result it is."""
    plain, filtering = load(BASIC), load(BASIC, filter=True)
    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    vectors = filtering.encode(adata)
    np.testing.assert_array_equal(plain.encode(adata, recipe="upstream"), vectors)
    assert np.isnan(vectors).all(axis=1).nonzero()[0].tolist() == [2, 5]
    for model in (plain, filtering):
        assert model.receipt is not None
        assert model.receipt["dataset_dependent"] is True
        assert model.receipt["filtered_cells"] == model.receipt["n_empty"] == 2
    assert np.isnan(plain.encode(adata)).all(axis=1).nonzero()[0].tolist() == [5]
    assert plain.receipt is not None
    assert plain.receipt["dataset_dependent"] is False
    assert "filtered_cells" not in plain.receipt


@pytest.mark.parametrize("run", [run for run in RUNS if run.values[0].prefix == "expected_"])
def test_sampling(run: Run) -> None:
    """Our draws follow the exact probabilities, as those of the original do (chi-square over genes expected at least 5 times)."""
    reference = np.load(run.case.path / "sampling_reference.npz")
    model = load(run.case)
    genes = genes_of(model, run, filtered=run.filter)
    counts = genes.apply(sp.csr_matrix(run.adata.X))[run.rows[reference["cells"]]]
    repeats = 200
    cells = np.repeat(np.arange(counts.shape[0]), repeats)
    streams = streams_of(np.array([11, 22, 33], dtype=np.uint64), repeats)
    drawn = draw_genes(np.log1p(counts.data, dtype=np.float64), counts.indices, counts.indptr.astype(np.int64), cells, streams)
    ours = Runs.find(drawn, genes)
    ours = ours.take(ours.shuffle(streams))
    for cell, probabilities in enumerate(reference["probabilities"]):
        seen = np.bincount(drawn[cells == cell].ravel(), minlength=len(genes.tokens))[genes.targets]
        assert_multinomial(seen, probabilities)
        assert seen[probabilities == 0].sum() == 0
        # The chromosome that comes first is each of those in the sentence with the same probability.
        own = np.isin(ours.sentences, np.flatnonzero(cells == cell))
        sentences, codes = ours.sentences[own], ours.codes[own]
        firsts = codes[np.unique(sentences, return_index=True)[1]]
        expected = np.bincount(codes, weights=1 / np.bincount(sentences)[sentences])
        assert_multinomial(np.bincount(firsts, minlength=len(expected)), expected / repeats)


def assert_multinomial(seen: NDArray[np.int64], probabilities: NDArray[np.float64]) -> None:
    """Chi-square; what is expected fewer than 5 times is one class."""
    expected = probabilities * seen.sum()
    often = expected >= 5
    observed = [*seen[often], seen[~often].sum()]
    wanted = [*expected[often], expected[~often].sum()]
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) < 2:
        return
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, wanted, strict=True))
    assert scipy.stats.chi2.sf(statistic, len(wanted) - 1) > 1e-4


def placed(chromosomes: list[int]) -> PlacedGenes:
    """Return as many genes as chromosomes are given, one column each, with tokens from 4 on."""
    n = len(chromosomes)
    return PlacedGenes(
        columns=np.arange(n),
        targets=np.arange(n),
        tokens=np.arange(4, 4 + n, dtype=np.int32),
        n_columns=n,
        chromosomes=np.array(chromosomes, dtype=np.int32),
    )


def sentences(counts: list[list[float]], genes: PlacedGenes, seed: int, samples: int) -> cf.Tokens:
    return tokenize(sp.csr_matrix(np.array(counts, dtype=np.float32)), genes, seed, samples=samples, first_chromosome=1000, max_tokens=1536)


def test_genes_are_drawn_by_their_logarithms() -> None:
    """From counts to ids: the weights are log(1 + count), which the counts themselves are far from."""
    counts = [1.0, 2, 5, 30, 400, 9000]
    tokens = sentences([counts], placed([0, 0, 0, 1, 1, 1]), 0, 60)
    seen = np.bincount(tokens.ids[(tokens.ids >= 4) & (tokens.ids < 1000)] - 4, minlength=6)
    assert seen.sum() == 60 * SAMPLE_SIZE
    assert_multinomial(seen, np.log1p(counts) / np.log1p(counts).sum())


def test_genes_and_chromosomes_draw_different_numbers() -> None:
    """The first 1,024 numbers of a sentence draw genes, the next ones order the chromosomes, and the next sentence begins behind both."""
    counts, samples, n_chromosomes = [[3.0] * 12], 4, 12
    genes = placed(list(range(n_chromosomes)))
    tokens = sentences(counts, genes, 7, samples)
    [seed] = row_seeds(genes.tokens, np.array(counts[0]), np.array([0, 12]), 7)
    for sample in range(samples):
        stream = [uniform(np.uint64(advance(seed, 2 * SAMPLE_SIZE * sample + n))) for n in range(SAMPLE_SIZE + n_chromosomes)]
        drawn = np.bincount((np.array(stream[:SAMPLE_SIZE]) * n_chromosomes).astype(int), minlength=n_chromosomes)
        row = tokens.row(sample)
        spelled = row[row >= 1000] - 1000
        assert spelled.tolist() == np.argsort(stream[SAMPLE_SIZE:]).tolist()
        np.testing.assert_array_equal(np.bincount(row[(row >= 4) & (row < 1000)] - 4, minlength=12), drawn)


PINNED_CHROMOSOMES = [[2, 0, 3, 1], [1, 0, 3, 2], [0, 2, 1, 3], [3, 1, 2, 0], [1, 0, 3, 2], [2, 0, 1, 3]]
PINNED_TIMES = [
    [0, 167, 73, 181, 113, 181, 110, 199],
    [0, 152, 61, 166, 109, 187, 128, 221],
    [149, 0, 156, 77, 205, 110, 193, 134],
    [154, 0, 167, 69, 216, 111, 178, 129],
    [206, 142, 0, 148, 58, 187, 106, 177],
    [182, 145, 0, 157, 65, 174, 92, 209],
]
PINNED_HASH = "e7cab4a3bb7b8c6459b16bfaba5f69cacf34f021dc6b82466dfb7d2710192627"


def test_draws_are_pinned() -> None:
    """What three cells draw, so that vectors cannot change from one version to the next unnoticed.

    Where these numbers change on purpose, CHANGELOG says so under "Vectors changed".
    """
    genes = placed([0, 0, 1, 1, 2, 2, 3, 3])
    counts = (np.arange(24).reshape(3, 8) * 5 % 9).astype(float)
    tokens = sentences(counts.tolist(), genes, 5, 2)
    spelled = [[int(i) - 1000 for i in tokens.row(n) if i >= 1000] for n in range(6)]
    times = [np.bincount(row[(row >= 4) & (row < 1000)] - 4, minlength=8).tolist() for row in map(tokens.row, range(6))]
    assert spelled == PINNED_CHROMOSOMES
    assert times == PINNED_TIMES
    assert hashlib.sha256(tokens.ids.astype("<i4").tobytes()).hexdigest() == PINNED_HASH


# What we promise beyond the original


def test_contract() -> None:
    check_cell_model(load(BASIC), ad.read_h5ad(BASIC.path / "input.h5ad"))
    check_cell_model(load(BASIC, filter=True), ad.read_h5ad(BASIC.path / "input.h5ad"))
    check_cell_model(load(BASIC, samples=3), ad.read_h5ad(BASIC.path / "input_mouse.h5ad"), species="mouse")


def test_a_cells_sentence_is_its_own() -> None:
    """The same cell elsewhere, among others, with columns in another order and foreign genes beside: the same sentence."""
    model = load(BASIC)
    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    tokens = model.tokenize(adata)
    rng = np.random.default_rng(0)
    cells, columns = rng.permutation(np.tile(np.arange(adata.n_obs), 2)), rng.permutation(adata.n_vars)
    moved = ad.AnnData(sp.csr_matrix(adata.X)[cells][:, columns], var=adata.var.iloc[columns])
    again = model.tokenize(moved)
    np.testing.assert_array_equal(again.ids, tokens.take(cells).ids)
    other_seed = model.tokenize(adata, seed=1)
    assert not np.array_equal(other_seed.ids[:1000], tokens.ids[:1000])


def test_blocks_change_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellfm_hub.sources import cells as source

    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    model = load(BASIC, samples=2, filter=True)
    tokens, vectors = model.tokenize(adata), model.encode(adata)
    monkeypatch.setattr(source.count_blocks, "__defaults__", (3,))
    again = model.tokenize(adata)
    np.testing.assert_array_equal(again.ids, tokens.ids)
    np.testing.assert_array_equal(again.rows, tokens.rows)
    np.testing.assert_allclose(model.encode(adata), vectors, atol=2e-6, rtol=0)


def test_samples() -> None:
    """The mean of n draws, scaled to length 1 again; the first draw is the one of a single sample."""
    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    one, three = load(BASIC), load(BASIC, samples=3)
    tokens = three.tokenize(adata)
    assert tokens.rows is not None
    np.testing.assert_array_equal(tokens.rows, np.repeat(np.arange(adata.n_obs), 3))
    np.testing.assert_array_equal(tokens.take(np.arange(adata.n_obs) * 3).ids, one.tokenize(adata).ids)
    each = one.encode_tokens(cf.Tokens(ids=tokens.ids, offsets=tokens.offsets)).reshape(adata.n_obs, 3, -1)
    mean = each.mean(axis=1, dtype=np.float64)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(three.encode(adata), expected, atol=2e-6, rtol=0)
    assert three.receipt is not None
    assert three.receipt["n_empty"] == 1
    assert three.receipt["n_rows"] == adata.n_obs
    np.testing.assert_allclose(three.encode_tokens(tokens), expected, atol=2e-6, rtol=0)
    per_token = three.encode(adata, level="gene")
    np.testing.assert_array_equal(np.diff(per_token.offsets), tokens.lengths.reshape(-1, 3).sum(axis=1))
    with pytest.raises(errors.InputError, match="cell05"):
        three.encode(adata, on_empty="error")


def test_special_cells() -> None:
    """A cell without a known gene in the middle of a file is a NaN row; one gene is a sentence like any other; nobody else notices."""
    model = load(BASIC)
    adata = ad.read_h5ad(BASIC.path / "input_mouse.h5ad")
    vectors = model.encode(adata)
    emptied = adata.copy()
    emptied.X = adata.X.multiply(np.arange(adata.n_obs)[:, None] != 3).tocsr()
    again = model.encode(emptied)
    assert np.isnan(again[3]).all()
    np.testing.assert_allclose(np.delete(again, 3, axis=0), np.delete(vectors, 3, axis=0), atol=2e-6, rtol=0)
    assert model.receipt is not None
    assert model.receipt["n_empty"] == 1
    single = model.tokenize(adata).row(adata.obs_names.get_loc("mcell01"))
    assert len(single) == 1 + 1024 + 2
    assert len(set(single[2:-1])) == 1


def test_too_many_scaffolds() -> None:
    """Of more than 255 chromosomes those that come last in the shuffled order are left out, and the cell is counted."""
    n = 700
    genes = PlacedGenes(
        columns=np.arange(n),
        targets=np.arange(n),
        tokens=np.arange(4, 4 + n, dtype=np.int32),
        n_columns=n,
        chromosomes=np.arange(n, dtype=np.int32),
    )
    from cellfm_adapters.uce.tokenizer import tokenize

    counts = sp.csr_matrix(np.ones((2, n), dtype=np.float32))
    counts[1, 200:] = 0
    counts.eliminate_zeros()
    tokens = tokenize(counts, genes, 0, samples=1, first_chromosome=4 + n, max_tokens=1536)
    assert tokens.cut is not None
    first = tokens.row(0)
    assert (first >= 4 + n).sum() == (first == 2).sum() == 255
    assert 1 + 255 * 3 <= len(first) <= 1536
    assert tokens.cut[0] == 1 + 1024 + 2 * (tokens.cut[0] + len(first) - 1 - 1024) // 2 - len(first)
    assert tokens.cut[1] == 0


def test_duplicated_and_unplaced_genes() -> None:
    """A symbol that stands twice is two columns, as in the original; a gene without chromosome is left out and counted."""
    model = load(BASIC)
    species = adapter_of(model).genes.get("human")
    symbol = species.symbols[5]
    genes = adapter_of(model).gene_matcher("human", {"index": species.symbols})([symbol, symbol.lower(), "nothing", ""])
    assert genes.n_matched == 2
    assert genes.n_summed == 0
    np.testing.assert_array_equal(genes.tokens, [species.first_row + 5] * 2)


def test_gene_without_chromosome(tmp_path: Path) -> None:
    folder = copy_of(BASIC, tmp_path)
    lines = (folder / "species_chrom.csv").read_text().splitlines()
    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    lost = adata.var_names[2].upper()
    kept = [line for line in lines if not (line.startswith(f"{lost},") and line.endswith("human"))]
    assert len(kept) == len(lines) - 1
    (folder / "species_chrom.csv").write_text("\n".join(kept))
    model = load(BASIC, folder)
    before = load(BASIC).tokenize(adata)
    row = before.ids[before.ids >= 7]
    tokens = model.tokenize(adata)
    assert model.encode(adata).shape == (adata.n_obs, 8)
    assert model.receipt is not None
    assert model.receipt["genes_without_chromosome"] == 1
    place = adapter_of(model).genes.get("human").first_row + adapter_of(model).genes.get("human").places[lost]
    assert place in row
    assert place not in tokens.ids


# Species


def test_species_is_told() -> None:
    """From the names of the genes, with the evidence; the two macaques, or anything else that fits equally well, are refused."""
    model = load(BASIC)
    human = ad.read_h5ad(BASIC.path / "input.h5ad")
    model.encode(human)
    assert model.receipt is not None
    assert model.receipt["species"] == "human"
    assert str(model.receipt["species_evidence"]).startswith("species told from the names of the genes: human (165 known")
    model.encode(ad.read_h5ad(BASIC.path / "input_mouse.h5ad"))
    assert model.receipt["species"] == "mouse"
    both = human[:, :2].copy()
    both.var_names = ["GENEG1", "GENEH2"]
    with pytest.raises(errors.SpeciesError, match=r"macaca_\w+ .* and macaca_\w+ .* equally well; pass species="):
        model.encode(both)
    model.encode(both, species="macaca_mulatta")
    assert model.receipt["species_evidence"] == "as asked for"


def test_evidence_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    load(BASIC).encode(ad.read_h5ad(BASIC.path / "input.h5ad"))
    assert "human (165 known" in caplog.text


def test_wrong_species() -> None:
    model = load(BASIC)
    human = ad.read_h5ad(BASIC.path / "input.h5ad")
    with pytest.raises(errors.SpeciesError, match=r"species='mouse'.*human \(165 known.*pass species='human'"):
        model.encode(human, species="mouse")
    for action in (lambda: model.encode(human, species="dog"), lambda: model.gene_embeddings(species="dog")):
        with pytest.raises(errors.SpeciesError, match=r"species='dog'.*human, mouse"):
            action()
    assert model.gene_embeddings().index[0] == adapter_of(model).genes.get("human").symbols[0]
    upper = ad.read_h5ad(BASIC.path / "input_mouse.h5ad")
    upper.var_names = upper.var_names.str.upper()
    assert np.isfinite(model.encode(upper, species="mouse")).all()


def test_ensembl_ids() -> None:
    """Ids that the model does not know are refused with what was looked at; symbols in another column are found."""
    model = load(BASIC)
    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    expected = model.tokenize(adata)
    adata.var["symbol"] = adata.var_names
    adata.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    np.testing.assert_array_equal(model.tokenize(adata).ids, expected.ids)
    with pytest.raises(errors.GeneCoverageError, match=r"ENSG00000000000.*gene_ids="):
        model.encode(adata, gene_ids="index")


@pytest.mark.parametrize(("human", "mouse", "refused"), [(50, 60, False), (30, 60, False), (29, 60, True), (5, 60, True)])
def test_a_named_species_that_fits_less(human: int, mouse: int, refused: bool) -> None:
    """A species that the user names is refused if it knows less than half as many of the genes as another; not for less."""
    genes = adapter_of(load(BASIC)).genes
    own, other = (genes.get(species) for species in ("human", "mouse"))
    only_human = [symbol for symbol in own.symbols if symbol.upper() not in other.places]
    only_mouse = [symbol for symbol in other.symbols if symbol.upper() not in own.places]
    columns = {"index": [*only_human[:human], *only_mouse[:mouse]]}
    assert len(columns["index"]) == human + mouse
    if refused:
        with pytest.raises(errors.SpeciesError, match=rf"mouse \({mouse} known.*human \({human} known.*pass species='mouse'"):
            check_species(own, columns, genes)
    else:
        check_species(own, columns, genes)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared")
def test_real_mouse_cells() -> None:
    """Real mouse cells: matched where the tiny vocabulary of the golden checkpoint allows, refused under another species."""
    case = Case(DATA.parent / "golden" / "uce-mouse-headratio-l2")
    model = load(case)
    adata = ad.read_h5ad(DATA / "scrna/mouse_pancreas_739/mouse_pancreas_739.h5ad")[:60].copy()
    vectors = model.encode(adata)
    assert model.receipt is not None
    assert model.receipt["species"] == "mouse"
    assert 20 < int(model.receipt["genes_used"]) < 620
    known = np.flatnonzero([name.upper() in adapter_of(model).genes.get("mouse").places for name in adata.var_names])
    assert model.receipt["genes_used"] == len(known)
    filled = np.asarray(adata.X[:, known].sum(axis=1)).ravel() > 0
    np.testing.assert_array_equal(np.isfinite(vectors).all(axis=1), filled)
    np.testing.assert_allclose(np.linalg.norm(vectors[filled], axis=1), 1, atol=1e-6)
    with pytest.raises(errors.SpeciesError, match="pass species='mouse'"):
        model.encode(adata, species="human")
    adata.var_names = [f"ENSMUSG{99_999_000_000 + i}" for i in range(adata.n_vars)]  # there are no such
    with pytest.raises(errors.GeneCoverageError):
        model.encode(adata)


# Files


def copy_of(case: Case, where: Path) -> Path:
    folder = Path(shutil.copytree(case.checkpoint, where / "checkpoint"))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def test_only_what_is_needed_is_opened(tmp_path: Path) -> None:
    """Neither all_tokens.torch nor the protein file is needed once the list of symbols is made; it serves beside the model too."""
    folder = copy_of(BASIC, tmp_path)
    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    expected = load(BASIC).encode(adata)
    (folder / "all_tokens.torch").unlink()
    model = load(BASIC, folder)
    model.encode(adata)
    lists = sorted((cf.settings.cache_dir / "uce").glob("Homo_sapiens.GRCh38.*.symbols.txt"))
    assert len(lists) == 2  # one for each copy of the file
    shutil.copy(lists[0], folder / "protein_embeddings" / "Homo_sapiens.GRCh38.symbols.txt")
    for path in (folder / "protein_embeddings").glob("*.pt"):
        path.unlink()
    slim = load(BASIC, folder)
    np.testing.assert_array_equal(slim.encode(adata), expected)
    with pytest.raises(errors.WeightsUnavailableError, match=r"protein_embeddings/Mus_musculus\.GRCm39"):
        slim.encode(adata, species="mouse")


def test_files_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files put where the message says are found; species whose file is not there are no hindrance."""
    with pytest.raises(errors.WeightsUnavailableError, match=r"4layer_model\.torch .*figshare.*models/uce-4l"):
        cf.load("uce", device="cpu")
    # The offsets of the case are not of the published size, which is checked.
    files = registry().find("uce").checkpoint.files
    monkeypatch.setitem(files, "species_offsets.pkl", File(sha256=None, size=None))
    place = cf.settings.cache_dir / "models" / "uce-4l"
    (place / "protein_embeddings").mkdir(parents=True)
    human = f"protein_embeddings/{PROTEIN_FILES['human']}.gene_symbol_to_embedding_ESM2.pt"
    for name in ("4layer_model.torch", "species_chrom.csv", "species_offsets.pkl", human):
        shutil.copy(BASIC.checkpoint / name, place / name)
    model = cf.load("uce-100m", device="cpu", precision="float32", options=BASIC.options)
    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    np.testing.assert_array_equal(model.encode(adata), load(BASIC).encode(adata))
    with pytest.raises(errors.WeightsUnavailableError, match=r"Mus_musculus\.GRCm39"):
        model.encode(adata, species="mouse")


def test_offsets_as_json(tmp_path: Path) -> None:
    import json

    from cellfm_hub.safe_files import read_pickled_dict

    folder = copy_of(BASIC, tmp_path)
    offsets = read_pickled_dict(folder / "species_offsets.pkl")
    (folder / "species_offsets.pkl").unlink()
    (folder / "species_offsets.json").write_text(json.dumps(offsets))
    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    np.testing.assert_array_equal(load(BASIC, folder).tokenize(adata).ids, load(BASIC).tokenize(adata).ids)
    (folder / "species_offsets.json").write_text(json.dumps(offsets | {"dog": 3}))
    with pytest.raises(errors.CheckpointFormatError, match="dog"):
        load(BASIC, folder)


def test_genes_are_never_shifted(tmp_path: Path) -> None:
    """A list of another length or order, or a table of chromosomes of one species only, is refused."""
    folder = copy_of(BASIC, tmp_path)
    adata = ad.read_h5ad(BASIC.path / "input.h5ad")
    path = folder / "protein_embeddings" / f"{PROTEIN_FILES['human']}.gene_symbol_to_embedding_ESM2.pt"
    proteins: dict[str, torch.Tensor] = dict(torch.load(path, weights_only=True))  # noqa: TID251, made to be refused
    first, *rest = proteins.items()
    torch.save(dict(rest), path)
    with pytest.raises(errors.CheckpointFormatError, match=r"gene 0|189"):
        load(BASIC, folder).encode(adata)
    torch.save(dict([*rest, first]), path)
    with pytest.raises(errors.CheckpointFormatError, match="taken for others"):
        load(BASIC, folder).encode(adata)
    path.unlink()
    symbols = folder / "protein_embeddings" / f"{PROTEIN_FILES['human']}.symbols.txt"
    symbols.write_text("\n".join(list(proteins)[1:]))
    with pytest.raises(errors.CheckpointFormatError, match=r"lists 189 genes of human.*190 rows"):
        load(BASIC, folder).encode(adata)
    lines = (folder / "species_chrom.csv").read_text().splitlines()
    (folder / "species_chrom.csv").write_text("\n".join([lines[0], *(line for line in lines if line.endswith("human"))]))
    with pytest.raises(errors.CheckpointFormatError, match=r"frog|zebrafish|rows"):
        load(BASIC, folder).encode(adata, species="zebrafish")


def test_chromosome_codes_count_through_all_species(tmp_path: Path) -> None:
    """Codes are places among the sorted strings species_chromosome of the whole file; a symbol listed twice keeps its first place."""
    path = tmp_path / "chrom.csv"
    path.write_text("gene_symbol,chromosome,start,species\nA,10,5,human\nA,2,9,human\nB,2,7,human\nA,1,3,frog\nC,,1,human\n")
    table = Chromosomes.read(path)
    assert table.names.tolist() == ["frog_1", "human_10", "human_2"]
    codes, starts = table.place("human", ["B", "A", "C", "D"])
    assert codes.tolist() == [2, 1, -1, -1]
    assert starts.tolist() == [7, 5, 0, 0]
    path.write_text("symbol,chromosome\nA,1\n")
    with pytest.raises(errors.CheckpointFormatError, match="gene_symbol, chromosome, start, species"):
        Chromosomes.read(path)


def test_symbols_without_vectors_in_memory(tmp_path: Path) -> None:
    """The list is read from the cache, whatever has become of the vectors, until the file itself changes."""
    path = tmp_path / "Homo_sapiens.GRCh38.gene_symbol_to_embedding_ESM2.pt"
    rows = torch.randn(3, 4)
    torch.save({"A": rows[0], "b": rows[1], "C-1": rows[2]}, path)
    assert read_symbols(path, rows) == ["A", "b", "C-1"]
    assert read_symbols(path, torch.zeros(3, 4)) == ["A", "b", "C-1"]  # not compared again


def test_heads(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointFormatError, match=r"width 8.*options=\{'nhead'"):
        cf.load("uce", checkpoint=BASIC.checkpoint, device="cpu")
    with pytest.raises(errors.CheckpointFormatError, match="nhead=3"):
        load(BASIC, nhead=3)
    with pytest.raises(errors.InputError, match="nhead=0"):
        load(BASIC, nhead=0)
    with pytest.raises(errors.WeightsUnavailableError, match=r"33l_8ep_1024t_1280.torch"):
        cf.load("uce-33l", checkpoint=BASIC.checkpoint, device="cpu", options={"nhead": 2})
    with pytest.raises(errors.InputError, match="all three or none"):
        load(BASIC, taxon=9031)


def test_new_species_files(tmp_path: Path) -> None:
    """Vectors of another width (another ESM2) and tables of several species are refused."""
    proteins = tmp_path / "proteins.pt"
    torch.save({"A": torch.zeros(7)}, proteins)
    table = tmp_path / "chrom.csv"
    table.write_text("gene_symbol,chromosome,start,species\nA,1,5,newt\n")
    given = {"proteins": proteins, "chromosomes": table, "taxon": 8316}
    with pytest.raises(errors.CheckpointFormatError, match=r"\(7,\) for A; expected \(10,\).*15 billion"):
        load(BASIC, **given)
    torch.save({"A": torch.ones(10), "B": torch.ones(10)}, proteins)
    model = load(BASIC, **given)
    cells = ad.AnnData(sp.csr_matrix(np.array([[3.0, 2.0]], dtype=np.float32)), var={"gene": ["a", "B"]})
    cells.var_names = ["a", "B"]
    assert np.isfinite(model.encode(cells)).all()
    assert model.receipt is not None
    assert model.receipt["species"] == "newt"
    assert model.receipt["genes_without_chromosome"] == 1
    with pytest.raises(errors.SpeciesError, match="human"):
        model.encode(cells, species="human")
    with pytest.raises(errors.InputError, match="nowhere"):
        load(BASIC, **given | {"proteins": tmp_path / "nowhere.pt"})
    table.write_text(table.read_text() + "A,1,5,human\n")
    with pytest.raises(errors.CheckpointFormatError, match="2 species"):
        load(BASIC, **given)


def test_filter_on_few_cells() -> None:
    model = load(BASIC, filter=True)
    with pytest.raises(errors.InputError, match=r"10 cells.*these 6 cells.*filter off"):
        model.encode(ad.read_h5ad(BASIC.path / "input_mouse.h5ad"))


def test_filter_looks_at_all_genes() -> None:
    """Genes that the model does not know count for a cell's 25, as in the original."""
    genes = PlacedGenes(
        columns=np.array([0]), targets=np.array([0]), tokens=np.array([4], np.int32), n_columns=30, chromosomes=np.array([0], np.int32)
    )
    counts: CountMatrix = sp.csr_matrix(np.ones((12, 30), dtype=np.float32))
    from cellfm_adapters.uce.filtering import filter_genes

    filtered = filter_genes(genes, lambda: iter([counts[:5], counts[5:]]))
    assert isinstance(filtered, FilteredGenes)
    assert filtered.apply(counts).nnz == 12
    assert filtered.facts["filtered_cells"] == 0


# The card


@pytest.mark.parametrize(("name", "without_table"), [("uce-4l", 104_100_097), ("uce-33l", 674_745_857)])
def test_published_size(name: str, without_table: int) -> None:
    """The network of the card, on the meta device, has the published number of parameters."""
    checkpoint = registry().find(name).checkpoint
    with torch.device("meta"):
        network, layout = UCEAdapter.published(checkpoint.config)
    table = 145_469 * 5120
    assert count_parameters(layout) == checkpoint.parameters == without_table + table
    assert checkpoint.layers == checkpoint.config["nlayers"]
    dropped = sum(int(np.prod(key.shape)) for key in layout.values() if key.to is None)
    assert sum(p.numel() for p in network.parameters()) == without_table + table - dropped


def test_names() -> None:
    for name, checkpoint in {"UCE": "uce-4l", "uce-100m": "uce-4l", "uce-650m": "uce-33l", "33l_8ep_1024t_1280": "uce-33l"}.items():
        assert registry().find(name).name == checkpoint
