"""`pca` and `hvg` for cells, `kmer` for sequences."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from cellfm_hub.adapter import CellFeatures, Options, SequenceFeatures
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.errors import InputError
from cellfm_hub.genes import CountMatrix
from cellfm_hub.sequences import base_codes, kmer_codes

if TYPE_CHECKING:
    from anndata import AnnData


class HvgOptions(Options):
    """Switches of `hvg`."""

    n_top_genes: int = Field(2000, ge=1)


class PcaOptions(HvgOptions):
    """Switches of `pca`."""

    n_components: int = Field(50, ge=1)


class KmerOptions(Options):
    """Switches of `kmer`."""

    k: int = Field(4, ge=1, le=8)


def _variable_genes(counts: CountMatrix, n_top_genes: int) -> "AnnData":
    """Normalise to 10,000 counts per cell, take logarithms, keep the most variable genes."""
    import scanpy as sc
    from anndata import AnnData

    adata = AnnData(counts.astype(np.float32))
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    if adata.n_vars > n_top_genes:
        sc.pp.highly_variable_genes(adata, n_top_genes=n_top_genes, flavor="seurat")
        adata = adata[:, adata.var["highly_variable"]].copy()
    return adata


class HvgAdapter(CellFeatures):
    """Log-normalised counts of the most variable genes."""

    options = HvgOptions

    @classmethod
    def load(cls, files: CheckpointFiles, options: HvgOptions, device: torch.device, dtype: torch.dtype) -> Self:
        adapter = cls()
        adapter.n_top_genes = adapter.embedding_dim = options.n_top_genes
        return adapter

    n_top_genes: int

    def embed(self, counts: CountMatrix, seed: int) -> NDArray[np.float32]:
        return _variable_genes(counts, self.n_top_genes).X.toarray()  # type: ignore[no-any-return]


class PcaAdapter(CellFeatures):
    """Principal components of log-normalised counts."""

    options = PcaOptions
    n_top_genes: int

    @classmethod
    def load(cls, files: CheckpointFiles, options: PcaOptions, device: torch.device, dtype: torch.dtype) -> Self:
        adapter = cls()
        adapter.n_top_genes, adapter.embedding_dim = options.n_top_genes, options.n_components
        return adapter

    def check_size(self, cells: int, genes: int) -> None:
        genes = min(genes, self.n_top_genes)
        possible = min(cells, genes) - 1
        if self.embedding_dim > possible:
            msg = f"n_components={self.embedding_dim}, but {cells} cells with {genes} genes have at most {possible};"
            msg += f" pass options={{'n_components': {max(possible, 1)}}}"
            raise InputError(msg)

    def embed(self, counts: CountMatrix, seed: int) -> NDArray[np.float32]:
        import scanpy as sc

        adata = _variable_genes(counts, self.n_top_genes)
        self.check_size(*adata.shape)
        sc.pp.pca(adata, n_comps=self.embedding_dim, svd_solver="arpack", random_state=seed)
        return np.asarray(adata.obsm["X_pca"], dtype=np.float32)


class KmerAdapter(SequenceFeatures):
    """Normalised k-mer frequencies."""

    options = KmerOptions
    k: int

    @classmethod
    def load(cls, files: CheckpointFiles, options: KmerOptions, device: torch.device, dtype: torch.dtype) -> Self:
        adapter = cls()
        adapter.k, adapter.embedding_dim = options.k, 4**options.k
        return adapter

    def embed(self, sequences: Sequence[str]) -> NDArray[np.float32]:
        codes, offsets = base_codes(sequences, "ACGT")
        kmers = kmer_codes(codes, self.k, 4)
        # A window counts where all its letters are bases, of one and the same sequence.
        foreign = np.concatenate(([0], np.cumsum(codes < 0)))
        row = np.repeat(np.arange(len(sequences)), np.diff(offsets))
        n = len(kmers)
        counted = (foreign[self.k :][:n] == foreign[:n]) & (row[:n] == row[self.k - 1 :][:n])
        size = len(sequences) * self.embedding_dim
        table = np.bincount(row[:n][counted] * self.embedding_dim + kmers[counted], minlength=size)
        table = table.reshape(len(sequences), self.embedding_dim).astype(np.float64)
        total = table.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            frequencies: NDArray[np.float32] = (table / total).astype(np.float32)
        return frequencies
