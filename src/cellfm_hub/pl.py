"""Pictures of embeddings."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.errors import InputError, OutputError, did_you_mean

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CELLS = 100_000
"""A picture of more points looks the same and takes much longer."""
FEWEST = 15
"""Cells that a UMAP needs to mean anything."""

COLORS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"),
    *("#8800FF", "#663311", "#112288", "#AAEE99", "#554455", "#BB55FF"),
)
"""Colours that people with any colour vision tell apart: the eight of Okabe & Ito (2008), and six that lie farthest from them and from each
other. A test simulates the deficiencies and measures the distances."""
MARKERS = ("o", "^", "s", "D", "v")
"""With more categories than colours, shape tells apart what shares a colour."""
MISSING = "#D9D9D9"


@dataclass(frozen=True)
class _Source:
    """What a picture needs of an AnnData object or of its file."""

    name: str
    obs: pd.DataFrame
    keys: tuple[str, ...]
    embedded: tuple[str, ...]
    """The keys that have a receipt of ours."""
    read: Callable[[str], Any]


def umap(
    data: "AnnData | str | Path",
    keys: str | Sequence[str] | None = None,
    *,
    color: str | None = None,
    out: str | Path | None = None,
    max_cells: int = MAX_CELLS,
    n_neighbors: int = 15,
    point_size: float | None = None,
    seed: int = 0,
) -> "Figure":
    """Draw the UMAP of one or more embeddings side by side. The data are not changed.

    Neighbours and coordinates are computed by scanpy on a copy of the vectors alone; ``X_umap`` and ``uns["neighbors"]`` of the data, where
    they exist, stay as they are.

    Parameters
    ----------
    data
        An AnnData object, or the path of an ``.h5ad`` file or ``.zarr`` folder, of which only ``obs`` and the vectors are read.
    keys
        Keys of ``obsm``, such as ``"X_scgpt"`` or ``["X_pca", "X_scgpt"]``. Default: all that :func:`cellfm_hub.embed` wrote.
    color
        Column of ``obs``. Text and categories get colours that are safe for colour-blind readers, numbers a scale.
    out
        Also write the picture there; the suffix decides on the format (``.png``, ``.pdf``, ``.svg``).
    max_cells
        Of more cells that many are drawn at random, the same in each panel; the picture says so.
    n_neighbors
        Of the neighbour graph.
    point_size
        Area of a point in square points; default: by the number of cells.
    seed
        For the draw and for the layout.

    Returns
    -------
    The figure, one panel per key. Cells without a vector (NaN) are left out of their panel and counted in its title.

    Raises
    ------
    InputError
        If a key or the column does not exist (with the nearest names), or there are too few cells.
    OutputError
        If the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = None if out is None else _checked_target(Path(out))
    with _open(data) as source:
        chosen = _chosen_keys(source, keys)
        if color is not None and color not in source.obs:
            columns = ", ".join(map(str, source.obs.columns)) or "none"
            msg = f"{source.name} has no obs column {color!r}.{did_you_mean(color, map(str, source.obs.columns))} It has: {columns}"
            raise InputError(msg)
        n = len(source.obs)
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(n, max_cells, replace=False)) if n > max_cells else np.arange(n)
        panels = {key: _coordinates(source, key, rows, n_neighbors=n_neighbors, seed=seed) for key in chosen}
        values = None if color is None else source.obs[color].iloc[rows]

    is_scale = values is not None and pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    figure = Figure(figsize=(4.6 * len(panels) + (1.0 if is_scale else 0.0), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    size = point_size if point_size is not None else float(np.clip(12_000 / len(rows), 0.3, 14.0))
    order = rng.permutation(len(rows))  # so that no category lies on top of the others
    for axis, (key, points) in zip(axes, panels.items(), strict=True):
        drawn = order[~np.isnan(points[order, 0])]
        if values is None:
            axis.scatter(*points[drawn].T, s=size, c=COLORS[0], linewidths=0, rasterized=True)
        elif is_scale:
            numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
            known = drawn[~np.isnan(numbers[drawn])]
            axis.scatter(*points[np.setdiff1d(drawn, known)].T, s=size, c=MISSING, linewidths=0, rasterized=True)
            shades = axis.scatter(*points[known].T, s=size, c=numbers[known], cmap="viridis", linewidths=0, rasterized=True)
            shades.set_clim(np.nanmin(numbers), np.nanmax(numbers))
        else:
            _draw_categories(axis, points, drawn, _Categories.of(values), size)
        left_out = len(rows) - len(drawn)
        note = f"\n{left_out:,} cells without a vector left out" if left_out else ""
        axis.set_title(f"{key}{note}", fontsize=10)
        axis.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
        axis.spines[["top", "right"]].set_visible(False)
    if is_scale:
        figure.colorbar(shades, ax=list(axes), label=color, shrink=0.7)
    elif values is not None:
        _legend(figure, _Categories.of(values), str(color))
    if n > max_cells:
        figure.suptitle(f"{max_cells:,} of {n:,} cells, drawn at random (seed {seed})", fontsize=9)
    if target is not None:
        _write(figure, target)
    return figure


# Reading


@contextmanager
def _open(data: "AnnData | str | Path") -> Iterator[_Source]:
    if not isinstance(data, str | Path):
        ours = tuple(data.uns.get("cellfm", {}))
        yield _Source("the AnnData object", data.obs, tuple(data.obsm), ours, data.obsm.__getitem__)
        return
    path = Path(data)
    if not path.exists():
        msg = f"{path} does not exist; give a result of 'cellfm embed' (.h5ad or .zarr)"
        raise InputError(msg)
    from cellfm_hub.sources.matrix import reading

    with _open_store(path) as store:
        if "obs" not in store:
            msg = f"{path} has no obs, so it holds no cells; pictures are made of .h5ad and .zarr results"
            raise InputError(msg)
        obsm: Mapping[str, Any] = store.get("obsm", {})

        def read(element: Any) -> Any:
            from anndata.io import read_elem

            with reading(path):
                return read_elem(element)

        ours = tuple(store["uns/cellfm"]) if "uns/cellfm" in store else ()
        yield _Source(str(path), read(store["obs"]), tuple(obsm), ours, lambda key: read(obsm[key]))


@contextmanager
def _open_store(path: Path) -> Iterator[Any]:
    from cellfm_hub.sources.matrix import reading
    from cellfm_hub.sources.safe_stores import open_hdf5, open_zarr

    if path.suffix == ".zarr":
        with reading(path):
            store = open_zarr(path)
        yield store
        return
    try:
        file = open_hdf5(path)
    except OSError as error:
        msg = f"{path} is not an .h5ad file ({str(error).splitlines()[0]}); give a result of 'cellfm embed' (.h5ad or .zarr)"
        raise InputError(msg) from error
    with file:
        yield file


def _chosen_keys(source: _Source, keys: str | Sequence[str] | None) -> list[str]:
    listed = ", ".join(source.keys) or "none"
    if keys is None:
        chosen = [key for key in source.embedded if key in source.keys]
        if not chosen:
            msg = f"{source.name} holds no embedding made here; name keys of obsm (it has: {listed}), or run 'cellfm embed' first"
            raise InputError(msg)
        return chosen
    chosen = list(dict.fromkeys([keys] if isinstance(keys, str) else keys))
    if not chosen:
        msg = f"keys is empty; name at least one key of obsm (it has: {listed})"
        raise InputError(msg)
    for key in chosen:
        if key not in source.keys:
            msg = f"{source.name} has no obsm key {key!r}.{did_you_mean(key, source.keys)} It has: {listed}"
            raise InputError(msg)
    return chosen


def _coordinates(source: _Source, key: str, rows: NDArray[np.int64], *, n_neighbors: int, seed: int) -> NDArray[np.float32]:
    """Return ``(len(rows), 2)``, NaN where a cell has no vector."""
    vectors = np.asarray(source.read(key), dtype=np.float32)
    if vectors.ndim != 2:
        msg = f"obsm[{key!r}] of {source.name} has shape {vectors.shape}; expected one vector per cell"
        raise InputError(msg)
    vectors = vectors[rows]
    whole = np.isfinite(vectors).all(axis=1)
    if whole.sum() < FEWEST:
        msg = f"obsm[{key!r}] of {source.name} has {whole.sum()} cells with a vector; a UMAP needs at least {FEWEST}"
        raise InputError(msg)
    import scanpy as sc
    from anndata import AnnData

    light = AnnData(vectors[whole])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap says that a fixed seed means one thread
        sc.pp.neighbors(light, n_neighbors=min(n_neighbors, light.n_obs - 1), use_rep="X", random_state=seed)
        sc.tl.umap(light, random_state=seed)
    points = np.full((len(rows), 2), np.nan, dtype=np.float32)
    points[whole] = light.obsm["X_umap"]
    return points


# Drawing


@dataclass(frozen=True)
class _Categories:
    """A column of labels as codes, and what each looks like. Of too many only the largest get a look of their own."""

    codes: NDArray[np.int64]
    """Place in `names` of each cell; -1: missing, or one of too many."""
    names: tuple[str, ...]
    others: int
    """How many categories share grey."""
    has_missing: bool

    @classmethod
    def of(cls, values: "pd.Series[Any]") -> "_Categories":
        labels = values.astype("category").cat.remove_unused_categories()
        codes = np.asarray(labels.cat.codes, dtype=np.int64)
        names = [str(name) for name in labels.cat.categories]
        room = len(COLORS) * len(MARKERS)
        missing = bool((codes < 0).any())
        if len(names) <= room:
            return cls(codes, tuple(names), 0, missing)
        largest = np.sort(np.argsort(-np.bincount(codes[codes >= 0], minlength=len(names)), kind="stable")[:room])
        place = np.full(len(names) + 1, -1)  # the last entry is that of code -1
        place[largest] = np.arange(room)
        return cls(place[codes].astype(np.int64), tuple(names[i] for i in largest), len(names) - room, missing)

    def look(self, code: int) -> tuple[str, str]:
        """Return colour and marker."""
        return COLORS[code % len(COLORS)], MARKERS[code // len(COLORS)]


def _draw_categories(axis: "Axes", points: NDArray[np.float32], drawn: NDArray[np.int64], labels: _Categories, size: float) -> None:
    codes = labels.codes[drawn]
    x, y = points[drawn[codes < 0]].T
    axis.scatter(x, y, s=size, c=MISSING, linewidths=0, rasterized=True)
    looks = [labels.look(code) for code in range(len(labels.names))]
    colors = np.array([color for color, _ in looks])
    shapes = np.array([marker for _, marker in looks])
    for marker in dict.fromkeys(shapes):
        of_shape = drawn[(codes >= 0) & (shapes[codes] == marker)]
        x, y = points[of_shape].T
        axis.scatter(x, y, s=size, c=colors[labels.codes[of_shape]], marker=marker, linewidths=0, rasterized=True)


def _legend(figure: "Figure", labels: _Categories, title: str) -> None:
    from matplotlib.lines import Line2D

    entries = [(name, *labels.look(code)) for code, name in enumerate(labels.names)]
    if labels.others:
        entries.append((f"{labels.others:,} smaller ones", MISSING, "o"))
    if labels.has_missing:
        entries.append(("missing", MISSING, "o"))
    handles = [Line2D([], [], color=color, marker=marker, linestyle="", label=name) for name, color, marker in entries]
    columns = -(-len(handles) // 20)
    # Beside the figure, however wide it is: saving and notebooks crop to what is drawn.
    figure.legend(handles=handles, title=title, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, ncols=columns)


# Writing


def _checked_target(out: Path) -> Path:
    if not out.parent.is_dir():
        msg = f"{out} cannot be written: the folder {out.parent} does not exist; make it, or choose another"
        raise OutputError(msg)
    if out.suffix.lower() not in (".png", ".pdf", ".svg"):
        msg = f"{out}: pictures are written as .png, .pdf or .svg; choose one of these suffixes"
        raise OutputError(msg)
    return out


def _write(figure: "Figure", out: Path) -> None:
    try:
        figure.savefig(out, dpi=150, bbox_inches="tight")
    except OSError as error:
        msg = f"{out} cannot be written ({error.strerror}); choose another place"
        raise OutputError(msg) from error
