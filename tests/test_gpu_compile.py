"""Kernels compile for cards that are not there, without spilled registers and within their shared memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_device import compiled_environment

ROOT = Path(__file__).parents[1]
# A few for each capability, so that all kernels and ways of reading blocks are among them and a minute is enough; all
# there are: `python tests/gpu_compile.py --capability 80`.
CHOSEN = {
    80: ["Q4_K 1 tokens", "Q6_K 16 tokens", "FP8 widened", "Q8_0 transposed"],
    89: ["Q8_0 5 tokens", "experts 1 tokens, Q4_K Q6_K", "MXFP4 1 tokens", "Q5_K rows"],
    90: ["Q4_K 64 tokens", "FP8 products", "F16 4 tokens"],
}
SHARED_BYTES = 99 << 10  # a block's on consumer cards (CUDA programming guide, compute capabilities 8.6 and 8.9)


@pytest.mark.parametrize("capability", CHOSEN)
def test_kernels_compile_without_spills(capability: int) -> None:
    command = [sys.executable, "tests/gpu_compile.py", "--capability", str(capability), *CHOSEN[capability]]
    environment = compiled_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["variant"] for line in found} == set(CHOSEN[capability])
    assert not [line for line in found if line["stack"] or line["shared"] > SHARED_BYTES]
