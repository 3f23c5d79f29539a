"""Train ``demo-cell``: a Geneformer of a few hundred thousand numbers per layer, on real human cells.

Run ``python -m cellfm_hub.demo_checkpoints.train_cell --data FOLDER --out FOLDER``. FOLDER of the data holds ``scrna`` and ``genes``, see
``model_cards/demo.md`` for what they are and their licences. About 20 minutes on one core. Labels are never read.

What it does: genes are renamed to current Ensembl ids (HGNC); the vocabulary is every gene seen in enough cells; medians are those of
non-zero expression over all training cells. Each batch then takes some cells, thins their counts (binomial, so that a cell is seen at many
depths), looks at them through a random panel of genes (so that small panels and whole transcriptomes both look familiar), ranks, masks, and
asks which of the panel's genes each mask hides.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, svds

import cellfm_hub as cf
from cellfm_hub.adapter import CellAdapter
from cellfm_hub.demo_checkpoints.training import (
    BERT_HEAD,
    Head,
    Masking,
    Schedule,
    Step,
    layout_of,
    random_tensors,
    train,
    trained_tensors,
    write_checkpoint,
)
from cellfm_hub.genes import GeneMap

FAMILY = "geneformer"
SPECIAL = ("<pad>", "<mask>")
CONFIG: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "relu",
    "position_embedding_type": "absolute",
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SCHEDULE = Schedule(steps=1500, peak_rate=1e-3, warmup=100, mask_share=(0.15, 0.5), layer=CONFIG["num_hidden_layers"])

MIN_CELLS = 30
"""A gene that fewer training cells express has nothing to learn from."""
WHOLE = 0.1
"""Share of batches that see all genes; the others a panel."""
PANEL = (400, 1500)
CELLS_PER_PANEL, CELLS_PER_WHOLE = 96, 24
GROUPS = 4
SHORTEST = 16
DEPTH = (0.3, 1.0)
"""Range of the share of a cell's molecules that thinning keeps."""
HELD_OUT = 0.05
OFFSET_KEY = "bert.embeddings.token_type_embeddings.weight"
OFFSET_SCALE, WORD_SCALE = 0.3, 0.1


@dataclass(frozen=True)
class Genes:
    """Names of human genes, from the HGNC table (CC0)."""

    symbol_of: dict[str, str]
    """Current Ensembl id -> approved symbol."""
    id_of: dict[str, str]
    """Approved symbol, else previous symbol, else alias, upper case -> current Ensembl id. Names of several genes are left out."""

    @classmethod
    def read(cls, path: Path) -> "Genes":
        """Read the table."""
        table = pd.read_csv(path, sep="\t", dtype=str, usecols=["symbol", "prev_symbol", "alias_symbol", "ensembl_gene_id"])
        table = table.dropna(subset=["ensembl_gene_id"]).drop_duplicates("ensembl_gene_id")
        id_of = {symbol.upper(): gene for symbol, gene in zip(table["symbol"], table["ensembl_gene_id"], strict=True)}
        taken = set(id_of)
        for column in ("prev_symbol", "alias_symbol"):
            genes_of: dict[str, set[str]] = {}
            for names, gene in table[[column, "ensembl_gene_id"]].dropna().itertuples(index=False):
                for name in names.upper().split("|"):
                    genes_of.setdefault(name, set()).add(gene)
            id_of |= {name: next(iter(genes)) for name, genes in genes_of.items() if len(genes) == 1 and name not in taken}
            taken |= set(genes_of)  # an ambiguous previous symbol is no clear alias either
        return cls(dict(zip(table["ensembl_gene_id"], table["symbol"], strict=True)), id_of)

    def current(self, ensembl_id: str, symbol: str) -> str | None:
        """Return the current id of a gene, or ``None``."""
        return ensembl_id if ensembl_id in self.symbol_of else self.id_of.get(symbol.upper())


