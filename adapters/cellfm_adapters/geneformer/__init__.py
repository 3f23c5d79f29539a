"""Geneformer (Theodoris et al. 2023; Chen, Venkatesh et al. 2024)."""
