"""Going on with other options than before is refused, whichever option it is: interrupted, finished, or in shards."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata as ad
import pytest

import cellfm_hub as cf
from cellfm_hub.errors import OutputError
from cellfm_hub.jobs.run import FileOptions
from file_runs import CELLS, DNA, computed, stop_after, write_cells, write_fasta

OF_CELLS: dict[str, Any] = {
    "layer": "same",
    "gene_ids": "feature_name",
    "species": "human",
    "on_empty": "error",
    "recipe": "mean",
    "pooling": "mean",
    "output_layer": 0,
    "seed": 1,
    "options": {"ties": "upper"},
    "precision": "bfloat16",
}
OF_SEQUENCES: dict[str, Any] = {"long": "truncate", "overlap": 8, "reverse_complement": "mean", "level": "token"}
OF_VARIANTS: dict[str, Any] = {"window": 64}
TOGETHER: dict[str, dict[str, Any]] = {"overlap": {"long": "tile"}}
"""Options that are refused without others."""
NAMED_OTHERWISE = {"key_added": "X_other", "qc": True, "part_rows": 9}
"""Not of the model: of the run, or of the place where its vectors go."""

ELSEWHERE = {"checkpoint", "revision", "genome"}
"""Compared by content: tests in `test_resume.py` and `test_sequence_files.py`."""
CHANGE_NOTHING = {"batch_tokens", "progress", "device"}
VERBS = {"resume", "overwrite", "update", "shard"}


def test_no_option_is_forgotten() -> None:
    known = {*OF_CELLS, *OF_SEQUENCES, *OF_VARIANTS, *NAMED_OTHERWISE, *ELSEWHERE, *CHANGE_NOTHING, *VERBS}
    assert known == set(FileOptions.__annotations__)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of cells and of sequences: an interrupted run and a finished one."""
    folder = tmp_path_factory.mktemp("runs")
    cells = ad.read_h5ad(write_cells(folder / "cells.h5ad", 12))
    cells.layers["same"] = cells.X.copy()
    cells.write_h5ad(folder / "cells.h5ad")
    write_fasta(folder / "dna.fa", 12)
    for data, model, options in (("cells.h5ad", "scgpt", CELLS), ("dna.fa", "nt", DNA)):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                cf.embed_file(folder / data, model, out=folder / f"{model}.interrupted.parquet", part_rows=8, **options)
        cf.embed_file(folder / data, model, out=folder / f"{model}.finished.parquet", part_rows=8, **options)
    return folder


@pytest.mark.parametrize(("option", "value"), [*OF_CELLS.items(), *OF_SEQUENCES.items(), *NAMED_OTHERWISE.items()])
def test_resume(runs: Path, option: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model, options = ("dna.fa", "nt", DNA) if option in OF_SEQUENCES else ("cells.h5ad", "scgpt", CELLS)
    changed = options | {option: value} | TOGETHER.get(option, {})
    numbers = computed(monkeypatch)
    with pytest.raises(OutputError, match=rf"was another one: .*{value if option == 'key_added' else option}.*--overwrite"):
        cf.embed_file(runs / data, model, out=runs / f"{model}.interrupted.parquet", resume=True, **changed)
    if option not in ("key_added", "part_rows"):  # a table has one model's columns, and no parts
        with pytest.raises(OutputError, match=r"exists; pass --overwrite"):
            cf.embed_file(runs / data, model, out=runs / f"{model}.finished.parquet", resume=True, **changed)
    assert numbers == []


@pytest.mark.parametrize(("option", "value"), OF_VARIANTS.items())
def test_resume_variants(tmp_path: Path, option: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "g.fa").write_text(f">chr1\n{'ACGTTGCA' * 40}\n")
    (tmp_path / "calls.vcf").write_text("".join(f"chr1\t{8 * i + 1}\t.\tA\tC\n" for i in range(10, 22)))
    options = DNA | {"genome": tmp_path / "g.fa"}
    for name in ("interrupted", "finished"):
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            if name == "interrupted":
                stop_after(patch, 1)
            cf.embed_file(tmp_path / "calls.vcf", "nt", out=tmp_path / f"{name}.parquet", part_rows=8, **options)
    numbers = computed(monkeypatch)
    for name, says in (("interrupted", f"was another one: .*{option}.*--overwrite"), ("finished", "exists; pass --overwrite")):
        with pytest.raises(OutputError, match=says):
            cf.embed_file(tmp_path / "calls.vcf", "nt", out=tmp_path / f"{name}.parquet", resume=True, **options, **{option: value})
    assert numbers == []


@pytest.mark.parametrize("option", ["layer", "gene_ids", "species"])
def test_update(runs: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = computed(monkeypatch)
    with pytest.raises(OutputError, match=f"made with other options: .*{option}"):
        cf.embed_file(runs / "cells.h5ad", "scgpt", out=runs / "scgpt.finished.parquet", update=True, **CELLS, **{option: OF_CELLS[option]})
    assert numbers == []


@pytest.mark.parametrize("option", ["layer", "gene_ids", "species"])
def test_merge(runs: Path, option: str) -> None:
    out = runs / f"{option}.parquet"
    cf.embed_file(runs / "cells.h5ad", "scgpt", out=out, shard=(1, 2), part_rows=8, **CELLS)
    cf.embed_file(runs / "cells.h5ad", "scgpt", out=out, shard=(2, 2), part_rows=8, **CELLS, **{option: OF_CELLS[option]})
    with pytest.raises(OutputError, match=f"not of one run: .*{option}"):
        cf.merge(out)


@pytest.mark.parametrize("option", sorted(CHANGE_NOTHING - {"device"}))
def test_what_changes_nothing_may_change(runs: Path, option: str) -> None:
    changed = CELLS | {option: {"batch_tokens": 999, "progress": True}[option]}
    again = cf.embed_file(runs / "cells.h5ad", "scgpt", out=runs / "scgpt.finished.parquet", resume=True, **changed)
    assert again.rows == 12
