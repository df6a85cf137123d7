"""Kernels compile for cards that are not there, without spills and within their shared memory, and say that they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import slow_but
from gpu_device import compiled_environment
from paths import ROOT

# A few for each capability, so that all kernels and ways of reading blocks are among them and a minute is enough; all
# there are: `python tests/support/gpu_compile.py --capability 80`.
CHOSEN = {
    # With the usual tiles attention over latents takes 68 to 136 KiB there, and products of 64 tokens spill.
    75: [
        *["Q6_K 5 tokens", "BF16 4 tokens", "Q8_0 transposed", "experts 1 tokens, Q4_K Q6_K", "MXFP4 1 tokens"],
        *["queries V3 8 bits", "router V3", "Q4_K 64 tokens, small", "experts 64 tokens, Q4_K Q6_K, small"],
        *["attention V3 16 bits, small", "attention V3 8 bits, small", "attention gpt-oss 16 bits, small"],
    ],
    80: [
        *["Q4_K 1 tokens", "Q6_K 16 tokens", "FP8 widened", "Q8_0 transposed"],
        *["attention V3 16 bits", "attention V3 8 bits", "queries V3 8 bits", "attention gpt-oss 16 bits"],
        *["attention V3 16 bits, 16 heads", "Q4_K 64 tokens, narrow", "Q4_K 5 tokens, eight warps"],
        *["attention V4 16 bits", "streams V4", "router V4", "gated"],
    ],
    89: [
        *["Q8_0 5 tokens", "experts 1 tokens, Q4_K Q6_K", "MXFP4 1 tokens", "Q5_K rows", "Q8_0 8 tokens, split"],
        *["attention V3 16 bits", "attention V3 8 bits", "attention V2-Lite 16 bits", "attention V2-Lite 8 bits"],
        *["router V3", "attention GLM-4.5 16 bits", "attention gpt-oss 16 bits", "sparse attention V3.2"],
        *["attention V4 to chosen rows", "streams V4"],
    ],
    120: [
        *["Q4_K 1 tokens", "F16 4 tokens", "BF16 1 tokens, split"],
        *["attention V3 16 bits", "router V3", "attention gpt-oss 16 bits"],
    ],
    90: [
        *["Q4_K 64 tokens", "FP8 products", "F16 4 tokens", "attention V3 16 bits", "Q4_K 1 tokens, split"],
        *["experts 1 tokens, MXFP4 MXFP4", "experts 64 tokens, MXFP4 MXFP4", "sparse attention V3.2"],
        *["experts 64 tokens, Q4_K Q6_K, eight warps", "Q6_K 64 tokens, three stages", "Q4_K 1 tokens, low"],
        *["attention V4 16 bits", "streams V4", "router V4", "gated"],
    ],
}
# A block's on consumer cards (CUDA programming guide, compute capabilities 8.6, 8.9 and 12.0), and of 7.5.
SHARED_BYTES, SHARED_BYTES_75 = 99 << 10, 64 << 10


def compiled(capability: int, variants: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/support/gpu_compile.py", "--capability", str(capability), *variants]
    environment = compiled_environment() | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("capability", slow_but(CHOSEN, {89}))
def test_kernels_compile_without_spills(capability: int) -> None:
    most = SHARED_BYTES_75 if capability == 75 else SHARED_BYTES
    found = [json.loads(line) for line in compiled(capability, CHOSEN[capability]).stdout.splitlines()]
    assert {line["variant"] for line in found} == set(CHOSEN[capability])
    assert not [line for line in found if line.get("error") or line["stack"] or line["shared"] > most]


@pytest.mark.slow
def test_compiling_is_told_of_once_and_not_where_it_was_done_before(tmp_path: Path) -> None:
    line = "compiling kernels for the GPU, which takes a while; they are kept for the next run\n"
    some, cache = ["router V3", "F16 rows"], {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert compiled(80, some, **cache).stderr == line
    assert compiled(80, some, **cache).stderr == ""
    own = {"TRITON_CACHE_DIR": str(tmp_path / "own"), "TRITON_CACHE_MANAGER": "triton.runtime.cache:FileCacheManager"}
    assert compiled(80, some[:1], **own).stderr == ""
