"""Real data that are on every machine with this package."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from cellfm_hub.errors import CountsError

if TYPE_CHECKING:
    from anndata import AnnData


def pbmc700() -> "AnnData":
    """Load the 700 blood cells that ship inside scanpy, as raw counts. Needs no network.

    ``scanpy.datasets.pbmc68k_reduced()`` holds log-normalised values. Its counts come back exactly: in ``.raw``, the smallest non-zero
    ``expm1`` value of each cell is one count, and all others are whole multiples of it.

    Returns
    -------
    700 cells × 765 genes. ``X``: raw counts, CSR float32. ``obs["cell_type"]``: ten types, from the authors' ``bulk_labels``.
    ``var_names``: gene symbols.

    Raises
    ------
    CountsError
        If scanpy's file is not the one known here.
    """
    import scanpy as sc
    from anndata import AnnData

    with warnings.catch_warnings():
        # The file is in the format of an early anndata.
        warnings.simplefilter("ignore")
        source = sc.datasets.pbmc68k_reduced()
        values = source.raw.X.tocsr().astype(np.float64)
        genes = source.raw.var_names
    values.data = np.expm1(values.data)
    one_count = np.minimum.reduceat(values.data, values.indptr[:-1])
    multiples = values.data / np.repeat(one_count, np.diff(values.indptr))
    # The file's values are rounded to three decimals.
    if np.abs(multiples - np.rint(multiples)).max() > 0.25:
        msg = "scanpy's pbmc68k_reduced is not the known file: its values are not multiples of a smallest one; update cellfm-hub"
        raise CountsError(msg)
    counts = sp.csr_matrix((np.rint(multiples).astype(np.float32), values.indices, values.indptr), shape=values.shape)
    adata = AnnData(counts)
    adata.obs_names, adata.var_names = source.obs_names, genes
    adata.obs["cell_type"] = source.obs["bulk_labels"].to_numpy()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("category")
    return adata
