"""Pictures of embeddings."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata.io import write_elem
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex, to_rgb
from typer.testing import CliRunner

import cellfm_hub as cf
from cellfm_hub import pl
from cellfm_hub.cli import app
from cellfm_hub.errors import InputError, OutputError

N = 60

LINEAR_RGB_OF = {
    # Machado, Oliveira & Fernandes (2009), severity 1.0: what a person without one kind of cone sees.
    "all cones": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


@pytest.fixture
def adata() -> ad.AnnData:
    rng = np.random.default_rng(0)
    made = ad.AnnData(sp.csr_matrix(rng.poisson(1.0, (N, 5)).astype(np.float32)))
    kind = np.repeat(["a", "b", "c"], N // 3)
    made.obs["cell_type"] = pd.Categorical(kind)
    made.obs["depth"] = rng.random(N)
    made.obs["donor"] = np.tile(["x", "y"], N // 2)
    for name, width in (("X_one", 6), ("X_two", 4)):
        made.obsm[name] = rng.normal(0, 1, (N, width)).astype(np.float32) + (np.repeat([0, 8, 16], N // 3))[:, None]
    made.uns["cellfm"] = {"X_one": {"model": "one"}, "X_gone": {"model": "gone"}}
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two columns instead of a UMAP, which takes seconds to compile."""
    monkeypatch.setattr("scanpy.pp.neighbors", lambda *args, **kwargs: None)
    monkeypatch.setattr("scanpy.tl.umap", lambda light, **kwargs: light.obsm.__setitem__("X_umap", np.asarray(light.X[:, :2])))


def points(figure: object, panel: int = 0) -> list[PathCollection]:
    return [c for c in figure.axes[panel].collections if len(c.get_offsets())]  # type: ignore[attr-defined]


def drawn(figure: object, panel: int = 0) -> int:
    return sum(len(c.get_offsets()) for c in points(figure, panel))


