"""The version, here rather than in the package's metadata: a checkout that is not installed has none, and its receipts need it too."""

__version__ = "0.1.0"
