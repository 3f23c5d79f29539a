"""DNABERT-2 and DNABERT-S (Zhou et al. 2024, 2025)."""