def read_cells(data: Path, genes: Genes) -> tuple[sp.csr_matrix, NDArray[np.str_]]:
    """Read the training cells, ``(n, g)`` counts, and the Ensembl id of each column."""
    scrna = data / "scrna"
    pbmc = ad.read_h5ad(scrna / "pbmc3k" / "pbmc3k.h5ad")
    lines = ad.read_h5ad(scrna / "sc_mixology" / "sc_mixology_3cl.h5ad")
    pancreas = ad.read_h5ad(scrna / "baron_pancreas_mini" / "baron_pancreas_mini.h5ad")
    pancreas = pancreas[(pancreas.obs["species"] == "human").to_numpy()]
    named = [
        (pbmc.X, [genes.current(i, s) for i, s in zip(pbmc.var["ensembl_id"], pbmc.var_names, strict=True)]),
        (lines.X, [genes.current(i, s) for i, s in zip(lines.var_names, lines.var["gene_symbol"], strict=True)]),
        (pancreas.X, [genes.current("", s) for s in pancreas.var_names]),
    ]
    known = np.array(sorted({gene for _, ids in named for gene in ids if gene is not None}))
    place = {gene: i for i, gene in enumerate(known)}
    blocks = []
    for counts, ids in named:
        columns = [(i, place[gene]) for i, gene in enumerate(ids) if gene is not None]
        source, target = np.array(columns).T
        # Columns of one gene are summed.
        renaming = sp.csr_matrix((np.ones(len(source)), (source, target)), shape=(counts.shape[1], len(known)))
        blocks.append(sp.csr_matrix(counts).astype(np.float64) @ renaming)
    return sp.vstack(blocks, format="csr"), known


