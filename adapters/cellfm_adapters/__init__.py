"""The adapters that ship with cellfm-hub: one folder per family, independent of one another."""
