"""Nucleotide Transformer v1 and v2, and AgroNT (Dalla-Torre et al. 2025; Mendoza-Revilla et al. 2024)."""
