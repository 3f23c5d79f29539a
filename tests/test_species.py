"""Which species a data set is of, and what a model says to another one."""

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import cellfm_hub as cf
from cellfm_hub import errors
from cellfm_hub.genes import guess_species, identifier_columns, resolve
from golden_cases import DATA, LARGE, PORTABLE

GENES = DATA / "genes"
needs_shared = pytest.mark.skipif(not GENES.is_dir(), reason="needs ../shared")
HUMAN = ["CD3D", "MS4A1", "NKG7", "LYZ", "PPBP", "CD8A", "GNLY", "FCER1A", "CST3", "IL7R", "CCR7"]
MOUSE = [symbol.capitalize() for symbol in HUMAN if symbol not in ("LYZ", "GNLY")] + ["Lyz2", "Gzma"]

SPECIES = {
    "baron_pancreas_mini/baron_pancreas_mini": "human",
    "gut_crohns_68types/gut_crohns_68types": "human",
    "mouse_merfish_brain/mouse_merfish_brain": "mouse",
    "mouse_neurons_10k/mouse_neurons_10k_x_1000genes": "mouse",
    "mouse_pancreas_50/mouse_pancreas_50": "mouse",
    "mouse_pancreas_739/mouse_pancreas_739": "mouse",
    "mouse_paul15/paul15": "mouse",
    "pbmc3k/pbmc3k_mini": "human",
    "sc_mixology/sc_mixology_3cl": "human",
}


def read(name: str, cells: int = 4) -> ad.AnnData:
    """Read the first cells of a shared set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one set has a symbol twice
        return ad.read_h5ad(DATA / "scrna" / f"{name}.h5ad")[:cells].copy()


def test_symbols() -> None:
    assert guess_species(HUMAN).species == "human"
    guess = guess_species(MOUSE)
    assert (guess.species, guess.certain, guess.by_ids) == ("mouse", True, False)
    assert "11 mouse, 0 human of 11 symbols in index" in str(guess)
    assert guess_species(HUMAN[:3]).certain is False
    assert guess_species(["g1", "g2"]).species is None
    assert guess_species([]).species is None


def test_ensembl_ids() -> None:
    guess = guess_species({"index": MOUSE, "id": [f"ENSG{i:011d}.1" for i in range(11)]})
    assert (guess.species, guess.by_ids, guess.certain) == ("human", True, True)
    assert guess_species([f"ENSRNOG{i:011d}" for i in range(20)]).species == "rat"
    mixed = guess_species([f"ENSG{i:011d}" for i in range(20)] + [f"ENSMUSG{i:011d}" for i in range(15)])
    assert mixed.species is None
    assert "mixed: 20 human, 15 mouse" in mixed.evidence


@needs_shared
@pytest.mark.parametrize("name", sorted(SPECIES))
def test_shared_sets(name: str) -> None:
    guess = guess_species(identifier_columns(read(name).var))
    assert (guess.species, guess.certain) == (SPECIES[name], True)


def human_model(**options: object) -> cf.Embedder:
    """Return a small scGPT with the whole published vocabulary; rows are cut short for speed."""
    given = {"max_length": 50, **options}
    return cf.load("scgpt", checkpoint=LARGE / "scgpt-fullvocab" / "checkpoint", options=given, device="cpu", precision="float32")


def small_model() -> cf.Embedder:
    return cf.load("scgpt", checkpoint=PORTABLE / "scgpt-basic" / "checkpoint", device="cpu", precision="float32")


def with_names(names: list[str]) -> ad.AnnData:
    adata = ad.AnnData(np.ones((2, len(names)), dtype=np.float32))
    adata.var_names = names
    return adata


def test_another_species_is_refused() -> None:
    """Before anything is matched; the message names the options."""
    with pytest.raises(errors.SpeciesError, match=r"mouse \(11 mouse, 0 human.*model of human.*'orthologs': 'one2one'"):
        small_model().encode(with_names(MOUSE))
    with pytest.raises(errors.SpeciesError, match=r"species='human', but the genes are those of mouse.*pass species='mouse'"):
        small_model().encode(with_names(MOUSE), species="human")
    with pytest.raises(errors.SpeciesError, match=r"those of rat .*model of human"):
        small_model().encode(with_names([f"ENSRNOG{i:011d}" for i in range(20)]))
    with pytest.raises(errors.SpeciesError, match="species='mouse'"):
        small_model().encode(with_names(HUMAN), species="mouse")


def test_invented_names_say_nothing() -> None:
    """The golden case has invented symbols: the species is not known, and that is no error."""
    model = small_model()
    model.encode(ad.read_h5ad(PORTABLE / "scgpt-basic" / "input.h5ad"))
    assert model.receipt is not None
    assert model.receipt["species"] == "unknown"


@needs_shared
@pytest.mark.parametrize("name", sorted(name for name, species in SPECIES.items() if species == "mouse"))
def test_mouse_data_and_a_human_model(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Refused; by one-to-one orthologs only where the user says so, and then it is said."""
    adata = read(name)
    with pytest.raises(errors.SpeciesError, match="mouse"):
        human_model().tokenize(adata)
    with cf.settings.override(genes_dir=GENES):
        model = human_model(orthologs="one2one")
        vectors = model.encode(adata)
        np.testing.assert_array_equal(model.encode(adata, species="mouse"), vectors)
    assert model.receipt is not None
    assert "human one-to-one orthologs" in str(model.receipt["gene_ids"])
    assert model.receipt["species"] == "mouse"
    assert "one-to-one orthologs" in caplog.text
    assert int(model.receipt["genes_used"]) > 0.55 * adata.n_vars
    assert np.isfinite(vectors).all(axis=1).sum() >= 3


