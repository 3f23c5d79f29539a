"""The linear probe of DNA vectors is sound: the k-mer baseline scores what the data's README says."""

import pytest

import cellfm_hub as cf
from benchmarks.dna_probe import README, probe
from golden_cases import DATA


@pytest.mark.skipif(not (DATA / "dna").is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("task", ["prom_core_tata", "tf_0"])
def test_kmer_baseline_is_in_line_with_the_readme(task: str) -> None:
    score = probe(task, "kmer", cf.load("kmer"), DATA)
    assert (score.accuracy, score.mcc) == pytest.approx(README[task], abs=0.005)
