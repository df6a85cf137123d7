"""scripts/bench_hybrid.py: without a GPU one line; with the stand-in all figures, of a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import tiny_models
from gpu_dense import use_dense
from gpu_device import HAS_GPU, gpu
from paths import SCRIPTS


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_hybrid

    yield bench_hybrid


def numbers(value: Any) -> Iterator[float]:
    """All that a document has."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, float):
        yield value


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted, so the stand-in has none")
def test_every_figure(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_dense(monkeypatch)
    script.main([str(tiny_models.shared(tiny_models.SMALLEST)), "--stand-in", "-t", "2"])
    found = json.loads(capsys.readouterr().out)
    assert found["stand_in"] and found["card"] is None and found["kernels"] is None
    assert [each["tokens"] for each in found["decode"]] == [1, 2]
    for each in found["decode"]:
        assert each["step_ms"]["median"] > 0 and each["eager_ms"]["median"] > 0 and each["gpu_ms"]["median"] > 0
        assert 0 <= each["covered_by_neither"] < 1 and each["cpu_experts"]["fraction_of_read"] > 0
    assert set(found["layers_ms"]) == {"dense", "experts", "head", "rest"}
    assert found["as_many_layers_as_v3"]["layers_with_experts"] == 58
    assert {"one batch", "two batches", "as measured"} <= set(found["prompts"][0])
    assert found["host_read_gb_per_s"] > 0 and found["upload_gb_per_s"] > 0
    assert all(math.isfinite(number) for number in numbers(found))


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_one_line() -> None:
    command = [sys.executable, SCRIPTS / "bench_hybrid.py", "no.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("bench_hybrid: ") and len(done.stderr.splitlines()) == 1


@gpu
def test_on_a_gpu(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main([str(tiny_models.shared(tiny_models.SMALLEST)), "-t", "2"])
    found = json.loads(capsys.readouterr().out)
    assert found["card"]["name"] and found["decode"][0]["step_ms"]["median"] > 0
