"""The CUDA path of every family without a GPU: `cpu_as_gpu` checks how the hub calls torch's attention operators."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.common import encoder_of
from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.nn.attention import EFFICIENT, FLASH, VARLEN, Backend
from cellfm_hub.registry import registry
from cpu_as_gpu import contract
from test_gpu import smallest_of_each_family

HERE = Path(__file__).parent


def run_gpu_tests(which: str) -> tuple[set[str], dict[str, int]]:
    """Run tests of ``test_gpu.py`` in a process of its own; return those that passed, and how often each stand-in was called."""
    command = [sys.executable, "-m", "pytest", HERE / "test_gpu.py", "-p", "cpu_as_gpu", "-p", "no:cacheprovider", "-m", "gpu", "-k", which]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-v"], cwd=HERE.parent, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=3600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    calls = re.search(r"stand-ins called: flash=(\d+) efficient=(\d+)", done.stdout)
    assert calls is not None, done.stdout
    passed = set(re.findall(r"test_gpu\.py::(\S+) PASSED", done.stdout))
    return passed, {"flash": int(calls[1]), "efficient": int(calls[2])}


def packed_backends() -> list[Backend]:
    """Return the kernels for packed rows that this torch has."""
    return [VARLEN, FLASH, EFFICIENT] if find_spec("torch.nn.attention.varlen") else [FLASH, EFFICIENT]


def has_alibi(name: str) -> bool:
    """Whether a published network has attention with linear biases."""
    entry = registry().find(name)
    adapter_class = entry.adapter_class()
    assert issubclass(adapter_class, TokenAdapter)
    with torch.device("meta"):
        network = adapter_class.published(dict(entry.checkpoint.config))[0]
    return encoder_of(network).config.alibi


def test_every_family_runs_through_every_packed_kernel() -> None:
    """One network of each family, with heads as wide as the published ones. To be skipped is as bad as to fail: a call was refused."""
    passed, calls = run_gpu_tests("published_shapes and (varlen or flash or efficient)")
    names = [name for name in smallest_of_each_family() if not has_alibi(name)]  # these kernels take none
    assert len(names) >= 5
    backends = [backend.name.replace(" ", "-") for backend in packed_backends()]
    expected = {f"test_published_shapes_with_every_backend[{name}-{backend}]" for name in names for backend in backends}
    assert expected <= passed
    assert min(calls.values()) > 100


@pytest.mark.slow
def test_golden_cases_run_through_the_cuda_path() -> None:
    """Every golden case with the kernels that CUDA would get, and those that ship with the package with every packed kernel."""
    passed, calls = run_gpu_tests("against_the_cpu or (selftest and (varlen or flash or efficient))")
    assert sum("against_the_cpu" in test for test in passed) >= 3 * 9  # three precisions of the portable cases
    assert min(calls.values()) > 200


BOUNDS = torch.tensor([0, 5, 8], dtype=torch.int32)


def test_the_contract_takes_what_the_kernels_take() -> None:
    query = torch.zeros(8, 2, 8)
    contract(query, query, query, BOUNDS, BOUNDS, 5, 5)
    contract(query[[0, 5]], query, query, torch.tensor([0, 1, 2], dtype=torch.int32), BOUNDS, 1, 5)  # first tokens alone


@pytest.mark.parametrize(
    ("bounds", "longest", "head_dim", "why"),
    [
        (BOUNDS.long(), 5, 8, "int32 bounds"),
        (torch.tensor([0, 9, 5, 9, 8, 9], dtype=torch.int32)[::2], 5, 8, "contiguous bounds"),
        (BOUNDS, 4, 8, "no row longer than the longest"),
        (BOUNDS, torch.tensor(5), 8, "plain number"),
        (torch.tensor([0, 5, 5, 8], dtype=torch.int32), 5, 8, "no empty row"),
        (torch.tensor([0, 5, 7], dtype=torch.int32), 5, 8, "end behind the last token"),
        (torch.tensor([1, 5, 8], dtype=torch.int32), 5, 8, "begin at the first token"),
        (BOUNDS, 5, 12, "width of a head"),
        (BOUNDS, 5, 264, "width of a head"),
        (BOUNDS, 5, 6, "16-byte alignment"),
    ],
)
def test_the_contract_refuses_what_the_kernels_read_wrongly(bounds: torch.Tensor, longest: int, head_dim: int, why: str) -> None:
    query = torch.zeros(8, 2, head_dim)
    with pytest.raises(AssertionError, match=why):
        contract(query, query, query, bounds, bounds, longest, longest)


def test_the_contract_wants_the_numbers_of_a_head_side_by_side() -> None:
    query = torch.zeros(8, 2, 8)
    with pytest.raises(AssertionError, match="side by side"):
        contract(query.transpose(1, 2), query, query, BOUNDS, BOUNDS, 5, 5)
