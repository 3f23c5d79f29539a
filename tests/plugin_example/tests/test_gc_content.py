"""The plug-in's own tests, run where it is installed."""

import numpy as np

import cellfm_hub as cf
from cellfm_hub.testing import check_sequence_model


def test_contract() -> None:
    rng = np.random.default_rng(0)
    sequences = {f"s{n}": "".join(rng.choice(list("ACGTN"), n)) for n in (1, 7, 50, 300)}
    check_sequence_model(cf.load("gc-content", device="cpu", precision="float32"), sequences)


def test_counted_by_hand() -> None:
    # CGCG: two CpG, 2 C, 2 G, 4 bases: 2 * 4 / (2 * 2) = 2. N is no base, and parts C from G.
    got = cf.embed(["CGCG", "ACNGT", "TTTT", "NN"], "gc-content")
    np.testing.assert_array_equal(got, np.float32([[1, 2, 4], [0.5, 0, 4], [0, 0, 4], [np.nan] * 3]))
