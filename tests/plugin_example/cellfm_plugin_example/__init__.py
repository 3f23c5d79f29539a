"""A complete plug-in for cellfm-hub: one small model of sequences."""
