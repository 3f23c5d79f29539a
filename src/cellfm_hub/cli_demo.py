"""The commands that show something: ``demo`` and ``plot``."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    dna: Annotated[bool, typer.Option("--dna", help="Simulated DNA with demo-dna and kmer, instead of cells.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Result; the picture goes beside it.", show_default="demo.h5ad or demo_dna.h5ad")
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option(help="Replace existing files.", show_default="only those that the demo wrote itself")
    ] = None,
) -> None:
    """Embed 700 real blood cells with the built-in demo-cell and with pca, offline, and draw both."""
    from cellfm_hub import sinks
    from cellfm_hub.errors import OutputError

    out = out or Path("demo_dna.h5ad" if dna else "demo.h5ad")
    if out.suffix != ".h5ad":
        message = f"{out}: the demo writes an .h5ad file; give a name that ends in .h5ad"
        raise OutputError(message)
    picture = out.with_suffix(".png")
    if overwrite is None:
        overwrite = out.exists() and _is_demo(out)
    if picture.exists() and not overwrite:
        message = f"{picture} exists; pass --overwrite to replace it, or choose another name with -o"
        raise OutputError(message)
    sinks.check_output(out, source=Path("demo data"), keys=[], overwrite=overwrite)
    from cellfm_hub.demo import run_demo

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    rows, what = ("sequences", "600 simulated sequences of 300 bases") if dna else ("cells", "700 blood cells x 765 genes, raw counts")
    typer.echo(f"{what}; in 5-fold cross-validation 5 nearest neighbours name the label:")
    typer.echo(f"{'model':<11} {'vectors':>9} {'seconds':>8} {f'{rows}/s':>12} {'accuracy':>9} {'balanced':>9}")
    results = run_demo(out, picture, dna=dna)
    for result in results:
        shape = "x".join(map(str, result.shape))
        speed = result.shape[0] / result.seconds
        typer.echo(
            f"{result.model:<11} {shape:>9} {result.seconds:>8.1f} {speed:>12,.0f} {result.accuracy:>9.3f} {result.balanced_accuracy:>9.3f}"
        )
    typer.echo(f"wrote {out} and {picture} (two UMAPs, coloured by {'kind' if dna else 'cell type'})")
    data, model = ("your.fa", "demo-dna -o your.parquet") if dna else ("your.h5ad", "demo-cell -o out.h5ad")
    then = "" if dna else " && cellfm plot out.h5ad --key X_demo-cell -o umap.png"
    typer.echo(f"next, on your own file:  cellfm embed {data} --model {model}{then}")
    typer.echo("then 'cellfm models' for the published models; demo-cell and demo-dna are for trying and teaching, not for science")


def _is_demo(out: Path) -> bool:
    """Whether the demo wrote a file."""
    import h5py

    from cellfm_hub.demo import CELL_MODELS, DNA_MODELS
    from cellfm_hub.sources.safe_stores import open_hdf5

    if not h5py.is_hdf5(out):
        return False
    with open_hdf5(out) as file:
        receipts = set(file.get("uns/cellfm", ()))
    return any(receipts == {f"X_{model}" for model in models} for models in (CELL_MODELS, DNA_MODELS))


def plot(
    data: Annotated[Path, typer.Argument(help="Result of 'cellfm embed': .h5ad or .zarr.", show_default=False)],
    key: Annotated[
        list[str] | None,
        typer.Option("--key", "-k", help="Key in obsm, one panel each; repeatable.", show_default="all embeddings made here"),
    ] = None,
    color: Annotated[str | None, typer.Option("--color", "-c", help="Column of obs.", show_default="one colour")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture: .png, .pdf or .svg.")] = Path("umap.png"),
    max_cells: Annotated[int, typer.Option(min=15, help="Of more cells that many are drawn at random.")] = 100_000,
    point_size: Annotated[float | None, typer.Option(help="Area of a point, square points.", show_default="by number of cells")] = None,
    seed: Annotated[int, typer.Option(help="For the draw and the layout.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing picture.")] = False,
) -> None:
    """Draw the UMAPs of embeddings side by side."""
    from cellfm_hub import pl
    from cellfm_hub.errors import OutputError

    if out.exists() and not overwrite:
        message = f"{out} exists; pass --overwrite to replace it, or choose another name with -o"
        raise OutputError(message)
    pl.umap(data, key or None, color=color, out=out, max_cells=max_cells, point_size=point_size, seed=seed)
    typer.echo(f"wrote {out}")


def register(app: typer.Typer, one_line_errors: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Add the commands to the application."""
    commands: tuple[Callable[..., Any], ...] = (demo, plot)
    for command in commands:
        app.command()(one_line_errors(command))
