"""The miniature checkpoints that ship with the package, and the programs that trained them.

Nothing here is imported to embed anything: ``demo-cell/`` and ``demo-dna/`` are files like those of any published model, described in
``model_cards/demo.md``; ``train_cell.py`` and ``train_dna.py`` made them.
"""