def test_real_umap_keeps_clusters_apart_and_repeats(adata: ad.AnnData, tmp_path: Path) -> None:
    """Nothing of the object changes, and the same seed gives the same picture."""
    adata.obsm["X_umap"] = np.ones((N, 2), dtype=np.float32)
    adata.uns["neighbors"] = {"mine": 1}
    before = (sorted(adata.obsm), sorted(adata.uns), sorted(adata.obsp), adata.obs.to_json(), adata.obsm["X_umap"].tobytes())
    first, second = (pl.umap(adata, ["X_one", "X_two"], color="cell_type", out=tmp_path / name) for name in ("a.png", "b.png"))
    assert before == (sorted(adata.obsm), sorted(adata.uns), sorted(adata.obsp), adata.obs.to_json(), adata.obsm["X_umap"].tobytes())
    assert [axis.get_title() for axis in first.axes] == ["X_one", "X_two"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    for panel in (0, 1):
        at = np.vstack([c.get_offsets() for c in points(first, panel)])
        colors = np.vstack([c.get_facecolors() for c in points(first, panel)])
        groups = [at[(colors == c).all(axis=1)] for c in np.unique(colors, axis=0)]
        assert [len(group) for group in groups] == [N // 3] * 3
        spread = max(np.linalg.norm(group - group.mean(axis=0), axis=1).mean() for group in groups)
        centres = np.array([group.mean(axis=0) for group in groups])
        apart = min(np.linalg.norm(centres[i] - centres[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        assert apart > 2 * spread
    np.testing.assert_array_equal(points(second)[0].get_offsets(), points(first)[0].get_offsets())


def test_cells_without_vector_are_counted(adata: ad.AnnData, quick: None) -> None:
    adata.obsm["X_one"][[0, 5, 30]] = np.nan
    figure = pl.umap(adata, ["X_one", "X_two"], color="cell_type")
    assert figure.axes[0].get_title() == "X_one\n3 cells without a vector left out"
    assert figure.axes[1].get_title() == "X_two"
    assert (drawn(figure, 0), drawn(figure, 1)) == (N - 3, N)


def test_many_cells_are_drawn_from(adata: ad.AnnData, quick: None) -> None:
    """The same cells in each panel and each run, and the picture says so."""
    figure = pl.umap(adata, ["X_one", "X_two"], max_cells=20, seed=3)
    assert figure.get_suptitle() == "20 of 60 cells, drawn at random (seed 3)"
    assert drawn(figure, 0) == drawn(figure, 1) == 20
    again = pl.umap(adata, "X_one", max_cells=20, seed=3)
    np.testing.assert_array_equal(points(again)[0].get_offsets(), points(figure)[0].get_offsets())
    chosen = {tuple(np.round(row, 3).astype(np.float32).tolist()) for row in np.asarray(points(figure)[0].get_offsets())}
    assert chosen < {tuple(np.round(row, 3).astype(np.float32).tolist()) for row in adata.obsm["X_one"][:, :2]}
    assert pl.umap(adata, "X_one").get_suptitle() == ""


def test_default_keys_are_ours(adata: ad.AnnData, quick: None) -> None:
    assert [axis.get_title() for axis in pl.umap(adata).axes] == ["X_one"]
    del adata.uns["cellfm"]
    with pytest.raises(InputError, match=r"holds no embedding made here; name keys of obsm \(it has: X_one, X_two\)"):
        pl.umap(adata)


def test_labels_missing_and_numbers(adata: ad.AnnData, quick: None) -> None:
    adata.obs.loc[adata.obs_names[:4], "cell_type"] = np.nan
    figure = pl.umap(adata, "X_one", color="cell_type")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c", "missing"]
    assert sum(len(c.get_offsets()) for c in points(figure) if to_hex(c.get_facecolors()[0]).upper() == pl.MISSING) == 4
    adata.obs.loc[adata.obs_names[:7], "depth"] = np.nan
    scale = pl.umap(adata, "X_one", color="depth")
    assert [len(c.get_offsets()) for c in points(scale)] == [7, N - 7]
    assert scale.axes[-1].get_ylabel() == "depth"
    assert not scale.legends
    assert [text.get_text() for text in pl.umap(adata, "X_one", color="donor").legends[0].get_texts()] == ["x", "y"]


def test_very_many_categories(adata: ad.AnnData, quick: None) -> None:
    """Each of up to 70 has its own pair of colour and shape; the smallest beyond that share grey, and the legend says how many."""
    big = ad.concat([adata] * 3, index_unique="-")
    labels = [f"t{i}" for i in range(68)]
    big.obs["label"] = pd.Categorical((labels * 3)[: big.n_obs])
    figure = pl.umap(big, "X_one", color="label")
    handles = figure.legends[0].legend_handles
    assert len({(to_hex(h.get_color()), h.get_marker()) for h in handles}) == len(handles) == 68
    assert drawn(figure) == big.n_obs
    big.obs["label"] = pd.Categorical([f"t{i // 2}" for i in range(big.n_obs)])
    crowded = pl.umap(big, "X_one", color="label")
    assert crowded.legends[0].get_texts()[-1].get_text() == f"{big.n_obs // 2 - 70} smaller ones"
    assert drawn(crowded) == big.n_obs


@pytest.mark.parametrize("names", [2, 68])
def test_legend_covers_nothing(adata: ad.AnnData, quick: None, names: int) -> None:
    """It stands right of all panels, however wide it is."""
    big = ad.concat([adata] * 3, index_unique="-")
    big.obs["label"] = [f"a rather long name of a cell type {i % names}" for i in range(big.n_obs)]
    figure = pl.umap(big, ["X_one", "X_two"], color="label")
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().x0 > max(axis.get_window_extent().x1 for axis in figure.axes)
    assert min(axis.get_window_extent().width for axis in figure.axes) > 300


def test_points_shrink_with_their_number(adata: ad.AnnData, quick: None) -> None:
    sizes = [float(points(pl.umap(ad.concat([adata] * k, index_unique="-"), "X_one"))[0].get_sizes()[0]) for k in (1, 100)]
    assert sizes[0] > 3 * sizes[1] > 0
    assert points(pl.umap(adata, "X_one", point_size=7))[0].get_sizes()[0] == 7
    assert all(c.get_rasterized() for c in points(pl.umap(adata, "X_one")))


@pytest.mark.parametrize("vision", LINEAR_RGB_OF)
def test_colours_are_told_apart(vision: str) -> None:
    """Any two colours, the grey of missing cells and the white of the page differ by 15 in CIE Lab (matplotlib's own ten: 4)."""

    def closest(colors: tuple[str, ...]) -> float:
        rgb = np.array([to_rgb(color) for color in colors])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(linear @ LINEAR_RGB_OF[vision].T, 0, 1)
        xyz = seen @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T / [0.9505, 1.0, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
        distance = np.linalg.norm(lab[:, None] - lab, axis=2)
        return float(distance[np.triu_indices(len(colors), 1)].min())

    assert closest((*pl.COLORS, pl.MISSING)) > 15
    assert closest((*pl.COLORS, "#FFFFFF")) > 15


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning")
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning")
def test_files(adata: ad.AnnData, quick: None, tmp_path: Path, suffix: str) -> None:
    """A file gives the same picture as the object, without its matrix being read."""
    path = tmp_path / f"cells{suffix}"
    (adata.write_h5ad if suffix == ".h5ad" else adata.write_zarr)(path)
    if suffix == ".h5ad":
        with h5py.File(path, "a") as file:
            del file["X"]
            write_elem(file, "X", np.zeros((1, 1)))  # would not fit if it were read
    of_object, of_file = (pl.umap(source, color="cell_type") for source in (adata, path))
    assert [axis.get_title() for axis in of_file.axes] == ["X_one"]
    np.testing.assert_array_equal(points(of_file)[0].get_offsets(), points(of_object)[0].get_offsets())


@pytest.mark.parametrize(
    ("keys", "color", "said"),
    [
        ("X_oen", None, r"no obsm key 'X_oen'\. Did you mean 'X_one'.*It has: X_one, X_two"),
        ("X_one", "celltype", r"no obs column 'celltype'\. Did you mean 'cell_type'\? It has: cell_type, depth, donor"),
        ([], None, "keys is empty"),
    ],
)
def test_wrong_names(adata: ad.AnnData, keys: str | list[str], color: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        pl.umap(adata, keys, color=color)
    assert "\n" not in str(caught.value)


def test_too_few_cells(adata: ad.AnnData) -> None:
    adata.obsm["X_one"][10:] = np.nan
    with pytest.raises(InputError, match="10 cells with a vector; a UMAP needs at least 15"):
        pl.umap(adata, "X_one")


def test_output_is_checked_first(adata: ad.AnnData, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"pictures are written as \.png, \.pdf or \.svg"):
        pl.umap(adata, "X_one", out=tmp_path / "umap.xls")
    with pytest.raises(OutputError, match="does not exist; make it"):
        pl.umap(adata, "X_one", out=tmp_path / "no" / "umap.png")


def test_command(adata: ad.AnnData, quick: None, tmp_path: Path) -> None:
    path, picture = tmp_path / "out.h5ad", tmp_path / "umap.pdf"
    adata.write_h5ad(path)
    run = CliRunner().invoke
    arguments = ["plot", str(path), "--key", "X_one", "--key", "X_two", "--color", "cell_type", "-o", str(picture)]
    done = run(app, arguments)
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"%PDF")
    for wrong, said in (
        (["plot", str(path), "--key", "X_on"], "Did you mean 'X_one'"),
        (["plot", str(tmp_path / "none.h5ad")], "does not exist"),
        (["plot", str(picture)], "is not an .h5ad file"),
    ):
        done = run(app, wrong)
        assert done.exit_code == 1
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_is_a_lazy_submodule() -> None:
    assert cf.pl.umap is pl.umap
