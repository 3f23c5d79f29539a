"""Read cells and sequences, block by block."""
