"""What a step queues for a layer of V3's kind, against what the planner counts; V4's: test_gpu_compressed.py."""

from __future__ import annotations

import gpu_launches
import pytest
from gpu_device import HAS_GPU
from gpu_models import opened

pytest.importorskip("triton", reason="localrun.gpu needs Triton")

from localrun.plan import launches


@pytest.mark.skipif(HAS_GPU, reason="counts in Triton's interpreter")
def test_a_layers_launches_are_what_the_planner_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as (model, _):
        for index, found in enumerate(gpu_launches.of_layers(model, monkeypatch)):
            assert found.total() == launches.of_layer(model.config, index), (index, found)
