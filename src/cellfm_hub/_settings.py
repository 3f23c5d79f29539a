"""Settings of the hub, one object: ``cellfm_hub.settings``."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def _default_cache() -> Path:
    if configured := os.environ.get("CELLFM_CACHE"):
        return Path(configured).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local"))
    elif sys.platform == "darwin":
        base = Path("~/Library/Caches")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    return base.expanduser() / "cellfm"


def _is_on(*names: str) -> bool:
    return any(os.environ.get(name, "").lower() in {"1", "true", "yes", "on"} for name in names)


def _default_offline() -> bool:
    return _is_on("CELLFM_OFFLINE", "HF_HUB_OFFLINE")


def _default_commercial() -> bool:
    return _is_on("CELLFM_COMMERCIAL")


def _default_convert() -> bool:
    return not _is_on("CELLFM_NO_CONVERT")


def _default_genes() -> Path | None:
    return Path(configured).expanduser() if (configured := os.environ.get("CELLFM_GENES")) else None


class Settings(BaseModel):
    """Settings that hold for the whole process. Assignments are validated.

    Examples
    --------
    >>> import cellfm_hub as cf
    >>> with cf.settings.override(progress=False):
    ...     pass
    """

    model_config = ConfigDict(validate_assignment=True, extra="forbid")

    cache_dir: Path = Field(default_factory=_default_cache)
    """Where ``cellfm.lock`` is, and weights that do not come from the Hugging Face hub (environment: ``CELLFM_CACHE``)."""

    offline: bool = Field(default_factory=_default_offline)
    """Never touch the network (environment: ``CELLFM_OFFLINE`` or ``HF_HUB_OFFLINE``)."""

    commercial: bool = Field(default_factory=_default_commercial)
    """The use is commercial: weights whose licence is not known to allow that are refused (environment: ``CELLFM_COMMERCIAL``)."""

    convert: bool = Field(default_factory=_default_convert)
    """Keep a safetensors copy of fetched weights that are published as torch files, after their first load: the next ones need less
    memory and no unpickling. It takes as much room as the file (environment: ``CELLFM_NO_CONVERT`` turns it off)."""

    genes_dir: Path | None = Field(default_factory=_default_genes)
    """Folder with tables of former gene names, aliases, retired ids and orthologs, see :mod:`cellfm_hub.genes.tables` (environment:
    ``CELLFM_GENES``). Current human and mouse genes ship with the package."""

    progress: bool | None = None
    """Show progress bars: yes, no, or (``None``) only on a terminal or in a notebook."""

    @contextmanager
    def override(self, **changes: Any) -> Iterator["Settings"]:
        """Change settings for the length of a ``with`` block."""
        before = {name: getattr(self, name) for name in changes}
        try:
            for name, value in changes.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)


settings = Settings()
