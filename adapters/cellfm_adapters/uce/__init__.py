"""UCE, Universal Cell Embeddings (Rosen et al. 2023)."""
