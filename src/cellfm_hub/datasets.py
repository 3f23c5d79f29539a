"""Real data that are on every machine with this package."""

import warnings
from typing import TYPE_CHECKING

import numpy as np

from cellfm_hub.errors import CountsError

if TYPE_CHECKING:
    from anndata import AnnData


def pbmc700() -> "AnnData":
    """Load the 700 blood cells that ship inside scanpy, as raw counts. Needs no network.

    ``scanpy.datasets.pbmc68k_reduced()`` holds log-normalised values, of which the counts are recovered exactly.

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

    from cellfm_hub.sources.recovery import recognise

    with warnings.catch_warnings():
        # The file is in the format of an early anndata.
        warnings.simplefilter("ignore")
        source = sc.datasets.pbmc68k_reduced()
        values = source.raw.X.tocsr()
        genes = source.raw.var_names
    scaling, _, reason = recognise(values)
    if scaling is None:
        msg = f"scanpy's pbmc68k_reduced is not the known file: of its values counts cannot be recovered ({reason}); update cellfm-hub"
        raise CountsError(msg)
    counts = scaling.recover(values)[0].astype(np.float32)
    adata = AnnData(counts)
    adata.obs_names, adata.var_names = source.obs_names, genes
    adata.obs["cell_type"] = source.obs["bulk_labels"].to_numpy()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("category")
    return adata
