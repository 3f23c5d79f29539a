"""What all tests share: where the golden cases are, and a process that is left as it was found."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# No test may reach a hub; those that need one are marked `network` and are not run by default.
os.environ["HF_HUB_OFFLINE"] = "1"
# Two test workers on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("CELLFM_SHARED", HERE.parent.parent / "shared"))
"""The founders' folder with large golden cases and real data; absent in a plain checkout."""


@pytest.fixture(autouse=True)
def _clean_process(tmp_path: Path) -> Iterator[None]:
    """Give each test an empty cache, and undo what it changed in torch."""
    from cellfm_hub import settings

    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with settings.override(cache_dir=tmp_path / "cache", offline=True, progress=False):
        yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The founders' folder; the test is skipped where it is absent."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("needs ../shared")
    return SHARED
