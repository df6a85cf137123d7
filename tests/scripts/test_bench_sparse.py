"""scripts/bench_sparse.py: what it measures, on a tiny model."""

import runpy

import pytest
import tiny_models
from paths import SCRIPTS

from localrun import LocalrunError

measure = runpy.run_path(str(SCRIPTS / "bench_sparse.py"))["measure"]


def test_steps_both_ways() -> None:
    found = measure(tiny_models.shared("deepseek32"), 300, 2, threads=2)
    assert found["context"] == 300 and found["index_topk"] == 8
    assert found["dense_over_sparse"] == pytest.approx(found["best_s"]["dense"] / found["best_s"]["sparse"], rel=0.1)
    assert all(0 < found["best_s"][way] <= found["median_s"][way] for way in ("sparse", "dense"))


def test_a_model_without_an_indexer() -> None:
    with pytest.raises(LocalrunError, match="has no indexer"):
        measure(tiny_models.shared("v3"), 16, 1, threads=1)
