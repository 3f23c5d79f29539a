"""One verb, :func:`embed`, over the published foundation models of single-cell biology and genomics.

Importing this package loads neither torch nor anndata; names are resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellfm_hub import datasets, errors, genes, pl
    from cellfm_hub._settings import settings
    from cellfm_hub._version import __version__
    from cellfm_hub.api import embed, load
    from cellfm_hub.checking import Report, check
    from cellfm_hub.embedder import Embedder
    from cellfm_hub.explaining import explain
    from cellfm_hub.jobs.merge import merge
    from cellfm_hub.jobs.run import Summary, embed_file
    from cellfm_hub.registry import ModelInfo, list_models
    from cellfm_hub.tokens import Ragged, Tokens

__all__ = [
    "Embedder",
    "ModelInfo",
    "Ragged",
    "Report",
    "Summary",
    "Tokens",
    "__version__",
    "check",
    "datasets",
    "embed",
    "embed_file",
    "errors",
    "explain",
    "genes",
    "list_models",
    "load",
    "merge",
    "pl",
    "settings",
]

_HOMES = {
    "__version__": "cellfm_hub._version",
    "embed": "cellfm_hub.api",
    "embed_file": "cellfm_hub.jobs.run",
    "load": "cellfm_hub.api",
    "check": "cellfm_hub.checking",
    "Report": "cellfm_hub.checking",
    "explain": "cellfm_hub.explaining",
    "merge": "cellfm_hub.jobs.merge",
    "Summary": "cellfm_hub.jobs.run",
    "Embedder": "cellfm_hub.embedder",
    "ModelInfo": "cellfm_hub.registry",
    "list_models": "cellfm_hub.registry",
    "settings": "cellfm_hub._settings",
    "Ragged": "cellfm_hub.tokens",
    "Tokens": "cellfm_hub.tokens",
}
_MODULES = {"datasets", "errors", "genes", "pl"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"cellfm_hub.{name}")
    else:
        msg = f"module 'cellfm_hub' has no attribute {name!r}"
        raise AttributeError(msg)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