def medians(counts: sp.csr_matrix, wanted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the median of the non-zero expression of each wanted gene, per 10,000 counts of the cell."""
    scaled = sp.diags(1e4 / np.asarray(counts.sum(axis=1)).ravel()) @ counts
    columns = scaled[:, wanted].tocsc()
    return np.array([np.median(columns.data[a:b]) for a, b in zip(columns.indptr[:-1], columns.indptr[1:], strict=True)])


def write_dictionaries(folder: Path, ids: NDArray[np.str_], values: NDArray[np.float64], genes: Genes) -> None:
    """Write ``tokens.tsv`` and ``aliases.tsv``, the text form of Geneformer's dictionaries."""
    rows = ["token_id\ttoken\tmedian\tsymbol", *(f"{i}\t{token}\t\t" for i, token in enumerate(SPECIAL))]
    rows += [f"{i}\t{g}\t{m:.6g}\t{genes.symbol_of[g]}" for i, (g, m) in enumerate(zip(ids, values, strict=True), start=len(SPECIAL))]
    (folder / "tokens.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    known = set(ids)
    pairs = sorted((alias, gene) for alias, gene in genes.id_of.items() if gene in known)
    (folder / "aliases.tsv").write_text("\n".join(["alias\tensembl_id", *(f"{a}\t{g}" for a, g in pairs)]) + "\n", encoding="utf-8")


def gene_vectors(counts: sp.csr_matrix, width: int) -> NDArray[np.float32]:
    """Return ``(g, width)``: right singular vectors of which genes are seen together, from which the gene embeddings start.

    A cell's row is each gene's presence over the number of genes seen; columns are centred and divided by the spread of the presence.
    """
    seen = (counts > 0).astype(np.float64)
    share = np.asarray(seen.mean(axis=0)).ravel()
    spread = np.sqrt(share * (1 - share)) + 0.03
    rows = sp.diags(1000 / np.asarray(seen.sum(axis=1)).ravel()) @ seen @ sp.diags(1 / spread)
    mean = np.asarray(rows.mean(axis=0)).ravel()
    centred = LinearOperator(
        rows.shape,
        matvec=lambda v: rows @ v.ravel() - mean @ v.ravel(),
        rmatvec=lambda u: rows.T @ u.ravel() - mean * u.sum(),
        dtype=np.float64,
    )
    vectors = svds(centred, k=width, random_state=0)[2].T / spread[:, None]
    scaled: NDArray[np.float32] = (vectors / vectors.std(axis=0)).astype(np.float32)
    return scaled


class Batches:
    """Draws thinned cells seen through random panels; :meth:`draw` gives all steps that one panel makes."""

    def __init__(self, adapter: CellAdapter, counts: sp.csr_matrix, seed: int) -> None:
        self.adapter, self.counts, self.rng = adapter, counts, np.random.default_rng(seed)
        self.detected = np.asarray((counts > 0).mean(axis=0)).ravel()
        self.first_gene = len(SPECIAL)

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield from self.draw()

    def draw(self) -> Iterator[Step]:
        """Yield the batches of one panel."""
        whole = self.rng.random() < WHOLE
        cells = self.rng.choice(self.counts.shape[0], CELLS_PER_WHOLE if whole else CELLS_PER_PANEL, replace=False)
        counts = self.counts[cells]
        depth = np.repeat(self.rng.uniform(*DEPTH, len(cells)), np.diff(counts.indptr))
        counts.data = self.rng.binomial(counts.data.astype(np.int64), depth).astype(np.float64)
        counts.eliminate_zeros()
        n = counts.shape[1]
        if whole:
            panel = np.arange(n)
        else:
            # Panels are made of genes that people expect to see.
            panel = np.sort(self.rng.choice(n, self.rng.integers(*PANEL), replace=False, p=self.detected / self.detected.sum()))
        ids = (panel + self.first_gene).astype(np.int32)
        candidates = ids.astype(np.int64)
        genes = GeneMap(np.arange(len(ids)), np.arange(len(ids)), ids, len(ids))
        tokens = self.adapter.tokenize(counts[:, panel].tocsr(), genes, pd.DataFrame(index=range(len(cells))), 0)
        # Groups of cells of about one length, cut to the shortest: rows of equal length share one call to attention.
        order = np.argsort(tokens.lengths, kind="stable")
        order = order[tokens.lengths[order] >= SHORTEST]
        for rows in np.array_split(order, GROUPS):
            if len(rows):
                length = tokens.lengths[rows[0]]
                ids = np.concatenate([tokens.row(i)[:length] for i in rows])
                yield Step(cf.Tokens(ids=ids, offsets=np.arange(len(rows) + 1) * length), candidates)


def main() -> None:
    """Train and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with scrna/ and genes/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps, help="0 writes the untrained network")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)

    genes = Genes.read(given.data / "genes" / "hgnc_2024-10-18.tsv.gz")
    counts, ids = read_cells(given.data, genes)
    seen = np.asarray((counts > 0).sum(axis=0)).ravel() >= MIN_CELLS
    values = medians(counts, seen)
    counts, ids = counts[:, seen].tocsr(), ids[seen]
    print(f"{counts.shape[0]:,} cells, {len(ids):,} genes, {counts.nnz:,} values", flush=True)  # noqa: T201 - a program
    write_dictionaries(given.out, ids, values, genes)
    config = CONFIG | {"vocab_size": len(ids) + len(SPECIAL)}
    layout = layout_of(FAMILY, config)
    begin = random_tensors(layout, given.seed)
    # The head starts from how often each gene is seen.
    begin[BERT_HEAD.bias][len(SPECIAL) :] = torch.from_numpy(np.log(np.asarray((counts > 0).mean(axis=0)).ravel())).float()
    # Genes start from co-expression, on top of an offset that all share: without it, the first LayerNorm would make all equally long.
    begin[BERT_HEAD.words][len(SPECIAL) :] = WORD_SCALE * torch.from_numpy(gene_vectors(counts, config["hidden_size"]))
    begin[OFFSET_KEY][0] = OFFSET_SCALE * torch.randn(config["hidden_size"], generator=torch.Generator().manual_seed(given.seed))
    write_checkpoint(given.out, config, begin)
    if given.steps == 0:
        return

    adapter = cf.load(FAMILY, checkpoint=given.out, device="cpu", precision="float32").adapter
    assert isinstance(adapter, CellAdapter)
    head = Head(BERT_HEAD, begin, config["layer_norm_eps"], adapter.network.get_parameter("genes.weight"))
    shuffled = np.random.default_rng(given.seed).permutation(counts.shape[0])
    n_held_out = int(HELD_OUT * len(shuffled))
    unseen = Batches(adapter, counts[shuffled[:n_held_out]], 0)
    held_out = [step for _ in range(4) for step in unseen.draw()]

    def write(curve: list[dict[str, float]]) -> None:
        write_checkpoint(given.out, config, trained_tensors(adapter.network, head, BERT_HEAD, layout, begin))
        (given.out / "loss.json").write_text(json.dumps(curve, indent=1) + "\n")

    schedule = Schedule(given.steps, SCHEDULE.peak_rate, SCHEDULE.warmup, SCHEDULE.mask_share, SCHEDULE.layer)
    train(
        adapter.network,
        head,
        iter(Batches(adapter, counts[shuffled[n_held_out:]], given.seed)),
        held_out,
        schedule,
        masking=Masking(SPECIAL.index("<mask>"), tuple(range(len(SPECIAL)))),
        seed=given.seed,
        on_report=write,
    )


if __name__ == "__main__":
    main()
