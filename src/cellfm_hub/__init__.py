"""One verb, :func:`embed`, over the published foundation models of single-cell biology and genomics.

Importing this package loads neither torch nor anndata; names are resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellfm_hub import datasets, errors, pl
    from cellfm_hub._settings import settings
    from cellfm_hub.api import embed, load
    from cellfm_hub.embedder import Embedder
    from cellfm_hub.registry import ModelInfo, list_models
    from cellfm_hub.tokens import Ragged, Tokens

__all__ = [
    "Embedder",
    "ModelInfo",
    "Ragged",
    "Tokens",
    "__version__",
    "datasets",
    "embed",
    "errors",
    "list_models",
    "load",
    "pl",
    "settings",
]

_HOMES = {
    "embed": "cellfm_hub.api",
    "load": "cellfm_hub.api",
    "Embedder": "cellfm_hub.embedder",
    "ModelInfo": "cellfm_hub.registry",
    "list_models": "cellfm_hub.registry",
    "settings": "cellfm_hub._settings",
    "Ragged": "cellfm_hub.tokens",
    "Tokens": "cellfm_hub.tokens",
}
_MODULES = {"datasets", "errors", "pl"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"cellfm_hub.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("cellfm-hub")
    else:
        msg = f"module 'cellfm_hub' has no attribute {name!r}"
        raise AttributeError(msg)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