@needs_shared
def test_orthologs_are_the_right_genes() -> None:
    """Of genes with one ortholog in each direction; a gene of a family with several has none."""
    model_genes = {"Cd3d": "CD3D", "Ms4a1": "MS4A1", "Ptprc": "PTPRC", "Gapdh": "GAPDH"}
    names = [*MOUSE, "Ptprc", "Gapdh"]
    with cf.settings.override(genes_dir=GENES):
        model = human_model(orthologs="one2one")
        tokens = model.tokenize(with_names(list(dict.fromkeys(names))))
    vocabulary = model.adapter.vocabulary  # type: ignore[attr-defined]
    seen = {str(vocabulary[i]) for i in tokens.row(0)} - {"<cls>"}
    assert set(model_genes.values()) - seen <= {"GAPDH"}  # whose pseudogenes may make it many to many
    assert seen <= set(resolve(sorted(seen), species="human", to="symbol").target)


def test_orthologs_need_mouse_data_and_a_table(tmp_path: Path) -> None:
    model = cf.load("scgpt", checkpoint=PORTABLE / "scgpt-basic" / "checkpoint", options={"orthologs": "one2one"}, device="cpu")
    with pytest.raises(errors.SpeciesError, match=r"orthologs='one2one'.*human"):
        model.encode(with_names(HUMAN))
    with (
        cf.settings.override(genes_dir=None),
        pytest.raises(errors.InputError, match=r"does not ship.*mouse_human_orthologs.*CELLFM_GENES"),
    ):
        model.encode(with_names(MOUSE))
    with pytest.raises(errors.InputError, match=r"orthologs='all'.*none \| one2one"):
        cf.load("scgpt", checkpoint=PORTABLE / "scgpt-basic" / "checkpoint", options={"orthologs": "all"})


@needs_shared
def test_mouse_cells_under_human_symbols(caplog: pytest.LogCaptureFixture) -> None:
    """Identifiers cannot tell them from human cells; the annotation of the cells can, and the user is told."""
    adata = ad.read_h5ad(DATA / "scrna/baron_pancreas_mini/baron_pancreas_mini.h5ad")
    some = adata[[0, *np.flatnonzero(adata.obs["species"] == "mouse")[:3]]].copy()
    human_model().encode(some)
    said = (some.obs["species"] == "mouse").sum()
    assert f"obs['species'] says that {said} of 4 cells are mouse" in caplog.text
    assert "are taken for human genes" in caplog.text


def test_genes_of_two_species(caplog: pytest.LogCaptureFixture) -> None:
    small = small_model()
    adata = ad.read_h5ad(PORTABLE / "scgpt-basic" / "input.h5ad")
    mixed = with_names([*adata.var["feature_name"].astype(str)[:50], *HUMAN, *MOUSE])
    small.encode(mixed)
    assert "the species of the genes is not clear, mixed: " in caplog.text
